"""Measure the memory that a call allocates while it really runs.

    peak = max over time of (bytes allocated - bytes released since the call began)

On a CUDA device the allocator keeps this number. The CPU allocator keeps no statistics, but it
reports every allocation and release, including those inside C++ operators, to PyTorch's profiler;
the running sum of these reports is the same number. Unlike the resident memory of the process, it
does not depend on when memory returns to the operating system, so it is the same on every machine.
Scratch memory of the matrix libraries is not included.

`memory.py` predicts the same peak without running anything, for a model on the meta device.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

_PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"})


class Allocations(NamedTuple):
    """What PyTorch's CPU allocator did during a call.

    Attributes:
        peak: most bytes in use at once, relative to the start of the call.
        largest: bytes of the largest single allocation.
        products: number of matrix products that ran.
    """

    peak: int
    largest: int
    products: int


def allocations(function: Callable[[], object]) -> Allocations:
    """Run ``function`` on the CPU under the profiler and count its allocations."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = function()  # stays alive until the profiler stops
    del result
    # `trace.events()` merges memory events; these are single allocations and releases, by time.
    assert trace.profiler is not None
    events = trace.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    current = peak = 0
    for change in changes:
        current += change
        peak = max(peak, current)
    products = sum(event.name() in _PRODUCTS for event in events)
    return Allocations(peak, max(changes, default=0), products)


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Run ``function`` on ``device`` and return its peak memory, in bytes.

    Memory in use before the call is not included.
    """
    if device.type != "cuda":
        with _silent_stderr():
            return allocations(function).peak
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Hide the profiler's C++ warning about releases of memory from before it started."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "wb") as devnull:
        os.dup2(devnull.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
