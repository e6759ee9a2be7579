"""The backward kernel for keys and values: dk and dv.

    P  = exp(score - lse),    dP = dout @ v.T
    dS = P * (dP - delta),    dk = scale * dS.T @ q,    dv = P.T @ dout

One program computes a tile of keys of one key head. It loops over the query heads that share these
keys, and over the queries that see them, so grouped heads need no atomics. It computes transposed
tiles, [keys, queries], so that both sums are plain products; of wide rows see `backward_kv_wide`.
`backward_q` computes ``delta`` and ``lse`` in base 2.
"""

from __future__ import annotations

from typing import NamedTuple

from .._triton import tl, triton
from .backward_kv_wide import backward_queries_wide
from .column_chunks import add_products, store_sums, zero_sums
from .dropout import dropout_keep_mask, dropout_params
from .launch import SIZES
from .primitives import (
    QUERY_PADDING,
    DistanceLimits,
    Features,
    TileRange,
    TileShape,
    apply_softcap,
    between,
    dot_transposed,
    find_again,
    find_tile,
    padded_plane,
    padded_start,
    params_of_head,
    program_place,
    query_ranges,
    tile_biases,
)
from .rows import RowTile, StridedRows, hide, load_rows, select_rows


class _Queries(NamedTuple):
    """The queries of one sequence and query head, in memory."""

    q: StridedRows
    dout: StridedRows
    lse: tl.tensor  # pointer to one float32 per query, base-2, +inf where no key is visible
    delta: tl.tensor  # pointer to one float32 per query; both go on behind the last query
    plane: tl.tensor  # entries from `lse` to the same less the bias before the reach, and after it


class _Jump(NamedTuple):
    """Where a loop over tiles with masks goes on further behind."""

    at: tl.tensor  # rows from here on are
    distance: tl.tensor  # so many rows later


class _KeyGrads(NamedTuple):
    """The sums of the loop over queries, in float32."""

    dk: tl.tensor  # as in `zero_sums`, or transposed if SHAPE.WIDE, without the factor scale
    dv: tl.tensor  # the same


@triton.jit
def _backward_queries(
    grads,
    k,
    v,
    queries,
    params,
    dropout,
    tiles,
    jump,
    EDGE: tl.constexpr,
    FEATURES: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Add the gradients of one range of query tiles to dk and dv. EDGE: the queries end within."""
    dk, dv = grads
    row = tl.arange(0, SHAPE.KEYS)[:, None]
    key = k.first + tl.arange(0, SHAPE.KEYS)
    offset = k.rows.count - queries.q.count
    position = key - offset  # of the query at distance 0
    first_query, last_query = position - params.limits.right, position + params.limits.left
    column = tl.arange(0, SHAPE.QUERIES)
    for start in range(tiles.first, tiles.last, SHAPE.QUERIES):
        if EDGE and FEATURES.BIAS and FEATURES.RIGHT:
            start = tl.where(start < jump.at, start, start + jump.distance)
        start = hide(start, k.rows.count)
        q = load_rows(queries.q, start, SHAPE.QUERIES, EDGE, SHAPE)  # [BM, COLUMNS]
        dout = load_rows(queries.dout, start, SHAPE.QUERIES, EDGE, SHAPE)
        query = start + column
        # Behind the last query, lse is +inf and delta is 0: masks would be a seventh of the loop.
        product = dot_transposed(k, RowTile(q, queries.q, start), EDGE, SHAPE)
        raw, slope = apply_softcap(product, params, FEATURES.SOFTCAP)  # [BN, BM]
        if tiles.TABLE:
            raw += tile_biases(params, k.first - offset - start, True, SHAPE)
        row_lse = tl.load(queries.lse + query)
        # 0 past the last query, where lse is +inf. Rows past the last key are never stored.
        weights = tl.exp2(raw * params.factor - row_lse[None, :])
        if tiles.MASKED:
            first, last = (first_query - start)[:, None], (last_query - start)[:, None]
            visible = between(column[None, :], first, last, FEATURES.RIGHT, FEATURES.LEFT)
            weights = tl.where(visible, weights, 0.0)
        dropped = weights  # the weights that the forward multiplied by v
        if FEATURES.DROPOUT:
            keep = dropout_keep_mask(dropout, start, column[None, :], k.first, row)
            dropped = tl.where(keep, weights * dropout.factor, 0.0)
        if SHAPE.CHUNK:  # before the next product, so that fewer registers are needed at a time
            dv = add_products(dv, dropped, queries.dout, start, SHAPE.QUERIES, EDGE, SHAPE)
        dweights = dot_transposed(v, RowTile(dout, queries.dout, start), EDGE, SHAPE)
        if FEATURES.DROPOUT:
            dweights = tl.where(keep, dweights * dropout.factor, 0.0)
        if not SHAPE.CHUNK:
            dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision=SHAPE.PRECISION)
        row_delta = tl.load(queries.delta + query)
        dscores = weights * (dweights - row_delta[None, :]) * slope
        if SHAPE.CHUNK:
            dk = add_products(dk, dscores, queries.q, start, SHAPE.QUERIES, EDGE, SHAPE)
        else:
            dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=SHAPE.PRECISION)
    return _KeyGrads(dk, dv)


@triton.jit
def _add_queries(
    grads,
    k,
    v,
    queries,
    params,
    dropout,
    tiles,
    jump,
    EDGE: tl.constexpr,
    FEATURES: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Add the gradients of one range of query tiles with the loop for the width of rows."""
    if SHAPE.WIDE:
        dk, dv = grads
        dk, dv = backward_queries_wide(
            dk, dv, k, v, queries, params, dropout, tiles, jump, EDGE, FEATURES, SHAPE
        )
        grads = _KeyGrads(dk, dv)
    else:
        grads = _backward_queries(
            grads, k, v, queries, params, dropout, tiles, jump, EDGE, FEATURES, SHAPE
        )
    return grads


@triton.jit
def _beyond(queries, AFTER: tl.constexpr):
    """``queries`` with the logsumexp less the bias of keys beyond the reach, on one side."""
    plane = 2 * queries.plane if AFTER else queries.plane
    return _Queries(queries.q, queries.dout, queries.lse + plane, queries.delta, queries.plane)


@triton.jit
def _backward_all_queries(
    grads, k, v, queries, params, dropout, ranges, FEATURES: tl.constexpr, SHAPE: tl.constexpr
):
    """Add the gradients of all queries of one head that see the keys to dk and dv."""
    first, near, whole, far, end = ranges
    MASKED: tl.constexpr = FEATURES.LEFT or FEATURES.RIGHT
    edge = tl.maximum(end // SHAPE.QUERIES * SHAPE.QUERIES, first)
    jump = _Jump(edge, 0)
    # With wide rows, registers do not suffice for one loop more: [first, near) reads the table too.
    MERGED: tl.constexpr = FEATURES.BIAS and not FEATURES.RIGHT and SHAPE.COLUMNS > 64
    # fmt: off
    if SHAPE.CHUNK:
        # Registers suffice for one loop. Next to its products, table and masks are cheap.
        return _add_queries(
            grads, k, v, queries, params, dropout,
            TileRange(first, end, 0.0, MASKED, FEATURES.BIAS), _Jump(end, 0), True, FEATURES, SHAPE,
        )
    if FEATURES.BIAS and FEATURES.RIGHT:
        # One loop has all tiles with masks: [first, hidden) and, moved there, [edge, end).
        hidden = tl.minimum(whole, edge)
        jump = _Jump(hidden, edge - hidden)
    elif not MERGED:
        grads = _add_queries(
            grads, k, v, _beyond(queries, True), params, dropout,
            TileRange(first, tl.minimum(near, edge), 0.0, MASKED, False),
            jump, False, FEATURES, SHAPE,
        )
    if FEATURES.BIAS:
        grads = _add_queries(
            grads, k, v, queries, params, dropout,
            TileRange(first if MERGED else whole, tl.minimum(far, edge), 0.0, FEATURES.LEFT, True),
            jump, False, FEATURES, SHAPE,
        )
    grads = _add_queries(
        grads, k, v, _beyond(queries, False), params, dropout,
        TileRange(far, edge, 0.0, FEATURES.LEFT, False),
        jump, False, FEATURES, SHAPE,
    )
    return _add_queries(
        grads, k, v, queries, params, dropout,
        TileRange(
            first if FEATURES.BIAS and FEATURES.RIGHT else edge,
            end - jump.distance, 0.0, MASKED, FEATURES.BIAS,
        ),
        jump, True, FEATURES, SHAPE,
    )
    # fmt: on


# What changes from batch to batch is not specialized; see the forward kernel.
@triton.jit(do_not_specialize=[*SIZES, "dout_head_stride", "left", "right"])
def _attention_backward_kv_kernel(
    q,
    k,
    v,
    table,
    seed,
    dout,
    delta,
    lse,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    num_seqs,
    total_q,
    reach,
    q_head_stride,
    k_head_stride,
    v_head_stride,
    dout_head_stride,
    scale: tl.float32,
    softcap: tl.float32,
    dropout_p: tl.float32,
    left,
    right,
    DOUT_STRIDE: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    FEATURES: tl.constexpr = Features(LEFT, RIGHT, SOFTCAP, BIAS, DROPOUT)
    WIDE: tl.constexpr = COLUMNS > 128 and CHUNK == 0 and QUERIES >= 64  # see `backward_kv_wide`
    SHAPE: tl.constexpr = TileShape(QUERIES, KEYS, HEAD_DIM, COLUMNS, CHUNK, PRECISION, WIDE)
    tl.static_assert(QUERIES <= QUERY_PADDING)
    # The first keys are seen by the most queries. Their programs start first as it is.
    number, kv_head = program_place(HEADS // GROUP, False)
    seq, first_key, span_k, span_q = find_tile(number, cu_seqlens_k, cu_seqlens_q, num_seqs, KEYS)
    if first_key >= span_k.count:  # the grid has a few programs without a tile
        return
    k_rows = select_rows(k, span_k, K_STRIDE, kv_head, k_head_stride, HEAD_UNIT)
    v_rows = select_rows(v, span_k, V_STRIDE, kv_head, v_head_stride, HEAD_UNIT)
    limits = DistanceLimits(left, right, reach)
    last_key = tl.minimum(first_key + KEYS, span_k.count) - 1
    offset = span_k.count - span_q.count
    ranges = query_ranges(first_key, last_key, offset, span_q.count, limits, FEATURES, QUERIES)
    k_tile = RowTile(load_rows(k_rows, first_key, KEYS, True, SHAPE), k_rows, first_key)
    v_tile = RowTile(load_rows(v_rows, first_key, KEYS, True, SHAPE), v_rows, first_key)
    seed_value = tl.load(seed) if DROPOUT else 0
    if WIDE:
        zeros = tl.zeros([COLUMNS, KEYS], tl.float32)
    else:
        zeros = zero_sums(KEYS, SHAPE)
    grads = _KeyGrads(zeros, zeros)
    for member in range(GROUP):  # the query heads that share these keys
        head = kv_head * GROUP + member
        q_rows = select_rows(q, span_q, Q_STRIDE, head, q_head_stride, HEAD_UNIT)
        dout_rows = select_rows(dout, span_q, DOUT_STRIDE, head, dout_head_stride, HEAD_UNIT)
        stored = padded_start(head, seq, span_q, total_q, num_seqs)
        # Without a bias, nothing is less than `lse`.
        plane = padded_plane(HEADS, total_q, num_seqs) if BIAS else stored * 0
        queries = _Queries(q_rows, dout_rows, lse + stored, delta + stored, plane)
        params = params_of_head(scale, softcap, table, head, limits, FEATURES)
        dropout = dropout_params(seed_value, seq, head, dropout_p)
        grads = _backward_all_queries(
            grads, k_tile, v_tile, queries, params, dropout, ranges, FEATURES, SHAPE
        )
    dk_tile, dv_tile = grads
    if WIDE:
        dk_tile, dv_tile = tl.trans(dk_tile), tl.trans(dv_tile)
    first_key, span_k, kv_head = find_again(number, seq, kv_head, cu_seqlens_k, KEYS)
    dk_rows = select_rows(dk, span_k, HEADS // GROUP * HEAD_DIM, kv_head, HEAD_DIM, 1)  # contiguous
    dv_rows = select_rows(dv, span_k, HEADS // GROUP * HEAD_DIM, kv_head, HEAD_DIM, 1)
    store_sums(dk_rows, dk_tile, scale, first_key, KEYS, SHAPE)
    store_sums(dv_rows, dv_tile, 1.0, first_key, KEYS, SHAPE)
