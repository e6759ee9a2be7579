"""Cross entropy of packed tokens, from logits.

    z[j]  = softcap(scale * logits[t, j]),   lse = log sum_j exp z[j]
    nll   = (1 - smoothing) * (lse - z[target]) + smoothing * (lse - mean_j z[j])
    token_loss[t] = nll + z_loss * lse ** 2
    d token_loss / d z[j] = softmax(z)[j] * (1 + 2 * z_loss * lse)
                            - (1 - smoothing) * [j = target] - smoothing / num_classes

One program per row reads it once for the loss, with the sum of exponentials rescaled as the maximum
grows (Milakov and Gimelshein, 2018), and once for the gradient, which may be written where the
logits stand. Rows without a target are not read at all. What becomes of the tokens' losses is in
`reduction`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import on_triton, tl, triton
from .reduction import TokenStats, plan_reduction


def packed_cross_entropy(
    logits: Tensor,
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
    inplace_backward: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Cross entropy of a token stream, reduced over tokens or over sequences.

    Args:
        logits: ``(total_tokens, num_classes)``, floating point, classes next to one another.
        labels: ``(total_tokens,)`` integers: a class, or ``ignore_index``.
        cu_seqlens: ``(num_seqs + 1,)`` int32, rising from 0 to ``total_tokens``. Needed for
            ``shift``, ``sequence_weights`` and the reductions over sequences.
        shift: let a token's target be the next token's label, and the last of each sequence have
            none, as causal language models are trained; else it is the token's own.
        reduction: over the tokens that have a target: ``"mean"``; ``"sum"``; ``"none"``, which is
            ``(total_tokens,)``; ``"sequence_mean"``, the mean over sequences of each one's mean;
            ``"sequence"``, each sequence's mean, ``(num_seqs,)``. Sequences without a target
            count in no mean and are 0 in ``"sequence"``.
        sequence_weights: ``(num_seqs,)`` floating point, by which sequences' losses are multiplied;
            both means are weighted means then. They get no gradient.
        num_items: what the weighted sum is divided by in a mean, instead of the sum of the weights.
        ignore_index: the label of tokens without a target.
        label_smoothing: share of the target that goes to all classes alike, in [0, 1].
        z_loss: factor of ``lse ** 2``, added to each token's loss (PaLM, Chowdhery et al., 2022).
        softcap: ``softcap * tanh(logits / softcap)`` before the softmax.
        inplace_backward: write the gradient into the memory of ``logits``, which are lost then.
        return_stats: also return `TokenStats`.

    Returns:
        The loss, float32 (float64 for float64 logits), differentiable in ``logits``; with
        ``return_stats`` and the stats. A mean over no target at all is 0 / 0 = NaN, as in PyTorch,
        with gradient 0.

    Raises:
        TypeError: if logits are not floating point, or labels or cu_seqlens not integers.
        ValueError: if a shape, device or option does not fit, a label is no class, or cu_seqlens do
            not rise from 0 to ``total_tokens``. The last two, which only values tell, are on a GPU
            an assertion of the device: nothing waits for them.
    """
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be (total_tokens, classes), got {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    check_options(label_smoothing, softcap)
    reduce = plan_reduction(
        labels,
        cu_seqlens,
        total_tokens=logits.shape[0],
        num_classes=logits.shape[1],
        shift=shift,
        reduction=reduction,
        sequence_weights=sequence_weights,
        num_items=num_items,
        ignore_index=ignore_index,
        like=logits,
    )
    token_loss, _, correct = torch.ops.tokenpack.cross_entropy(
        logits, reduce.targets, label_smoothing, z_loss, softcap or 0.0, 1.0, inplace_backward
    )
    loss = reduce(token_loss)
    if return_stats:
        return loss, TokenStats(token_loss.detach(), correct, reduce.targets >= 0)
    return loss


def check_options(label_smoothing: float, softcap: float | None) -> None:
    """Refuse options out of their range, by name."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")


# ------------------------------------------------------------------ reference: CPU path and oracle


class Options(NamedTuple):
    """The numbers of the formulas, as the ops take them one by one. softcap 0.0: none."""

    label_smoothing: float
    z_loss: float
    softcap: float
    scale: float


_BLOCK_ELEMENTS = 2**20  # logits in higher precision at a time: no second tensor of their size


@torch.library.custom_op("tokenpack::cross_entropy", mutates_args=())
def _cross_entropy(
    logits: Tensor,
    targets: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    scale: float,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    token_loss, lse, correct = _new_rows(logits)
    for rows in _row_blocks(logits):
        z = _shaped(logits[rows], Options(label_smoothing, z_loss, softcap, scale))
        target = targets[rows].long()
        largest = z.amax(dim=1)
        of_target = z.gather(1, target.clamp(min=0)[:, None]).squeeze(1)
        mean = z.mean(dim=1) if label_smoothing else 0.0
        own = (logits[rows].dtype != z.dtype) or softcap or scale != 1.0  # z is a copy
        shifted = z.sub_(largest[:, None]) if own else z - largest[:, None]
        row_lse = largest + shifted.exp_().sum(dim=1).log_()
        row_loss = row_lse - of_target
        if label_smoothing:
            row_loss = (1 - label_smoothing) * row_loss + label_smoothing * (row_lse - mean)
        row_loss = row_loss + z_loss * row_lse.square() if z_loss else row_loss
        token_loss[rows] = row_loss.masked_fill_(target < 0, 0.0)
        lse[rows] = row_lse
        correct[rows] = (of_target >= largest) & (target >= 0)
    return token_loss, lse, correct


@torch.library.custom_op("tokenpack::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    dloss: Tensor,
    logits: Tensor,
    lse: Tensor,
    targets: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    scale: float,
) -> Tensor:
    dlogits = torch.empty_like(logits)
    options = Options(label_smoothing, z_loss, softcap, scale)
    _write_gradient(dlogits, dloss, logits, lse, targets, options)
    return dlogits


@torch.library.custom_op("tokenpack::cross_entropy_backward_", mutates_args=("logits",))
def _cross_entropy_backward_(
    dloss: Tensor,
    logits: Tensor,
    lse: Tensor,
    targets: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    scale: float,
) -> None:
    options = Options(label_smoothing, z_loss, softcap, scale)
    _write_gradient(logits, dloss, logits, lse, targets, options)


def _write_gradient(
    out: Tensor,
    dloss: Tensor,
    logits: Tensor,
    lse: Tensor,
    targets: Tensor,
    options: Options,
) -> None:
    for rows in _row_blocks(logits):
        z = _shaped(logits[rows], options)
        target = targets[rows].long()[:, None]
        row_lse = lse[rows, None]
        slope = 1.0 - (z / options.softcap).square_() if options.softcap else None
        dz = z.sub_(row_lse) if out is logits or z.dtype != logits.dtype else z - row_lse
        dz.exp_()
        if options.z_loss:
            dz.mul_(1.0 + 2.0 * options.z_loss * row_lse)
        if options.label_smoothing:
            dz.sub_(options.label_smoothing / logits.shape[1])
        hit = torch.full_like(target, -(1.0 - options.label_smoothing), dtype=dz.dtype)
        dz.scatter_add_(1, target.clamp(min=0), hit)
        factor = dloss[rows, None].to(dz.dtype) * options.scale
        dz.mul_(factor if slope is None else slope.mul_(factor))
        if bool((target < 0).any()):
            dz.masked_fill_(target < 0, 0.0)
        if dz.data_ptr() != out[rows].data_ptr():
            out[rows] = dz


def _shaped(logits: Tensor, options: Options) -> Tensor:
    """z of the formulas, at least in float32; the logits themselves where nothing is to do."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if options.scale != 1.0:
        z = z * options.scale
    cap = options.softcap
    return (z / cap).tanh_().mul_(cap) if cap else z


def _row_blocks(logits: Tensor) -> list[slice]:
    step = max(_BLOCK_ELEMENTS // logits.shape[1], 1)
    return [slice(first, first + step) for first in range(0, logits.shape[0], step)]


def _new_rows(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    token_loss = logits.new_empty(logits.shape[0], dtype=dtype)
    correct = logits.new_empty(logits.shape[0], dtype=torch.bool)
    return token_loss, torch.empty_like(token_loss), correct


# ------------------------------------------------------------------------------------------ Triton


@triton.jit
def _tanh(x):
    """tanh to within 2 units in the last place of float32, without a library.

    Near 0 the odd polynomial of Cephes (Moshier), elsewhere 1 - 2 / (exp(2x) + 1).
    """
    far = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    if x.dtype == tl.float64:
        return far
    square = x * x
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    return tl.where(tl.abs(x) < 0.625, near * square * x + x, far)


@triton.jit
def _load_z(
    logits, row, column, num_classes, softcap, scale, SOFTCAP: tl.constexpr, SCALED: tl.constexpr
):
    """[BLOCK] z of the formulas, -inf behind the last class; float32, or float64 if logits are."""
    z = tl.load(logits + row + column, mask=column < num_classes, other=float("-inf"))
    if z.dtype != tl.float64:
        z = z.to(tl.float32)
    if SCALED:
        z *= tl.full([], scale, z.dtype)
    if SOFTCAP:
        cap = tl.full([], softcap, z.dtype)
        z = _tanh(z / cap) * cap
        z = tl.where(column < num_classes, z, float("-inf"))
    return z


# num_classes, which no batch changes, is specialised: loads are 16 bytes wide only under a mask
# that is known to come in such pieces.
@triton.jit
def _cross_entropy_kernel(
    logits,
    targets,
    token_loss,
    token_lse,
    correct,
    num_classes,
    row_stride,
    label_smoothing: tl.float64,
    z_loss: tl.float64,
    softcap: tl.float64,
    scale: tl.float64,
    SMOOTHED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = token * row_stride
    target = tl.load(targets + token)
    dtype: tl.constexpr = token_lse.dtype.element_ty
    last = tl.where(target >= 0, num_classes, 0)  # no target: read nothing
    # Each lane keeps its own maximum and sum. Of exp(z - maximum) and exp(maximum - new maximum)
    # one is always 1, so one exponential serves both.
    largest = tl.full([BLOCK], -3.4028234663852886e38, dtype)
    total = tl.zeros([BLOCK], dtype)
    sum_z = tl.zeros([BLOCK], dtype)
    for first in range(0, last, BLOCK):
        column = first + tl.arange(0, BLOCK)
        z = _load_z(logits, row, column, num_classes, softcap, scale, SOFTCAP, SCALED)
        gain = z - largest
        shrunk = tl.exp(-tl.abs(gain))
        total = tl.where(gain > 0, total * shrunk + 1.0, total + shrunk)
        largest = tl.maximum(largest, z)
        if SMOOTHED:
            sum_z += tl.where(column < num_classes, z, 0.0)
    top = tl.max(largest)
    lse = top + tl.log(tl.sum(total * tl.exp(largest - top)))
    of_target = _load_z(
        logits, row, tl.maximum(target, 0), num_classes, softcap, scale, SOFTCAP, SCALED
    )
    loss = lse - of_target
    if SMOOTHED:
        smoothing = tl.full([], label_smoothing, dtype)
        loss = (1.0 - smoothing) * loss + smoothing * (lse - tl.sum(sum_z) / num_classes)
    loss += tl.full([], z_loss, dtype) * lse * lse
    has_target = target >= 0
    tl.store(token_loss + token, tl.where(has_target, loss, 0.0))
    tl.store(token_lse + token, tl.where(has_target, lse, 0.0))
    tl.store(correct + token, has_target & (of_target >= top))


@triton.jit
def _cross_entropy_backward_kernel(
    dloss,
    logits,
    token_lse,
    targets,
    dlogits,
    num_classes,
    row_stride,
    drow_stride,
    label_smoothing: tl.float64,
    z_loss: tl.float64,
    softcap: tl.float64,
    scale: tl.float64,
    SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + token)
    dtype: tl.constexpr = token_lse.dtype.element_ty
    lse = tl.load(token_lse + token)
    slope = tl.load(dloss + token).to(dtype)
    pull = 1.0 + 2.0 * tl.full([], z_loss, dtype) * lse
    even = tl.full([], label_smoothing, dtype) / num_classes
    hit = 1.0 - tl.full([], label_smoothing, dtype)
    for first in range(0, num_classes, BLOCK):
        column = first + tl.arange(0, BLOCK)
        dz = tl.zeros([BLOCK], dtype)
        if target >= 0:
            z = _load_z(
                logits, token * row_stride, column, num_classes, softcap, scale, SOFTCAP, SCALED
            )
            dz = tl.exp(z - lse) * pull - even - tl.where(column == target, hit, 0.0)
            if SOFTCAP:
                bent = z / tl.full([], softcap, dtype)
                dz *= 1.0 - bent * bent
            if SCALED:
                dz *= tl.full([], scale, dtype)
            dz *= slope
        tl.store(
            dlogits + token * drow_stride + column,
            dz.to(dlogits.dtype.element_ty),
            mask=column < num_classes,
        )


@on_triton(_cross_entropy)
def cross_entropy_triton(
    logits: Tensor,
    targets: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    scale: float,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``cross_entropy`` in one launch."""
    logits = _with_close_columns(logits)
    token_loss, lse, correct = _new_rows(logits)
    if logits.shape[0]:
        block, num_warps = _block(logits)
        _cross_entropy_kernel[(logits.shape[0],)](
            logits=logits,
            targets=targets,
            token_loss=token_loss,
            token_lse=lse,
            correct=correct,
            num_classes=logits.shape[1],
            row_stride=logits.stride(0),
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            scale=scale,
            SMOOTHED=label_smoothing != 0.0,
            SOFTCAP=softcap != 0.0,
            SCALED=scale != 1.0,
            BLOCK=block,
            num_warps=num_warps,
        )
    return token_loss, lse, correct


@on_triton(_cross_entropy_backward)
def cross_entropy_backward_triton(
    dloss: Tensor,
    logits: Tensor,
    lse: Tensor,
    targets: Tensor,
    *options: float,
) -> Tensor:
    """The op ``cross_entropy_backward`` in one launch."""
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    logits = _with_close_columns(logits)
    _launch_backward(dlogits, dloss, logits, lse, targets, Options(*options))
    return dlogits


@on_triton(_cross_entropy_backward_)
def cross_entropy_backward_inplace_triton(
    dloss: Tensor,
    logits: Tensor,
    lse: Tensor,
    targets: Tensor,
    *options: float,
) -> None:
    """The op ``cross_entropy_backward_`` in one launch."""
    close = _with_close_columns(logits)
    _launch_backward(close, dloss, close, lse, targets, Options(*options))
    if close is not logits:
        logits.copy_(close)


def _launch_backward(
    dlogits: Tensor,
    dloss: Tensor,
    logits: Tensor,
    lse: Tensor,
    targets: Tensor,
    options: Options,
) -> None:
    if not logits.shape[0]:
        return
    block, num_warps = _block(logits)
    _cross_entropy_backward_kernel[(logits.shape[0],)](
        dloss=dloss.contiguous(),
        logits=logits,
        token_lse=lse,
        targets=targets,
        dlogits=dlogits,
        num_classes=logits.shape[1],
        row_stride=logits.stride(0),
        drow_stride=dlogits.stride(0),
        **options._asdict(),
        SOFTCAP=options.softcap != 0.0,
        SCALED=options.scale != 1.0,
        BLOCK=block,
        num_warps=num_warps,
    )


def _block(logits: Tensor) -> tuple[int, int]:
    """Classes at a time, and warps: 16 bytes or more for each thread, twice."""
    return (1024, 4) if logits.shape[1] <= 2048 or logits.dtype == torch.float64 else (4096, 8)


def _with_close_columns(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


# ------------------------------------------------------------- what torch.compile and autograd need


@_cross_entropy.register_fake
def _(logits, targets, label_smoothing, z_loss, softcap, scale, inplace_backward):
    return _new_rows(logits)


@_cross_entropy_backward.register_fake
def _(dloss, logits, lse, targets, *options) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@_cross_entropy_backward_.register_fake
def _(dloss, logits, lse, targets, *options) -> None:
    return None


def _save_for_backward(ctx, inputs, output) -> None:
    logits, targets, *ctx.options, ctx.inplace = inputs
    _, lse, correct = output
    ctx.save_for_backward(logits, lse, targets)
    ctx.mark_non_differentiable(lse, correct)


def _backward(ctx, dloss: Tensor, _dlse, _dcorrect):
    logits, lse, targets = ctx.saved_tensors
    arguments = (dloss, logits, lse, targets, *ctx.options)
    # A compiler plans memory itself, and may not see an input change in the backward.
    if ctx.inplace and not torch.compiler.is_compiling():
        logits = logits.detach()
        torch.ops.tokenpack.cross_entropy_backward_(dloss, logits, *arguments[2:])
        dlogits = logits
    else:
        dlogits = torch.ops.tokenpack.cross_entropy_backward(*arguments)
    return dlogits, None, None, None, None, None, None


_cross_entropy.register_autograd(_backward, setup_context=_save_for_backward)
