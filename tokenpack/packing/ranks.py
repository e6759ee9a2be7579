"""Assign bins to ranks: in each step every rank gets one bin, and the bins of a step cost alike.

A rank that finishes a step early waits for the others. The cost of a bin is

    cost = tokens + sum of length ** 2 / (6 * hidden_size)

For pairs, ``tokens`` counts both sides, and ``length ** 2`` becomes
``source ** 2 + target ** 2 + source * target``. The unit is one token's share of the linear layers.
By its shapes, a transformer layer takes ``24 * hidden_size ** 2`` operations per token in its
linear layers, and ``4 * hidden_size`` for each pair of a query and a key in attention.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..checks import at_least_one, check_seed
from ..segments import random_permutation, segment_sum
from .pairs import PairPackResult
from .result import PackResult

NO_BIN = -1


def bin_costs(result: PackResult, hidden_size: int = 1024) -> NDArray[np.float64]:
    """Return the cost of each bin, ``(num_bins,)`` float64, in units of one token's linear layers.

    Args:
        result: the plan.
        hidden_size: the model's hidden size.
    """
    target = result.item_target_lengths if isinstance(result, PairPackResult) else 0
    return segment_sum(sequence_costs(result.item_lengths, target, hidden_size), result.offsets)


def sequence_costs(
    source: NDArray[np.integer], target: NDArray[np.integer] | int, hidden_size: int = 1024
) -> NDArray[np.float64]:
    """``(n,)`` float64, the cost of each pair, or of each sequence if ``target`` is 0."""
    one = source.astype(np.float64)
    other = np.asarray(target, np.float64)
    attention = one**2 + other**2 + one * other
    return one + other + attention / (6 * at_least_one("hidden_size", hidden_size))


def balance_ranks(
    result: PackResult,
    num_ranks: int,
    *,
    hidden_size: int = 1024,
    window: int | None = None,
    seed: int = 0,
) -> NDArray[np.int64]:
    """Assign the bins of a plan to ranks, so that the bins of a step cost alike.

    Bins are sorted by cost, and each ``num_ranks`` consecutive bins form a step. Then the steps are
    shuffled. The most expensive bin of a step goes alternately to the first and to the last rank,
    so that the total cost per rank is balanced too.

    Args:
        result: the plan. Every rank must compute the same plan.
        num_ranks: the number of ranks.
        hidden_size: the model's hidden size, which sets the cost of attention relative to the
            linear layers.
        window: sort and shuffle only within this many consecutive steps, to keep the order of the
            plan across windows.
        seed: seed of the shuffle.

    Returns:
        ``(steps, num_ranks)`` int64, bin numbers. Rank r takes column r. If the bins of a window do
        not fill its last step, that step ends with -1 (no bin). The ranks with -1 must still take
        part in the step.

    Raises:
        TypeError, ValueError: if a number is not an integer of 1 or more, or ``seed`` is not an
            integer of 0 or more.
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
        full = len(order) // ranks  # only full steps are shuffled; an incomplete one stays last
        filled[1:full:2] = filled[1:full:2, ::-1]
        filled[:full] = filled[random_permutation(full, seed + first)]
        parts.append(filled)
    return np.concatenate(parts)
