"""Varlen attention as `torch.library` ops: the Triton kernels, and the reference's own functions.

On a CPU the ops run while they are traced or asked for the logsumexp or a seed. Otherwise
`reference` runs as it is there, which groups sequences and takes PyTorch's fused attention.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .._triton import DEVICES, on_triton
from .backward import attention_backward
from .forward import attention_forward
from .grouping import Group
from .reference import Keep, attend_explicitly, pull_explicitly
from .spec import AttentionSpec

_LOG2_E = 1.4426950408889634
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def kernel_lacks(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """What the Triton kernel lacks for a call on the current device, or None if nothing."""
    if device_type not in DEVICES:
        return f"needs a CUDA device and Triton, not {device_type}"
    if device_type == "cuda" and not is_ampere_or_newer():
        return "needs compute capability 8.0 or newer"
    if dtype not in _DTYPES:
        return f"needs float16, bfloat16 or float32, not {dtype}"
    if not 16 <= head_dim <= 256:
        return f"needs a head_dim from 16 to 256, not {head_dim}"
    return None


def is_ampere_or_newer() -> bool:
    """Whether there is a GPU, and the current one has compute capability 8.0 or more."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


@torch.library.custom_op("tokenpack::varlen_attention", mutates_args=())
def _varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    table: Tensor | None,
    seed: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """out, and ``(heads, total_q)`` logsumexp. Limits -1 and softcap 0 are none."""
    spec = _spec(scale, left, right, softcap, dropout_p, seed)
    return _attend_in_torch(q, k, v, cu_seqlens_q, cu_seqlens_k, table, seed, spec)


@torch.library.custom_op("tokenpack::varlen_attention_backward", mutates_args=())
def _varlen_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    table: Tensor | None,
    seed: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
    needs_table: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and the table's gradient, empty where nobody needs it."""
    spec = _spec(scale, left, right, softcap, dropout_p, seed)
    return _pull_in_torch(
        dout, q, k, v, out, cu_seqlens_q, cu_seqlens_k, table, seed, spec, needs_table
    )


def _attend_in_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    table: Tensor | None,
    seed: Tensor | None,
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor]:
    groups, keep = _one_by_one(cu_seqlens_q, cu_seqlens_k, seed, spec)
    _, lse = _new_outputs(q)
    rows_lse = torch.full_like(lse.t(), float("-inf"))  # (total_q, heads)
    out = attend_explicitly(q, k, v, table, groups, spec, keep, rows_lse)
    return out, rows_lse.t().contiguous()


def _pull_in_torch(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    table: Tensor | None,
    seed: Tensor | None,
    spec: AttentionSpec,
    needs_table: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups, keep = _one_by_one(cu_seqlens_q, cu_seqlens_k, seed, spec)
    dq, dk, dv, dtable = pull_explicitly(dout, q, k, v, table, out, groups, spec, keep)
    if dtable is None or not needs_table:
        dtable = dq.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32))
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), dtable


def _one_by_one(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seed: Tensor | None, spec: AttentionSpec
) -> tuple[list[Group], Keep]:
    """Each sequence as a group, and dropout by a sequence's number, as in the kernel."""
    groups, seeds = [], []
    sides = (starts.tolist() for starts in (cu_seqlens_q, cu_seqlens_k))
    spans = zip(*(itertools.pairwise(side) for side in sides), strict=True)
    for s, ((first_q, end_q), (first_k, end_k)) in enumerate(spans):
        if first_q < end_q and first_k < end_k:
            span_q, span_k = (first_q, end_q), (first_k, end_k)
            groups.append(Group(end_q - first_q, end_k - first_k, span_q, span_k))
            seeds.append(s if seed is None else int(seed) + s)

    def keep(i: int, weights: Tensor) -> Tensor:
        generator = torch.Generator(weights.device).manual_seed(seeds[i])
        chance = torch.rand(weights.shape, generator=generator, device=weights.device)
        return chance >= spec.dropout_p

    return groups, keep


def _spec(
    scale: float, left: int, right: int, softcap: float, dropout_p: float, seed: Tensor | None
) -> AttentionSpec:
    if dropout_p > 0.0 and seed is None:
        raise ValueError(f"seed must be given where dropout_p is {dropout_p}, got None")
    return AttentionSpec(False, scale, (left, right), softcap or None, dropout_p)


# ------------------------------------------------------------------------------------------ Triton


@on_triton(_varlen_attention)
def varlen_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    table: Tensor | None,
    seed: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """The op ``varlen_attention`` in one launch."""
    spec = _spec(scale, left, right, softcap, dropout_p, seed)
    if kernel_lacks(q.device.type, q.dtype, q.shape[2]):
        return _attend_in_torch(q, k, v, cu_seqlens_q, cu_seqlens_k, table, seed, spec)
    q, k, v = map(_close_columns, (q, k, v))
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    return attention_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, _log2(table), seed, spec)


@on_triton(_varlen_attention_backward)
def varlen_attention_backward_triton(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    table: Tensor | None,
    seed: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
    needs_table: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``varlen_attention_backward`` in two launches, and the sum of the bias's partials."""
    spec = _spec(scale, left, right, softcap, dropout_p, seed)
    if kernel_lacks(q.device.type, q.dtype, q.shape[2]):
        return _pull_in_torch(
            dout, q, k, v, out, cu_seqlens_q, cu_seqlens_k, table, seed, spec, needs_table
        )
    dout, q, k, v = map(_close_columns, (dout, q, k, v))
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    dq, dk, dv, dtable = attention_backward(
        dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, _log2(table), seed, spec, needs_table
    )
    return dq, dk, dv, lse.new_empty(0) if dtable is None else dtable


def _close_columns(side: Tensor) -> Tensor:
    return side if side.stride(2) == 1 else side.contiguous()


def _log2(table: Tensor | None) -> Tensor | None:
    """The table in the kernels' units, float32 and in one piece."""
    return None if table is None else (table.float() * _LOG2_E).contiguous()


# ------------------------------------------------------------- what torch.compile and autograd need


def _new_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=wide)


def _new_gradients(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, needs_table: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    shape = (0,) if table is None or not needs_table else table.shape
    dq, dk, dv = (side.new_empty(side.shape) for side in (q, k, v))
    return dq, dk, dv, q.new_empty(shape, dtype=wide)


@_varlen_attention.register_fake
def _(q, k, v, cu_q, cu_k, table, seed, scale, left, right, softcap, dropout_p):
    return _new_outputs(q)


@_varlen_attention_backward.register_fake
def _(
    dout, q, k, v, out, lse, cu_q, cu_k, table, seed, scale, left, right, softcap, p, needs_table
):
    return _new_gradients(q, k, v, table, needs_table)


def _save_for_backward(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, table, seed, *ctx.options = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, table, seed)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout: Tensor | None, _dlse):
    nothing = (None,) * (7 + len(ctx.options))
    if dout is None:
        return nothing
    tensors = ctx.saved_tensors  # once: checkpointing forbids to look again
    table, needs_table = tensors[7], ctx.needs_input_grad[5]
    dq, dk, dv, dtable = torch.ops.tokenpack.varlen_attention_backward(
        dout, *tensors, *ctx.options, needs_table
    )
    return dq, dk, dv, None, None, dtable.to(table.dtype) if needs_table else None, *nothing[6:]


_varlen_attention.register_autograd(_backward, setup_context=_save_for_backward)
