"""Attention by PyTorch's fused kernels, one call for each group of sequences.

On a CPU, the kernel is called directly, forward and backward. A layer is then one node of autograd,
and no view of a group is recorded. On other devices `scaled_dot_product_attention` chooses the
kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .grouping import Group, Plan
from .spec import AttentionSpec

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, spec: AttentionSpec
) -> tuple[Tensor, list[Tensor]]:
    """The output ``(total_q, heads, head_dim)``, and for each group what its backward needs."""
    q, k, v = (side if side.stride(2) == 1 else side.contiguous() for side in (q, k, v))
    saved: list[Tensor] = []
    parts: list[Tensor] = []
    for i, group in enumerate(plan.groups):
        q_g = group.take_rows(q).transpose(1, 2)  # [members, heads, width_q, head_dim]
        k_g, v_g = group.take_keys(k).transpose(1, 2), group.take_keys(v).transpose(1, 2)
        mask = _mask(plan, i, q, spec)
        out, lse = _flash(q_g, k_g, v_g, 0.0, spec.causal, attn_mask=mask, scale=spec.scale)
        saved += (q_g, k_g, v_g, out, lse)
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return _joined(parts, plan.slots), saved


def flash_backward(
    dout: Tensor, saved: Sequence[Tensor], plan: Plan, spec: AttentionSpec
) -> list[Tensor]:
    """dq, dk and dv, in the shapes of q, k and v."""
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for i, group in enumerate(plan.groups):
        q_g, k_g, v_g, out, lse = saved[5 * i : 5 * i + 5]
        dout_g = group.take_rows(dout)
        if group.real_rows is not None:  # padded queries repeat a row
            dout_g = dout_g * group.real_rows[..., None, None]
        gradients = _flash_backward(
            dout_g.transpose(1, 2),
            q_g,
            k_g,
            v_g,
            out,
            lse,
            0.0,
            spec.causal,
            attn_mask=_mask(plan, i, q_g, spec),
            scale=spec.scale,
        )
        for side, gradient in zip(parts, gradients, strict=True):
            side.append(gradient.transpose(1, 2).flatten(0, 1))
    dq = _joined(parts[0], plan.slots)
    dk, dv = (_joined(side, plan.key_slots) for side in parts[1:])
    if plan.lonely_keys is not None:
        dk, dv = (side.index_fill(0, plan.lonely_keys, 0.0) for side in (dk, dv))
    return [dq, dk, dv]


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, plan: Plan, spec: AttentionSpec) -> Tensor:
    """The output ``(total_q, heads, head_dim)``, on any device and with dropout."""
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
    return _joined(parts, plan.slots)


def _joined(parts: list[Tensor], slots: Tensor | None) -> Tensor:
    """The groups' results in the order of the stream."""
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined if slots is None else joined.index_select(0, slots)


def _mask(plan: Plan, i: int, like: Tensor, spec: AttentionSpec) -> Tensor | None:
    """``(members, 1, 1, width_k)``: -inf at padded keys, 0 elsewhere. Layers share it."""
    real = plan.groups[i].real_keys
    if spec.causal or real is None:  # under a causal mask, no real query sees the padding after it
        return None
    key = i, like.dtype
    if key not in plan.masks:
        mask = torch.zeros(real.shape, dtype=like.dtype, device=like.device)
        plan.masks[key] = mask.masked_fill_(~real, float("-inf"))[:, None, None, :]
    return plan.masks[key]


def _split(
    q: Tensor, k: Tensor, v: Tensor, singles: Iterable[Group]
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
