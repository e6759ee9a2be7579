"""Padding-free building blocks for training loops and models that call them directly.

Everything here takes and returns tensors: no transformers, nothing of the rest of tokenpack.
Each op has a plain-PyTorch reference, which is the CPU path and what the tests measure against.
"""

# From the folder of the repository, `import kernels` finds this one; transformers tries that,
# looking for a Hugging Face package of the same name. It shall find nothing, least of all ops
# defined twice.
if __name__ != "kernels":
    from .attention import varlen_attention
    from .layout import (
        PackedLayout,
        layout_from_cu_seqlens,
        layout_from_lengths,
        layout_from_mask,
        layout_from_position_ids,
    )
    from .linear_loss import packed_linear_cross_entropy
    from .loss import packed_cross_entropy
    from .padding import repad, unpad
    from .reduction import TokenStats

__all__ = [
    "PackedLayout",
    "TokenStats",
    "layout_from_cu_seqlens",
    "layout_from_lengths",
    "layout_from_mask",
    "layout_from_position_ids",
    "packed_cross_entropy",
    "packed_linear_cross_entropy",
    "repad",
    "unpad",
    "varlen_attention",
]
