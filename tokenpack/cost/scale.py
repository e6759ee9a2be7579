"""Predict the costs of several ranks: the bytes that they exchange, and the wait for the slowest.

With n ranks, a ring (Patarasu & Yuan 2009, doi:10.1016/j.jpdc.2008.09.002) sends over each link

    all-reduce                       2 (n - 1) / n * bytes     DDP: gradients
    all-gather, reduce-scatter         (n - 1) / n * bytes     FSDP: weights twice, gradients once

A step lasts as long as its slowest rank. No formula gives the work of each rank, so the planner
assigns real batches to ranks as in training, and the operations of each rank are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .operations import ModelCost


class Exchange(NamedTuple):
    """Bytes that each rank sends in one step.

    Attributes:
        data_parallel: with DDP.
        fully_sharded: with FSDP.
    """

    data_parallel: int
    fully_sharded: int


def exchange_bytes(parameters: int, ranks: int, element_size: int = 4) -> Exchange:
    """Bytes that a training step sends over each link of a ring.

    Args:
        parameters: number of trained parameters.
        ranks: number of ranks.
        element_size: bytes per element that is sent, for gradients and weights.

    Returns:
        The bytes with DDP and with FSDP.
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
    """Operations of the mean rank over those of the busiest rank, packed, for each step.

    Args:
        ranks_of: for each step, ``(examples,)`` int64, the rank of each example.
        members_of: for each step, ``(examples,)`` int64, its examples as rows of ``lengths``.
        lengths: ``(n, 1)`` int64 tokens, or ``(n, 2)`` source and target tokens.
        cost: of the model; see `model_cost`.
        ranks: number of ranks.

    Returns:
        ``(steps,)`` float64, at most 1.
    """
    work = _operations(lengths, cost)
    shares = []
    for members, owners in zip(members_of, ranks_of):
        per_rank = np.bincount(owners, work[members], minlength=ranks)
        shares.append(per_rank.mean() / per_rank.max())
    return np.array(shares)


def _operations(lengths: NDArray[np.int64], cost: ModelCost) -> NDArray[np.float64]:
    """Multiply-adds of the forward of each example, ``(n,)``."""
    target = lengths[:, -1].astype(np.float64)
    work = cost.per_decoder_token * target + cost.per_decoder_pair * target**2
    if lengths.shape[1] == 2:
        source = lengths[:, 0].astype(np.float64)
        work += cost.per_encoder_token * source + cost.per_encoder_pair * source**2
        work += cost.per_cross_pair * source * target
    return work
