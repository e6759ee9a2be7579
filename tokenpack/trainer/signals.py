"""Treat SIGTERM and Ctrl-C as a request to stop after the current step.

A terminal sends Ctrl-C to all of its processes, and torchrun and batch systems send SIGTERM to all
processes of a job. The workers of a data loader receive the signal too. If they ended, training
would fail before it could save a checkpoint. So the workers ignore the signal, and the process that
they work for handles it.
"""

from __future__ import annotations

import os
import signal
import threading
from functools import partial
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.utils import logging

logger = logging.get_logger(__name__)


class StopSignals:
    """In this context, the first SIGTERM or SIGINT sets `requested`; a second Ctrl-C interrupts.

    Python allows only the main thread to set signal handlers. In other threads, this context has no
    effect. A SIGTERM handler that was set before is called as well. Signals that were ignored, or
    that are handled outside Python, keep their handling.

    Attributes:
        requested: whether a signal has requested a stop.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}
        self._interrupts = 0
        self._process = os.getpid()
        self._entered = torch.zeros((), dtype=torch.uint8)

    def __enter__(self) -> StopSignals:
        self.requested, self._interrupts, self._process = False, 0, os.getpid()
        self._entered.share_memory_().fill_(1)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._entered.fill_(0)
        while self._previous:
            signal.signal(*self._previous.popitem())

    def shield_workers(self, loader: DataLoader) -> DataLoader:
        """Make the loader's workers ignore signals inside this context."""
        if loader.num_workers:
            inner = getattr(loader, "base_dataloader", loader)  # if accelerate prepared it
            inner.worker_init_fn = partial(_init_worker, inner.worker_init_fn, self._entered)
        return loader

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous.get(number)
        if os.getpid() != self._process:  # a child process, for example of a pool
            signal.signal(number, previous)
            os.kill(os.getpid(), number)
            return
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        if not self.requested:
            name = signal.Signals(number).name
            logger.warning(f"{name}: saving a checkpoint after this step, then ending training")
        self.requested = True
        if number != signal.SIGINT and callable(previous):
            previous(number, frame)


def _init_worker(worker_init_fn: Any, in_training: Tensor, worker: int) -> None:
    """In a loader's worker: ignore Ctrl-C, and ignore SIGTERM during training.

    After training, SIGTERM ends the worker, because a loader ends its workers that way.
    """

    def on_terminate(number: int, frame: FrameType | None) -> None:
        if not in_training:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_terminate)
    if worker_init_fn is not None:
        worker_init_fn(worker)
