"""Batches of source and target pairs: truncated to limits, then padded or packed.

    source, target -> the first tokens that fit, and the special tokens at the end -> a batch

The samples are already tokenized. Labels are not shifted, because a model derives its decoder
inputs from them. All work is done on the flat tokens of the whole batch (`flatten_tokens`), without
a loop over samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...checks import IGNORE_INDEX, as_integer, optional_at_least_one
from ...packing.lengths import as_integers
from ...segments import offsets_of
from ..packed.base import pad_rows
from ..packed.collate import flatten_samples
from ..packed.pairs import PackedPairs, pack_pairs_to_tensors
from ..tokens import Tokens, flatten_tokens
from .decoder_inputs import check_prepares_decoder_inputs, with_decoder_inputs
from .special_tokens import EndOfSequence


class CappedSeq2SeqCollator:
    """A ``collate_fn`` for sources and targets, with a limit on the length of each.

    It takes a list of samples: mappings with ``input_ids`` and, in all samples or in none,
    ``labels``, integers in any form, as in `packed_collate_fn`. Padding is removed: tokens where
    ``attention_mask`` is 0, and labels of -100 at the end. Other columns are ignored.

    A sequence that is too long loses tokens at the end of its text. The special tokens after the
    text are kept: EOS, or the ``</s> lang`` of mBART and of NLLB's legacy behavior. So are the
    tokens at the front, such as NLLB's language code. Labels are always padded on the right,
    because a decoder would treat padding on the left as the beginning of the text.

    A padded batch has these fields:

        input_ids       (rows, source columns) int64, pad_token_id at padding
        attention_mask  (rows, source columns) int64, 1 at tokens
        labels          (rows, target columns) int64, -100 at padding; if the samples have labels
        decoder_input_ids  like labels, not -100; if `model` is given
        input_length    (rows,) int64 on the CPU, tokens of each source; see `length_column_name`

    With ``packed=True``, a batch is a `tokenpack.data.PackedPairs`, which contains the lengths.

    Attributes:
        truncated_sources: number of sources truncated so far.
        truncated_targets: number of targets truncated so far. Each worker of a ``DataLoader`` has
            its own copy of the collator and its own counts.
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
        model: Any = None,
    ) -> None:
        """Create a collator.

        Args:
            tokenizer: a transformers tokenizer, or an object with ``pad_token_id``,
                ``eos_token_id`` (may be None) and ``padding_side``.
            max_encoder_len: the maximum number of tokens of a source, including special tokens.
                None means no limit.
            max_decoder_len: the same for a target.
            pad_to_multiple_of: round the number of columns up to a multiple of this. None means no
                rounding.
            length_column_name: name of the field of source lengths. None omits it.
            packed: return a `tokenpack.data.PackedPairs` instead of padded rows.
            overlong: what to do with a sequence over its limit: "truncate" it or raise an "error".
            model: an encoder-decoder whose ``prepare_decoder_input_ids_from_labels`` adds
                ``decoder_input_ids``, as for `DataCollatorForSeq2Seq`. The stock `Seq2SeqTrainer`
                needs them with ``label_smoothing_factor``, because it takes the labels away before
                it calls the model. tokenpack's trainers do not need them.

        Raises:
            TypeError: if a number is not an integer, or ``model`` lacks that method.
            ValueError: if a number is below 1, the tokenizer has no ``pad_token_id``, or
                ``overlong`` has an unknown value.
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
        self.model = check_prepares_decoder_inputs(model)
        self.truncated_sources = 0
        self.truncated_targets = 0
        required_id(tokenizer, "pad_token_id")  # fail here, not in the first batch
        padding_side(tokenizer)
        self._end = EndOfSequence(tokenizer)

    def lengths(self, raw_lengths: Any) -> NDArray[np.int64]:
        """Return the lengths that pairs will have in a batch, to plan batches.

        Args:
            raw_lengths: ``(n, 2)`` integers in any form, as in `pack_lengths`: the tokens of each
                source (1 or more) and of its target (0 or more), including EOS and without padding.
                Or ``(n,)``, for sources without targets.

        Returns:
            ``(n, 2)``, exact: the given lengths, limited if ``overlong`` is "truncate".

        Raises:
            TypeError: if the lengths are not integers.
            ValueError: if a length is too small, or the shape is another.
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
            TypeError: if a sample or one of its fields has a type that cannot be collated.
            ValueError: if a source is empty or, with ``overlong="error"``, a sequence is too long.
        """
        sources, targets = flatten_pairs(samples)
        sources, count = self._limit(sources, self.max_encoder_len, "input_ids", "max_encoder_len")
        self.truncated_sources += count
        if targets is not None:
            targets, count = self._limit(targets, self.max_decoder_len, "labels", "max_decoder_len")
            self.truncated_targets += count
        batch = collate_pairs(
            sources,
            targets,
            self.tokenizer,
            self.pad_to_multiple_of,
            self.length_column_name,
            self.packed,
        )
        return with_decoder_inputs(batch, self.model)

    def _limit(
        self, tokens: Tokens, limit: int | None, name: str, limit_name: str
    ) -> tuple[Tokens, int]:
        """Return the tokens within the limit, and how many sequences were truncated."""
        if limit is None or not (over := tokens.lengths > limit).any():
            return tokens, 0
        if self.overlong == "error":
            at = int(over.argmax())
            raise ValueError(
                f"{name} of samples[{at}] must be at most {limit_name} = {limit} tokens, got "
                f"{tokens.lengths[at]}; pass overlong='truncate' to shorten it"
            )
        return self._end.truncated(tokens, limit), int(over.sum())


def collate_pairs(
    sources: Tokens,
    targets: Tokens | None,
    tokenizer: Any,
    pad_to_multiple_of: int | None,
    length_column_name: str | None,
    packed: bool,
) -> dict[str, Tensor] | PackedPairs:
    """Build the batch that `CappedSeq2SeqCollator` describes, from pairs within the limits."""
    if packed:
        return pack_pairs_to_tensors(sources, targets)
    left = padding_side(tokenizer) == "left"
    lengths = torch.from_numpy(sources.lengths)
    pad = required_id(tokenizer, "pad_token_id")
    ids, mask = pad_rows(_tensor(sources), lengths, pad, pad_to_multiple_of, left)
    batch = {"input_ids": ids, "attention_mask": mask.long()}
    if targets is not None:
        target_lengths = torch.from_numpy(targets.lengths)
        batch["labels"], _ = pad_rows(
            _tensor(targets), target_lengths, IGNORE_INDEX, pad_to_multiple_of
        )
    if length_column_name is not None:
        batch[length_column_name] = lengths
    return batch


def flatten_pairs(samples: Sequence[Mapping[str, Any]]) -> tuple[Tokens, Tokens | None]:
    """Concatenate the sources and targets of samples, without their padding.

    The targets are None if the samples have no labels.

    Raises:
        TypeError: if ``samples`` is not a list of mappings, or a field is not a list of integers.
        ValueError: if a field is missing, a source is empty, or a mask does not fit its source.
    """
    if not isinstance(samples, (list, tuple)) or not samples:
        raise TypeError(f"samples must be a list of at least one sample, got {samples!r:.80}")
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
            f"samples[{at}] must have labels, because samples[{having[0]}] has labels, got none"
        )
    labels = flatten_tokens([each["labels"] for each in samples], "labels of samples", empty=True)
    return sources, _without_trailing_ignored(labels)


def _refuse_samples(samples: Sequence[Any]) -> NoReturn:
    """Raise the error for the first sample without ``input_ids``."""
    for at, sample in enumerate(samples):
        if not isinstance(sample, Mapping):
            raise TypeError(
                f"samples[{at}] must be a mapping with input_ids, got a {type(sample).__name__}"
            )
        if "input_ids" not in sample:
            raise ValueError(
                f"samples[{at}] must have input_ids, got only "
                f"{', '.join(map(repr, sample)) or 'an empty mapping'}"
            )
    raise ValueError("samples must have input_ids")


def first_tokens(tokens: Tokens, lengths: NDArray[np.int64]) -> Tokens:
    """Return a copy of the first tokens of each sequence.

    ``lengths`` is ``(num_sequences,)``, at most the lengths of the sequences.
    """
    counts = np.stack([lengths, tokens.lengths - lengths], axis=1).ravel()
    mask = np.repeat(np.tile([True, False], len(lengths)), counts)
    return Tokens(tokens.values[mask], offsets_of(lengths))


def raw_lengths_of(given: Any) -> NDArray[np.int64]:
    """Return a copy of ``raw_lengths`` as ``(n, 2)``. Targets of ``(n,)`` lengths have length 0.

    Raises:
        TypeError: if the lengths are not integers.
        ValueError: if a source is below 1 or a target below 0, or the shape is another.
    """
    lengths = as_integers(given, "raw_lengths")
    if not lengths.size:
        return np.zeros((0, 2), np.int64)
    if lengths.ndim == 0 or lengths.shape[1:] not in ((), (2,)):
        raise ValueError(f"raw_lengths must be (n,) or (n, 2), got shape {lengths.shape}")
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
    """Return a token id of the tokenizer.

    Raises:
        ValueError: if the tokenizer has no such id.
    """
    found = getattr(tokenizer, name, None)
    if found is None:
        raise ValueError(
            f"tokenizer must have a {name}, got None from a {type(tokenizer).__name__}; "
            f"set tokenizer.{name.removesuffix('_id')}"
        )
    return as_integer(f"tokenizer.{name}", found)


def padding_side(tokenizer: Any) -> str:
    """Return the tokenizer's padding side, "left" or "right". The default is "right".

    Raises:
        ValueError: if the tokenizer has another value.
    """
    side = getattr(tokenizer, "padding_side", "right")
    if side not in ("left", "right"):
        raise ValueError(f"tokenizer.padding_side must be 'left' or 'right', got {side!r}")
    return side


def _without_trailing_ignored(labels: Tokens) -> Tokens:
    """Return the labels without the -100s at the end of each sequence."""
    valid = np.flatnonzero(labels.values != IGNORE_INDEX)
    if len(valid) == len(labels.values):
        return labels
    before = np.searchsorted(valid, labels.offsets[1:])  # valid labels before each end
    last = np.append(valid, -1)[before - 1]  # -1 if there are none, because before - 1 is then -1
    lengths = np.maximum(last + 1 - labels.offsets[:-1], 0)
    return first_tokens(labels, lengths)


def _tensor(tokens: Tokens) -> Tensor:
    values = tokens.values
    if values.dtype != np.int64 or not values.flags.writeable:  # torch warns about read-only arrays
        values = values.astype(np.int64)
    return torch.from_numpy(values)
