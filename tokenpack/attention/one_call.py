"""Attention of few tokens on a CPU: all sequences in one call, under a mask.

    scores[m, n] = -inf    if query m and key n belong to different sequences

The reference takes the rows of each group of sequences out of the stream, and puts the results
back. These calls cost more than the scores between sequences, as long as there are few. Measured on
one core, with 4 heads of 8 and 8 heads of 64: one call takes half of the time up to 2**15 scores,
and as much time at 2**16.

A sequence with NaN or infinite values makes the others NaN, because 0 * NaN is NaN. In training the
loss is NaN then in any case. Calls without gradients take the reference, where it is not.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..kernels import PackedLayout
from ..kernels._derivatives import first_order
from .backends import Options

_MOST_SCORES = 2**15  # of all heads


class OneCall(NamedTuple):
    """How to compute a kind of layer in one call.

    Attributes:
        scale: factor of the scores.
        causal: whether the call itself is causal, without a mask.
        mask: ``(1, total_q, total_k)``, 0 or -inf; None for a single sequence.
        columns: ``(total_q * total_k,)`` int64, the column of the bias for each score, or None.
    """

    scale: float
    causal: bool
    mask: Tensor | None
    columns: Tensor | None

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, table: Tensor | None, lines: Any
    ) -> Tensor:
        """``(1, heads, total, head_dim)`` each, to ``(1, total_q, heads, head_dim)``.

        Layers that share ``table``, ``(heads, 2 * reach + 1)`` or None, may share ``lines``.
        """
        if table is not None:
            out: Tensor = _WithBias.apply(query, key, value, table, self, lines)
            return out
        out = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if self.mask is None else self.mask[None],
            is_causal=self.causal,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.transpose(1, 2)


def plan_one_call(
    layout_q: PackedLayout,
    layout_k: PackedLayout,
    heads: tuple[int, int],
    dtype: torch.dtype,
    options: Options,
    reach: int | None,
) -> OneCall | None:
    """The call for all sequences of a batch, or None if the reference is faster or must run.

    Args:
        layout_q, layout_k: the sequences, on a CPU.
        heads: the numbers of heads of queries, and of keys and values.
        dtype: of q, k and v.
        options: those of `varlen_attention`.
        reach: the largest distance in the relative bias, or None if there is none.
    """
    scores = heads[0] * layout_q.total_tokens * layout_k.total_tokens
    if not 0 < scores <= _MOST_SCORES or options["dropout_p"] > 0.0 or options["softcap"]:
        return None
    if reach is not None and (heads[0] != heads[1] or dtype not in (torch.float32, torch.float64)):
        return None
    starts_q, starts_k = (tuple(side.cu_seqlens.tolist()) for side in (layout_q, layout_k))
    return _plan(
        starts_q, starts_k, dtype, options["causal"], options["window"], options["scale"], reach
    )


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # autograd cannot save inference tensors, which would be cached too
def _plan(
    starts_q: tuple[int, ...],
    starts_k: tuple[int, ...],
    dtype: torch.dtype,
    causal: bool,
    window: tuple[int, int] | None,
    scale: float,
    reach: int | None,
) -> OneCall | None:
    if starts_q != starts_k and (
        # Distances count from the end of a sequence, and a query without keys has no softmax.
        causal
        or window is not None
        or reach is not None
        or any(
            starts_q[s] < starts_q[s + 1] and starts_k[s] == starts_k[s + 1]
            for s in range(len(starts_q) - 1)
        )
    ):
        return None
    total_q, total_k = starts_q[-1], starts_k[-1]
    is_one = sum(a < b for a, b in zip(starts_k, starts_k[1:], strict=False)) == 1
    if is_one and window is None and reach is None and total_q > 0:
        return OneCall(scale, causal, None, None)
    sequence_q, sequence_k = (
        torch.repeat_interleave(torch.tensor(starts).diff()) for starts in (starts_q, starts_k)
    )
    distance = torch.arange(total_k) - torch.arange(total_q)[:, None]  # n - m
    visible = sequence_q[:, None] == sequence_k
    left, right = window or (-1, -1)
    if left >= 0:
        visible &= distance >= -left
    if causal or right >= 0:
        visible &= distance <= (0 if causal else right)
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))[None]
    columns = None if reach is None else (distance.clamp(-reach, reach) + reach).flatten()
    return OneCall(scale, False, mask, columns)


class _WithBias(torch.autograd.Function):
    """Scores with a relative bias, whose gradient goes to the table."""

    @staticmethod
    def forward(ctx, query, key, value, table, plan, lines):
        q, k, v = query.squeeze(0), key.squeeze(0), value.squeeze(0)  # [heads, total, head_dim]
        bias = lines.get("one call")
        if bias is None:
            bias = table.index_select(1, plan.columns).view(-1, *plan.mask.shape[1:]) + plan.mask
            lines["one call"] = bias
        weights = torch.baddbmm(bias, q, k.mT, alpha=plan.scale).softmax(-1)
        ctx.plan, ctx.shape = plan, table.shape
        ctx.save_for_backward(q, k, v, weights)
        return torch.bmm(weights, v).transpose(0, 1)[None]

    @staticmethod
    @first_order
    def backward(ctx, dout):
        q, k, v, weights = ctx.saved_tensors
        dout = dout.squeeze(0).transpose(0, 1)  # [heads, total_q, head_dim]
        dvalue = torch.bmm(weights.mT, dout)
        dweights = torch.bmm(dout, v.mT)
        dscores = torch._softmax_backward_data(dweights, weights, 2, weights.dtype)
        dtable = None
        if ctx.needs_input_grad[3]:
            dtable = dscores.new_zeros(ctx.shape)
            dtable.index_add_(1, ctx.plan.columns, dscores.flatten(1))
        dscores = dscores.mul_(ctx.plan.scale)
        dquery, dkey = torch.bmm(dscores, k), torch.bmm(dscores.mT, q)
        return dquery[None], dkey[None], dvalue[None], dtable, None, None
