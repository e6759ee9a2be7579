"""Packed rows: several sequences in each row of a batch, with padding after them.

    sequence s occupies slots  cu_seqlens_padded[s] ... + cu_seqlens[s + 1] - cu_seqlens[s]

of the flattened rows (the names are Transformer Engine's). Only its tokens go through the model, as
a stream with ``cu_seqlens``. The outputs go back to the slots of the tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..attention.layouts import slots_of_sequences
from ..checks import IGNORE_INDEX
from ..kernels import PackedLayout, layout_from_lengths, layout_from_mask, unpad
from .errors import CannotPackError

# The same boundaries under the names that transformers' padding-free collators give them: for flash
# attention, and for state-space layers, which no supported family has.
_OTHER_NAMES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_PER_TOKEN = ("input_ids", "inputs_embeds", "labels", "position_ids")


def rows_to_stream(inputs: dict[str, Any]) -> PackedLayout | None:
    """Replace packed rows in the arguments of a call by the stream of their tokens.

    Args:
        inputs: the arguments by name, changed in place if ``cu_seqlens_padded`` is one of them.

    Returns:
        The layout that puts a stream back into the rows: each row is one of its sequences. None if
        the arguments are not packed rows.

    Raises:
        ValueError: if the boundaries contradict each other or the rows.
    """
    if "cu_seqlens" not in inputs:
        return None
    for name in _OTHER_NAMES:
        inputs.pop(name, None)
    if "cu_seqlens_padded" not in inputs:
        return None
    padded = inputs.pop("cu_seqlens_padded")
    tokens = {name: inputs[name] for name in _PER_TOKEN if name in inputs}
    name, first = next(iter(tokens.items()), ("input_ids", torch.empty(0)))
    if first.dim() < 2 or 0 in first.shape[:2]:
        raise ValueError(
            f"{name} must be (rows, columns) and not empty, got shape {tuple(first.shape)}"
        )
    shape = first.shape[:2]
    for other, values in tokens.items():
        if values.shape[:2] != shape:
            raise ValueError(
                f"{other} must begin with the rows and columns of {name}, {tuple(shape)}, "
                f"got shape {tuple(values.shape)}"
            )
    rows, columns = shape
    layout = layout_from_mask(
        slots_of_sequences(inputs["cu_seqlens"], padded, rows, columns, first.device)
    )
    inputs.update(zip(tokens, (stream[None] for stream in unpad(list(tokens.values()), layout))))
    return layout


def positions_to_stream(inputs: dict[str, Any], splits_by_position: bool) -> PackedLayout | None:
    """Replace rows that transformers would split by their ``position_ids`` by a packed stream.

    Without a mask, transformers begins a new sequence wherever a position is not one more than the
    position before (its padding-free collators rely on this). The same boundaries become
    ``cu_seqlens`` here.

    Args:
        inputs: the arguments by name, changed in place if they have such positions.
        splits_by_position: the model runs on flash attention, which drops a mask of ones.

    Returns:
        The layout that puts a stream back into the rows, or None if nothing changed or the batch
        has one row.

    Raises:
        CannotPackError: if packing would change the loss or the boundaries.
    """
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    name = "input_ids" if "input_ids" in inputs else "inputs_embeds"
    tokens = inputs.get(name)
    if positions is None or tokens is None or "cu_seqlens" in inputs or positions.dim() != 2:
        return None
    if mask is not None and not (splits_by_position and len(tokens) == 1 and bool(mask.all())):
        return None
    rows, columns = tokens.shape[:2]
    if positions.shape not in ((rows, columns), (1, columns)):
        return None
    begins = nn.functional.pad(positions.diff(dim=1) != 1, (1, 0), value=True)
    splits = bool(begins[:, 1:].any())
    if splits_by_position and splits and rows > 1:
        raise CannotPackError("flash attention does not split several rows by their position_ids")
    if not (splits or any(name in inputs for name in _OTHER_NAMES)):
        return None
    begins = begins.expand(rows, columns)
    starts = begins.flatten().nonzero().flatten()
    cu_seqlens = nn.functional.pad(starts, (0, 1), value=rows * columns).int()
    _drop_other_names(inputs, cu_seqlens, splits_by_position)
    if not splits:
        return None
    labels = inputs.get("labels")
    if labels is not None and labels.shape == begins.shape:
        inner = begins.to(labels.device) & (torch.arange(columns, device=labels.device) > 0)
        if bool((labels[inner] != IGNORE_INDEX).any()):
            raise CannotPackError(
                "position_ids begin a sequence at a token whose label is not -100, which the token "
                "before it would predict"
            )
        inputs["labels"] = labels.reshape(1, -1)
    inputs.pop("attention_mask", None)
    inputs[name] = tokens.reshape(1, rows * columns, *tokens.shape[2:])
    inputs["position_ids"] = positions.expand(rows, columns).reshape(1, -1)
    inputs["cu_seqlens"] = cu_seqlens
    return layout_from_lengths([columns] * rows, device=tokens.device) if rows > 1 else None


def _drop_other_names(inputs: dict[str, Any], cu_seqlens: Tensor, is_flash: bool) -> None:
    """Remove the names that `_OTHER_NAMES` gives the boundaries. Flash attention reads them."""
    given = inputs.get("cu_seq_lens_q")
    if is_flash and given is not None and not torch.equal(given.flatten().int(), cu_seqlens):
        raise CannotPackError("cu_seq_lens_q and position_ids give different boundaries")
    for name in _OTHER_NAMES:
        inputs.pop(name, None)
