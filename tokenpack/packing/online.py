"""Online bin packing: strategies that place sequences in input order.

Next fit and harmonic are NumPy and linear in the number of sequences. First, best and worst fit
depend on the free space left by all earlier sequences, so they are Python loops with O(log bins)
work per sequence: a million sequences take about two seconds. All strategies number bins in the
order in which they open them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from ..segments import Plan, group_by_bin, offsets_of

HARMONIC_CLASSES = 10  # k of harmonic-k: at most 1.692 times the fewest bins for k >= 7


def next_fit(lengths: NDArray[np.integer], capacity: int, max_sequences: int | None = None) -> Plan:
    """Fill one bin until the next sequence does not fit, then open another. Keeps the order."""
    starts = _next_fit_starts(lengths, capacity, max_sequences)
    return np.arange(len(lengths)), np.append(starts, len(lengths))


def _next_fit_starts(
    lengths: NDArray[np.integer], capacity: int, max_sequences: int | None
) -> NDArray[np.int64]:
    """Return the first sequence of each bin."""
    offsets = offsets_of(lengths)
    # A bin that starts at sequence i ends before sequence following[i].
    following = np.searchsorted(offsets, offsets[:-1] + capacity, side="right") - 1
    if max_sequences is not None:
        np.minimum(following, np.arange(max_sequences, len(lengths) + max_sequences), out=following)
    jump = following.tolist()
    starts, start = [], 0
    while start < len(jump):  # one iteration per bin
        starts.append(start)
        start = jump[start]
    return np.array(starts)


def harmonic(lengths: NDArray[np.integer], capacity: int, max_sequences: int | None = None) -> Plan:
    """Group lengths in ``(capacity / (j + 1), capacity / j]``, j to a bin (Lee and Lee, 1985).

    Classes j >= 10 are one class, packed by next fit. Each class has one open bin.
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
            per_bin = number if max_sequences is None else min(number, max_sequences)
            starts = np.arange(0, len(members), per_bin)
        else:
            starts = _next_fit_starts(lengths[members], capacity, max_sequences)
        counts = np.diff(starts, append=len(members))
        bin_of[members] = num_bins + np.repeat(np.arange(len(starts)), counts)
        opened_by.append(members[starts])
        num_bins += len(starts)
    # Renumber the bins of all classes in the order in which they open.
    rank = np.empty(num_bins, np.int64)
    rank[np.argsort(np.concatenate(opened_by))] = np.arange(num_bins)
    return group_by_bin(rank[bin_of], num_bins)


def first_fit(
    lengths: NDArray[np.integer], capacity: int, max_sequences: int | None = None
) -> Plan:
    """Put each sequence into the earliest opened bin that has space for it."""
    limit = len(lengths) if max_sequences is None else max_sequences
    # A tournament tree in an array: the children of node i are nodes 2i and 2i + 1, the leaves are
    # bins, and free[i] is the largest free space below node i. Unopened bins have the whole
    # capacity, so that a first fit always exists.
    leaves = 1
    free = [0, capacity]
    quota: list[int] = []  # sequences that each open bin may still take
    bin_of = []
    for length in lengths.tolist():
        if len(quota) == leaves:
            free = _double_leaves(free, leaves, capacity)
            leaves *= 2
        node = 1
        while node < leaves:
            node *= 2
            if free[node] < length:
                node += 1
        number = node - leaves
        if number == len(quota):
            quota.append(limit)
        bin_of.append(number)
        quota[number] -= 1
        free[node] = free[node] - length if quota[number] else 0
        while node > 1:
            node //= 2
            left, right = free[2 * node], free[2 * node + 1]
            largest = left if left > right else right
            if free[node] == largest:
                break
            free[node] = largest
    return group_by_bin(np.array(bin_of), len(quota))


def _double_leaves(free: list[int], leaves: int, capacity: int) -> list[int]:
    level = free[leaves:] + [capacity] * leaves
    levels = [level]
    while len(level) > 1:
        level = [max(pair) for pair in zip(level[::2], level[1::2])]
        levels.append(level)
    return [0, *(value for level in reversed(levels) for value in level)]


def best_fit(lengths: NDArray[np.integer], capacity: int, max_sequences: int | None = None) -> Plan:
    """Put each sequence into the fullest bin with space for it; the earliest opened on ties."""
    return _fit_by_free_space(lengths, capacity, max_sequences, bisect_left)


def worst_fit(
    lengths: NDArray[np.integer], capacity: int, max_sequences: int | None = None
) -> Plan:
    """Put each sequence into the emptiest open bin if it fits; the earliest opened on ties."""
    return _fit_by_free_space(
        lengths,
        capacity,
        max_sequences,
        lambda free, length: len(free) - (free[-1:] >= [length]),
    )


def _fit_by_free_space(
    lengths: NDArray[np.integer],
    capacity: int,
    max_sequences: int | None,
    choose: Callable[[list[int], int], int],
) -> Plan:
    """Place each sequence in a bin with the free space that ``choose`` selects.

    ``choose`` takes the distinct free spaces of open bins, in increasing order, and a length. It
    returns the index of a free space, or their number to open a bin.
    """
    limit = len(lengths) if max_sequences is None else max_sequences
    free: list[int] = []  # the distinct free spaces of open bins, increasing
    bins_with: dict[int, list[int]] = {}  # a heap of the bins with each free space
    quota: list[int] = []  # sequences that each open bin may still take
    bin_of = []
    for length in lengths.tolist():
        index = choose(free, length)
        if index < len(free):
            space = free[index]
            number = heappop(bins_with[space])
            if not bins_with[space]:
                del free[index], bins_with[space]
        else:
            space, number = capacity, len(quota)
            quota.append(limit)
        bin_of.append(number)
        quota[number] -= 1
        space -= length
        if space and quota[number]:
            if space not in bins_with:
                bins_with[space] = []
                insort(free, space)
            heappush(bins_with[space], number)
    return group_by_bin(np.array(bin_of), len(quota))
