"""Padding-free training of Hugging Face models: the same numbers, from the real tokens alone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .adapters import PackingStats, is_patched, packing_stats, patch_model, unpatch_model

# Resolved on first use: `tokenpack.packing` is for NumPy alone and must not pull in torch.
_HOMES = {
    "PackingStats": ".adapters",
    "is_patched": ".adapters",
    "packing_stats": ".adapters",
    "patch_model": ".adapters",
    "unpatch_model": ".adapters",
}

__all__ = ["PackingStats", "is_patched", "packing_stats", "patch_model", "unpatch_model"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
