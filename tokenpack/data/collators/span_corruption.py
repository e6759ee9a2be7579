"""T5's span corruption, and mixtures of such denoisers: token lists to pairs to learn from.

Of a text of L tokens (its final EOS set aside), as the original code of T5 has it
(`random_spans_noise_mask` of google-research/text-to-text-transfer-transformer; Raffel et al. 2020,
sections 3.1.4 and 3.3.4):

    noise tokens  N = round(L * noise_density), from 1 to L - 1
    spans         k = round(N / mean_noise_span_length), at least 1, and at most L - N
    L - N and N fall into k parts of one token or more, every way to do so equally likely
    text          kept 0, noise 0, kept 1, noise 1, ... kept k-1, noise k-1
    source        kept 0 <extra_id_0> kept 1 <extra_id_1> ... <extra_id_k-1> </s>
    target        <extra_id_0> noise 0 <extra_id_1> noise 1 ... noise k-1 </s>

Halves are rounded to even. Since a text ends in noise, no sentinel stands behind the last span: the
paper's figure 2 has one there because its text ends in kept tokens, which the original code never
lets happen. A text of one token has nothing to lose, and the original code's way with it is kept:
source ``token </s>``, target ``<extra_id_0> </s>``. The bound k <= L - N is ours: beyond it the
original code fails.

A sequential denoiser (UL2's S; Tay et al. 2022, section 3.1.2) cuts the text in two instead,

    source  first L - N tokens </s>             target  last N tokens </s>

with no sentinels, as the prefix-LM of both papers' code. UL2's table gives a share of 25 %, which
is what this does with ``noise_density=0.25``, where their code draws the place of the cut.

Everything is arithmetic on the flat tokens of a batch. With the kept tokens of all texts side by
side, and their noise too, span s of the batch begins at kept[s] and noise[s]. So, but for a number
for each text, it is found at kept[s] + noise[s], goes to kept[s] + s in the sources, and its noise
to noise[s] + s in the targets. Three numbers a span, then, and one copy of the tokens by an index.

Randomness is a function of (seed, epoch, tokens of the text), see `random_parts`. So what becomes
of a text in an epoch depends neither on the batch it is in, nor on the worker, nor on how many
numbers anyone drew before.
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
from .denoisers import DENSITY, MEAN, Denoiser, Mixture, Shape, sentinel_ids_of
from .random_parts import random_part_starts, text_keys, words
from .scratch import scratch
from .seq2seq import flatten_pairs, padding_side, raw_lengths_of, required_id

__all__ = ["Denoiser", "T5SpanCorruptionCollatorFast"]

# What the words of a text are for.
_DRAW, _KEPT_AND_NOISE = np.array([0]), np.array([[1], [2]])

_NO_LIMIT = 2**62


class _Texts(NamedTuple):
    """Texts within the flat tokens of a batch: s is ``values[begins[s]:begins[s] + lengths[s]]``.

    What lies between them (a final EOS, what was cut) stays where it is, and nothing is copied.
    """

    values: NDArray[np.int64]
    begins: NDArray[np.int64]
    lengths: NDArray[np.int64]


class _Places(NamedTuple):
    """Where sequences stand in an array of ``shape``, slots counted on from row to row."""

    begins: NDArray[np.int64]
    ends: NDArray[np.int64]
    shape: tuple[int, int]


class T5SpanCorruptionCollatorFast:
    """A ``collate_fn`` that corrupts texts anew in every epoch: T5's pretraining, or UL2's.

    It takes a list of samples: mappings with ``input_ids``, lists of ints, one-dimensional NumPy
    arrays or CPU tensors, with or without EOS at the end. Tokens under a 0 of ``attention_mask``
    are left out. ``labels`` are made here: samples may have those that language models are given,
    equal to ``input_ids``, and any others raise, as they would be lost. Other columns are left
    alone.

    What it gives is what `tokenpack.data.CappedSeq2SeqCollator` gives: padded rows with a column of
    lengths or, with ``packed=True``, `tokenpack.data.PackedPairs` that were never padded. The
    corruption itself is described at the top of this file.

    What becomes of a text follows from ``seed``, the epoch and its tokens alone. So batches,
    workers and ranks do not matter, and two equal texts are corrupted alike within an epoch. Call
    `set_epoch` before each epoch, or every epoch repeats the first.

    Attributes:
        truncated_sources: texts cut so far to fit ``max_encoder_len`` and ``max_decoder_len``, in
            this process: each worker of a ``DataLoader`` counts its own.
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
    ) -> None:
        """Corrupt for a tokenizer's models.

        Args:
            tokenizer: a transformers tokenizer, or anything with ``pad_token_id``,
                ``eos_token_id``, ``padding_side`` and ``get_vocab()``.
            noise_density: share of the tokens that become noise.
            mean_noise_span_length: tokens of a span, on average.
            pad_to_multiple_of: columns are a multiple of it; None is no rounding.
            length_column_name: name of the column of lengths of sources; None is no such column.
            max_encoder_len: tokens of a source at most, prefix, sentinels and EOS among them. A
                text is cut at its end to the longest that fits; None is no limit.
            max_decoder_len: the same of a target.
            seed: of all randomness.
            packed: give `tokenpack.data.PackedPairs` in place of padded rows.
            denoisers: a mixture in place of the two numbers above. Each text draws one by weight.
            sentinel_ids: ids of the sentinels in the order of their use; by default those of
                ``<extra_id_0>``, ``<extra_id_1>``, ... in the vocabulary, or of the same after
                SentencePiece's "▁", which is how mT5 has them. T5's descend.

        Raises:
            TypeError: if a number is no integer where it must be.
            ValueError: if a number is out of its range, the tokenizer lacks an id, a limit leaves
                no room, or both ``denoisers`` and numbers for one are given.
        """
        if denoisers is None:
            denoisers = [Denoiser(noise_density, mean_noise_span_length)]
        elif (noise_density, mean_noise_span_length) != (DENSITY, MEAN):
            raise ValueError(
                "noise_density and mean_noise_span_length must be given in denoisers where there "
                f"are any, got {noise_density} and {mean_noise_span_length} beside them"
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
        self.truncated_sources = 0
        for name in ("pad_token_id", "eos_token_id"):  # now, and not in the first batch
            required_id(tokenizer, name)
        padding_side(tokenizer)
        self._sentinels = sentinel_ids_of(tokenizer, sentinel_ids)
        self._mixture = Mixture(denoisers, tokenizer)
        self._limits = np.array([self._longest_text(at) for at in range(len(denoisers))])
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def denoisers(self) -> tuple[Denoiser, ...]:
        """The mixture: one, if it is none."""
        return self._mixture.denoisers

    def set_epoch(self, epoch: int) -> None:
        """Corrupt as in ``epoch`` from now on, here and in all workers that already run.

        Raises:
            TypeError: if it is no integer.
        """
        self._epoch.fill_(as_integer("epoch", epoch))

    def lengths(self, raw_lengths: Any, with_eos: bool = True) -> NDArray[np.int64]:
        """What texts of so many tokens will be as sources and targets, to plan batches by.

        Args:
            raw_lengths: ``(n,)`` integers from 1 on, tokens of the texts, or ``(n, 2)``, of which
                the second column is ignored: targets are made here.
            with_eos: whether these count a final EOS, as ids from a tokenizer have it. False is
                exact for ids without, and an upper bound where only some have one. A length of 1
                is that of a text without either way, as EOS alone is no text.

        Returns:
            ``(n, 2)``: tokens of the source and of the target, exact with one denoiser. With more,
            the largest that any of them may give: an upper bound of each, since which is drawn
            depends on the text and the epoch.

        Raises:
            TypeError: if they are no integers.
            ValueError: if one is below 1.
        """
        texts = raw_lengths_of(raw_lengths)[:, 0]
        if with_eos:
            texts = np.maximum(texts - 1, 1)
        both = np.zeros((len(texts), 2), np.int64)
        for drawn, limit in enumerate(self._limits):
            shape = self._mixture.shape(np.minimum(texts, limit), np.full(len(texts), drawn))
            lengths = np.stack([shape.source_lengths, shape.target_lengths], axis=1)
            np.maximum(both, lengths, out=both)
        return both

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor] | PackedPairs:
        """Corrupt ``samples`` and collate them.

        Raises:
            TypeError: if a sample, or a field of it, is nothing that can be collated.
            ValueError: if there is none, one holds no token besides EOS, has labels of its own, or
                needs more sentinels than there are.
        """
        texts = self._take(samples)
        keys = text_keys(*texts, self.seed, int(self._epoch))
        drawn = self._mixture.draw(keys, _DRAW)
        texts = self._cut(texts, drawn)
        shape = self._mixture.shape(texts.lengths, drawn)
        self._require_sentinels(texts, drawn, shape)
        if self.packed:
            places = _side_by_side(shape.source_lengths), _side_by_side(shape.target_lengths)
            return _pack(*self._corrupt(texts, keys, drawn, shape, *places), *places)
        left = padding_side(self.tokenizer) == "left"
        places = (
            _in_rows(shape.source_lengths, self.pad_to_multiple_of, left),
            _in_rows(shape.target_lengths, self.pad_to_multiple_of),
        )
        ids, labels = self._corrupt(texts, keys, drawn, shape, *places)
        mask = _mask(places[0])
        np.copyto(ids, required_id(self.tokenizer, "pad_token_id"), where=~mask)
        np.copyto(labels, IGNORE_INDEX, where=~_mask(places[1]))
        batch = {"input_ids": ids, "attention_mask": mask.astype(np.int64), "labels": labels}
        if self.length_column_name is not None:
            batch[self.length_column_name] = shape.source_lengths
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def _take(self, samples: Sequence[Mapping[str, Any]]) -> _Texts:
        """The texts of samples, without the EOS that they end in."""
        (values, offsets), labels = flatten_pairs(samples)
        if labels is not None and not (
            np.array_equal(labels.values, values) and np.array_equal(labels.offsets, offsets)
        ):
            raise ValueError(
                "labels of samples must be absent or equal to input_ids, as they are made here, "
                "got others (leave that column out, or use CappedSeq2SeqCollator)"
            )
        ended = values[offsets[1:] - 1] == required_id(self.tokenizer, "eos_token_id")
        lengths = np.diff(offsets) - ended
        if not lengths.all():
            raise ValueError(
                f"input_ids of samples[{lengths.argmin()}] must hold a token besides EOS, got none"
            )
        return _Texts(values.astype(np.int64, copy=False), offsets[:-1], lengths)

    def _cut(self, texts: _Texts, drawn: NDArray[np.int64]) -> _Texts:
        """Texts up to where they fit the limits with the denoisers drawn for them."""
        limits = self._limits[drawn]
        self.truncated_sources += int((texts.lengths > limits).sum())
        return texts._replace(lengths=np.minimum(texts.lengths, limits))

    def _corrupt(
        self,
        texts: _Texts,
        keys: NDArray[np.uint64],
        drawn: NDArray[np.int64],
        shape: Shape,
        source_places: _Places,
        target_places: _Places,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sources and targets of the places' shapes, with anything where there is padding."""

        def spread(of_texts: NDArray[np.int64]) -> NDArray[np.int64]:
            return np.repeat(of_texts, shape.spans)  # to each text's spans

        kept, noise = _random_spans(keys, shape)
        first = offsets_of(shape.spans)[:-1]
        numbers = np.arange(len(kept)) - spread(first)  # of each span in its text
        kept_widths = np.ediff1d(kept, shape.kept.sum() - kept[-1])
        origins = kept + noise + spread(texts.begins - kept[first] - noise[first])
        sentinels = self._sentinels.take(numbers)
        eos = required_id(self.tokenizer, "eos_token_id")

        # A span without a sentinel puts one where EOS or padding will be.
        slots = kept + numbers + spread(source_places.begins + shape.prefix - kept[first])
        sources = _copy(texts.values, origins, slots, source_places.shape)
        flat = sources.reshape(-1)
        flat[slots + kept_widths] = sentinels
        flat[source_places.ends - 1] = eos
        if len((prefixes := self._mixture.prefixes).values):
            ids = prefixes.values[ranges(prefixes.offsets[drawn], shape.prefix)]
            flat[ranges(source_places.begins, shape.prefix)] = ids

        marked = shape.marks > 0
        slots = noise + numbers + spread(target_places.begins + marked - noise[first])
        targets = _copy(texts.values, origins + kept_widths, slots, target_places.shape)
        flat = targets.reshape(-1)
        flat[slots - 1] = sentinels
        flat[target_places.ends - 1] = eos
        return sources, targets

    def _longest_text(self, denoiser: int) -> int:
        """Tokens of the longest text that needs no cut, `_NO_LIMIT` where no limit is set."""
        limits = (self.max_encoder_len, self.max_decoder_len)
        if limits == (None, None):
            return _NO_LIMIT
        source, target = (_NO_LIMIT if limit is None else limit for limit in limits)
        longest = self._mixture.longest(
            denoiser,
            lambda shape: (shape.source_lengths <= source) & (shape.target_lengths <= target),
        )
        if not longest:
            raise ValueError(
                "max_encoder_len and max_decoder_len must leave room for a text of two tokens, got "
                f"{limits[0]} and {limits[1]} with {self.denoisers[denoiser]}"
            )
        return longest

    def _require_sentinels(self, texts: _Texts, drawn: NDArray[np.int64], shape: Shape) -> None:
        there_are = len(self._sentinels)
        if (spans := int(shape.marks.max())) <= there_are:
            return
        at = int(shape.marks.argmax())
        longest = self._mixture.longest(drawn[at], lambda shape: shape.marks <= there_are)
        fits = self._mixture.shape(np.array([longest]), drawn[at : at + 1])
        raise ValueError(
            f"input_ids of samples[{at}] must fall into at most {there_are} spans, as the "
            f"tokenizer has so many sentinels, got {texts.lengths[at]} tokens and {spans} spans by "
            f"{self.denoisers[drawn[at]]} (max_encoder_len={fits.source_lengths[0]} cuts texts to "
            "what fits)"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a pickle: the epoch in memory that workers share, as it was before.

        One that a worker is started with has it there already, and then this does nothing.
        """
        self.__dict__.update(state)
        self._epoch.share_memory_()


def _random_spans(keys: NDArray[np.uint64], shape: Shape) -> NDArray[np.int64]:
    """``(2, num_spans)``: where the kept part of each span of the batch begins, and its noise.

    Counted with the kept tokens of all texts side by side, and behind them all the noise; a text
    without noise counts as one token of it.
    """
    starts = random_part_starts(
        words(keys, _KEPT_AND_NOISE).ravel(),
        np.concatenate([shape.kept, np.maximum(shape.noise, 1)]),
        np.concatenate([shape.spans, shape.spans]),
    )
    return starts.reshape(2, -1)


def _copy(
    values: NDArray[np.int64],
    origins: NDArray[np.int64],
    slots: NDArray[np.int64],
    shape: tuple[int, int],
) -> NDArray[np.int64]:
    """An array of ``shape`` that holds the values from ``origins[i]`` on from ``slots[i]`` on.

    Each such piece goes on up to the next one's slot, over places of sentinels, EOS and padding:
    they hold what happens to come, and are to be overwritten. The index of the values takes steps
    of 1 with a jump at each piece. To sum up the steps takes half as long as to repeat a number for
    each piece, whose lengths the processor cannot foresee.
    """
    index = scratch(shape[0] * shape[1])
    index.fill(1)
    index[slots] = 1 + np.ediff1d(origins - slots, to_begin=origins[0] - slots[0] - 1)
    np.cumsum(index, out=index)
    return values.take(index, mode="clip").reshape(shape)


def _side_by_side(lengths: NDArray[np.int64]) -> _Places:
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
    """Of the places' shape, False at padding."""
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
