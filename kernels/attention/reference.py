"""Varlen attention in plain PyTorch: the CPU path, and the oracle of all other backends.

There are two ways to compute a group of sequences of similar lengths. PyTorch's fused attention
runs if it supports the call: no bias, no window, no softcap, keys for every query, and q and k of
equal lengths under a causal mask. Otherwise `_ExplicitAttention` computes the matrix of scores.

The explicit way relies on one fact: causal mask, window and relative bias depend only on the
distance n - m. They are one *line* of values per head, with -inf where a key is not visible. With
the queries in reverse order, row w of the scores needs ``line[w : w + num_keys]``. All rows
together are a view of the line with both strides equal to 1, so no bias matrix is built. The line's
gradient is a sum over columns of the scores' gradient, read through a view whose rows are one
element shorter than those in memory (`_sum_along_line`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .grouping import Group, Plan, plan_groups
from .relative_bias import bias_line, line_distances
from .spec import AttentionSpec

_FAR_BELOW = -1e30  # like -inf after a softmax, but 0 * _FAR_BELOW is not NaN


# Host lists and Python loops over sequences: torch.compile could not make this faster.
@torch.compiler.disable
def attend_by_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    relative_bias: Tensor | None,
    spec: AttentionSpec,
) -> Tensor:
    """Attention within each sequence. The shapes are those of `varlen_attention`, checked there."""
    starts_q = _host_starts("cu_seqlens_q", cu_seqlens_q, q)
    starts_k = _host_starts("cu_seqlens_k", cu_seqlens_k, k)
    lengths = [
        (starts_q[s + 1] - starts_q[s], starts_k[s + 1] - starts_k[s])
        for s in range(len(starts_q) - 1)
    ]
    fused = (
        relative_bias is None
        and spec.window is None
        and spec.softcap is None
        and all(keys > 0 for rows, keys in lengths if rows)
        # PyTorch's is_causal aligns top-left, which is the same only for equal lengths.
        and (not spec.causal or all(rows == keys for rows, keys in lengths if rows))
    )
    plan = plan_groups(starts_q, starts_k, q.shape[1], not fused or spec.causal, q.device)
    if fused and plan.groups:
        return _fused(q, k, v, plan, spec)
    return _ExplicitAttention.apply(q, k, v, relative_bias, plan.groups, spec)


def _host_starts(name: str, cu_seqlens: Tensor, stream: Tensor) -> tuple[int, ...]:
    starts = tuple(cu_seqlens.tolist())
    if (
        starts[0] != 0
        or starts[-1] != stream.shape[0]
        or any(a > b for a, b in zip(starts, starts[1:], strict=False))
    ):
        shown = starts if len(starts) < 9 else (*starts[:4], "...", *starts[-4:])
        raise ValueError(
            f"{name} must be non-decreasing from 0 to {stream.shape[0]}, "
            f"the length of its tensor, got {shown}"
        )
    return starts


# ----------------------------------------------------------------------- PyTorch's fused attention


def _fused(q: Tensor, k: Tensor, v: Tensor, plan: Plan, spec: AttentionSpec) -> Tensor:
    options: dict[str, Any] = {
        "dropout_p": spec.dropout_p,
        "scale": spec.scale,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    singles = [group for group in plan.groups if group.span_q is not None]
    parts: list[Tensor] = []
    for q_s, k_s, v_s in _split(q, k, v, singles):
        out = scaled_dot_product_attention(
            q_s.transpose(0, 1)[None],
            k_s.transpose(0, 1)[None],
            v_s.transpose(0, 1)[None],
            is_causal=spec.causal,
            **options,
        )  # [1, heads, rows, head_dim]
        parts.append(out.squeeze(0).transpose(0, 1))
    for group in plan.groups[len(singles) :]:
        mask = None
        # With a causal mask and equal lengths, no real query sees the padding after it.
        if not spec.causal and group.real_keys is not None:
            mask = group.real_keys[:, None, None, :]
        out = scaled_dot_product_attention(
            group.take_rows(q).transpose(1, 2),
            group.take_keys(k).transpose(1, 2),
            group.take_keys(v).transpose(1, 2),
            attn_mask=mask,
            is_causal=spec.causal,
            **options,
        ).transpose(1, 2)  # [members, width_q, heads, head_dim]
        parts.append(out.flatten(0, 1))
    slots = torch.cat(parts)
    return slots if plan.slots is None else slots.index_select(0, plan.slots)


def _split(
    q: Tensor, k: Tensor, v: Tensor, singles: list[Group]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The rows of each single sequence, cut out of q, k and v by one split each.

    The backward of a split writes one gradient. The backward of a slice writes a gradient of the
    whole stream, once per sequence.
    """
    cuts = []
    for stream, spans in (
        (q, [group.span_q for group in singles]),
        (k, [group.span_k for group in singles]),
        (v, [group.span_k for group in singles]),
    ):
        sizes: list[int] = []  # the gap before each span, then the span
        end = 0
        for first, last in spans:
            sizes += [first - end, last - first]
            end = last
        cuts.append(stream.split([*sizes, stream.shape[0] - end])[1::2])
    return list(zip(*cuts, strict=True))


# ------------------------------------------------------------------------------ explicit attention


KeepMask = Callable[[int, Tensor], Tensor]
"""Maps a group's number and its weights to dropout's bool mask, of the same shape."""


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn autocast off inside: `cast_for_autocast` has applied it, and products are in float32."""

    @wraps(function)
    def run(tensor: Tensor, *rest: Any) -> Any:
        with torch.autocast(tensor.device.type, enabled=False):
            return function(tensor, *rest)

    return run


@_without_autocast
def explicit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    groups: Sequence[Group],
    spec: AttentionSpec,
    keep_mask: KeepMask,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention of each group, in float32 for 16-bit inputs, rounded once at the end.

    A group's queries are in reverse order from `_queries` until they are written back. ``lse``, of
    shape ``(total_q, heads)``, receives the logsumexp of the groups' rows.
    """
    out = q.new_zeros(q.shape)
    lines = _Lines(table, spec, q)
    for i, group in enumerate(groups):
        weights, _ = _weights(q, k, group, lines, spec, lse)
        if spec.dropout_p > 0.0:
            weights = weights.mul_(keep_mask(i, weights)).div_(1.0 - spec.dropout_p)
        out_g = weights @ _keys(v, group, q.shape[1])
        group.put_rows(out, out_g.flip(2).transpose(1, 2))
    return out


@_without_autocast
def explicit_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    out: Tensor,
    groups: Sequence[Group],
    spec: AttentionSpec,
    keep_mask: KeepMask,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk and dv, and in float32 or float64 the table's gradient. Recomputes the weights."""
    dq, dk, dv = (torch.zeros_like(side) for side in (q, k, v))
    lines = _Lines(table, spec, q)
    dtable = None if table is None else torch.zeros_like(table, dtype=lines.dtype)
    for i, group in enumerate(groups):
        weights, slope = _weights(q, k, group, lines, spec)
        dout_g = _queries(dout, group)
        # Softmax backward: dscores = weights * (dweights - delta).
        delta = (dout_g * _queries(out, group)).sum(-1, keepdim=True)
        v_g = _keys(v, group, q.shape[1])
        if spec.dropout_p > 0.0:
            factor = keep_mask(i, weights) / (1.0 - spec.dropout_p)
            dv_g = (weights * factor).mT @ dout_g
            dweights = (dout_g @ v_g.mT).mul_(factor).sub_(delta)
        else:
            dv_g = weights.mT @ dout_g
            # One more column in the product subtracts delta, without a pass over the scores.
            dweights = torch.cat([dout_g, -delta], -1) @ _with_ones(v_g).mT
        dscores = _wide_rows(weights.shape, weights)
        torch.mul(weights, dweights, out=dscores)
        if dtable is not None:
            distances = line_distances(group.width_q, group.width_k, q.device, table)
            dtable.index_add_(1, distances, _sum_along_line(dscores))
        if slope is not None:
            dscores = dscores * slope
        q_g, k_g = _queries(q, group), _keys(k, group, q.shape[1])
        dq_g = (dscores @ k_g).mul_(spec.scale)
        group.put_rows(dq, dq_g.flip(2).transpose(1, 2))
        group.put_keys(dk, _per_kv_head((dscores.mT @ q_g).mul_(spec.scale), k.shape[1]))
        group.put_keys(dv, _per_kv_head(dv_g, v.shape[1]))
    return dq, dk, dv, dtable


class _ExplicitAttention(torch.autograd.Function):
    """The two functions above, with dropout from PyTorch's generator. Saves inputs and output."""

    @staticmethod
    def forward(ctx, q, k, v, table, groups, spec: AttentionSpec):
        ctx.groups, ctx.spec, ctx.keep_masks = groups, spec, []

        def draw(_: int, weights: Tensor) -> Tensor:
            ctx.keep_masks.append(torch.rand_like(weights) >= spec.dropout_p)
            return ctx.keep_masks[-1]

        out = explicit_attention(q, k, v, table, groups, spec, draw)
        ctx.save_for_backward(q, k, v, table, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        q, k, v, table, out = ctx.saved_tensors
        dq, dk, dv, dtable = explicit_attention_backward(
            dout, q, k, v, table, out, ctx.groups, ctx.spec, lambda i, _: ctx.keep_masks[i]
        )
        return dq, dk, dv, None if dtable is None else dtable.to(table.dtype), None, None


class _Lines:
    """Bias, causal mask and window for each pair of widths, as values along the distance."""

    def __init__(self, table: Tensor | None, spec: AttentionSpec, q: Tensor) -> None:
        self.dtype = _compute_dtype(q)
        self._table = None if table is None else table.to(self.dtype)
        self._limits = spec.limits
        self._device = q.device

    def view(self, rows: int, keys: int) -> Tensor:
        """``(heads or 1, rows, keys)``: the term to add to the scores of reversed queries."""
        distance = line_distances(rows, keys, self._device)
        if self._table is None:
            line = torch.zeros(1, distance.numel(), dtype=self.dtype, device=self._device)
        else:
            line = bias_line(self._table, rows, keys)
        left, right = self._limits
        if right >= 0:
            line = line.masked_fill(distance > right, float("-inf"))
        if left >= 0:
            line = line.masked_fill(distance < -left, float("-inf"))
        return line.unfold(1, keys, 1)


def _weights(
    q: Tensor,
    k: Tensor,
    group: Group,
    lines: _Lines,
    spec: AttentionSpec,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``[members, heads, rows, keys]`` attention weights, and the softcap's derivative if any."""
    heads = q.shape[1]
    q_g, k_g = _queries(q, group).mul(spec.scale), _keys(k, group, heads)
    line = lines.view(group.width_q, group.width_k)
    slope = None
    if spec.softcap is not None:
        capped = (q_g @ k_g.mT).div_(spec.softcap).tanh_()
        slope = 1.0 - capped.square()
        scores = capped.mul_(spec.softcap).add_(line)
        if group.real_keys is not None:
            scores.masked_fill_(~group.real_keys[:, None, None, :], float("-inf"))
    else:
        if group.real_keys is not None:
            # One more column in the product hides padded keys, without a pass over the scores.
            hidden = torch.zeros_like(group.real_keys, dtype=q_g.dtype)
            hidden.masked_fill_(~group.real_keys, _FAR_BELOW)
            hidden = hidden[:, None, :, None].expand(*k_g.shape[:3], 1)
            q_g, k_g = _with_ones(q_g), torch.cat([k_g, hidden], -1)
        if q_g.shape[0] == 1:
            line = line.expand(heads, -1, -1)
            scores = torch.baddbmm(line, q_g[0], k_g[0].mT)[None]
        else:
            scores = (q_g @ k_g.mT).add_(line)
    if lse is not None:
        group.put_rows(lse, scores.logsumexp(-1).flip(2).transpose(1, 2))
    weights = scores.softmax(dim=-1)
    # With fewer keys than queries, or with a window, a query may see no key: its weights are NaN.
    if spec.window is not None or group.width_k < group.width_q:
        weights = weights.nan_to_num_(0.0)
    return weights, slope


def _wide_rows(shape: torch.Size, like: Tensor) -> Tensor:
    """An empty ``[members, heads, rows, keys]`` with zeros after each row for `_sum_along_line`."""
    members, heads, rows, keys = shape
    wide = like.new_empty(members, heads, rows, rows + keys)
    wide[..., keys:] = 0.0
    return wide[..., :keys]


def _sum_along_line(dscores: Tensor) -> Tensor:
    """Sum over equal distances, and over members: ``[heads, rows + keys - 1]``.

    Row w, column n belongs to line entry w + n. Rows are ``rows + keys`` elements apart
    (`_wide_rows`). A view with rows one element shorter moves row w right by w, so that equal
    distances share a column.
    """
    members, heads, rows, keys = dscores.shape
    length = rows + keys - 1
    skewed = dscores.as_strided((members, heads, rows, length), (*dscores.stride()[:2], length, 1))
    return skewed.sum((0, 2))


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _queries(side: Tensor, group: Group) -> Tensor:
    """``(total_q, heads, head_dim)`` to ``[members, heads, width_q, head_dim]``, last row first.

    Padding becomes 0, so that it does not contribute to any gradient.
    """
    rows = group.take_rows(side).to(_compute_dtype(side))
    if group.real_rows is not None:
        rows = rows * group.real_rows[..., None, None]
    return rows.transpose(1, 2).flip(2)


def _keys(side: Tensor, group: Group, heads: int) -> Tensor:
    """``(total_k, kv_heads, head_dim)`` to ``[members, heads, width_k, head_dim]``."""
    keys = group.take_keys(side).to(_compute_dtype(side)).transpose(1, 2)
    return keys if keys.shape[1] == heads else keys.repeat_interleave(heads // keys.shape[1], 1)


def _per_kv_head(grad: Tensor, kv_heads: int) -> Tensor:
    """``[members, heads, keys, head_dim]`` to ``[members, keys, kv_heads, head_dim]``, summed."""
    if grad.shape[1] != kv_heads:
        grad = grad.unflatten(1, (kv_heads, -1)).sum(2)
    return grad.transpose(1, 2)


def _with_ones(matrix: Tensor) -> Tensor:
    """The matrix with a column of ones appended."""
    return torch.cat([matrix, matrix.new_ones(*matrix.shape[:-1], 1)], -1)
