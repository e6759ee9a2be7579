"""Attention over packed sequences, on the best backend that supports the call.

    out[m] = sum_n softmax_n(scale * q[m] . k[n]) * v[n]

over the keys n of query m's own sequence. Every backend computes the function that
`tokenpack.kernels.varlen_attention` documents, including its options.

`packed_attention` takes ``cu_seqlens``. `layout_attention` takes a `PackedLayout`, and the shapes
and options of a transformers attention layer. Both return the output and the backend `Choice`.
"""

from .backends import AttentionCall
from .dispatch import (
    BACKENDS,
    BackendStatus,
    Choice,
    backend_report,
    choose_backend,
    layout_attention,
    packed_attention,
    require_known_backend,
)

__all__ = [
    "BACKENDS",
    "AttentionCall",
    "BackendStatus",
    "Choice",
    "backend_report",
    "choose_backend",
    "layout_attention",
    "packed_attention",
    "require_known_backend",
]
