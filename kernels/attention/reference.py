"""Varlen attention in plain PyTorch: the CPU path, and the oracle of all other backends.

There are two ways to compute a batch. PyTorch's fused attention runs if it supports the call: no
bias, no window, no softcap, keys for every query, and q and k of equal lengths under a causal mask.
Otherwise `explicit` computes the matrix of scores. Both compute sequences of similar lengths
together (`grouping`).

What depends on lengths and options alone is in a `HostPlan`. A model's layers share one, so that a
layer costs a few calls of PyTorch. On a CPU, a layer is one node of autograd.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .._derivatives import first_order
from .explicit import explicit_attention, explicit_attention_backward, take_slots
from .fused import flash_backward, flash_forward, scaled_dot_product
from .grouping import Plan, plan_groups
from .slots import Lines, SlotPlan, plan_slots
from .spec import AttentionSpec


class HostPlan(NamedTuple):
    """How to compute the batches of some lengths with some options. One of the plans is None."""

    spec: AttentionSpec
    fused: Plan | None
    explicit: SlotPlan | None


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
    sizes = (q.shape[0], k.shape[0]), (q.shape[1], k.shape[1])
    has_bias = relative_bias is not None
    plan = plan_on_host(cu_seqlens_q, cu_seqlens_k, *sizes, q.device, has_bias, spec)
    return attend_on_host(q, k, v, relative_bias, plan)


def plan_on_host(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    totals: tuple[int, int],
    heads: tuple[int, int],
    device: torch.device,
    has_bias: bool,
    spec: AttentionSpec,
) -> HostPlan:
    """The plan of a batch. Copies ``cu_seqlens`` to the host and validates their values.

    Args:
        cu_seqlens_q, cu_seqlens_k: as in `varlen_attention`.
        totals: the lengths of the streams of queries and of keys.
        heads: the numbers of heads of queries, and of keys and values.
        device: the device of the streams.
        has_bias: whether there is a relative bias.
        spec: the options.

    Raises:
        ValueError: if they are not non-decreasing from 0 to the length of their stream.
    """
    starts_q = _host_starts("cu_seqlens_q", cu_seqlens_q, totals[0])
    starts_k = _host_starts("cu_seqlens_k", cu_seqlens_k, totals[1])
    return _find_plan(starts_q, starts_k, heads, device, has_bias, spec)


@lru_cache(maxsize=64)
def _find_plan(
    starts_q: tuple[int, ...],
    starts_k: tuple[int, ...],
    heads: tuple[int, int],
    device: torch.device,
    has_bias: bool,
    spec: AttentionSpec,
) -> HostPlan:
    """The plan of the sequences that begin at ``starts_q`` and ``starts_k``."""
    lengths = [
        (starts_q[s + 1] - starts_q[s], starts_k[s + 1] - starts_k[s])
        for s in range(len(starts_q) - 1)
    ]
    fused = (
        not has_bias
        and spec.window is None
        and spec.softcap is None
        # PyTorch runs a fused kernel on a CPU only without dropout.
        and not (spec.dropout_p > 0.0 and device.type == "cpu")
        and all(keys > 0 for rows, keys in lengths if rows)
        # PyTorch's is_causal aligns top-left, which is the same only for equal lengths.
        and (not spec.causal or all(rows == keys for rows, keys in lengths if rows))
    )
    if fused:
        plan = plan_groups(starts_q, starts_k, heads[0], spec.causal, device)
        if plan.groups:
            return HostPlan(spec, plan, None)
    return HostPlan(spec, None, plan_slots(starts_q, starts_k, *heads, device))


def attend_on_host(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    relative_bias: Tensor | None,
    plan: HostPlan,
    lines: Lines | None = None,
) -> Tensor:
    """Attention as planned. ``(total_q, heads, head_dim)``, or as a layer has it.

    A layer's q, k and v may also be ``(1, heads, total, head_dim)``. The output is then
    ``(1, total_q, heads, head_dim)``. Layers that share ``relative_bias`` may share ``lines``.
    """
    if plan.fused is None or q.device.type == "cpu":
        return _HostAttention.apply(q, k, v, relative_bias, plan, {} if lines is None else lines)
    if q.dim() == 3:
        return scaled_dot_product(q, k, v, plan.fused, plan.spec)
    q, k, v = (_stream(side) for side in (q, k, v))
    return scaled_dot_product(q, k, v, plan.fused, plan.spec)[None]


def _host_starts(name: str, cu_seqlens: Tensor, total: int) -> tuple[int, ...]:
    starts = tuple(cu_seqlens.tolist())
    if (
        starts[0] != 0
        or starts[-1] != total
        or any(a > b for a, b in zip(starts, starts[1:], strict=False))
    ):
        shown = starts if len(starts) < 9 else (*starts[:4], "...", *starts[-4:])
        raise ValueError(
            f"{name} must be non-decreasing from 0 to {total}, "
            f"the length of its tensor, got {shown}"
        )
    return starts


class _HostAttention(torch.autograd.Function):
    """One layer's attention, with dropout from PyTorch's generator.

    Views inside are not recorded by autograd, so they cost little.
    """

    @staticmethod
    def forward(ctx, q, k, v, table, plan: HostPlan, lines: Lines):
        ctx.plan, ctx.is_layer, ctx.keep_masks = plan, q.dim() == 4, []
        if ctx.is_layer:
            q, k, v = _stream(q), _stream(k), _stream(v)
        if plan.fused is not None:
            out, saved = flash_forward(q, k, v, plan.fused, plan.spec)
            ctx.save_for_backward(*saved)
        else:
            assert plan.explicit is not None

            def draw(_: int, weights: Tensor) -> Tensor:
                ctx.keep_masks.append(torch.rand_like(weights) >= plan.spec.dropout_p)
                return ctx.keep_masks[-1]

            taken = take_slots(q, k, v, plan.explicit)
            out, _ = explicit_attention(taken, table, plan.explicit, plan.spec, draw, lines)
            ctx.lines = lines
            ctx.save_for_backward(*taken, table)
        return out[None] if ctx.is_layer else out

    @staticmethod
    @first_order
    def backward(ctx, dout):
        plan: HostPlan = ctx.plan
        dtable = None
        if ctx.is_layer:
            dout = dout.squeeze(0)
        if plan.fused is not None:
            gradients = flash_backward(dout, ctx.saved_tensors, plan.fused, plan.spec)
        else:
            assert plan.explicit is not None
            q_s, k_s, v_s, table = ctx.saved_tensors
            *gradients, dtable = explicit_attention_backward(
                dout,
                (q_s, k_s, v_s),
                table,
                plan.explicit,
                plan.spec,
                lambda i, _: ctx.keep_masks[i],
                ctx.lines,
            )
            dtable = None if dtable is None else dtable.to(table.dtype)
        if ctx.is_layer:
            gradients = [side.transpose(0, 1)[None] for side in gradients]
        return *gradients, dtable, None, None


def _stream(side: Tensor) -> Tensor:
    """``(1, heads, total, head_dim)`` to ``(total, heads, head_dim)``."""
    # The backward of [0] would write zeros and copy the gradient into them.
    return side.squeeze(0).transpose(0, 1)
