"""Strategies that take sequences in the order in which they come (on-line bin packing).

Next fit and harmonic are NumPy, linear in the number of sequences. First, best and worst fit decide
for each sequence by what all before it have left, so theirs is a loop in Python, of O(log bins) a
sequence: about a million in two seconds. The bins of all are numbered as they are opened.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from ..segments import group_by_bin, offsets_of

Plan = tuple[NDArray[np.int64], NDArray[np.int64]]
"""``items (n,)`` and ``offsets (num_bins + 1,)``, int64."""

HARMONIC_CLASSES = 10  # k of harmonic-k: at most 1.692 of the fewest bins from 7 on


def next_fit(lengths: NDArray[np.integer], capacity: int, max_sequences: int | None = None) -> Plan:
    """Fill one bin until the next sequence does not fit, then open another. Order is kept."""
    starts = _next_fit_starts(lengths, capacity, max_sequences)
    return np.arange(len(lengths)), np.append(starts, len(lengths))


def _next_fit_starts(
    lengths: NDArray[np.integer], capacity: int, max_sequences: int | None
) -> NDArray[np.int64]:
    """The first sequence of each bin."""
    before = offsets_of(lengths)
    following = np.searchsorted(before, before[:-1] + capacity, side="right") - 1
    if max_sequences is not None:
        np.minimum(following, np.arange(max_sequences, len(lengths) + max_sequences), out=following)
    jump = following.tolist()
    starts, start = [], 0
    while start < len(jump):  # once a bin
        starts.append(start)
        start = jump[start]
    return np.array(starts)


def harmonic(lengths: NDArray[np.integer], capacity: int, max_sequences: int | None = None) -> Plan:
    """Lengths over capacity / (j + 1), up to capacity / j, share bins of j (Lee and Lee, 1985).

    From class k = 10 on, all go by next fit. Each class has one open bin.
    """
    classes = np.minimum(capacity // lengths.astype(np.int64), HARMONIC_CLASSES)
    bin_of = np.empty(len(lengths), np.int64)
    opened_by: list[NDArray[np.int64]] = []  # the first sequence of each bin
    num_bins = 0
    for number in range(1, HARMONIC_CLASSES + 1):
        members = np.flatnonzero(classes == number)
        if not len(members):
            continue
        if number < HARMONIC_CLASSES:
            each = number if max_sequences is None else min(number, max_sequences)
            starts = np.arange(0, len(members), each)
        else:
            starts = _next_fit_starts(lengths[members], capacity, max_sequences)
        counts = np.diff(starts, append=len(members))
        bin_of[members] = num_bins + np.repeat(np.arange(len(starts)), counts)
        opened_by.append(members[starts])
        num_bins += len(starts)
    rank = np.empty(num_bins, np.int64)
    rank[np.argsort(np.concatenate(opened_by))] = np.arange(num_bins)
    return group_by_bin(rank[bin_of], num_bins)


def first_fit(
    lengths: NDArray[np.integer], capacity: int, max_sequences: int | None = None
) -> Plan:
    """Each sequence goes to the bin opened first of those that it fits into."""
    limit = len(lengths) if max_sequences is None else max_sequences
    # A tournament: room[1] is the most room of all bins, of which node i has children 2i, 2i + 1.
    # An unopened bin has the whole capacity, so that the first fit always exists.
    leaves = 1
    room = [0, capacity]
    allowed: list[int] = []
    bin_of = []
    for length in lengths.tolist():
        if len(allowed) == leaves:
            room = _with_twice_the_leaves(room, leaves, capacity)
            leaves *= 2
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        number = node - leaves
        if number == len(allowed):
            allowed.append(limit)
        bin_of.append(number)
        allowed[number] -= 1
        room[node] = room[node] - length if allowed[number] else 0
        while node > 1:
            node //= 2
            left, right = room[2 * node], room[2 * node + 1]
            most = left if left > right else right
            if room[node] == most:
                break
            room[node] = most
    return group_by_bin(np.array(bin_of), len(allowed))


def _with_twice_the_leaves(room: list[int], leaves: int, capacity: int) -> list[int]:
    level = room[leaves:] + [capacity] * leaves
    levels = [level]
    while len(level) > 1:
        level = [max(pair) for pair in zip(level[::2], level[1::2])]
        levels.append(level)
    return [0, *(value for level in reversed(levels) for value in level)]


def best_fit(lengths: NDArray[np.integer], capacity: int, max_sequences: int | None = None) -> Plan:
    """Each goes to the fullest bin that it fits into; of equals, to the one opened first."""
    return _by_room(lengths, capacity, max_sequences, bisect_left)


def worst_fit(
    lengths: NDArray[np.integer], capacity: int, max_sequences: int | None = None
) -> Plan:
    """Each goes to the emptiest open bin if it fits; of equals, to the one opened first."""
    return _by_room(
        lengths,
        capacity,
        max_sequences,
        lambda rooms, length: len(rooms) - (rooms[-1:] >= [length]),
    )


def _by_room(
    lengths: NDArray[np.integer],
    capacity: int,
    max_sequences: int | None,
    choose: Callable[[list[int], int], int],
) -> Plan:
    """``choose`` says which of the rising rooms serves; one behind the last opens a bin."""
    limit = len(lengths) if max_sequences is None else max_sequences
    rooms: list[int] = []  # that open bins have, each once
    bins_with: dict[int, list[int]] = {}  # a heap of the bins with that room
    allowed: list[int] = []
    bin_of = []
    for length in lengths.tolist():
        place = choose(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            number = heappop(bins_with[room])
            if not bins_with[room]:
                del rooms[place], bins_with[room]
        else:
            room, number = capacity, len(allowed)
            allowed.append(limit)
        bin_of.append(number)
        allowed[number] -= 1
        room -= length
        if room and allowed[number]:
            if room not in bins_with:
                bins_with[room] = []
                insort(rooms, room)
            heappush(bins_with[room], number)
    return group_by_bin(np.array(bin_of), len(allowed))
