"""Which class each token should give, and how the losses of tokens become one loss.

    target[t] = labels[t], or with ``shift`` labels[t + 1] if t + 1 is in t's sequence
    loss      = sum_t weight[t] * token_loss[t] / denominator

One weight per token carries every reduction. With w[s] the weight of sequence s (1 by default) and
n[s] its valid tokens, a valid token of s weighs

    w[s]           for "mean", "sum" and "none"
    w[s] / n[s]    for "sequence_mean" and "sequence"

and the denominator of both means is the sum of the weights: the number of valid tokens, or of
sequences that have any. Shifting here, by sequence, copies no labels and never asks the last token
of one sequence for the first of the next.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import on_triton, tl, triton

REDUCTIONS = ("mean", "sum", "none", "sequence_mean", "sequence")


class TokenStats(NamedTuple):
    """What the loss knows of each token, from the same pass over the logits. Without gradient.

    Attributes:
        loss: ``(total_tokens,)`` float32 (float64 for float64 logits), unweighted; 0 where ignored.
        correct: ``(total_tokens,)`` bool, whether no class has a larger logit than the target, so
            that a tie counts as correct. False where ignored.
        valid: ``(total_tokens,)`` bool, whether the token has a target.
    """

    loss: Tensor
    correct: Tensor
    valid: Tensor


class Reduction(NamedTuple):
    """How to reduce: see the formulas above.

    Attributes:
        targets: ``(total_tokens,)`` int32, a class, or -1 for tokens without one.
        weights: ``(total_tokens,)`` float32 or float64, 0 for tokens without a target.
    """

    kind: str
    targets: Tensor
    weights: Tensor
    cu_seqlens: Tensor | None
    num_items: Tensor | float | None

    def __call__(self, token_loss: Tensor) -> Tensor:
        weighted = token_loss * self.weights
        if self.kind == "none":
            return weighted
        if self.kind == "sequence":
            assert self.cu_seqlens is not None
            # unsafe: do not read the boundaries on the host to check them once more
            return torch.segment_reduce(
                weighted, "sum", offsets=self.cu_seqlens.long(), unsafe=True
            )
        return self.divide(weighted.sum())

    def divide(self, total: Tensor) -> Tensor:
        """The weighted sum by its denominator."""
        if self.kind == "sum":
            return total
        return total / (self.weights.sum() if self.num_items is None else self.num_items)


def plan_reduction(
    labels: Tensor,
    cu_seqlens: Tensor | None,
    *,
    total_tokens: int,
    num_classes: int,
    shift: bool,
    reduction: str,
    sequence_weights: Tensor | None,
    num_items: Tensor | float | None,
    ignore_index: int,
    like: Tensor,
) -> Reduction:
    """Check the arguments that all losses share, and weigh the tokens. Waits for no device.

    Args:
        total_tokens: rows that the loss is taken over.
        num_classes: classes that a label may name.
        like: tensor of the loss's dtype and device. Other arguments as in `packed_cross_entropy`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    _check_labels(labels, total_tokens, like)
    _check_sequences(cu_seqlens, sequence_weights, shift, reduction, like)
    if num_items is not None and reduction not in ("mean", "sequence_mean"):
        raise ValueError(f"num_items is the denominator of a mean; reduction is {reduction!r}")
    if isinstance(num_items, Tensor):
        num_items = num_items.to(like.device)
    targets, weights = torch.ops.tokenpack.token_targets(
        labels,
        cu_seqlens,
        sequence_weights,
        num_classes,
        shift,
        reduction.startswith("sequence"),
        ignore_index,
        torch.promote_types(like.dtype, torch.float32),
    )
    return Reduction(reduction, targets, weights, cu_seqlens, num_items)


def _check_labels(labels: Tensor, total_tokens: int, like: Tensor) -> None:
    if labels.shape != (total_tokens,):
        raise ValueError(f"labels must be ({total_tokens},), got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.device != like.device:
        raise ValueError(f"labels must be on {like.device}, got {labels.device}")


def _check_sequences(
    cu_seqlens: Tensor | None,
    sequence_weights: Tensor | None,
    shift: bool,
    reduction: str,
    like: Tensor,
) -> None:
    if cu_seqlens is None:
        if shift or sequence_weights is not None or reduction.startswith("sequence"):
            raise ValueError(
                "cu_seqlens must say where sequences end, for shift, sequence_weights and "
                f"reduction={reduction!r}; got None"
            )
        return
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must be (num_seqs + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.device != like.device:
        raise ValueError(f"cu_seqlens must be on {like.device}, got {cu_seqlens.device}")
    if sequence_weights is None:
        return
    if sequence_weights.shape != (cu_seqlens.numel() - 1,):
        raise ValueError(
            f"sequence_weights must be ({cu_seqlens.numel() - 1},), one for each sequence, "
            f"got {tuple(sequence_weights.shape)}"
        )
    if not sequence_weights.is_floating_point():
        raise TypeError(f"sequence_weights must be floating point, got {sequence_weights.dtype}")
    if sequence_weights.device != like.device:
        raise ValueError(
            f"sequence_weights must be on {like.device}, got {sequence_weights.device}"
        )
    if sequence_weights.requires_grad and torch.is_grad_enabled():
        raise ValueError("sequence_weights get no gradient here: detach() them")


# ------------------------------------------------------------------ reference: CPU path and oracle


@torch.library.custom_op("tokenpack::token_targets", mutates_args=())
def _token_targets(
    labels: Tensor,
    cu_seqlens: Tensor | None,
    sequence_weights: Tensor | None,
    num_classes: int,
    shift: bool,
    per_sequence: bool,
    ignore_index: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    total = labels.numel()
    if cu_seqlens is None:
        bounds = torch.tensor([0, total], device=labels.device)
    else:
        bounds = cu_seqlens.long()
    lengths = bounds.diff()
    if int(bounds[0]) != 0 or int(bounds[-1]) != total or bool((lengths < 0).any()):
        raise ValueError(
            f"cu_seqlens must rise from 0 to the {total} tokens, got {bounds.tolist()!s:.80}"
        )
    sequence = torch.arange(lengths.numel(), device=labels.device).repeat_interleave(lengths)
    own = labels.long()
    if shift:
        own = torch.nn.functional.pad(own, (0, 1), value=ignore_index)[1:]
        is_last = torch.zeros(total, dtype=torch.bool, device=labels.device)
        is_last[bounds[1:][lengths > 0] - 1] = True
        own.masked_fill_(is_last, ignore_index)
    valid = own != ignore_index
    wrong = valid & ((own < 0) | (own >= num_classes))
    if bool(wrong.any()):
        raise ValueError(
            f"labels must be from 0 to {num_classes - 1} or ignore_index = {ignore_index}, "
            f"got {int(own[wrong][0])}"
        )
    unit = lengths.new_ones(lengths.numel(), dtype=dtype)
    if sequence_weights is not None:
        unit = sequence_weights.to(dtype)
    if per_sequence:
        counts = torch.zeros_like(lengths).index_add_(0, sequence, valid.long())
        unit = unit / counts.clamp(min=1)
    weights = torch.where(valid, unit[sequence], 0.0)
    return own.masked_fill(~valid, -1).to(torch.int32), weights


# ------------------------------------------------------------------------------------------ Triton


@triton.jit
def _load_label(labels, token, end, ignore_index, SHIFT: tl.constexpr):
    """[BLOCK] the labels that tokens should give, ``ignore_index`` past the sequence's end."""
    source = token + SHIFT
    return tl.load(labels + source, mask=source < end, other=ignore_index).to(tl.int64)


@triton.jit(do_not_specialize=["total_tokens", "num_classes", "ignore_index"])
def _token_targets_kernel(
    labels,
    cu_seqlens,
    sequence_weights,
    targets,
    weights,
    wrongs,
    total_tokens,
    num_classes,
    ignore_index,
    BOUNDED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SHIFT: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program for each sequence. What is wrong with it goes to wrongs[seq], for the device to see.
    seq = tl.program_id(0)
    if BOUNDED:
        start = tl.load(cu_seqlens + seq).to(tl.int64)
        end = tl.load(cu_seqlens + seq + 1).to(tl.int64)
        is_first, is_last = seq == 0, seq == tl.num_programs(0) - 1
        misplaced = (start < 0) | (end < start) | (end > total_tokens)
        misplaced |= (is_first & (start != 0)) | (is_last & (end != total_tokens))
        start = tl.maximum(start, 0)
        end = tl.minimum(end, total_tokens)
    else:
        start = tl.zeros([], tl.int64)
        end = start + total_tokens
        misplaced = end < start
    unit = tl.full([], 1.0, weights.dtype.element_ty)
    if WEIGHTED:
        unit = tl.load(sequence_weights + seq).to(weights.dtype.element_ty)
    if PER_SEQUENCE:
        valid = tl.zeros([BLOCK], tl.int32)
        for first in range(start, end, BLOCK):
            token = first + tl.arange(0, BLOCK)
            label = _load_label(labels, token, end, ignore_index, SHIFT)
            valid += (label != ignore_index).to(tl.int32)
        unit = unit / tl.maximum(tl.sum(valid), 1).to(unit.dtype)
    wrong = tl.zeros([BLOCK], tl.int32)
    for first in range(start, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        label = _load_label(labels, token, end, ignore_index, SHIFT)
        is_valid = label != ignore_index
        wrong |= (is_valid & ((label < 0) | (label >= num_classes))).to(tl.int32)
        target = tl.where(is_valid, label, -1).to(tl.int32)
        tl.store(targets + token, target, mask=token < end)
        tl.store(weights + token, tl.where(is_valid, unit, 0.0), mask=token < end)
    tl.store(wrongs + seq, misplaced.to(tl.int32) + tl.sum(wrong))


@on_triton(_token_targets)
def token_targets_triton(
    labels: Tensor,
    cu_seqlens: Tensor | None,
    sequence_weights: Tensor | None,
    num_classes: int,
    shift: bool,
    per_sequence: bool,
    ignore_index: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The op ``token_targets`` in one launch, and a check that does not wait for its outcome."""
    targets = torch.empty_like(labels, dtype=torch.int32)
    weights = torch.empty_like(labels, dtype=dtype)
    num_seqs = 1 if cu_seqlens is None else cu_seqlens.numel() - 1
    wrongs = torch.empty(num_seqs, dtype=torch.int32, device=labels.device)
    _token_targets_kernel[(num_seqs,)](
        labels=labels.contiguous(),
        cu_seqlens=labels if cu_seqlens is None else cu_seqlens.contiguous(),
        sequence_weights=weights if sequence_weights is None else sequence_weights.contiguous(),
        targets=targets,
        weights=weights,
        wrongs=wrongs,
        total_tokens=labels.numel(),
        num_classes=num_classes,
        ignore_index=ignore_index,
        BOUNDED=cu_seqlens is not None,
        WEIGHTED=sequence_weights is not None,
        SHIFT=int(shift),
        PER_SEQUENCE=per_sequence,
        BLOCK=1024,
        num_warps=4,
    )
    torch._assert_async(
        (wrongs == 0).all(),
        f"labels must be from 0 to {num_classes - 1} or ignore_index = {ignore_index}, and "
        f"cu_seqlens must rise from 0 to the {labels.numel()} tokens",
    )
    return targets, weights


@_token_targets.register_fake
def _(
    labels, cu_seqlens, sequence_weights, num_classes, shift, per_sequence, ignore_index, dtype
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(labels, dtype=torch.int32), torch.empty_like(labels, dtype=dtype)
