"""Varlen attention in plain PyTorch: the CPU path, and the oracle of every other backend.

Two ways through it, group of similar sequences by group. Where PyTorch's fused attention says all
there is to say (no bias, window or softcap, no query without a key) it runs. Everything else is
computed score by score in `_ExplicitAttention`.

The explicit way rests on one observation: causality, window and relative bias all depend on the
distance n - m alone. So they are one *line* of values per head, with -inf where a key is out of
sight. With the queries in reverse order, row w of the scores wants ``line[w : w + num_keys]``: a
view of the line whose two strides are both 1. The bias of a whole sequence is added without being
built, and its gradient is one sum down the columns of the scores' gradient, read through a view
that is one column narrower than it was written.
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

_FAR_BELOW = -1e30  # a score that softmax takes for -inf, but that no 0 turns into NaN


# Host lists and loops per sequence: nothing that torch.compile could make faster.
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
    """Attention within each sequence. Shapes as in `varlen_attention`, which has checked them."""
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
        # PyTorch's flag aligns top-left
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
            f"{name} must rise from 0 to {stream.shape[0]}, the length of its tensor, got {shown}"
        )
    return starts


# -------------------------------------------------------------------------- PyTorch's fused kernel


def _fused(q: Tensor, k: Tensor, v: Tensor, plan: Plan, spec: AttentionSpec) -> Tensor:
    options: dict[str, Any] = {
        "dropout_p": spec.dropout_p,
        "scale": spec.scale,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    alone = [group for group in plan.groups if group.span_q is not None]
    parts: list[Tensor] = []
    # split, not slices: its backward writes one gradient, a slice's a whole one for each sequence.
    for q_s, k_s, v_s in _split(q, k, v, alone):
        out = scaled_dot_product_attention(
            q_s.transpose(0, 1)[None],
            k_s.transpose(0, 1)[None],
            v_s.transpose(0, 1)[None],
            is_causal=spec.causal,
            **options,
        )  # [1, heads, rows, head_dim]
        parts.append(out.squeeze(0).transpose(0, 1))
    for group in plan.groups[len(alone) :]:
        seen = None
        if not spec.causal and group.real_keys is not None:
            # Causal and square, no real query sees the padding behind it anyway.
            seen = group.real_keys[:, None, None, :]
        out = scaled_dot_product_attention(
            group.take_rows(q).transpose(1, 2),
            group.take_keys(k).transpose(1, 2),
            group.take_keys(v).transpose(1, 2),
            attn_mask=seen,
            is_causal=spec.causal,
            **options,
        ).transpose(1, 2)  # [members, width_q, heads, head_dim]
        parts.append(out.flatten(0, 1))
    slots = torch.cat(parts)
    return slots if plan.slots is None else slots.index_select(0, plan.slots)


def _split(
    q: Tensor, k: Tensor, v: Tensor, alone: list[Group]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The slices of each group, cut out of the streams by one split each."""
    cuts = []
    for stream, spans in (
        (q, [group.span_q for group in alone]),
        (k, [group.span_k for group in alone]),
        (v, [group.span_k for group in alone]),
    ):
        sizes: list[int] = []  # of the gap before each span, and of the span
        end = 0
        for first, last in spans:
            sizes += [first - end, last - first]
            end = last
        cuts.append(stream.split([*sizes, stream.shape[0] - end])[1::2])
    return list(zip(*cuts, strict=True))


# ------------------------------------------------------------------------------- score by score


Keep = Callable[[int, Tensor], Tensor]
"""What dropout leaves of a group's weights, by its number and the weights: bool of their shape."""


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the float32 products float32: autocast has had its say in `cast_for_autocast`."""

    @wraps(function)
    def run(tensor: Tensor, *rest: Any) -> Any:
        with torch.autocast(tensor.device.type, enabled=False):
            return function(tensor, *rest)

    return run


@_without_autocast
def attend_explicitly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    groups: Sequence[Group],
    spec: AttentionSpec,
    keep: Keep,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention of each group in turn, in float32 for 16-bit inputs, rounded once at the end.

    A group's queries are in reverse order between `_queries` and the write back. ``lse``, of
    ``(total_q, heads)``, is filled in where some key is seen.
    """
    out = q.new_zeros(q.shape)
    lines = _Lines(table, spec, q)
    for i, group in enumerate(groups):
        weights, _ = _weights(q, k, group, lines, spec, lse)
        if spec.dropout_p > 0.0:
            weights = weights.mul_(keep(i, weights)).div_(1.0 - spec.dropout_p)
        out_g = weights @ _keys(v, group, q.shape[1])
        group.put_rows(out, out_g.flip(2).transpose(1, 2))
    return out


@_without_autocast
def pull_explicitly(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    out: Tensor,
    groups: Sequence[Group],
    spec: AttentionSpec,
    keep: Keep,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and the table's gradient, in float32 or float64, from the output alone."""
    dq, dk, dv = (torch.zeros_like(side) for side in (q, k, v))
    lines = _Lines(table, spec, q)
    dtable = None if table is None else torch.zeros_like(table, dtype=lines.dtype)
    for i, group in enumerate(groups):
        weights, slope = _weights(q, k, group, lines, spec)
        dout_g = _queries(grad_out, group)
        # The softmax's Jacobian takes the row's mean pull from each weight's pull. One more
        # column in the product does it, instead of another pass over the scores.
        mean_pull = (dout_g * _queries(out, group)).sum(-1, keepdim=True)
        v_g = _keys(v, group, q.shape[1])
        if spec.dropout_p > 0.0:
            kept = keep(i, weights) / (1.0 - spec.dropout_p)
            dv_g = (weights * kept).mT @ dout_g
            dweights = (dout_g @ v_g.mT).mul_(kept).sub_(mean_pull)
        else:
            dv_g = weights.mT @ dout_g
            dweights = torch.cat([dout_g, -mean_pull], -1) @ _with_ones(v_g).mT
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
    """The two functions above, with dropout from PyTorch's generator; keeps the output alone."""

    @staticmethod
    def forward(ctx, q, k, v, table, groups, spec: AttentionSpec):
        ctx.groups, ctx.spec, ctx.keeps = groups, spec, []

        def draw(_: int, weights: Tensor) -> Tensor:
            ctx.keeps.append(torch.rand_like(weights) >= spec.dropout_p)
            return ctx.keeps[-1]

        out = attend_explicitly(q, k, v, table, groups, spec, draw)
        ctx.save_for_backward(q, k, v, table, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        q, k, v, table, out = ctx.saved_tensors
        dq, dk, dv, dtable = pull_explicitly(
            grad_out, q, k, v, table, out, ctx.groups, ctx.spec, lambda i, _: ctx.keeps[i]
        )
        return dq, dk, dv, None if dtable is None else dtable.to(table.dtype), None, None


class _Lines:
    """Bias, causality and window for each pair of widths, as values along the distance."""

    def __init__(self, table: Tensor | None, spec: AttentionSpec, q: Tensor) -> None:
        self.dtype = _compute_dtype(q)
        self._table = None if table is None else table.to(self.dtype)
        self._spec = spec
        self._device = q.device

    def view(self, rows: int, keys: int) -> Tensor:
        """``(heads or 1, rows, keys)``: what is added to the scores of reversed queries."""
        distance = line_distances(rows, keys, self._device)
        if self._table is None:
            line = torch.zeros(1, distance.numel(), dtype=self.dtype, device=self._device)
        else:
            line = bias_line(self._table, rows, keys)
        left, right = self._spec.window or (-1, -1)
        if self._spec.causal:
            right = 0
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
        bounded = (q_g @ k_g.mT).div_(spec.softcap).tanh_()
        slope = 1.0 - bounded.square()
        scores = bounded.mul_(spec.softcap).add_(line)
        if group.real_keys is not None:
            scores.masked_fill_(~group.real_keys[:, None, None, :], float("-inf"))
    else:
        if group.real_keys is not None:
            # Hide padded keys by one more column in the product: a pass over the scores saved.
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
    # Where keys are fewer than queries, or the window ends before one, a query may see nothing.
    if spec.window is not None or group.width_k < group.width_q:
        weights = weights.nan_to_num_(0.0)  # of a row of nothing but -inf
    return weights, slope


def _wide_rows(shape: torch.Size, like: Tensor) -> Tensor:
    """An empty ``[members, heads, rows, keys]`` with room for `_sum_along_line` behind each row."""
    members, heads, rows, keys = shape
    wide = like.new_empty(members, heads, rows, rows + keys)
    wide[..., keys:] = 0.0
    return wide[..., :keys]


def _sum_along_line(dscores: Tensor) -> Tensor:
    """Sum over equal distances, and members: ``[heads, rows + keys - 1]``.

    Row w, column n is for line entry w + n. Rows of ``rows + keys`` (`_wide_rows`), read in rows
    one shorter, have moved row w right by w: equal distances stand in one column.
    """
    members, heads, rows, keys = dscores.shape
    length = rows + keys - 1
    skewed = dscores.as_strided((members, heads, rows, length), (*dscores.stride()[:2], length, 1))
    return skewed.sum((0, 2))


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _queries(side: Tensor, group: Group) -> Tensor:
    """``(total_q, heads, head_dim)`` to ``[members, heads, width_q, head_dim]``, last row first.

    Padding becomes 0, so that it takes part in no gradient.
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
    return torch.cat([matrix, matrix.new_ones(*matrix.shape[:-1], 1)], -1)
