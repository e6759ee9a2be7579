"""Biases that depend only on the distance between query and key, as one-dimensional tables.

    table[h, d + reach] = bias of head h for a key at distance d = n - m, for |d| <= reach

Tables are built in plain PyTorch, so autograd propagates their gradient to the buckets or slopes
that they were built from. The attention kernels only read tables.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def t5_relative_buckets(
    distance: Tensor, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Tensor:
    """T5's bucket of each distance.

    Half of the buckets hold one small distance each. The other half grow logarithmically up to
    ``max_distance``; all larger distances share the last bucket. If ``bidirectional``, half of the
    buckets are for keys before the query and half for keys after it. Otherwise all keys after the
    query share bucket 0. Source: Raffel et al., "Exploring the Limits of Transfer Learning with a
    Unified Text-to-Text Transformer" (2020), section 2.1.

    Args:
        distance: integers of any shape, ``n - m``; negative for keys before the query.
        bidirectional: whether keys after the query have buckets of their own.
        num_buckets: number of buckets.
        max_distance: distance from which on all keys share a bucket.

    Returns:
        int64 buckets in ``[0, num_buckets)``, of ``distance``'s shape.
    """
    base = torch.zeros_like(distance, dtype=torch.int64)
    if bidirectional:
        num_buckets //= 2
        base = (distance > 0).long() * num_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = num_buckets // 2
    # float32, as T5 was trained: rounding decides a few buckets.
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    coarse = (exact + (growth * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return base + torch.where(distance < exact, distance.long(), coarse)


def t5_bias_table(weight: Tensor, bidirectional: bool, max_distance: int = 128) -> Tensor:
    """T5's bucketed bias as a table over distances.

    Args:
        weight: ``(num_buckets, heads)``, the weight of ``relative_attention_bias``.
        bidirectional: True in an encoder, False in a decoder.
        max_distance: ``relative_attention_max_distance`` of the model's configuration.

    Returns:
        ``(heads, 2 * max_distance + 1)`` in ``weight``'s dtype, differentiable with respect to it.
    """
    distance = torch.arange(-max_distance, max_distance + 1, device=weight.device)
    buckets = t5_relative_buckets(
        distance,
        bidirectional=bidirectional,
        num_buckets=weight.shape[0],
        max_distance=max_distance,
    )
    return weight[buckets].t()


def alibi_bias_table(slopes: Tensor, reach: int) -> Tensor:
    """ALiBi's linear bias as a table: ``-slope * |distance|`` (Press et al., 2022).

    Args:
        slopes: ``(heads,)`` floating point.
        reach: the largest distance that occurs, ``max_seqlen - 1``. A smaller reach gives wrong
            results, because attention uses a constant bias beyond the reach.

    Returns:
        ``(heads, 2 * reach + 1)`` in ``slopes``' dtype, differentiable with respect to it.
    """
    distance = torch.arange(-reach, reach + 1, device=slopes.device).abs()
    return -slopes[:, None] * distance


def bias_line(table: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """The bias at each distance that ``num_queries`` x ``num_keys`` scores can have.

    Returns:
        ``(heads, num_queries + num_keys - 1)``. Entry ``i`` is for distance ``i + 1 - num_keys``,
        bottom-right aligned.
    """
    return table.index_select(1, line_distances(num_queries, num_keys, table.device, table))


def line_distances(
    num_queries: int, num_keys: int, device: torch.device, table: Tensor | None = None
) -> Tensor:
    """Distances ``1 - num_keys ... num_queries - 1``, or their indices into ``table`` if given."""
    distance = torch.arange(1 - num_keys, num_queries, device=device)
    if table is None:
        return distance
    reach = table.shape[1] // 2
    return distance.clamp_(-reach, reach).add_(reach)
