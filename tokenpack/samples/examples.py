"""Make training examples for each family from texts, and padded batches from examples.

    T5      span corruption: sentinels replace some spans of the text, and the spans are the target
    NLLB    the body of a text -> its summary, each after a language code
    Llama   the text itself, each token predicted from the tokens before it

If a text has a target, T5 and NLLB learn source -> target, and Llama learns the two joined by a
line break. Batches are drawn at random, as by a shuffling ``DataLoader``, and padded on the right
to their longest row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader

from ..checks import IGNORE_INDEX
from ..data import T5SpanCorruptionCollatorFast
from .text import Text, split_summary
from .tokenizer import BOS, EOS, PAD, SENTINELS, SOURCE_LANGUAGE, TARGET_LANGUAGE, token_id


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
    """Make examples for T5: ``text with masked spans </s>`` -> ``the masked spans </s>``.

    Args:
        texts: either all have a target, or none has. If all have one, they are used as source ->
            target, and nothing is masked.
        tokenizer: from `tokenpack.samples.tokenizer.train_tokenizer`.
        max_length: the largest number of tokens of an input. Texts are truncated before masking.
        max_label_length: the largest number of tokens of the labels.
        seed: seed of the choice of spans.
    """
    end = token_id(tokenizer, EOS)
    inputs, labels = _Cutter(max_length), _Cutter(max_label_length)
    encoded = _encode(tokenizer, [text.source for text in texts])
    sources = [inputs.cut(ids, end) for ids in encoded]
    targets = [text.target for text in texts if text.target is not None]
    pairs: Iterable[tuple[list[int], list[int]]]
    if len(targets) == len(texts):
        pairs = zip(sources, _encode(tokenizer, targets))
    else:
        pairs = _corrupt_spans(sources, tokenizer, seed)
    examples = [Example(source, labels.cut(target, end)) for source, target in pairs]
    return ExampleSet(examples, inputs.count, labels.count, 0)


def _corrupt_spans(
    texts: list[list[int]], tokenizer: Tokenizer, seed: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Mask 15 % of each text in spans of 3 tokens on average; yield sources and targets.

    Texts and sources end with the end token, targets do not.
    """
    ids = SimpleNamespace(
        pad_token_id=token_id(tokenizer, PAD),
        eos_token_id=token_id(tokenizer, EOS),
        padding_side="right",
    )
    sentinels = [token_id(tokenizer, token) for token in SENTINELS]
    corrupt = T5SpanCorruptionCollatorFast(ids, seed=seed, packed=True, sentinel_ids=sentinels)
    batch = corrupt([{"input_ids": text} for text in texts])
    sources = batch["input_ids"][0].split(batch["cu_seqlens"].diff().tolist())
    targets = batch["labels"][0].split(batch["decoder_cu_seqlens"].diff().tolist())
    return ((source.tolist(), target[:-1].tolist()) for source, target in zip(sources, targets))


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
