"""LM head and cross entropy in one op, which never holds the logits of all tokens at once.

    logits = hidden @ weight.T + bias, then the losses and reductions of `loss` and `reduction`

The tokens with a target pass through the head in chunks of at least a few hundred. The gradient of
a chunk's logits overwrites them before the next chunk is computed. All gradients are linear in the
gradient of the loss. If the loss is a scalar, the forward computes the gradients while it has the
logits, and the backward only multiplies them by a number (after Liger Kernel, Hsu et al., 2024). If
each token or sequence has its own loss, the backward computes the logits again.

One op returns the losses, the other the gradients too. Both iterate over the chunks of one
generator. PyTorch computes the matrix products, and the kernels of `loss` the softmax.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._ops import define_op, run, runs_eagerly
from .head_chunks import (
    TokenResults,
    add_product,
    check_count,
    logits_by_chunk,
    new_gradients,
    new_rows,
    of_rows,
    without_autocast,
)
from .loss import Options, check_options, cross_entropy_backward_
from .reduction import Reduction, TokenStats, plan_reduction


def packed_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    shift: bool = False,
    reduction: str = "mean",
    sequence_weights: Tensor | None = None,
    num_items: Tensor | float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    num_valid: int | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Cross entropy of a linear head over a token stream, reduced over tokens or sequences.

    In addition to the inputs and their gradients, this needs memory for the logits of one chunk.
    For 16-bit weights, the gradient of the weight is summed in float32, which takes twice its size.
    Tokens without a target do not pass through the head, and gradients that are not required are
    not computed. Under autocast, the products have autocast's dtype. Each gradient has the dtype of
    its tensor and is rounded once.

    Args:
        hidden: ``(total_tokens, hidden_size)``, floating point.
        weight: ``(num_classes, hidden_size)``, the weight of the head.
        bias: ``(num_classes,)`` or None.
        scale: factor of the logits, applied before the softcap.
        num_valid: number of tokens that have a target. Pass it if you know it, to skip the wait for
            a GPU that counts them. It is checked: on a GPU by a device-side assertion.
        labels, cu_seqlens, shift, reduction, sequence_weights, num_items, ignore_index, \
            label_smoothing, z_loss, softcap, return_stats: as in `packed_cross_entropy`.

    Returns:
        As `packed_cross_entropy`: the loss in float32 (float64 for float64 inputs). With
        ``return_stats``, a tuple of the loss and the stats. If no token has a target and
        ``num_items`` is None, a mean is 0 / 0 = NaN with zero gradients, as in PyTorch.
        Differentiable once in hidden, weight and bias.

    Raises:
        TypeError: hidden, weight and bias do not have one floating-point dtype, outside autocast.
        ValueError: a shape, a device or a number is invalid. The message names the argument.
            Invalid values are errors on a CPU and device-side assertions on a GPU, as in
            `packed_cross_entropy`.
    """
    check_options(label_smoothing, softcap)
    compute = _check_head(hidden, weight, bias)
    if num_valid is not None and not 0 <= num_valid <= hidden.shape[0]:
        raise ValueError(f"num_valid must be from 0 to {hidden.shape[0]}, got {num_valid}")
    reduce = plan_reduction(
        labels,
        cu_seqlens,
        total_tokens=hidden.shape[0],
        num_classes=weight.shape[0],
        shift=shift,
        reduction=reduction,
        sequence_weights=sequence_weights,
        num_items=num_items,
        ignore_index=ignore_index,
        like=hidden,
    )
    options = (label_smoothing, z_loss, softcap or 0.0, scale, compute, num_valid, False)
    loss, token_loss, correct = _loss(hidden, weight, bias, reduce, options)
    if return_stats:
        return loss, TokenStats(token_loss.detach(), correct, reduce.targets >= 0)
    return loss


def mean_of_counted(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    num_valid: int,
    *,
    num_items: Tensor | float | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """`packed_linear_cross_entropy` for labels that the caller has counted.

    ``num_valid`` must be how many of them are not -100. It is not checked.
    """
    compute = _check_head(hidden, weight, bias)
    if num_items is None and not torch.compiler.is_compiling():
        num_items = num_valid  # the sum of the weights, without adding them
    reduce = plan_reduction(
        labels,
        None,
        total_tokens=hidden.shape[0],
        num_classes=weight.shape[0],
        like=hidden,
        num_items=num_items,
    )
    options = (0.0, 0.0, softcap or 0.0, scale, compute, num_valid, True)
    return _loss(hidden, weight, bias, reduce, options)[0]


def _loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reduce: Reduction,
    options: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """The reduced loss, the loss of each token, and ``correct``. Options are those of the ops."""
    head = (hidden, weight, bias, reduce.targets)
    needs = _needs_gradient(hidden, weight, bias)
    if any(needs) and reduce.kind not in ("none", "sequence"):
        is_eager = runs_eagerly(hidden, weight)
        compute_total = _apply_eagerly if is_eager else _linear_cross_entropy_and_gradients
        total, token_loss, correct, *_ = compute_total(reduce.weights, *head, *options, *needs)
        return reduce.divide(total), token_loss, correct
    op = _linear_cross_entropy if any(needs) else partial(run, _linear_cross_entropy)
    token_loss, correct = op(*head, *options)
    return reduce(token_loss), token_loss, correct


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """Check shapes, dtypes and devices. Returns the dtype of the products."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden must be (total_tokens, hidden_size) and weight (num_classes, hidden_size), "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    tensors = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in tensors.items():
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device}, got {tensor.device}")
    dtypes = [tensor.dtype for tensor in tensors.values()]
    kind = hidden.device.type
    casts = torch.is_autocast_enabled(kind) and torch.float64 not in dtypes
    if not all(tensor.is_floating_point() for tensor in tensors.values()) or (
        len(set(dtypes)) > 1 and not casts
    ):
        raise TypeError(f"hidden, weight and bias must have one floating-point dtype, got {dtypes}")
    return torch.get_autocast_dtype(kind) if casts else hidden.dtype


def _needs_gradient(*tensors: Tensor | None) -> tuple[bool, ...]:
    enabled = torch.is_grad_enabled()
    return tuple(enabled and tensor is not None and tensor.requires_grad for tensor in tensors)


# -------------------------------------------------------------------------------------------- ops


@define_op("tokenpack::linear_cross_entropy", on_host=True)
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    scale: float,
    compute: torch.dtype,
    num_valid: int | None,
    is_counted: bool,
) -> tuple[Tensor, Tensor]:
    """The loss of each token, and whether its target has the largest logit."""
    if not is_counted:
        check_count(targets, num_valid)
    options, results = Options(label_smoothing, z_loss, softcap, scale), TokenResults()
    chunks = logits_by_chunk(hidden, weight, bias, targets, options, compute, num_valid, results)
    with without_autocast(hidden):
        for _ in chunks:
            pass
    return results.token_loss, results.correct


def _total_and_gradients(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    scale: float,
    compute: torch.dtype,
    num_valid: int | None,
    is_counted: bool,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum of dloss[t] * token_loss[t], the token losses, ``correct``, and the sum's gradients.

    The gradients of weight and bias are float32 or float64. Gradients that are not needed are
    empty.
    """
    if not is_counted:
        check_count(targets, num_valid)
    options, results = Options(label_smoothing, z_loss, softcap, scale), TokenResults()
    dhidden, dweight, dbias = new_gradients(
        hidden, weight, compute, (needs_hidden, needs_weight, needs_bias)
    )
    chunks = logits_by_chunk(hidden, weight, bias, targets, options, compute, num_valid, results)
    is_first = True
    with without_autocast(hidden):
        for rows, inputs, matrix, logits, lse in chunks:
            of_chunk = of_rows(dloss, rows), logits, lse, of_rows(targets, rows)
            run(cross_entropy_backward_, *of_chunk, *options)
            dlogits = logits  # overwritten in place
            if is_first and isinstance(rows, Tensor):
                dhidden.zero_()  # no chunk has the rows without a target
            if needs_bias:
                part = dlogits.sum(0, dtype=dbias.dtype)
                (dbias.copy_ if is_first else dbias.add_)(part)
            if needs_hidden and rows is None and dlogits.dtype == dhidden.dtype:
                torch.mm(dlogits, matrix, out=dhidden)
            elif needs_hidden:
                dhidden[slice(None) if rows is None else rows] = (dlogits @ matrix).to(
                    dhidden.dtype
                )
            if needs_weight:
                add_product(dweight, dlogits, inputs, is_first)
            is_first = False
    gradients = dhidden, dweight, dbias
    if is_first:  # no token has a target
        for gradient in gradients:
            gradient.zero_()
    total = (dloss * results.token_loss).sum()
    return total, results.token_loss, results.correct, *gradients


_linear_cross_entropy_and_gradients = define_op(
    "tokenpack::linear_cross_entropy_and_gradients", on_host=True
)(_total_and_gradients)


# --------------------------------------------------------------- fakes for torch.compile, autograd


@_linear_cross_entropy.register_fake
def _(hidden, weight, bias, targets, smoothing, z_loss, softcap, scale, compute, *counts):
    return new_rows(hidden, compute)


@_linear_cross_entropy_and_gradients.register_fake
def _(dloss, hidden, weight, bias, targets, smoothing, z_loss, softcap, scale, compute, *others):
    token_loss, correct = new_rows(hidden, compute)
    gradients = new_gradients(hidden, weight, compute, others[-3:])
    return token_loss.new_empty(()), token_loss, correct, *gradients


def _save_for_losses(ctx, inputs, output) -> None:
    hidden, weight, bias, targets, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, bias, targets)
    ctx.mark_non_differentiable(output[1])


def _backward_of_losses(ctx, dtoken_loss: Tensor, _dcorrect):
    _require_first_derivative()
    hidden, weight, bias, targets = ctx.saved_tensors
    needs = tuple(ctx.needs_input_grad[:3])
    _, _, _, *gradients = _linear_cross_entropy_and_gradients(
        dtoken_loss, hidden, weight, bias, targets, *ctx.options, *needs
    )
    gradients = [
        gradient.to(of.dtype) if needed else None
        for gradient, of, needed in zip(gradients, (hidden, weight, bias), needs, strict=True)
    ]
    return *gradients, *(None for _ in range(1 + len(ctx.options)))


def _save_for_total(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]
    _, token_loss, correct, *ctx.gradients = output
    ctx.mark_non_differentiable(token_loss, correct, *ctx.gradients)
    ctx.set_materialize_grads(False)  # do not allocate zeros as large as the head


def _backward_of_total(ctx, dtotal: Tensor | None, *_):
    _require_first_derivative()
    no_gradients = (None,) * (5 + len(ctx.options))
    if dtotal is None:
        return no_gradients
    tensors = ctx.saved_tensors
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:  # an earlier backward has returned them
        _, _, _, *gradients = _linear_cross_entropy_and_gradients(*tensors, *ctx.options)
    num_valid, _, *needs = ctx.options[-5:]
    if type(num_valid) is not int or num_valid == 0:
        # The mean over zero targets has an infinite derivative, and infinity * 0 is NaN.
        dtotal = torch.where((tensors[4] >= 0).any(), dtotal, 0.0)
    scaled = [
        _times(gradient, dtotal).to(of.dtype) if needed else None
        for gradient, of, needed in zip(gradients, tensors[1:4], needs, strict=True)
    ]
    return None, *scaled, *no_gradients[4:]


def _times(gradient: Tensor, factor: Tensor) -> Tensor:
    # In place, to avoid a second tensor as large as the head. torch.compile passes a subclass of
    # Tensor, and does not allow the backward to modify an output of the forward.
    return gradient.mul_(factor) if type(gradient) is Tensor else gradient * factor


def _require_first_derivative() -> None:
    # once_differentiable may drop second derivatives silently.
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph must be False, got True; "
            "packed_linear_cross_entropy is differentiable once"
        )


_linear_cross_entropy.register_autograd(_backward_of_losses, setup_context=_save_for_losses)
_linear_cross_entropy_and_gradients.register_autograd(
    _backward_of_total, setup_context=_save_for_total
)


class _EagerTotal(torch.autograd.Function):
    """`linear_cross_entropy_and_gradients` without the dispatch of an op."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _total_and_gradients(*inputs)
        _save_for_total(ctx, inputs, output)  # setup_context would inspect the signature each time
        return output

    backward = staticmethod(_backward_of_total)


# `torch.autograd.Function.apply` looks for transforms of functorch first. Here are none.
_apply_eagerly = super(torch.autograd.Function, _EagerTotal).apply
