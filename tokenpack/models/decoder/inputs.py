"""A batch of the decoder as one stream of real tokens, and what its layers need to know about it.

Three kinds of batch come in. All become a stream ``(1, total_tokens)``:

    padded rows     input_ids (rows, columns), attention_mask (rows, columns) or None
    packed stream   input_ids (1, total_tokens), cu_seqlens (num_seqs + 1,)
    packed rows     input_ids (rows, columns), cu_seqlens, cu_seqlens_padded (num_seqs + 1,)

With a cache, the queries are the new tokens and the keys are all tokens of their rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...attention.layouts import slots_of_sequences
from ...checks import IGNORE_INDEX
from ...kernels import PackedLayout, repad, unpad
from .layouts import full_layout, mask_layout, sequence_ids, stream_layout


class Targets:
    """What each token of a stream has to predict.

    Attributes:
        labels: ``(total_tokens,)`` int64: the label of the next token of the sequence, or -100.
        num_valid: how many are not -100, or None while torch.compile traces.
    """

    __slots__ = ("labels", "num_valid")

    def __init__(self, labels: Tensor, num_valid: int | None) -> None:
        self.labels, self.num_valid = labels, num_valid


class PackedInputs:
    """A batch as a stream. A plain object: FSDP and accelerate rebuild tuples and dicts.

    Attributes:
        tokens: ``(1, total_tokens)`` ids or ``(1, total_tokens, hidden_size)`` embeddings.
        layout: the new tokens, sequence by sequence.
        keys: the tokens that the new tokens may see. ``layout`` itself without a cache.
        rows: restores the shape of the batch. None if the batch is a stream.
        position_ids: ``(1, total_tokens)`` int64.
        cache: holds the keys of earlier tokens and takes those of the new tokens, or None.
        targets: None without labels.
        memo: what depends on the layout and is the same for all layers.
    """

    __slots__ = (
        *("tokens", "layout", "keys", "rows", "position_ids", "cache"),
        *("targets", "sequences", "memo"),
    )

    tokens: Tensor
    layout: PackedLayout
    keys: PackedLayout
    rows: PackedLayout | None
    position_ids: Tensor
    cache: Any
    targets: Targets | None
    sequences: Tensor | None
    memo: dict[Any, Any]

    def sequence_ids(self) -> Tensor:
        """``(total_tokens,)`` int64, the number of each new token's sequence."""
        if self.sequences is None:
            self.sequences = sequence_ids(self.layout)
        return self.sequences

    def counted(self) -> Tensor | None:
        """``(total_tokens,)`` bool, the tokens that balance the experts: those of sequences that
        have a target. None if there are no labels, so that all tokens count."""
        if self.targets is None:
            return None
        if "counted" not in self.memo:
            layout, sequence = self.layout, self.sequence_ids()
            per_sequence = torch.zeros(layout.num_seqs, dtype=torch.int32, device=layout.device)
            valid = (self.targets.labels != IGNORE_INDEX).int()
            self.memo["counted"] = (per_sequence.index_add(0, sequence, valid) > 0)[sequence]
        return self.memo["counted"]

    def in_rows(self, stream: Tensor) -> Tensor:
        """``(1, total_tokens, ...)`` in the shape of the batch, with 0 at padding."""
        return stream if self.rows is None else repad(stream.squeeze(0), self.rows)


def pack_batch(
    tokens: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
    cu_seqlens: Any = None,
    cu_seqlens_padded: Any = None,
    cache: Any = None,
) -> PackedInputs:
    """Turn a batch into a stream.

    Args:
        tokens: ``(rows, columns)`` ids or ``(rows, columns, hidden_size)`` embeddings, not empty.
        attention_mask: ``(rows, columns)``, 1 for real tokens; with a cache, of all columns.
        position_ids: ``(rows, columns)`` or ``(1, columns)``. Without a mask, a cache and
            boundaries, a position that is not one more than the position before begins a sequence,
            as in transformers.
        labels: ``(rows, columns)``, -100 where there is nothing to predict.
        cu_seqlens: boundaries of packed sequences.
        cu_seqlens_padded: where each sequence begins in the flattened packed rows.
        cache: a `transformers.DynamicCache`, or None.

    Raises:
        ValueError: if arguments contradict each other.
    """
    rows, columns = _check_tokens(tokens)
    packed = PackedInputs()
    packed.cache, packed.targets, packed.sequences = cache, None, None
    packed.memo = {}
    if cu_seqlens is None and cu_seqlens_padded is not None:
        raise ValueError("cu_seqlens must be given with cu_seqlens_padded, got None")
    if cu_seqlens is not None and cache is not None:
        raise ValueError("use_cache must be False for packed sequences, got a cache")
    if cu_seqlens is not None and attention_mask is not None:
        _require_ones(attention_mask)
    is_new = cache is None or cache.get_seq_length() == 0
    if cu_seqlens is None and attention_mask is None and is_new:
        cu_seqlens = _boundaries_by_position(position_ids, rows, columns)
        if cu_seqlens is not None:
            if cache is not None:
                raise ValueError(
                    "use_cache must be False if position_ids begin several sequences in a row, got "
                    "a cache (an attention_mask says that a row is one sequence)"
                )
            packed.rows = full_layout(rows, columns, tokens.device)
            packed.layout = stream_layout(cu_seqlens, rows * columns, tokens.device)
            return _finish(packed, tokens, position_ids, labels)
    if cu_seqlens_padded is not None:
        mask = _slots_of_sequences(cu_seqlens, cu_seqlens_padded, rows, columns, tokens.device)
        packed.rows = mask_layout(mask)
        packed.layout = stream_layout(cu_seqlens, packed.rows.total_tokens, tokens.device)
    elif cu_seqlens is not None:
        if rows != 1:
            raise ValueError(
                "input_ids must be (1, total_tokens) with cu_seqlens, "
                f"got shape {tuple(tokens.shape)}: packed rows need cu_seqlens_padded"
            )
        packed.rows = None
        packed.layout = stream_layout(cu_seqlens, columns, tokens.device)
    else:
        packed.layout = packed.rows = _layout_of_rows(attention_mask, rows, columns, tokens, cache)
    if cache is not None:
        position_ids = _with_cache(packed, attention_mask, position_ids)
    return _finish(packed, tokens, position_ids, labels)


def _finish(
    packed: PackedInputs, tokens: Tensor, position_ids: Tensor | None, labels: Tensor | None
) -> PackedInputs:
    """Gather what belongs to each token."""
    rows, shape = packed.rows, tuple(tokens.shape[:2])
    if packed.cache is None:
        packed.keys = packed.layout
    packed.tokens = tokens if rows is None else unpad(tokens, rows)[None]
    if position_ids is None:
        packed.position_ids = packed.layout.position_ids.long()[None]
    else:
        packed.position_ids = _of_tokens("position_ids", position_ids, shape, rows).long()[None]
    if labels is not None:
        _set_targets(packed, labels, shape)
    return packed


def _check_tokens(tokens: Tensor) -> tuple[int, int]:
    if tokens.dim() not in (2, 3) or 0 in tokens.shape[:2]:
        raise ValueError(
            "input_ids must be (rows, columns) and not empty (inputs_embeds: (rows, columns, "
            f"hidden_size)), got shape {tuple(tokens.shape)}"
        )
    return tokens.shape[0], tokens.shape[1]


def _require_ones(attention_mask: Tensor) -> None:
    message = "attention_mask must be all ones when cu_seqlens is given: leave it out"
    if torch.compiler.is_compiling():
        torch._assert_async((attention_mask != 0).all(), message)
    elif not bool((attention_mask != 0).all()):
        raise ValueError(message)


def _layout_of_rows(
    mask: Tensor | None, rows: int, columns: int, tokens: Tensor, cache: Any
) -> PackedLayout:
    """The layout of the new columns of a padded batch."""
    if mask is None:
        return full_layout(rows, columns, tokens.device)
    past = 0 if cache is None else cache.get_seq_length()
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must be (rows, columns), got {got}")
    if tuple(mask.shape) != (rows, past + columns):
        raise ValueError(
            f"attention_mask must be {(rows, past + columns)}, {past} columns in the cache and "
            f"{columns} new ones, got shape {tuple(mask.shape)}"
        )
    return mask_layout(mask[:, past:].to(tokens.device))


# ---------------------------------------------------------------------------------------- targets


def _set_targets(packed: PackedInputs, labels: Tensor, shape: tuple[int, ...]) -> None:
    """Shift labels within each sequence."""
    if tuple(labels.shape) != shape:
        raise ValueError(
            f"labels must have the shape of input_ids, {shape}, got {tuple(labels.shape)}"
        )
    layout = packed.layout
    labels = labels.to(layout.device)
    of_tokens = labels[0] if packed.rows is None else unpad(labels, packed.rows)
    is_last = nn.functional.pad(layout.position_ids[1:], (0, 1)) == 0
    next_labels = nn.functional.pad(of_tokens[1:], (0, 1), value=IGNORE_INDEX)
    targets = next_labels.masked_fill(is_last, IGNORE_INDEX)
    valid = targets != IGNORE_INDEX
    num_valid = None
    if torch.compiler.is_compiling():
        # Labels at padding are lost in the stream, so all labels are counted.
        same = (labels != IGNORE_INDEX).sum() == (of_tokens != IGNORE_INDEX).sum()
        torch._assert_async(same, _AT_PADDING)
    else:
        kinds = labels != IGNORE_INDEX, of_tokens != IGNORE_INDEX, valid
        given, real, num_valid = torch.stack([kind.sum() for kind in kinds]).tolist()
        if given != real:
            raise ValueError(f"{_AT_PADDING}, got {given - real} other labels there")
    packed.targets = Targets(targets, num_valid)


_AT_PADDING = "labels must be -100 at padding (attention_mask 0)"


# ------------------------------------------------------------------------------------------ cache


def _with_cache(
    packed: PackedInputs, mask: Tensor | None, position_ids: Tensor | None
) -> Tensor | None:
    """Set the layout of the keys. Returns the positions of the new tokens in padded rows."""
    cache, queries = packed.cache, packed.layout
    rows, columns = queries.padded_shape
    past = cache.get_seq_length()
    if past == 0:
        packed.keys = queries
        return position_ids
    device = queries.device
    if mask is None:
        mask = torch.ones((rows, past + columns), dtype=torch.bool, device=device)
    mask = mask.to(device) != 0
    length, offset = cache.get_mask_sizes(columns, 0)
    visible = mask[:, offset : offset + length]
    if offset > 0 and bool((mask.int().diff(dim=1) < 0).any()):
        raise ValueError(
            "attention_mask must have no padding after a real token once a cache with a sliding "
            "window drops columns, got some: pad on the left, or pass use_cache=False"
        )
    packed.keys = mask_layout(visible)
    if position_ids is not None:
        return position_ids
    return mask.long().cumsum(1)[:, past:] - 1


# -------------------------------------------------------------------------------- packed sequences


def _boundaries_by_position(position_ids: Tensor | None, rows: int, columns: int) -> Tensor | None:
    """``cu_seqlens`` of rows that position ids split, or None if they do not."""
    if position_ids is None or tuple(position_ids.shape) not in ((rows, columns), (1, columns)):
        return None
    return _split_by_position(position_ids, rows, columns)


# The number of sequences depends on values, so a graph of torch.compile ends here.
@torch.compiler.disable
def _split_by_position(position_ids: Tensor, rows: int, columns: int) -> Tensor | None:
    begins = nn.functional.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True)
    if not bool(begins[:, 1:].any()):
        return None
    starts = begins.expand(rows, columns).flatten().nonzero().flatten()
    return nn.functional.pad(starts, (0, 1), value=rows * columns)


_slots_of_sequences = torch.compiler.disable(slots_of_sequences)


def _of_tokens(
    name: str, values: Tensor, shape: tuple[int, ...], rows: PackedLayout | None
) -> Tensor:
    """``(total_tokens,)`` values of the real tokens."""
    values = values[None] if values.dim() == 1 else values
    if tuple(values.shape) not in (shape, (1, shape[1])):
        raise ValueError(f"{name} must be {shape}, got shape {tuple(values.shape)}")
    if rows is None:
        return values[0]
    return unpad(values.expand(shape).contiguous(), rows)
