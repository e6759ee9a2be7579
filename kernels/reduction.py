"""Choose the target class of each token, and reduce token losses to one loss.

    target[t] = labels[t], or with ``shift`` labels[t + 1] if token t + 1 is in the same sequence
    loss      = sum_t weight[t] * token_loss[t] / denominator

Every reduction is expressed by one weight per token. Let w[s] be the weight of sequence s (default
1) and n[s] its number of valid tokens, which are the tokens with a target. The weight of a valid
token of s is

    w[s]           for "mean", "sum" and "none"
    w[s] / n[s]    for "sequence_mean" and "sequence"

The denominator of both means is the sum of the weights. Without sequence weights, this is the
number of valid tokens, or the number of sequences that have any.

The shift is done here, per sequence. It copies no labels, and the target of the last token of a
sequence is never the first label of the next sequence.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ._launch import PreparedKernel
from ._ops import define_op, on_triton, run
from ._triton import tl, triton

REDUCTIONS = ("mean", "sum", "none", "sequence_mean", "sequence")


class TokenStats(NamedTuple):
    """Statistics of each token, from the same pass over the logits. They have no gradient.

    Attributes:
        loss: ``(total_tokens,)`` float32 (float64 for float64 logits). Unweighted. 0 for tokens
            without a target.
        correct: ``(total_tokens,)`` bool. True if no class has a larger logit than the target, so
            a tie counts as correct. False for tokens without a target.
        valid: ``(total_tokens,)`` bool. True if the token has a target.
    """

    loss: Tensor
    correct: Tensor
    valid: Tensor


class Reduction(NamedTuple):
    """A reduction of token losses, by the formulas above.

    Attributes:
        kind: one of `REDUCTIONS`.
        targets: ``(total_tokens,)`` int32. A class, or -1 for tokens without a target.
        weights: ``(total_tokens,)`` float32 or float64. 0 for tokens without a target.
        cu_seqlens: ``(num_seqs + 1,)`` int32, or None.
        num_items: denominator of a mean, or None for the sum of the weights.
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
            # unsafe=True: skip a check of the offsets, which would wait for the device
            return torch.segment_reduce(
                weighted, "sum", offsets=self.cu_seqlens.long(), unsafe=True
            )
        return self.divide(weighted.sum())

    def divide(self, total: Tensor) -> Tensor:
        """Divide the weighted sum by the denominator."""
        if self.kind == "sum":
            return total
        return total / (self.weights.sum() if self.num_items is None else self.num_items)


def plan_reduction(
    labels: Tensor,
    cu_seqlens: Tensor | None,
    *,
    total_tokens: int,
    num_classes: int,
    like: Tensor,
    shift: bool = False,
    reduction: str = "mean",
    sequence_weights: Tensor | None = None,
    num_items: Tensor | float | None = None,
    ignore_index: int = -100,
) -> Reduction:
    """Check the arguments that all losses share, and compute targets and weights.

    This does not wait for the device.

    Args:
        total_tokens: number of tokens of the loss.
        num_classes: number of classes. Labels must be less than it.
        like: tensor with the dtype and device of the logits. The other arguments are those of
            `packed_cross_entropy`.

    Raises:
        TypeError, ValueError: an argument is invalid. The message names it.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    _check_labels(labels, total_tokens, like)
    _check_sequences(cu_seqlens, sequence_weights, shift, reduction, like)
    if num_items is not None and reduction not in ("mean", "sequence_mean"):
        raise ValueError(
            "num_items must be None unless reduction is 'mean' or 'sequence_mean', "
            f"got reduction={reduction!r}"
        )
    if isinstance(num_items, Tensor):
        num_items = num_items.to(like.device)
    targets, weights = run(
        _token_targets,
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
                "cu_seqlens must be given for shift, sequence_weights and reductions over "
                f"sequences, got None with reduction={reduction!r}"
            )
        return
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must be (num_seqs + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.device != like.device:
        raise ValueError(f"cu_seqlens must be on {like.device}, got {cu_seqlens.device}")
    if sequence_weights is None:
        return
    if sequence_weights.shape != (cu_seqlens.numel() - 1,):
        raise ValueError(
            f"sequence_weights must be (num_seqs,) = ({cu_seqlens.numel() - 1},), "
            f"got {tuple(sequence_weights.shape)}"
        )
    if not sequence_weights.is_floating_point():
        raise TypeError(f"sequence_weights must be floating point, got {sequence_weights.dtype}")
    if sequence_weights.device != like.device:
        raise ValueError(
            f"sequence_weights must be on {like.device}, got {sequence_weights.device}"
        )
    if sequence_weights.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "sequence_weights must not require a gradient, got requires_grad=True; "
            "pass sequence_weights.detach()"
        )


# ------------------------------------------------------------------ reference: CPU path and oracle


@define_op("tokenpack::token_targets")
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
    if cu_seqlens is None and sequence_weights is None and not shift and not per_sequence:
        # Each token stands for itself, as in the loss of every patched model.
        valid = labels != ignore_index
        _check_targets(labels, valid, num_classes, ignore_index)
        return labels.masked_fill(~valid, -1).to(torch.int32), valid.to(dtype)
    total = labels.numel()
    if cu_seqlens is None:
        bounds = torch.tensor([0, total], device=labels.device)
    else:
        bounds = cu_seqlens.long()
    lengths = bounds.diff()
    if int(bounds[0]) != 0 or int(bounds[-1]) != total or bool((lengths < 0).any()):
        raise ValueError(
            f"cu_seqlens must start at 0, not decrease, and end at total_tokens = {total}, "
            f"got {bounds.tolist()!s:.80}"
        )
    sequence = torch.arange(lengths.numel(), device=labels.device).repeat_interleave(lengths)
    targets = labels.long()
    if shift:
        targets = torch.nn.functional.pad(targets, (0, 1), value=ignore_index)[1:]
        is_last = torch.zeros(total, dtype=torch.bool, device=labels.device)
        is_last[bounds[1:][lengths > 0] - 1] = True
        targets.masked_fill_(is_last, ignore_index)
    valid = targets != ignore_index
    _check_targets(targets, valid, num_classes, ignore_index)
    token_weight = lengths.new_ones(lengths.numel(), dtype=dtype)  # [num_seqs]
    if sequence_weights is not None:
        token_weight = sequence_weights.to(dtype)
    if per_sequence:
        counts = torch.zeros_like(lengths).index_add_(0, sequence, valid.long())
        token_weight = token_weight / counts.clamp(min=1)
    weights = torch.where(valid, token_weight[sequence], 0.0)
    return targets.masked_fill(~valid, -1).to(torch.int32), weights


def _check_targets(targets: Tensor, valid: Tensor, num_classes: int, ignore_index: int) -> None:
    if not targets.numel():
        return
    smallest, largest = map(int, targets.where(valid, 0).aminmax())
    if smallest < 0 or largest >= num_classes:
        invalid = valid & ((targets < 0) | (targets >= num_classes))
        raise ValueError(
            f"labels must be from 0 to {num_classes - 1} or ignore_index = {ignore_index}, "
            f"got {int(targets[invalid][0])}"
        )


# ------------------------------------------------------------------------------------------ Triton


@triton.jit
def _load_label(labels, token, end, ignore_index, SHIFT: tl.constexpr):
    """[BLOCK] the target of each token, or ``ignore_index`` beyond the end of the sequence."""
    source = token + SHIFT
    return tl.load(labels + source, mask=source < end, other=ignore_index).to(tl.int64)


@triton.jit(do_not_specialize=["total_tokens", "num_classes", "ignore_index"])
def _token_targets_kernel(
    labels,
    cu_seqlens,
    sequence_weights,
    targets,
    weights,
    valid,
    total_tokens,
    num_classes,
    ignore_index,
    BOUNDED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SHIFT: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program handles one sequence, or BLOCK tokens if not BOUNDED.

    ``valid[seq]`` is 1 if the labels and the boundaries of the sequence are valid, else 0.
    """
    seq = tl.program_id(0)
    if BOUNDED:
        start = tl.load(cu_seqlens + seq).to(tl.int64)
        end = tl.load(cu_seqlens + seq + 1).to(tl.int64)
        is_first, is_last = seq == 0, seq == tl.num_programs(0) - 1
        misplaced = (start < 0) | (end < start) | (end > total_tokens)
        misplaced |= (is_first & (start != 0)) | (is_last & (end != total_tokens))
        # Stay within the tensors even if the boundaries are invalid.
        start = tl.maximum(start, 0)
        end = tl.minimum(end, total_tokens)
    else:
        start = seq.to(tl.int64) * BLOCK
        end = tl.minimum(start + BLOCK, total_tokens)
        misplaced = end < start
    token_weight = tl.full([], 1.0, weights.dtype.element_ty)
    if WEIGHTED:
        token_weight = tl.load(sequence_weights + seq).to(weights.dtype.element_ty)
    if PER_SEQUENCE:
        counts = tl.zeros([BLOCK], tl.int32)
        for first in range(start, end, BLOCK):
            token = first + tl.arange(0, BLOCK)
            label = _load_label(labels, token, end, ignore_index, SHIFT)
            counts += (label != ignore_index).to(tl.int32)
        token_weight = token_weight / tl.maximum(tl.sum(counts), 1).to(token_weight.dtype)
    invalid = tl.zeros([BLOCK], tl.int32)
    for first in range(start, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        label = _load_label(labels, token, end, ignore_index, SHIFT)
        is_valid = label != ignore_index
        invalid |= (is_valid & ((label < 0) | (label >= num_classes))).to(tl.int32)
        target = tl.where(is_valid, label, -1).to(tl.int32)
        tl.store(targets + token, target, mask=token < end)
        tl.store(weights + token, tl.where(is_valid, token_weight, 0.0), mask=token < end)
    tl.store(valid + seq, (misplaced.to(tl.int32) + tl.sum(invalid) == 0).to(tl.int32))


_BLOCK = 1024  # tokens


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
    """The op ``token_targets`` in one launch, and a device-side assertion on its input."""
    targets = torch.empty_like(labels, dtype=torch.int32)
    weights = torch.empty_like(labels, dtype=dtype)
    total_tokens = labels.numel()
    programs = -(-total_tokens // _BLOCK) if cu_seqlens is None else cu_seqlens.numel() - 1
    valid = targets.new_empty(programs)
    # An absent tensor is replaced by one that the kernel does not read.
    offsets = labels if cu_seqlens is None else cu_seqlens.contiguous()
    of_seqs = weights if sequence_weights is None else sequence_weights.contiguous()
    kernel = _targets_kernel(
        (labels.device, labels.dtype, offsets.dtype, of_seqs.dtype, dtype),
        num_classes,
        ignore_index,
        cu_seqlens is not None,
        sequence_weights is not None,
        shift,
        per_sequence,
    )
    tensors = (labels.contiguous(), offsets, of_seqs, targets, weights, valid)
    kernel((programs, 1), tensors, (total_tokens,))
    torch._assert_async(
        valid if programs == 1 else valid.all(),
        f"labels must be from 0 to {num_classes - 1} or ignore_index = {ignore_index}, and "
        f"cu_seqlens must start at 0, not decrease, and end at total_tokens = {total_tokens}",
    )
    return targets, weights


# As few as the heads of a process.
@functools.lru_cache(maxsize=64)
def _targets_kernel(
    types: tuple[torch.device | torch.dtype, ...],
    num_classes: int,
    ignore_index: int,
    bounded: bool,
    weighted: bool,
    shift: bool,
    per_sequence: bool,
) -> PreparedKernel:
    """The kernel for tensors of these types on this device."""
    tensors = ("labels", "cu_seqlens", "sequence_weights", "targets", "weights", "valid")
    constants = {
        "num_classes": num_classes,
        "ignore_index": ignore_index,
        "BOUNDED": bounded,
        "WEIGHTED": weighted,
        "SHIFT": int(shift),
        "PER_SEQUENCE": per_sequence,
        "BLOCK": _BLOCK,
        "num_warps": 4,
    }
    return PreparedKernel(_token_targets_kernel, tensors, ("total_tokens",), constants)


@_token_targets.register_fake
def _(
    labels, cu_seqlens, sequence_weights, num_classes, shift, per_sequence, ignore_index, dtype
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(labels, dtype=torch.int32), torch.empty_like(labels, dtype=dtype)
