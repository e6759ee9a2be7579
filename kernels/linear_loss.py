"""LM head and cross entropy in one step, without the logits of all tokens at once.

    loss = sum over valid tokens of (logsumexp(z) - z[label]) / number of valid tokens
    z    = softcap(scale * (hidden @ weight.T + bias))

The head's gradients are linear in the loss's, so they are computed chunk by chunk in the forward,
while a chunk's logits are there, and only multiplied in the backward. Tokens without a label never
reach the matrix product. After Liger Kernel's fused linear cross entropy (Hsu et al., 2024), which
showed that this works; chunk sizes so that a chunk's logits take what the hidden states take.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import cast_for_autocast

_SMALLEST_CHUNK = 256  # rows; below this the matrix products of a chunk run far from their speed


# Chunk sizes follow the data: a graph of one batch would not serve the next.
@torch.compiler.disable
def packed_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    num_items: Tensor | float | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Cross entropy of a linear head over a token stream.

    Args:
        hidden: ``(total_tokens, hidden_size)``, floating point.
        weight: ``(num_classes, hidden_size)``, the head's.
        bias: ``(num_classes,)`` or None.
        labels: ``(total_tokens,)`` integers; the class that each token itself should give (shift
            before the call), or ``ignore_index``.
        num_items: what the summed loss is divided by; by default the number of valid tokens.
        softcap: ``softcap * tanh(logits / softcap)`` before the softmax.
        scale: factor of the logits.

    Returns:
        Scalar, float32 (float64 for float64 inputs); 0 / 0 = NaN where no token has a label and
        ``num_items`` is not given, with zero gradients, as in PyTorch. Differentiable in hidden,
        weight and bias.

    Raises:
        TypeError: if hidden, weight and bias do not share one floating-point dtype.
        ValueError: if a shape does not fit, naming the argument.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden must be (total_tokens, hidden_size) and weight (num_classes, hidden_size), "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    if labels.shape != hidden.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels must be {tuple(hidden.shape[:1])} integers, "
            f"got {tuple(labels.shape)} {labels.dtype}"
        )
    hidden, weight = cast_for_autocast(hidden, weight)
    if bias is not None:
        (bias,) = cast_for_autocast(bias)
    dtypes = [tensor.dtype for tensor in (hidden, weight, bias) if tensor is not None]
    if len(set(dtypes)) > 1 or not hidden.is_floating_point():
        raise TypeError(
            f"hidden, weight and bias must share one floating-point dtype, got {dtypes}"
        )
    # Without gradients a Function's needs_input_grad still tells what could need them.
    total, valid = _LinearCrossEntropy.apply(
        hidden, weight, bias, labels, ignore_index, softcap, scale, torch.is_grad_enabled()
    )
    return total / (valid if num_items is None else num_items)


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed loss and the number of valid tokens."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, ignore_index, softcap, scale, learning):
        needs = [learning and needed for needed in ctx.needs_input_grad[:3]]
        needs_hidden, needs_weight, needs_bias = needs
        wide = torch.promote_types(hidden.dtype, torch.float32)
        valid_rows = (labels != ignore_index).nonzero().squeeze(1)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        dhidden = torch.zeros_like(hidden) if needs_hidden else None
        dweight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        dbias = torch.zeros_like(bias, dtype=wide) if needs_bias else None
        for rows in valid_rows.split(_rows_per_chunk(hidden, weight)):
            inputs = hidden.index_select(0, rows)
            target = labels.index_select(0, rows).long()[:, None]
            logits = torch.nn.functional.linear(inputs, weight, bias).to(wide)  # [rows, classes]
            if scale != 1.0:
                logits.mul_(scale)
            slope = None
            if softcap is not None:
                bounded = logits.div_(softcap).tanh_()
                slope = 1.0 - bounded.square() if any(needs) else None
                logits = bounded.mul_(softcap)
            row_sum = logits.logsumexp(dim=1, keepdim=True)
            total += (row_sum - logits.gather(1, target)).sum()
            if not any(needs):
                continue
            dlogits = logits.sub_(row_sum).exp_()  # the softmax; in place, the logits are spent
            dlogits.scatter_add_(1, target, dlogits.new_full(target.shape, -1.0))
            if slope is not None:
                dlogits.mul_(slope)
            if scale != 1.0:
                dlogits.mul_(scale)
            if dbias is not None:
                dbias += dlogits.sum(0)
            dlogits = dlogits.to(hidden.dtype)
            if dhidden is not None:
                dhidden.index_copy_(0, rows, dlogits @ weight)
            if dweight is not None:
                if dlogits.dtype == wide:
                    dweight.addmm_(dlogits.mT, inputs)
                else:
                    dweight += dlogits.mT @ inputs
        ctx.save_for_backward(dhidden, dweight, dbias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.num_valid = valid_rows.numel()
        valid = torch.full_like(total, ctx.num_valid)
        ctx.mark_non_differentiable(valid)
        return total, valid

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dtotal, _):
        if ctx.num_valid == 0:
            dtotal = torch.zeros_like(dtotal)  # 1 / 0 items, and nothing that it could scale
        grads = [
            None if grad is None else (grad * dtotal).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *grads, None, None, None, None, None


def _rows_per_chunk(hidden: Tensor, weight: Tensor) -> int:
    """Rows whose logits take about the memory of the hidden states."""
    return max(_SMALLEST_CHUNK, hidden.numel() // weight.shape[0])
