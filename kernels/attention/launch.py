"""The arguments that all attention kernels share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .primitives import TABLE_PADDING
from .spec import AttentionInputs, AttentionSpec
from .tiles import chunk_for, padded_head_dim, precision


def shared_arguments(inputs: AttentionInputs, lse: Tensor, spec: AttentionSpec) -> dict[str, Any]:
    """The arguments that all three kernels take, by name.

    The table is extended, and the scale is positive (see `op`). Kernels need a pointer for each
    tensor. ``lse`` stands in for an absent table or seed, which no kernel then reads.
    """
    q, k, v, cu_seqlens_q, cu_seqlens_k, table, seed = inputs
    q_stride, q_head_stride, _ = q.stride()
    k_stride, k_head_stride, _ = k.stride()
    v_stride, v_head_stride, _ = v.stride()
    total_q, heads, head_dim = q.shape
    left, right = spec.limits
    return {
        "q": q,
        "k": k,
        "v": v,
        "lse": lse,
        "table": lse if table is None else table,
        "seed": lse if seed is None else seed,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "num_seqs": cu_seqlens_q.numel() - 1,
        "total_q": total_q,
        "q_stride": q_stride,
        "q_head_stride": q_head_stride,
        "k_stride": k_stride,
        "k_head_stride": k_head_stride,
        "v_stride": v_stride,
        "v_head_stride": v_head_stride,
        "scale": spec.scale,
        "softcap": spec.softcap or 1.0,
        "dropout_p": spec.dropout_p,
        "left": left,
        "right": right,
        "reach": 0 if table is None else table.shape[1] // 2 - TABLE_PADDING.value,
        "LEFT": left >= 0,
        "RIGHT": right >= 0,
        "SOFTCAP": spec.softcap is not None,
        "BIAS": table is not None,
        "DROPOUT": spec.dropout_p > 0.0,
        "GROUP": heads // k.shape[1],
        "HEAD_DIM": head_dim,
        "COLUMNS": padded_head_dim(head_dim),
        "CHUNK": chunk_for(head_dim, q.dtype),
        "PRECISION": precision(q.dtype),
    }
