"""RoBERTa and XLM-RoBERTa: a position counts the ids up to it that are not padding."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def positions(model: Any, ids: Tensor) -> Tensor:
    """``(rows, columns)`` positions, as the model computes them from padded ids."""
    padding_idx = model.config.pad_token_id
    real = ids.ne(padding_idx).long()
    return real.cumsum(dim=1) * real + padding_idx
