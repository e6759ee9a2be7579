"""Decoder inputs of a batch, made by the model from the labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...checks import IGNORE_INDEX
from ..packed.base import pad_rows
from ..packed.pairs import PackedPairs

_METHOD = "prepare_decoder_input_ids_from_labels"


def check_prepares_decoder_inputs(model: Any) -> Any:
    """Return ``model``. Raises a TypeError if it is not None and cannot shift labels."""
    if model is not None and not callable(getattr(model, _METHOD, None)):
        raise TypeError(f"model must have {_METHOD}, got {type(model).__name__}")
    return model


def with_decoder_inputs(
    batch: dict[str, Tensor] | PackedPairs, model: Any
) -> dict[str, Tensor] | PackedPairs:
    """Add ``decoder_input_ids`` to a batch with labels, unless ``model`` is None.

    The labels of packed pairs are padded for the model and unpadded after it, because a model
    shifts by row.
    """
    if model is None or "labels" not in batch:
        return batch
    prepare = getattr(model, _METHOD)
    if not isinstance(batch, PackedPairs):
        batch["decoder_input_ids"] = prepare(labels=batch["labels"])
        return batch
    lengths = batch["decoder_cu_seqlens"].diff()
    rows, mask = pad_rows(batch["labels"][0], lengths, IGNORE_INDEX)
    with torch.no_grad():
        batch["decoder_input_ids"] = prepare(labels=rows)[mask][None]
    return batch
