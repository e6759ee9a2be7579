"""The forward kernel: flash attention over packed sequences, with a bias by distance inside it.

One program for a tile of queries and one head goes through the keys in sight, tile by tile, with
the softmax rescaled as its maximum grows (Dao, 2023). Key tiles whose distances are all beyond the
table's reach add one number, the few in between read the table at ``n - m``: neither a logarithm
nor anything of size queries x keys. docs/attention.md has the whole algorithm.
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
    load_rows,
    multiply,
    rows_of,
    store_rows,
)
from .spec import AttentionSpec
from .tiles import chunk_for, num_tiles, padded_head_dim, precision, tile_for


@triton.jit
def _attend(
    total,
    peak,
    norm,
    q,
    queries,
    first_query,
    keys,
    values,
    rule,
    constant,
    dropout,
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
    """Take the key tiles from ``first`` up to ``last`` into the sums of a tile of queries."""
    query = first_query + tl.arange(0, QUERIES)
    place = query + (keys.count - queries.count)
    for start in range(first, last, KEYS):
        k = load_rows(keys, start, KEYS, WIDTH, COLUMNS, MASKED)
        v = load_rows(values, start, KEYS, WIDTH, COLUMNS, MASKED)
        key = start + tl.arange(0, KEYS)
        distance = key[None, :] - place[:, None]  # [BM, BN]
        product = multiply(q, queries, first_query, k, keys, start, WIDTH, CHUNK, MASKED, PRECISION)
        scores, _ = bend(product, rule, SOFTCAP)
        scores = biased(scores, distance, rule, constant, TABLE)
        if MASKED:
            seen = in_sight(distance, key[None, :], keys.count, rule, LEFT, RIGHT)
            scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        level = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # no key in sight so far
        weights = tl.exp2(scores - level[:, None])
        shrunk = tl.exp2(peak - level)
        norm = norm * shrunk + tl.sum(weights, 1)
        if DROPOUT:
            keep = kept(dropout, query[:, None], key[None, :])
            weights = tl.where(keep, weights, 0.0)
        if CHUNK:  # read late, so that it takes no registers before
            v = load_rows(values, start, KEYS, WIDTH, COLUMNS, MASKED)
        total = total * shrunk[:, None]
        total = tl.dot(weights.to(v.dtype), v, total, input_precision=PRECISION)
        peak = new_peak
    return total, peak, norm


@triton.jit(do_not_specialize=["num_seqs", "total_q", "left", "right", "reach"])
def _attention_forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    table,
    seed,
    cu_seqlens_q,
    cu_seqlens_k,
    num_seqs,
    total_q,
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
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    seq, first_query, span_q, span_k = find_tile(
        tl.program_id(0), cu_seqlens_q, cu_seqlens_k, num_seqs, QUERIES
    )
    num_queries, num_keys = span_q.count, span_k.count
    if first_query >= num_queries:
        return
    queries = rows_of(q, span_q, q_stride, head, q_head_stride)
    q_tile = load_rows(queries, first_query, QUERIES, WIDTH, COLUMNS, True)
    keys = rows_of(k, span_k, k_stride, head // GROUP, k_head_stride)
    values = rows_of(v, span_k, v_stride, head // GROUP, v_head_stride)
    outs = rows_of(out, span_q, num_heads * WIDTH, head, WIDTH)
    rule = Rule(scale, softcap, table + head * (2 * reach + 1), reach, left, right)
    before, after = ends_of(rule.table, reach, BIAS)
    dropout = Dropout(tl.load(seed) if DROPOUT else 0, seq, head, dropout_p)
    first_place = first_query + (num_keys - num_queries)
    last_place = tl.minimum(first_query + QUERIES, num_queries) - 1 + (num_keys - num_queries)
    first, near, far, whole, end = key_ranges(
        first_place, last_place, num_keys, left, right, reach, LEFT, RIGHT, BIAS, KEYS
    )
    total = tl.zeros([QUERIES, COLUMNS], tl.float32)
    peak = tl.full([QUERIES], float("-inf"), tl.float32)
    norm = tl.zeros([QUERIES], tl.float32)
    # fmt: off
    total, peak, norm = _attend(
        total, peak, norm, q_tile, queries, first_query, keys, values, rule, before, dropout,
        first, near, LEFT, False, LEFT, RIGHT, SOFTCAP, DROPOUT, WIDTH, COLUMNS, CHUNK, QUERIES,
        KEYS, PRECISION,
    )
    if BIAS:
        total, peak, norm = _attend(
            total, peak, norm, q_tile, queries, first_query, keys, values, rule, before,
            dropout, near, tl.minimum(far, end), True, True, LEFT, RIGHT, SOFTCAP, DROPOUT, WIDTH,
            COLUMNS, CHUNK, QUERIES, KEYS, PRECISION,
        )
        if not RIGHT and not LEFT:
            total, peak, norm = _attend(
                total, peak, norm, q_tile, queries, first_query, keys, values, rule, after,
                dropout, far, whole, False, False, LEFT, RIGHT, SOFTCAP, DROPOUT, WIDTH, COLUMNS,
                CHUNK, QUERIES, KEYS, PRECISION,
            )
            far = whole
    total, peak, norm = _attend(
        total, peak, norm, q_tile, queries, first_query, keys, values, rule, after, dropout,
        far, end, True, False, LEFT, RIGHT, SOFTCAP, DROPOUT, WIDTH, COLUMNS, CHUNK, QUERIES,
        KEYS, PRECISION,
    )
    # fmt: on
    sees_any = norm > 0.0
    total = total / tl.where(sees_any, norm * (1.0 - dropout_p), 1.0)[:, None]
    store_rows(outs, total, first_query, QUERIES, WIDTH, COLUMNS)
    row_lse = (tl.where(sees_any, peak, 0.0) + tl.log2(norm)) * 0.6931471805599453
    query = first_query + tl.arange(0, QUERIES)
    tl.store(
        lse + head.to(tl.int64) * total_q + span_q.start + query, row_lse, mask=query < num_queries
    )


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    table: Tensor | None,
    seed: Tensor | None,
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor]:
    """``(total_q, heads, head_dim)`` out, and ``(heads, total_q)`` float32 logsumexp."""
    total_q, heads, head_dim = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(heads, total_q, dtype=torch.float32)
    num_seqs = cu_seqlens_q.numel() - 1
    left, right = spec.limits
    tile = tile_for("forward", q, bias=table is not None, dropout=spec.dropout_p > 0.0)
    if out.numel():
        _attention_forward_kernel[(num_tiles(total_q, num_seqs, tile.queries), heads)](
            q=q,
            k=k,
            v=v,
            out=out,
            lse=lse,
            table=lse if table is None else table,
            seed=lse if seed is None else seed,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            num_seqs=num_seqs,
            total_q=total_q,
            q_stride=q.stride(0),
            q_head_stride=q.stride(1),
            k_stride=k.stride(0),
            k_head_stride=k.stride(1),
            v_stride=v.stride(0),
            v_head_stride=v.stride(1),
            scale=spec.scale,
            softcap=spec.softcap or 1.0,
            dropout_p=spec.dropout_p,
            left=left,
            right=right,
            reach=0 if table is None else table.shape[1] // 2,
            LEFT=left >= 0,
            RIGHT=right >= 0,
            SOFTCAP=spec.softcap is not None,
            BIAS=table is not None,
            DROPOUT=spec.dropout_p > 0.0,
            GROUP=heads // k.shape[1],
            WIDTH=head_dim,
            COLUMNS=padded_head_dim(q),
            CHUNK=chunk_for(q),
            QUERIES=tile.queries,
            KEYS=tile.keys,
            PRECISION=precision(q),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out, lse
