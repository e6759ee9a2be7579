"""The ops that lay out a batch: from a mask, from boundaries, from position ids.

Each returns ``cu_seqlens``, ``indices``, ``position_ids`` and ``sizes``, all int32, in tensors
whose shapes are known beforehand. ``sizes`` is total_tokens and max_seqlen, or where the number of
sequences is what is found out, num_seqs and max_seqlen. A kernel that meets a wrong value writes -1
in front; a reference raises at once.

Every program of a kernel needs to know what comes before its own part. In a small batch each counts
that for itself: reading a few kilobytes again costs less than another launch. In a large one a
first launch counts.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ._triton import on_triton, tl, triton

INT32_MAX = 2**31 - 1

Layout = tuple[Tensor, Tensor, Tensor, Tensor]

# ----------------------------------------------------------------- references: CPU path and oracle


@torch.library.custom_op("tokenpack::mask_layout", mutates_args=())
def _mask_layout(mask: Tensor, total_tokens: int | None) -> Layout:
    real = mask != 0
    if mask.dtype != torch.bool and bool((real & (mask != 1)).any()):
        refuse_mask(mask)
    lengths = real.sum(dim=1, dtype=torch.int32)
    indices = real.flatten().nonzero().squeeze(1).to(torch.int32)
    if total_tokens not in (None, indices.numel()):
        raise ValueError(f"total_tokens must be the mask's {indices.numel()}, got {total_tokens}")
    positions = real.cumsum(dim=1, dtype=torch.int32).sub_(1)[real]
    room = 0 if total_tokens is not None else mask.numel() - indices.numel()
    return (
        _cumulative(lengths),
        torch.nn.functional.pad(indices, (0, room)),
        torch.nn.functional.pad(positions, (0, room)),
        _sizes(indices.numel(), int(lengths.max()), mask),
    )


@torch.library.custom_op("tokenpack::boundary_layout", mutates_args=())
def _boundary_layout(
    given: Tensor, cumulative: bool, total_tokens: int | None, max_seqlen: int | None
) -> Layout:
    return boundary_layout_reference(given, cumulative, total_tokens, max_seqlen)


def boundary_layout_reference(
    given: Tensor, cumulative: bool, total_tokens: int | None, max_seqlen: int | None
) -> Layout:
    """The boundaries and their sizes, and with the sizes given, the tokens too."""
    wide = given.to(torch.int64)
    lengths = wide.diff() if cumulative else wide
    total, longest = int(lengths.sum()), int(lengths.max())
    if (cumulative and int(wide[0]) != 0) or int(lengths.min()) < 0 or total > INT32_MAX:
        refuse_boundaries(given, cumulative)
    cu_seqlens = wide.to(torch.int32) if cumulative else _cumulative(lengths)
    if cu_seqlens is given:
        cu_seqlens = given.clone()  # an op may not return what it was given
    if total_tokens is None or max_seqlen is None:
        nothing = cu_seqlens.new_empty(0)
        return cu_seqlens, nothing, nothing.clone(), _sizes(total, longest, given)
    sequence = torch.arange(lengths.numel(), dtype=torch.int32, device=given.device)
    sequence = sequence.repeat_interleave(lengths)  # [total_tokens]
    tokens = torch.arange(total, dtype=torch.int32, device=given.device)
    positions = tokens - cu_seqlens[sequence]
    indices = sequence * max_seqlen + positions
    return cu_seqlens, indices, positions, _sizes(total, longest, given)


@torch.library.custom_op("tokenpack::position_layout", mutates_args=())
def _position_layout(position_ids: Tensor) -> Layout:
    flat = position_ids.flatten().to(torch.int64)
    starts = flat == 0
    rises = flat[1:] == flat[:-1] + 1
    rows_start = starts.view(-1, position_ids.shape[-1])[:, 0]
    if not bool((rises | starts[1:]).all()) or not bool(rows_start.all()):
        refuse_position_ids(position_ids)
    first = starts.nonzero().squeeze(1)
    longest = int(flat.max()) + 1
    sequence = starts.cumsum(0) - 1
    return (
        torch.nn.functional.pad(
            first, (0, flat.numel() + 1 - first.numel()), value=flat.numel()
        ).to(torch.int32),
        (sequence * longest + flat).to(torch.int32),
        flat.to(torch.int32),
        _sizes(first.numel(), longest, position_ids),
    )


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _sizes(count: int, longest: int, like: Tensor) -> Tensor:
    return torch.tensor([count, longest], dtype=torch.int32, device=like.device)


# ------------------------------------------------------------------------------------------ Triton


@triton.jit
def _row_lengths(
    mask, row, num_rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """[BLOCK_ROWS] how many slots of each row are real, -1 if one holds neither 0 nor 1."""
    length = tl.zeros([BLOCK_ROWS], tl.int32)
    wrong = tl.zeros([BLOCK_ROWS], tl.int32)
    for first in range(0, columns, BLOCK_COLUMNS):
        column = first + tl.arange(0, BLOCK_COLUMNS)
        inside = (row < num_rows)[:, None] & (column < columns)[None, :]
        slot = tl.load(mask + row[:, None] * columns + column[None, :], mask=inside, other=0)
        real = slot != 0
        length += tl.sum(real.to(tl.int32), 1)
        wrong += tl.sum((real & (slot != 1)).to(tl.int32), 1)
    return tl.where(wrong > 0, -1, length)


@triton.jit(do_not_specialize=["num_rows", "columns"])
def _row_lengths_kernel(
    mask, lengths, num_rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    length = _row_lengths(mask, row, num_rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    tl.store(lengths + row, length, mask=row < num_rows)


@triton.jit(do_not_specialize=["num_rows", "columns", "capacity", "promised"])
def _mask_layout_kernel(
    mask,
    lengths,
    cu_seqlens,
    indices,
    position_ids,
    sizes,
    num_rows,
    columns,
    capacity,
    promised,
    COUNTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    SCAN_ROWS: tl.constexpr,
    SCAN_COLUMNS: tl.constexpr,
):
    # Every program counts the whole batch, or reads what was counted: it needs the rows before its
    # own, and whoever comes first tells the host about all.
    first_row = tl.program_id(0) * BLOCK_ROWS
    before = tl.zeros([SCAN_ROWS], tl.int32)
    total = tl.zeros([SCAN_ROWS], tl.int32)
    longest = tl.zeros([SCAN_ROWS], tl.int32)
    shortest = tl.zeros([SCAN_ROWS], tl.int32)
    for first in range(0, num_rows, SCAN_ROWS):
        other = first + tl.arange(0, SCAN_ROWS)
        if COUNTED:
            length = tl.load(lengths + other, mask=other < num_rows, other=0)
        else:
            length = _row_lengths(mask, other, num_rows, columns, SCAN_ROWS, SCAN_COLUMNS)
        before += tl.where(other < first_row, length, 0)
        total += length
        longest = tl.maximum(longest, length)
        shortest = tl.minimum(shortest, length)
    total_tokens = tl.sum(total)

    row = first_row + tl.arange(0, BLOCK_ROWS)  # [BR]
    if COUNTED:
        length = tl.load(lengths + row, mask=row < num_rows, other=0)
    else:
        length = _row_lengths(mask, row, num_rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    end = tl.sum(before) + tl.cumsum(length, 0)
    start = end - length
    tl.store(cu_seqlens + row + 1, end, mask=row < num_rows)
    if first_row == 0:
        tl.store(cu_seqlens, 0)
        tl.store(sizes, tl.where(tl.min(shortest) < 0, -1, total_tokens))
        tl.store(sizes + 1, tl.max(longest))
        # Promised too much: what is left shall not point anywhere.
        for first in range(total_tokens, promised, SCAN_ROWS):
            token = first + tl.arange(0, SCAN_ROWS)
            left = (token >= 0) & (token < promised)
            tl.store(indices + token, tl.zeros([SCAN_ROWS], tl.int32), mask=left)
            tl.store(position_ids + token, tl.zeros([SCAN_ROWS], tl.int32), mask=left)

    next_token = start
    for first in range(0, columns, BLOCK_COLUMNS):
        column = first + tl.arange(0, BLOCK_COLUMNS)
        inside = (row < num_rows)[:, None] & (column < columns)[None, :]
        slot = row[:, None] * columns + column[None, :]  # [BR, BC]
        real = (tl.load(mask + slot, mask=inside, other=0) != 0).to(tl.int32)
        token = next_token[:, None] + tl.cumsum(real, 1) - 1
        keep = (real > 0) & (token >= 0) & (token < capacity)
        tl.store(indices + token, slot, mask=keep)
        tl.store(position_ids + token, token - start[:, None], mask=keep)
        next_token += tl.sum(real, 1)


@triton.jit(do_not_specialize=["num_seqs", "max_seqlen", "total_tokens"])
def _boundary_layout_kernel(
    given,
    cu_seqlens,
    indices,
    position_ids,
    sizes,
    num_seqs,
    max_seqlen,
    total_tokens,
    CUMULATIVE: tl.constexpr,
    SCAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program for each sequence, which writes its tokens.
    seq = tl.program_id(0)
    if CUMULATIVE:
        start = tl.load(given + seq).to(tl.int64)
        length = tl.load(given + seq + 1).to(tl.int64) - start
    else:
        start = tl.zeros([], tl.int64)
        length = tl.load(given + seq).to(tl.int64)
    if SCAN:
        before = tl.zeros([BLOCK], tl.int64)
        total = tl.zeros([BLOCK], tl.int64)
        longest = tl.zeros([BLOCK], tl.int64)
        shortest = tl.zeros([BLOCK], tl.int64)
        for first in range(0, num_seqs, BLOCK):
            other = first + tl.arange(0, BLOCK)
            inside = other < num_seqs
            if CUMULATIVE:
                begin = tl.load(given + other, mask=inside, other=0).to(tl.int64)
                long = tl.load(given + other + 1, mask=inside, other=0).to(tl.int64) - begin
            else:
                long = tl.load(given + other, mask=inside, other=0).to(tl.int64)
            before += tl.where(other < seq, long, 0)
            total += long
            longest = tl.maximum(longest, long)
            shortest = tl.minimum(shortest, long)
        if CUMULATIVE:
            wrong = (tl.min(shortest) < 0) | (tl.load(given) != 0)
        else:
            wrong = tl.min(shortest) < 0
            start = tl.sum(before)
        if seq == 0:
            counted = tl.sum(total)
            wrong |= counted > 2147483647
            tl.store(sizes, tl.where(wrong, -1, counted).to(tl.int32))
            tl.store(sizes + 1, tl.max(longest).to(tl.int32))
    tl.store(cu_seqlens + seq + 1, (start + length).to(tl.int32))
    if seq == 0:
        tl.store(cu_seqlens, 0)
    # Nonsense shall not keep the device busy: no sequence is longer than all of them.
    for first in range(0, tl.minimum(length, total_tokens), BLOCK):
        position = first + tl.arange(0, BLOCK)
        token = start + position
        inside = (position < length) & (token >= 0) & (token < total_tokens)
        position = position.to(tl.int32)
        tl.store(indices + token, seq * max_seqlen + position, mask=inside)
        tl.store(position_ids + token, position, mask=inside)


@triton.jit
def _look_at_positions(position_ids, first, total_tokens, columns, BLOCK: tl.constexpr):
    """[BLOCK] where sequences start, positions, and where they neither start nor go on."""
    token = first + tl.arange(0, BLOCK)
    inside = token < total_tokens
    position = tl.load(position_ids + token, mask=inside, other=-1)
    previous = tl.load(position_ids + token - 1, mask=inside & (token > 0), other=-1)
    starts = position == 0
    goes_on = (position == previous + 1) & (token % columns != 0)
    return starts, position, inside & ~starts & ~goes_on


@triton.jit(do_not_specialize=["total_tokens", "columns"])
def _position_counts_kernel(position_ids, counts, total_tokens, columns, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    starts, position, wrong = _look_at_positions(
        position_ids, block * BLOCK, total_tokens, columns, BLOCK
    )
    tl.store(counts + 3 * block, tl.sum(starts.to(tl.int32)))
    tl.store(counts + 3 * block + 1, tl.max(position).to(tl.int32))
    tl.store(counts + 3 * block + 2, tl.sum(wrong.to(tl.int32)))


@triton.jit(do_not_specialize=["total_tokens", "columns", "num_blocks"])
def _position_layout_kernel(
    position_ids,
    counts,
    cu_seqlens,
    indices,
    out_position_ids,
    sizes,
    total_tokens,
    columns,
    num_blocks,
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    before = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.int32)
    largest = tl.zeros([BLOCK], tl.int64)
    wrongs = tl.zeros([BLOCK], tl.int32)
    if COUNTED:
        for first in range(0, num_blocks, BLOCK):
            other = first + tl.arange(0, BLOCK)
            inside = other < num_blocks
            starts = tl.load(counts + 3 * other, mask=inside, other=0)
            total += starts
            before += tl.where(other < block, starts, 0)
            position = tl.load(counts + 3 * other + 1, mask=inside, other=0)
            largest = tl.maximum(largest, position.to(tl.int64))
            wrongs += tl.load(counts + 3 * other + 2, mask=inside, other=0)
    else:
        for other in range(0, num_blocks):
            starting, position, wrong = _look_at_positions(
                position_ids, other * BLOCK, total_tokens, columns, BLOCK
            )
            starts = starting.to(tl.int32)
            total += starts
            before += tl.where(other < block, starts, 0)
            largest = tl.maximum(largest, position.to(tl.int64))
            wrongs += wrong.to(tl.int32)
    longest = tl.max(largest) + 1
    if block == 0:
        num_seqs = tl.sum(total)
        tl.store(sizes, tl.where(tl.sum(wrongs) > 0, -1, num_seqs))
        tl.store(sizes + 1, longest.to(tl.int32))
        tl.store(cu_seqlens + num_seqs, total_tokens)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < total_tokens
    position = tl.load(position_ids + token, mask=inside, other=1).to(tl.int64)
    starts = (position == 0).to(tl.int32)
    seq = tl.sum(before) + tl.cumsum(starts, 0) - 1
    tl.store(cu_seqlens + seq, token, mask=inside & (starts > 0))
    tl.store(indices + token, (seq * longest + position).to(tl.int32), mask=inside)
    tl.store(out_position_ids + token, position.to(tl.int32), mask=inside)


_ONE_LAUNCH_SLOTS = 2**16  # a batch that each program counts for itself in some 10 us
_ONE_LAUNCH_SEQS = 2**12  # likewise
_MANY_ROWS = 2048  # from here on programs take 32 rows each


@on_triton(_mask_layout)
def mask_layout_triton(mask: Tensor, total_tokens: int | None) -> Layout:
    """The op ``mask_layout``: one launch, or two beyond 65,536 slots."""
    mask = mask.contiguous()
    rows, columns = mask.shape
    capacity = rows * columns if total_tokens is None else total_tokens
    cu_seqlens, indices, position_ids, sizes = _new_int32(mask, rows + 1, capacity, capacity, 2)
    block_rows, block_columns = (32, 128) if rows >= _MANY_ROWS else (1, 1024)
    grid = (triton.cdiv(rows, block_rows),)
    counted = rows * columns > _ONE_LAUNCH_SLOTS
    lengths = sizes  # no more than something to pass
    if counted:
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
    _mask_layout_kernel[grid](
        mask=mask,
        lengths=lengths,
        cu_seqlens=cu_seqlens,
        indices=indices,
        position_ids=position_ids,
        sizes=sizes,
        num_rows=rows,
        columns=columns,
        capacity=capacity,
        promised=0 if total_tokens is None else total_tokens,
        COUNTED=counted,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        SCAN_ROWS=1024 if counted else 16,
        SCAN_COLUMNS=256,
        num_warps=4,
    )
    return cu_seqlens, indices, position_ids, sizes


@on_triton(_boundary_layout)
def boundary_layout_triton(
    given: Tensor, cumulative: bool, total_tokens: int | None, max_seqlen: int | None
) -> Layout:
    """The op ``boundary_layout``: one launch, or two for lengths of more than 4,096 sequences."""
    num_seqs = given.numel() - cumulative
    known = total_tokens is not None and max_seqlen is not None
    if not cumulative and known and num_seqs > _ONE_LAUNCH_SEQS:
        given, *_ = boundary_layout_triton(given, False, None, None)
        cumulative = True
    total = total_tokens if total_tokens is not None and known else 0
    cu_seqlens, indices, position_ids, sizes = _new_int32(given, num_seqs + 1, total, total, 2)
    _boundary_layout_kernel[(num_seqs,)](
        given=given.contiguous(),
        cu_seqlens=cu_seqlens,
        indices=indices,
        position_ids=position_ids,
        sizes=sizes,
        num_seqs=num_seqs,
        max_seqlen=max_seqlen if known else 0,
        total_tokens=total,
        CUMULATIVE=cumulative,
        SCAN=not (cumulative and known),
        BLOCK=1024,
        num_warps=4,
    )
    return cu_seqlens, indices, position_ids, sizes


@on_triton(_position_layout)
def position_layout_triton(position_ids: Tensor) -> Layout:
    """The op ``position_layout``: one launch, or two beyond 65,536 tokens."""
    total = position_ids.numel()
    columns = position_ids.shape[-1]
    position_ids = position_ids.contiguous()
    cu_seqlens, indices, positions, sizes = _new_int32(position_ids, total + 1, total, total, 2)
    block = 1024
    num_blocks = triton.cdiv(total, block)
    counted = total > _ONE_LAUNCH_SLOTS
    counts = sizes
    if counted:
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
        COUNTED=counted,
        BLOCK=block,
        num_warps=4,
    )
    return cu_seqlens, indices, positions, sizes


def _new_int32(like: Tensor, *lengths: int) -> Any:
    """As many int32 tensors, with whatever memory holds."""
    return tuple(like.new_empty(length, dtype=torch.int32) for length in lengths)


# ------------------------------------------------------------------------ what torch.compile needs


@_mask_layout.register_fake
def _(mask: Tensor, total_tokens: int | None) -> Layout:
    capacity = mask.numel() if total_tokens is None else total_tokens
    return _new_int32(mask, mask.shape[0] + 1, capacity, capacity, 2)


@_boundary_layout.register_fake
def _(given: Tensor, cumulative: bool, total_tokens: int | None, max_seqlen: int | None) -> Layout:
    total = 0 if total_tokens is None or max_seqlen is None else total_tokens
    return _new_int32(given, given.numel() + 1 - cumulative, total, total, 2)


@_position_layout.register_fake
def _(position_ids: Tensor) -> Layout:
    total = position_ids.numel()
    return _new_int32(position_ids, total + 1, total, total, 2)


# ---------------------------------------------------------------- what is wrong, said on the host


def refuse_mask(mask: Tensor) -> NoReturn:
    """Raise for the first value that is neither 0 nor 1."""
    wrong = mask[(mask != 0) & (mask != 1)][0].item()
    raise ValueError(f"attention_mask must hold only 0 and 1, got {wrong}")


def refuse_boundaries(given: Tensor, cumulative: bool) -> NoReturn:
    """Raise for what is wrong with lengths or, if ``cumulative``, with ``cu_seqlens``."""
    values = given.to("cpu", torch.int64)
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
            f"cu_seqlens must not fall, got {int(values[at])} then {int(values[at + 1])} "
            f"at index {at + 1}"
        )
    raise ValueError(f"cu_seqlens must end below 2**31, got {int(values[-1])}")


def refuse_position_ids(position_ids: Tensor) -> NoReturn:
    """Raise for the first position that neither starts a sequence nor goes on with one."""
    if bool((position_ids.reshape(-1, position_ids.shape[-1])[:, 0] != 0).any()):
        raise ValueError("position_ids must begin at 0 in every row")
    flat = position_ids.flatten().to(torch.int64)
    goes_on = (flat[1:] == flat[:-1] + 1) | (flat[1:] == 0)
    at = int(goes_on.logical_not().nonzero()[0]) + 1
    raise ValueError(
        "position_ids must rise by one or restart at 0, "
        f"got {int(flat[at - 1])} then {int(flat[at])} at index {at}"
    )
