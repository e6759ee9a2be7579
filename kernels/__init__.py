"""Padding-free building blocks for training loops and models that call them directly.

Everything here takes and returns tensors: no transformers, nothing of the rest of tokenpack.
Each op has a plain-PyTorch reference, which is the CPU path and what the tests measure against.
"""

from .attention import varlen_attention
from .layout import (
    PackedLayout,
    layout_from_cu_seqlens,
    layout_from_lengths,
    layout_from_mask,
    layout_from_position_ids,
)
from .linear_loss import packed_linear_cross_entropy
from .padding import repad, unpad

__all__ = [
    "PackedLayout",
    "layout_from_cu_seqlens",
    "layout_from_lengths",
    "layout_from_mask",
    "layout_from_position_ids",
    "packed_linear_cross_entropy",
    "repad",
    "unpad",
    "varlen_attention",
]
