"""Cross entropy of packed tokens, from logits.

    z[j]  = softcap(scale * logits[t, j]),   lse = log sum_j exp z[j]
    nll   = (1 - smoothing) * (lse - z[target]) + smoothing * (lse - mean_j z[j])
    token_loss[t] = nll + z_loss * lse ** 2
    d token_loss / d z[j] = softmax(z)[j] * (1 + 2 * z_loss * lse)
                            - (1 - smoothing) * [j = target] - smoothing / num_classes

The kernels are in `loss_kernels`. `reduction` chooses the targets and reduces the token losses.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ._launch import PreparedKernel
from ._ops import define_op, on_triton, run
from .loss_kernels import _cross_entropy_backward_kernel, _cross_entropy_kernel
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
        logits: ``(total_tokens, num_classes)``, floating point. If the classes of a token are not
            contiguous in memory, they are copied.
        labels: ``(total_tokens,)`` integers: a class, or ``ignore_index``.
        cu_seqlens: ``(num_seqs + 1,)`` int32, non-decreasing from 0 to ``total_tokens``. Required
            for ``shift``, ``sequence_weights`` and the reductions over sequences.
        shift: if True, the target of a token is the label of the next token, and the last token of
            each sequence has no target, as in causal language modeling. If False, the target of a
            token is its own label.
        reduction: applied to the tokens that have a target. ``"mean"``; ``"sum"``; ``"none"``:
            ``(total_tokens,)`` losses; ``"sequence_mean"``: the mean over sequences of the mean of
            each sequence; ``"sequence"``: the mean of each sequence, ``(num_seqs,)``. A sequence
            without a target does not count in ``"sequence_mean"`` and is 0 in ``"sequence"``.
        sequence_weights: ``(num_seqs,)`` floating point. The loss of each sequence is multiplied by
            its weight, and both means become weighted means. The weights receive no gradient.
        num_items: denominator of a mean. Default: the sum of the weights.
        ignore_index: label of tokens without a target.
        label_smoothing: share of the target that is spread evenly over all classes, in [0, 1].
        z_loss: factor of ``lse ** 2``, added to the loss of each token (PaLM, Chowdhery et al.,
            2022).
        softcap: apply ``softcap * tanh(logits / softcap)`` before the softmax.
        inplace_backward: write the gradient over the memory of ``logits``, which destroys them.
        return_stats: also return `TokenStats`.

    Returns:
        The loss in float32 (float64 for float64 logits), differentiable in ``logits``. With
        ``return_stats``, a tuple of the loss and the stats. A mean over zero targets is
        0 / 0 = NaN, as in PyTorch, and its gradient is 0.

    Raises:
        TypeError: logits are not floating point, or labels or cu_seqlens are not integers.
        ValueError: a shape, device or option is invalid, a label is not a class, or cu_seqlens do
            not start at 0, decrease, or do not end at ``total_tokens``. On a GPU, invalid labels
            and cu_seqlens are device-side assertions, so that the host does not wait.
    """
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be (total_tokens, num_classes), got {tuple(logits.shape)}")
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
    options = (label_smoothing, z_loss, softcap or 0.0, 1.0, inplace_backward)
    token_loss, _, correct = run(cross_entropy, logits, reduce.targets, *options)
    loss = reduce(token_loss)
    if return_stats:
        return loss, TokenStats(token_loss.detach(), correct, reduce.targets >= 0)
    return loss


def check_options(label_smoothing: float, softcap: float | None) -> None:
    """Raise if an option is out of range."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")


# ------------------------------------------------------------------ reference: CPU path and oracle


class Options(NamedTuple):
    """The numbers of the formulas, in the order of the ops' arguments. softcap 0.0 means none."""

    label_smoothing: float
    z_loss: float
    softcap: float
    scale: float


_BLOCK_ELEMENTS = 2**20  # logits cast to float32 at a time, to avoid a second full-size tensor


@define_op("tokenpack::cross_entropy")
def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    scale: float,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op: loss, logsumexp, and whether the target has the largest logit, of each row."""
    options = Options(label_smoothing, z_loss, softcap, scale)
    blocks = [_losses(logits[rows], targets[rows], options) for rows in _row_blocks(logits)]
    if len(blocks) == 1:
        return blocks[0]
    token_loss, lse, correct = map(torch.cat, zip(*blocks, strict=True))
    return token_loss, lse, correct


def _losses(logits: Tensor, targets: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of some rows, their logsumexp, and whether the target has the largest logit."""
    z = _scaled_and_capped(logits, options)
    target = targets[:, None].long()
    is_absent = target < 0
    largest = z.amax(dim=1, keepdim=True)
    target_z = z.gather(1, target.clamp(min=0))
    smoothing, z_loss = options.label_smoothing, options.z_loss
    mean = z.mean(dim=1, keepdim=True) if smoothing else 0.0
    is_copy = logits.dtype != z.dtype or options.softcap or options.scale != 1.0
    shifted = z.sub_(largest) if is_copy else z - largest
    lse = shifted.exp_().sum(dim=1, keepdim=True).log_().add_(largest)
    loss = lse - target_z
    if smoothing:
        loss = (1 - smoothing) * loss + smoothing * (lse - mean)
    loss = loss + z_loss * lse.square() if z_loss else loss
    loss.masked_fill_(is_absent, 0.0)
    correct = (target_z >= largest).masked_fill_(is_absent, False)
    return loss.squeeze(1), lse.squeeze(1), correct.squeeze(1)


@define_op("tokenpack::cross_entropy_backward")
def cross_entropy_backward(
    dloss: Tensor,
    logits: Tensor,
    lse: Tensor,
    targets: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    scale: float,
) -> Tensor:
    """The op: the gradient of the logits."""
    dlogits = torch.empty_like(logits)
    options = Options(label_smoothing, z_loss, softcap, scale)
    _write_gradient(dlogits, dloss, logits, lse, targets, options)
    return dlogits


@define_op("tokenpack::cross_entropy_backward_", mutates_args=("logits",))
def cross_entropy_backward_(
    dloss: Tensor,
    logits: Tensor,
    lse: Tensor,
    targets: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    scale: float,
) -> None:
    """The op: overwrite the logits with their gradient."""
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
        z = _scaled_and_capped(logits[rows], options)
        target = targets[rows].long()[:, None]
        row_lse = lse[rows, None]
        dsoftcap = 1.0 - (z / options.softcap).square_() if options.softcap else None
        dz = z.sub_(row_lse) if out is logits or z.dtype != logits.dtype else z - row_lse
        dz.exp_()
        if options.z_loss:
            dz.mul_(1.0 + 2.0 * options.z_loss * row_lse)
        if options.label_smoothing:
            dz.sub_(options.label_smoothing / logits.shape[1])
        hit = torch.full_like(target, -(1.0 - options.label_smoothing), dtype=dz.dtype)
        dz.scatter_add_(1, target.clamp(min=0), hit)
        factor = dloss[rows, None].to(dz.dtype)
        if options.scale != 1.0:
            factor = factor * options.scale
        dz.mul_(factor if dsoftcap is None else dsoftcap.mul_(factor))
        if bool((target < 0).any()):
            dz.masked_fill_(target < 0, 0.0)
        if dz.data_ptr() != out[rows].data_ptr():
            out[rows] = dz


def _scaled_and_capped(logits: Tensor, options: Options) -> Tensor:
    """z of the formulas, in float32 or higher. Returns ``logits`` itself if z equals them."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if options.scale != 1.0:
        z = z * options.scale
    cap = options.softcap
    return (z / cap).tanh_().mul_(cap) if cap else z


def _row_blocks(logits: Tensor) -> list[slice]:
    step = max(_BLOCK_ELEMENTS // logits.shape[1], 1)
    # Without rows, there is one empty block.
    return [slice(first, first + step) for first in range(0, max(logits.shape[0], 1), step)]


def _new_rows(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    token_loss = logits.new_empty(logits.shape[0], dtype=dtype)
    correct = logits.new_empty(logits.shape[0], dtype=torch.bool)
    return token_loss, torch.empty_like(token_loss), correct


# --------------------------------------------------------------------------------------- launches


@on_triton(cross_entropy)
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
    logits = _with_contiguous_rows(logits)
    token_loss, lse, correct = _new_rows(logits)
    options = Options(label_smoothing, z_loss, softcap, scale)
    kernel = _forward_kernel(_types(logits, targets), logits.shape[1], logits.stride(0), options)
    kernel((logits.shape[0], 1), (logits, targets, token_loss, lse, correct))
    return token_loss, lse, correct


@on_triton(cross_entropy_backward)
def cross_entropy_backward_triton(
    dloss: Tensor,
    logits: Tensor,
    lse: Tensor,
    targets: Tensor,
    *options: float,
) -> Tensor:
    """The op ``cross_entropy_backward`` in one launch."""
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    logits = _with_contiguous_rows(logits)
    _launch_backward(dlogits, dloss, logits, lse, targets, Options(*options))
    return dlogits


@on_triton(cross_entropy_backward_)
def cross_entropy_backward_inplace_triton(
    dloss: Tensor,
    logits: Tensor,
    lse: Tensor,
    targets: Tensor,
    *options: float,
) -> None:
    """The op ``cross_entropy_backward_`` in one launch."""
    contiguous = _with_contiguous_rows(logits)
    _launch_backward(contiguous, dloss, contiguous, lse, targets, Options(*options))
    if contiguous is not logits:
        logits.copy_(contiguous)


def _launch_backward(
    dlogits: Tensor,
    dloss: Tensor,
    logits: Tensor,
    lse: Tensor,
    targets: Tensor,
    options: Options,
) -> None:
    strides = logits.stride(0), dlogits.stride(0)
    types = _types(logits, targets, dloss)
    kernel = _backward_kernel(types, logits.shape[1], *strides, options)
    kernel((logits.shape[0], 1), (dloss.contiguous(), logits, lse, targets, dlogits))


# A head has one number of classes. So these are as few as the heads and options of a process.
@lru_cache(maxsize=256)
def _forward_kernel(
    types: _Types, num_classes: int, row_stride: int, options: Options
) -> PreparedKernel:
    constants = {
        **options._asdict(),
        "num_classes": num_classes,
        "row_stride": row_stride,
        "SMOOTHED": options.label_smoothing != 0.0,
        "SOFTCAP": options.softcap != 0.0,
        "SCALED": options.scale != 1.0,
        **_block(num_classes, types),
    }
    tensors = ("logits", "targets", "token_loss", "token_lse", "correct")
    return PreparedKernel(_cross_entropy_kernel, tensors, (), constants)


@lru_cache(maxsize=256)
def _backward_kernel(
    types: _Types, num_classes: int, row_stride: int, drow_stride: int, options: Options
) -> PreparedKernel:
    constants = {
        **options._asdict(),
        "num_classes": num_classes,
        "row_stride": row_stride,
        "drow_stride": drow_stride,
        "SOFTCAP": options.softcap != 0.0,
        "SCALED": options.scale != 1.0,
        **_block(num_classes, types),
    }
    tensors = ("dloss", "logits", "token_lse", "targets", "dlogits")
    return PreparedKernel(_cross_entropy_backward_kernel, tensors, (), constants)


_Types = tuple[torch.device, tuple[torch.dtype, ...]]


def _types(*tensors: Tensor) -> _Types:
    """What a compiled kernel needs of its tensors, the logits first."""
    return tensors[0].device, tuple(tensor.dtype for tensor in tensors)


def _block(num_classes: int, types: _Types) -> dict[str, int]:
    """Classes per iteration, and warps. Each thread loads at least 16 bytes."""
    is_small = num_classes <= 2048 or types[1][0] == torch.float64
    return {"BLOCK": 1024, "num_warps": 4} if is_small else {"BLOCK": 4096, "num_warps": 8}


def _with_contiguous_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


# --------------------------------------------------------------- fakes for torch.compile, autograd


@cross_entropy.register_fake
def _(logits, targets, label_smoothing, z_loss, softcap, scale, inplace_backward):
    return _new_rows(logits)


@cross_entropy_backward.register_fake
def _(dloss, logits, lse, targets, *options) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@cross_entropy_backward_.register_fake
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
    # torch.compile plans memory itself and does not allow the backward to modify an input.
    if ctx.inplace and not torch.compiler.is_compiling():
        logits = logits.detach()
        torch.ops.tokenpack.cross_entropy_backward_(dloss, logits, *arguments[2:])
        dlogits = logits
    else:
        dlogits = torch.ops.tokenpack.cross_entropy_backward(*arguments)
    return dlogits, None, None, None, None, None, None


cross_entropy.register_autograd(_backward, setup_context=_save_for_backward)
