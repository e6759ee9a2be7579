"""Make a transformers model run on real tokens alone: `patch_model`."""

from .call import PackingStats
from .patching import is_patched, packing_stats, patch_model, unpatch_model

__all__ = ["PackingStats", "is_patched", "packing_stats", "patch_model", "unpatch_model"]
