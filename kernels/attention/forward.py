"""The forward kernel: flash attention over packed sequences, with a bias by distance.

    score[m, n] = softcap(scale * q[m] . k[n]) + table[clamp(d, -reach, reach) + reach]
    out[m]      = sum_n exp(score[m, n] - lse[m]) * v[n],    lse[m] = log sum_n exp(score[m, n])

where ``d`` is the distance of key n from the position of query m (see `primitives`).

One program computes a tile of queries of one head. It loops over tiles of visible keys and rescales
its sums when the running maximum grows (online softmax; Dao, "FlashAttention-2", 2023). Where all
distances of a tile are beyond the table's reach, the bias is one number. Only the few tiles in
between read the table. No logarithm is computed per score, and no tensor has a size of queries x
keys. docs/attention.md describes the algorithm in full.
"""

from __future__ import annotations

from typing import NamedTuple

from .._launch import PreparedKernel
from .._triton import tl, triton
from .dropout import dropout_keep_mask, dropout_params
from .launch import SIZES, constant_arguments, tile_arguments
from .primitives import (
    DistanceLimits,
    Features,
    TileRange,
    TileShape,
    apply_softcap,
    between,
    bias_beyond,
    dot_transposed,
    edge_range,
    find_tile,
    key_ranges,
    params_of_head,
    program_place,
    tile_biases,
    visible_keys,
)
from .rows import RowTile, hide, load_rows, select_rows, store_rows
from .spec import AttentionInputs, AttentionSpec
from .tiles import Tile, num_tiles, tile_for


class _Softmax(NamedTuple):
    """The running sums of the online softmax for a tile of queries, in float32."""

    acc: tl.tensor  # [BM, COLUMNS], sum of exp2(score - row_max) * v
    row_max: tl.tensor  # [BM], base-2, -inf while no key was visible
    row_sum: tl.tensor  # [BM], sum of exp2(score - row_max), before dropout


@triton.jit
def _attend_keys(
    softmax, q, keys, values, params, dropout, tiles, FEATURES: tl.constexpr, SHAPE: tl.constexpr
):
    """Add the key tiles of one range to the softmax of a tile of queries."""
    acc, row_max, row_sum = softmax
    row = tl.arange(0, SHAPE.QUERIES)[:, None]
    query = q.first + tl.arange(0, SHAPE.QUERIES)
    offset = keys.count - q.rows.count
    position = query + offset
    first_key, last_key = visible_keys(position, keys.count, params.limits, FEATURES)
    column = tl.arange(0, SHAPE.KEYS)[None, :]
    for start in range(tiles.first, tiles.last, SHAPE.KEYS):
        # Without it, narrow rows that see all keys fit into 128 registers: two programs on an SM.
        if tiles.MASKED or FEATURES.RIGHT or SHAPE.COLUMNS > 64:
            start = hide(start, keys.count)
        k = load_rows(keys, start, SHAPE.KEYS, tiles.MASKED, SHAPE)  # [BN, COLUMNS]
        v = load_rows(values, start, SHAPE.KEYS, tiles.MASKED, SHAPE)
        product = dot_transposed(q, RowTile(k, keys, start), tiles.MASKED, SHAPE)
        raw, _ = apply_softcap(product, params, FEATURES.SOFTCAP)  # [BM, BN]
        if tiles.TABLE:
            raw += tile_biases(params, start - (q.first + offset), False, SHAPE)
        if tiles.MASKED:
            first, last = (first_key - start)[:, None], (last_key - start)[:, None]
            visible = between(column, first, last, FEATURES.LEFT, True)
            raw = tl.where(visible, raw, float("-inf"))
        highest = tl.max(raw, 1) * params.factor + tiles.bias
        new_max = tl.maximum(row_max, highest)
        # While no key was visible the maximum is -inf, and -inf - -inf would be NaN.
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(raw * params.factor - (finite_max - tiles.bias)[:, None])
        rescale = tl.exp2(row_max - finite_max)
        # Dropout does not change the normalizer: it applies to normalized weights.
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        if FEATURES.DROPOUT:
            keep = dropout_keep_mask(dropout, q.first, row, start, column)
            weights = tl.where(keep, weights, 0.0)
        if SHAPE.CHUNK:  # load v only now, so that it holds no registers during the first product
            v = load_rows(values, start, SHAPE.KEYS, tiles.MASKED, SHAPE)
        acc = acc * rescale[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=SHAPE.PRECISION)
        row_max = new_max
    return _Softmax(acc, row_max, row_sum)


@triton.jit
def _attend_all_keys(q, keys, values, params, dropout, FEATURES: tl.constexpr, SHAPE: tl.constexpr):
    """The softmax of a tile of queries over all visible keys, range by range."""
    offset = keys.count - q.rows.count
    first_position = q.first + offset
    last_position = tl.minimum(q.first + SHAPE.QUERIES, q.rows.count) - 1 + offset
    first, near, whole, far, last, end = key_ranges(
        first_position, last_position, keys.count, params.limits, FEATURES, SHAPE.KEYS
    )
    softmax = _Softmax(
        tl.zeros([SHAPE.QUERIES, SHAPE.COLUMNS], tl.float32),
        tl.full([SHAPE.QUERIES], float("-inf"), tl.float32),
        tl.zeros([SHAPE.QUERIES], tl.float32),
    )
    # fmt: off
    softmax = _attend_keys(
        softmax, q, keys, values, params, dropout,
        TileRange(first, near, bias_beyond(params, False, FEATURES), FEATURES.LEFT, False),
        FEATURES, SHAPE,
    )
    if FEATURES.BIAS:
        if not FEATURES.LEFT:
            softmax = _attend_keys(
                softmax, q, keys, values, params, dropout,
                TileRange(near, whole, 0.0, False, True), FEATURES, SHAPE,
            )
            softmax = _attend_keys(
                softmax, q, keys, values, params, dropout,
                TileRange(far, last, bias_beyond(params, True, FEATURES), False, False),
                FEATURES, SHAPE,
            )
        edge, edge_end, _ = edge_range(whole, far, last, end, FEATURES)
        softmax = _attend_keys(
            softmax, q, keys, values, params, dropout,
            TileRange(edge, edge_end, 0.0, True, True), FEATURES, SHAPE,
        )
    if FEATURES.LEFT or not FEATURES.BIAS:
        softmax = _attend_keys(
            softmax, q, keys, values, params, dropout,
            TileRange(last, end, bias_beyond(params, True, FEATURES), True, False), FEATURES, SHAPE,
        )
    # fmt: on
    return softmax


# Sizes change from batch to batch, and windows from layer to layer: without specialization no value
# of theirs (1, or a multiple of 16) compiles the kernel again. `PreparedKernel` relies on it.
@triton.jit(do_not_specialize=[*SIZES, "left", "right"])
def _attention_forward_kernel(
    q,
    k,
    v,
    table,
    seed,
    lse,
    out,
    cu_seqlens_q,
    cu_seqlens_k,
    num_seqs,
    total_q,
    reach,
    q_head_stride,
    k_head_stride,
    v_head_stride,
    scale: tl.float32,
    softcap: tl.float32,
    dropout_p: tl.float32,
    left,
    right,
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
    SHAPE: tl.constexpr = TileShape(QUERIES, KEYS, HEAD_DIM, COLUMNS, CHUNK, PRECISION)
    number, head = program_place(HEADS, RIGHT)
    seq, first_query, span_q, span_k = find_tile(
        number, cu_seqlens_q, cu_seqlens_k, num_seqs, QUERIES
    )
    if first_query >= span_q.count:  # the grid has a few programs without a tile
        return
    queries = select_rows(q, span_q, Q_STRIDE, head, q_head_stride, HEAD_UNIT)
    q_tile = RowTile(load_rows(queries, first_query, QUERIES, True, SHAPE), queries, first_query)
    keys = select_rows(k, span_k, K_STRIDE, head // GROUP, k_head_stride, HEAD_UNIT)
    values = select_rows(v, span_k, V_STRIDE, head // GROUP, v_head_stride, HEAD_UNIT)
    outs = select_rows(out, span_q, HEADS * HEAD_DIM, head, HEAD_DIM, 1)  # out is contiguous
    limits = DistanceLimits(left, right, reach)
    params = params_of_head(scale, softcap, table, head, limits, FEATURES)
    dropout = dropout_params(tl.load(seed) if DROPOUT else 0, seq, head, dropout_p)
    acc, row_max, row_sum = _attend_all_keys(q_tile, keys, values, params, dropout, FEATURES, SHAPE)
    sees_any = row_sum > 0.0  # a query that sees no key gives 0, and a logsumexp of -inf
    acc = acc / tl.where(sees_any, row_sum * (1.0 - dropout_p), 1.0)[:, None]
    store_rows(outs, acc, first_query, QUERIES, SHAPE)
    # ln(2) converts to the natural logarithm.
    row_lse = (tl.where(sees_any, row_max, 0.0) + tl.log2(row_sum)) * 0.6931471805599453
    query = first_query + tl.arange(0, QUERIES)
    head_lse = lse + head.to(tl.int64) * total_q + span_q.start
    tl.store(head_lse + query, row_lse, mask=query < span_q.count)


def forward_kernel(
    inputs: AttentionInputs, spec: AttentionSpec, unit: int, tile: Tile
) -> PreparedKernel:
    """The kernel of all layers with inputs and options of this kind."""
    constants = constant_arguments(inputs, spec, unit) | tile_arguments(tile)
    tensors = ("q", "k", "v", "table", "seed", "lse", "out", "cu_seqlens_q", "cu_seqlens_k")
    return PreparedKernel(_attention_forward_kernel, tensors, SIZES, constants)


def forward_tile(inputs: AttentionInputs, spec: AttentionSpec) -> Tile:
    """The tile of the kernel."""
    bias, dropout = inputs.table is not None, spec.dropout_p > 0.0
    return tile_for("forward", inputs.q, bias=bias, dropout=dropout)


def forward_grid(inputs: AttentionInputs, tile: Tile) -> tuple[int, int]:
    """The programs of the kernel."""
    total_q, heads, _ = inputs.q.shape
    return num_tiles(total_q, inputs.cu_seqlens_q.numel() - 1, tile.queries) * heads, 1
