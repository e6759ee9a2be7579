"""The loop of the kernel for dk and dv over tiles of queries, for 16-bit rows of 256 columns.

    P = exp(score - lse),    dS = P * (dout @ v.T - delta)
    dk.T = scale * q.T @ dS,    dv.T = dout.T @ P

dk and dv of 64 keys take all registers of four warps, and with eight warps there are two warpgroups
for 64 keys. So both sums are computed transposed: the 256 columns are the rows of the products, and
each warpgroup has half of them. The scores are divided between the warpgroups by keys, see
`_dot_by_columns`, and go from one to the other through shared memory.
"""

from __future__ import annotations

from .._triton import tl, triton
from .dropout import dropout_keep_mask
from .primitives import apply_softcap, between, tile_biases, visible_keys
from .rows import hide, load_rows


@triton.jit
def _dot_by_columns(left, right, exists):
    """``left @ right.T``, of which each warpgroup computes some columns.

    Triton gives warps no columns of a product whose result it sees enter another product, only
    rows: with 64 rows, all warpgroups would compute the same. It does not see that past a branch.
    ``exists`` must be true; it must not be a constant to the compiler.
    """
    if exists:
        product = tl.dot(left, tl.trans(right))
    else:
        product = tl.zeros([left.shape[0], right.shape[0]], tl.float32)
    return product


@triton.jit
def backward_queries_wide(
    dk,  # [COLUMNS, BN], without the factor scale
    dv,  # [COLUMNS, BN]
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
    """Add the gradients of one range of query tiles to dk.T and dv.T. EDGE: the queries end within.

    The steps are those of `backward_kv._backward_queries`.
    """
    row, column = tl.arange(0, SHAPE.QUERIES), tl.arange(0, SHAPE.KEYS)
    first_position = k.first - (k.rows.count - queries.q.count)  # of the query at distance 0
    exists = k.rows.count > 0
    for start in range(tiles.first, tiles.last, SHAPE.QUERIES):
        if EDGE and FEATURES.BIAS and FEATURES.RIGHT:
            start = tl.where(start < jump.at, start, start + jump.distance)
        start = hide(start, k.rows.count)
        q = load_rows(queries.q, start, SHAPE.QUERIES, EDGE, SHAPE)  # [BM, COLUMNS]
        dout = load_rows(queries.dout, start, SHAPE.QUERIES, EDGE, SHAPE)
        query = start + row
        # Behind the last query, lse is +inf and delta is 0.
        product = _dot_by_columns(q, k.data, exists)
        raw, slope = apply_softcap(product, params, FEATURES.SOFTCAP)  # [BM, BN]
        if tiles.TABLE:
            raw += tile_biases(params, first_position - start, False, SHAPE)
        row_lse = tl.load(queries.lse + query)
        weights = tl.exp2(raw * params.factor - row_lse[:, None])
        if tiles.MASKED:
            position = query - first_position  # the column of the key at distance 0
            first, last = visible_keys(position, SHAPE.KEYS, params.limits, FEATURES)
            visible = between(
                column[None, :], first[:, None], last[:, None], FEATURES.LEFT, FEATURES.RIGHT
            )
            weights = tl.where(visible, weights, 0.0)
        dweights = _dot_by_columns(dout, v.data, exists)
        dropped = weights  # the weights that the forward multiplied by v
        if FEATURES.DROPOUT:
            keep = dropout_keep_mask(dropout, start, row[:, None], k.first, column[None, :])
            dropped = tl.where(keep, weights * dropout.factor, 0.0)
            dweights = tl.where(keep, dweights * dropout.factor, 0.0)
        dv = tl.dot(tl.trans(dout), dropped.to(dout.dtype), dv)
        row_delta = tl.load(queries.delta + query)
        dscores = weights * (dweights - row_delta[:, None]) * slope
        dk = tl.dot(tl.trans(q), dscores.to(q.dtype), dk)
    return dk, dv
