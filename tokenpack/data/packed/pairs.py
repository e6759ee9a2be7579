"""Packed batches for an encoder-decoder: sources side by side, targets side by side, no padding.

    source s = input_ids[0, cu_seqlens[s] : cu_seqlens[s + 1]]
    target s = labels[0, decoder_cu_seqlens[s] : decoder_cu_seqlens[s + 1]]

A padded batch of pairs pads twice, each side to its own longest sequence, and the two are seldom
in the same pair. Here there is nothing to pad: a model patched by `patch_model` computes each pair
as it would alone. The host made the batch and knows every length, so the boundaries stay on the
CPU when the tokens move: nobody ever waits for a device to be told how long its sequences are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...checks import IGNORE_INDEX, as_integer, at_least_one
from ...segments import ranges
from ..tokens import Tokens, flatten_tokens

# What lies along each side's tokens, by the prefix of its boundaries' name.
_SIDES = {"": ("input_ids",), "decoder_": ("labels", "decoder_input_ids")}
_BOUNDARIES = tuple(f"{prefix}cu_seqlens" for prefix in _SIDES)
_FIELDS = frozenset(name for names in _SIDES.values() for name in names)


class PackedPairs(dict[str, Any]):
    """Pairs of a source and a target, for ``model(**batch)`` of a patched encoder-decoder.

    Each field is an attribute as well, to be read and set. An unpatched model takes no such batch:
    give it `padded`.

    Attributes:
        input_ids: ``(1, total_source)`` int64.
        cu_seqlens: ``(num_pairs + 1,)`` int32 on the CPU, boundaries of the sources.
        max_seqlen: length of the longest source.
        labels: ``(1, total_target)`` int64, not shifted; -100 where nothing is asked. Missing, with
            the boundaries below, in a batch without targets.
        decoder_input_ids: ``(1, total_target)`` int64, if you put them there; a model makes them
            of the labels.
        decoder_cu_seqlens: ``(num_pairs + 1,)`` int32 on the CPU, boundaries of the targets.
        decoder_max_seqlen: length of the longest target.
    """

    def __init__(self, *fields: Any, **more: Any) -> None:
        super().__init__(*fields, **more)
        self._require_whole()

    def _require_whole(self) -> None:
        """Refuse what was cut by rows, as accelerate cuts batches that it deals out to processes.

        Looks at boundaries on the CPU alone: elsewhere it would wait for the device.
        """
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
                        f"{name} must be (1, {end}), as {prefix}cu_seqlens ends at {end}, got "
                        f"shape {tuple(self[name].shape)}: packed pairs cannot be cut by rows, use "
                        "select (with accelerate, set dispatch_batches=False)"
                    )
        if len(set(counts.values())) > 1:
            raise ValueError(f"both sides must hold as many sequences, got boundaries of {counts}")

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"PackedPairs has no {name!r}; its fields are {', '.join(self)}"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self or name in _FIELDS:
            self[name] = value  # else the attribute would say one thing and the model get another
        else:
            super().__setattr__(name, value)

    @property
    def lengths(self) -> Tensor:
        """``(num_pairs, 2)`` int64 on the CPU: tokens of each source and of its target."""
        sources = self.cu_seqlens.cpu().diff().long()
        if "decoder_cu_seqlens" not in self:
            return torch.stack([sources, torch.zeros_like(sources)], dim=1)
        return torch.stack([sources, self.decoder_cu_seqlens.cpu().diff().long()], dim=1)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> PackedPairs:
        """The same batch with its tokens on ``device``, and its boundaries on the CPU."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedPairs:
        """The same batch in page-locked memory, from which ``to`` can copy without waiting."""
        return self._map(Tensor.pin_memory)

    def select(self, sequences: Any) -> PackedPairs:
        """Some of the pairs, in the order asked for: a micro-batch of this one.

        Args:
            sequences: ``(k,)`` integers from 0 to ``num_pairs - 1``, a list, array or CPU tensor.
                A pair may be asked for twice.

        Returns:
            A batch of those pairs. Fields other than those of the class are left out.

        Raises:
            TypeError: if ``sequences`` are no integers.
            ValueError: if there are none.
            IndexError: if there is no such pair.
        """
        chosen = _as_indices(sequences, len(self.cu_seqlens) - 1)
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
        """The same pairs as an ordinary batch, padded on the right: what any model takes.

        Args:
            pad_token_id: what stands in ``input_ids`` (and ``decoder_input_ids``) at padding.
            pad_to_multiple_of: columns of both sides are a multiple of it.

        Returns:
            ``input_ids`` and ``attention_mask`` ``(num_pairs, columns)``, ``labels``
            ``(num_pairs, columns of their own)`` with -100 at padding, all int64 and on the device
            of the tokens.

        Raises:
            TypeError: if a number is no integer.
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
        """The fields with a value for each token, by the prefix of their side, where it has any."""
        return {
            prefix: [name for name in names if name in self]
            for prefix, names in _SIDES.items()
            if f"{prefix}cu_seqlens" in self
        }

    def _map(self, change: Callable[[Tensor], Tensor]) -> PackedPairs:
        return PackedPairs(
            {
                name: change(value)
                if isinstance(value, Tensor) and name not in _BOUNDARIES
                else value
                for name, value in self.items()
            }
        )


def pack_pairs_to_tensors(sources: Any, targets: Any = None) -> PackedPairs:
    """Put pairs side by side, without ever padding them.

    Args:
        sources: token ids of each source, one token at least; lists or tuples of ints,
            one-dimensional NumPy arrays or CPU tensors, an Arrow or datasets column of lists, or
            `tokenpack.data.tokens.Tokens`.
        targets: labels for each, -100 where nothing is asked; a target may be empty. Without them,
            a batch of sources alone.

    Returns:
        The batch, in the order given, in memory of its own.

    Raises:
        TypeError: if they are no integers.
        ValueError: if there are none, a source is empty, or there are not as many targets.
    """
    given = flatten_tokens(sources, "sources")
    fields = _side("", "input_ids", given)
    if targets is not None:
        asked = flatten_tokens(targets, "targets", empty=True)
        if len(asked.offsets) != len(given.offsets):
            raise ValueError(
                f"targets must be as many as sources, {len(given.offsets) - 1}, "
                f"got {len(asked.offsets) - 1}"
            )
        fields |= _side("decoder_", "labels", asked)
    return PackedPairs(fields)


def pad_rows(
    values: Tensor,
    lengths: Tensor,
    fill: int,
    multiple: int | None = None,
    left: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sequences side by side as the rows of a padded tensor.

    Args:
        values: ``(total,)``, sequence after sequence.
        lengths: ``(num_sequences,)`` integers on the CPU, which sum up to that.
        fill: what stands at padding.
        multiple: columns are a multiple of it; else, as many as the longest sequence has.
        left: pad on the left.

    Returns:
        ``(rows, mask)``, both ``(num_sequences, columns)``, one column at least, on the device of
        ``values``; the mask is bool, True at tokens.
    """
    step = 1 if multiple is None else at_least_one("pad_to_multiple_of", multiple)
    columns = -(-max(int(lengths.max()), 1) // step) * step
    column = torch.arange(columns)
    ends = lengths[:, None]
    mask = (column >= columns - ends) if left else (column < ends)
    rows = values.new_full(tuple(mask.shape), fill)
    if values.is_cpu:
        rows.numpy()[mask.numpy()] = values.numpy()  # takes half the time of torch's
        return rows, mask
    mask = mask.to(values.device, non_blocking=True)
    return rows.masked_scatter_(mask, values), mask


def _side(prefix: str, name: str, tokens: Tokens) -> dict[str, Any]:
    if len(tokens.values) >= 2**31:
        raise ValueError(
            f"a batch may have at most 2**31 - 1 tokens a side, {name} has {len(tokens.values)}"
        )
    values = torch.from_numpy(tokens.values.astype(np.int64))  # a copy: they may be the caller's
    return {name: values[None], **_boundaries(prefix, tokens.lengths)}


def _boundaries(prefix: str, lengths: NDArray[np.int64]) -> dict[str, Any]:
    cu_seqlens = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    return {
        f"{prefix}cu_seqlens": torch.from_numpy(cu_seqlens),
        f"{prefix}max_seqlen": int(lengths.max()),
    }


def _as_indices(sequences: Any, count: int) -> NDArray[np.int64]:
    chosen = np.asarray(sequences)
    if chosen.ndim == 1 and not len(chosen):
        raise ValueError("sequences must name at least one pair, got none")
    if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
        raise TypeError(
            f"sequences must be a list, array or CPU tensor of integers, got {sequences!r:.80}"
        )
    if ((chosen < 0) | (chosen >= count)).any():
        at = int(((chosen < 0) | (chosen >= count)).argmax())
        raise IndexError(
            f"sequences[{at}] must be from 0 to {count - 1}, as the batch holds {count} pairs, "
            f"got {chosen[at]}"
        )
    return chosen.astype(np.int64)
