"""The Triton kernels of a layer as one node of autograd.

The op ``tokenpack::varlen_attention`` is for graphs of torch.compile. Its dispatch costs the host
more than Triton's launch does, and autograd records the views around it. A layer that is not
traced calls the op's launchers itself. The kernels and their arguments are the same.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention.op import varlen_attention_backward_triton, varlen_attention_triton
from .backends import Options


def can_be_one_node(query: Tensor) -> bool:
    """Whether the tensors have data that a kernel can read. Fake tensors do not."""
    return type(query) is Tensor and not torch.compiler.is_compiling()


def attend_on_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: tuple[Tensor, Tensor],
    relative_bias: Tensor | None,
    options: Options,
) -> Tensor:
    """`varlen_attention` of a layer, which has checked its arguments.

    Args:
        query, key, value: ``(1, heads, total, head_dim)`` each.
        offsets: ``cu_seqlens_q`` and ``cu_seqlens_k``.
        relative_bias: ``(heads, 2 * reach + 1)`` or None.
        options: those of `varlen_attention`.

    Returns:
        ``(1, total_q, heads, head_dim)``.
    """
    left, right = options["window"] or (-1, -1)
    dropout_p, softcap = options["dropout_p"], options["softcap"] or 0.0
    limits = left, 0 if options["causal"] else right
    seed = None
    if dropout_p > 0.0:
        seed = torch.randint(2**62, (1,), device=query.device)
    numbers = (options["scale"], *limits, softcap, dropout_p)
    out: Tensor = _OnKernel.apply(query, key, value, relative_bias, *offsets, seed, numbers)
    return out


class _OnKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, table, cu_seqlens_q, cu_seqlens_k, seed, numbers):
        q, k, v = (side.squeeze(0).transpose(0, 1) for side in (query, key, value))
        rest = cu_seqlens_q, cu_seqlens_k, table, seed
        with _device_of(q):
            out, lse = varlen_attention_triton(q, k, v, *rest, *numbers)
        ctx.numbers = numbers
        ctx.save_for_backward(q, k, v, out, lse, *rest)
        return out[None]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        tensors = ctx.saved_tensors  # read once: checkpointing allows one unpack
        table, needs_table = tensors[7], ctx.needs_input_grad[3]
        with _device_of(dout):
            *gradients, dtable = varlen_attention_backward_triton(
                dout.squeeze(0), *tensors, *ctx.numbers, needs_table
            )
        sides = [side.transpose(0, 1)[None] for side in gradients]
        return *sides, dtable.to(table.dtype) if needs_table else None, None, None, None, None


def _device_of(tensor: Tensor) -> Any:
    """Triton launches on the current device, which may differ from the tensors' device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
