"""The backward kernel for queries: dq, and the gradient of the bias table.

    P  = exp(score - lse),    dP = dout @ v.T,    delta[m] = sum(dout[m] * out[m])
    dS = P * (dP - delta),    dq = scale * dS @ k
    dtable[d + reach] = sum of dS over all scores at distance d, clamped to the reach

One program computes a tile of queries of one head. Where all distances of a tile are beyond the
reach, the tile's sum of dS is added to one number. Elsewhere it needs the sums of the tile's
diagonals. A tile consists of blocks of 8 x 8 scores, and the matrix units leave equal places of all
blocks of 16 queries in one thread:

1. Blocks that are one down and one to the right of each other have the same distances. Of each 16
   queries, each thread adds the upper 8 to the lower 8, moved by one block.
2. A product with a matrix of zeros and ones sums the diagonals within each block.
3. For each distance, one thread adds its sums of all blocks, which it reads from shared memory.

Distances that the next tile of keys has too are carried there. Each program therefore writes each
entry of its own row of partial sums once, and PyTorch adds up the rows. This needs no atomics and
gives the same bits in every run. docs/attention.md shows it in a drawing.
"""

from __future__ import annotations

from typing import NamedTuple

from .._triton import tl, triton
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
    bias_beyond,
    dot_transposed,
    edge_range,
    find_again,
    find_tile,
    key_ranges,
    load_lse,
    padded_plane,
    padded_start,
    params_of_head,
    program_place,
    tile_biases,
    visible_keys,
)
from .rows import RowTile, hide, load_rows, select_rows


class _QueryTile(NamedTuple):
    """What the program holds of its tile of queries."""

    q: RowTile
    dout: RowTile
    lse: tl.tensor  # [BM], base-2, +inf where no key is visible
    delta: tl.tensor  # [BM]


class _Diagonals(NamedTuple):
    """Sums of dS by distance, between two tiles of keys. SPAN is twice a tile's larger side."""

    corners: tl.tensor  # [BM / 16, 8, 8], scores that the next tile adds to its own
    carry: tl.tensor  # [SPAN], sums at distances that the next tile of keys also has
    before: tl.tensor  # [SPAN], sums at distances below -reach in tiles that read the table
    after: tl.tensor  # [SPAN], the same above reach


class _QueryGrads(NamedTuple):
    """The sums of the loop over keys, in float32."""

    dq: tl.tensor  # as in `zero_sums`, without the factor scale
    far_sum: tl.tensor  # [BM], sum of dS over keys beyond the reach on one side
    diagonals: _Diagonals


@triton.jit
def _delay(blocks, entering, COUNT: tl.constexpr):
    """Move ``blocks`` [W, 8, 8, COUNT] on by one: ``entering`` becomes the first, the last leaves.

    The compiler renames registers for this: it issues no instruction.
    """
    if COUNT == 1:
        delayed, leaving = tl.reshape(entering, blocks.shape), tl.reshape(blocks, entering.shape)
    else:
        even, odd = tl.split(tl.reshape(blocks, [blocks.shape[0], 8, 8, COUNT // 2, 2]))
        odd, leaving = _delay(odd, entering, COUNT // 2)
        delayed = tl.reshape(tl.join(odd, even), blocks.shape)
    return delayed, leaving


@triton.jit
def _spread(columns, COUNT: tl.constexpr):
    """``columns`` with zeros between them, so that there are the 16 that a product needs."""
    if COUNT < 16:
        spread = tl.join(columns, tl.zeros_like(columns))
        columns = _spread(tl.reshape(spread, [columns.shape[0], 2 * COUNT]), 2 * COUNT)
    return columns


@triton.jit
def _sum_diagonals(dscores, corners, start, SHAPE: tl.constexpr):
    """[SPAN] sums of the tile's diagonals, and the blocks that the next tile has to add.

    Entry x belongs to the distance ``base + x - SPAN + KEYS``, where ``base`` is the distance of
    the tile's first key from its first query. The top of this file explains the three steps. What
    they read from where is computed again for another ``start``.
    """
    ROWS: tl.constexpr = SHAPE.QUERIES // 16
    BLOCKS: tl.constexpr = SHAPE.KEYS // 8
    SPAN: tl.constexpr = 2 * max(SHAPE.QUERIES, SHAPE.KEYS)
    # Query 16 r + 8 h + b and key 8 n + f.
    halves = tl.permute(tl.reshape(dscores, [ROWS, 2, 8, BLOCKS, 8]), (0, 2, 4, 3, 1))
    upper, lower = tl.split(halves)  # h = 0 and h = 1, each [r, b, f, n]
    upper, corners = _delay(upper, corners, BLOCKS)
    folded = tl.reshape(tl.permute(upper + lower, (1, 2, 0, 3)), [64, ROWS * BLOCKS])
    folded = _spread(folded, ROWS * BLOCKS)
    COLUMNS: tl.constexpr = max(ROWS * BLOCKS, 16)
    # Within a block, f - b + 8 is one of 1 ... 15.
    block = tl.arange(0, 64)[None, :]
    # With wide float32 rows, products need the registers that a constant selector would take.
    middle = hide(8, start) if SHAPE.CHUNK and SHAPE.COLUMNS > 128 else 8
    selector = (block % 8 - block // 8 == tl.arange(0, 16)[:, None] - middle).to(tl.float32)
    sums = tl.dot(selector, folded, input_precision=SHAPE.PRECISION)  # [16, COLUMNS]
    # Distance x lies in two neighboring blocks of each r, and in two neighboring r of each block.
    # The smaller number of parts is summed. Entry 0 is always 0.
    PARTS: tl.constexpr = min(2 * ROWS, BLOCKS)
    entry = tl.arange(0, PARTS * SPAN) + hide(SPAN, start)
    x, part = entry % SPAN, entry // SPAN - 1
    shift = x // 8 - (SPAN - SHAPE.KEYS) // 8 + 2  # n of the block with r = 0 and h = 0
    if BLOCKS < 2 * ROWS:
        n = part
        r, h = (n - shift + 1) >> 1, (n - shift) & 1
    else:
        r, h = part // 2, part % 2
        n = shift + 2 * r - h
    source = (h * 8 + x % 8) * COLUMNS + (r * BLOCKS + n) * (COLUMNS // (ROWS * BLOCKS))
    source = tl.where((n >= 0) & (n < BLOCKS) & (r >= 0) & (r < ROWS), source, 0)
    parts = tl.gather(tl.reshape(sums, [16 * COLUMNS]), source, 0)
    return tl.sum(tl.reshape(parts, [PARTS, SPAN]), 0), corners


@triton.jit
def _as_distances(rows, SHAPE: tl.constexpr):
    """[SPAN] numbers that have the same sum as ``rows``, [BM]."""
    x = tl.arange(0, 2 * max(SHAPE.QUERIES, SHAPE.KEYS))
    return tl.where(x < SHAPE.QUERIES, tl.gather(rows, x % SHAPE.QUERIES, 0), 0.0)


@triton.jit
def _write_distances(sums, base, partial, reach, COUNT: tl.constexpr, SHAPE: tl.constexpr):
    """Store the first COUNT sums; return those below and above the reach, and the others.

    ``sums`` are at distances ``base + x - SPAN + KEYS``. ``partial`` holds the total below -reach,
    then 2 * reach + 1 sums, then the total above reach.
    """
    SPAN: tl.constexpr = 2 * max(SHAPE.QUERIES, SHAPE.KEYS)
    x = tl.arange(0, SPAN)
    index = base + (SHAPE.KEYS - SPAN) + x + reach
    tl.store(partial + 1 + index, sums, mask=(index.to(tl.uint32) <= 2 * reach) & (x < COUNT))
    before = tl.where((index < 0) & (x < COUNT), sums, 0.0)
    after = tl.where((index > 2 * reach) & (x < COUNT), sums, 0.0)
    others = tl.gather(sums, (x + SHAPE.KEYS) % SPAN, 0)
    return before, after, tl.where(x + SHAPE.KEYS < SPAN, others, 0.0)


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
    gap,
    FEATURES: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Add the gradients of one range of key tiles to dq and to the sums for the table."""
    dq, far_sum, diagonals = grads
    corners, carry, before, after = diagonals
    q, dout = queries.q, queries.dout
    row = tl.arange(0, SHAPE.QUERIES)[:, None]
    query = hide(q.first, tiles.first) + tl.arange(0, SHAPE.QUERIES)
    offset = keys.count - q.rows.count
    position = query + offset
    first_key, last_key = visible_keys(position, keys.count, params.limits, FEATURES)
    column = tl.arange(0, SHAPE.KEYS)[None, :]
    for start in range(tiles.first, tiles.last, SHAPE.KEYS):
        # Far tiles of 64 x 64 scores of 128 columns have few values: there, the form costs time.
        if tiles.TABLE or tiles.MASKED or SHAPE.COLUMNS != 128 or SHAPE.QUERIES != 64:
            start = hide(start, keys.count)
        k = load_rows(keys, start, SHAPE.KEYS, tiles.MASKED, SHAPE)  # [BN, COLUMNS]
        v = load_rows(values, start, SHAPE.KEYS, tiles.MASKED, SHAPE)
        product = dot_transposed(q, RowTile(k, keys, start), tiles.MASKED, SHAPE)
        raw, slope = apply_softcap(product, params, FEATURES.SOFTCAP)  # [BM, BN]
        if tiles.TABLE:
            raw += tile_biases(params, start - gap - (q.first + offset), False, SHAPE)
        weights = tl.exp2(raw * params.factor - (queries.lse - tiles.bias)[:, None])
        if tiles.MASKED:
            first, last = (first_key - start)[:, None], (last_key - start)[:, None]
            weights = tl.where(between(column, first, last, FEATURES.LEFT, True), weights, 0.0)
        dweights = dot_transposed(dout, RowTile(v, values, start), tiles.MASKED, SHAPE)
        if FEATURES.DROPOUT:
            keep = dropout_keep_mask(dropout, q.first, row, start, column)
            dweights = tl.where(keep, dweights * dropout.factor, 0.0)
        dscores = weights * (dweights - queries.delta[:, None])  # of the score with its bias
        if FEATURES.DTABLE:
            if tiles.TABLE:
                again = start if SHAPE.CHUNK and SHAPE.COLUMNS > 128 else tiles.first
                sums, corners = _sum_diagonals(dscores, corners, again, SHAPE)
                more_before, more_after, carry = _write_distances(
                    carry + sums,
                    start - gap - (q.first + offset),
                    partial,
                    params.limits.reach,
                    SHAPE.KEYS,
                    SHAPE,
                )
                before += more_before
                after += more_after
            else:
                far_sum += tl.sum(dscores, 1)  # summed over rows once, after the loop
        dscores = dscores * slope
        if SHAPE.CHUNK:
            dq = add_products(dq, dscores, keys, start, SHAPE.KEYS, tiles.MASKED, SHAPE)
        else:
            dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=SHAPE.PRECISION)
    return _QueryGrads(dq, far_sum, _Diagonals(corners, carry, before, after))


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
    first, near, whole, far, last, end = key_ranges(
        first_position, last_position, keys.count, params.limits, FEATURES, SHAPE.KEYS
    )
    # This program's own row of sums for the table.
    partial = partials + tl.program_id(0).to(tl.int64) * (2 * reach + 3)
    SPAN: tl.constexpr = 2 * max(SHAPE.QUERIES, SHAPE.KEYS)
    zeros = tl.zeros([SPAN], tl.float32)
    corners = tl.zeros([SHAPE.QUERIES // 16, 8, 8], tl.float32)
    no_rows = tl.zeros([SHAPE.QUERIES], tl.float32)
    grads = _QueryGrads(
        zero_sums(SHAPE.QUERIES, SHAPE),
        no_rows,
        _Diagonals(corners, zeros, zeros, zeros),
    )
    # fmt: off
    grads = _backward_keys(
        grads, queries, keys, values, params, dropout, partial,
        TileRange(first, near, bias_beyond(params, False, FEATURES), FEATURES.LEFT, False),
        0, FEATURES, SHAPE,
    )
    before = _as_distances(grads.far_sum, SHAPE)
    grads = _QueryGrads(grads.dq, no_rows, grads.diagonals)
    # Keys beyond the reach come first, because the loops that read the table take most registers.
    if FEATURES.BIAS and not FEATURES.LEFT:
        grads = _backward_keys(
            grads, queries, keys, values, params, dropout, partial,
            TileRange(far, last, bias_beyond(params, True, FEATURES), False, False),
            0, FEATURES, SHAPE,
        )
    else:
        grads = _backward_keys(
            grads, queries, keys, values, params, dropout, partial,
            TileRange(last, end, bias_beyond(params, True, FEATURES), True, False),
            0, FEATURES, SHAPE,
        )
    if FEATURES.BIAS:
        edge, edge_end, gap = edge_range(whole, far, last, end, FEATURES)
        after = _as_distances(grads.far_sum, SHAPE)
        grads = _QueryGrads(grads.dq, no_rows, _Diagonals(corners, zeros, before, after))
        if not FEATURES.LEFT:
            grads = _backward_keys(
                grads, queries, keys, values, params, dropout, partial,
                TileRange(near, whole, 0.0, False, True), 0, FEATURES, SHAPE,
            )
        grads = _backward_keys(
            grads, queries, keys, values, params, dropout, partial,
            TileRange(edge, edge_end, 0.0, True, True), gap, FEATURES, SHAPE,
        )
    # fmt: on
    if FEATURES.DTABLE:
        # What is left is written as if a tile without scores followed.
        corners, carry, before, after = grads.diagonals
        nothing = tl.zeros([SHAPE.QUERIES, SHAPE.KEYS], tl.float32)
        following = tl.maximum((edge_end + SHAPE.KEYS - 1) // SHAPE.KEYS * SHAPE.KEYS, edge)
        sums, _ = _sum_diagonals(nothing, corners, following, SHAPE)
        base = following - gap - first_position
        more_before, more_after, _ = _write_distances(
            sums + carry, base, partial, reach, SPAN, SHAPE
        )
        tl.store(partial, tl.sum(before + more_before))
        tl.store(partial + 2 * reach + 2, tl.sum(after + more_after))
    return grads.dq


@triton.jit
def _store_padded(target, values, behind, first, count, QUERIES: tl.constexpr):
    """Store a number per query, and ``behind`` for the QUERY_PADDING behind the last of ``count``.

    Masks, not a branch: with a branch, dropout's loops would be longer.
    """
    query = first + tl.arange(0, QUERIES)
    tl.store(target + query, values, mask=query < count)
    padding = tl.arange(0, QUERY_PADDING)
    is_last = tl.full([QUERY_PADDING], first + QUERIES, tl.int32) >= count
    tl.store(target + count + padding, tl.full([QUERY_PADDING], behind, tl.float32), mask=is_last)


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
    DTABLE: tl.constexpr,
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
    FEATURES: tl.constexpr = Features(LEFT, RIGHT, SOFTCAP, BIAS, DROPOUT, DTABLE)
    SHAPE: tl.constexpr = TileShape(QUERIES, KEYS, HEAD_DIM, COLUMNS, CHUNK, PRECISION)
    number, head = program_place(HEADS, RIGHT)
    seq, first, span_q, span_k = find_tile(number, cu_seqlens_q, cu_seqlens_k, num_seqs, QUERIES)
    if first >= span_q.count:  # the grid has a few programs without a tile
        return
    q_rows = select_rows(q, span_q, Q_STRIDE, head, q_head_stride, HEAD_UNIT)
    dout_rows = select_rows(dout, span_q, DOUT_STRIDE, head, dout_head_stride, HEAD_UNIT)
    out_rows = select_rows(out, span_q, HEADS * HEAD_DIM, head, HEAD_DIM, 1)  # contiguous
    q_tile = RowTile(load_rows(q_rows, first, QUERIES, True, SHAPE), q_rows, first)
    dout_tile = RowTile(load_rows(dout_rows, first, QUERIES, True, SHAPE), dout_rows, first)
    out_tile = load_rows(out_rows, first, QUERIES, True, SHAPE)
    query = first + tl.arange(0, QUERIES)
    row_delta = tl.sum(dout_tile.data.to(tl.float32) * out_tile.to(tl.float32), 1)
    row_lse = load_lse(lse + head.to(tl.int64) * total_q + span_q.start, query, span_q.count)
    limits = DistanceLimits(left, right, reach)
    params = params_of_head(scale, softcap, table, head, limits, FEATURES)
    # delta and the logsumexp in base 2 are stored for the kernel of dk and dv, which runs next. It
    # takes the logsumexp less the bias beyond the reach as it is. Behind the last query, every
    # weight is 0.
    stored = padded_start(head, seq, span_q, total_q, num_seqs)
    _store_padded(delta + stored, row_delta, 0.0, first, span_q.count, QUERIES)
    _store_padded(base2_lse + stored, row_lse, float("inf"), first, span_q.count, QUERIES)
    if BIAS:
        for beyond in tl.static_range(2):
            shifted = row_lse - bias_beyond(params, beyond == 1, FEATURES)
            target = base2_lse + (beyond + 1) * padded_plane(HEADS, total_q, num_seqs) + stored
            _store_padded(target, shifted, float("inf"), first, span_q.count, QUERIES)
    keys = select_rows(k, span_k, K_STRIDE, head // GROUP, k_head_stride, HEAD_UNIT)
    values = select_rows(v, span_k, V_STRIDE, head // GROUP, v_head_stride, HEAD_UNIT)
    dropout = dropout_params(tl.load(seed) if DROPOUT else 0, seq, head, dropout_p)
    queries = _QueryTile(q_tile, dout_tile, row_lse, row_delta)
    grad = _backward_all_keys(queries, keys, values, params, dropout, partials, FEATURES, SHAPE)
    first, span_q, head = find_again(number, seq, head, cu_seqlens_q, QUERIES)
    dq_rows = select_rows(dq, span_q, HEADS * HEAD_DIM, head, HEAD_DIM, 1)
    store_sums(dq_rows, grad, scale, first, QUERIES, SHAPE)
