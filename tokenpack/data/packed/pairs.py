"""Packed batches for an encoder-decoder: concatenated sources and concatenated targets.

    source s = input_ids[0, cu_seqlens[s] : cu_seqlens[s + 1]]
    target s = labels[0, decoder_cu_seqlens[s] : decoder_cu_seqlens[s + 1]]

A padded batch of pairs pads each side to its own longest sequence, and the longest source and the
longest target are rarely in the same pair. A packed batch has no padding. A model patched by
`patch_model` computes each pair as if it were the only one.

The boundaries stay on the CPU when the tokens move to a device. They are made on the host, so no
code ever has to wait for the device to read the lengths.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...checks import IGNORE_INDEX, as_integer
from ...segments import offsets_of, ranges
from ..tokens import Tokens, flatten_tokens
from .base import CUT_BY_ROWS, PackedFields, pad_rows, selected

# The per-token fields of each side, by the prefix of its boundaries.
_SIDES = {"": ("input_ids",), "decoder_": ("labels", "decoder_input_ids")}


class PackedPairs(PackedFields):
    """Pairs of a source and a target, for ``model(**batch)`` of a patched encoder-decoder.

    Each field is also an attribute that can be read and set. ``to(device)`` and ``pin_memory()``
    return copies of the batch; the boundaries stay on the CPU. An unpatched model does not accept
    this batch: pass it `padded`.

    Attributes:
        input_ids: ``(1, total_source)`` int64.
        cu_seqlens: ``(num_pairs + 1,)`` int32 on the CPU, boundaries of the sources.
        max_seqlen: length of the longest source.
        labels: ``(1, total_target)`` int64, not shifted, -100 at targets that the loss ignores.
            Absent in a batch without targets, together with the boundaries below.
        decoder_input_ids: ``(1, total_target)`` int64. Absent unless you set it; by default, a
            model derives it from the labels.
        decoder_cu_seqlens: ``(num_pairs + 1,)`` int32 on the CPU, boundaries of the targets.
        decoder_max_seqlen: length of the longest target.
    """

    _token_fields = frozenset(name for names in _SIDES.values() for name in names)
    _host_fields = frozenset(f"{prefix}cu_seqlens" for prefix in _SIDES)

    def _check_boundaries(self) -> None:
        counts = {}
        for prefix, names in _SIDES.items():
            boundaries = self.get(f"{prefix}cu_seqlens")
            if not isinstance(boundaries, Tensor) or not boundaries.is_cpu:
                continue
            end = int(boundaries[-1]) if len(boundaries) else 0
            counts[f"{prefix}cu_seqlens"] = len(boundaries) - 1
            for name in names:
                if name in self and self[name].shape != (1, end):
                    raise ValueError(
                        f"{name} must be (1, {end}), because {prefix}cu_seqlens ends at {end}, got "
                        f"shape {tuple(self[name].shape)}; use select: packed pairs {CUT_BY_ROWS}"
                    )
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"both sides must have the same number of sequences, got boundaries of {counts}"
            )

    @property
    def lengths(self) -> Tensor:
        """``(num_pairs, 2)`` int64 on the CPU: tokens of each source and of its target."""
        sources = self.cu_seqlens.cpu().diff().long()
        if "decoder_cu_seqlens" not in self:
            return torch.stack([sources, torch.zeros_like(sources)], dim=1)
        return torch.stack([sources, self.decoder_cu_seqlens.cpu().diff().long()], dim=1)

    def select(self, sequences: Any) -> PackedPairs:
        """Return some of the pairs, in the given order, for example as a micro-batch.

        Args:
            sequences: ``(k,)`` integers from 0 to ``num_pairs - 1``, in any form, as in
                `pack_lengths`. A pair may occur more than once.

        Returns:
            A batch of those pairs. It has only the fields that the class documents.

        Raises:
            TypeError: if ``sequences`` are not integers.
            ValueError: if ``sequences`` is empty.
            IndexError: if an index is out of range.
        """
        chosen = selected(sequences, len(self.cu_seqlens) - 1)
        fields: dict[str, Any] = {}
        for prefix, names in self._sides().items():
            offsets = self[f"{prefix}cu_seqlens"].cpu().numpy().astype(np.int64)
            lengths = np.diff(offsets)[chosen]
            tokens = torch.from_numpy(ranges(offsets[chosen], lengths))
            for name in names:
                values = self[name]
                fields[name] = values[:, tokens.to(values.device, non_blocking=True)]
            fields |= _boundaries(prefix, lengths)
        return PackedPairs(fields)

    def padded(self, pad_token_id: int, pad_to_multiple_of: int | None = None) -> dict[str, Tensor]:
        """Return the same pairs as a batch padded on the right, which any model accepts.

        Args:
            pad_token_id: the value of ``input_ids`` (and ``decoder_input_ids``) at padding.
            pad_to_multiple_of: round the columns of both sides up to a multiple of this.

        Returns:
            ``input_ids`` and ``attention_mask`` of shape ``(num_pairs, source columns)``, and
            ``labels`` of shape ``(num_pairs, target columns)`` with -100 at padding. All are int64
            and on the device of the tokens.

        Raises:
            TypeError: if a number is not an integer.
            ValueError: if ``pad_to_multiple_of`` is below 1.
        """
        fill = as_integer("pad_token_id", pad_token_id)
        batch: dict[str, Tensor] = {}
        for prefix, names in self._sides().items():
            lengths = self[f"{prefix}cu_seqlens"].cpu().diff()
            for name in names:
                value = IGNORE_INDEX if name == "labels" else fill
                rows, mask = pad_rows(self[name][0], lengths, value, pad_to_multiple_of)
                batch[name] = rows
                if name == "input_ids":
                    batch["attention_mask"] = mask.long()
        return batch

    def _sides(self) -> dict[str, list[str]]:
        """Return the per-token fields of each side that the batch has, by its prefix."""
        return {
            prefix: [name for name in names if name in self]
            for prefix, names in _SIDES.items()
            if f"{prefix}cu_seqlens" in self
        }


def pack_pairs_to_tensors(sources: Any, targets: Any = None) -> PackedPairs:
    """Concatenate pairs into a batch without padding.

    Args:
        sources: token ids of each source, at least one token each, as in `pack_dataset`, or
            `tokenpack.data.tokens.Tokens`.
        targets: labels of each target, in any form too, -100 where the loss ignores them. A target
            may be empty. By default, the batch has only sources.

    Returns:
        The batch, in the given order, in newly allocated memory.

    Raises:
        TypeError: if a token is not an integer.
        ValueError: if there are no sources, a source is empty, or the number of targets differs.
    """
    source_tokens = flatten_tokens(sources, "sources")
    fields = _side("", "input_ids", source_tokens)
    if targets is not None:
        target_tokens = flatten_tokens(targets, "targets", empty=True)
        if len(target_tokens.offsets) != len(source_tokens.offsets):
            raise ValueError(
                f"targets must have one sequence per source, {len(source_tokens.offsets) - 1}, "
                f"got {len(target_tokens.offsets) - 1}"
            )
        fields |= _side("decoder_", "labels", target_tokens)
    return PackedPairs(fields)


def _side(prefix: str, name: str, tokens: Tokens) -> dict[str, Any]:
    if len(tokens.values) >= 2**31:
        raise ValueError(
            f"{name} must have at most 2**31 - 1 tokens in a batch, got {len(tokens.values)}"
        )
    values = torch.from_numpy(tokens.values.astype(np.int64))  # a copy: the caller may own them
    return {name: values[None], **_boundaries(prefix, tokens.lengths)}


def _boundaries(prefix: str, lengths: NDArray[np.int64]) -> dict[str, Any]:
    return {
        f"{prefix}cu_seqlens": torch.from_numpy(offsets_of(lengths).astype(np.int32)),
        f"{prefix}max_seqlen": int(lengths.max()),
    }
