"""The Triton kernels of a layer as one node of autograd.

The op ``tokenpack::varlen_attention`` is for graphs of torch.compile. Its dispatch costs the host
more than Triton's launch does, and autograd records the views around it. A layer that is not
traced launches the same kernels through `LayerKernels`, which prepares them once for all layers of
a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels._derivatives import first_order
from ..kernels._ops import on_device_of
from ..kernels.attention import AttentionSpec, LayerKernels, Saved
from .backends import Options


def layer_kernels(offsets: tuple[Tensor, Tensor], options: Options) -> LayerKernels:
    """The kernels of all layers of one batch that have these options.

    Args:
        offsets: ``cu_seqlens_q`` and ``cu_seqlens_k``.
        options: those of `varlen_attention`. The scale must be positive: the op mends others.
    """
    spec = AttentionSpec(
        options["causal"],
        options["scale"],
        options["window"],
        options["softcap"],
        options["dropout_p"],
    )
    return LayerKernels(*offsets, spec)


def attend_on_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    relative_bias: Tensor | None,
    dropout_p: float,
    kernels: LayerKernels,
) -> Tensor:
    """`varlen_attention` of a layer, which has checked its arguments.

    Args:
        query, key, value: ``(1, heads, total, head_dim)`` each. They must run eagerly, see
            `runs_eagerly`.
        relative_bias: ``(heads, 2 * reach + 1)`` or None.
        dropout_p: probability that a weight is dropped, that of ``kernels``.
        kernels: those of the batch and of this kind of layer.

    Returns:
        ``(1, total_q, heads, head_dim)``.
    """
    seed = None
    if dropout_p > 0.0:
        seed = torch.randint(2**62, (1,), device=query.device)
    out: Tensor = _apply(query, key, value, relative_bias, seed, kernels)
    return out


class _OnKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, table, seed, kernels):
        with on_device_of(query):
            saved = kernels.forward(query, key, value, table, seed)
        ctx.kernels = kernels
        ctx.table_dtype = None if table is None else table.dtype
        ctx.save_for_backward(*saved)
        return saved.out

    @staticmethod
    @first_order
    def backward(ctx, dout):
        # Saved tensors are read once: checkpointing allows one unpack.
        saved, needs_table = Saved(*ctx.saved_tensors), ctx.needs_input_grad[3]
        with on_device_of(dout):
            dq, dk, dv, dtable = ctx.kernels.backward(dout, saved, needs_table)
        if dtable is not None:
            dtable = dtable.to(ctx.table_dtype)
        return dq, dk, dv, dtable, None, None


# `torch.autograd.Function.apply` looks for transforms of functorch first. Here are none.
_apply = super(torch.autograd.Function, _OnKernel).apply
