"""Attention without options: the measure of what the options of our kernels cost per tile.

The kernels compute ``softmax(scale * q @ k.T) @ v`` and its gradients, of sequences whose length is
a multiple of every tile. They have no mask, bias, dropout or boundaries. The method is that of
FlashAttention-2 (Dao 2023), with the loops of Triton's tutorial "Fused Attention". They are only
compiled: `make compile` counts their loops, and a test compares ours with them.
"""

import torch

from tokenpack.kernels._triton import tl, triton


@triton.jit
def _yardstick_forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    tokens,
    scale,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64) * tokens  # the first row of the head
    query = head + tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    key, column = head + tl.arange(0, KEYS), tl.arange(0, COLUMNS)
    q_rows = query[:, None] * COLUMNS + column[None, :]
    k_columns = k + key[None, :] * COLUMNS + column[:, None]  # k.T
    v_rows = v + key[:, None] * COLUMNS + column[None, :]
    q_tile = tl.load(q + q_rows)
    acc = tl.zeros([QUERIES, COLUMNS], tl.float32)
    row_max = tl.full([QUERIES], float("-inf"), tl.float32)
    row_sum = tl.zeros([QUERIES], tl.float32)
    for _ in range(0, tokens, KEYS):
        raw = tl.dot(q_tile, tl.load(k_columns))
        new_max = tl.maximum(row_max, tl.max(raw, 1) * scale)
        weights = tl.exp2(raw * scale - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None]
        v_tile = tl.load(v_rows)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc)
        row_max = new_max
        k_columns += KEYS * COLUMNS
        v_rows += KEYS * COLUMNS
    tl.store(out + q_rows, (acc / row_sum[:, None]).to(q_tile.dtype))
    tl.store(lse + query, row_max + tl.log2(row_sum))


@triton.jit
def _yardstick_backward_q_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dq,
    tokens,
    scale,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64) * tokens
    query = head + tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    key, column = head + tl.arange(0, KEYS), tl.arange(0, COLUMNS)
    q_rows = query[:, None] * COLUMNS + column[None, :]
    k_columns = k + key[None, :] * COLUMNS + column[:, None]
    v_columns = v + key[None, :] * COLUMNS + column[:, None]
    q_tile, dout_tile = tl.load(q + q_rows), tl.load(dout + q_rows)
    row_lse, row_delta = tl.load(lse + query), tl.load(delta + query)
    acc = tl.zeros([QUERIES, COLUMNS], tl.float32)
    for _ in range(0, tokens, KEYS):
        k_tile, v_tile = tl.load(k_columns), tl.load(v_columns)
        weights = tl.exp2(tl.dot(q_tile, k_tile) * scale - row_lse[:, None])
        dscores = weights * (tl.dot(dout_tile, v_tile) - row_delta[:, None])
        acc = tl.dot(dscores.to(k_tile.dtype), tl.trans(k_tile), acc)
        k_columns += KEYS * COLUMNS
        v_columns += KEYS * COLUMNS
    tl.store(dq + q_rows, (acc * scale).to(q_tile.dtype))


@triton.jit
def _yardstick_backward_kv_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dk,
    dv,
    tokens,
    scale,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64) * tokens
    key = head + tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    row, column = tl.arange(0, QUERIES), tl.arange(0, COLUMNS)
    k_rows = key[:, None] * COLUMNS + column[None, :]
    q_columns = q + (head + row)[None, :] * COLUMNS + column[:, None]
    dout_rows = dout + (head + row)[:, None] * COLUMNS + column[None, :]
    k_tile, v_tile = tl.load(k + k_rows), tl.load(v + k_rows)
    dk_acc = tl.zeros([KEYS, COLUMNS], tl.float32)
    dv_acc = tl.zeros([KEYS, COLUMNS], tl.float32)
    for start in range(0, tokens, QUERIES):
        q_tile = tl.load(q_columns)
        row_lse = tl.load(lse + head + start + row)
        weights = tl.exp2(tl.dot(k_tile, q_tile) * scale - row_lse[None, :])
        dout_tile = tl.load(dout_rows)
        dv_acc = tl.dot(weights.to(dout_tile.dtype), dout_tile, dv_acc)
        row_delta = tl.load(delta + head + start + row)
        dscores = weights * (tl.dot(v_tile, tl.trans(dout_tile)) - row_delta[None, :])
        dk_acc = tl.dot(dscores.to(q_tile.dtype), tl.trans(q_tile), dk_acc)
        q_columns += QUERIES * COLUMNS
        dout_rows += QUERIES * COLUMNS
    tl.store(dv + k_rows, dv_acc.to(k_tile.dtype))
    tl.store(dk + k_rows, (dk_acc * scale).to(k_tile.dtype))


# Queries, keys, warps and stages with the highest ceilings on Hopper, by head_dim.
_TILES = {
    64: ((128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
    128: ((128, 128, 8, 2), (128, 64, 8, 2), (64, 128, 8, 2)),
}


def yardstick(head_dim):
    """A case of the compile gate for one of 64 and 128 columns."""

    def case(dtype):
        rows, numbers = torch.zeros(256, head_dim, dtype=dtype), torch.zeros(256)
        inputs = (rows, rows, rows)
        calls = (
            (_yardstick_forward_kernel, (*inputs, rows, numbers)),
            (_yardstick_backward_q_kernel, (*inputs, rows, numbers, numbers, rows)),
            (_yardstick_backward_kv_kernel, (*inputs, rows, numbers, numbers, rows, rows)),
        )
        for (kernel, arguments), tile in zip(calls, _TILES[head_dim], strict=True):
            queries, keys, warps, stages = tile
            kernel[(1, 1)](
                *(*arguments, 256, 0.125),
                QUERIES=queries,
                KEYS=keys,
                COLUMNS=head_dim,
                num_warps=warps,
                num_stages=stages,
            )

    case.__name__ = f"yardstick, {head_dim}"
    return case
