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

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._ops import define_op, run, runs_eagerly
from .loss import Options, check_options, cross_entropy, cross_entropy_backward_
from .reduction import TokenStats, plan_reduction


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
    head = (hidden, weight, bias, reduce.targets)
    options = (label_smoothing, z_loss, softcap or 0.0, scale, compute, num_valid)
    needs = _needs_gradient(hidden, weight, bias)
    if any(needs) and reduction not in ("none", "sequence"):
        is_eager = runs_eagerly(hidden, weight)
        compute_total = _EagerTotal.apply if is_eager else _linear_cross_entropy_and_gradients
        total, token_loss, correct, *_ = compute_total(reduce.weights, *head, *options, *needs)
        loss = reduce.divide(total)
    else:
        op = _linear_cross_entropy if any(needs) else partial(run, _linear_cross_entropy)
        token_loss, correct = op(*head, *options)
        loss = reduce(token_loss)
    if return_stats:
        return loss, TokenStats(token_loss.detach(), correct, reduce.targets >= 0)
    return loss


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
@define_op("tokenpack::linear_cross_entropy")
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
) -> tuple[Tensor, Tensor]:
    """The loss of each token, and whether its target has the largest logit."""
    options = Options(label_smoothing, z_loss, softcap, scale)
    token_loss, correct = _new_rows(hidden, compute)
    chunks = _chunks(
        hidden, weight, bias, targets, options, compute, num_valid, token_loss, correct
    )
    with _without_autocast(hidden):
        for _ in chunks:
            pass
    return token_loss, correct


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
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum of dloss[t] * token_loss[t], the token losses, ``correct``, and the sum's gradients.

    The gradients of weight and bias are float32 or float64. Gradients that are not needed are
    empty.
    """
    options = Options(label_smoothing, z_loss, softcap, scale)
    token_loss, correct = _new_rows(hidden, compute)
    dhidden, dweight, dbias = gradients = _new_gradients(
        hidden, weight, compute, (needs_hidden, needs_weight, needs_bias)
    )
    chunks = _chunks(
        hidden, weight, bias, targets, options, compute, num_valid, token_loss, correct
    )
    is_first = True
    with _without_autocast(hidden):
        for rows, inputs, matrix, logits, lse in chunks:
            run(cross_entropy_backward_, dloss[rows], logits, lse, targets[rows], *options)
            dlogits = logits  # overwritten in place
            if is_first and isinstance(rows, Tensor):
                dhidden.zero_()  # no chunk has the rows without a target
            if needs_bias:
                part = dlogits.sum(0, dtype=dbias.dtype)
                (dbias.copy_ if is_first else dbias.add_)(part)
            if needs_hidden:
                dhidden[rows] = (dlogits @ matrix).to(dhidden.dtype)
            if needs_weight:
                _add_product(dweight, dlogits, inputs, is_first)
            is_first = False
    if is_first:  # no token has a target
        for gradient in gradients:
            gradient.zero_()
    return (dloss * token_loss).sum(), token_loss, correct, *gradients


_linear_cross_entropy_and_gradients = define_op("tokenpack::linear_cross_entropy_and_gradients")(
    _total_and_gradients
)


# ----------------------------------------------------------------------------------------- chunks


def _chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: Options,
    compute: torch.dtype,
    num_valid: int | None,
    token_loss: Tensor,
    correct: Tensor,
) -> Iterator[tuple[slice | Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Fill ``token_loss`` and ``correct``, chunk by chunk of the tokens that have a target.

    Yields for each chunk: its rows, the ``(rows, hidden_size)`` inputs, the weight of the head, the
    ``(rows, num_classes)`` logits, which the caller may overwrite, and their ``(rows,)`` logsumexp.
    """
    matrix = weight.to(compute)
    offset = None if bias is None else bias.to(compute)
    memory = None  # reused by all chunks, so that only one chunk of logits exists
    chunks = _split(targets, num_valid, _rows_per_chunk(hidden, weight))
    if not chunks or isinstance(chunks[0], Tensor):  # some tokens are in no chunk
        token_loss.zero_()
        correct.zero_()
    for rows in chunks:
        inputs = hidden[rows].to(compute)
        if memory is None:  # no later chunk is larger than the first
            memory = inputs.new_empty(inputs.shape[0], weight.shape[0])
        logits = memory[: inputs.shape[0]]
        if offset is None:
            torch.mm(inputs, matrix.mT, out=logits)
        else:
            torch.addmm(offset, inputs, matrix.mT, out=logits)
        token_loss[rows], lse, correct[rows] = run(
            cross_entropy, logits, targets[rows], *options, False
        )
        yield rows, inputs, matrix, logits, lse


def _without_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Disable autocast: inputs are already in its dtype, and float32 sums must stay float32."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _split(targets: Tensor, num_valid: int | None, at_most: int) -> list[slice] | list[Tensor]:
    """Chunks of equal size of the tokens that have a target.

    If all tokens have one, the chunks are slices, which select rows without a copy.
    """
    total = targets.numel()
    is_valid = targets >= 0
    if num_valid is None:
        rows = is_valid.nonzero().squeeze(1)  # waits for the device
        num_valid = rows.numel()
    else:
        found = is_valid.sum()
        message = "num_valid must be the number of tokens with a target"
        if not found.is_cpu:
            torch._assert_async(found == num_valid, f"{message}, got {num_valid}")
        elif int(found) != num_valid:
            raise ValueError(f"{message}, got {num_valid} for {int(found)}")
        if num_valid < total:
            rows = torch.nonzero_static(is_valid, size=num_valid).squeeze(1)
    if num_valid == 0:
        return []
    num_chunks = -(-num_valid // at_most)
    size = -(-num_valid // num_chunks)
    if num_valid < total:
        return list(rows.split(size))
    return [slice(first, min(first + size, total)) for first in range(0, total, size)]


def smallest_chunk(device_type: str) -> int:
    """Minimum number of rows per chunk of `packed_linear_cross_entropy`."""
    return 256 if device_type == "cpu" else 1024


def _rows_per_chunk(hidden: Tensor, weight: Tensor) -> int:
    """Rows per chunk, so that its logits take about as much memory as the hidden states.

    The minimum keeps the products compute-bound. Adding a chunk to the gradient of the weight moves
    8 bytes per element and takes 2 operations per element and row. With fewer than
    4 * (operations per second) / (bytes per second) rows, it is memory-bound. That is about 30
    rows on a CPU core, and 1,000 on a GPU with 16-bit matrix units.
    """
    return max(smallest_chunk(hidden.device.type), hidden.numel() // weight.shape[0])


_SLICE = 4096  # classes of a 16-bit gradient that are cast to float32 at a time


def _add_product(total: Tensor, dlogits: Tensor, inputs: Tensor, is_first: bool) -> None:
    """``total += dlogits.T @ inputs``, without rounding the product to 16 bits.

    If ``is_first``, the total has no values yet. With a beta of 0, PyTorch does not read it.
    """
    beta = 0 if is_first else 1
    if dlogits.dtype == total.dtype:
        total.addmm_(dlogits.mT, inputs, beta=beta)
        return
    mm_casts = dlogits.is_cuda and torch.version.cuda is not None  # torch.mm(out_dtype=) works
    if not mm_casts:
        inputs = inputs.to(total.dtype)
    for part, columns in zip(total.split(_SLICE), dlogits.split(_SLICE, dim=1), strict=True):
        if mm_casts:
            product = torch.mm(columns.mT, inputs, out_dtype=total.dtype)
            (part.copy_ if is_first else part.add_)(product)
        else:
            part.addmm_(columns.mT.to(total.dtype), inputs, beta=beta)


def _new_rows(hidden: Tensor, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    token_loss = hidden.new_empty(
        hidden.shape[0], dtype=torch.promote_types(compute, torch.float32)
    )
    return token_loss, torch.empty_like(token_loss, dtype=torch.bool)


def _new_gradients(
    hidden: Tensor, weight: Tensor, compute: torch.dtype, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(compute, torch.float32)
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    dtypes = hidden.dtype, wide, wide
    dhidden, dweight, dbias = (
        hidden.new_empty(shape if needed else (0,), dtype=dtype)
        for shape, dtype, needed in zip(shapes, dtypes, needs, strict=True)
    )
    return dhidden, dweight, dbias


# --------------------------------------------------------------- fakes for torch.compile, autograd


@_linear_cross_entropy.register_fake
def _(hidden, weight, bias, targets, smoothing, z_loss, softcap, scale, compute, num_valid):
    return _new_rows(hidden, compute)


@_linear_cross_entropy_and_gradients.register_fake
def _(
    dloss, hidden, weight, bias, targets, smoothing, z_loss, softcap, scale, compute, valid, *needs
):
    token_loss, correct = _new_rows(hidden, compute)
    gradients = _new_gradients(hidden, weight, compute, needs)
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
    # The mean over zero targets has an infinite derivative, and infinity * 0 is NaN.
    dtotal = torch.where((tensors[4] >= 0).any(), dtotal, 0.0)
    needs = ctx.options[-3:]
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
