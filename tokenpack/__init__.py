"""Padding-free training of Hugging Face models: the same results, from real tokens only."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .adapters import PackingStats, is_patched, packing_stats, patch_model, unpatch_model

__all__ = ["PackingStats", "is_patched", "packing_stats", "patch_model", "unpatch_model"]


# Imported on first use, because `tokenpack.packing` needs only NumPy and must not import torch.
def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".adapters", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
