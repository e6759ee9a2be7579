"""The sums of the backward for float32 rows above a head_dim of 32, in chunks of columns.

A float32 product on tensor cores is three products of tf32 (tf32x3), for which each operand is
split in two. A product with whole rows would hold twice the rows in registers. So the sums
``P.T @ dout``, ``dS.T @ q`` and ``dS @ k`` are a tuple of tensors, one for each chunk of columns,
and each product reads its chunk of the rows from memory. (`primitives.dot_transposed` sums over
chunks of columns.)

Other rows have one tensor for all columns.
"""

from __future__ import annotations

from .._triton import tl, triton
from .rows import load_columns, store_columns, store_rows


@triton.jit
def zero_sums(ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """Zeros for the sums of ROWS rows: [ROWS, COLUMNS], or with a CHUNK, a tuple by columns."""
    if SHAPE.CHUNK:
        # Four warps divide 64 rows, or the columns of fewer rows, into 8 or more for each.
        WIDTH: tl.constexpr = 16 if ROWS >= 64 else 32
        sums = ()
        for _ in tl.static_range(0, SHAPE.HEAD_DIM, WIDTH):
            sums += (tl.zeros([ROWS, WIDTH], tl.float32),)  # type: ignore[assignment]
    else:
        sums = tl.zeros([ROWS, SHAPE.COLUMNS], tl.float32)
    return sums


@triton.jit
def _finish_now(sums, SHAPE: tl.constexpr):
    """``sums``, which the compiler then computes here.

    Otherwise it adds the products of all chunks to their sums at the end of a tile, and holds all
    of them in registers until then.
    """
    if SHAPE.PRECISION != "ieee":  # that is, for CUDA
        sums = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [sums], tl.float32, False, 1)
    return sums


@triton.jit
def add_products(
    sums, left, rows, first, SIZE: tl.constexpr, MASKED: tl.constexpr, SHAPE: tl.constexpr
):
    """``sums + left @ rows[first : first + SIZE]``; MASKED if the rows may end within."""
    WIDTH: tl.constexpr = 16 if left.shape[0] >= 64 else 32  # as in `zero_sums`
    added = ()
    for i in tl.static_range(len(sums)):
        right = load_columns(rows, first, i * WIDTH, SIZE, WIDTH, MASKED, SHAPE)
        product = tl.dot(left, right, sums[i], input_precision=SHAPE.PRECISION)
        added += (_finish_now(product, SHAPE),)  # type: ignore[assignment]
    return added


@triton.jit
def store_sums(rows, sums, factor, first, SIZE: tl.constexpr, SHAPE: tl.constexpr):
    """Store ``factor * sums`` as rows from ``first`` on, rounded to the dtype in memory."""
    if SHAPE.CHUNK:
        WIDTH: tl.constexpr = 16 if SIZE >= 64 else 32  # as in `zero_sums`
        for i in tl.static_range(len(sums)):
            store_columns(rows, sums[i] * factor, first, i * WIDTH, SIZE, WIDTH, SHAPE)
    else:
        store_rows(rows, sums * factor, first, SIZE, SHAPE)
