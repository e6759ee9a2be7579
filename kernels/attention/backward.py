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
    bend,
    biased,
    find_tile,
    in_sight,
    kept,
    key_ranges,
    load_rows,
    query_ranges,
    store_rows,
)
from .spec import AttentionSpec
from .tiles import num_tiles, padded_head_dim, precision, tile_for


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
    keys,
    values,
    table,
    constant,
    partial,
    lse,
    delta,
    seed,
    place,
    query,
    first_place,
    first,
    last,
    num_keys,
    seq,
    head,
    key_stride,
    value_stride,
    scale,
    softcap,
    reach,
    left,
    right,
    dropout_p,
    MASKED: tl.constexpr,
    TABLE: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DTABLE: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what the key tiles from ``first`` up to ``last`` give to dq and to the bias's sums."""
    for start in range(first, last, KEYS):
        k = load_rows(keys, start, num_keys, key_stride, KEYS, WIDTH, COLUMNS, MASKED)
        v = load_rows(values, start, num_keys, value_stride, KEYS, WIDTH, COLUMNS, MASKED)
        key = start + tl.arange(0, KEYS)
        distance = key[None, :] - place[:, None]  # [BM, BN]
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores, slope = bend(product, scale, softcap, SOFTCAP)
        scores = biased(scores, distance, table, reach, constant, TABLE)
        weights = tl.exp2(scores - lse[:, None])
        if MASKED:
            seen = in_sight(distance, key[None, :], num_keys, left, right, LEFT, RIGHT)
            weights = tl.where(seen, weights, 0.0)
        pull = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            keep = kept(seed, seq, head, query[:, None], key[None, :], dropout_p)
            pull = tl.where(keep, pull / (1.0 - dropout_p), 0.0)
        dscores = weights * (pull - delta[:, None])
        if DTABLE:
            if TABLE:
                nearer, farther = _sum_diagonals(dscores, QUERIES, KEYS)
                before, after = _write_distances(
                    carry + farther, start - first_place, partial, reach, KEYS
                )
                before_sum += before
                after_sum += after
                carry = nearer
            else:
                far_sum += tl.sum(dscores, 1)
        dscores = dscores * slope
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
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    seq, first_query = find_tile(tl.program_id(0), cu_seqlens_q, num_seqs, QUERIES)
    start_q = tl.load(cu_seqlens_q + seq).to(tl.int64)
    num_queries = (tl.load(cu_seqlens_q + seq + 1) - start_q).to(tl.int32)
    if first_query >= num_queries:
        return
    start_k = tl.load(cu_seqlens_k + seq).to(tl.int64)
    num_keys = (tl.load(cu_seqlens_k + seq + 1) - start_k).to(tl.int32)
    kv_head = (head // GROUP).to(tl.int64)
    q += start_q * q_stride + head.to(tl.int64) * q_head_stride
    dout += start_q * dout_stride + head.to(tl.int64) * dout_head_stride
    k += start_k * k_stride + kv_head * k_head_stride
    v += start_k * v_stride + kv_head * v_head_stride
    out += (start_q * num_heads + head) * WIDTH
    dq += (start_q * num_heads + head) * WIDTH
    queries = load_rows(q, first_query, num_queries, q_stride, QUERIES, WIDTH, COLUMNS, True)
    douts = load_rows(dout, first_query, num_queries, dout_stride, QUERIES, WIDTH, COLUMNS, True)
    outs = load_rows(
        out, first_query, num_queries, num_heads * WIDTH, QUERIES, WIDTH, COLUMNS, True
    )
    query = first_query + tl.arange(0, QUERIES)
    row = head.to(tl.int64) * total_q + start_q + query
    row_delta = tl.sum(douts.to(tl.float32) * outs.to(tl.float32), 1)
    tl.store(delta + row, row_delta, mask=query < num_queries)
    row_lse = tl.load(lse + row, mask=query < num_queries, other=float("inf"))
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse) * 1.4426950408889634
    place = query + (num_keys - num_queries)
    first_place = first_query + (num_keys - num_queries)
    last_place = tl.minimum(first_query + QUERIES, num_queries) - 1 + (num_keys - num_queries)
    seed_value = tl.load(seed) if DROPOUT else 0
    before = 0.0
    after = 0.0
    if BIAS:
        table += head * (2 * reach + 1)
        before = tl.load(table)
        after = tl.load(table + 2 * reach)
    partial = partials + (tl.program_id(0).to(tl.int64) * num_heads + head) * (2 * reach + 3)
    first, near, far, whole, end = key_ranges(
        first_place, last_place, num_keys, left, right, reach, LEFT, RIGHT, BIAS, KEYS
    )
    grad = tl.zeros([QUERIES, COLUMNS], tl.float32)
    rows_before = tl.zeros([QUERIES], tl.float32)
    rows_after = tl.zeros([QUERIES], tl.float32)
    carry = tl.zeros([KEYS], tl.float32)
    before_sum = tl.sum(carry)
    after_sum = tl.sum(carry)
    # fmt: off
    grad, rows_before, carry, before_sum, after_sum = _pull_queries(
        grad, rows_before, carry, before_sum, after_sum, queries, douts, k, v, table, before,
        partial, row_lse, row_delta, seed_value, place, query, first_place, first, near, num_keys,
        seq, head, k_stride, v_stride, scale, softcap, reach, left, right, dropout_p,
        LEFT, False, LEFT, RIGHT, SOFTCAP, DTABLE, DROPOUT, WIDTH, COLUMNS, QUERIES, KEYS,
        PRECISION,
    )
    if BIAS:
        last_near = tl.minimum(far, end)
        grad, rows_before, carry, before_sum, after_sum = _pull_queries(
            grad, rows_before, carry, before_sum, after_sum, queries, douts, k, v, table, before,
            partial, row_lse, row_delta, seed_value, place, query, first_place, near, last_near,
            num_keys, seq, head, k_stride, v_stride, scale, softcap, reach, left, right, dropout_p,
            True, True, LEFT, RIGHT, SOFTCAP, DTABLE, DROPOUT, WIDTH, COLUMNS, QUERIES, KEYS,
            PRECISION,
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
                grad, rows_after, carry, before_sum, after_sum, queries, douts, k, v, table, after,
                partial, row_lse, row_delta, seed_value, place, query, first_place, far, whole,
                num_keys, seq, head, k_stride, v_stride, scale, softcap, reach, left, right,
                dropout_p,
                False, False, LEFT, RIGHT, SOFTCAP, DTABLE, DROPOUT, WIDTH, COLUMNS, QUERIES,
                KEYS, PRECISION,
            )
            far = whole
    grad, rows_after, carry, before_sum, after_sum = _pull_queries(
        grad, rows_after, carry, before_sum, after_sum, queries, douts, k, v, table, after,
        partial, row_lse, row_delta, seed_value, place, query, first_place, far, end, num_keys,
        seq, head, k_stride, v_stride, scale, softcap, reach, left, right, dropout_p,
        True, False, LEFT, RIGHT, SOFTCAP, DTABLE, DROPOUT, WIDTH, COLUMNS, QUERIES, KEYS,
        PRECISION,
    )
    # fmt: on
    if DTABLE:
        tl.store(partial, before_sum + tl.sum(rows_before))
        tl.store(partial + 2 * reach + 2, after_sum + tl.sum(rows_after))
    store_rows(
        dq, grad * scale, first_query, num_queries, num_heads * WIDTH, QUERIES, WIDTH, COLUMNS
    )


@triton.jit
def _pull_keys(
    dk,
    dv,
    k,
    v,
    queries,
    douts,
    table,
    constant,
    lse,
    delta,
    seed,
    key,
    offset,
    first,
    last,
    num_queries,
    seq,
    head,
    q_stride,
    dout_stride,
    scale,
    softcap,
    reach,
    left,
    right,
    dropout_p,
    MASKED: tl.constexpr,
    TABLE: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what the query tiles from ``first`` up to ``last`` give to dk and dv."""
    for start in range(first, last, QUERIES):
        q = load_rows(queries, start, num_queries, q_stride, QUERIES, WIDTH, COLUMNS, True)
        dout = load_rows(douts, start, num_queries, dout_stride, QUERIES, WIDTH, COLUMNS, True)
        query = start + tl.arange(0, QUERIES)
        # Rows behind the last query, and those that see no key, weigh nothing.
        row_lse = tl.load(lse + query, mask=query < num_queries, other=float("inf"))
        row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse) * 1.4426950408889634
        row_delta = tl.load(delta + query, mask=query < num_queries, other=0.0)
        distance = key[:, None] - (query + offset)[None, :]  # [BN, BM]
        product = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        scores, slope = bend(product, scale, softcap, SOFTCAP)
        scores = biased(scores, distance, table, reach, constant, TABLE)
        weights = tl.exp2(scores - row_lse[None, :])
        if MASKED:
            # Keys behind the last one have rows of their own, which nobody stores.
            seen = in_sight(distance, key[:, None], key[:, None] + 1, left, right, LEFT, RIGHT)
            weights = tl.where(seen, weights, 0.0)
        pull = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        surviving = weights
        if DROPOUT:
            keep = kept(seed, seq, head, query[None, :], key[:, None], dropout_p)
            surviving = tl.where(keep, weights / (1.0 - dropout_p), 0.0)
            pull = tl.where(keep, pull / (1.0 - dropout_p), 0.0)
        dv = tl.dot(surviving.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dscores = weights * (pull - row_delta[None, :]) * slope
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
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    kv_head = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    seq, first_key = find_tile(tl.program_id(0), cu_seqlens_k, num_seqs, KEYS)
    start_k = tl.load(cu_seqlens_k + seq).to(tl.int64)
    num_keys = (tl.load(cu_seqlens_k + seq + 1) - start_k).to(tl.int32)
    if first_key >= num_keys:
        return
    start_q = tl.load(cu_seqlens_q + seq).to(tl.int64)
    num_queries = (tl.load(cu_seqlens_q + seq + 1) - start_q).to(tl.int32)
    k += start_k * k_stride + kv_head.to(tl.int64) * k_head_stride
    v += start_k * v_stride + kv_head.to(tl.int64) * v_head_stride
    dk += (start_k * kv_heads + kv_head) * WIDTH
    dv += (start_k * kv_heads + kv_head) * WIDTH
    keys = load_rows(k, first_key, num_keys, k_stride, KEYS, WIDTH, COLUMNS, True)
    values = load_rows(v, first_key, num_keys, v_stride, KEYS, WIDTH, COLUMNS, True)
    key = first_key + tl.arange(0, KEYS)
    last_key = tl.minimum(first_key + KEYS, num_keys) - 1
    offset = num_keys - num_queries
    seed_value = tl.load(seed) if DROPOUT else 0
    first, near, far, end = query_ranges(
        first_key, last_key, offset, num_queries, left, right, reach, LEFT, RIGHT, BIAS, QUERIES
    )
    grad_k = tl.zeros([KEYS, COLUMNS], tl.float32)
    grad_v = tl.zeros([KEYS, COLUMNS], tl.float32)
    for member in range(GROUP):  # the query heads that share these keys
        head = kv_head * GROUP + member
        queries = q + start_q * q_stride + head.to(tl.int64) * q_head_stride
        douts = dout + start_q * dout_stride + head.to(tl.int64) * dout_head_stride
        head_lse = lse + head.to(tl.int64) * total_q + start_q
        head_delta = delta + head.to(tl.int64) * total_q + start_q
        head_table = table + head * (2 * reach + 1)
        before = 0.0
        after = 0.0
        if BIAS:
            before = tl.load(head_table)
            after = tl.load(head_table + 2 * reach)
        # fmt: off
        grad_k, grad_v = _pull_keys(
            grad_k, grad_v, keys, values, queries, douts, head_table, after, head_lse, head_delta,
            seed_value, key, offset, first, tl.minimum(near, end), num_queries, seq, head, q_stride,
            dout_stride, scale, softcap, reach, left, right, dropout_p,
            LEFT or RIGHT, False, LEFT, RIGHT, SOFTCAP, DROPOUT, WIDTH, COLUMNS, QUERIES, PRECISION,
        )
        if BIAS:
            grad_k, grad_v = _pull_keys(
                grad_k, grad_v, keys, values, queries, douts, head_table, after, head_lse,
                head_delta, seed_value, key, offset, near, tl.minimum(far, end), num_queries, seq,
                head, q_stride, dout_stride, scale, softcap, reach, left, right, dropout_p,
                LEFT or RIGHT, True, LEFT, RIGHT, SOFTCAP, DROPOUT, WIDTH, COLUMNS, QUERIES,
                PRECISION,
            )
        grad_k, grad_v = _pull_keys(
            grad_k, grad_v, keys, values, queries, douts, head_table, before, head_lse, head_delta,
            seed_value, key, offset, far, end, num_queries, seq, head, q_stride, dout_stride, scale,
            softcap, reach, left, right, dropout_p,
            LEFT, False, LEFT, RIGHT, SOFTCAP, DROPOUT, WIDTH, COLUMNS, QUERIES, PRECISION,
        )
        # fmt: on
    stride = kv_heads * WIDTH
    store_rows(dk, grad_k * scale, first_key, num_keys, stride, KEYS, WIDTH, COLUMNS)
    store_rows(dv, grad_v, first_key, num_keys, stride, KEYS, WIDTH, COLUMNS)


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
