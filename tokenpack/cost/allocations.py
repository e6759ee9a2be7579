"""What a call costs beside time, counted: the same on every machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile

_PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"})


class Allocations(NamedTuple):
    """What PyTorch's CPU allocator handed out during a call.

    Attributes:
        peak: most bytes that lived at once, of those allocated during the call.
        largest: bytes of the largest allocation.
        products: matrix products that ran.
    """

    peak: int
    largest: int
    products: int


def allocations(function: Callable[[], object]) -> Allocations:
    """Run ``function`` on the CPU under the profiler, which sees inside ops too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = function()  # keeps what it gives back alive, as its caller would
    del result
    # In order of time, each allocation and release: `seen.events()` sums some of them up.
    assert seen.profiler is not None
    events = seen.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    now = peak = 0
    for change in changes:
        now += change
        peak = max(peak, now)
    products = sum(event.name() in _PRODUCTS for event in events)
    return Allocations(peak, max(changes, default=0), products)
