"""The inputs and options of one attention call, as the functions behind the op pass them on."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AttentionInputs(NamedTuple):
    """The tensors of one attention call. Shapes are those of `varlen_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    table: Tensor | None
    seed: Tensor | None


class AttentionSpec(NamedTuple):
    """The options of `varlen_attention`. ``window`` and ``softcap`` are None if there is none."""

    causal: bool
    scale: float
    window: tuple[int, int] | None  # (left, right), -1 for no limit
    softcap: float | None
    dropout_p: float

    @property
    def limits(self) -> tuple[int, int]:
        """How many keys before and after its position a query sees, -1 for no limit."""
        left, right = self.window or (-1, -1)
        return left, 0 if self.causal else right


# A window side of this size or more is no limit. Kernels add positions to it in 32 bits.
NO_LIMIT = 2**30
