"""Many ranks, on paper: what they send one another, and how long they wait for the slowest.

Of n ranks, a ring (Patarasu & Yuan 2009, doi:10.1016/j.jpdc.2008.09.002) sends over each link

    all-reduce                       2 (n - 1) / n * bytes     DDP: gradients
    all-gather, reduce-scatter         (n - 1) / n * bytes     FSDP: weights twice, gradients once

and a step lasts as long as its slowest rank. Which rank has how much to do is not a formula: the
planner's own batches are dealt to ranks as in training, and the operations of each are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .operations import ModelCost


class Exchange(NamedTuple):
    """Bytes that each rank sends in one step."""

    data_parallel: int
    fully_sharded: int


def exchange_bytes(parameters: int, ranks: int, element_size: int = 4) -> Exchange:
    """What a step's gradients and weights take on every link of a ring.

    Args:
        parameters: how many.
        ranks: how many share them.
        element_size: bytes of one as it is sent; gradients and weights alike.
    """
    once = parameters * element_size * (ranks - 1) / ranks
    return Exchange(data_parallel=round(2 * once), fully_sharded=round(3 * once))


def rank_efficiency(
    ranks_of: Sequence[NDArray[np.int64]],
    members_of: Sequence[NDArray[np.int64]],
    lengths: NDArray[np.int64],
    cost: ModelCost,
    ranks: int,
) -> NDArray[np.float64]:
    """``(steps,)``: operations of the mean rank over those of the busiest, packed.

    Args:
        ranks_of: for each step, the rank of each of its examples.
        members_of: for each step, its examples, as rows of ``lengths``.
        lengths: ``(n, 1)`` tokens, or ``(n, 2)``: source and target.
        cost: of the model.
        ranks: how many there are.
    """
    work = _operations(lengths, cost)
    shares = []
    for members, owners in zip(members_of, ranks_of):
        per_rank = np.bincount(owners, work[members], minlength=ranks)
        shares.append(per_rank.mean() / per_rank.max())
    return np.array(shares)


def _operations(lengths: NDArray[np.int64], cost: ModelCost) -> NDArray[np.float64]:
    """``(n,)``: multiply-adds of each example."""
    target = lengths[:, -1].astype(np.float64)
    work = cost.per_decoder_token * target + cost.per_decoder_pair * target**2
    if lengths.shape[1] == 2:
        source = lengths[:, 0].astype(np.float64)
        work += cost.per_encoder_token * source + cost.per_encoder_pair * source**2
        work += cost.per_cross_pair * source * target
    return work
