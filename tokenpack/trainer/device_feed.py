"""Copies micro-batches to the device, one ahead of the computation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import recursively_apply, send_to_device
from torch import Tensor


class DeviceFeed:
    """Yields micro-batches on the device, and copies the next one during the current one.

    On a GPU, copies run on a side stream from page-locked memory. The compute stream waits for the
    event of a copy before it reads the data. ``record_stream`` tells the allocator that the compute
    stream uses the memory, so that the memory is not reused before the computation is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, microbatches: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """Copy each micro-batch to the device. The copy runs one micro-batch ahead."""
        ahead = None
        for microbatch in microbatches:
            copied = self._copy(microbatch)
            if ahead is not None:
                yield self._wait(*ahead)
            ahead = copied
        if ahead is not None:
            yield self._wait(*ahead)

    def _copy(self, microbatch: Mapping[str, Any]) -> tuple[Mapping[str, Any], Any]:
        """The micro-batch on the device, and the event that marks the end of the copy."""
        if self._stream is None:
            return send_to_device(microbatch, self.device, non_blocking=True), None
        with torch.cuda.stream(self._stream):
            copied = send_to_device(pinned(microbatch), self.device, non_blocking=True)
            return copied, self._stream.record_event()

    def _wait(self, microbatch: Mapping[str, Any], event: Any) -> Mapping[str, Any]:
        if event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            recursively_apply(
                lambda tensor: tensor.record_stream(current),
                dict(microbatch),
                test_type=lambda value: isinstance(value, Tensor) and value.is_cuda,
            )
        return microbatch


def pinned(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch with its CPU tensors in page-locked memory."""
    pin = getattr(inputs, "pin_memory", None)
    if pin is not None:
        return pin()
    return recursively_apply(
        Tensor.pin_memory,
        dict(inputs),
        test_type=lambda value: isinstance(value, Tensor) and value.is_cpu,
    )
