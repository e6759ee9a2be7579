"""Padding-free ops for training loops and models that call them directly.

The ops take and return tensors. This package imports neither transformers nor the rest of
tokenpack. Each op has a reference in plain PyTorch, which runs on the CPU and is the oracle in
tests.
"""

# transformers tries `import kernels`, which is a Hugging Face package. With the root of this
# repository on sys.path, it would import this folder and register every op a second time.
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
