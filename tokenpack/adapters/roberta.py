"""RoBERTa and XLM-RoBERTa: positions count the ids that are not padding."""

from __future__ import annotations

from torch import Tensor, nn


def positions(model: nn.Module, side: str, ids: Tensor) -> Tensor:
    """``(rows, columns)`` positions as the model makes them from padded ids."""
    padding_idx = model.config.pad_token_id
    real = ids.ne(padding_idx).long()
    return real.cumsum(dim=1) * real + padding_idx
