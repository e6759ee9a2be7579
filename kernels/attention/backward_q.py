"""The backward kernel for queries: dq, and the gradient of the bias table.

    P  = exp(score - lse),    dP = dout @ v.T,    delta[m] = sum(dout[m] * out[m])
    dS = P * (dP - delta),    dq = scale * dS @ k
    dtable[d + reach] = sum of dS over all scores at distance d, clamped to the reach

One program computes a tile of queries of one head. Where all distances of a tile are beyond the
reach, the tile's sum of dS is added to one number. Elsewhere the tile is skewed: row i is rotated
left by i, so that equal distances share a column. A tile has no more queries than keys, so each
column then holds exactly two distances, KEYS apart. The larger one also occurs in the next tile of
keys; its sum stays in registers until then. Each program therefore writes each entry of its own row
of partial sums once, and PyTorch adds up the rows. This needs no atomics and gives the same bits in
every run. docs/attention.md shows it in a drawing.
"""

from __future__ import annotations

from typing import NamedTuple

from .._triton import tl, triton
from .launch import SIZES
from .primitives import (
    QUERY_PADDING,
    DistanceLimits,
    Features,
    RowTile,
    TileRange,
    TileShape,
    apply_softcap,
    between,
    dot_transposed,
    dropout_keep_mask,
    dropout_params,
    find_tile,
    key_ranges,
    load_lse,
    load_rows,
    padded_start,
    params_of_head,
    select_rows,
    softmax_weights,
    store_rows,
    visible_keys,
)


class _QueryTile(NamedTuple):
    """What the program holds of its tile of queries."""

    q: RowTile
    dout: RowTile
    lse: tl.tensor  # [BM], base-2, +inf where no key is visible
    delta: tl.tensor  # [BM]


class _QueryGrads(NamedTuple):
    """The sums of the loop over keys, in float32."""

    dq: tl.tensor  # [BM, COLUMNS], without the factor scale
    far_sum: tl.tensor  # [BM], sum of dS over keys beyond the reach on one side
    carry: tl.tensor  # [BN], sums at distances that the next tile of keys also has
    before: tl.tensor  # scalar, sum of dS at distances below -reach in tiles that read the table
    after: tl.tensor  # scalar, the same above reach


@triton.jit
def _sum_diagonals(dscores, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """[KEYS] sums at distances ``base + c``, and at ``base + c - KEYS``, for columns c.

    ``base`` is the distance of the tile's first key from its first query.
    """
    row = tl.arange(0, QUERIES)[:, None]
    column = tl.arange(0, KEYS)[None, :]
    # [BM, BN]: entry (i, c) comes from key (c + i) % KEYS, at distance c or c - KEYS from base.
    skewed = tl.gather(dscores, (column + row) % KEYS, 1)
    unwrapped = column + row < KEYS
    nearer = tl.sum(tl.where(unwrapped, skewed, 0.0), 0)
    farther = tl.sum(tl.where(unwrapped, 0.0, skewed), 0)
    return nearer, farther


@triton.jit
def _write_distances(sums, base, partial, reach, KEYS: tl.constexpr):
    """Store the sums at distances ``base + c - KEYS``; return the totals below and above the reach.

    ``partial`` holds the total below -reach, then 2 * reach + 1 sums, then the total above reach.
    """
    index = base - KEYS + tl.arange(0, KEYS) + reach
    tl.store(partial + 1 + index, sums, mask=(index >= 0) & (index <= 2 * reach))
    before = tl.sum(tl.where(index < 0, sums, 0.0))
    after = tl.sum(tl.where(index > 2 * reach, sums, 0.0))
    return before, after


@triton.jit
def _backward_keys(
    grads,
    queries,
    keys,
    values,
    params,
    dropout,
    partial,
    tiles,
    FEATURES: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Add the gradients of one range of key tiles to dq and to the sums for the table."""
    dq, far_sum, carry, before, after = grads
    q, dout = queries.q, queries.dout
    query = q.first + tl.arange(0, SHAPE.QUERIES)
    offset = keys.count - q.rows.count
    position = query + offset
    first_key, last_key = visible_keys(position, keys.count, params.limits, FEATURES)
    column = tl.arange(0, SHAPE.KEYS)[None, :]
    for start in range(tiles.first, tiles.last, SHAPE.KEYS):
        k = load_rows(keys, start, SHAPE.KEYS, tiles.MASKED, SHAPE)  # [BN, COLUMNS]
        v = load_rows(values, start, SHAPE.KEYS, tiles.MASKED, SHAPE)
        product = dot_transposed(q, RowTile(k, keys, start), tiles.MASKED, SHAPE)
        raw, slope = apply_softcap(product, params, FEATURES.SOFTCAP)  # [BM, BN]
        biases = (params.table + (start - position))[:, None] + column.to(tl.int64)
        lse = queries.lse[:, None]
        weights = softmax_weights(raw, lse, biases, params, tiles.bias, tiles.TABLE)
        if tiles.MASKED:
            first, last = (first_key - start)[:, None], (last_key - start)[:, None]
            weights = tl.where(between(column, first, last, FEATURES.LEFT, True), weights, 0.0)
        dweights = dot_transposed(dout, RowTile(v, values, start), tiles.MASKED, SHAPE)
        if FEATURES.DROPOUT:
            keep = dropout_keep_mask(dropout, query[:, None], start + column)
            dweights = tl.where(keep, dweights * dropout.factor, 0.0)
        dscores = weights * (dweights - queries.delta[:, None])  # of the score with its bias
        if FEATURES.DTABLE:
            if tiles.TABLE:
                nearer, farther = _sum_diagonals(dscores, SHAPE.QUERIES, SHAPE.KEYS)
                base = start - (q.first + offset)
                more_before, more_after = _write_distances(
                    carry + farther, base, partial, params.limits.reach, SHAPE.KEYS
                )
                before += more_before
                after += more_after
                carry = nearer
            else:
                far_sum += tl.sum(dscores, 1)  # summed over rows once, after the loop
        dscores = dscores * slope
        if SHAPE.CHUNK:  # load k only now, so that it holds no registers during the products
            k = load_rows(keys, start, SHAPE.KEYS, tiles.MASKED, SHAPE)
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=SHAPE.PRECISION)
    return _QueryGrads(dq, far_sum, carry, before, after)


@triton.jit
def _backward_all_keys(
    queries,
    keys,
    values,
    params,
    dropout,
    partials,
    FEATURES: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """dq without scale, [BM, COLUMNS]. With DTABLE, also stores the sums for the table."""
    q, reach = queries.q, params.limits.reach
    offset = keys.count - q.rows.count
    first_position = q.first + offset
    last_position = tl.minimum(q.first + SHAPE.QUERIES, q.rows.count) - 1 + offset
    first, near, far, visible_end, end = key_ranges(
        first_position, last_position, keys.count, params.limits, FEATURES, SHAPE.KEYS
    )
    # This program's own row of sums for the table.
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    partial = partials + program * (2 * reach + 3)
    dq = tl.zeros([SHAPE.QUERIES, SHAPE.COLUMNS], tl.float32)
    rows_before = tl.zeros([SHAPE.QUERIES], tl.float32)
    rows_after = tl.zeros([SHAPE.QUERIES], tl.float32)
    carry = tl.zeros([SHAPE.KEYS], tl.float32)
    before = tl.sum(carry)
    after = tl.sum(carry)
    # fmt: off
    dq, rows_before, carry, before, after = _backward_keys(
        _QueryGrads(dq, rows_before, carry, before, after),
        queries, keys, values, params, dropout, partial,
        TileRange(first, near, params.bias_before, FEATURES.LEFT, False), FEATURES, SHAPE,
    )
    if FEATURES.BIAS:
        dq, rows_before, carry, before, after = _backward_keys(
            _QueryGrads(dq, rows_before, carry, before, after),
            queries, keys, values, params, dropout, partial,
            TileRange(near, tl.minimum(far, end), params.bias_before, True, True), FEATURES, SHAPE,
        )
        if FEATURES.DTABLE:
            # The last tile's carry has no next tile. Write it as if one followed, at key `far`.
            more_before, more_after = _write_distances(
                carry, far - first_position, partial, reach, SHAPE.KEYS
            )
            before += more_before
            after += more_after
        if not FEATURES.RIGHT and not FEATURES.LEFT:
            # Without limits, only the tile at the end of the sequence needs the mask.
            dq, rows_after, carry, before, after = _backward_keys(
                _QueryGrads(dq, rows_after, carry, before, after),
                queries, keys, values, params, dropout, partial,
                TileRange(far, visible_end, params.bias_after, False, False), FEATURES, SHAPE,
            )
            far = visible_end
    dq, rows_after, carry, before, after = _backward_keys(
        _QueryGrads(dq, rows_after, carry, before, after),
        queries, keys, values, params, dropout, partial,
        TileRange(far, end, params.bias_after, True, False), FEATURES, SHAPE,
    )
    # fmt: on
    if FEATURES.DTABLE:
        tl.store(partial, before + tl.sum(rows_before))
        tl.store(partial + 2 * reach + 2, after + tl.sum(rows_after))
    return dq


# What changes from batch to batch is not specialized; see the forward kernel.
@triton.jit(do_not_specialize=[*SIZES, "dout_head_stride", "left", "right"])
def _attention_backward_q_kernel(
    q,
    k,
    v,
    table,
    seed,
    dout,
    delta,
    lse,
    out,
    dq,
    base2_lse,
    partials,
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
    DTABLE: tl.constexpr,
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
    FEATURES: tl.constexpr = Features(LEFT, RIGHT, SOFTCAP, BIAS, DROPOUT, DTABLE)
    SHAPE: tl.constexpr = TileShape(QUERIES, KEYS, HEAD_DIM, COLUMNS, CHUNK, PRECISION)
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    seq, first, span_q, span_k = find_tile(
        tl.program_id(0), cu_seqlens_q, cu_seqlens_k, num_seqs, QUERIES
    )
    if first >= span_q.count:  # the grid has a few programs without a tile
        return
    q_rows = select_rows(q, span_q, q_stride, head, q_head_stride, HEAD_UNIT)
    dout_rows = select_rows(dout, span_q, dout_stride, head, dout_head_stride, HEAD_UNIT)
    out_rows = select_rows(out, span_q, num_heads * HEAD_DIM, head, HEAD_DIM, 1)  # contiguous
    dq_rows = select_rows(dq, span_q, num_heads * HEAD_DIM, head, HEAD_DIM, 1)
    q_tile = RowTile(load_rows(q_rows, first, QUERIES, True, SHAPE), q_rows, first)
    dout_tile = RowTile(load_rows(dout_rows, first, QUERIES, True, SHAPE), dout_rows, first)
    out_tile = load_rows(out_rows, first, QUERIES, True, SHAPE)
    # delta and the logsumexp in base 2 are stored for the kernel of dk and dv, which runs next.
    query = first + tl.arange(0, QUERIES)
    row_delta = tl.sum(dout_tile.data.to(tl.float32) * out_tile.to(tl.float32), 1)
    row_lse = load_lse(lse + head.to(tl.int64) * total_q + span_q.start, query, span_q.count)
    stored = padded_start(head, seq, span_q, total_q, num_seqs)
    tl.store(delta + stored + query, row_delta, mask=query < span_q.count)
    tl.store(base2_lse + stored + query, row_lse, mask=query < span_q.count)
    # Behind the last query, every weight is 0. With a branch, dropout's loops would be longer.
    behind = span_q.count + tl.arange(0, QUERY_PADDING)
    is_last = tl.full([QUERY_PADDING], first + QUERIES, tl.int32) >= span_q.count
    nothing = tl.zeros([QUERY_PADDING], tl.float32)
    tl.store(delta + stored + behind, nothing, mask=is_last)
    tl.store(base2_lse + stored + behind, nothing + float("inf"), mask=is_last)
    keys = select_rows(k, span_k, k_stride, head // GROUP, k_head_stride, HEAD_UNIT)
    values = select_rows(v, span_k, v_stride, head // GROUP, v_head_stride, HEAD_UNIT)
    limits = DistanceLimits(left, right, reach)
    params = params_of_head(scale, softcap, table, head, limits, FEATURES)
    dropout = dropout_params(tl.load(seed) if DROPOUT else 0, seq, head, dropout_p)
    queries = _QueryTile(q_tile, dout_tile, row_lse, row_delta)
    grad = _backward_all_keys(queries, keys, values, params, dropout, partials, FEATURES, SHAPE)
    store_rows(dq_rows, grad * scale, first, QUERIES, SHAPE)
