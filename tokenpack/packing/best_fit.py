"""Best-fit decreasing over a histogram of lengths: the textbook's bins, in time that is the sort's.

Best fit puts the next longest sequence into the fullest bin that has room for it. With sequences of
one length at hand that bin takes as many of them as fit before another is looked at, and so do the
bins that are as full as it. So the plan is made of few moves,

    (room before, bins that move, sequences that each takes, room after),

about two for each distinct length, whatever the number of sequences: O(distinct lengths * log)
steps in Python (`_plan`). Everything that is as many as bins or sequences is NumPy (`_place`).

Bins of equal room are a queue: the one that came to have that room first is served first.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from ..segments import distinct_lengths, longest_first, offsets_of, ranges, stable_argsort

_NEW = -1  # room before, of bins that a move opens


def best_fit_decreasing(
    lengths: NDArray[np.integer], capacity: int, max_sequences: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pack by best-fit decreasing (Johnson, 1973; at most 11/9 of the fewest bins, plus 4).

    Args:
        lengths: ``(n,)`` integers from 1 to ``capacity``.
        capacity: what a bin may hold.
        max_sequences: how many sequences a bin may hold, or None.

    Returns:
        ``items (n,)`` and ``offsets (num_bins + 1,)``, both int64: bins in the order in which they
        were opened, their sequences from the longest.
    """
    sizes, counts = (each[::-1] for each in distinct_lengths(lengths))
    if max_sequences is None:
        moves = _plan(sizes, counts, capacity)
    else:
        moves = _plan_limited(sizes.tolist(), counts.tolist(), capacity, max_sequences)
    return _place(longest_first(lengths), moves, capacity)


def _plan(sizes: NDArray[np.int64], counts: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """``(moves, 4)``, for distinct lengths from the longest and how many there are of each."""
    # No two of those over half the capacity share a bin: they open one each.
    alone = int(np.searchsorted(-sizes, -(capacity // 2)))
    opening = np.empty((alone, 4), np.int64)
    opening[:, 0], opening[:, 1], opening[:, 2] = _NEW, counts[:alone], 1
    opening[:, 3] = capacity - sizes[:alone]
    bins_with = dict(zip(opening[:, 3].tolist(), opening[:, 1].tolist()))
    bins_with.pop(0, None)
    moves: list[int] = []
    # Rooms of open bins, each once: those with room for the size at hand are a stack, the tightest
    # on top. A bin left with too little waits, until sizes have come down to what it has.
    serving: list[int] = []
    waiting = [-room for room in reversed(bins_with)]  # a heap, the roomiest on top
    for size, count in zip(sizes[alone:].tolist(), counts[alone:].tolist()):
        while waiting and -waiting[0] >= size:
            serving.append(-heappop(waiting))
        while count:
            if serving:
                before = room = serving[-1]
                bins = bins_with[room]
            else:
                before, room, bins = _NEW, capacity, count
            each = room // size
            moving = count // each
            if not moving:
                moving, each = 1, count  # the last few do not fill their bin
            elif moving > bins:
                moving = bins
            count -= moving * each
            if serving:
                if moving == bins:
                    serving.pop()
                    del bins_with[room]
                else:
                    bins_with[room] = bins - moving
            after = room - each * size
            if after in bins_with:
                bins_with[after] += moving
            elif after:
                bins_with[after] = moving
                if after < size:
                    heappush(waiting, -after)
                else:
                    serving.append(after)
            moves += (before, moving, each, after)
    shared = np.fromiter(moves, np.int64, len(moves)).reshape(-1, 4)
    return np.concatenate((opening, shared))


def _plan_limited(
    sizes: list[int], counts: list[int], capacity: int, max_sequences: int
) -> NDArray[np.int64]:
    """`_plan` where a bin closes at ``max_sequences``; bins of one room may differ in that."""
    moves: list[int] = []
    queues: dict[int, deque[list[int]]] = {}  # by room: [bins, sequences that each still may take]
    serving: list[int] = []
    waiting: list[int] = []
    for size, count in zip(sizes, counts):
        while waiting and -waiting[0] >= size:
            serving.append(-heappop(waiting))
        while count:
            if serving:
                before = room = serving[-1]
                bins, allowed = queues[room][0]
            else:
                before, room, bins, allowed = _NEW, capacity, count, max_sequences
            each = min(room // size, allowed)
            moving = count // each
            if not moving:
                moving, each = 1, count
            moving = min(moving, bins)
            count -= moving * each
            if serving:
                queues[room][0][0] -= moving
                if moving == bins:
                    queues[room].popleft()
                if not queues[room]:
                    serving.pop()
                    del queues[room]
            after = room - each * size if each < allowed else 0
            if after in queues:
                queues[after].append([moving, allowed - each])
            elif after:
                queues[after] = deque([[moving, allowed - each]])
                if after < size:
                    heappush(waiting, -after)
                else:
                    serving.append(after)
            moves += (before, moving, each, after)
    return np.fromiter(moves, np.int64, len(moves)).reshape(-1, 4)


def _place(
    order: NDArray[np.int64], moves: NDArray[np.int64], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Carry the moves out: which bin moves, and where in it the sequences go.

    A step is one bin's part in one move, and takes the next sequences of ``order`` in its turn.
    """
    before, moving, each, _ = moves.T
    firsts = np.cumsum(moving) - moving  # the first step of each move
    opens = before == _NEW
    naturals = np.arange(len(order))
    opening = ranges(firsts[opens], moving[opens], naturals)  # bins are numbered in their order
    later, bins, filled, takes = _later_steps(moves, firsts, len(opening), capacity, naturals)
    counts = np.repeat(each[opens], moving[opens])
    np.add.at(counts, bins, takes)
    offsets = offsets_of(counts)
    places = np.empty(len(opening) + len(later), np.int64)  # where in the items each step begins
    places[opening] = offsets[:-1]
    filled += offsets[bins]
    places[later] = filled
    items = np.empty(len(order), np.int64)
    takes = np.repeat(each, moving)
    taken = np.cumsum(takes)  # by the steps before
    taken -= takes
    if len(order) - len(places) > len(places) // 4:  # many steps take several
        places -= taken
        places = np.repeat(places, takes)
        places += naturals
        items[places] = order
    else:  # the first of each step, and then the few others
        items[places] = order[taken]
        several = np.flatnonzero(takes > 1)
        others = takes[several] - 1
        items[ranges(places[several] + 1, others)] = order[ranges(taken[several] + 1, others)]
    return items, offsets


def _later_steps(
    moves: NDArray[np.int64],
    firsts: NDArray[np.int64],
    num_bins: int,
    capacity: int,
    naturals: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Of all steps that open no bin: ``step, bin, sequences in the bin before, sequences taken``.

    The bins of one room leave their queue in the order in which they came. So the steps that leave
    it are paired, in turn, with the first steps that joined it.
    """
    before, moving, each, after = moves.T
    leave = np.flatnonzero(before != _NEW)
    leave = leave[stable_argsort(before[leave], capacity + 1)]
    join = np.flatnonzero(after > 0)
    join = join[stable_argsort(after[join], capacity + 1)]
    # Steps by number: those that open a bin have the bin's, the others follow as they leave.
    number = np.empty(len(moves), np.int64)
    opens = before == _NEW
    number[opens] = np.cumsum(moving[opens]) - moving[opens]
    number[leave] = num_bins + np.cumsum(moving[leave]) - moving[leave]
    # How far from the head of its queue a move's bins join, and how many leave that queue in all.
    queue, joining = after[join], moving[join]
    ahead = np.cumsum(joining) - joining
    ahead -= ahead[np.searchsorted(queue, queue)]
    left_so_far = offsets_of(moving[leave])
    first_leaves = np.searchsorted(before[leave], queue)
    last_leaves = np.searchsorted(before[leave], queue, side="right")
    leaving = left_so_far[last_leaves] - left_so_far[first_leaves]
    paired = np.clip(leaving - ahead, 0, joining)
    origin = ranges(number[join], paired, naturals)  # the step before, at first
    filled = np.repeat(each[join], paired)
    # Follow each bin back to the step that opened it: two, four, eight steps at a time.
    under_way = np.flatnonzero(origin >= num_bins)
    while len(under_way):
        ancestor = origin[under_way] - num_bins
        further = origin[ancestor]
        filled[under_way] += filled[ancestor]
        origin[under_way] = further
        under_way = under_way[further >= num_bins]
    takes = np.repeat(each[leave], moving[leave])
    return ranges(firsts[leave], moving[leave], naturals), origin, filled, takes
