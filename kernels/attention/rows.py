"""Device functions that select the rows of a sequence and a head in memory, load and store them."""

from __future__ import annotations

from typing import NamedTuple

from .._triton import tl, triton

# A tensor has fewer rows, so that int32 holds a position plus a window, and the end of a tile.
MOST_ROWS = tl.constexpr(2**30)


class Span(NamedTuple):
    """The rows of one sequence in a packed tensor."""

    start: tl.tensor  # int64
    count: tl.tensor


class StridedRows(NamedTuple):
    """The rows of one sequence and head in memory. The elements of a row are contiguous."""

    base: tl.tensor  # pointer to the first row
    count: tl.tensor
    stride: tl.tensor  # elements from one row to the next: a constant of the compiled kernel


class RowTile(NamedTuple):
    """A tile of consecutive rows: its values and where they are in memory."""

    data: tl.tensor  # [rows, COLUMNS]
    rows: StridedRows
    first: tl.tensor  # index of the tile's first row in `rows`


@triton.jit
def read_span(cu_seqlens, seq):
    """The `Span` of a sequence."""
    start, end = tl.load(cu_seqlens + seq), tl.load(cu_seqlens + seq + 1)
    # int64: offsets can exceed 2**31. Through uint32, the upper half is known to be 0.
    return Span(start.to(tl.uint32).to(tl.int64), end - start)


@triton.jit
def select_rows(base, span, stride, head, head_stride, UNIT: tl.constexpr):
    """The rows of one sequence and one head. ``head_stride`` is in units of ``UNIT`` elements."""
    head_stride = head * 0 + head_stride  # which may be a constant
    if head_stride.dtype == tl.int32:  # it is not negative: then the upper half is known to be 0
        head_stride = head_stride.to(tl.uint32)
    first = base + span.start * stride + head.to(tl.int64) * head_stride.to(tl.int64) * UNIT
    return StridedRows(first, span.count, stride)


@triton.jit
def hide(value, row):
    """``value``, a number, in a form in which the compiler does not see where it is from.

    What is computed from it is computed again wherever ``row`` changes, an index or a number of
    rows, and takes no registers in between. The compiler would, for example, keep the address of
    each load of a thread in two registers, where it sees that a loop advances by a constant.
    """
    return tl.where(row != MOST_ROWS, value, 0)  # no row has this number


@triton.jit
def load_rows(rows, first, SIZE: tl.constexpr, MASKED: tl.constexpr, SHAPE: tl.constexpr):
    """[SIZE, COLUMNS] from row ``first`` on; MASKED if the rows may end within the tile."""
    return load_columns(rows, first, 0, SIZE, SHAPE.COLUMNS, MASKED, SHAPE)


@triton.jit
def load_columns(
    rows,
    first,
    first_column,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """[SIZE, COLUMNS] from a row and a column on, 0 past the last row and the last column."""
    row = tl.arange(0, SIZE)
    column = first_column + tl.arange(0, COLUMNS)
    if SHAPE.CHUNK and SHAPE.COLUMNS > 128:  # loops over tiles keep no pointers to the columns
        column += hide(COLUMNS, first) - COLUMNS
    # One product per row, so that no row keeps an address. int64: offsets can exceed 2**31.
    place = first + row
    tile = rows.base + column[None, :] + place[:, None].to(tl.int64) * rows.stride
    if MASKED:
        inside = (place < rows.count)[:, None]
        if SHAPE.HEAD_DIM % COLUMNS:
            inside = inside & (column < SHAPE.HEAD_DIM)[None, :]
        return tl.load(tile, mask=inside, other=0.0)
    if SHAPE.HEAD_DIM % COLUMNS:  # every row exists, but not every column
        return tl.load(tile, mask=(column < SHAPE.HEAD_DIM)[None, :], other=0.0)
    return tl.load(tile)


@triton.jit
def store_rows(rows, tile, first, SIZE: tl.constexpr, SHAPE: tl.constexpr):
    """Store [SIZE, COLUMNS] as rows from ``first`` on, rounded to the dtype in memory."""
    store_columns(rows, tile, first, 0, SIZE, SHAPE.COLUMNS, SHAPE)


@triton.jit
def store_columns(
    rows, tile, first, first_column, SIZE: tl.constexpr, COLUMNS: tl.constexpr, SHAPE: tl.constexpr
):
    """Store [SIZE, COLUMNS] from a row and a column on, rounded to the dtype in memory."""
    row = tl.arange(0, SIZE)
    column = first_column + tl.arange(0, COLUMNS)
    target = rows.base + tl.full([], first, tl.int64) * rows.stride
    target = target + row[:, None] * rows.stride + column[None, :]
    inside = (first + row < rows.count)[:, None] & (column < SHAPE.HEAD_DIM)[None, :]
    tl.store(target, tile.to(rows.base.dtype.element_ty), mask=inside)
