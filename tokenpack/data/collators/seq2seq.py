"""Pairs of token lists to batches: capped, then padded to the longest or packed without padding.

    source, target -> the first tokens that fit, and the final EOS if there was one -> a batch

Nothing is tokenised here and nothing is shifted: a model makes its decoder's inputs of the labels.
All is done on the flat tokens of the whole batch (`flatten_tokens`), with no loop over samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...checks import IGNORE_INDEX, as_integer, optional_at_least_one
from ...segments import offsets_of
from ..packed.base import pad_rows
from ..packed.collate import flatten_samples
from ..packed.pairs import PackedPairs, pack_pairs_to_tensors
from ..tokens import Tokens, flatten_tokens


class CappedSeq2SeqCollator:
    """A ``collate_fn`` for sources and targets, with a cap on the length of each.

    It takes a list of samples: mappings with ``input_ids``, and ``labels`` in all or in none, as
    lists of ints, one-dimensional NumPy arrays or CPU tensors. Left out are tokens under a 0 of
    ``attention_mask``, where there is one, and labels of -100 behind the last that asks something:
    both are padding. Other columns are left alone.

    What is too long is cut at its end, but keeps its last token if that is EOS; so what stands at
    the front (the language code of NLLB) stays as well. Labels are padded on the right on either
    side of padding: a decoder would take padding before them for what precedes the text.

    A batch, padded:

        input_ids       (rows, columns) int64, pad_token_id at padding
        attention_mask  (rows, columns) int64, 1 at tokens
        labels          (rows, columns of their own) int64, -100 at padding; if the samples have any
        input_length    (rows,) int64 on the CPU, tokens of each source; by `length_column_name`

    or, with ``packed=True``, `tokenpack.data.PackedPairs`, which know their lengths.

    Attributes:
        truncated_sources: sources cut so far.
        truncated_targets: targets cut so far. Both count what this process collated: each worker
            of a ``DataLoader`` has a copy of the collator, and counts its own.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_encoder_len: int | None = 512,
        max_decoder_len: int | None = 256,
        pad_to_multiple_of: int | None = 8,
        length_column_name: str | None = "input_length",
        packed: bool = False,
        overlong: str = "truncate",
    ) -> None:
        """Collate for a tokenizer's models.

        Args:
            tokenizer: a transformers tokenizer, or anything with ``pad_token_id``,
                ``eos_token_id`` (may be None) and ``padding_side``.
            max_encoder_len: tokens of a source at most, EOS among them; None is no limit.
            max_decoder_len: the same of a target.
            pad_to_multiple_of: columns are a multiple of it; None is no rounding.
            length_column_name: name of the column of lengths; None is no such column.
            packed: give `tokenpack.data.PackedPairs` in place of padded rows.
            overlong: what to do with a sequence over its limit: "truncate" it or raise an "error".

        Raises:
            TypeError: if a number is no integer.
            ValueError: if one is below 1, the tokenizer has no ``pad_token_id``, or ``overlong``
                is neither.
        """
        if overlong not in ("truncate", "error"):
            raise ValueError(f"overlong must be 'truncate' or 'error', got {overlong!r}")
        self.tokenizer = tokenizer
        self.max_encoder_len = optional_at_least_one("max_encoder_len", max_encoder_len)
        self.max_decoder_len = optional_at_least_one("max_decoder_len", max_decoder_len)
        self.pad_to_multiple_of = optional_at_least_one("pad_to_multiple_of", pad_to_multiple_of)
        self.length_column_name = length_column_name
        self.packed = packed
        self.overlong = overlong
        self.truncated_sources = 0
        self.truncated_targets = 0
        required_id(tokenizer, "pad_token_id")  # now, and not in the first batch
        padding_side(tokenizer)

    def lengths(self, raw_lengths: Any) -> NDArray[np.int64]:
        """What pairs of so many tokens will be in a batch, to plan batches by.

        Args:
            raw_lengths: ``(n, 2)`` integers, tokens of each source, from 1 on, and of its target,
                from 0 on, with their EOS and without padding; or ``(n,)``, of sources that have no
                targets.

        Returns:
            ``(n, 2)``, exact: as given, but for what ``overlong="truncate"`` cuts.

        Raises:
            TypeError: if they are no integers.
            ValueError: if one is too small.
        """
        given = raw_lengths_of(raw_lengths)
        if self.overlong != "truncate":
            return given
        for side, limit in enumerate((self.max_encoder_len, self.max_decoder_len)):
            if limit is not None:
                np.minimum(given[:, side], limit, out=given[:, side])
        return given

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor] | PackedPairs:
        """Collate ``samples``.

        Raises:
            TypeError: if a sample, or a field of it, is nothing that can be collated.
            ValueError: if there is none, a source is empty, or with ``overlong="error"`` one is too
                long.
        """
        sources, targets = take_pairs(samples)
        sources, cut = self._cap(sources, self.max_encoder_len, "input_ids", "max_encoder_len")
        self.truncated_sources += cut
        if targets is not None:
            targets, cut = self._cap(targets, self.max_decoder_len, "labels", "max_decoder_len")
            self.truncated_targets += cut
        return collate_pairs(
            sources,
            targets,
            self.tokenizer,
            self.pad_to_multiple_of,
            self.length_column_name,
            self.packed,
        )

    def _cap(self, tokens: Tokens, limit: int | None, name: str, cap: str) -> tuple[Tokens, int]:
        """``(tokens, how many were cut)``."""
        if limit is None or not (over := tokens.lengths > limit).any():
            return tokens, 0
        if self.overlong == "error":
            at = int(over.argmax())
            raise ValueError(
                f"{name} of samples[{at}] must be at most {cap} = {limit} tokens, got "
                f"{tokens.lengths[at]} (overlong='truncate' cuts it)"
            )
        last = tokens.values[np.maximum(tokens.offsets[1:] - 1, 0)]
        kept = first_tokens(tokens, np.minimum(tokens.lengths, limit))
        end = self.tokenizer.eos_token_id
        if end is not None:
            ended = over & (last == end)
            kept.values[kept.offsets[1:][ended] - 1] = end
        return kept, int(over.sum())


def collate_pairs(
    sources: Tokens,
    targets: Tokens | None,
    tokenizer: Any,
    pad_to_multiple_of: int | None,
    length_column_name: str | None,
    packed: bool,
) -> dict[str, Tensor] | PackedPairs:
    """The batch that `CappedSeq2SeqCollator` describes, of pairs that need no change any more."""
    if packed:
        return pack_pairs_to_tensors(sources, targets)
    left = padding_side(tokenizer) == "left"
    lengths = torch.from_numpy(sources.lengths)
    pad = required_id(tokenizer, "pad_token_id")
    ids, mask = pad_rows(_tensor(sources), lengths, pad, pad_to_multiple_of, left)
    batch = {"input_ids": ids, "attention_mask": mask.long()}
    if targets is not None:
        asked = torch.from_numpy(targets.lengths)
        batch["labels"], _ = pad_rows(_tensor(targets), asked, IGNORE_INDEX, pad_to_multiple_of)
    if length_column_name is not None:
        batch[length_column_name] = lengths
    return batch


def take_pairs(samples: Sequence[Mapping[str, Any]]) -> tuple[Tokens, Tokens | None]:
    """``(sources, targets or None)`` of samples, without padding that they came with.

    Raises:
        TypeError: if they are not a list of mappings, or a field is no list of integers.
        ValueError: if a field is missing, a source is empty or contradicts its mask.
    """
    if not isinstance(samples, (list, tuple)) or not samples:
        raise TypeError(f"samples must be a list of at least one, got {samples!r:.80}")
    try:
        ids = [sample["input_ids"] for sample in samples]
    except (KeyError, TypeError, IndexError):
        _refuse_samples(samples)
    names = set().union(*samples)
    if "attention_mask" in names:
        of_sources = ("input_ids", "attention_mask")
        masked = [{name: each[name] for name in of_sources if name in each} for each in samples]
        sources, _, _ = flatten_samples(masked)
    else:
        sources = flatten_tokens(ids, "input_ids of samples")
    if "labels" not in names:
        return sources, None
    having = [at for at, sample in enumerate(samples) if sample.get("labels") is not None]
    if not having:
        return sources, None
    if len(having) < len(samples):
        at = next(at for at, sample in enumerate(samples) if sample.get("labels") is None)
        raise ValueError(
            f"every sample must have labels or none, samples[{having[0]}] has some and "
            f"samples[{at}] none"
        )
    labels = flatten_tokens([each["labels"] for each in samples], "labels of samples", empty=True)
    return sources, _without_trailing_ignored(labels)


def _refuse_samples(samples: Sequence[Any]) -> NoReturn:
    """Say which of the samples has no ``input_ids``."""
    for at, sample in enumerate(samples):
        if not isinstance(sample, Mapping):
            raise TypeError(
                f"samples[{at}] must be a mapping with input_ids, got a {type(sample).__name__}"
            )
        if "input_ids" not in sample:
            raise ValueError(
                f"samples[{at}] must have input_ids, it has "
                f"{', '.join(map(repr, sample)) or 'nothing'}"
            )
    raise ValueError("every sample must have input_ids")


def first_tokens(tokens: Tokens, lengths: NDArray[np.int64]) -> Tokens:
    """Each sequence's first ``lengths`` tokens, ``(num_sequences,)`` and at most all: a copy."""
    counts = np.stack([lengths, tokens.lengths - lengths], axis=1).ravel()
    kept = np.repeat(np.tile([True, False], len(lengths)), counts)
    return Tokens(tokens.values[kept], offsets_of(lengths))


def raw_lengths_of(given: Any) -> NDArray[np.int64]:
    """``(n, 2)``, a copy of the ``raw_lengths`` of pairs; where ``(n,)``, targets have none.

    Raises:
        TypeError: if they are no integers.
        ValueError: if a source has less than one token, or a target less than none.
    """
    lengths = np.asarray(given, dtype=None if len(given) else np.int64)
    if lengths.dtype.kind not in "iu" or lengths.shape[1:] not in ((), (2,)):
        raise TypeError(f"raw_lengths must be (n,) or (n, 2) integers, got {given!r:.80}")
    pairs = np.zeros((len(lengths), 2), np.int64)
    pairs[:, : lengths.ndim] = lengths if lengths.ndim == 2 else lengths[:, None]
    for side, least in enumerate((1, 0)):
        if (wrong := pairs[:, side] < least).any():
            at = f"{wrong.argmax()}" if lengths.ndim == 1 else f"{wrong.argmax()}, {side}"
            raise ValueError(
                f"raw_lengths[{at}] must be at least {least}, got {pairs[wrong.argmax(), side]}"
            )
    return pairs


def required_id(tokenizer: Any, name: str) -> int:
    """A token id that the tokenizer must have.

    Raises:
        ValueError: if it has not.
    """
    found = getattr(tokenizer, name, None)
    if found is None:
        raise ValueError(
            f"tokenizer must have a {name}, got None from a {type(tokenizer).__name__} "
            f"(set tokenizer.{name.removesuffix('_id')})"
        )
    return as_integer(f"tokenizer.{name}", found)


def padding_side(tokenizer: Any) -> str:
    """The tokenizer's side of padding; "right" where it has none.

    Raises:
        ValueError: if it is neither.
    """
    side = getattr(tokenizer, "padding_side", "right")
    if side not in ("left", "right"):
        raise ValueError(f"tokenizer.padding_side must be 'left' or 'right', got {side!r}")
    return side


def _without_trailing_ignored(labels: Tokens) -> Tokens:
    """Labels up to the last of each sequence that asks something."""
    asking = np.flatnonzero(labels.values != IGNORE_INDEX)
    if len(asking) == len(labels.values):
        return labels
    before = np.searchsorted(asking, labels.offsets[1:])  # tokens that ask, up to each end
    last = np.append(asking, -1)[before - 1]  # -1 where there are none, for before - 1 is -1 then
    lengths = np.maximum(last + 1 - labels.offsets[:-1], 0)
    return first_tokens(labels, lengths)


def _tensor(tokens: Tokens) -> Tensor:
    values = tokens.values
    if values.dtype != np.int64 or not values.flags.writeable:  # torch warns of what is read-only
        values = values.astype(np.int64)
    return torch.from_numpy(values)
