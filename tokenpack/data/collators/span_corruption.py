"""T5's span corruption, and mixtures of such denoisers: texts to pairs of source and target.

A text of L tokens, without its final EOS, is corrupted as in the original code of T5
(`random_spans_noise_mask` of google-research/text-to-text-transfer-transformer; Raffel et al. 2020,
sections 3.1.4 and 3.3.4):

    noise tokens  N = round(L * noise_density), from 1 to L - 1
    spans         k = round(N / mean_noise_span_length), at least 1, and at most L - N
    L - N and N are each split into k parts of at least one token, all partitions equally likely
    text          kept 0, noise 0, kept 1, noise 1, ... kept k-1, noise k-1
    source        kept 0 <extra_id_0> kept 1 <extra_id_1> ... <extra_id_k-1> </s>
    target        <extra_id_0> noise 0 <extra_id_1> noise 1 ... noise k-1 </s>

Halves are rounded to even. Every text ends in noise, so the target has no sentinel after the last
span. The paper's figure 2 shows one, because its text ends in kept tokens, but the original code
never produces such a text. For a text of one token, the result is that of the original code: source
``token </s>``, target ``<extra_id_0> </s>``. The bound k <= L - N is an addition: the original code
fails beyond it.

A sequential denoiser (UL2's S; Tay et al. 2022, section 3.1.2) cuts the text into two parts
without sentinels, like the prefix-LM in the code of both papers:

    source  first L - N tokens </s>             target  last N tokens </s>

UL2's table gives a density of 25 %, which is ``noise_density=0.25`` here. UL2's code draws the
position of the cut.

All work is arithmetic on the flat tokens of a batch. Concatenate the kept tokens of all texts, and
likewise their noise. Then span s of the batch begins at kept[s] and noise[s]. Up to an offset per
text, the span begins at kept[s] + noise[s] in the texts, its kept tokens go to kept[s] + s in the
sources, and its noise goes to noise[s] + s in the targets. So the collator needs three numbers per
span and one indexed copy of the tokens per side.

Random numbers are a function of (seed, epoch, tokens of the text); see `random_parts`. So the
corruption of a text in an epoch depends neither on its batch, nor on the worker, nor on the random
numbers drawn before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...checks import IGNORE_INDEX, as_integer, optional_at_least_one
from ...segments import offsets_of, ranges
from ..packed.pairs import PackedPairs
from .decoder_inputs import check_prepares_decoder_inputs, with_decoder_inputs
from .denoisers import DENSITY, MEAN, CorruptionCounts, Denoiser, Mixture, sentinel_ids_of
from .random_parts import random_part_starts, text_keys, words
from .scratch import scratch
from .seq2seq import flatten_pairs, padding_side, raw_lengths_of, required_id

# Which random words of a text are used for what.
_DRAW, _KEPT_AND_NOISE = np.array([0]), np.array([[1], [2]])

_NO_LIMIT = 2**62


class _Texts(NamedTuple):
    """Texts within the flat tokens of a batch: s is ``values[begins[s]:begins[s] + lengths[s]]``.

    Tokens between the texts (a final EOS, truncated tokens) stay in ``values``, to avoid a copy.
    """

    values: NDArray[np.int64]
    begins: NDArray[np.int64]
    lengths: NDArray[np.int64]


class _Places(NamedTuple):
    """First and last slot (exclusive) of sequences in the flattened array of ``shape``."""

    begins: NDArray[np.int64]
    ends: NDArray[np.int64]
    shape: tuple[int, int]


class T5SpanCorruptionCollatorFast:
    """A ``collate_fn`` that corrupts texts differently in every epoch, as in T5 or UL2 pretraining.

    It takes a list of samples: mappings with ``input_ids``, integers in any form, as in
    `packed_collate_fn`, with or without EOS at the end. Tokens where ``attention_mask`` is 0 are
    removed. The collator makes the ``labels``. Samples may have labels equal to ``input_ids``, as
    for language models. Other labels raise an error, because they would be lost. Other columns are
    ignored.

    A batch is that of `tokenpack.data.CappedSeq2SeqCollator`: padded rows and a field of lengths
    or, with ``packed=True``, a `tokenpack.data.PackedPairs`.

    Spans of noise move from the text to the target. A sentinel replaces each span in the source and
    precedes it in the target (Raffel et al. 2020, section 3.1.4; UL2: Tay et al. 2022).

    The corruption of a text depends only on ``seed``, the epoch and its tokens, not on batches,
    workers or ranks. Two equal texts are corrupted in the same way within an epoch. Call
    `set_epoch` before each epoch. Otherwise every epoch repeats the first one.

    Attributes:
        truncated_sources: number of texts truncated so far to fit ``max_encoder_len`` and
            ``max_decoder_len``. Each worker of a ``DataLoader`` has its own count.
    """

    def __init__(
        self,
        tokenizer: Any,
        noise_density: float = DENSITY,
        mean_noise_span_length: float = MEAN,
        pad_to_multiple_of: int | None = 8,
        length_column_name: str | None = "input_length",
        max_encoder_len: int | None = None,
        max_decoder_len: int | None = None,
        seed: int = 0,
        packed: bool = False,
        denoisers: Sequence[Denoiser] | None = None,
        sentinel_ids: Sequence[int] | None = None,
        model: Any = None,
    ) -> None:
        """Create a collator.

        Args:
            tokenizer: a transformers tokenizer, or an object with ``pad_token_id``,
                ``eos_token_id``, ``padding_side`` and ``get_vocab()``.
            noise_density: the fraction of the tokens that become noise.
            mean_noise_span_length: the mean number of tokens per span.
            pad_to_multiple_of: round the number of columns up to a multiple of this. None means no
                rounding.
            length_column_name: name of the field of source lengths. None omits it.
            max_encoder_len: the maximum number of tokens of a source, including prefix, sentinels
                and EOS. A text that does not fit is truncated at its end as little as possible.
                None means no limit.
            max_decoder_len: the same for a target.
            seed: the seed of all random numbers.
            packed: return a `tokenpack.data.PackedPairs` instead of padded rows.
            denoisers: a mixture, instead of the two numbers above. Each text draws one denoiser by
                weight.
            sentinel_ids: ids of the sentinels in the order of their use. By default, those of
                ``<extra_id_0>``, ``<extra_id_1>``, ... in the vocabulary, or of the same strings
                after SentencePiece's "▁", as in mT5. In T5 these ids descend. For a
                `ByT5Tokenizer`, they are 258, 257, ..., 159, as in ByT5's pretraining: its
                ``<extra_id_0>`` is 259, which the released models have never seen.
            model: adds ``decoder_input_ids``, as in `CappedSeq2SeqCollator`.

        Raises:
            TypeError: if a number is not an integer but must be.
            ValueError: if a number is out of range, the tokenizer lacks an id, a limit is too small
                for any text, or ``denoisers`` is combined with one of the two numbers.
        """
        if denoisers is None:
            denoisers = [Denoiser(noise_density, mean_noise_span_length)]
        elif (noise_density, mean_noise_span_length) != (DENSITY, MEAN):
            raise ValueError(
                "noise_density and mean_noise_span_length must be set in each Denoiser if "
                f"denoisers is given, got {noise_density} and {mean_noise_span_length}"
            )
        elif not denoisers:
            raise ValueError("denoisers must hold at least one Denoiser, got none")
        self.tokenizer = tokenizer
        self.pad_to_multiple_of = optional_at_least_one("pad_to_multiple_of", pad_to_multiple_of)
        self.length_column_name = length_column_name
        self.max_encoder_len = optional_at_least_one("max_encoder_len", max_encoder_len)
        self.max_decoder_len = optional_at_least_one("max_decoder_len", max_decoder_len)
        self.seed = as_integer("seed", seed)
        self.packed = packed
        self.model = check_prepares_decoder_inputs(model)
        self.truncated_sources = 0
        for name in ("pad_token_id", "eos_token_id"):  # fail here, not in the first batch
            required_id(tokenizer, name)
        padding_side(tokenizer)
        self._sentinels = sentinel_ids_of(tokenizer, sentinel_ids)
        self._mixture = Mixture(denoisers, tokenizer)
        self._limits = np.array([self._longest_text(at) for at in range(len(denoisers))])
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def denoisers(self) -> tuple[Denoiser, ...]:
        """The denoisers of the mixture. There is one if the mixture was not given."""
        return self._mixture.denoisers

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, in this process and in all workers that already run.

        Raises:
            TypeError: if ``epoch`` is not an integer.
        """
        self._epoch.fill_(as_integer("epoch", epoch))

    def lengths(self, raw_lengths: Any, with_eos: bool = True) -> NDArray[np.int64]:
        """Return the lengths that texts will have as sources and targets, to plan batches.

        Args:
            raw_lengths: ``(n,)`` integers of 1 or more in any form, as in `pack_lengths`, the
                tokens of the texts. Or ``(n, 2)``, whose second column is ignored, because the
                collator makes the targets.
            with_eos: whether the lengths include a final EOS, as in ids from a tokenizer. False is
                exact for texts without EOS, and an upper bound if only some texts have one. A
                length of 1 always means a text of one token, because EOS is not a text.

        Returns:
            ``(n, 2)``: tokens of the source and of the target. They are exact with one denoiser.
            With several, each is the maximum over the denoisers and so an upper bound, because the
            denoiser of a text depends on its tokens and the epoch.

        Raises:
            TypeError: if the lengths are not integers.
            ValueError: if a length is below 1.
        """
        texts = raw_lengths_of(raw_lengths)[:, 0]
        if with_eos:
            texts = np.maximum(texts - 1, 1)
        both = np.zeros((len(texts), 2), np.int64)
        for drawn, limit in enumerate(self._limits):
            counts = self._mixture.counts(np.minimum(texts, limit), np.full(len(texts), drawn))
            lengths = np.stack([counts.source_lengths, counts.target_lengths], axis=1)
            np.maximum(both, lengths, out=both)
        return both

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor] | PackedPairs:
        """Corrupt ``samples`` and collate them.

        Raises:
            TypeError: if a sample or one of its fields has a type that cannot be collated.
            ValueError: if a sample has no token except EOS, has labels that differ from its ids, or
                needs more sentinels than the tokenizer has.
        """
        texts = self._texts(samples)
        keys = text_keys(*texts, self.seed, int(self._epoch))
        drawn = self._mixture.draw(keys, _DRAW)
        texts = self._truncate(texts, drawn)
        counts = self._mixture.counts(texts.lengths, drawn)
        self._require_sentinels(texts, drawn, counts)
        if self.packed:
            places = _concatenated(counts.source_lengths), _concatenated(counts.target_lengths)
            pairs = _pack(*self._corrupt(texts, keys, drawn, counts, *places), *places)
            return with_decoder_inputs(pairs, self.model)
        left = padding_side(self.tokenizer) == "left"
        places = (
            _in_rows(counts.source_lengths, self.pad_to_multiple_of, left),
            _in_rows(counts.target_lengths, self.pad_to_multiple_of),
        )
        ids, labels = self._corrupt(texts, keys, drawn, counts, *places)
        mask = _mask(places[0])
        np.copyto(ids, required_id(self.tokenizer, "pad_token_id"), where=~mask)
        np.copyto(labels, IGNORE_INDEX, where=~_mask(places[1]))
        batch = {"input_ids": ids, "attention_mask": mask.astype(np.int64), "labels": labels}
        if self.length_column_name is not None:
            batch[self.length_column_name] = counts.source_lengths
        tensors = {name: torch.from_numpy(values) for name, values in batch.items()}
        return with_decoder_inputs(tensors, self.model)

    def _texts(self, samples: Sequence[Mapping[str, Any]]) -> _Texts:
        """Return the texts of samples, without a final EOS."""
        (values, offsets), labels = flatten_pairs(samples)
        if labels is not None and not (
            np.array_equal(labels.values, values) and np.array_equal(labels.offsets, offsets)
        ):
            raise ValueError(
                "labels of samples must be absent or equal to input_ids, because this collator "
                "makes labels, got others; remove the column or use CappedSeq2SeqCollator"
            )
        ended = values[offsets[1:] - 1] == required_id(self.tokenizer, "eos_token_id")
        lengths = np.diff(offsets) - ended
        if not lengths.all():
            raise ValueError(
                f"input_ids of samples[{lengths.argmin()}] must hold a token besides EOS, got none"
            )
        return _Texts(values.astype(np.int64, copy=False), offsets[:-1], lengths)

    def _truncate(self, texts: _Texts, drawn: NDArray[np.int64]) -> _Texts:
        """Return the texts, truncated to fit the limits with the denoisers drawn for them."""
        limits = self._limits[drawn]
        self.truncated_sources += int((texts.lengths > limits).sum())
        return texts._replace(lengths=np.minimum(texts.lengths, limits))

    def _corrupt(
        self,
        texts: _Texts,
        keys: NDArray[np.uint64],
        drawn: NDArray[np.int64],
        counts: CorruptionCounts,
        source_places: _Places,
        target_places: _Places,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return arrays of sources and targets at their places, undefined at padding."""

        def spread(of_texts: NDArray[np.int64]) -> NDArray[np.int64]:
            return np.repeat(of_texts, counts.spans)  # from texts to their spans

        kept, noise = _random_spans(keys, counts)
        first = offsets_of(counts.spans)[:-1]  # each text's first span
        numbers = np.arange(len(kept)) - spread(first)  # number of each span within its text
        kept_widths = np.ediff1d(kept, counts.kept.sum() - kept[-1])
        origins = kept + noise + spread(texts.begins - kept[first] - noise[first])
        sentinels = self._sentinels.take(numbers)
        eos = required_id(self.tokenizer, "eos_token_id")

        # A span without a sentinel writes one to a slot that EOS or padding overwrites.
        slots = kept + numbers + spread(source_places.begins + counts.prefix - kept[first])
        sources = _copy(texts.values, origins, slots, source_places.shape)
        flat = sources.reshape(-1)
        flat[slots + kept_widths] = sentinels
        flat[source_places.ends - 1] = eos
        if len((prefixes := self._mixture.prefixes).values):
            ids = prefixes.values[ranges(prefixes.offsets[drawn], counts.prefix)]
            flat[ranges(source_places.begins, counts.prefix)] = ids

        has_sentinels = counts.sentinels > 0
        slots = noise + numbers + spread(target_places.begins + has_sentinels - noise[first])
        targets = _copy(texts.values, origins + kept_widths, slots, target_places.shape)
        flat = targets.reshape(-1)
        flat[slots - 1] = sentinels
        flat[target_places.ends - 1] = eos
        return sources, targets

    def _longest_text(self, denoiser: int) -> int:
        """Return the length of the longest text that fits, or `_NO_LIMIT` if there is no limit."""
        limits = (self.max_encoder_len, self.max_decoder_len)
        if limits == (None, None):
            return _NO_LIMIT
        source, target = (_NO_LIMIT if limit is None else limit for limit in limits)
        longest = self._mixture.longest(
            denoiser,
            lambda counts: (counts.source_lengths <= source) & (counts.target_lengths <= target),
        )
        if not longest:
            raise ValueError(
                "max_encoder_len and max_decoder_len must leave room for a text of two tokens, got "
                f"{limits[0]} and {limits[1]} with {self.denoisers[denoiser]}"
            )
        return longest

    def _require_sentinels(
        self, texts: _Texts, drawn: NDArray[np.int64], counts: CorruptionCounts
    ) -> None:
        available = len(self._sentinels)
        if (spans := int(counts.sentinels.max())) <= available:
            return
        at = int(counts.sentinels.argmax())
        longest = self._mixture.longest(drawn[at], lambda counts: counts.sentinels <= available)
        fits = self._mixture.counts(np.array([longest]), drawn[at : at + 1])
        raise ValueError(
            f"input_ids of samples[{at}] must have at most {available} spans, because there are "
            f"{available} sentinels, got {texts.lengths[at]} tokens and {spans} spans with "
            f"{self.denoisers[drawn[at]]}; max_encoder_len={fits.source_lengths[0]} truncates "
            "texts to what fits"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickle, with the epoch in shared memory of its own.

        In a pickle for a new worker, the epoch is already in memory shared with this process. Then
        `share_memory_` has no effect.
        """
        self.__dict__.update(state)
        self._epoch.share_memory_()


def _random_spans(keys: NDArray[np.uint64], counts: CorruptionCounts) -> NDArray[np.int64]:
    """Return where the kept tokens and the noise of each span begin, ``(2, num_spans)``.

    Both are offsets into the kept tokens of all texts, followed by the noise of all texts. A text
    without noise counts as one noise token.
    """
    starts = random_part_starts(
        words(keys, _KEPT_AND_NOISE).ravel(),
        np.concatenate([counts.kept, np.maximum(counts.noise, 1)]),
        np.concatenate([counts.spans, counts.spans]),
    )
    return starts.reshape(2, -1)


def _copy(
    values: NDArray[np.int64],
    origins: NDArray[np.int64],
    slots: NDArray[np.int64],
    shape: tuple[int, int],
) -> NDArray[np.int64]:
    """Return an array of ``shape`` with the values from ``origins[i]`` on, at ``slots[i]`` on.

    Each piece continues up to the slot of the next one, so the slots of sentinels, EOS and padding
    get arbitrary values. The caller overwrites them. The index into the values has steps of 1 and a
    jump at each piece. A cumulative sum of the steps takes half the time of `np.repeat` over the
    pieces, whose unpredictable lengths cause branch mispredictions.
    """
    index = scratch(shape[0] * shape[1])
    index.fill(1)
    index[slots] = 1 + np.ediff1d(origins - slots, to_begin=origins[0] - slots[0] - 1)
    np.cumsum(index, out=index)
    return values.take(index, mode="clip").reshape(shape)


def _concatenated(lengths: NDArray[np.int64]) -> _Places:
    offsets = offsets_of(lengths)
    return _Places(offsets[:-1], offsets[1:], (1, int(offsets[-1])))


def _in_rows(lengths: NDArray[np.int64], multiple: int | None, left: bool = False) -> _Places:
    step = multiple or 1
    columns = -(-int(lengths.max()) // step) * step
    begins = np.arange(len(lengths)) * columns
    if left:
        begins += columns - lengths
    return _Places(begins, begins + lengths, (len(lengths), columns))


def _mask(places: _Places) -> NDArray[np.bool_]:
    """Return a bool array of the places' shape, True at tokens and False at padding."""
    edges = np.stack([places.begins, places.ends], axis=1).ravel()
    size = places.shape[0] * places.shape[1]
    counts = np.ediff1d(edges, to_begin=edges[0], to_end=size - edges[-1])  # padding, tokens, ...
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(places.shape)


def _pack(
    ids: NDArray[np.int64], labels: NDArray[np.int64], sources: _Places, targets: _Places
) -> PackedPairs:
    fields: dict[str, Any] = {}
    for prefix, name, tokens, places in (
        ("", "input_ids", ids, sources),
        ("decoder_", "labels", labels, targets),
    ):
        cu_seqlens = np.append(places.begins, places.shape[1]).astype(np.int32)
        fields[name] = torch.from_numpy(tokens)
        fields[f"{prefix}cu_seqlens"] = torch.from_numpy(cu_seqlens)
        fields[f"{prefix}max_seqlen"] = int((places.ends - places.begins).max())
    return PackedPairs(fields)
