"""Sorting lengths and bins: by counting, since they are small integers.

NumPy sorts 16-bit integers by radix, in time linear in their number, and wider ones by comparison,
about ten times slower. So wider keys are sorted by 16 bits at a time, the lowest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DIGIT = 1 << 16
_COUNTED_BY_VALUE = 1 << 22  # up to where a counter for each value is nothing to speak of


def stable_argsort(keys: NDArray[np.integer], end: int) -> NDArray[np.int64]:
    """Indices that sort integers from 0 up to ``end``, excluded; equal ones stay in order."""
    if end <= _DIGIT:
        return keys.astype(np.uint16, copy=False).argsort(kind="stable")
    order = (keys % _DIGIT).astype(np.uint16).argsort(kind="stable")
    higher = stable_argsort((keys // _DIGIT)[order], -(-end // _DIGIT))
    return order[higher]


def distinct_lengths(
    lengths: NDArray[np.integer],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which lengths there are, rising, and how many of each."""
    if int(lengths.max()) > _COUNTED_BY_VALUE + 8 * len(lengths):
        sizes, counts = np.unique(lengths, return_counts=True)
        return sizes.astype(np.int64), counts
    histogram = np.bincount(lengths)
    sizes = np.flatnonzero(histogram)
    return sizes, histogram[sizes]


def longest_first(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """Indices by falling length; equal lengths stay in order."""
    longest = int(lengths.max())
    if longest < _DIGIT:
        lengths = lengths.astype(np.uint16)  # first, which makes the subtraction four times cheaper
    return stable_argsort(lengths.dtype.type(longest) - lengths, longest + 1)


def group_by_bin(
    bin_of: NDArray[np.integer], num_bins: int, order: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``(items, offsets)`` from the bin of each item; ``order`` says which item that is.

    Items of a bin stay in the order they are given in. ``offsets`` is ``(num_bins + 1,)``.
    """
    items = stable_argsort(bin_of, num_bins)
    offsets = offsets_of(np.bincount(bin_of, None, num_bins))
    return (items if order is None else order[items]), offsets


def offsets_of(counts: NDArray[Any] | Sequence[int]) -> NDArray[np.int64]:
    """``(n + 1,)``: 0, then the sums of the counts so far."""
    offsets = np.empty(len(counts) + 1, np.int64)
    offsets[0] = 0
    np.cumsum(counts, dtype=np.int64, out=offsets[1:])
    return offsets


def ranges(
    firsts: NDArray[np.int64], counts: NDArray[np.int64], naturals: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """``count`` numbers from each of ``firsts`` on, one range after the other.

    ``naturals`` are 0, 1, ... for at least as many, where the caller has them: to write them anew
    takes as long as the rest.
    """
    numbers = np.repeat(firsts - (np.cumsum(counts) - counts), counts)
    numbers += np.arange(len(numbers)) if naturals is None else naturals[: len(numbers)]
    return numbers


def shuffled(count: int, seed: int) -> NDArray[np.int64]:
    """A permutation: of raw bits, which NumPy keeps the same over versions, unlike its methods."""
    return np.random.PCG64(seed).random_raw(count).argsort(kind="stable")
