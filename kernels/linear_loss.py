"""LM head and cross entropy in one step, without the logits of all tokens at once.

    logits = hidden @ weight.T + bias, then the losses and reductions of `loss` and `reduction`

Tokens with a target go through the head some hundred at a time, and a chunk's logits give way to
their own gradient before the next chunk comes. The head's gradients are linear in that of the
loss: where one number weighs all tokens they are computed in the forward, while the logits are
there, and only multiplied in the backward (after Liger Kernel, Hsu et al., 2024). Where each token
or sequence has a loss of its own, the backward computes the logits again.

Both run the chunks of one function, so an op is either its losses, or its losses and gradients.
Matrix products are PyTorch's own; the softmax is in the kernels of `loss`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .loss import Options, check_options
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

    Beyond its inputs and their gradients it takes memory for one chunk's logits, and for 16-bit
    weights twice that of their gradient, which is summed in float32. Tokens without a target are
    not multiplied, and no gradient is computed for what needs none. Under autocast the products
    are in its dtype and gradients in that of what they belong to, rounded once.

    Args:
        hidden: ``(total_tokens, hidden_size)``, floating point.
        weight: ``(num_classes, hidden_size)``, the head's.
        bias: ``(num_classes,)`` or None.
        scale: factor of the logits, before the softcap.
        num_valid: how many tokens have a target, if known. On a GPU it spares the one wait for the
            device, which is to count them; an assertion on the device sees that it is right.
        labels, cu_seqlens, shift, reduction, sequence_weights, num_items, ignore_index, \
            label_smoothing, z_loss, softcap, return_stats: as in `packed_cross_entropy`.

    Returns:
        As `packed_cross_entropy`: the loss in float32 (float64 for float64 inputs), and with
        ``return_stats`` the losses of tokens. 0 / 0 = NaN where no token has a target and
        ``num_items`` is not given, with zero gradients, as in PyTorch. Differentiable once in
        hidden, weight and bias.

    Raises:
        TypeError: outside autocast, if hidden, weight and bias do not share one floating-point
            dtype.
        ValueError: if a shape, a device or a number does not fit, naming the argument. What only
            values tell is raised on a CPU and asserted on a GPU, as in `packed_cross_entropy`.
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
        total, token_loss, correct, *_ = torch.ops.tokenpack.linear_cross_entropy_and_gradients(
            reduce.weights, *head, *options, *needs
        )
        loss = reduce.divide(total)
    else:
        token_loss, correct = torch.ops.tokenpack.linear_cross_entropy(*head, *options)
        loss = reduce(token_loss)
    if return_stats:
        return loss, TokenStats(token_loss.detach(), correct, reduce.targets >= 0)
    return loss


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """Check shapes, dtypes and devices; the dtype of the products."""
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
    device_type = hidden.device.type
    casts = torch.is_autocast_enabled(device_type) and torch.float64 not in dtypes
    if not all(tensor.is_floating_point() for tensor in tensors.values()) or (
        len(set(dtypes)) > 1 and not casts
    ):
        raise TypeError(
            f"hidden, weight and bias must share one floating-point dtype, got {dtypes}"
        )
    return torch.get_autocast_dtype(device_type) if casts else hidden.dtype


def _needs_gradient(*tensors: Tensor | None) -> tuple[bool, ...]:
    learning = torch.is_grad_enabled()
    return tuple(learning and tensor is not None and tensor.requires_grad for tensor in tensors)


# -------------------------------------------------------------------------------------------- ops


@torch.library.custom_op("tokenpack::linear_cross_entropy", mutates_args=())
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
    """Loss of each token, and whether its target was the largest."""
    options = Options(label_smoothing, z_loss, softcap, scale)
    token_loss, correct = _new_rows(hidden, compute)
    chunks = _chunks(
        hidden, weight, bias, targets, options, compute, num_valid, token_loss, correct
    )
    with _without_autocast(hidden):
        for _ in chunks:
            pass
    return token_loss, correct


@torch.library.custom_op("tokenpack::linear_cross_entropy_and_gradients", mutates_args=())
def _linear_cross_entropy_and_gradients(
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
    """sum_t dloss[t] * token_loss[t], the tokens' losses, and that sum's gradients.

    Gradients of weight and bias are in float32 (float64); those that nobody needs are empty.
    """
    options = Options(label_smoothing, z_loss, softcap, scale)
    token_loss, correct = _new_rows(hidden, compute)
    dhidden, dweight, dbias = gradients = _new_gradients(
        hidden, weight, compute, (needs_hidden, needs_weight, needs_bias)
    )
    for gradient in gradients:
        gradient.zero_()
    chunks = _chunks(
        hidden, weight, bias, targets, options, compute, num_valid, token_loss, correct
    )
    with _without_autocast(hidden):
        for rows, inputs, matrix, logits, lse in chunks:
            torch.ops.tokenpack.cross_entropy_backward_(
                dloss[rows], logits, lse, targets[rows], *options
            )
            dlogits = logits  # they are now
            if needs_bias:
                dbias += dlogits.sum(0, dtype=dbias.dtype)
            if needs_hidden:
                dhidden[rows] = (dlogits @ matrix).to(dhidden.dtype)
            if needs_weight:
                _add_product(dweight, dlogits, inputs)
    return (dloss * token_loss).sum(), token_loss, correct, *gradients


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
    """Fill in the losses, chunk by chunk of the tokens that have a target.

    Yields each chunk's rows, its ``(rows, hidden_size)`` inputs, the head's weight,
    ``(rows, num_classes)`` logits, which may be overwritten, and ``(rows,)`` log of the sum of
    exponentials.
    """
    token_loss.zero_()
    correct.zero_()
    matrix = weight.to(compute)
    offset = None if bias is None else bias.to(compute)
    memory = None  # of all chunks: while one is in use, there is none for the next
    for rows in _split(targets, num_valid, _rows_per_chunk(hidden, weight)):
        inputs = hidden[rows].to(compute)
        if memory is None:  # the first chunk is the longest
            memory = inputs.new_empty(inputs.shape[0], weight.shape[0])
        logits = memory[: inputs.shape[0]]
        if offset is None:
            torch.mm(inputs, matrix.mT, out=logits)
        else:
            torch.addmm(offset, inputs, matrix.mT, out=logits)
        token_loss[rows], lse, correct[rows] = torch.ops.tokenpack.cross_entropy(
            logits, targets[rows], *options, False
        )
        yield rows, inputs, matrix, logits, lse


def _without_autocast(like: Tensor) -> torch.autocast:
    """It had its say: the products are in ``compute``, and what is in float32 stays there."""
    return torch.autocast(like.device.type, enabled=False)


def _split(targets: Tensor, num_valid: int | None, at_most: int) -> list[slice] | list[Tensor]:
    """The tokens with a target in even chunks; as slices, which copy nothing, if all have one."""
    total = targets.numel()
    is_valid = targets >= 0
    if num_valid is None:
        rows = is_valid.nonzero().squeeze(1)  # waits for the device, to know how many
        num_valid = rows.numel()
    else:
        right = is_valid.sum() == num_valid
        message = f"num_valid must be the number of tokens with a target, got {num_valid}"
        if right.device.type == "cpu" and not right:
            raise ValueError(f"{message} for {int(is_valid.sum())}")
        torch._assert_async(right, message)
        rows = torch.nonzero_static(is_valid, size=num_valid).squeeze(1)
    if num_valid == 0:
        return []
    num_chunks = -(-num_valid // at_most)
    size = -(-num_valid // num_chunks)
    if num_valid < total:
        return list(rows.split(size))
    return [slice(first, min(first + size, total)) for first in range(0, total, size)]


def smallest_chunk(device_type: str) -> int:
    """Rows that `packed_linear_cross_entropy` takes through the head at once, at least."""
    return 256 if device_type == "cpu" else 1024


def _rows_per_chunk(hidden: Tensor, weight: Tensor) -> int:
    """Rows whose logits take about the memory of the hidden states, but enough for the products.

    Adding a chunk to the weight's gradient moves 8 bytes an element for 2 operations a row: below
    4 * operations per second / bytes per second rows, memory is what it waits for. That is some
    30 rows on a CPU core, and 1,000 on a GPU with 16-bit matrix units.
    """
    return max(smallest_chunk(hidden.device.type), hidden.numel() // weight.shape[0])


_SLICE = 4096  # classes of a 16-bit gradient that go through float32 at a time, at least


def _add_product(total: Tensor, dlogits: Tensor, inputs: Tensor) -> None:
    """``total += dlogits.T @ inputs``, without rounding the product to 16 bits first."""
    if dlogits.dtype == total.dtype:
        total.addmm_(dlogits.mT, inputs)
        return
    native = dlogits.is_cuda and torch.version.cuda is not None
    if not native:
        inputs = inputs.to(total.dtype)
    for part, columns in zip(total.split(_SLICE), dlogits.split(_SLICE, dim=1), strict=True):
        if native:
            part += torch.mm(columns.mT, inputs, out_dtype=total.dtype)
        else:
            part.addmm_(columns.mT.to(total.dtype), inputs)


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


# ------------------------------------------------------------- what torch.compile and autograd need


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
    _refuse_second_derivatives()
    hidden, weight, bias, targets = ctx.saved_tensors
    needs = tuple(ctx.needs_input_grad[:3])
    _, _, _, *gradients = torch.ops.tokenpack.linear_cross_entropy_and_gradients(
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
    ctx.set_materialize_grads(False)  # no zeros as large as the head for what has no gradient


def _backward_of_total(ctx, dtotal: Tensor | None, *_):
    _refuse_second_derivatives()
    nothing = (None,) * (5 + len(ctx.options))
    if dtotal is None:
        return nothing
    tensors = ctx.saved_tensors
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:  # handed out by an earlier backward
        _, _, _, *gradients = torch.ops.tokenpack.linear_cross_entropy_and_gradients(
            *tensors, *ctx.options
        )
    # Over no items the mean's slope is infinite, and there is nothing that it could scale.
    dtotal = torch.where((tensors[4] >= 0).any(), dtotal, 0.0)
    needs = ctx.options[-3:]
    scaled = [
        _times(gradient, dtotal).to(of.dtype) if needed else None
        for gradient, of, needed in zip(gradients, tensors[1:4], needs, strict=True)
    ]
    return None, *scaled, *nothing[4:]


def _times(gradient: Tensor, factor: Tensor) -> Tensor:
    # In place, which spares a second tensor as large as the head. But a compiler, which hands in
    # tensors of a type of its own, may not see an output of the forward change.
    return gradient.mul_(factor) if type(gradient) is Tensor else gradient * factor


def _refuse_second_derivatives() -> None:
    # Under once_differentiable they may be missing without a word.
    if torch.is_grad_enabled():
        raise RuntimeError(
            "packed_linear_cross_entropy is differentiable once: no backward with create_graph"
        )


_linear_cross_entropy.register_autograd(_backward_of_losses, setup_context=_save_for_losses)
_linear_cross_entropy_and_gradients.register_autograd(
    _backward_of_total, setup_context=_save_for_total
)
