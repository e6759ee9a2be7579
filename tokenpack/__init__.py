"""Padding-free training of Hugging Face models: the same results, from real tokens only."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .adapters import PackingStats, is_patched, packing_stats, unpatch_model
    from .comparison import PatchCheck, PatchCheckError, check_patch, patch_model
    from .diagnostics import ModelReport, inspect_model

# Imported on first use, because `tokenpack.packing` needs only NumPy and must not import torch.
_HOMES = {
    "ModelReport": ".diagnostics",
    "PackingStats": ".adapters",
    "PatchCheck": ".comparison",
    "PatchCheckError": ".comparison",
    "check_patch": ".comparison",
    "inspect_model": ".diagnostics",
    "is_patched": ".adapters",
    "packing_stats": ".adapters",
    "patch_model": ".comparison",
    "unpatch_model": ".adapters",
}

# A literal list, because ruff and mkdocstrings do not evaluate list(_HOMES).
__all__ = [
    "ModelReport",
    "PackingStats",
    "PatchCheck",
    "PatchCheckError",
    "check_patch",
    "inspect_model",
    "is_patched",
    "packing_stats",
    "patch_model",
    "unpatch_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
