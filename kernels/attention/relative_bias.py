"""Biases that depend on the distance between query and key alone, as one-dimensional tables.

    table[h, d + reach] = bias of head h for a key at distance d = n - m, for |d| <= reach

A table is built in plain torch, so that autograd carries its gradient back to whatever it was
built from, and attention need know nothing of buckets or slopes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def t5_relative_buckets(
    distance: Tensor, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Tensor:
    """The bucket that T5 files each distance under.

    Half of the buckets hold one small distance each; the rest grow logarithmically up to
    ``max_distance``, past which all distances share the last. With ``bidirectional`` one half of
    the buckets is for keys before the query and one for keys after it; without it keys after the
    query share bucket 0. From "Exploring the Limits of Transfer Learning with a Unified
    Text-to-Text Transformer" (Raffel et al., 2020), section 2.1.

    Args:
        distance: integers of any shape, ``n - m``: negative for keys before the query.

    Returns:
        int64 buckets in ``[0, num_buckets)``, in ``distance``'s shape.
    """
    base = torch.zeros_like(distance, dtype=torch.int64)
    if bidirectional:
        num_buckets //= 2
        base = (distance > 0).long() * num_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = num_buckets // 2
    # float32 as in the models that were trained with it: the rounding decides a few buckets.
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    coarse = (exact + (growth * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return base + torch.where(distance < exact, distance.long(), coarse)


def t5_bias_table(weight: Tensor, bidirectional: bool, max_distance: int = 128) -> Tensor:
    """T5's bucketed bias as a table of distances.

    Args:
        weight: ``(num_buckets, heads)``, the weight of ``relative_attention_bias``.
        bidirectional: True in an encoder, False in a decoder.
        max_distance: ``relative_attention_max_distance`` of the configuration.

    Returns:
        ``(heads, 2 * max_distance + 1)`` in ``weight``'s dtype, differentiable in it.
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
        reach: the greatest distance in use, ``max_seqlen - 1``. A table is constant beyond its
            reach and ALiBi is not, so a smaller one would give other numbers.

    Returns:
        ``(heads, 2 * reach + 1)`` in ``slopes``' dtype, differentiable in it.
    """
    distance = torch.arange(-reach, reach + 1, device=slopes.device).abs()
    return -slopes[:, None] * distance


def bias_line(table: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """The table's values at every distance that ``num_queries`` x ``num_keys`` scores can have.

    Returns:
        ``(heads, num_queries + num_keys - 1)``; entry ``i`` is for distance ``i + 1 - num_keys``,
        bottom-right aligned.
    """
    return table.index_select(1, line_distances(num_queries, num_keys, table.device, table))


def line_distances(
    num_queries: int, num_keys: int, device: torch.device, table: Tensor | None = None
) -> Tensor:
    """Distances ``1 - num_keys ... num_queries - 1``, or with a table their indices into it."""
    distance = torch.arange(1 - num_keys, num_queries, device=device)
    if table is None:
        return distance
    reach = table.shape[1] // 2
    return distance.clamp_(-reach, reach).add_(reach)
