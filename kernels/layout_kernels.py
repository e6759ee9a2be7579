"""Triton kernels that lay out a batch. Their launchers and references are in `layout_ops`.

Every program needs totals over the part of the batch before its own. In a small batch each program
computes them itself, because reading a few kilobytes again is cheaper than a second launch. For a
large batch, a first launch writes them to memory.

The programs of one launch cannot raise. When a kernel finds an invalid value, it writes -1 to
``sizes[0]``.
"""

from __future__ import annotations

from ._triton import tl, triton

# ---------------------------------------------------------------------------------- from a mask


@triton.jit
def _row_lengths(
    mask, row, num_rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """[BLOCK_ROWS] number of real tokens in each row, or -1 if a value is neither 0 nor 1."""
    length = tl.zeros([BLOCK_ROWS], tl.int32)
    num_invalid = tl.zeros([BLOCK_ROWS], tl.int32)
    for first in range(0, columns, BLOCK_COLUMNS):
        column = first + tl.arange(0, BLOCK_COLUMNS)
        inside = (row < num_rows)[:, None] & (column < columns)[None, :]  # [BR, BC]
        value = tl.load(mask + row[:, None] * columns + column[None, :], mask=inside, other=0)
        real = value != 0
        length += tl.sum(real.to(tl.int32), 1)
        num_invalid += tl.sum((real & (value != 1)).to(tl.int32), 1)
    return tl.where(num_invalid > 0, -1, length)


@triton.jit(do_not_specialize=["num_rows", "columns"])
def _row_lengths_kernel(
    mask, lengths, num_rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BR]
    length = _row_lengths(mask, row, num_rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    tl.store(lengths + row, length, mask=row < num_rows)


@triton.jit(do_not_specialize=["num_rows", "columns", "capacity", "expected_tokens"])
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
    expected_tokens,
    HAS_LENGTHS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    SCAN_ROWS: tl.constexpr,
    SCAN_COLUMNS: tl.constexpr,
):
    """Each program writes the tokens of BLOCK_ROWS rows.

    ``capacity`` is the length of ``indices`` and ``position_ids``. ``expected_tokens`` is the
    caller's total_tokens, or 0 if the caller passed None. ``lengths`` is read if HAS_LENGTHS.
    """
    # Every program scans all rows: it needs the number of tokens before its own rows, and the
    # first program writes the totals.
    first_row = tl.program_id(0) * BLOCK_ROWS
    before = tl.zeros([SCAN_ROWS], tl.int32)
    total = tl.zeros([SCAN_ROWS], tl.int32)
    longest = tl.zeros([SCAN_ROWS], tl.int32)
    shortest = tl.zeros([SCAN_ROWS], tl.int32)
    for first in range(0, num_rows, SCAN_ROWS):
        other = first + tl.arange(0, SCAN_ROWS)
        if HAS_LENGTHS:
            length = tl.load(lengths + other, mask=other < num_rows, other=0)
        else:
            length = _row_lengths(mask, other, num_rows, columns, SCAN_ROWS, SCAN_COLUMNS)
        before += tl.where(other < first_row, length, 0)
        total += length
        longest = tl.maximum(longest, length)
        shortest = tl.minimum(shortest, length)
    total_tokens = tl.sum(total)

    row = first_row + tl.arange(0, BLOCK_ROWS)  # [BR]
    if HAS_LENGTHS:
        length = tl.load(lengths + row, mask=row < num_rows, other=0)
    else:
        length = _row_lengths(mask, row, num_rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    end = tl.sum(before) + tl.cumsum(length, 0)
    start = end - length
    tl.store(cu_seqlens + row + 1, end, mask=row < num_rows)
    if first_row == 0:
        tl.store(cu_seqlens, 0)
        # A length of -1 marks a row with an invalid value.
        tl.store(sizes, tl.where(tl.min(shortest) < 0, -1, total_tokens))
        tl.store(sizes + 1, tl.max(longest))
        # If expected_tokens is too large, fill the rest with 0, which is a valid index.
        for first in range(total_tokens, expected_tokens, SCAN_ROWS):
            token = first + tl.arange(0, SCAN_ROWS)
            rest = (token >= 0) & (token < expected_tokens)
            tl.store(indices + token, tl.zeros([SCAN_ROWS], tl.int32), mask=rest)
            tl.store(position_ids + token, tl.zeros([SCAN_ROWS], tl.int32), mask=rest)

    next_token = start  # [BR] token that the next real slot of each row becomes
    for first in range(0, columns, BLOCK_COLUMNS):
        column = first + tl.arange(0, BLOCK_COLUMNS)
        inside = (row < num_rows)[:, None] & (column < columns)[None, :]
        slot = row[:, None] * columns + column[None, :]  # [BR, BC]
        real = (tl.load(mask + slot, mask=inside, other=0) != 0).to(tl.int32)
        token = next_token[:, None] + tl.cumsum(real, 1) - 1
        # The bounds matter if the mask is invalid or expected_tokens is too small.
        keep = (real > 0) & (token >= 0) & (token < capacity)
        tl.store(indices + token, slot, mask=keep)
        tl.store(position_ids + token, token - start[:, None], mask=keep)
        next_token += tl.sum(real, 1)


# ---------------------------------------------------------------------- from lengths or cu_seqlens


@triton.jit(do_not_specialize=["num_seqs", "max_seqlen", "total_tokens"])
def _boundary_layout_kernel(
    boundaries,
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
    """Each program writes the tokens of one sequence.

    ``boundaries`` are cu_seqlens if CUMULATIVE, else lengths. SCAN reads all of them, to check them
    and to find ``sizes`` and the start of each sequence.
    """
    seq = tl.program_id(0)
    # int64: the sums may exceed int32, which is an error to report.
    if CUMULATIVE:
        start = tl.load(boundaries + seq).to(tl.int64)
        length = tl.load(boundaries + seq + 1).to(tl.int64) - start
    else:
        start = tl.zeros([], tl.int64)
        length = tl.load(boundaries + seq).to(tl.int64)
    if SCAN:
        before = tl.zeros([BLOCK], tl.int64)
        total = tl.zeros([BLOCK], tl.int64)
        longest = tl.zeros([BLOCK], tl.int64)
        shortest = tl.zeros([BLOCK], tl.int64)
        for first in range(0, num_seqs, BLOCK):
            other = first + tl.arange(0, BLOCK)
            inside = other < num_seqs
            if CUMULATIVE:
                begin = tl.load(boundaries + other, mask=inside, other=0).to(tl.int64)
                end = tl.load(boundaries + other + 1, mask=inside, other=0).to(tl.int64)
                other_length = end - begin
            else:
                other_length = tl.load(boundaries + other, mask=inside, other=0).to(tl.int64)
            before += tl.where(other < seq, other_length, 0)
            total += other_length
            longest = tl.maximum(longest, other_length)
            shortest = tl.minimum(shortest, other_length)
        if CUMULATIVE:
            invalid = (tl.min(shortest) < 0) | (tl.load(boundaries) != 0)
        else:
            invalid = tl.min(shortest) < 0
            start = tl.sum(before)
        if seq == 0:
            found_tokens = tl.sum(total)
            invalid |= found_tokens > 2147483647
            tl.store(sizes, tl.where(invalid, -1, found_tokens).to(tl.int32))
            tl.store(sizes + 1, tl.max(longest).to(tl.int32))
    tl.store(cu_seqlens + seq + 1, (start + length).to(tl.int32))
    if seq == 0:
        tl.store(cu_seqlens, 0)
    # A valid length is at most total_tokens. The minimum bounds the loop for invalid ones.
    for first in range(0, tl.minimum(length, total_tokens), BLOCK):
        position = first + tl.arange(0, BLOCK)
        token = start + position
        inside = (position < length) & (token >= 0) & (token < total_tokens)
        position = position.to(tl.int32)
        tl.store(indices + token, seq * max_seqlen + position, mask=inside)
        tl.store(position_ids + token, position, mask=inside)


# ------------------------------------------------------------------------------ from position ids


@triton.jit
def _read_positions(position_ids, first, total_tokens, columns, BLOCK: tl.constexpr):
    """[BLOCK] whether a sequence starts at the token, its position, and whether it is invalid."""
    token = first + tl.arange(0, BLOCK)
    inside = token < total_tokens
    position = tl.load(position_ids + token, mask=inside, other=-1)
    previous = tl.load(position_ids + token - 1, mask=inside & (token > 0), other=-1)
    starts = position == 0
    # A sequence may not continue into the next row of a (rows, columns) batch.
    continues = (position == previous + 1) & (token % columns != 0)
    return starts, position, inside & ~starts & ~continues


@triton.jit(do_not_specialize=["total_tokens", "columns"])
def _position_counts_kernel(position_ids, counts, total_tokens, columns, BLOCK: tl.constexpr):
    """``counts[block]`` = number of sequence starts, largest position, number of invalid tokens."""
    block = tl.program_id(0)
    starts, position, invalid = _read_positions(
        position_ids, block * BLOCK, total_tokens, columns, BLOCK
    )
    tl.store(counts + 3 * block, tl.sum(starts.to(tl.int32)))
    tl.store(counts + 3 * block + 1, tl.max(position).to(tl.int32))
    tl.store(counts + 3 * block + 2, tl.sum(invalid.to(tl.int32)))


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
    HAS_COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program writes BLOCK tokens. ``counts`` is read if HAS_COUNTS."""
    block = tl.program_id(0)
    before = tl.zeros([BLOCK], tl.int32)  # sequence starts in earlier blocks
    total = tl.zeros([BLOCK], tl.int32)
    largest = tl.zeros([BLOCK], tl.int64)
    num_invalid = tl.zeros([BLOCK], tl.int32)
    if HAS_COUNTS:
        for first in range(0, num_blocks, BLOCK):
            other = first + tl.arange(0, BLOCK)
            inside = other < num_blocks
            starts = tl.load(counts + 3 * other, mask=inside, other=0)
            total += starts
            before += tl.where(other < block, starts, 0)
            position = tl.load(counts + 3 * other + 1, mask=inside, other=0)
            largest = tl.maximum(largest, position.to(tl.int64))
            num_invalid += tl.load(counts + 3 * other + 2, mask=inside, other=0)
    else:
        for other in range(0, num_blocks):
            is_start, position, invalid = _read_positions(
                position_ids, other * BLOCK, total_tokens, columns, BLOCK
            )
            starts = is_start.to(tl.int32)
            total += starts
            before += tl.where(other < block, starts, 0)
            largest = tl.maximum(largest, position.to(tl.int64))
            num_invalid += invalid.to(tl.int32)
    longest = tl.max(largest) + 1
    if block == 0:
        num_seqs = tl.sum(total)
        tl.store(sizes, tl.where(tl.sum(num_invalid) > 0, -1, num_seqs))
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
