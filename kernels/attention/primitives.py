"""What the attention kernels compute alike: where tiles lie, sight, scores, bias and dropout.

Query m of a sequence stands at place ``m + num_keys - num_queries`` among its keys, and everything
depends on the distance ``d = n - place`` of key n from it: causality and window are limits
``-left <= d <= right``, the bias is ``table[d + reach]`` and constant beyond the reach.

Scores are in units of log 2, since exp2 is what the hardware has:

    score = log2(e) * (softcap(scale * q . k) + bias)
"""

from __future__ import annotations

from typing import NamedTuple

from .._triton import tl, triton
from ..loss_kernels import _tanh


class Span(NamedTuple):
    """A sequence's rows in a packed tensor."""

    start: tl.tensor
    count: tl.tensor


class Rows(NamedTuple):
    """The rows of one sequence and head: where the first begins, how many, and how far apart."""

    base: tl.tensor
    count: tl.tensor
    stride: tl.tensor


class Rule(NamedTuple):
    """What makes a product a score, and which scores count."""

    scale: tl.tensor
    softcap: tl.tensor
    table: tl.tensor
    reach: tl.tensor
    left: tl.tensor
    right: tl.tensor


class Dropout(NamedTuple):
    """Whose weights are dropped with which chance."""

    seed: tl.tensor
    seq: tl.tensor
    head: tl.tensor
    chance: tl.tensor


@triton.jit
def find_tile(tile, cu_seqlens, other_cu_seqlens, num_seqs, SIZE: tl.constexpr):
    """Whose a tile is (see `tiles`): sequence, first row, and the spans of both its sides."""
    seq = tile * 0
    end = seq + num_seqs  # the sequence is in [seq, end)
    while end - seq > 1:
        middle = (seq + end) // 2
        is_behind = tl.load(cu_seqlens + middle) // SIZE + middle <= tile
        seq = tl.where(is_behind, middle, seq)
        end = tl.where(is_behind, end, middle)
    start, end = tl.load(cu_seqlens + seq), tl.load(cu_seqlens + seq + 1)
    other_start, other_end = tl.load(other_cu_seqlens + seq), tl.load(other_cu_seqlens + seq + 1)
    span = Span(start.to(tl.int64), end - start)
    other_span = Span(other_start.to(tl.int64), other_end - other_start)
    return seq, (tile - start // SIZE - seq) * SIZE, span, other_span


@triton.jit
def rows_of(base, span, stride, head, head_stride):
    """The rows of a sequence and a head."""
    first = base + span.start * stride + head.to(tl.int64) * head_stride
    return Rows(first, span.count, stride)


@triton.jit
def ends_of(table, reach, BIAS: tl.constexpr):
    """The bias of all keys far before a query, and of all far behind it."""
    if BIAS:
        return tl.load(table), tl.load(table + 2 * reach)
    else:
        return 0.0, 0.0


@triton.jit
def key_ranges(
    place,
    last_place,
    num_keys,
    left,
    right,
    reach,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Tiles of keys for queries at ``place`` to ``last_place``: four bounds, multiples of SIZE.

    Up to the first the bias is constant, then it is in the table's reach up to the second, then
    constant again, up to the third with every key in sight of every query; at the fourth, which is
    no multiple, sight ends. Without a bias the middle two ranges are empty.
    """
    first = place * 0
    end = first + num_keys
    if LEFT:
        first = tl.maximum(place - left, 0) // SIZE * SIZE
    whole = end
    if RIGHT:
        end = tl.minimum(end, last_place + right + 1)
        whole = tl.minimum(whole, place + right + 1)
    whole = tl.maximum(tl.maximum(whole, 0) // SIZE * SIZE, first)
    if BIAS:
        near = tl.maximum(tl.maximum(place - reach + 1, 0) // SIZE * SIZE, first)
        far = (tl.maximum(last_place + reach, 0) + SIZE - 1) // SIZE * SIZE
        far = tl.maximum(tl.minimum(far, (tl.maximum(end, 0) + SIZE - 1) // SIZE * SIZE), near)
        whole = tl.maximum(whole, far)
    else:
        near = whole
        far = whole
    return first, near, far, whole, end


@triton.jit
def query_ranges(
    first_key,
    last_key,
    offset,
    num_queries,
    left,
    right,
    reach,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Tiles of queries that see keys ``first_key`` to ``last_key``; ``offset`` leads to places.

    Distances fall as queries go on. Up to the first bound the bias is constant, then in the table's
    reach up to the second, then constant again to the end of sight. Without a bias both bounds are
    where every query stands far enough to see every key.
    """
    first = first_key * 0
    end = first + num_queries
    near = first
    if RIGHT:
        first = tl.maximum(first_key - right - offset, 0) // SIZE * SIZE
        near = (tl.maximum(last_key - right - offset, 0) + SIZE - 1) // SIZE * SIZE
    if LEFT:
        end = tl.minimum(end, last_key + left - offset + 1)
    ceiling = (tl.maximum(end, 0) + SIZE - 1) // SIZE * SIZE
    if BIAS:
        near = tl.maximum(first_key - reach - offset + 1, 0) // SIZE * SIZE
        far = (tl.maximum(last_key + reach - offset, 0) + SIZE - 1) // SIZE * SIZE
        near = tl.maximum(tl.minimum(near, ceiling), first)
        far = tl.maximum(tl.minimum(far, ceiling), near)
    else:
        near = tl.maximum(tl.minimum(near, ceiling), first)
        far = near
    return first, near, far, end


@triton.jit
def load_rows(
    rows,
    first,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    EDGE: tl.constexpr,
    first_column=0,
):
    """[SIZE, COLUMNS] from a row and a column on, 0 behind the last row and column."""
    row = tl.arange(0, SIZE)
    column = first_column + tl.arange(0, COLUMNS)
    tile = rows.base + tl.full([], first, tl.int64) * rows.stride
    tile = tile + row[:, None] * rows.stride + column[None, :]
    if EDGE:
        inside = (first + row < rows.count)[:, None]
        if WIDTH % COLUMNS:
            inside = inside & (column < WIDTH)[None, :]
        return tl.load(tile, mask=inside, other=0.0)
    if WIDTH % COLUMNS:
        return tl.load(tile, mask=(column < WIDTH)[None, :], other=0.0)
    return tl.load(tile)


@triton.jit
def store_rows(rows, values, first, SIZE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """The opposite of `load_rows`, rounding to what is stored."""
    row = tl.arange(0, SIZE)
    column = tl.arange(0, COLUMNS)
    tile = rows.base + tl.full([], first, tl.int64) * rows.stride
    tile = tile + row[:, None] * rows.stride + column[None, :]
    inside = (first + row < rows.count)[:, None] & (column < WIDTH)[None, :]
    tl.store(tile, values.to(rows.base.dtype.element_ty), mask=inside)


@triton.jit
def load_lse(lse, row, num_rows):
    """In units of log 2; +inf, with which all weigh nothing, where no key is seen or no row is."""
    row_lse = tl.load(lse + row, mask=row < num_rows, other=float("inf"))
    return tl.where(row_lse == float("-inf"), float("inf"), row_lse) * 1.4426950408889634


@triton.jit
def multiply(
    left_tile,
    left,
    left_first,
    right_tile,
    right,
    right_first,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``left @ right.T`` of two tiles of rows; EDGE where ``right`` may end within its tile.

    With a CHUNK the tiles stay unread, and so take no register: both operands come from memory
    again, so many columns at a time.
    """
    if CHUNK:
        product = tl.zeros([left_tile.shape[0], right_tile.shape[0]], tl.float32)
        for column in range(0, WIDTH, CHUNK):
            a = load_rows(left, left_first, left_tile.shape[0], WIDTH, CHUNK, True, column)
            b = load_rows(right, right_first, right_tile.shape[0], WIDTH, CHUNK, EDGE, column)
            product = tl.dot(a, tl.trans(b), product, input_precision=PRECISION)
    else:
        product = tl.dot(left_tile, tl.trans(right_tile), input_precision=PRECISION)
    return product


@triton.jit
def bend(product, rule, SOFTCAP: tl.constexpr):
    """``softcap(scale * product)`` in units of log 2, and its slope by ``scale * product``."""
    if SOFTCAP:
        bent = _tanh(product * (rule.scale / rule.softcap))
        scores = bent * (rule.softcap * 1.4426950408889634)
        slope = 1.0 - bent * bent
    else:
        scores = product * (rule.scale * 1.4426950408889634)
        slope = 1.0
    return scores, slope


@triton.jit
def biased(scores, distance, rule, constant, TABLE: tl.constexpr):
    """Scores with the bias: from the table at each distance, or the same for all."""
    if TABLE:
        index = tl.minimum(tl.maximum(distance + rule.reach, 0), 2 * rule.reach)
        return scores + tl.load(rule.table + index)
    return scores + constant


@triton.jit
def in_sight(distance, key, num_keys, rule, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Which scores count: of keys that are there, within the limits."""
    seen = key < num_keys
    if LEFT:
        seen = seen & (distance >= -rule.left)
    if RIGHT:
        seen = seen & (distance <= rule.right)
    return seen


@triton.jit
def kept(dropout, query, key):
    """Which weights dropout keeps: a function of the seed and of whose weight it is alone.

    So the backward finds the same ones, whatever its tiles, and so does a batch that is packed in
    another way as long as its sequences come in the same order. Philox, 10 rounds (Salmon et al.,
    "Parallel random numbers: as easy as 1, 2, 3", 2011).
    """
    none = query * 0 + key * 0
    bits, _, _, _ = tl.philox(
        dropout.seed, key + none, query + none, dropout.head + none, dropout.seq + none
    )
    return tl.uint_to_uniform_float(bits) >= dropout.chance
