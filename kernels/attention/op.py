"""Varlen attention as `torch.library` ops, which run the Triton kernels or plain PyTorch.

On a CPU, `varlen_attention` calls the op only while it is traced, and for a logsumexp or a dropout
seed. All other calls use `reference.attend_by_sequence`, which groups sequences and runs PyTorch's
fused attention.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .._ops import define_op, on_triton
from .._triton import DEVICES
from .explicit import (
    KeepMask,
    explicit_attention,
    explicit_attention_backward,
    take_slots,
)
from .grouping import Group
from .launch import table_for_kernels
from .layers import LayerKernels, Saved
from .slots import SlotPlan
from .spec import AttentionInputs, AttentionSpec

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def kernel_lacks(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the Triton kernel cannot run a call on a device, or None if it can.

    ``"cuda"`` without an index is the current device.
    """
    if isinstance(device, str):
        device = torch.device(device)
    if device.type not in DEVICES:
        return f"needs a CUDA device and Triton, not {device.type}"
    if device.type == "cuda" and not is_ampere_or_newer(device.index):
        return "needs compute capability 8.0 or newer"
    if dtype not in _DTYPES:
        return f"needs float16, bfloat16 or float32, not {dtype}"
    if not 16 <= head_dim <= 256:
        return f"needs a head_dim from 16 to 256, not {head_dim}"
    return None


def is_ampere_or_newer(index: int | None = None) -> bool:
    """Whether a CUDA device has compute capability 8.0 or newer: by default the current one."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(index) >= (8, 0)


@define_op("tokenpack::varlen_attention")
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
    """out, and ``(heads, total_q)`` logsumexp. A limit of -1 and a softcap of 0 mean none."""
    spec = _spec(scale, left, right, softcap, dropout_p, seed)
    return _forward_in_torch(
        AttentionInputs(q, k, v, cu_seqlens_q, cu_seqlens_k, table, seed), spec
    )


@define_op("tokenpack::varlen_attention_backward")
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
    """dq, dk, dv, and the table's gradient, which is empty unless ``needs_table``."""
    inputs = AttentionInputs(q, k, v, cu_seqlens_q, cu_seqlens_k, table, seed)
    spec = _spec(scale, left, right, softcap, dropout_p, seed)
    return _backward_in_torch(dout, inputs, spec, needs_table)


def _forward_in_torch(inputs: AttentionInputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    plan, keep_mask = _one_part_per_sequence(inputs, spec)
    taken = take_slots(inputs.q, inputs.k, inputs.v, plan)
    out, lse = explicit_attention(taken, inputs.table, plan, spec, keep_mask, {}, True)
    assert lse is not None
    return out, lse.t().contiguous()


def _backward_in_torch(
    dout: Tensor, inputs: AttentionInputs, spec: AttentionSpec, needs_table: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan, keep_mask = _one_part_per_sequence(inputs, spec)
    q, k, v = inputs.q, inputs.k, inputs.v
    dq, dk, dv, dtable = explicit_attention_backward(
        dout, take_slots(q, k, v, plan), inputs.table, plan, spec, keep_mask, {}
    )
    if dtable is None or not needs_table:
        dtable = dq.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32))
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), dtable


def _one_part_per_sequence(
    inputs: AttentionInputs, spec: AttentionSpec
) -> tuple[SlotPlan, KeepMask]:
    """Each sequence as a part, and a dropout mask that depends on the sequence's number.

    The kernels' masks depend on the number in the same way, but their random bits differ.
    """
    groups, seeds = [], []
    sides = (starts.tolist() for starts in (inputs.cu_seqlens_q, inputs.cu_seqlens_k))
    spans = zip(*(itertools.pairwise(side) for side in sides), strict=True)
    for s, ((first_q, end_q), (first_k, end_k)) in enumerate(spans):
        if first_q < end_q and first_k < end_k:
            span_q, span_k = (first_q, end_q), (first_k, end_k)
            groups.append(Group(end_q - first_q, end_k - first_k, span_q, span_k))
            seeds.append(s if inputs.seed is None else int(inputs.seed) + s)

    def keep_mask(i: int, weights: Tensor) -> Tensor:
        generator = torch.Generator(weights.device).manual_seed(seeds[i])
        uniform = torch.rand(weights.shape, generator=generator, device=weights.device)
        return uniform >= spec.dropout_p

    totals = inputs.q.shape[0], inputs.k.shape[0]
    heads = inputs.q.shape[1], inputs.k.shape[1]
    return SlotPlan(tuple(groups), totals, *heads, inputs.q.device), keep_mask


def _spec(
    scale: float, left: int, right: int, softcap: float, dropout_p: float, seed: Tensor | None
) -> AttentionSpec:
    if dropout_p > 0.0 and seed is None:
        raise ValueError(
            f"seed must be a tensor when dropout_p is {dropout_p}, got None; pass (1,) int64"
        )
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
    inputs = AttentionInputs(q, k, v, cu_seqlens_q, cu_seqlens_k, table, seed)
    spec = _spec(scale, left, right, softcap, dropout_p, seed)
    if kernel_lacks(q.device, q.dtype, q.shape[2]):
        return _forward_in_torch(inputs, spec)
    inputs, spec, _ = _with_positive_scale(inputs, spec)
    layer, sides = _as_layer(inputs, spec)
    saved = layer.forward(*sides, table, seed)
    return saved.out[0], saved.lse


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
    """The op ``varlen_attention_backward`` in two launches, and the sum of the table's partials."""
    inputs = AttentionInputs(q, k, v, cu_seqlens_q, cu_seqlens_k, table, seed)
    spec = _spec(scale, left, right, softcap, dropout_p, seed)
    if kernel_lacks(q.device, q.dtype, q.shape[2]):
        return _backward_in_torch(dout, inputs, spec, needs_table)
    inputs, spec, sign = _with_positive_scale(inputs, spec)
    layer, sides = _as_layer(inputs, spec)
    of_kernels = None if table is None else table_for_kernels(table, spec)
    saved = Saved(*sides, out[None], lse, of_kernels, seed)
    *gradients, dtable = layer.backward(dout[None], saved, needs_table)
    dq, dk, dv = (gradient[0].transpose(0, 1) for gradient in gradients)
    if sign != 1.0:
        dq = dq * sign
    return dq, dk, dv, lse.new_empty(0) if dtable is None else dtable


def _with_positive_scale(
    inputs: AttentionInputs, spec: AttentionSpec
) -> tuple[AttentionInputs, AttentionSpec, float]:
    """The same call with a positive scale, which the kernels need, and its factor of q."""
    if spec.scale > 0.0:
        return inputs, spec, 1.0
    sign = -1.0 if spec.scale < 0.0 else 0.0
    inputs = inputs._replace(q=inputs.q * sign)
    return inputs, spec._replace(scale=-spec.scale or 1.0), sign


def _as_layer(
    inputs: AttentionInputs, spec: AttentionSpec
) -> tuple[LayerKernels, tuple[Tensor, Tensor, Tensor]]:
    """The call as that of a layer: its kernels, and query, key and value in its shapes."""
    q, k, v = (
        (side if side.stride(2) == 1 else side.contiguous()).transpose(0, 1)[None]
        for side in inputs[:3]
    )
    offsets = inputs.cu_seqlens_q.contiguous(), inputs.cu_seqlens_k.contiguous()
    return LayerKernels(*offsets, spec), (q, k, v)


# ---------------------------------------------------------------------- torch.compile and autograd


def _new_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype)


def _new_gradients(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, needs_table: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    table_dtype = torch.promote_types(q.dtype, torch.float32)
    shape = (0,) if table is None or not needs_table else table.shape
    dq, dk, dv = (side.new_empty(side.shape) for side in (q, k, v))
    return dq, dk, dv, q.new_empty(shape, dtype=table_dtype)


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
    no_gradients = (None,) * (7 + len(ctx.options))
    if dout is None:
        return no_gradients
    tensors = ctx.saved_tensors  # read once: checkpointing allows one unpack
    table, needs_table = tensors[7], ctx.needs_input_grad[5]
    dq, dk, dv, dtable = torch.ops.tokenpack.varlen_attention_backward(
        dout, *tensors, *ctx.options, needs_table
    )
    dtable = dtable.to(table.dtype) if needs_table else None
    return dq, dk, dv, None, None, dtable, *no_gradients[6:]


_varlen_attention.register_autograd(_backward, setup_context=_save_for_backward)
