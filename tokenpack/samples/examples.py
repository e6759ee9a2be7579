"""Make training examples for each family from texts, and padded batches from examples.

    T5      span corruption: sentinels replace some spans of the text, and the spans are the target
    NLLB    the body of a text -> its summary, each after a language code
    Llama   the text itself, each token predicted from the tokens before it

If a text has a target, T5 and NLLB learn source -> target, and Llama learns the two joined by a
line break. Batches are drawn at random, as by a shuffling ``DataLoader``, and padded on the right
to their longest row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader

from ..checks import IGNORE_INDEX
from .text import Text, split_summary
from .tokenizer import BOS, EOS, PAD, SENTINELS, SOURCE_LANGUAGE, TARGET_LANGUAGE, token_id

# Span corruption as T5 was trained (Raffel et al. 2020, section 3.3): 15 % of the tokens, in spans
# of 3 on average.
_CORRUPTED_SHARE = 0.15
_MEAN_SPAN = 3.0


@dataclass(frozen=True)
class Example:
    """Token ids of one sequence. ``labels`` is None if the labels equal the input."""

    input_ids: list[int]
    labels: list[int] | None = None


@dataclass(frozen=True)
class ExampleSet:
    """Examples, with counts of truncated and unusable texts.

    Attributes:
        examples: the examples, in the order of the texts.
        cut_inputs: number of inputs truncated to the maximum length.
        cut_labels: number of labels truncated to the maximum length.
        unusable: number of texts without an example (a single sentence has no summary).
    """

    examples: list[Example]
    cut_inputs: int
    cut_labels: int
    unusable: int


def causal_examples(texts: Sequence[Text], tokenizer: Tokenizer, max_length: int) -> ExampleSet:
    """Make examples for Llama: ``<s> text </s>``, at most ``max_length`` tokens."""
    joined = [t.source if t.target is None else f"{t.source}\n{t.target}" for t in texts]
    begin, end = token_id(tokenizer, BOS), token_id(tokenizer, EOS)
    cutter = _Cutter(max_length)
    rows = [cutter.cut([begin, *ids], end) for ids in _encode(tokenizer, joined)]
    return ExampleSet([Example(row) for row in rows], cutter.count, 0, 0)


def pair_examples(
    texts: Sequence[Text], tokenizer: Tokenizer, max_length: int, max_label_length: int
) -> ExampleSet:
    """Make examples for NLLB: ``__body__ source </s>`` -> ``__summary__ target </s>``.

    `tokenpack.samples.text.split_summary` splits texts without a target. Texts that cannot be split
    are counted as unusable.
    """
    pairs = [split_summary(t.source) if t.target is None else (t.source, t.target) for t in texts]
    usable = [pair for pair in pairs if pair is not None]
    source_code = token_id(tokenizer, SOURCE_LANGUAGE)
    target_code = token_id(tokenizer, TARGET_LANGUAGE)
    end = token_id(tokenizer, EOS)
    inputs, labels = _Cutter(max_length), _Cutter(max_label_length)
    examples = [
        Example(inputs.cut([source_code, *source], end), labels.cut([target_code, *target], end))
        for source, target in zip(
            _encode(tokenizer, [source for source, _ in usable]),
            _encode(tokenizer, [target for _, target in usable]),
        )
    ]
    return ExampleSet(examples, inputs.count, labels.count, len(pairs) - len(usable))


def span_corruption_examples(
    texts: Sequence[Text], tokenizer: Tokenizer, max_length: int, max_label_length: int, seed: int
) -> ExampleSet:
    """T5: ``text with spans masked </s>`` -> ``the masked spans </s>``, or source -> target.

    Args:
        texts: with a target, they are used as pairs and nothing is masked.
        tokenizer: from :func:`tokenpack.samples.tokenizer.train_tokenizer`.
        max_length: tokens of an input at most; a text is cut to it before spans are masked.
        max_label_length: tokens of the labels at most.
        seed: of the choice of spans.
    """
    end = token_id(tokenizer, EOS)
    sentinels = [token_id(tokenizer, token) for token in SENTINELS]
    random = np.random.default_rng(seed)
    inputs, labels = _Cutter(max_length), _Cutter(max_label_length)
    examples = []
    sources = _encode(tokenizer, [text.source for text in texts])
    targets = _encode(tokenizer, [text.target or "" for text in texts])
    for text, source, target in zip(texts, sources, targets):
        source = inputs.cut(source, end)[:-1]
        if text.target is None:
            source, target = corrupt_spans(source, sentinels, random)
        examples.append(Example([*source, end], labels.cut(target, end)))
    return ExampleSet(examples, inputs.count, labels.count, 0)


def corrupt_spans(
    ids: Sequence[int], sentinels: Sequence[int], random: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Replace random spans of ``ids`` by sentinels; the target lists each sentinel and its span.

    Returns:
        ``(input, target)``. Put back in the place of their sentinels, the target's spans give
        ``ids``. The target ends with one sentinel more, as T5's does.
    """
    masked = min(max(round(len(ids) * _CORRUPTED_SHARE), 1), len(ids))
    kept = len(ids) - masked
    spans = max(min(round(masked / _MEAN_SPAN), kept, len(sentinels) - 1), 1)
    # Kept and masked stretches alternate, beginning with a kept one.
    kept_lengths = _random_parts(kept, spans, random)
    masked_lengths = _random_parts(masked, spans, random)
    corrupted: list[int] = []
    target: list[int] = []
    position = 0
    for sentinel, kept_length, masked_length in zip(sentinels, kept_lengths, masked_lengths):
        begin, end = position + kept_length, position + kept_length + masked_length
        corrupted += [*ids[position:begin], sentinel]
        target += [sentinel, *ids[begin:end]]
        position = end
    return corrupted, [*target, sentinels[spans]]


def _random_parts(total: int, parts: int, random: np.random.Generator) -> list[int]:
    """``parts`` positive integers with the sum ``total``, every such list equally likely.

    A single part may be 0: a text of one token has nothing to keep.
    """
    if parts == 1:
        return [total]
    cuts = np.sort(random.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff([0, *cuts, total]).tolist()


class _Cutter:
    """Truncates token lists to a length, end token included, and counts the truncated lists."""

    def __init__(self, max_length: int):
        self.max_length = max_length
        self.count = 0

    def cut(self, ids: list[int], end: int) -> list[int]:
        if len(ids) + 1 > self.max_length:
            self.count += 1
        return [*ids[: self.max_length - 1], end]


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


# ----------------------------------------------------------------------------------------- batches


def random_batches(
    examples: Sequence[Example], tokenizer: Tokenizer, batch_size: int, steps: int, seed: int
) -> list[dict[str, Tensor]]:
    """Draw ``steps`` padded batches as a shuffling ``DataLoader`` does, epoch after epoch.

    Args:
        examples: at least one example.
        tokenizer: the tokenizer, for the padding id.
        batch_size: number of rows in a batch. With fewer examples, each batch holds all of them.
        steps: number of batches.
        seed: seed of the order.

    Returns:
        Batches of ``input_ids`` and ``attention_mask``, ``(rows, columns)`` int64, and ``labels``,
        ``(rows, label columns)`` int64. All are padded on the right, labels with -100.

    Raises:
        ValueError: if there are no examples.
    """
    if not examples:
        raise ValueError("examples must contain at least one example, got none")
    pad = token_id(tokenizer, PAD)
    dataset: Any = list(examples)  # works as a dataset, but does not have its type
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=min(batch_size, len(examples)),
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=lambda rows: pad_batch(rows, pad),
    )
    endless: Iterator[dict[str, Tensor]] = (batch for _ in iter(int, 1) for batch in loader)
    return [next(endless) for _ in range(steps)]


def pad_batch(examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
    """Pad examples on the right to the longest. Labels are padded with -100."""
    labels = [
        example.input_ids if example.labels is None else example.labels for example in examples
    ]
    return {
        "input_ids": _pad_right([example.input_ids for example in examples], pad),
        "attention_mask": _pad_right([[1] * len(example.input_ids) for example in examples], 0),
        "labels": _pad_right(labels, IGNORE_INDEX),
    }


def _pad_right(rows: Sequence[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])
