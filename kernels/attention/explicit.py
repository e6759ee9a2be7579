"""Attention with bias, window, softcap or dropout in plain PyTorch, as batched matrices of scores.

Causal mask, window and relative bias depend only on the distance n - m. They are one *line* of
values per head, with -inf where a key is not visible. With the queries in reverse order, row w of
the scores needs ``line[w : w + num_keys]``. All rows together are a view of the line with both
strides equal to 1, so no bias matrix is built. The line's gradient is a sum over columns of the
scores' gradient, read through a view whose rows are one element shorter than those in memory
(`_sum_along_line`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .slots import Lines, Part, SlotPlan
from .spec import AttentionSpec

KeepMask = Callable[[int, Tensor], Tensor]
"""Maps a part's number and its ``[members, heads, rows, keys]`` weights to dropout's bool mask."""

Taken = tuple[Tensor, Tensor, Tensor]  # q, k and v in slots


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn autocast off inside: `cast_for_autocast` has applied it, and products are in float32."""

    @wraps(function)
    def run(first: Any, *rest: Any) -> Any:
        device_type = (first[0] if isinstance(first, tuple) else first).device.type
        if not torch.is_autocast_enabled(device_type):
            return function(first, *rest)
        with torch.autocast(device_type, enabled=False):
            return function(first, *rest)

    return run


def take_slots(q: Tensor, k: Tensor, v: Tensor, plan: SlotPlan) -> Taken:
    """``(total, heads, head_dim)`` to ``(slots, head_dim)``, in the dtype of the inputs."""
    return plan.q.take(q), plan.k.take(k), plan.k.take(v)


@_without_autocast
def explicit_attention(
    taken: Taken,
    table: Tensor | None,
    plan: SlotPlan,
    spec: AttentionSpec,
    keep_mask: KeepMask,
    lines: Lines,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of each part, in float32 for 16-bit inputs, rounded once at the end.

    Args:
        taken: q, k and v in slots.
        table: ``(heads, 2 * reach + 1)`` or None.
        plan: the slots of the batch.
        spec: the options.
        keep_mask: draws the dropout mask of a part.
        lines: receives what was computed from the table; empty, or from a call with this table.
        with_lse: also return the logsumexp.

    Returns:
        ``(total_q, heads, head_dim)`` in q's dtype, and ``(total_q, heads)`` or None.
    """
    like = taken[0]
    dtype = _compute_dtype(like)
    out = plan.q.new_buffer(like, like.shape[1], dtype)
    lse = out.new_full((out.shape[0], 1), float("-inf")) if with_lse else None
    for i, part in enumerate(plan.parts):
        q_g, k_g, v_g = _matrices(taken, part, dtype)
        line = plan.line(part, table, spec.limits, dtype, lines)
        scores, _ = _scores(q_g, k_g, line, plan, part, spec)
        if lse is not None:
            _rows_of(lse, part.span_q, part.width_q).copy_(scores.logsumexp(-1, keepdim=True))
        weights = _softmax(scores, part, spec)
        if spec.dropout_p > 0.0:
            keep = keep_mask(i, weights.unflatten(0, (part.members, -1)))
            weights = weights.mul_(keep.flatten(0, 1)).div_(1.0 - spec.dropout_p)
        torch.bmm(weights, v_g, out=_rows_of(out, part.span_q, part.width_q))
    stream = plan.q.put(out, plan.heads, plan.heads, like.dtype)
    if lse is None:
        return stream, None
    return stream, lse.index_select(0, plan.q.scatter).view(-1, plan.heads)


@_without_autocast
def explicit_attention_backward(
    dout: Tensor,
    taken: Taken,
    table: Tensor | None,
    plan: SlotPlan,
    spec: AttentionSpec,
    keep_mask: KeepMask,
    lines: Lines,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk and dv, and in float32 or float64 the table's gradient. Recomputes the weights.

    Padded queries have a gradient of zero, so that they do not contribute to any other.
    """
    dtype = _compute_dtype(taken[0])
    dout_s = plan.q.take(dout.to(dtype))
    if plan.q.real is not None:
        dout_s.mul_(plan.q.real)
    width = dout_s.shape[1]
    dq, dk, dv = (side.new_buffer(dout_s, width, dtype) for side in (plan.q, plan.k, plan.k))
    dtable = None if table is None else torch.zeros_like(table, dtype=dtype)
    for i, part in enumerate(plan.parts):
        q_g, k_g, v_g = _matrices(taken, part, dtype)
        dout_g = _rows_of(dout_s, part.span_q, part.width_q)
        line = plan.line(part, table, spec.limits, dtype, lines)
        scores, slope = _scores(q_g, k_g, line, plan, part, spec)
        weights = _softmax(scores, part, spec)
        dv_g = _rows_of(dv, part.span_k, part.width_k)
        if spec.dropout_p > 0.0:
            keep = keep_mask(i, weights.unflatten(0, (part.members, -1)))
            factor = keep.flatten(0, 1) / (1.0 - spec.dropout_p)
            torch.bmm((weights * factor).mT, dout_g, out=dv_g)
            dweights = torch.bmm(dout_g, v_g.mT).mul_(factor)
        else:
            torch.bmm(weights.mT, dout_g, out=dv_g)
            dweights = torch.bmm(dout_g, v_g.mT)
        dscores = torch._softmax_backward_data(dweights, weights, 2, dtype)
        if dtable is not None and table is not None:
            dline = _sum_along_line(dscores, part.members)
            dtable.index_add_(1, plan.distances(part, table), dline)
        if slope is not None:
            dscores = dscores * slope
        _scaled_product(dscores, k_g, spec.scale, _rows_of(dq, part.span_q, part.width_q))
        _scaled_product(dscores.mT, q_g, spec.scale, _rows_of(dk, part.span_k, part.width_k))
    return (
        plan.q.put(dq, plan.heads, plan.heads, taken[0].dtype),
        plan.k.put(dk, plan.heads, plan.kv_heads, taken[1].dtype),
        plan.k.put(dv, plan.heads, plan.kv_heads, taken[2].dtype),
        dtable,
    )


def _matrices(taken: Taken, part: Part, dtype: torch.dtype) -> Taken:
    """q, k and v of a part: ``[members * heads, rows or keys, head_dim]``."""
    q_s, k_s, v_s = taken
    return (
        _rows_of(q_s, part.span_q, part.width_q).to(dtype),
        _rows_of(k_s, part.span_k, part.width_k).to(dtype),
        _rows_of(v_s, part.span_k, part.width_k).to(dtype),
    )


def _rows_of(slots: Tensor, span: tuple[int, int], width: int) -> Tensor:
    """The slots of a part as ``[members * heads, width, columns]``, a view."""
    return slots[span[0] : span[1]].view(-1, width, slots.shape[1])


def _scores(
    q_g: Tensor,
    k_g: Tensor,
    line: Tensor | None,
    plan: SlotPlan,
    part: Part,
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor | None]:
    """``[members * heads, rows, keys]`` scores, and the softcap's derivative if there is one."""
    hidden = plan.hidden(part, q_g.dtype)
    slope = None
    if spec.softcap is not None:
        capped = torch.bmm(q_g, k_g.mT).mul_(spec.scale / spec.softcap).tanh_()
        slope = 1.0 - capped.square()
        scores = capped.mul_(spec.softcap)
        if hidden is not None:
            scores.add_(hidden)
    elif hidden is not None:  # added by the product, without a pass over the scores
        scores = torch.baddbmm(hidden, q_g, k_g.mT, alpha=spec.scale)
    elif line is not None and part.members == 1:
        line = line.expand(q_g.shape[0], -1, -1)
        return torch.baddbmm(line, q_g, k_g.mT, alpha=spec.scale), None
    else:
        scores = q_g.new_empty(q_g.shape[0], q_g.shape[1], k_g.shape[1])
        _scaled_product(q_g, k_g.mT, spec.scale, scores)
    if line is not None:
        scores.view(part.members, -1, *scores.shape[1:]).add_(line)
    return scores, slope


def _softmax(scores: Tensor, part: Part, spec: AttentionSpec) -> Tensor:
    weights = scores.softmax(dim=-1)
    # With fewer keys than queries, or with a window, a query may see no key: its weights are NaN.
    if spec.window is not None or part.width_k < part.width_q:
        weights.nan_to_num_(0.0)
    return weights


def _scaled_product(left: Tensor, right: Tensor, scale: float, out: Tensor) -> None:
    """``out = scale * left @ right``."""
    out.baddbmm_(left, right, beta=0.0, alpha=scale)


def _sum_along_line(dscores: Tensor, members: int) -> Tensor:
    """Sum over equal distances, and over members: ``[heads, rows + keys - 1]``.

    Row w, column n belongs to line entry w + n. With zeros after each row, rows are ``rows + keys``
    elements apart. A view with rows one element shorter moves row w right by w, so that equal
    distances share a column.
    """
    batch, rows, keys = dscores.shape
    wide = torch.nn.functional.pad(dscores, (0, rows))
    length, step = rows + keys - 1, wide.stride(0)
    heads = batch // members
    skewed = wide.as_strided((members, heads, rows, length), (heads * step, step, length, 1))
    return skewed.sum((0, 2))


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
