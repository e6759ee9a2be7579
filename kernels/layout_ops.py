"""The ops that lay out a batch: from a mask, from boundaries, from position ids.

Each op returns ``cu_seqlens``, ``indices``, ``position_ids`` and ``sizes``. All are int32, and
their shapes do not depend on values. ``sizes`` holds total_tokens and max_seqlen. If the op has to
find the number of sequences, it holds num_seqs and max_seqlen instead.

The references run on the CPU and raise on an invalid value. The kernels in `layout_kernels` cannot
raise: they write -1 to ``sizes[0]``, and the caller then raises with one of the ``raise_*``
functions below.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch
from torch import Tensor

from ._launch import PreparedKernel
from ._ops import define_op, on_triton
from ._triton import triton
from .layout_kernels import (
    _boundary_layout_kernel,
    _mask_layout_kernel,
    _position_counts_kernel,
    _position_layout_kernel,
    _row_lengths_kernel,
)

INT32_MAX = 2**31 - 1

Layout = tuple[Tensor, Tensor, Tensor, Tensor]

# ----------------------------------------------------------------- references: CPU path and oracle


@define_op("tokenpack::mask_layout")
def mask_layout(mask: Tensor, total_tokens: int | None) -> Layout:
    """The op: the layout of a mask."""
    cu_seqlens, indices, positions, longest = mask_layout_reference(mask, total_tokens)
    # Without total_tokens, the output has room for every slot of the mask.
    unused = 0 if total_tokens is not None else mask.numel() - indices.numel()
    return (
        cu_seqlens,
        torch.nn.functional.pad(indices, (0, unused)),
        torch.nn.functional.pad(positions, (0, unused)),
        _sizes(indices.numel(), longest, mask),
    )


def mask_layout_reference(
    mask: Tensor, total_tokens: int | None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """cu_seqlens, and the indices and positions of the real tokens; the longest length."""
    real = mask != 0
    if mask.dtype != torch.bool and not torch.equal(mask, real.to(mask.dtype)):
        raise_mask_error(mask)
    lengths = real.sum(dim=1, dtype=torch.int32)
    slots = real.flatten().nonzero().squeeze(1)
    indices = slots.to(torch.int32)
    if total_tokens not in (None, indices.numel()):
        raise ValueError(
            f"total_tokens must be the number of ones in attention_mask, {indices.numel()}, "
            f"got {total_tokens}"
        )
    positions = real.cumsum(dim=1, dtype=torch.int32).flatten().index_select(0, slots).sub_(1)
    return _cumulative(lengths), indices, positions, int(lengths.max())


@define_op("tokenpack::boundary_layout")
def boundary_layout(
    boundaries: Tensor, cumulative: bool, total_tokens: int | None, max_seqlen: int | None
) -> Layout:
    """The op: the layout of offsets or lengths."""
    return boundary_layout_reference(boundaries, cumulative, total_tokens, max_seqlen)


def boundary_layout_reference(
    boundaries: Tensor, cumulative: bool, total_tokens: int | None, max_seqlen: int | None
) -> Layout:
    """``cu_seqlens`` and ``sizes``. If both sizes are given, also ``indices`` and ``position_ids``.

    ``boundaries`` are cu_seqlens if ``cumulative``, else lengths.
    """
    wide = boundaries.to(torch.int64)
    lengths = wide.diff() if cumulative else wide
    total, longest = int(lengths.sum()), int(lengths.max())
    if (cumulative and int(wide[0]) != 0) or int(lengths.min()) < 0 or total > INT32_MAX:
        raise_boundary_error(boundaries, cumulative)
    cu_seqlens = wide.to(torch.int32) if cumulative else _cumulative(lengths)
    if cu_seqlens is boundaries:
        cu_seqlens = boundaries.clone()  # an op must not return its input
    if total_tokens is None or max_seqlen is None:
        empty = cu_seqlens.new_empty(0)
        return cu_seqlens, empty, empty.clone(), _sizes(total, longest, boundaries)
    sequence = torch.arange(lengths.numel(), dtype=torch.int32, device=boundaries.device)
    sequence = sequence.repeat_interleave(lengths)  # [total_tokens]
    tokens = torch.arange(total, dtype=torch.int32, device=boundaries.device)
    positions = tokens - cu_seqlens[sequence]
    indices = sequence * max_seqlen + positions
    return cu_seqlens, indices, positions, _sizes(total, longest, boundaries)


@define_op("tokenpack::position_layout")
def position_layout(position_ids: Tensor) -> Layout:
    """The op: the layout of sequences that begin at each position 0."""
    flat = position_ids.flatten().to(torch.int64)
    starts = flat == 0
    continues = flat[1:] == flat[:-1] + 1
    row_starts = starts.view(-1, position_ids.shape[-1])[:, 0]
    if not bool((continues | starts[1:]).all()) or not bool(row_starts.all()):
        raise_position_error(position_ids)
    first = starts.nonzero().squeeze(1)  # [num_seqs]
    longest = int(flat.max()) + 1
    sequence = starts.cumsum(0) - 1  # [total_tokens]
    unused = flat.numel() + 1 - first.numel()
    cu_seqlens = torch.nn.functional.pad(first, (0, unused), value=flat.numel())
    return (
        cu_seqlens.to(torch.int32),
        (sequence * longest + flat).to(torch.int32),
        flat.to(torch.int32),
        _sizes(first.numel(), longest, position_ids),
    )


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _sizes(count: int, longest: int, like: Tensor) -> Tensor:
    return torch.tensor([count, longest], dtype=torch.int32, device=like.device)


# --------------------------------------------------------------------------------------- launches

# Up to these sizes every program scans the whole batch, which takes about 10 us.
_ONE_LAUNCH_SLOTS = 2**16
_ONE_LAUNCH_SEQS = 2**12
_MANY_ROWS = 2048  # from this number on, a program lays out 32 rows instead of 1


@on_triton(mask_layout)
def mask_layout_triton(mask: Tensor, total_tokens: int | None) -> Layout:
    """The op ``mask_layout``: one launch up to 65,536 slots, else two."""
    mask = mask.contiguous()
    rows, columns = mask.shape
    capacity = rows * columns if total_tokens is None else total_tokens
    cu_seqlens, indices, position_ids, sizes = _new_int32(mask, rows + 1, capacity, capacity, 2)
    block_rows, block_columns = (32, 64) if rows >= _MANY_ROWS else (1, 1024)
    grid = (triton.cdiv(rows, block_rows),)
    two_launches = rows * columns > _ONE_LAUNCH_SLOTS
    lengths = sizes  # a placeholder: not read
    if two_launches:
        (lengths,) = _new_int32(mask, rows)
        _row_lengths_kernel[grid](
            mask=mask,
            lengths=lengths,
            num_rows=rows,
            columns=columns,
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            num_warps=4,
        )
    kernel = _mask_kernel((mask.device, mask.dtype), two_launches, block_rows, block_columns)
    tensors = (mask, lengths, cu_seqlens, indices, position_ids, sizes)
    kernel((*grid, 1), tensors, (rows, columns, capacity, total_tokens or 0))
    return cu_seqlens, indices, position_ids, sizes


@functools.cache
def _mask_kernel(
    types: tuple[torch.device, torch.dtype],
    two_launches: bool,
    block_rows: int,
    block_columns: int,
) -> PreparedKernel:
    """The kernel for masks of this type on this device."""
    tensors = ("mask", "lengths", "cu_seqlens", "indices", "position_ids", "sizes")
    sizes = ("num_rows", "columns", "capacity", "expected_tokens")
    constants = {
        "HAS_LENGTHS": two_launches,
        "BLOCK_ROWS": block_rows,
        "BLOCK_COLUMNS": block_columns,
        "SCAN_ROWS": 1024 if two_launches else 16,
        "SCAN_COLUMNS": 256,
        "num_warps": 4,
    }
    return PreparedKernel(_mask_layout_kernel, tensors, sizes, constants)


@on_triton(boundary_layout)
def boundary_layout_triton(
    boundaries: Tensor, cumulative: bool, total_tokens: int | None, max_seqlen: int | None
) -> Layout:
    """The op ``boundary_layout``: one launch, or two for lengths of more than 4,096 sequences."""
    num_seqs = boundaries.numel() - cumulative
    sizes_known = total_tokens is not None and max_seqlen is not None
    if not cumulative and sizes_known and num_seqs > _ONE_LAUNCH_SEQS:
        boundaries, *_ = boundary_layout_triton(boundaries, False, None, None)
        cumulative = True
    total = total_tokens if total_tokens is not None and sizes_known else 0
    cu_seqlens, indices, position_ids, sizes = _new_int32(boundaries, num_seqs + 1, total, total, 2)
    _boundary_layout_kernel[(num_seqs,)](
        boundaries=boundaries.contiguous(),
        cu_seqlens=cu_seqlens,
        indices=indices,
        position_ids=position_ids,
        sizes=sizes,
        num_seqs=num_seqs,
        max_seqlen=max_seqlen if sizes_known else 0,
        total_tokens=total,
        CUMULATIVE=cumulative,
        SCAN=not (cumulative and sizes_known),
        BLOCK=1024,
        num_warps=4,
    )
    return cu_seqlens, indices, position_ids, sizes


@on_triton(position_layout)
def position_layout_triton(position_ids: Tensor) -> Layout:
    """The op ``position_layout``: one launch up to 65,536 tokens, else two."""
    total = position_ids.numel()
    columns = position_ids.shape[-1]
    position_ids = position_ids.contiguous()
    cu_seqlens, indices, positions, sizes = _new_int32(position_ids, total + 1, total, total, 2)
    block = 1024
    num_blocks = triton.cdiv(total, block)
    two_launches = total > _ONE_LAUNCH_SLOTS
    counts = sizes  # a placeholder: not read
    if two_launches:
        (counts,) = _new_int32(position_ids, 3 * num_blocks)
        _position_counts_kernel[(num_blocks,)](
            position_ids=position_ids,
            counts=counts,
            total_tokens=total,
            columns=columns,
            BLOCK=block,
            num_warps=4,
        )
    _position_layout_kernel[(num_blocks,)](
        position_ids=position_ids,
        counts=counts,
        cu_seqlens=cu_seqlens,
        indices=indices,
        out_position_ids=positions,
        sizes=sizes,
        total_tokens=total,
        columns=columns,
        num_blocks=num_blocks,
        HAS_COUNTS=two_launches,
        BLOCK=block,
        num_warps=4,
    )
    return cu_seqlens, indices, positions, sizes


def _new_int32(like: Tensor, *lengths: int) -> Any:
    """One uninitialized int32 tensor for each length."""
    return tuple(like.new_empty(length, dtype=torch.int32) for length in lengths)


# ------------------------------------------------------------------------- fakes for torch.compile


@mask_layout.register_fake
def _(mask: Tensor, total_tokens: int | None) -> Layout:
    capacity = mask.numel() if total_tokens is None else total_tokens
    return _new_int32(mask, mask.shape[0] + 1, capacity, capacity, 2)


@boundary_layout.register_fake
def _(
    boundaries: Tensor, cumulative: bool, total_tokens: int | None, max_seqlen: int | None
) -> Layout:
    total = 0 if total_tokens is None or max_seqlen is None else total_tokens
    return _new_int32(boundaries, boundaries.numel() + 1 - cumulative, total, total, 2)


@position_layout.register_fake
def _(position_ids: Tensor) -> Layout:
    total = position_ids.numel()
    return _new_int32(position_ids, total + 1, total, total, 2)


# ------------------------------------------------------------------- errors, found on the host


def raise_mask_error(mask: Tensor) -> NoReturn:
    """Raise for the first value that is neither 0 nor 1."""
    invalid = mask[(mask != 0) & (mask != 1)][0].item()
    raise ValueError(f"attention_mask must hold only 0 and 1, got {invalid}")


def raise_boundary_error(boundaries: Tensor, cumulative: bool) -> NoReturn:
    """Raise for invalid cu_seqlens if ``cumulative``, else for invalid lengths."""
    values = boundaries.to("cpu", torch.int64)
    if not cumulative:
        if int(values.min()) < 0:
            at = int(values.argmin())
            raise ValueError(f"lengths must not be negative, got {int(values[at])} at index {at}")
        raise ValueError(f"lengths must sum to less than 2**31, got {int(values.sum())}")
    if int(values[0]) != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {int(values[0])}")
    steps = values.diff()
    if int(steps.min()) < 0:
        at = int(steps.argmin())
        raise ValueError(
            f"cu_seqlens must not decrease, got {int(values[at])} then {int(values[at + 1])} "
            f"at index {at + 1}"
        )
    raise ValueError(f"cu_seqlens must end below 2**31, got {int(values[-1])}")


def raise_position_error(position_ids: Tensor) -> NoReturn:
    """Raise for the first position that neither starts nor continues a sequence."""
    row_starts = position_ids.reshape(-1, position_ids.shape[-1])[:, 0]
    if bool((row_starts != 0).any()):
        first = int(row_starts[row_starts != 0][0])
        raise ValueError(f"position_ids must start at 0 in every row, got {first}")
    flat = position_ids.flatten().to(torch.int64)
    valid = (flat[1:] == flat[:-1] + 1) | (flat[1:] == 0)
    at = int(valid.logical_not().nonzero()[0]) + 1
    raise ValueError(
        "position_ids must increase by one or restart at 0, "
        f"got {int(flat[at - 1])} then {int(flat[at])} at index {at}"
    )
