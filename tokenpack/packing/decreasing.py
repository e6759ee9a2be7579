"""First-fit decreasing (FFD) and modified first-fit decreasing (MFFD).

Both place sequences from the longest to the shortest. FFD places all sequences of one length at
once, with NumPy over blocks of bins, so no Python step is spent on a single sequence. MFFD loops
over the bins that hold a sequence of more than half the capacity.
"""

from __future__ import annotations

from bisect import bisect_right
from math import inf

import numpy as np
from numpy.typing import NDArray

from ..segments import Plan, group_by_bin, longest_first

_BLOCK = 1024  # bins per NumPy call


def first_fit_decreasing(
    lengths: NDArray[np.integer], capacity: int, max_sequences: int | None = None
) -> Plan:
    """Put each sequence, from the longest to the shortest, into the first bin with space for it.

    Needs at most 11/9 of the fewest bins, plus 6/9 (Dósa, 2007). A Python step handles one distinct
    length and one block of bins with space for it.
    """
    order = longest_first(lengths)
    bin_of, num_bins = _first_fit(lengths[order], capacity, max_sequences)
    return group_by_bin(bin_of, num_bins, order)


def _first_fit(
    lengths: NDArray[np.integer], capacity: int, max_sequences: int | None = None
) -> tuple[NDArray[np.int64], int]:
    """Return the bin of each of these lengths, which must decrease, and the number of bins."""
    limit = len(lengths) if max_sequences is None else max_sequences
    firsts = np.flatnonzero(np.diff(lengths, prepend=int(lengths[0]) + 1))
    sizes, counts = lengths[firsts].tolist(), np.diff(firsts, append=len(lengths)).tolist()
    # As many bins as there can be, in blocks. An unopened bin has the whole capacity. A size over
    # the largest free space in a block fits none of its bins.
    blocks = -(-len(lengths) // _BLOCK)
    free = np.full((blocks, _BLOCK), capacity)
    quota = np.full((blocks, _BLOCK), limit)  # sequences that each bin may still take
    largest = np.full(blocks, capacity)
    parts = []
    for size, count in zip(sizes, counts):
        for block in np.flatnonzero(largest >= size).tolist():
            fits = np.flatnonzero(free[block] >= size)
            takes = np.minimum(free[block, fits] // size, quota[block, fits])
            takes = np.diff(np.minimum(np.cumsum(takes), count), prepend=0)
            free[block, fits] -= takes * size
            quota[block, fits] -= takes
            free[block, quota[block] == 0] = 0
            largest[block] = free[block].max()
            parts.append(np.repeat(fits + block * _BLOCK, takes))
            count -= len(parts[-1])
            if not count:
                break
    bin_of = np.concatenate(parts)
    return bin_of, int(bin_of.max()) + 1


def modified_first_fit_decreasing(
    lengths: NDArray[np.integer], capacity: int, max_sequences: int | None = None
) -> Plan:
    """First-fit decreasing that fills the bins of sequences over half the capacity first.

    Needs at most 71/60 of the fewest bins, plus 1 (Johnson and Garey, "A 71/60 theorem for bin
    packing", 1985). A Python loop over the bins that hold a sequence over half the capacity.

    Raises:
        ValueError: if ``max_sequences`` is given, which the algorithm does not support.
    """
    if max_sequences is not None:
        raise ValueError(f"max_sequences must be None with strategy mffd, got {max_sequences}")
    order = longest_first(lengths)
    decreasing = lengths[order].astype(np.int64)
    # Classes by capacity C: large (C/2, C], medium (C/3, C/2], small (C/6, C/3], tiny (0, C/6].
    # Each large sequence opens a bin.
    ends = [int(np.searchsorted(-decreasing, -(capacity // part))) for part in (2, 3, 6)]
    bins_of, sizes_of = list(range(ends[0])), decreasing[: ends[0]].tolist()
    free = (capacity - decreasing[: ends[0]]).tolist()
    medium, small = _Pool(decreasing[ends[0] : ends[1]]), _Pool(decreasing[ends[1] : ends[2]])

    def place(number: int, pool: _Pool, size: int) -> None:
        pool.take(size)
        free[number] -= size
        bins_of.append(number)
        sizes_of.append(size)

    with_medium = set()
    for number, space in enumerate(free):
        if medium.sizes and medium.sizes[0] <= space:
            place(number, medium, medium.largest(space))
            with_medium.add(number)
    for number in reversed(range(len(free))):
        if number not in with_medium and small.two_smallest() <= free[number]:
            place(number, small, small.sizes[0])
            place(number, small, small.largest(free[number]))
    rest = _Pool(decreasing[ends[2] :]).joined(medium).joined(small)
    for number in range(len(free)):
        while rest.sizes and rest.sizes[0] <= free[number]:
            place(number, rest, rest.largest(free[number]))
    left = rest.decreasing()
    bin_of, num_bins = np.array(bins_of, np.int64), len(free)
    if len(left):
        new, opened = _first_fit(left, capacity)
        bin_of, num_bins = np.concatenate((bin_of, new + num_bins)), num_bins + opened
    # The steps above place lengths. Sequences of one length take these places in input order.
    items = np.empty(len(order), np.int64)
    items[longest_first(np.concatenate((sizes_of, left)))] = order
    return group_by_bin(bin_of, num_bins, items)


class _Pool:
    """A multiset of lengths. ``sizes`` holds the distinct lengths in increasing order."""

    def __init__(self, lengths: NDArray[np.int64]) -> None:
        sizes, counts = np.unique(lengths, return_counts=True)
        self.sizes = sizes.tolist()
        self.counts = dict(zip(self.sizes, counts.tolist()))

    def largest(self, space: int) -> int:
        """Return the largest length that fits in ``space``. There must be one."""
        return self.sizes[bisect_right(self.sizes, space) - 1]

    def two_smallest(self) -> float:
        """Return the sum of the two smallest lengths, or infinity if there are fewer than two."""
        if not self.sizes or (len(self.sizes) == 1 and self.counts[self.sizes[0]] == 1):
            return inf
        return self.sizes[0] + self.sizes[self.counts[self.sizes[0]] == 1]

    def take(self, size: int) -> None:
        self.counts[size] -= 1
        if not self.counts[size]:
            del self.counts[size], self.sizes[bisect_right(self.sizes, size) - 1]

    def joined(self, longer: _Pool) -> _Pool:
        """Add the lengths of a pool that has none of this pool's lengths."""
        self.sizes = sorted(self.sizes + longer.sizes)
        self.counts.update(longer.counts)
        return self

    def decreasing(self) -> NDArray[np.int64]:
        counts = [self.counts[size] for size in self.sizes]
        return np.repeat(np.array(self.sizes, np.int64), counts)[::-1]
