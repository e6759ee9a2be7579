"""The backward kernels: dq with the bias's gradient, then dk and dv.

    P  = exp(score - lse),   dP = dout @ v.T,   delta[m] = sum(dout[m] * out[m])
    dS = P * (dP - delta),   dq = scale * dS @ k,   dk = scale * dS.T @ q,   dv = P.T @ dout
    dtable[d + reach] = sum of dS over all scores at distance d

In the dq kernel a tile of dS that lies beyond the table's reach adds its sum to one number. In
between, the tile is skewed: row i is rotated left by i, and equal distances stand in one column.
With no more queries than keys in a tile every column then holds two distances, KEYS apart. The
nearer one is shared with the next tile of keys and waits for it in registers, so each entry of a
row that belongs to this program alone is written once. Those rows are summed afterwards: no
atomics, the same bits in every run. docs/attention.md draws it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._triton import tl, triton
from .primitives import (
    Dropout,
    Rule,
    bend,
    biased,
    ends_of,
    find_tile,
    in_sight,
    kept,
    key_ranges,
    load_lse,
    load_rows,
    multiply,
    query_ranges,
    rows_of,
    store_rows,
)
from .spec import AttentionSpec
from .tiles import chunk_for, num_tiles, padded_head_dim, precision, tile_for


@triton.jit
def _sum_diagonals(dscores, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """[KEYS] sums at distances ``base + c``, and at ``base + c - KEYS``, for columns c.

    ``base`` is the distance of the first key from the first query.
    """
    row = tl.arange(0, QUERIES)[:, None]
    column = tl.arange(0, KEYS)[None, :]
    skewed = tl.gather(dscores, (column + row) % KEYS, 1)
    unwrapped = column + row < KEYS
    nearer = tl.sum(tl.where(unwrapped, skewed, 0.0), 0)
    farther = tl.sum(tl.where(unwrapped, 0.0, skewed), 0)
    return nearer, farther


@triton.jit
def _write_distances(sums, base, partial, reach, KEYS: tl.constexpr):
    """Store the sums at distances ``base + c - KEYS``; what is beyond the reach comes back."""
    index = base - KEYS + tl.arange(0, KEYS) + reach
    tl.store(partial + 1 + index, sums, mask=(index >= 0) & (index <= 2 * reach))
    before = tl.sum(tl.where(index < 0, sums, 0.0))
    after = tl.sum(tl.where(index > 2 * reach, sums, 0.0))
    return before, after


@triton.jit
def _pull_queries(
    dq,
    far_sum,
    carry,
    before_sum,
    after_sum,
    q,
    dout,
    queries,
    douts,
    first_query,
    keys,
    values,
    rule,
    constant,
    dropout,
    partial,
    lse,
    delta,
    first,
    last,
    MASKED: tl.constexpr,
    TABLE: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DTABLE: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what the key tiles from ``first`` up to ``last`` give to dq and to the bias's sums."""
    query = first_query + tl.arange(0, QUERIES)
    place = query + (keys.count - queries.count)
    first_place = first_query + (keys.count - queries.count)
    for start in range(first, last, KEYS):
        k = load_rows(keys, start, KEYS, WIDTH, COLUMNS, MASKED)
        v = load_rows(values, start, KEYS, WIDTH, COLUMNS, MASKED)
        key = start + tl.arange(0, KEYS)
        distance = key[None, :] - place[:, None]  # [BM, BN]
        product = multiply(q, queries, first_query, k, keys, start, WIDTH, CHUNK, MASKED, PRECISION)
        scores, slope = bend(product, rule, SOFTCAP)
        scores = biased(scores, distance, rule, constant, TABLE)
        weights = tl.exp2(scores - lse[:, None])
        if MASKED:
            seen = in_sight(distance, key[None, :], keys.count, rule, LEFT, RIGHT)
            weights = tl.where(seen, weights, 0.0)
        pull = multiply(dout, douts, first_query, v, values, start, WIDTH, CHUNK, MASKED, PRECISION)
        if DROPOUT:
            keep = kept(dropout, query[:, None], key[None, :])
            pull = tl.where(keep, pull / (1.0 - dropout.chance), 0.0)
        dscores = weights * (pull - delta[:, None])
        if DTABLE:
            if TABLE:
                nearer, farther = _sum_diagonals(dscores, QUERIES, KEYS)
                before, after = _write_distances(
                    carry + farther, start - first_place, partial, rule.reach, KEYS
                )
                before_sum += before
                after_sum += after
                carry = nearer
            else:
                far_sum += tl.sum(dscores, 1)
        dscores = dscores * slope
        if CHUNK:  # read late, so that it takes no registers before
            k = load_rows(keys, start, KEYS, WIDTH, COLUMNS, MASKED)
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, far_sum, carry, before_sum, after_sum


@triton.jit(do_not_specialize=["num_seqs", "total_q", "left", "right", "reach"])
def _attention_backward_q_kernel(
    dout,
    q,
    k,
    v,
    out,
    lse,
    table,
    seed,
    cu_seqlens_q,
    cu_seqlens_k,
    dq,
    delta,
    partials,
    num_seqs,
    total_q,
    dout_stride,
    dout_head_stride,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    scale: tl.float32,
    softcap: tl.float32,
    dropout_p: tl.float32,
    left,
    right,
    reach,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    DTABLE: tl.constexpr,
    DROPOUT: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    seq, first_query, span_q, span_k = find_tile(
        tl.program_id(0), cu_seqlens_q, cu_seqlens_k, num_seqs, QUERIES
    )
    num_queries, num_keys = span_q.count, span_k.count
    if first_query >= num_queries:
        return
    queries = rows_of(q, span_q, q_stride, head, q_head_stride)
    douts = rows_of(dout, span_q, dout_stride, head, dout_head_stride)
    outs = rows_of(out, span_q, num_heads * WIDTH, head, WIDTH)
    dqs = rows_of(dq, span_q, num_heads * WIDTH, head, WIDTH)
    q_tile = load_rows(queries, first_query, QUERIES, WIDTH, COLUMNS, True)
    dout_tile = load_rows(douts, first_query, QUERIES, WIDTH, COLUMNS, True)
    out_tile = load_rows(outs, first_query, QUERIES, WIDTH, COLUMNS, True)
    query = first_query + tl.arange(0, QUERIES)
    head_rows = head.to(tl.int64) * total_q + span_q.start
    row_delta = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + head_rows + query, row_delta, mask=query < num_queries)
    row_lse = load_lse(lse + head_rows, query, num_queries)
    keys = rows_of(k, span_k, k_stride, head // GROUP, k_head_stride)
    values = rows_of(v, span_k, v_stride, head // GROUP, v_head_stride)
    rule = Rule(scale, softcap, table + head * (2 * reach + 1), reach, left, right)
    before, after = ends_of(rule.table, reach, BIAS)
    dropout = Dropout(tl.load(seed) if DROPOUT else 0, seq, head, dropout_p)
    first_place = first_query + (num_keys - num_queries)
    last_place = tl.minimum(first_query + QUERIES, num_queries) - 1 + (num_keys - num_queries)
    first, near, far, whole, end = key_ranges(
        first_place, last_place, num_keys, left, right, reach, LEFT, RIGHT, BIAS, KEYS
    )
    partial = partials + (tl.program_id(0).to(tl.int64) * num_heads + head) * (2 * reach + 3)
    grad = tl.zeros([QUERIES, COLUMNS], tl.float32)
    rows_before = tl.zeros([QUERIES], tl.float32)
    rows_after = tl.zeros([QUERIES], tl.float32)
    carry = tl.zeros([KEYS], tl.float32)
    before_sum = tl.sum(carry)
    after_sum = tl.sum(carry)
    # fmt: off
    grad, rows_before, carry, before_sum, after_sum = _pull_queries(
        grad, rows_before, carry, before_sum, after_sum, q_tile, dout_tile, queries, douts,
        first_query, keys, values, rule, before, dropout, partial, row_lse, row_delta, first, near,
        LEFT, False, LEFT, RIGHT, SOFTCAP, DTABLE, DROPOUT, WIDTH, COLUMNS, CHUNK, QUERIES, KEYS,
        PRECISION,
    )
    if BIAS:
        grad, rows_before, carry, before_sum, after_sum = _pull_queries(
            grad, rows_before, carry, before_sum, after_sum, q_tile, dout_tile, queries, douts,
            first_query, keys, values, rule, before, dropout, partial, row_lse, row_delta, near,
            tl.minimum(far, end), True, True, LEFT, RIGHT, SOFTCAP, DTABLE, DROPOUT, WIDTH,
            COLUMNS, CHUNK, QUERIES, KEYS, PRECISION,
        )
        if DTABLE:
            # What the last of those tiles left for a next one. `far` is that one's first key.
            carried_before, carried_after = _write_distances(
                carry, far - first_place, partial, reach, KEYS
            )
            before_sum += carried_before
            after_sum += carried_after
        if not RIGHT and not LEFT:
            grad, rows_after, carry, before_sum, after_sum = _pull_queries(
                grad, rows_after, carry, before_sum, after_sum, q_tile, dout_tile, queries, douts,
                first_query, keys, values, rule, after, dropout, partial, row_lse, row_delta, far,
                whole, False, False, LEFT, RIGHT, SOFTCAP, DTABLE, DROPOUT, WIDTH, COLUMNS, CHUNK,
                QUERIES, KEYS, PRECISION,
            )
            far = whole
    grad, rows_after, carry, before_sum, after_sum = _pull_queries(
        grad, rows_after, carry, before_sum, after_sum, q_tile, dout_tile, queries, douts,
        first_query, keys, values, rule, after, dropout, partial, row_lse, row_delta, far, end,
        True, False, LEFT, RIGHT, SOFTCAP, DTABLE, DROPOUT, WIDTH, COLUMNS, CHUNK, QUERIES, KEYS,
        PRECISION,
    )
    # fmt: on
    if DTABLE:
        tl.store(partial, before_sum + tl.sum(rows_before))
        tl.store(partial + 2 * reach + 2, after_sum + tl.sum(rows_after))
    store_rows(dqs, grad * scale, first_query, QUERIES, WIDTH, COLUMNS)


@triton.jit
def _pull_keys(
    dk,
    dv,
    k,
    v,
    keys,
    values,
    first_key,
    queries,
    douts,
    rule,
    constant,
    dropout,
    lse,
    delta,
    first,
    last,
    MASKED: tl.constexpr,
    TABLE: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what the query tiles from ``first`` up to ``last`` give to dk and dv."""
    key = first_key + tl.arange(0, KEYS)
    offset = keys.count - queries.count
    for start in range(first, last, QUERIES):
        q = load_rows(queries, start, QUERIES, WIDTH, COLUMNS, True)
        dout = load_rows(douts, start, QUERIES, WIDTH, COLUMNS, True)
        query = start + tl.arange(0, QUERIES)
        row_lse = load_lse(lse, query, queries.count)
        row_delta = tl.load(delta + query, mask=query < queries.count, other=0.0)
        distance = key[:, None] - (query + offset)[None, :]  # [BN, BM]
        product = multiply(k, keys, first_key, q, queries, start, WIDTH, CHUNK, True, PRECISION)
        scores, slope = bend(product, rule, SOFTCAP)
        scores = biased(scores, distance, rule, constant, TABLE)
        weights = tl.exp2(scores - row_lse[None, :])
        if MASKED:
            # Keys behind the last one have rows of their own, which nobody stores.
            seen = in_sight(distance, key[:, None], key[:, None] + 1, rule, LEFT, RIGHT)
            weights = tl.where(seen, weights, 0.0)
        pull = multiply(v, values, first_key, dout, douts, start, WIDTH, CHUNK, True, PRECISION)
        surviving = weights
        if DROPOUT:
            keep = kept(dropout, query[None, :], key[:, None])
            surviving = tl.where(keep, weights / (1.0 - dropout.chance), 0.0)
            pull = tl.where(keep, pull / (1.0 - dropout.chance), 0.0)
        if CHUNK:  # read late, so that it takes no registers before
            dout = load_rows(douts, start, QUERIES, WIDTH, COLUMNS, True)
        dv = tl.dot(surviving.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dscores = weights * (pull - row_delta[None, :]) * slope
        if CHUNK:
            q = load_rows(queries, start, QUERIES, WIDTH, COLUMNS, True)
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["num_seqs", "total_q", "left", "right", "reach"])
def _attention_backward_kv_kernel(
    dout,
    q,
    k,
    v,
    lse,
    delta,
    table,
    seed,
    cu_seqlens_q,
    cu_seqlens_k,
    dk,
    dv,
    num_seqs,
    total_q,
    dout_stride,
    dout_head_stride,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    scale: tl.float32,
    softcap: tl.float32,
    dropout_p: tl.float32,
    left,
    right,
    reach,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    kv_head = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    seq, first_key, span_k, span_q = find_tile(
        tl.program_id(0), cu_seqlens_k, cu_seqlens_q, num_seqs, KEYS
    )
    num_queries, num_keys = span_q.count, span_k.count
    if first_key >= num_keys:
        return
    keys = rows_of(k, span_k, k_stride, kv_head, k_head_stride)
    values = rows_of(v, span_k, v_stride, kv_head, v_head_stride)
    dks = rows_of(dk, span_k, kv_heads * WIDTH, kv_head, WIDTH)
    dvs = rows_of(dv, span_k, kv_heads * WIDTH, kv_head, WIDTH)
    last_key = tl.minimum(first_key + KEYS, num_keys) - 1
    offset = num_keys - num_queries
    first, near, far, end = query_ranges(
        first_key, last_key, offset, num_queries, left, right, reach, LEFT, RIGHT, BIAS, QUERIES
    )
    k_tile = load_rows(keys, first_key, KEYS, WIDTH, COLUMNS, True)
    v_tile = load_rows(values, first_key, KEYS, WIDTH, COLUMNS, True)
    seed_value = tl.load(seed) if DROPOUT else 0
    grad_k = tl.zeros([KEYS, COLUMNS], tl.float32)
    grad_v = tl.zeros([KEYS, COLUMNS], tl.float32)
    for member in range(GROUP):  # the query heads that share these keys
        head = kv_head * GROUP + member
        queries = rows_of(q, span_q, q_stride, head, q_head_stride)
        douts = rows_of(dout, span_q, dout_stride, head, dout_head_stride)
        head_lse = lse + head.to(tl.int64) * total_q + span_q.start
        head_delta = delta + head.to(tl.int64) * total_q + span_q.start
        rule = Rule(scale, softcap, table + head * (2 * reach + 1), reach, left, right)
        before, after = ends_of(rule.table, reach, BIAS)
        dropout = Dropout(seed_value, seq, head, dropout_p)
        # fmt: off
        grad_k, grad_v = _pull_keys(
            grad_k, grad_v, k_tile, v_tile, keys, values, first_key, queries, douts, rule, after,
            dropout, head_lse, head_delta, first, tl.minimum(near, end), LEFT or RIGHT, False,
            LEFT, RIGHT, SOFTCAP, DROPOUT, WIDTH, COLUMNS, CHUNK, QUERIES, KEYS, PRECISION,
        )
        if BIAS:
            grad_k, grad_v = _pull_keys(
                grad_k, grad_v, k_tile, v_tile, keys, values, first_key, queries, douts, rule,
                after, dropout, head_lse, head_delta, near, tl.minimum(far, end), LEFT or RIGHT,
                True, LEFT, RIGHT, SOFTCAP, DROPOUT, WIDTH, COLUMNS, CHUNK, QUERIES, KEYS,
                PRECISION,
            )
        grad_k, grad_v = _pull_keys(
            grad_k, grad_v, k_tile, v_tile, keys, values, first_key, queries, douts, rule, before,
            dropout, head_lse, head_delta, far, end, LEFT, False, LEFT, RIGHT, SOFTCAP, DROPOUT,
            WIDTH, COLUMNS, CHUNK, QUERIES, KEYS, PRECISION,
        )
        # fmt: on
    store_rows(dks, grad_k * scale, first_key, KEYS, WIDTH, COLUMNS)
    store_rows(dvs, grad_v, first_key, KEYS, WIDTH, COLUMNS)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    table: Tensor | None,
    seed: Tensor | None,
    spec: AttentionSpec,
    needs_table: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv, and in float32 the gradient of the table where it is needed."""
    total_q, heads, head_dim = q.shape
    num_seqs = cu_seqlens_q.numel() - 1
    kv_heads = k.shape[1]
    left, right = spec.limits
    reach = 0 if table is None else table.shape[1] // 2
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta = torch.empty_like(lse)
    tile = tile_for("dq", q, bias=table is not None, dropout=spec.dropout_p > 0.0)
    tiles_q = num_tiles(total_q, num_seqs, tile.queries)
    partials = None
    if needs_table:
        partials = q.new_zeros(tiles_q, heads, 2 * reach + 3, dtype=torch.float32)
    shared = {
        "dout": dout,
        "q": q,
        "k": k,
        "v": v,
        "lse": lse,
        "delta": delta,
        "table": lse if table is None else table,
        "seed": lse if seed is None else seed,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "num_seqs": num_seqs,
        "total_q": total_q,
        "dout_stride": dout.stride(0),
        "dout_head_stride": dout.stride(1),
        "q_stride": q.stride(0),
        "q_head_stride": q.stride(1),
        "k_stride": k.stride(0),
        "k_head_stride": k.stride(1),
        "v_stride": v.stride(0),
        "v_head_stride": v.stride(1),
        "scale": spec.scale,
        "softcap": spec.softcap or 1.0,
        "dropout_p": spec.dropout_p,
        "left": left,
        "right": right,
        "reach": reach,
        "LEFT": left >= 0,
        "RIGHT": right >= 0,
        "SOFTCAP": spec.softcap is not None,
        "BIAS": table is not None,
        "DROPOUT": spec.dropout_p > 0.0,
        "GROUP": heads // kv_heads,
        "WIDTH": head_dim,
        "COLUMNS": padded_head_dim(q),
        "CHUNK": chunk_for(q),
        "PRECISION": precision(q),
    }
    if dq.numel():
        _attention_backward_q_kernel[(tiles_q, heads)](
            **shared,
            out=out,
            dq=dq,
            partials=lse if partials is None else partials,
            DTABLE=needs_table,
            QUERIES=tile.queries,
            KEYS=tile.keys,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    kernel = "dkv" if kv_heads == heads else "dkv, grouped"
    tile = tile_for(kernel, q, bias=table is not None, dropout=spec.dropout_p > 0.0)
    if dk.numel():
        _attention_backward_kv_kernel[(num_tiles(k.shape[0], num_seqs, tile.keys), kv_heads)](
            **shared,
            dk=dk,
            dv=dv,
            QUERIES=tile.queries,
            KEYS=tile.keys,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return dq, dk, dv, None if partials is None else _sum_partials(partials)


def _sum_partials(partials: Tensor) -> Tensor:
    """``(tiles, heads, 2 * reach + 3)`` to ``(heads, 2 * reach + 1)``: the ends are beyond it."""
    sums = partials.sum(0)
    dtable = sums[:, 1:-1].contiguous()
    dtable[:, 0] += sums[:, 0]
    dtable[:, -1] += sums[:, -1]
    return dtable
