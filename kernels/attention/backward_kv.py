"""The backward kernel for keys and values: dk and dv.

    P  = exp(score - lse),    dP = dout @ v.T
    dS = P * (dP - delta),    dk = scale * dS.T @ q,    dv = P.T @ dout

One program computes a tile of keys of one key head. It loops over the query heads that share these
keys, and over the queries that see them, so grouped heads need no atomics. It computes transposed
tiles, [keys, queries], so that both sums are plain products; of wide rows see `backward_kv_wide`.
`backward_q` computes ``delta`` and
``lse`` in base 2.
"""

from __future__ import annotations

from typing import NamedTuple

from .._triton import tl, triton
from .backward_kv_wide import backward_queries_wide
from .launch import SIZES
from .primitives import (
    QUERY_PADDING,
    DistanceLimits,
    Features,
    RowTile,
    StridedRows,
    TileRange,
    TileShape,
    apply_softcap,
    between,
    dot_transposed,
    dropout_keep_mask,
    dropout_params,
    find_tile,
    load_rows,
    padded_start,
    params_of_head,
    query_ranges,
    select_rows,
    softmax_weights,
    store_rows,
)


class _Queries(NamedTuple):
    """The queries of one sequence and query head, in memory."""

    q: StridedRows
    dout: StridedRows
    lse: tl.tensor  # pointer to one float32 per query, base-2, +inf where no key is visible
    delta: tl.tensor  # pointer to one float32 per query; both go on behind the last query


class _KeyGrads(NamedTuple):
    """The sums of the loop over queries, in float32."""

    dk: tl.tensor  # [BN, COLUMNS], or transposed if SHAPE.WIDE, without the factor scale
    dv: tl.tensor  # [BN, COLUMNS], or transposed if SHAPE.WIDE


@triton.jit
def _backward_queries(
    grads, k, v, queries, params, dropout, tiles, FEATURES: tl.constexpr, SHAPE: tl.constexpr
):
    """Add the gradients of one range of query tiles to dk and dv."""
    dk, dv = grads
    key = k.first + tl.arange(0, SHAPE.KEYS)
    position = key - (k.rows.count - queries.q.count)  # of the query at distance 0
    first_query, last_query = position - params.limits.right, position + params.limits.left
    column = tl.arange(0, SHAPE.QUERIES)
    for start in range(tiles.first, tiles.last, SHAPE.QUERIES):
        q = load_rows(queries.q, start, SHAPE.QUERIES, True, SHAPE)  # [BM, COLUMNS]
        dout = load_rows(queries.dout, start, SHAPE.QUERIES, True, SHAPE)
        query = start + column
        # Behind the last query, lse is +inf and delta is 0: masks would be a seventh of the loop.
        row_lse, row_delta = tl.load(queries.lse + query), tl.load(queries.delta + query)
        product = dot_transposed(k, RowTile(q, queries.q, start), True, SHAPE)
        raw, slope = apply_softcap(product, params, FEATURES.SOFTCAP)  # [BN, BM]
        biases = (params.table + (position - start))[:, None] - column.to(tl.int64)[None, :]
        # 0 past the last query, where lse is +inf. Rows past the last key are never stored.
        weights = softmax_weights(raw, row_lse[None, :], biases, params, tiles.bias, tiles.TABLE)
        if tiles.MASKED:
            first, last = (first_query - start)[:, None], (last_query - start)[:, None]
            visible = between(column[None, :], first, last, FEATURES.RIGHT, FEATURES.LEFT)
            weights = tl.where(visible, weights, 0.0)
        dweights = dot_transposed(v, RowTile(dout, queries.dout, start), True, SHAPE)
        dropped = weights  # the weights that the forward multiplied by v
        if FEATURES.DROPOUT:
            keep = dropout_keep_mask(dropout, query[None, :], key[:, None])
            dropped = tl.where(keep, weights * dropout.factor, 0.0)
            dweights = tl.where(keep, dweights * dropout.factor, 0.0)
        if SHAPE.CHUNK:  # load dout only now, so that it holds no registers during the products
            dout = load_rows(queries.dout, start, SHAPE.QUERIES, True, SHAPE)
        dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision=SHAPE.PRECISION)
        dscores = weights * (dweights - row_delta[None, :]) * slope
        if SHAPE.CHUNK:
            q = load_rows(queries.q, start, SHAPE.QUERIES, True, SHAPE)
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=SHAPE.PRECISION)
    return _KeyGrads(dk, dv)


@triton.jit
def _add_queries(
    grads, k, v, queries, params, dropout, tiles, FEATURES: tl.constexpr, SHAPE: tl.constexpr
):
    """Add the gradients of one range of query tiles with the loop for the width of rows."""
    if SHAPE.WIDE:
        dk, dv = grads
        dk, dv = backward_queries_wide(
            dk, dv, k, v, queries, params, dropout, tiles, FEATURES, SHAPE
        )
        grads = _KeyGrads(dk, dv)
    else:
        grads = _backward_queries(grads, k, v, queries, params, dropout, tiles, FEATURES, SHAPE)
    return grads


@triton.jit
def _backward_all_queries(
    grads, k, v, queries, params, dropout, ranges, FEATURES: tl.constexpr, SHAPE: tl.constexpr
):
    """Add the gradients of all queries of one head that see the keys to dk and dv."""
    first, near, far, end = ranges
    LIMITED: tl.constexpr = FEATURES.LEFT or FEATURES.RIGHT
    # fmt: off
    grads = _add_queries(
        grads, k, v, queries, params, dropout,
        TileRange(first, tl.minimum(near, end), params.bias_after, LIMITED, False), FEATURES, SHAPE,
    )
    if FEATURES.BIAS:
        grads = _add_queries(
            grads, k, v, queries, params, dropout,
            TileRange(near, tl.minimum(far, end), params.bias_after, LIMITED, True),
            FEATURES, SHAPE,
        )
    return _add_queries(
        grads, k, v, queries, params, dropout,
        TileRange(far, end, params.bias_before, FEATURES.LEFT, False), FEATURES, SHAPE,
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
    dout_stride,
    q_stride,
    k_stride,
    v_stride,
    scale: tl.float32,
    softcap: tl.float32,
    dropout_p: tl.float32,
    left,
    right,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
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
    kv_head, kv_heads = tl.program_id(1), tl.num_programs(1)
    seq, first_key, span_k, span_q = find_tile(
        tl.program_id(0), cu_seqlens_k, cu_seqlens_q, num_seqs, KEYS
    )
    if first_key >= span_k.count:  # the grid has a few programs without a tile
        return
    k_rows = select_rows(k, span_k, k_stride, kv_head, k_head_stride, HEAD_UNIT)
    v_rows = select_rows(v, span_k, v_stride, kv_head, v_head_stride, HEAD_UNIT)
    dk_rows = select_rows(dk, span_k, kv_heads * HEAD_DIM, kv_head, HEAD_DIM, 1)  # contiguous
    dv_rows = select_rows(dv, span_k, kv_heads * HEAD_DIM, kv_head, HEAD_DIM, 1)
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
        zeros = tl.zeros([KEYS, COLUMNS], tl.float32)
    grads = _KeyGrads(zeros, zeros)
    for member in range(GROUP):  # the query heads that share these keys
        head = kv_head * GROUP + member
        q_rows = select_rows(q, span_q, q_stride, head, q_head_stride, HEAD_UNIT)
        dout_rows = select_rows(dout, span_q, dout_stride, head, dout_head_stride, HEAD_UNIT)
        stored = padded_start(head, seq, span_q, total_q, num_seqs)
        queries = _Queries(q_rows, dout_rows, lse + stored, delta + stored)
        params = params_of_head(scale, softcap, table, head, limits, FEATURES)
        dropout = dropout_params(seed_value, seq, head, dropout_p)
        grads = _backward_all_queries(
            grads, k_tile, v_tile, queries, params, dropout, ranges, FEATURES, SHAPE
        )
    dk_tile, dv_tile = grads
    if WIDE:
        dk_tile, dv_tile = tl.trans(dk_tile), tl.trans(dv_tile)
    store_rows(dk_rows, dk_tile * scale, first_key, KEYS, SHAPE)
    store_rows(dv_rows, dv_tile, first_key, KEYS, SHAPE)
