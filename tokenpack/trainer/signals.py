"""Stop training after the current step on SIGTERM or Ctrl-C.

A terminal sends Ctrl-C to all of its processes. torchrun and batch systems send SIGTERM to all
processes of a job. The workers of a `DataLoader` get these signals too. If they ended, training
would fail before it could save a checkpoint. Therefore the workers ignore signals during training.
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
    """A context in which the first SIGTERM or Ctrl-C sets `requested`.

    A second Ctrl-C raises KeyboardInterrupt. An earlier Python handler for SIGTERM is called too.
    Signals that are ignored, or handled outside of Python, are left as they are. Python can set and
    run signal handlers only in the main thread. In any other thread, the context does nothing.

    Attributes:
        requested: whether training must stop.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}
        self._interrupts = 0
        self._process = os.getpid()
        self._entered = torch.zeros((), dtype=torch.uint8)

    def __enter__(self) -> StopSignals:
        self.requested, self._interrupts, self._process = False, 0, os.getpid()
        self._entered.share_memory_().fill_(1)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._entered.fill_(0)
        while self._before:
            signal.signal(*self._before.popitem())

    def protect_workers(self, loader: DataLoader) -> DataLoader:
        """Let the loader's workers ignore signals in this context."""
        if loader.num_workers:
            inner = getattr(loader, "base_dataloader", loader)  # accelerate wraps loaders
            inner.worker_init_fn = partial(_init_worker, inner.worker_init_fn, self._entered)
        return loader

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        before = self._before.get(number)
        if os.getpid() != self._process:  # a forked child, for example of a pool, inherits handlers
            signal.signal(number, before)
            os.kill(os.getpid(), number)
            return
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        if not self.requested:
            name = signal.Signals(number).name
            logger.warning(f"{name}: training saves a checkpoint after this step and stops.")
        self.requested = True
        if number != signal.SIGINT and callable(before):
            before(number, frame)


def _init_worker(init: Any, in_training: Tensor, worker: int) -> None:
    """Initialize a loader's worker: ignore Ctrl-C, and SIGTERM during training.

    After training, SIGTERM must work: a loader terminates its remaining workers with it.
    """

    def on_terminate(number: int, frame: FrameType | None) -> None:
        if not in_training:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_terminate)
    if init is not None:
        init(worker)
