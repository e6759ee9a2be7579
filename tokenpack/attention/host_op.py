"""The reference on a CPU as one op, which groups sequences of similar lengths.

The op ``tokenpack::varlen_attention`` computes one sequence after the other on a CPU, because its
dropout depends on the sequence's number. Without dropout, the layers of a graph run the ops below.
They compute what `tokenpack.kernels.varlen_attention_reference` does, by the same plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention.explicit import (
    explicit_attention,
    explicit_attention_backward,
    take_slots,
)
from ..kernels.attention.fused import flash_backward, flash_forward
from ..kernels.attention.grouping import Plan
from ..kernels.attention.reference import HostPlan, plan_on_host
from ..kernels.attention.spec import AttentionSpec
from .backends import Options, Tensors


def attend_on_host_in_graph(tensors: Tensors, options: Options) -> Tensor:
    """`varlen_attention_reference` without dropout, on a CPU. ``(total_q, heads, head_dim)``."""
    left, right = options["window"] or (-1, -1)
    out, _ = torch.ops.tokenpack.host_attention(
        *tensors,
        options["relative_bias"],
        options["scale"],
        options["softcap"] or 0.0,
        [int(options["causal"]), left, right],
    )
    return out


@torch.library.custom_op("tokenpack::host_attention", mutates_args=(), device_types="cpu")
def _host_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    table: Tensor | None,
    scale: float,
    softcap: float,
    limits: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The output, and the ``(total_q, heads)`` logsumexp, which is 0 if no fused kernel ran.

    ``softcap`` is 0 for none. ``limits`` are: causal or not, and the window, -1 for no limit.
    """
    spec = _spec(scale, softcap, limits)
    plan = _plan(q, k, cu_seqlens_q, cu_seqlens_k, table, spec)
    if plan.fused is not None:
        out, saved = flash_forward(q, k, v, plan.fused, spec)
        return out.contiguous(), _stream_of_groups(saved[4::5], plan.fused)
    assert plan.explicit is not None
    taken = take_slots(q, k, v, plan.explicit)
    out, _ = explicit_attention(taken, table, plan.explicit, spec, _no_dropout, {})
    return out, q.new_zeros(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("tokenpack::host_attention_backward", mutates_args=(), device_types="cpu")
def _host_attention_backward(
    dout: Tensor,
    tensors: Sequence[Tensor],
    table: Tensor | None,
    scale: float,
    softcap: float,
    limits: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and the table's gradient, which is empty without a table.

    ``tensors`` are q, k, v, out, lse, cu_seqlens_q and cu_seqlens_k.
    """
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k = tensors
    spec = _spec(scale, softcap, limits)
    plan = _plan(q, k, cu_seqlens_q, cu_seqlens_k, table, spec)
    dtable = None
    if plan.fused is not None:
        saved: list[Tensor] = []
        for group in plan.fused.groups:
            queries = (group.take_rows(side).transpose(1, 2) for side in (q, out, lse[..., None]))
            q_g, out_g, lse_g = queries
            k_g, v_g = (group.take_keys(side).transpose(1, 2) for side in (k, v))
            saved += (q_g, k_g, v_g, out_g, lse_g.squeeze(-1).contiguous())
        dq, dk, dv = flash_backward(dout, saved, plan.fused, spec)
    else:
        assert plan.explicit is not None
        taken = take_slots(q, k, v, plan.explicit)
        dq, dk, dv, dtable = explicit_attention_backward(
            dout, taken, table, plan.explicit, spec, _no_dropout, {}
        )
    dq, dk, dv = (side.contiguous() for side in (dq, dk, dv))
    if dtable is None or table is None:
        return dq, dk, dv, dq.new_empty(0)
    return dq, dk, dv, dtable.to(table.dtype)


def _plan(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    table: Tensor | None,
    spec: AttentionSpec,
) -> HostPlan:
    sizes = (q.shape[0], k.shape[0]), (q.shape[1], k.shape[1])
    return plan_on_host(cu_seqlens_q, cu_seqlens_k, *sizes, q.device, table is not None, spec)


def _spec(scale: float, softcap: float, limits: Sequence[int]) -> AttentionSpec:
    causal, left, right = limits
    window = None if left < 0 and right < 0 else (left, right)
    return AttentionSpec(bool(causal), scale, window, softcap or None, 0.0)


def _stream_of_groups(parts: list[Tensor], plan: Plan) -> Tensor:
    """``(members, heads, width)`` of each group, to ``(total, heads)``."""
    joined = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])
    return joined.contiguous() if plan.slots is None else joined.index_select(0, plan.slots)


def _no_dropout(part: int, weights: Tensor) -> Tensor:
    raise AssertionError("the op has no dropout")


# ---------------------------------------------------------------------- torch.compile and autograd


@_host_attention.register_fake
def _(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


@_host_attention_backward.register_fake
def _(
    dout: Tensor, tensors: Sequence[Tensor], table: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    dq, dk, dv = (side.new_empty(side.shape) for side in tensors[:3])
    return dq, dk, dv, dq.new_empty(0) if table is None else torch.empty_like(table)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, table, *ctx.options = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, table)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, _dlse: Any) -> tuple:
    no_gradients = (None,) * len(ctx.options)
    if dout is None:
        return (None,) * 6 + no_gradients
    *tensors, table = ctx.saved_tensors  # read once: checkpointing allows one unpack
    dq, dk, dv, dtable = torch.ops.tokenpack.host_attention_backward(
        dout, tensors, table, *ctx.options
    )
    return dq, dk, dv, None, None, None if table is None else dtable, *no_gradients


_host_attention.register_autograd(_backward, setup_context=_save_for_backward)
