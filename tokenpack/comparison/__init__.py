"""`check_patch`: a model padded and packed, on a batch of the user's."""

from .check import check_patch
from .first_batch import patch_model
from .result import PatchCheck, PatchCheckError

__all__ = ["PatchCheck", "PatchCheckError", "check_patch", "patch_model"]
