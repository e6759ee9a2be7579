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
    tensor. ``lse`` stands in for an absent table or seed, which no kernel then reads. Strides from
    token to token are constants: they belong to the model and not to the batch, and with them the
    offsets within a tile are part of the instructions. Strides between heads may change with the
    number of tokens.
    """
    q, k, v, cu_seqlens_q, cu_seqlens_k, table, seed = inputs
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
        "q_head_stride": q.stride(1),
        "k_head_stride": k.stride(1),
        "v_head_stride": v.stride(1),
        "scale": spec.scale,
        "softcap": spec.softcap or 1.0,
        "dropout_p": spec.dropout_p,
        "left": left,
        "right": right,
        "reach": 0 if table is None else table.shape[1] // 2 - TABLE_PADDING.value,
        "Q_STRIDE": q.stride(0),
        "K_STRIDE": k.stride(0),
        "V_STRIDE": v.stride(0),
        "LEFT": left >= 0,
        "RIGHT": right >= 0,
        "SOFTCAP": spec.softcap is not None,
        "BIAS": table is not None,
        "DROPOUT": spec.dropout_p > 0.0,
        "HEADS": heads,
        "GROUP": heads // k.shape[1],
        "HEAD_DIM": head_dim,
        "COLUMNS": padded_head_dim(head_dim),
        "CHUNK": chunk_for(head_dim, q.dtype),
        "PRECISION": precision(q.dtype),
    }
