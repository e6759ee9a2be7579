"""First-fit decreasing and its modification: sequences from the longest, bins in order.

Sequences of one length are placed together, by NumPy over all bins (first fit) or bin groups of
one history together (modified), so that no step in Python is for a single sequence.
"""

from __future__ import annotations

from bisect import bisect_right
from math import inf

import numpy as np
from numpy.typing import NDArray

from ..segments import group_by_bin, longest_first
from .arrival import Plan

_BLOCK = 1024  # bins looked at together


def first_fit_decreasing(
    lengths: NDArray[np.integer], capacity: int, max_sequences: int | None = None
) -> Plan:
    """From the longest on, each goes to the first bin that it fits into.

    At most 11/9 of the fewest bins, plus 6/9 (Dósa, 2007). A step in Python is for a distinct
    length and a block of bins that has room for it.
    """
    order = longest_first(lengths)
    bin_of, num_bins = _first_fit_falling(lengths[order], capacity, max_sequences)
    return group_by_bin(bin_of, num_bins, order)


def _first_fit_falling(
    falling: NDArray[np.integer], capacity: int, max_sequences: int | None = None
) -> tuple[NDArray[np.int64], int]:
    """The bin of each of these lengths, which fall, and how many bins there are."""
    limit = len(falling) if max_sequences is None else max_sequences
    firsts = np.flatnonzero(np.diff(falling, prepend=int(falling[0]) + 1))
    sizes, counts = falling[firsts].tolist(), np.diff(firsts, append=len(falling)).tolist()
    # All bins that there may be, in blocks; a bin not open yet has the whole capacity, and none
    # beyond the last opened is needed. What a block's roomiest bin cannot take, no bin of it can.
    blocks = -(-len(falling) // _BLOCK)
    rooms = np.full((blocks, _BLOCK), capacity)
    allowed = np.full((blocks, _BLOCK), limit)
    roomiest = np.full(blocks, capacity)
    parts = []
    for size, count in zip(sizes, counts):
        for block in np.flatnonzero(roomiest >= size).tolist():
            fits = np.flatnonzero(rooms[block] >= size)
            takes = np.minimum(rooms[block, fits] // size, allowed[block, fits])
            takes = np.diff(np.minimum(np.cumsum(takes), count), prepend=0)
            rooms[block, fits] -= takes * size
            allowed[block, fits] -= takes
            rooms[block, allowed[block] == 0] = 0
            roomiest[block] = rooms[block].max()
            parts.append(np.repeat(fits + block * _BLOCK, takes))
            count -= len(parts[-1])
            if not count:
                break
    bin_of = np.concatenate(parts)
    return bin_of, int(bin_of.max()) + 1


def modified_first_fit_decreasing(
    lengths: NDArray[np.integer], capacity: int, max_sequences: int | None = None
) -> Plan:
    """First-fit decreasing that pairs what is over half the capacity with care first.

    At most 71/60 of the fewest bins, plus 1 (Johnson and Garey, "A 71/60 theorem for bin packing",
    1985). A loop in Python over the bins that hold a large sequence.

    Raises:
        ValueError: if ``max_sequences`` is given: its five passes place pairs.
    """
    if max_sequences is not None:
        raise ValueError(f"max_sequences must be None with strategy mffd, got {max_sequences}")
    order = longest_first(lengths)
    falling = lengths[order].astype(np.int64)
    # Large ones, over half the capacity, open a bin each; then over a third, a sixth, and the rest.
    ends = [int(np.searchsorted(-falling, -(capacity // part))) for part in (2, 3, 6)]
    bins_of, sizes_of = list(range(ends[0])), falling[: ends[0]].tolist()
    rooms = (capacity - falling[: ends[0]]).tolist()
    medium, small = _Pool(falling[ends[0] : ends[1]]), _Pool(falling[ends[1] : ends[2]])

    def place(number: int, pool: _Pool, size: int) -> None:
        pool.take(size)
        rooms[number] -= size
        bins_of.append(number)
        sizes_of.append(size)

    paired = set()
    for number, room in enumerate(rooms):
        if medium.sizes and medium.sizes[0] <= room:
            place(number, medium, medium.largest(room))
            paired.add(number)
    for number in reversed(range(len(rooms))):
        if number not in paired and small.two_smallest() <= rooms[number]:
            place(number, small, small.sizes[0])
            place(number, small, small.largest(rooms[number]))
    rest = _Pool(falling[ends[2] :]).joined(medium).joined(small)
    for number in range(len(rooms)):
        while rest.sizes and rest.sizes[0] <= rooms[number]:
            place(number, rest, rest.largest(rooms[number]))
    left = rest.falling()
    bin_of, num_bins = np.array(bins_of, np.int64), len(rooms)
    if len(left):
        new, opened = _first_fit_falling(left, capacity)
        bin_of, num_bins = np.concatenate((bin_of, new + num_bins)), num_bins + opened
    # Of one length, who was placed first is who comes first.
    items = np.empty(len(order), np.int64)
    items[longest_first(np.concatenate((sizes_of, left)))] = order
    return group_by_bin(bin_of, num_bins, items)


class _Pool:
    """A multiset of lengths: ``sizes`` rise, each once."""

    def __init__(self, lengths: NDArray[np.int64]) -> None:
        sizes, counts = np.unique(lengths, return_counts=True)
        self.sizes = sizes.tolist()
        self.counts = dict(zip(self.sizes, counts.tolist()))

    def largest(self, room: int) -> int:
        return self.sizes[bisect_right(self.sizes, room) - 1]

    def two_smallest(self) -> float:
        if not self.sizes or (len(self.sizes) == 1 and self.counts[self.sizes[0]] == 1):
            return inf
        return self.sizes[0] + self.sizes[self.counts[self.sizes[0]] == 1]

    def take(self, size: int) -> None:
        self.counts[size] -= 1
        if not self.counts[size]:
            del self.counts[size], self.sizes[bisect_right(self.sizes, size) - 1]

    def joined(self, longer: _Pool) -> _Pool:
        self.sizes = sorted(self.sizes + longer.sizes)
        self.counts.update(longer.counts)
        return self

    def falling(self) -> NDArray[np.int64]:
        counts = [self.counts[size] for size in self.sizes]
        return np.repeat(np.array(self.sizes, np.int64), counts)[::-1]
