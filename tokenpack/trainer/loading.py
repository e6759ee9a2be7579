"""Dataset view and collate function that turn a planned list of indices into a collated batch.

The sampler's integers reach the dataset here, so a batch records which examples it contains. A
filler (``-1 - index``) is an example for a rank that has no share of a batch; see
`TokenBudgetBatchSampler`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ..checks import IGNORE_INDEX
from ..data.collators.special_tokens import EndOfSequence
from ..data.tokens import Tokens
from .microbatch import PlannedBatch

_PER_TOKEN = ("attention_mask", "token_type_ids", "position_ids", "special_tokens_mask")


class Caps(NamedTuple):
    """Maximum lengths of the source and target of each example, ``(n,)`` int64, by index."""

    source: NDArray[np.int64]
    target: NDArray[np.int64]


class PlannedDataset(Dataset[Any]):
    """A view of a map-style dataset: selected examples, optionally truncated, with their indices.

    Attributes:
        kept: ``(n,)`` int64, the dataset index of each example of the plan.
        end: finds the special tokens that truncation keeps.
    """

    def __init__(
        self,
        dataset: Any,
        kept: NDArray[np.int64],
        caps: Caps | None = None,
        end: EndOfSequence | None = None,
    ) -> None:
        self.dataset, self.kept, self.caps = dataset, kept, caps
        self.end = EndOfSequence(None) if end is None else end

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, item: int) -> tuple[int, Any]:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[int]) -> list[tuple[int, Any]]:
        """``(index, example)`` for each item. The index of a filler is ``-1 - index``."""
        indices = [int(self.kept[item if item >= 0 else -1 - item]) for item in items]
        get_many = getattr(self.dataset, "__getitems__", None)
        if get_many is not None:
            examples = list(get_many(indices))
        else:
            examples = [self.dataset[index] for index in indices]
        if self.caps is not None:
            examples = [
                _truncated(
                    example,
                    (int(self.caps.source[index]), int(self.caps.target[index])),
                    self.end,
                )
                for index, example in zip(indices, examples)
            ]
        marked = [index if item >= 0 else -1 - index for index, item in zip(indices, items)]
        return list(zip(marked, examples))


def _truncated(example: Any, caps: tuple[int, int], end: EndOfSequence) -> Any:
    """Truncate the sequences of an example to the maximum lengths of its source and target.

    The special tokens at the end are kept, and at least the last token. Labels that are as long as
    the source are cut at the same places.
    """
    source, target = caps
    ids, labels = example.get("input_ids"), example.get("labels")
    changed = {}
    real = _without_padding(example.get("attention_mask"), _length(ids))
    cut = _Cut(ids, source, real, end) if _is_sequence(ids) else None
    if cut is not None:
        changed["input_ids"] = cut(ids)
    for name in _PER_TOKEN:
        if name in example and _is_sequence(example[name]):
            changed[name] = example[name][:source]
    if target > 0 and _is_sequence(labels):
        real = _without_padding(_is_label(labels), len(labels))
        changed["labels"] = _Cut(labels, target, real, end)(labels)
    elif cut is not None and _is_sequence(labels) and len(labels) == _length(ids):
        changed["labels"] = cut(labels)
    return {**example, **changed}


def _length(value: Any) -> int:
    return len(value) if _is_sequence(value) else -1


def _is_sequence(value: Any) -> bool:
    """Whether ``value`` holds tokens, and is not a text or the class of the example."""
    if isinstance(value, (list, tuple)):
        return True
    return getattr(value, "ndim", 0) > 0


def _is_label(labels: Any) -> NDArray[np.bool_]:
    return np.asarray(labels) != IGNORE_INDEX


def _without_padding(is_real: Any, length: int) -> int:
    """The number of tokens up to the last one that is not padding."""
    if not _is_sequence(is_real) or len(is_real) != length:
        return length
    real = np.flatnonzero(np.asarray(is_real))
    return int(real[-1]) + 1 if len(real) else 0


class _Cut:
    """Where to truncate a sequence: its first tokens and the special tokens at its end stay."""

    def __init__(self, tokens: Any, max_length: int, real: int, end: EndOfSequence) -> None:
        self.front, self.tail = max_length, slice(0, 0)
        if real > max_length:
            flat = np.asarray(tokens)[:real].astype(np.int64)
            special = int(end.lengths(Tokens(flat, np.array([0, real])))[0])
            kept = min(max(special, 1), max_length)
            self.front, self.tail = max_length - kept, slice(real - kept, real)

    def __call__(self, tokens: Any) -> Any:
        front, tail = tokens[: self.front], tokens[self.tail]
        if isinstance(tokens, (list, tuple)):
            return type(tokens)([*front, *tail])
        if isinstance(tokens, np.ndarray):
            return np.concatenate([front, tail])
        return torch.cat([front, tail])


class PlannedCollator:
    """Collates the items of a `PlannedDataset` with the user's collator."""

    def __init__(self, collator: Callable[[list[Any]], Mapping[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, pairs: list[tuple[int, Any]]) -> PlannedBatch:
        """Collate ``(index, example)`` pairs.

        Raises:
            TypeError: if the collator does not return a mapping.
        """
        inputs = self.collator([example for _, example in pairs])
        if not isinstance(inputs, Mapping):
            raise TypeError(
                f"data_collator must return a mapping of tensors, got {type(inputs).__name__}"
            )
        indices = [index if index >= 0 else -1 - index for index, _ in pairs]
        repeated = [row for row, (index, _) in enumerate(pairs) if index < 0]
        return PlannedBatch(inputs, indices, repeated)
