"""A rank's share of a batch: about the same number of tokens, and the same cost, on each rank.

    Assign examples by decreasing length to the rank with the fewest tokens. Among ranks with about
    equally many tokens, take the one with the lowest cost. Then swap examples between the fullest
    and the emptiest rank while that narrows the gap.

The cost is that of `tokenpack.packing.ranks`:

    cost = tokens + (source ** 2 + target ** 2 + source * target) / (6 * hidden_size)
"""

from __future__ import annotations

from heapq import heapify, heapreplace

import numpy as np
from numpy.typing import NDArray

from ..segments import longest_first

# The first two are parts of a rank's mean tokens.
_TOKEN_RESOLUTION = 1 / 400  # ranks that differ by less have equally many tokens: cost decides
_MAX_GAP = 1 / 200  # a smaller gap between ranks is not narrowed
_MAX_IMBALANCE = 1.1  # slots of the fullest rank over the mean, above which groups are halved
_MAX_GROUPS = 8  # per rank, above which groups are not halved


def share_evenly(
    tokens: NDArray[np.int64], costs: NDArray[np.float64], num_ranks: int
) -> NDArray[np.int64]:
    """Assign the examples of a batch to ranks, so that all ranks have about as many tokens.

    Longest processing time first (Graham 1969), then swaps between the fullest and the emptiest
    rank.

    Args:
        tokens: ``(n,)`` int64, tokens of each example.
        costs: ``(n,)`` float64, cost of each example. If the tokens of two ranks differ by less
            than a quarter percent, the rank with the lower cost gets the next example.
        num_ranks: the number of ranks. If it is ``n`` or more, each rank gets at most one example.

    Returns:
        ``(n,)`` int64, the rank of each example.
    """
    resolution = max(int(tokens.sum()) * _TOKEN_RESOLUTION / num_ranks, 1.0)
    loads = [0] * num_ranks
    heap: list[tuple[int, float, int]] = [(0, 0.0, rank) for rank in range(num_ranks)]
    heapify(heap)
    rank_of = np.empty(len(tokens), np.int64)
    order = longest_first(tokens)
    for item, length, cost in zip(order.tolist(), tokens[order].tolist(), costs[order].tolist()):
        _, spent, rank = heap[0]
        rank_of[item] = rank
        loads[rank] += length
        heapreplace(heap, (int(loads[rank] / resolution), spent + cost, rank))
    _even_out(rank_of, tokens, np.array(loads, np.int64))
    return rank_of


def _even_out(
    rank_of: NDArray[np.int64], tokens: NDArray[np.int64], loads: NDArray[np.int64]
) -> None:
    """Move or swap examples between the fullest and the emptiest rank, in place, while it helps."""
    for _ in range(2 * len(loads)):
        full, empty = int(loads.argmax()), int(loads.argmin())
        gap = int(loads[full] - loads[empty])
        if gap <= _MAX_GAP * loads.mean():
            return
        given = np.flatnonzero(rank_of == full)
        taken = np.flatnonzero(rank_of == empty)
        taken = taken[tokens[taken].argsort()]
        back = np.concatenate(([0], tokens[taken]))  # 0: move an example without a return
        nearest = np.searchsorted(back, tokens[given] - gap / 2)
        choices = np.stack([np.maximum(nearest - 1, 0), np.minimum(nearest, len(back) - 1)])
        moved = tokens[given] - back[choices]  # [2, given]
        best = np.unravel_index(abs(moved - gap / 2).argmin(), moved.shape)
        more = int(moved[best])
        if not 0 < more < gap:
            return
        rank_of[given[best[1]]] = empty
        if choices[best]:
            rank_of[taken[choices[best] - 1]] = full
        loads[full] -= more
        loads[empty] += more


def share_groups(sides: NDArray[np.int64], bounds: list[int], num_ranks: int) -> NDArray[np.int64]:
    """Assign whole groups to ranks. If the ranks are uneven, halve the largest groups.

    Args:
        sides: ``(n, 1)`` or ``(n, 2)`` int64, source and target tokens of each example, group by
            group.
        bounds: ``(num_groups + 1,)``, the first example of each group, then ``n``.
        num_ranks: the number of ranks.

    Returns:
        ``(n,)`` int64, the rank of each example.
    """
    while True:
        edges = np.array(bounds, np.int64)
        rows = np.diff(edges)
        slots = rows * np.maximum.reduceat(sides, edges[:-1]).sum(1)
        rank_of = share_evenly(slots, slots.astype(np.float64), num_ranks)
        loads = np.bincount(rank_of, slots, num_ranks)
        divisible = np.flatnonzero(rows > 1)
        even = loads.max() <= _MAX_IMBALANCE * loads.mean()
        if even or not len(divisible) or len(rows) >= _MAX_GROUPS * num_ranks:
            return np.repeat(rank_of, rows)
        largest = divisible[(-slots[divisible]).argsort(kind="stable")]
        halved = largest[: max(num_ranks // 2, num_ranks - len(rows), 1)]
        bounds = sorted([*bounds, *(edges[halved] + rows[halved] // 2).tolist()])
