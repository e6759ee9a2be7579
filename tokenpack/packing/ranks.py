"""Bins to ranks: each step gives every rank one bin, and all of a step's take about as long.

A rank that has less to do waits for the others at the end of each step. What a bin takes is

    cost = tokens + sum of length ** 2 / (6 * hidden_size)

(of pairs, the tokens of both sides, and ``source ** 2 + target ** 2 + source * target``),

in units of one token's linear layers: by its shapes, a transformer layer costs
``24 * hidden_size ** 2`` operations per token in them, and ``4 * hidden_size`` per pair of tokens
that attend.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..checks import at_least_one, check_seed
from ..segments import shuffled
from .pairs import PairPackResult
from .result import PackResult

NO_BIN = -1


def bin_costs(result: PackResult, hidden_size: int = 1024) -> NDArray[np.float64]:
    """``(num_bins,)`` float64, what each bin takes; see above."""
    target = result.item_target_lengths if isinstance(result, PairPackResult) else 0
    costs = sequence_costs(result.item_lengths, target, hidden_size)
    return np.add.reduceat(costs, result.offsets[:-1])


def sequence_costs(
    source: NDArray[np.integer], target: NDArray[np.integer] | int, hidden_size: int = 1024
) -> NDArray[np.float64]:
    """``(n,)`` float64, what each sequence or pair takes; a target of 0 is none."""
    one = source.astype(np.float64)
    other = np.asarray(target, np.float64)
    pairs = one**2 + other**2 + one * other
    return one + other + pairs / (6 * at_least_one("hidden_size", hidden_size))


def balance_ranks(
    result: PackResult,
    num_ranks: int,
    *,
    hidden_size: int = 1024,
    window: int | None = None,
    seed: int = 0,
) -> NDArray[np.int64]:
    """Deal a plan's bins to ranks, so that the bins of a step cost alike.

    Bins are sorted by cost, and each ``num_ranks`` that follow one another make a step. Steps are
    shuffled then, and within each the costliest bin goes to the first rank and to the last in turn,
    so that ranks do alike over time too.

    Args:
        result: the plan; every rank computes the same one.
        num_ranks: how many ranks there are.
        hidden_size: the model's, which says how much attention weighs beside the linear layers.
        window: sort and shuffle only among this many steps that follow one another, so that the
            plan's order is kept beyond.
        seed: of the shuffle.

    Returns:
        ``(steps, num_ranks)`` int64, numbers of bins; rank r takes column r. Where bins do not
        fill the last step of a window evenly, that step ends with -1, no bin; the last ranks
        must then take part in it without one.

    Raises:
        TypeError, ValueError: if a number is no integer of 1 or more.
    """
    ranks, seed = at_least_one("num_ranks", num_ranks), check_seed(seed)
    steps = -(-len(result) // ranks)
    window = steps if window is None else at_least_one("window", window)
    costs = bin_costs(result, hidden_size)
    parts = []
    for first in range(0, len(result), window * ranks):
        part = costs[first : first + window * ranks]
        order = first + (-part).argsort(kind="stable")
        filled: NDArray[np.int64] = np.full((-(-len(order) // ranks), ranks), NO_BIN)
        filled.reshape(-1)[: len(order)] = order
        whole = len(order) // ranks  # those shuffle; a step that lacks bins stays the last
        filled[1:whole:2] = filled[1:whole:2, ::-1]
        filled[:whole] = filled[shuffled(whole, seed + first)]
        parts.append(filled)
    return np.concatenate(parts)
