"""Best-fit decreasing over a histogram of lengths: the textbook's bins, in the time of a sort.

Best fit puts the next longest sequence into the fullest bin that has space for it. That bin stays
the fullest, so it takes as many sequences of the same length as fit before best fit looks at
another bin. The other bins with the same free space then do the same. So a plan is a short list of
moves,

    (free space before, number of bins, sequences per bin, free space after),

about two for each distinct length, however many sequences there are. `_plan` finds the moves in
O(distinct lengths * log(distinct lengths)) Python steps. `_place` carries them out in NumPy.

Bins with equal free space form a first-in, first-out queue.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from ..segments import Plan, length_histogram, longest_first, offsets_of, ranges, stable_argsort

_NEW = -1  # the free space before a move that opens bins


def best_fit_decreasing(
    lengths: NDArray[np.integer], capacity: int, max_sequences: int | None = None
) -> Plan:
    """Pack by best-fit decreasing (Johnson, 1973; at most 11/9 of the fewest bins, plus 4).

    Args:
        lengths: ``(n,)`` integers from 1 to ``capacity``.
        capacity: tokens that fit in a bin.
        max_sequences: the largest number of sequences in a bin, or None for no limit.

    Returns:
        ``items (n,)`` and ``offsets (num_bins + 1,)``, both int64. Bins are in the order in which
        they open, and the longest sequence of a bin comes first.
    """
    sizes, counts = (column[::-1] for column in length_histogram(lengths))
    if max_sequences is None:
        moves = _plan(sizes, counts, capacity)
    else:
        moves = _plan_limited(sizes.tolist(), counts.tolist(), capacity, max_sequences)
    return _place(longest_first(lengths), moves, capacity)


def _plan(sizes: NDArray[np.int64], counts: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Return the moves, ``(num_moves, 4)``, for decreasing distinct lengths and their counts."""
    # Sequences over half the capacity never share a bin, so each of them opens one.
    over_half = int(np.searchsorted(-sizes, -(capacity // 2)))
    opening = np.empty((over_half, 4), np.int64)
    opening[:, 0], opening[:, 1], opening[:, 2] = _NEW, counts[:over_half], 1
    opening[:, 3] = capacity - sizes[:over_half]
    bins_with = dict(zip(opening[:, 3].tolist(), opening[:, 1].tolist()))
    bins_with.pop(0, None)
    moves: list[int] = []
    # Each free space of the open bins is in one of two places. Those that fit the current size are
    # on a stack with the smallest on top. The others wait in a heap with the largest on top, until
    # sizes have decreased far enough.
    fitting: list[int] = []
    waiting = [-free for free in reversed(bins_with)]
    for size, count in zip(sizes[over_half:].tolist(), counts[over_half:].tolist()):
        while waiting and -waiting[0] >= size:
            fitting.append(-heappop(waiting))
        while count:
            if fitting:
                before = free = fitting[-1]
                bins = bins_with[free]
            else:
                before, free, bins = _NEW, capacity, count
            per_bin = free // size
            moving = count // per_bin
            if not moving:
                moving, per_bin = 1, count  # the last few sequences do not fill their bin
            elif moving > bins:
                moving = bins
            count -= moving * per_bin
            if fitting:
                if moving == bins:
                    fitting.pop()
                    del bins_with[free]
                else:
                    bins_with[free] = bins - moving
            after = free - per_bin * size
            if after in bins_with:
                bins_with[after] += moving
            elif after:
                bins_with[after] = moving
                if after < size:
                    heappush(waiting, -after)
                else:
                    fitting.append(after)
            moves += (before, moving, per_bin, after)
    shared = np.fromiter(moves, np.int64, len(moves)).reshape(-1, 4)
    return np.concatenate((opening, shared))


def _plan_limited(
    sizes: list[int], counts: list[int], capacity: int, max_sequences: int
) -> NDArray[np.int64]:
    """`_plan` with at most ``max_sequences`` sequences in a bin.

    Bins with equal free space may differ in how many more sequences they may take (their quota), so
    each free space has a queue of ``[bins, quota]``.
    """
    moves: list[int] = []
    queues: dict[int, deque[list[int]]] = {}
    fitting: list[int] = []
    waiting: list[int] = []
    for size, count in zip(sizes, counts):
        while waiting and -waiting[0] >= size:
            fitting.append(-heappop(waiting))
        while count:
            if fitting:
                before = free = fitting[-1]
                bins, quota = queues[free][0]
            else:
                before, free, bins, quota = _NEW, capacity, count, max_sequences
            per_bin = min(free // size, quota)
            moving = count // per_bin
            if not moving:
                moving, per_bin = 1, count
            moving = min(moving, bins)
            count -= moving * per_bin
            if fitting:
                queues[free][0][0] -= moving
                if moving == bins:
                    queues[free].popleft()
                if not queues[free]:
                    fitting.pop()
                    del queues[free]
            after = free - per_bin * size if per_bin < quota else 0
            if after in queues:
                queues[after].append([moving, quota - per_bin])
            elif after:
                queues[after] = deque([[moving, quota - per_bin]])
                if after < size:
                    heappush(waiting, -after)
                else:
                    fitting.append(after)
            moves += (before, moving, per_bin, after)
    return np.fromiter(moves, np.int64, len(moves)).reshape(-1, 4)


def _place(order: NDArray[np.int64], moves: NDArray[np.int64], capacity: int) -> Plan:
    """Carry out the moves: find the bin of each step and the position of its sequences.

    A step is the part of one bin in one move. Steps take the sequences of ``order`` in turn.
    """
    before, moving, per_bin, _ = moves.T
    first_step = np.cumsum(moving) - moving  # of each move
    opens = before == _NEW
    arange = np.arange(len(order))
    opening = ranges(first_step[opens], moving[opens], arange)  # step opening[b] opens bin b
    later, bins, before_step, takes = _later_steps(
        moves, first_step, len(opening), capacity, arange
    )
    counts = np.repeat(per_bin[opens], moving[opens])
    np.add.at(counts, bins, takes)
    offsets = offsets_of(counts)
    positions = np.empty(len(opening) + len(later), np.int64)  # of each step's first sequence
    positions[opening] = offsets[:-1]
    before_step += offsets[bins]
    positions[later] = before_step
    items = np.empty(len(order), np.int64)
    takes = np.repeat(per_bin, moving)
    taken = np.cumsum(takes)
    taken -= takes  # by all earlier steps
    if len(order) - len(positions) > len(positions) // 4:  # many steps take several sequences
        positions -= taken
        positions = np.repeat(positions, takes)
        positions += arange
        items[positions] = order
    else:  # place the first sequence of each step, then the few others
        items[positions] = order[taken]
        several = np.flatnonzero(takes > 1)
        others = takes[several] - 1
        items[ranges(positions[several] + 1, others)] = order[ranges(taken[several] + 1, others)]
    return items, offsets


def _later_steps(
    moves: NDArray[np.int64],
    first_step: NDArray[np.int64],
    num_bins: int,
    capacity: int,
    arange: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Find the bins of all steps that do not open one.

    The bins with one free space leave their queue in the order in which they joined it. So the
    steps that leave a queue are matched, in order, with the first steps that joined it. Returns the
    number of each step, its bin, the sequences in the bin before it, and those that it takes.
    """
    before, moving, per_bin, after = moves.T
    leave = np.flatnonzero(before != _NEW)
    leave = leave[stable_argsort(before[leave], capacity + 1)]
    join = np.flatnonzero(after > 0)
    join = join[stable_argsort(after[join], capacity + 1)]
    # Renumber the steps: the one that opens bin b becomes b, and the others follow in the order in
    # which they leave. number[m] is the new number of the first step of move m.
    number = np.empty(len(moves), np.int64)
    opens = before == _NEW
    number[opens] = np.cumsum(moving[opens]) - moving[opens]
    number[leave] = num_bins + np.cumsum(moving[leave]) - moving[leave]
    # For each move that joins a queue: the bins ahead of its own, and the bins that ever leave.
    queue, joining = after[join], moving[join]
    ahead = np.cumsum(joining) - joining
    ahead -= ahead[np.searchsorted(queue, queue)]
    left_before = offsets_of(moving[leave])
    first_leaves = np.searchsorted(before[leave], queue)
    last_leaves = np.searchsorted(before[leave], queue, side="right")
    leaving = left_before[last_leaves] - left_before[first_leaves]
    matched = np.clip(leaving - ahead, 0, joining)
    origin = ranges(number[join], matched, arange)  # the previous step of each bin, to begin with
    in_bin = np.repeat(per_bin[join], matched)
    # Follow each bin back to the step that opened it. Each pass doubles the distance covered.
    active = np.flatnonzero(origin >= num_bins)
    while len(active):
        ancestor = origin[active] - num_bins
        further = origin[ancestor]
        in_bin[active] += in_bin[ancestor]
        origin[active] = further
        active = active[further >= num_bins]
    takes = np.repeat(per_bin[leave], moving[leave])
    return ranges(first_step[leave], moving[leave], arange), origin, in_bin, takes
