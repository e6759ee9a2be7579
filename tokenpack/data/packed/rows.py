"""Sequences packed into the rows of a plain tensor, for training loops with their own batches.

The tensor does not contain the boundaries, so a model treats each row as one sequence. Use
`tokenpack.data.packed_collate_fn` for batches that keep the sequences separate.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ...checks import IGNORE_INDEX, as_integer, at_least_one
from ...packing import Packer
from ..row_layout import RowLayout
from ..tokens import Tokens, flatten_tokens, plan_of, require_same_lengths


@overload
def pack_sequences(
    sequences: Any,
    max_length: int,
    pad_token_id: int = 0,
    *,
    return_boundaries: Literal[False] = False,
    strategy: str = "nf",
    overlong: str = "error",
) -> Tensor: ...
@overload
def pack_sequences(
    sequences: Any,
    max_length: int,
    pad_token_id: int = 0,
    *,
    return_boundaries: Literal[True],
    strategy: str = "nf",
    overlong: str = "error",
) -> tuple[Tensor, list[Tensor]]: ...
def pack_sequences(
    sequences: Any,
    max_length: int,
    pad_token_id: int = 0,
    *,
    return_boundaries: bool = False,
    strategy: str = "nf",
    overlong: str = "error",
) -> Tensor | tuple[Tensor, list[Tensor]]:
    """Concatenate sequences into rows of ``max_length``.

    Args:
        sequences: token ids, as in `pack_dataset`.
        max_length: tokens per row.
        pad_token_id: the value after the last sequence of a row.
        return_boundaries: also return the position of each sequence.
        strategy: one of `tokenpack.packing.Packer.strategies()`, or "auto". "nf" keeps the order
            of the sequences, row after row.
        overlong: what to do with a sequence longer than ``max_length``: raise an "error",
            "truncate" it, "split" it into pieces that are packed separately, or "drop" it.

    Returns:
        ``(rows, max_length)`` int64. With ``return_boundaries``, also a list with one
        ``(num_seqs, 2)`` int64 tensor per row: the first and last column (exclusive) of each
        sequence, so that ``rows[r, start:end]`` is the sequence.

    Raises:
        TypeError: if a token or an argument is not an integer, or a sequence is not a list.
        ValueError: if a sequence is empty or too long, or ``max_length`` is below 1.
    """
    fill = as_integer("pad_token_id", pad_token_id)
    tokens = flatten_tokens(sequences, "sequences")
    rows = _plan(tokens, "sequences", max_length, strategy, overlong)
    packed = torch.from_numpy(rows.tokens(tokens.values, fill, "int64"))
    if not return_boundaries:
        return packed
    per_row = (rows.row_bounds[1:] - rows.row_bounds[:-1]).tolist()
    return packed, list(torch.from_numpy(rows.boundaries()).split(per_row))


def concatenate_and_pack(
    input_sequences: Any,
    label_sequences: Any,
    attention_masks: Any,
    max_length: int,
    pad_token_id: int,
    label_pad_id: int = IGNORE_INDEX,
) -> tuple[Tensor, Tensor, Tensor]:
    """Concatenate ids, labels and masks of sequences into rows, in order and without changes.

    If the model shifts the labels, as Hugging Face models do, the first label of each sequence must
    be -100, because it would be predicted from the previous sequence. `packed_collate_fn` does this
    for you.

    Args:
        input_sequences: token ids, as in `pack_dataset`.
        label_sequences: labels of the same lengths, in any form too.
        attention_masks: masks of the same lengths, in any form too, integers or booleans.
        max_length: tokens per row.
        pad_token_id: the value after the last sequence of a row of ids.
        label_pad_id: the value after the last sequence of a row of labels. Masks have 0 there.

    Returns:
        Ids, labels and masks, each ``(rows, max_length)`` int64.

    Raises:
        TypeError: if a value is not an integer, or a sequence is not a list.
        ValueError: if lengths differ, a sequence is empty or too long, or ``max_length`` is below
            1.
    """
    fills = (
        as_integer("pad_token_id", pad_token_id),
        as_integer("label_pad_id", label_pad_id),
        0,
    )
    ids = flatten_tokens(input_sequences, "input_sequences")
    labels = flatten_tokens(label_sequences, "label_sequences", empty=True)
    masks = flatten_tokens(attention_masks, "attention_masks", empty=True, bools=True)
    require_same_lengths(ids, "input_sequences", labels, "label_sequences")
    require_same_lengths(ids, "input_sequences", masks, "attention_masks")
    rows = _plan(ids, "input_sequences", max_length, "nf", "error")
    packed_ids, packed_labels, packed_masks = (
        torch.from_numpy(rows.tokens(part.values, fill, "int64"))
        for part, fill in zip((ids, labels, masks), fills)
    )
    return packed_ids, packed_labels, packed_masks


def _plan(tokens: Tokens, name: str, max_length: int, strategy: str, overlong: str) -> RowLayout:
    packer = Packer(at_least_one("max_length", max_length), strategy, overlong=overlong)
    options = {} if name == "sequences" else {"instead": ""}  # only pack_sequences takes overlong
    return RowLayout(plan_of(packer, tokens, name, "max_length", **options), tokens.offsets, name)
