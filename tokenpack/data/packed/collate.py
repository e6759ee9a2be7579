"""Collate functions for causal models: samples or packed rows to a `PackedBatch`.

Samples are concatenated into flat arrays of ids and labels first, so that the rest of the work has
no Python loop over samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...checks import IGNORE_INDEX, as_integer
from ...packing import Packer, PackResult
from ...segments import offsets_of
from ..tokens import Tokens, flatten_tokens, plan_of, require_same_lengths
from .batch import (
    PackedBatch,
    build_batch,
    check_pad_to_total,
    pack_result_to_tensors,
    with_dead_tokens,
)


def packed_collate_fn(
    capacity: int,
    strategy: str = "auto",
    seed: int | None = None,
    padding_value: int = 0,
    label_padding_value: int = IGNORE_INDEX,
    *,
    labels_shifted: bool = False,
    overlong: str = "error",
    max_sequences: int | None = None,
    stream: bool = False,
    pad_to_total: int | None = None,
) -> PackedCollator:
    """Return a ``collate_fn`` that packs the samples of a batch into rows.

    The function takes a list of samples. A sample is a list or tuple of ints, a one-dimensional
    NumPy array or memory map of any integer type, a torch CPU tensor of any integer type, an Arrow
    array, a column of `datasets`, a pandas or polars series (docs/inputs.md), or a mapping with
    such ``input_ids``. A mapping may also have ``labels`` (not shifted; by default the ids) and an
    ``attention_mask`` (tokens with a 0 are padding and are removed). Other fields are ignored:
    positions and masks follow from the packing. The function can be pickled, so workers of a
    ``DataLoader`` can run it, and it can be the ``data_collator`` of a ``Trainer``.

    Args:
        capacity: tokens per row.
        strategy: one of `tokenpack.packing.Packer.strategies()`, or "auto". "nf" keeps the order.
        seed: the seed of strategies that shuffle.
        padding_value: the value of ``input_ids`` at padding.
        label_padding_value: the value of ``labels`` where the loss ignores them; see
            `pack_result_to_tensors`.
        labels_shifted: make labels for a loss that does not shift. By default they are for one
            that does, as in Hugging Face models. See `PackedBatch`.
        overlong: what to do with a sample longer than ``capacity``: raise an "error", "truncate",
            "split" or "drop" it. ``batch.plan`` lists those samples.
        max_sequences: the maximum number of samples per row. By default there is no limit.
        stream: return one row of all tokens, without padding. This is the smallest batch and the
            least work for a patched model or flash attention. With SDPA or eager attention, an
            unpatched model needs rows, because memory grows with the square of the row length.
        pad_to_total: with ``stream``, fill the row up to a multiple of this number with dead
            tokens, for constant shapes; see `pack_result_to_tensors`.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: if ``capacity`` or ``pad_to_total`` is below 1, ``pad_to_total`` is given
            without ``stream``, or an option has an unknown value.
    """
    check_pad_to_total(pad_to_total, stream)
    return PackedCollator(
        Packer(capacity, strategy, seed, max_sequences=max_sequences, overlong=overlong),
        as_integer("padding_value", padding_value),
        as_integer("label_padding_value", label_padding_value),
        labels_shifted,
        stream,
        pad_to_total,
    )


@dataclasses.dataclass(frozen=True)
class PackedCollator:
    """The function that `packed_collate_fn` returns."""

    packer: Packer
    padding_value: int
    label_padding_value: int
    labels_shifted: bool
    stream: bool
    pad_to_total: int | None = None

    def __call__(self, samples: Sequence[Any]) -> PackedBatch:
        """Pack ``samples``.

        Raises:
            TypeError: if a sample or one of its fields has a type that cannot be packed.
            ValueError: if there are no samples, one is empty or too long, its fields have different
                lengths, or it is a packed row (``seq_lengths``) of several sequences.
        """
        ids, labels, name = flatten_samples(samples)
        fills = self.padding_value, self.label_padding_value
        plan = plan_of(self.packer, ids, name)
        batch = build_batch(plan, ids, labels, *fills, name, self.labels_shifted, self.stream)
        if self.pad_to_total is None:
            return batch
        return with_dead_tokens(batch, self.pad_to_total, *fills)


def collate_packed_rows(rows: Sequence[Mapping[str, Any]]) -> PackedBatch:
    """Collate packed rows from `pack_dataset` or `pack_stream`, keeping their sequences separate.

    Args:
        rows: mappings with ``input_ids``, ``seq_lengths`` and, in all of them or in none,
            ``labels``: integers in any form, as in `packed_collate_fn`.

    Returns:
        A batch with the same rows.

    Raises:
        TypeError: if a field is not a list of integers.
        ValueError: if there are no rows, a row lacks a field that another has, rows differ in
            their number of slots, or the lengths do not fit into a row.
    """
    if not isinstance(rows, Sequence) or not rows:
        raise ValueError(f"rows must be a list of at least one row, got {rows!r:.80}")
    fields = _fields_of_rows(rows)
    lengths = fields.pop("seq_lengths")
    slots = {int(slots) for tokens in fields.values() for slots in tokens.lengths}
    if len(slots) != 1:
        raise ValueError(f"rows must all have the same number of slots, got {sorted(slots)}")
    capacity = slots.pop()
    item_lengths = lengths.values.astype(np.int64)
    fills = _fills_of_rows(Tokens(item_lengths, lengths.offsets), capacity)
    plan = PackResult(
        items=np.arange(len(item_lengths)),
        offsets=lengths.offsets,
        item_lengths=item_lengths,
        capacity=capacity,
        strategy="rows",
        num_sequences=len(item_lengths),
    )
    ids = fields["input_ids"].values.reshape(len(rows), capacity)
    in_sequences = np.arange(capacity) < fills[:, None]
    batch = pack_result_to_tensors(plan, Tokens(ids[in_sequences], offsets_of(item_lengths)))
    for name, tokens in fields.items():  # copied whole, to keep the rows' own padding values
        copy = tokens.values.astype(np.int64)
        batch[name] = torch.from_numpy(copy.reshape(len(rows), capacity))
    return batch


def _fields_of_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tokens]:
    """Concatenate each field of the rows."""
    names = ["input_ids", "seq_lengths", *(["labels"] if "labels" in rows[0] else [])]
    for at, row in enumerate(rows):
        missing = [name for name in names if name not in row]
        if missing:
            raise ValueError(
                f"rows[{at}] must have {missing[0]!r}, got only {sorted(row)} "
                "(a Trainer drops columns unless remove_unused_columns=False)"
            )
        if "labels" in row and "labels" not in names:
            raise ValueError(f"rows[0] must have 'labels', because rows[{at}] has them")
    return {
        name: flatten_tokens([row[name] for row in rows], f"{name} of rows", empty=True)
        for name in names
    }


def _fills_of_rows(lengths: Tokens, capacity: int) -> NDArray[np.int64]:
    """``(num_rows,)``, the tokens of each row. Checks the lengths of its sequences."""
    ends = offsets_of(lengths.values)[lengths.offsets]
    fills = np.diff(ends)
    too_short = np.diff(offsets_of(lengths.values < 1)[lengths.offsets]) > 0
    if (wrong := too_short | (lengths.lengths == 0) | (fills > capacity)).any():
        at = int(wrong.argmax())
        got = lengths.values[lengths.offsets[at] : lengths.offsets[at + 1]].tolist()
        raise ValueError(
            f"rows[{at}]['seq_lengths'] must be 1 or more each and at most {capacity} in total, "
            f"got {got}"
        )
    return fills


def flatten_samples(
    samples: Sequence[Any], *, empty: bool = False
) -> tuple[Tokens, Tokens | None, str]:
    """Concatenate the ids and labels of samples, without the tokens that their masks exclude.

    Args:
        samples: as in `packed_collate_fn`.
        empty: whether samples may have no tokens.

    Returns:
        ``(ids, labels, name)``. ``labels`` is None if the samples have none. ``name`` is what error
        messages call the ids.
    """
    if not isinstance(samples, (list, tuple)) or not samples:
        raise TypeError(f"samples must be a list of at least one sample, got {samples!r:.80}")
    mappings = [isinstance(sample, Mapping) for sample in samples]
    if not any(mappings):
        return flatten_tokens(samples, "samples", empty=empty), None, "samples"
    if not all(mappings):
        at = mappings.index(False)
        raise TypeError(
            "samples must be all mappings or all token lists, got a mapping at "
            f"samples[{mappings.index(True)}] and a {type(samples[at]).__name__} at samples[{at}]"
        )
    _require_one_sequence_each(samples)
    ids_name, labels_name, mask_name = (
        f"{name} of samples" for name in ("input_ids", "labels", "attention_mask")
    )
    ids = flatten_tokens(_field(samples, "input_ids"), ids_name, empty=empty)
    labels = None
    if any("labels" in sample for sample in samples):
        labels = flatten_tokens(_field(samples, "labels"), labels_name, empty=True)
        require_same_lengths(ids, ids_name, labels, labels_name)
    if any("attention_mask" in sample for sample in samples):
        masks = _field(samples, "attention_mask")
        mask = flatten_tokens(masks, mask_name, empty=True, bools=True)
        require_same_lengths(ids, ids_name, mask, mask_name)
        ids, labels = _unmasked(ids, labels, mask, mask_name, empty)
    return ids, labels, ids_name


def _require_one_sequence_each(samples: Sequence[Mapping[str, Any]]) -> None:
    """Raise if a sample is a packed row. As one sequence, its tokens would see one another."""
    for at, sample in enumerate(samples):
        lengths = sample.get("seq_lengths")
        if lengths is not None and len(lengths) > 1:
            raise ValueError(
                f"samples[{at}] must be one sequence, got a packed row of {len(lengths)} "
                "(seq_lengths): collate packed rows with collate_packed_rows"
            )


def _field(samples: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    try:
        return [sample[name] for sample in samples]
    except KeyError:
        at = next(at for at, sample in enumerate(samples) if name not in sample)
        raise ValueError(
            f"samples[{at}] must have {name!r}, got only "
            f"{', '.join(map(repr, samples[at])) or 'an empty mapping'}; "
            "labels and masks must be in every sample or in none"
        ) from None


def _unmasked(
    ids: Tokens, labels: Tokens | None, mask: Tokens, mask_name: str, empty: bool
) -> tuple[Tokens, Tokens | None]:
    """Return the ids and labels where the mask is 1."""
    real = mask.values == 1
    if (wrong := ~(real | (mask.values == 0))).any():
        token = int(wrong.argmax())
        at = int(np.searchsorted(mask.offsets, token, side="right")) - 1
        raise ValueError(f"{mask_name}[{at}] must contain only 0 and 1, got {mask.values[token]}")
    if real.all():
        return ids, labels
    offsets = offsets_of(real)[mask.offsets]
    if not empty and not np.diff(offsets).all():
        at = int(np.diff(offsets).argmin())
        raise ValueError(f"{mask_name}[{at}] must be 1 at one token or more, got 0 everywhere")
    real_labels = None if labels is None else Tokens(labels.values[real], offsets)
    return Tokens(ids.values[real], offsets), real_labels
