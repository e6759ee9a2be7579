"""NumPy helpers for arrays of segments, and fast stable sorts of small integers.

Segments of different lengths are stored one after the other in a flat array with their offsets:

    segment i = values[offsets[i] : offsets[i + 1]],    offsets[0] = 0

NumPy sorts 16-bit integers with a radix sort, in linear time, and wider integers with a comparison
sort, which is about ten times slower. Lengths and bin numbers are small, so `stable_argsort` sorts
them as 16-bit integers. It sorts wider keys 16 bits at a time, lowest bits first.

This file imports nothing but NumPy: `tokenpack.packing` uses it and must not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Plan = tuple[NDArray[np.int64], NDArray[np.int64]]
"""``(items, offsets)``: bin b holds ``items[offsets[b]:offsets[b + 1]]``. Both are int64."""

_DIGIT = 1 << 16
_MAX_HISTOGRAM = 1 << 22  # lengths up to here always get a counter each


def offsets_of(lengths: NDArray[Any] | Sequence[int]) -> NDArray[np.int64]:
    """``(n + 1,)`` int64: 0, then the cumulative sum of the segments' lengths."""
    offsets = np.empty(len(lengths) + 1, np.int64)
    offsets[0] = 0
    np.cumsum(lengths, dtype=np.int64, out=offsets[1:])
    return offsets


def rounded_sequences(num_seqs: int) -> int:
    """The number of sequences of a stream that dead tokens fill up: a power of two, at least 64.

    It is larger than ``num_seqs``, because the dead tokens are a sequence, too.
    """
    return max(64, 1 << num_seqs.bit_length())


def ranges(
    starts: NDArray[np.int64], counts: NDArray[np.int64], arange: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Concatenate the ranges ``start, start + 1, ..., start + count - 1``.

    Pass ``arange``, an ``np.arange`` of at least ``counts.sum()``, if you have one. Creating it
    takes as long as the rest of this function.
    """
    values = np.repeat(starts - (np.cumsum(counts) - counts), counts)
    values += np.arange(len(values)) if arange is None else arange[: len(values)]
    return values


def segment_sum(
    values: NDArray[Any], offsets: NDArray[np.int64], dtype: DTypeLike | None = None
) -> NDArray[Any]:
    """``(n,)``, the sum of each segment of ``values``. No segment may be empty."""
    return np.add.reduceat(values, offsets[:-1], dtype=dtype)


def group_by_bin(
    bin_of: NDArray[np.integer], num_bins: int, order: NDArray[np.int64] | None = None
) -> Plan:
    """Collect the items of each bin, in the order of ``bin_of``.

    Args:
        bin_of: ``(n,)`` integers, the bin of item i, or of item ``order[i]`` if ``order`` is given.
        num_bins: the number of bins.
        order: ``(n,)`` int64, a permutation of the items.
    """
    items = stable_argsort(bin_of, num_bins)
    offsets = offsets_of(np.bincount(bin_of, None, num_bins))
    return (items if order is None else order[items]), offsets


def stable_argsort(keys: NDArray[np.integer], end: int) -> NDArray[np.int64]:
    """Return the indices that sort integers in ``[0, end)``. Equal keys keep their order."""
    if end <= _DIGIT:
        return keys.astype(np.uint16, copy=False).argsort(kind="stable")
    order = (keys % _DIGIT).astype(np.uint16).argsort(kind="stable")
    higher = stable_argsort((keys // _DIGIT)[order], -(-end // _DIGIT))
    return order[higher]


def longest_first(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the indices that sort by decreasing length. Equal lengths keep their order."""
    longest = int(lengths.max())
    if longest < _DIGIT:
        lengths = lengths.astype(np.uint16)  # before the subtraction, which is then 4 times faster
    return stable_argsort(lengths.dtype.type(longest) - lengths, longest + 1)


def length_histogram(
    lengths: NDArray[np.integer],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the distinct lengths in increasing order, and the number of sequences of each."""
    if int(lengths.max()) > _MAX_HISTOGRAM + 8 * len(lengths):
        sizes, counts = np.unique(lengths, return_counts=True)
        return sizes.astype(np.int64), counts
    histogram = np.bincount(lengths)
    sizes = np.flatnonzero(histogram)
    return sizes, histogram[sizes]


def random_permutation(count: int, seed: int) -> NDArray[np.int64]:
    """Return a random permutation of ``0, ..., count - 1``.

    It sorts raw generator bits. NumPy keeps those the same across versions, but not the results of
    its random methods.
    """
    return np.random.PCG64(seed).random_raw(count).argsort(kind="stable")
