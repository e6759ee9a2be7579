"""Take the ids and labels of a padded batch's real tokens in one launch.

    tokens[t] = ids.flatten()[indices[t]],  columns[t] = indices[t] % num_columns,
    targets[t] = labels.flatten()[indices[t] + shift],  -100 after the end of a row

`unpad` moves rows of any kind. This op also shifts the labels, finds each token's column, and
counts the labels, so that the caller can tell whether a padded slot has one. These would be ten
small operations, and the host takes longer to start one than a GPU takes to run it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ._launch import PreparedKernel
from ._ops import define_op, on_triton, run
from ._triton import tl, triton
from .layout import PackedLayout, require_padded_form

_IGNORE_INDEX = -100


class TakenTokens(NamedTuple):
    """The real tokens of a padded batch.

    Attributes:
        tokens: ``(total_tokens,)``, the ids.
        targets: ``(total_tokens,)``, the label of each token, or of the next slot in its row.
        columns: ``(total_tokens,)`` int64, the column of each token in the padded batch.
        counts: ``(2,)`` int32 on the device: how many labels of the batch are not -100, and how
            many targets. They differ if the label of a padded slot is not -100.
    """

    tokens: Tensor
    targets: Tensor
    columns: Tensor
    counts: Tensor


def take_tokens(
    ids: Tensor, labels: Tensor, layout: PackedLayout, *, shift: bool = False
) -> TakenTokens:
    """Take the ids and labels of the real tokens. This does not wait for the device.

    Args:
        ids: ``(rows, columns)`` integers.
        labels: ``(rows, columns)`` integers. -100 marks slots without a target.
        layout: the layout of the padded batch, on the same device.
        shift: the target of a slot is the label of the next slot in its row, as in causal models.

    Raises:
        ValueError: the shape of ids or labels is not ``layout.padded_shape``, or one of them is on
            another device.
    """
    require_padded_form(layout)
    for name, tensor in (("ids", ids), ("labels", labels)):
        if tensor.shape != layout.padded_shape:
            raise ValueError(f"{name} must be {layout.padded_shape}, got {tuple(tensor.shape)}")
        if tensor.device != layout.device:
            raise ValueError(f"{name} must be on {layout.device}, got {tensor.device}")
    return TakenTokens(*run(_take_tokens, ids, labels, layout.indices, shift))


def shift_left(labels: Tensor) -> Tensor:
    """The label of the next slot for each slot; -100 at the end of a row. ``(rows, columns)``."""
    return torch.nn.functional.pad(labels, (0, 1), value=_IGNORE_INDEX)[:, 1:]


def count_labels(labels: Tensor, targets: Tensor) -> Tensor:
    """``(2,)``, how many labels are not -100: of all slots, and of the real tokens."""
    return torch.stack([(values != _IGNORE_INDEX).sum() for values in (labels, targets)])


# ------------------------------------------------------------------ reference: CPU path and oracle


@define_op("tokenpack::take_tokens")
def _take_tokens(
    ids: Tensor, labels: Tensor, indices: Tensor, shift: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, columns = ids.flatten().index_select(0, indices), indices.long() % ids.shape[1]
    labels = shift_left(labels) if shift else labels
    targets = labels.flatten().index_select(0, indices)
    return tokens, targets, columns, count_labels(labels, targets).to(torch.int32)


# ------------------------------------------------------------------------------------------ Triton


@triton.jit(do_not_specialize=["total_tokens", "num_slots", "num_columns", "num_blocks"])
def _take_tokens_kernel(
    ids,
    labels,
    indices,
    tokens,
    targets,
    columns,
    counts,
    total_tokens,
    num_slots,
    num_columns,
    num_blocks,
    SHIFT: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program takes BLOCK tokens, and counts the labels of as many slots."""
    block = tl.program_id(0)
    entry = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_token = entry < total_tokens
    slot = tl.load(indices + entry, mask=is_token, other=0)
    column = slot % num_columns
    tl.store(columns + entry, column.to(tl.int64), mask=is_token)
    tl.store(tokens + entry, tl.load(ids + slot, mask=is_token), mask=is_token)
    has_target = is_token & (column + SHIFT < num_columns)
    target = tl.load(labels + slot + SHIFT, mask=has_target, other=IGNORE_INDEX)
    tl.store(targets + entry, target, mask=is_token)
    # A shifted row drops its first label.
    is_label = (entry < num_slots) & (entry % num_columns >= SHIFT)
    label = tl.load(labels + entry, mask=is_label, other=IGNORE_INDEX)
    tl.store(counts + block, tl.sum((label != IGNORE_INDEX).to(tl.int32)))
    taken = tl.sum((target != IGNORE_INDEX).to(tl.int32))
    tl.store(counts + num_blocks + block, taken)


_BLOCK = 1024


@on_triton(_take_tokens)
def take_tokens_triton(
    ids: Tensor, labels: Tensor, indices: Tensor, shift: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``take_tokens`` in one launch, and one that adds the counts of a large batch."""
    total_tokens, num_slots = indices.numel(), ids.numel()
    tokens, columns = ids.new_empty(total_tokens), ids.new_empty(total_tokens, dtype=torch.int64)
    targets = labels.new_empty(total_tokens)
    num_blocks = triton.cdiv(num_slots, _BLOCK)
    counts = indices.new_empty((2, num_blocks))
    kernel = _kernel((ids.device, ids.dtype, labels.dtype), shift)
    tensors = (ids.contiguous(), labels.contiguous(), indices, tokens, targets, columns, counts)
    kernel((num_blocks, 1), tensors, (total_tokens, num_slots, ids.shape[1], num_blocks))
    return tokens, targets, columns, counts.view(2) if num_blocks == 1 else counts.sum(1).int()


@functools.cache
def _kernel(types: tuple[torch.device | torch.dtype, ...], shift: bool) -> PreparedKernel:
    """The kernel for ids and labels of these types on this device."""
    tensors = ("ids", "labels", "indices", "tokens", "targets", "columns", "counts")
    sizes = ("total_tokens", "num_slots", "num_columns", "num_blocks")
    constants = {
        "SHIFT": int(shift),
        "IGNORE_INDEX": _IGNORE_INDEX,
        "BLOCK": _BLOCK,
        "num_warps": 4,
    }
    return PreparedKernel(_take_tokens_kernel, tensors, sizes, constants)


@_take_tokens.register_fake
def _(
    ids: Tensor, labels: Tensor, indices: Tensor, shift: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total_tokens = indices.shape[0]
    return (
        ids.new_empty(total_tokens),
        labels.new_empty(total_tokens),
        ids.new_empty(total_tokens, dtype=torch.int64),
        ids.new_empty(2, dtype=torch.int32),
    )
