"""Copies micro-batches to the device, one ahead of the computation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
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
            return on_device(microbatch, self.device), None
        with torch.cuda.stream(self._stream):
            copied = on_device(pinned(microbatch), self.device)
            return copied, self._stream.record_event()

    def _wait(self, microbatch: Mapping[str, Any], event: Any) -> Mapping[str, Any]:
        if event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            for tensor in _tensors(microbatch):
                if tensor.is_cuda:
                    tensor.record_stream(current)
        return microbatch


def on_device(inputs: Mapping[str, Any], device: torch.device) -> Mapping[str, Any]:
    """The batch with its tensors on ``device``, copied asynchronously from page-locked memory.

    Other objects in the batch stay unchanged, even if they have a method ``to``: the feed could not
    record which stream uses their memory.
    """
    containers = (Tensor, Mapping, list, tuple)
    others = [name for name, value in inputs.items() if not isinstance(value, containers)]
    return send_to_device(inputs, device, non_blocking=True, skip_keys=others)


def pinned(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch with its CPU tensors in page-locked memory."""
    pin = getattr(inputs, "pin_memory", None)
    if pin is not None:
        return pin()
    return {
        name: value.pin_memory() if isinstance(value, Tensor) and value.is_cpu else value
        for name, value in inputs.items()
    }


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested mappings, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(each)
