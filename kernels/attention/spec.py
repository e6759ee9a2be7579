"""The options of one attention call that are no tensors."""

from __future__ import annotations

from typing import NamedTuple


class AttentionSpec(NamedTuple):
    """As `varlen_attention` takes them, window and softcap None where there is none."""

    causal: bool
    scale: float
    window: tuple[int, int] | None  # (left, right), -1 for no limit
    softcap: float | None
    dropout_p: float

    @property
    def limits(self) -> tuple[int, int]:
        """How far before and after its own place a query sees, -1 for no limit; causal or not."""
        left, right = self.window or (-1, -1)
        return left, 0 if self.causal else right


NO_LIMIT = 2**30  # a window from here on is none: kernels add to it in 32 bits
