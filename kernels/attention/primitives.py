"""Device functions that the attention kernels share: tiles, ranges, scores, bias.

Query m of a sequence has the position ``m + num_keys - num_queries`` on the key axis. Mask and bias
depend only on the distance ``d = n - position`` of key n from the query:

    visible:  -left <= d <= right                       (causal: right = 0)
    bias:     table[clamp(d, -reach, reach) + reach]    (constant beyond the reach)

Scores are base-2 logarithms, because the hardware computes exp2:

    score = log2(e) * (softcap(scale * q . k) + bias) = factor * (raw + entry)

``raw`` is the product q . k, or with a softcap its tanh, and ``entry`` is the bias in its unit, as
the launcher writes it into the table. Without a softcap, the product starts from it. A maximum or a
logsumexp is subtracted together with the multiplication by ``factor``, as one fused operation per
score. This needs ``factor > 0``, for which the launchers care (`launch`).

A launch passes flat arguments: Triton specializes arguments one by one, and the fields of a tuple
do not arrive as `tl.constexpr`. The kernels group the arguments into the NamedTuples below. Fields
in capitals are compile-time constants. A variable for a tuple of constants needs the annotation
`tl.constexpr`, because a plain assignment turns constants into run-time values. No field may be
called ``values`` or ``type``, which are attributes of Triton's own tuple class.
"""

from __future__ import annotations

from typing import NamedTuple

from .._triton import tl, triton
from ..loss_kernels import _tanh
from .rows import hide, load_columns, read_span

# Each row of the table is extended by this many copies of its first and of its last entry, so that
# tiles which are partly beyond the reach need no clamp: at least the queries and keys of a tile.
TABLE_PADDING = tl.constexpr(256)
# Entries behind the queries of each sequence in what dq's kernel writes for the kernel of dk and
# dv: at least the queries of a tile of the latter, less one.
QUERY_PADDING = tl.constexpr(64)


class DistanceLimits(NamedTuple):
    """The distances at which the mask and the bias change."""

    left: tl.tensor
    right: tl.tensor
    reach: tl.tensor


class ScoreParams(NamedTuple):
    """Run-time values that turn a product q . k into a score, for one head."""

    factor: tl.tensor  # of the raw score, positive
    inner: tl.tensor  # with a softcap: raw = tanh(inner * product)
    table: tl.tensor  # pointer to this head's bias at distance 0, in the unit of raw scores
    limits: DistanceLimits


class TileRange(NamedTuple):
    """Rows ``[first, last)`` to loop over, and how to score them."""

    first: tl.tensor
    last: tl.tensor
    bias: tl.tensor  # of every score, in addition to the table
    MASKED: tl.constexpr  # a tile may contain scores that the mask hides
    TABLE: tl.constexpr  # read the bias from the table


class Features(NamedTuple):
    """The options of a call that change the code."""

    LEFT: tl.constexpr  # the window has a limit on the left
    RIGHT: tl.constexpr  # the window has a limit on the right, or the mask is causal
    SOFTCAP: tl.constexpr
    BIAS: tl.constexpr
    DROPOUT: tl.constexpr
    DTABLE: tl.constexpr = False  # in the kernel of dq: compute the table's gradient


class TileShape(NamedTuple):
    """The sizes of tiles. Comments call QUERIES and KEYS ``BM`` and ``BN``."""

    QUERIES: tl.constexpr
    KEYS: tl.constexpr
    HEAD_DIM: tl.constexpr
    COLUMNS: tl.constexpr  # HEAD_DIM padded to a power of two
    CHUNK: tl.constexpr  # columns per product in `dot_transposed`, or 0 for all
    PRECISION: tl.constexpr  # of float32 products, for tl.dot
    WIDE: tl.constexpr = False  # in the kernel of dk and dv: the loop of `backward_kv_wide`


@triton.jit
def program_place(HEADS: tl.constexpr, REVERSED: tl.constexpr):
    """The number of this program's tile, and its head. Programs start in the order of their ids.

    All heads of a tile are next to one another, so that those which share keys find them in the L2
    cache. With REVERSED, the last tiles come first: under a causal mask they see the most keys, and
    the short ones fill up the multiprocessors at the end.
    """
    program = tl.program_id(0)
    tile = program // HEADS
    head = program % HEADS
    if REVERSED:
        tile = tl.num_programs(0) // HEADS - 1 - tile
    return tile, head


@triton.jit
def find_tile(tile, cu_seqlens, other_cu_seqlens, num_seqs, SIZE: tl.constexpr):
    """Locate a tile (see `tiles`): its sequence, its first row, and the sequence's two spans."""
    seq = tile * 0
    end = seq + num_seqs
    while end - seq > 1:  # the sequence is in [seq, end)
        middle = (seq + end) // 2
        starts_before = tl.load(cu_seqlens + middle) // SIZE + middle <= tile
        seq = tl.where(starts_before, middle, seq)
        end = tl.where(starts_before, end, middle)
    span, other_span = read_span(cu_seqlens, seq), read_span(other_cu_seqlens, seq)
    return seq, _first_row(tile, seq, span, SIZE), span, other_span


@triton.jit
def find_again(tile, seq, head, cu_seqlens, SIZE: tl.constexpr):
    """The first row of a tile, its sequence's span, and its head: to store what a loop computed.

    They are computed from a few numbers again, so that nothing of them takes registers in the loop.
    """
    seq = hide(seq, tl.load(cu_seqlens))
    span = read_span(cu_seqlens, seq)
    return _first_row(hide(tile, span.count), seq, span, SIZE), span, hide(head, span.count)


@triton.jit
def _first_row(tile, seq, span, SIZE: tl.constexpr):
    return (tile - span.start.to(tl.int32) // SIZE - seq) * SIZE


@triton.jit
def padded_start(head, seq, span, total, num_seqs):
    """The first entry of a sequence and head in ``(heads, total + num_seqs * QUERY_PADDING)``.

    QUERY_PADDING more entries follow each sequence, so a tile reads them without a mask.
    """
    start = span.start + seq * QUERY_PADDING
    return head.to(tl.int64) * padded_plane(1, total, num_seqs) + start


@triton.jit
def padded_plane(HEADS: tl.constexpr, total, num_seqs):
    """The entries of one ``(heads, total + num_seqs * QUERY_PADDING)``."""
    return HEADS * (total.to(tl.int64) + num_seqs * QUERY_PADDING)


@triton.jit
def params_of_head(scale, softcap, table, head, limits, FEATURES: tl.constexpr):
    """The `ScoreParams` of one head. The table is extended by TABLE_PADDING at each end."""
    if FEATURES.SOFTCAP:
        factor = softcap * 1.4426950408889634
        inner = scale / softcap
    else:
        factor = scale * 1.4426950408889634
        inner = 1.0
    origin = limits.reach + TABLE_PADDING
    at_zero = table + head * (2 * origin + 1) + origin
    return ScoreParams(factor, inner, at_zero, limits)


@triton.jit
def bias_beyond(params, AFTER: tl.constexpr, FEATURES: tl.constexpr):
    """The base-2 bias of keys beyond the reach, before or AFTER the query, read when needed."""
    if not FEATURES.BIAS:
        return 0.0
    distance = params.limits.reach if AFTER else -params.limits.reach
    return tl.load(params.table + distance) * params.factor


@triton.jit
def key_ranges(
    first_position, last_position, num_keys, limits, FEATURES: tl.constexpr, SIZE: tl.constexpr
):
    """Split the visible keys of the queries at two positions and between into ranges.

    Returns six bounds. All of them are multiples of SIZE except ``end``.

        [first, near)    every key is beyond the reach, before the queries: constant bias
        [near, whole)    keys within the reach: bias from the table
        [whole, far)     the same, but some queries do not see some keys; may extend past ``end``
        [far, last)      every key is beyond the reach, after the queries: constant bias
        [last, end)      the same, but some queries do not see some keys

    With FEATURES.LEFT, some queries may not see some keys of any range, and near == whole and
    far == last. Without a bias, near == whole == far == last.
    """
    first = first_position * 0
    end = first + num_keys
    if FEATURES.LEFT:
        first = tl.maximum(first_position - limits.left, 0) // SIZE * SIZE
    visible_end = end
    if FEATURES.RIGHT:
        # The last query sees the most keys, the first query the fewest.
        end = tl.minimum(end, last_position + limits.right + 1)
        visible_end = tl.minimum(visible_end, first_position + limits.right + 1)
    last = tl.maximum(tl.maximum(visible_end, 0) // SIZE * SIZE, first)
    if FEATURES.BIAS:
        # Before near, d <= -reach even for the first query. From far on, d >= reach for the last.
        near = tl.maximum(tl.maximum(first_position - limits.reach + 1, 0) // SIZE * SIZE, first)
        far = (tl.maximum(last_position + limits.reach, 0) + SIZE - 1) // SIZE * SIZE
        far = tl.maximum(tl.minimum(far, (tl.maximum(end, 0) + SIZE - 1) // SIZE * SIZE), near)
        whole = near if FEATURES.LEFT else tl.minimum(tl.maximum(last, near), far)
        last = far if FEATURES.LEFT else tl.maximum(last, far)
    else:
        near = last
        whole = last
        far = last
    return first, near, whole, far, last, end


@triton.jit
def edge_range(whole, far, last, end, FEATURES: tl.constexpr):
    """The tiles with a bias in which some queries do not see some keys: ``[whole, end)``.

    Where a range with a constant bias lies between, they are ``[last, end)``, and the third value
    is how far they have to move to follow on the tile before ``far``. After that move, a tile is
    still beyond the reach.
    """
    if FEATURES.LEFT:
        edge, edge_end, gap = whole, tl.minimum(far, end), 0
    else:
        gap = last - far
        edge, edge_end = tl.where(gap > 0, last, whole), end
    return edge, edge_end, gap


@triton.jit
def query_ranges(
    first_key, last_key, offset, num_queries, limits, FEATURES: tl.constexpr, SIZE: tl.constexpr
):
    """Split the queries that see keys ``first_key`` to ``last_key`` into four ranges.

    ``offset`` is num_keys - num_queries: a query's position minus its index. Distances decrease as
    queries advance. Returns five bounds. All of them are multiples of SIZE except ``end``.

        [first, near)    the keys are beyond the reach, after the queries: constant bias
        [near, whole)    keys within the reach: bias from the table
        [whole, far)     the same, and FEATURES.RIGHT hides no key
        [far, end)       beyond the reach, before the queries: constant bias, nothing hidden either

    Without a bias near == far, and [first, near) is what FEATURES.RIGHT may hide keys from.
    """
    first = first_key * 0
    end = first + num_queries
    visible = first
    if FEATURES.RIGHT:
        # The first query that sees any of the keys, and the first that sees all of them.
        first = tl.maximum(first_key - limits.right - offset, 0) // SIZE * SIZE
        visible = (tl.maximum(last_key - limits.right - offset, 0) + SIZE - 1) // SIZE * SIZE
    if FEATURES.LEFT:
        end = tl.minimum(end, last_key + limits.left - offset + 1)
    ceiling = (tl.maximum(end, 0) + SIZE - 1) // SIZE * SIZE
    if FEATURES.BIAS:
        near = tl.maximum(first_key - limits.reach - offset + 1, 0) // SIZE * SIZE
        far = (tl.maximum(last_key + limits.reach - offset, 0) + SIZE - 1) // SIZE * SIZE
        near = tl.maximum(tl.minimum(near, ceiling), first)
        far = tl.maximum(tl.minimum(far, ceiling), near)
        whole = tl.minimum(tl.maximum(visible, near), far)
    else:
        near = tl.maximum(tl.minimum(visible, ceiling), first)
        whole = near
        far = near
    return first, near, whole, far, end


@triton.jit
def load_lse(lse, row, num_rows):
    """Base-2 logsumexp of each row; +inf past the last row and where no key is visible.

    With +inf, every weight ``exp2(score - lse)`` of the row is 0.
    """
    row_lse = tl.load(lse + row, mask=row < num_rows, other=float("inf"))
    # log2(e) converts the stored natural logarithm.
    return tl.where(row_lse == float("-inf"), float("inf"), row_lse) * 1.4426950408889634


@triton.jit
def dot_transposed(left, right, MASKED: tl.constexpr, SHAPE: tl.constexpr):
    """``left @ right.T`` of two `RowTile`; MASKED if the rows of ``right`` may end within its tile.

    With a CHUNK, both operands are read again from memory, that many columns at a time. ``data``
    then stays unused, so the compiler removes its loads and it takes no registers.
    """
    if SHAPE.CHUNK:
        product = tl.zeros([left.data.shape[0], right.data.shape[0]], tl.float32)
        first = hide(left.first, right.first)  # in a loop, `right` moves
        for column in range(0, SHAPE.HEAD_DIM, SHAPE.CHUNK):
            a = load_columns(left.rows, first, column, left.data.shape[0], SHAPE.CHUNK, True, SHAPE)
            b = load_columns(
                right.rows, right.first, column, right.data.shape[0], SHAPE.CHUNK, MASKED, SHAPE
            )
            product = tl.dot(a, tl.trans(b), product, input_precision=SHAPE.PRECISION)
    else:
        product = tl.dot(left.data, tl.trans(right.data), input_precision=SHAPE.PRECISION)
    return product


@triton.jit
def apply_softcap(product, params, SOFTCAP: tl.constexpr):
    """The raw score (see the top of this file), and its derivative by ``inner * product``."""
    if SOFTCAP:
        raw = _tanh(product * params.inner)  # in [-1, 1]
        slope = 1.0 - raw * raw
    else:
        raw = product
        slope = 1.0
    return raw, slope


@triton.jit
def tile_biases(params, base, TRANSPOSED: tl.constexpr, SHAPE: tl.constexpr):
    """The bias of each score of a tile, [BM, BN], or [BN, BM] if TRANSPOSED, in the unit of raw.

    ``base`` is the distance of the tile's first key from its first query. The tile's BM + BN - 1
    distances are read once and handed out through shared memory, where each thread reads each
    distance of its scores once: rows that are eight apart have most distances in common.
    """
    SPAN: tl.constexpr = 2 * max(SHAPE.QUERIES, SHAPE.KEYS)
    # Where every distance is beyond the reach, the table is read no further out than it goes.
    furthest = params.limits.reach + SHAPE.QUERIES
    first = tl.maximum(tl.minimum(base, furthest), -params.limits.reach - SHAPE.KEYS)
    first -= SHAPE.QUERIES
    line, x = params.table + first, tl.arange(0, SPAN)
    score = tl.arange(0, SHAPE.QUERIES * SHAPE.KEYS)
    if TRANSPOSED:
        # In reverse, so that the index is a constant per query added to one number per key.
        line = tl.load(line + (SPAN - 1 - x))
        index = score % SHAPE.QUERIES + (SPAN - 1 - SHAPE.QUERIES - score // SHAPE.QUERIES)
        biases = tl.reshape(tl.gather(line, index, 0), [SHAPE.KEYS, SHAPE.QUERIES])
    else:
        line = tl.load(line + x)
        if SHAPE.KEYS >= 128:  # the same, in an order that takes fewer registers of a wide tile
            index = score % SHAPE.KEYS + (SHAPE.QUERIES - score // SHAPE.KEYS)
        else:
            index = SHAPE.QUERIES + score % SHAPE.KEYS - score // SHAPE.KEYS
        biases = tl.reshape(tl.gather(line, index, 0), [SHAPE.QUERIES, SHAPE.KEYS])
    return biases


@triton.jit
def visible_keys(position, num_keys, limits, FEATURES: tl.constexpr):
    """The first and the last key that a query at each position sees."""
    first = position * 0
    last = first + (num_keys - 1)
    if FEATURES.LEFT:
        first = position - limits.left
    if FEATURES.RIGHT:
        last = tl.minimum(last, position + limits.right)
    return first, last


@triton.jit
def between(index, first, last, LOWER: tl.constexpr, UPPER: tl.constexpr):
    """True where ``index`` is at least ``first`` if LOWER, and at most ``last`` if UPPER.

    A tile's columns are compared with one bound per row. The matrix units leave columns 8 n + 2 t
    and 8 n + 2 t + 1 in thread t of four. With 2 t in the bound, the rest is a constant.
    """
    lane = index & 6
    index = index & ~6
    if LOWER and UPPER:
        return (index >= first - lane) & (index <= last - lane)
    if LOWER:
        return index >= first - lane
    return index <= last - lane
