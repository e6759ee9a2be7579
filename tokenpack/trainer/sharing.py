"""Split a batch over ranks, so that all ranks have about the same number of tokens.

Examples are assigned longest first, each to the rank with the fewest tokens (longest processing
time first, Graham 1969). Ranks whose tokens differ by less than a quarter percent count as equal;
the one with the lowest cost gets the example, where

    cost = tokens + (source ** 2 + target ** 2 + source * target) / (6 * hidden_size)

as in `tokenpack.packing.ranks`. Then the rank with the most tokens and the rank with the fewest
swap examples while that narrows the gap between them.
"""

from __future__ import annotations

from heapq import heapify, heapreplace

import numpy as np
from numpy.typing import NDArray

from ..segments import longest_first

_EQUAL = 1 / 400  # of a rank's tokens: loads that differ by less count as equal
_CLOSE_ENOUGH = 1 / 200  # of a rank's tokens: swaps stop at this gap
_UNEVEN = 1.1  # largest load over mean load, above which groups are split
_MAX_GROUPS = 8  # per rank: groups are not split beyond this number


def share_evenly(
    tokens: NDArray[np.int64], costs: NDArray[np.float64], num_ranks: int
) -> NDArray[np.int64]:
    """Assign the examples of a batch to ranks.

    Args:
        tokens: ``(n,)`` int64, the tokens of each example.
        costs: ``(n,)`` float64, the cost of each example.
        num_ranks: the number of ranks. If it is ``n`` or more, each rank gets at most one example.

    Returns:
        ``(n,)`` int64, the rank of each example.
    """
    step = max(int(tokens.sum()) * _EQUAL / num_ranks, 1.0)
    loads = [0] * num_ranks
    heap: list[tuple[int, float, int]] = [(0, 0.0, rank) for rank in range(num_ranks)]
    heapify(heap)
    rank_of = np.empty(len(tokens), np.int64)
    order = longest_first(tokens)
    for item, length, cost in zip(order.tolist(), tokens[order].tolist(), costs[order].tolist()):
        _, spent, rank = heap[0]
        rank_of[item] = rank
        loads[rank] += length
        heapreplace(heap, (int(loads[rank] / step), spent + cost, rank))
    _swap_to_level(rank_of, tokens, np.array(loads, np.int64))
    return rank_of


def _swap_to_level(
    rank_of: NDArray[np.int64], tokens: NDArray[np.int64], loads: NDArray[np.int64]
) -> None:
    """Move or swap examples between the fullest and the emptiest rank, in place.

    The best move transfers half of the gap between the two ranks.
    """
    for _ in range(2 * len(loads)):
        full, empty = int(loads.argmax()), int(loads.argmin())
        gap = int(loads[full] - loads[empty])
        if gap <= _CLOSE_ENOUGH * loads.mean():
            return
        given = np.flatnonzero(rank_of == full)
        taken = np.flatnonzero(rank_of == empty)
        taken = taken[tokens[taken].argsort()]
        returned = np.concatenate(([0], tokens[taken]))  # 0: move an example, take none in return
        ideal = np.searchsorted(returned, tokens[given] - gap / 2)
        choices = np.stack([np.maximum(ideal - 1, 0), np.minimum(ideal, len(returned) - 1)])
        moved = tokens[given] - returned[choices]  # [2, given]
        best = np.unravel_index(abs(moved - gap / 2).argmin(), moved.shape)
        more = int(moved[best])
        if not 0 < more < gap:
            return
        rank_of[given[best[1]]] = empty
        if choices[best]:
            rank_of[taken[choices[best] - 1]] = full
        loads[full] -= more
        loads[empty] += more


def share_groups(
    sides: NDArray[np.int64], edges: NDArray[np.int64], num_ranks: int
) -> NDArray[np.int64]:
    """Assign whole groups of examples to ranks. While loads are uneven, halve the largest groups.

    Args:
        sides: ``(n, 1)`` or ``(n, 2)`` int64, source and target tokens of each example, group by
            group.
        edges: ``(num_groups + 1,)`` int64, where each group begins.
        num_ranks: the number of ranks.

    Returns:
        ``(n,)`` int64, the rank of each example.
    """
    while True:
        rows = np.diff(edges)
        slots = rows * np.maximum.reduceat(sides, edges[:-1]).sum(1)
        rank_of = share_evenly(slots, slots.astype(np.float64), num_ranks)
        loads = np.bincount(rank_of, slots, num_ranks)
        divisible = np.flatnonzero(rows > 1)
        even = loads.max() <= _UNEVEN * loads.mean()
        if even or not len(divisible) or len(rows) >= _MAX_GROUPS * num_ranks:
            return np.repeat(rank_of, rows)
        largest = divisible[(-slots[divisible]).argsort(kind="stable")]
        halved = largest[: max(num_ranks // 2, num_ranks - len(rows), 1)]
        edges = np.sort(np.concatenate((edges, edges[halved] + rows[halved] // 2)))
