"""Dataset view and collate function that turn a planned list of indices into a collated batch.

The sampler's integers reach the dataset here, so a batch records which examples it contains. A
filler (``-1 - index``) is an example for a rank that has no share of a batch; see
`TokenBudgetBatchSampler`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from .microbatch import PlannedBatch

_TOKENS = ("input_ids",)
_PER_TOKEN = ("attention_mask", "token_type_ids", "position_ids", "special_tokens_mask")


class Caps(NamedTuple):
    """Maximum lengths of the source and target of each example, ``(n,)`` int64, by index."""

    source: NDArray[np.int64]
    target: NDArray[np.int64]


class PlannedDataset(Dataset[Any]):
    """A view of a map-style dataset: selected examples, optionally truncated, with their indices.

    Attributes:
        kept: ``(n,)`` int64, the dataset index of each example of the plan.
    """

    def __init__(self, dataset: Any, kept: NDArray[np.int64], caps: Caps | None = None) -> None:
        self.dataset, self.kept, self.caps = dataset, kept, caps

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
                _truncated(example, int(self.caps.source[index]), int(self.caps.target[index]))
                for index, example in zip(indices, examples)
            ]
        marked = [index if item >= 0 else -1 - index for index, item in zip(indices, items)]
        return list(zip(marked, examples))


def _truncated(example: Any, source: int, target: int) -> Any:
    """Truncate the sequences of an example to the maximum lengths of its source and target."""
    changed = {}
    for name in (*_TOKENS, *_PER_TOKEN):
        if name in example and _is_sequence(example[name]):
            changed[name] = _cut(example[name], source, keep_last=name in _TOKENS)
    labels = example.get("labels")
    if target > 0 and _is_sequence(labels):
        changed["labels"] = _cut(labels, target, keep_last=True)
    elif _is_sequence(labels) and len(labels) == _length(example.get("input_ids")):
        changed["labels"] = _cut(labels, source, keep_last=True)
    return {**example, **changed}


def _length(value: Any) -> int:
    return len(value) if _is_sequence(value) else -1


def _is_sequence(value: Any) -> bool:
    """Whether ``value`` holds tokens, and is not a text or the class of the example."""
    if isinstance(value, (list, tuple)):
        return True
    return getattr(value, "ndim", 0) > 0


def _cut(tokens: Any, max_length: int, *, keep_last: bool) -> Any:
    """The first ``max_length`` tokens. ``keep_last`` replaces the last by the sequence's EOS."""
    if len(tokens) <= max_length:
        return tokens
    if not keep_last:
        return tokens[:max_length]
    if isinstance(tokens, (list, tuple)):
        return type(tokens)([*tokens[: max_length - 1], tokens[-1]])
    cut = tokens[:max_length]
    cut = cut.copy() if isinstance(tokens, np.ndarray) else cut.clone()
    cut[-1] = tokens[-1]
    return cut


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
