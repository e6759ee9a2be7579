"""The backward of attention: one launch for dq and the bias table, one for dk and dv.

The kernel of dq also writes what the kernel of dk and dv reads of each query: the logsumexp in base
2, and ``delta[m] = sum(dout[m] * out[m])``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backward_kv import _attention_backward_kv_kernel
from .backward_q import _attention_backward_q_kernel
from .launch import shared_arguments
from .primitives import QUERY_PADDING
from .spec import AttentionInputs, AttentionSpec
from .tiles import num_tiles, tile_for


def attention_backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    inputs: AttentionInputs,
    spec: AttentionSpec,
    needs_table: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv, and in float32 the gradient of the table if it is needed."""
    q, k, v = inputs.q, inputs.k, inputs.v
    total_q, heads, _ = q.shape
    total_k, kv_heads, _ = k.shape
    num_seqs = inputs.cu_seqlens_q.numel() - 1
    bias, dropout = inputs.table is not None, spec.dropout_p > 0.0
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    tile = tile_for("dq", q, bias=bias, dropout=dropout)
    tiles_q = num_tiles(total_q, num_seqs, tile.queries)
    shared = shared_arguments(inputs, lse, spec)
    shared["dout"] = dout
    shared["DOUT_STRIDE"], shared["dout_head_stride"], _ = dout.stride()
    padded_rows = total_q + num_seqs * QUERY_PADDING.value
    shared["delta"], base2_lse = lse.new_empty(2, heads, padded_rows)
    partials = None
    if needs_table:
        # A row per program: 2 * reach + 1 distances, and a total for each side beyond the reach.
        partials = q.new_zeros(tiles_q, heads, 2 * shared["reach"] + 3, dtype=torch.float32)
    if dq.numel():
        _attention_backward_q_kernel[(tiles_q * heads,)](
            **shared,
            out=out,
            dq=dq,
            base2_lse=base2_lse,
            partials=lse if partials is None else partials,
            DTABLE=needs_table,
            QUERIES=tile.queries,
            KEYS=tile.keys,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    kernel = "dkv" if kv_heads == heads else "dkv, grouped"
    tile = tile_for(kernel, q, bias=bias, dropout=dropout)
    if dk.numel():
        _attention_backward_kv_kernel[(num_tiles(total_k, num_seqs, tile.keys) * kv_heads,)](
            **{**shared, "lse": base2_lse},
            dk=dk,
            dv=dv,
            QUERIES=tile.queries,
            KEYS=tile.keys,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return dq, dk, dv, None if partials is None else _sum_partials(partials)


def _sum_partials(partials: Tensor) -> Tensor:
    """``(tiles, heads, 2 * reach + 3)`` to ``(heads, 2 * reach + 1)``.

    The first and last column are the sums beyond the reach. They belong to the table's end entries.
    """
    sums = partials.sum(0)
    dtable = sums[:, 1:-1].contiguous()
    dtable[:, 0] += sums[:, 0]
    dtable[:, -1] += sums[:, -1]
    return dtable
