"""From a planned list of indices to a collated batch: dataset view and collate function.

The sampler's integers reach the dataset here, so that whoever gets a batch knows which examples it
holds. A filler (``-1 - index``) is an example that a rank without a share gets, to have something
to run; see `TokenBudgetBatchSampler`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from .microbatch import PlannedBatch

_TOKENS = ("input_ids",)
_BESIDE_TOKENS = ("attention_mask", "token_type_ids", "position_ids", "special_tokens_mask")


class Caps(NamedTuple):
    """Where examples are cut: ``(n,)`` longest source and target of each, by index."""

    source: NDArray[np.int64]
    target: NDArray[np.int64]


class PlannedDataset(Dataset[Any]):
    """A map-style dataset as a plan sees it: some of its examples, maybe cut, with their indices.

    Attributes:
        kept: ``(n,)`` int64, index in the dataset of what the plan calls 0, 1, ...
    """

    def __init__(self, dataset: Any, kept: NDArray[np.int64], caps: Caps | None = None) -> None:
        self.dataset, self.kept, self.caps = dataset, kept, caps

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, item: int) -> tuple[int, Any]:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[int]) -> list[tuple[int, Any]]:
        """``(index, example)`` each; the index of a filler is ``-1 - index``."""
        indices = [int(self.kept[item if item >= 0 else -1 - item]) for item in items]
        several = getattr(self.dataset, "__getitems__", None)
        if several is not None:
            examples = list(several(indices))
        else:
            examples = [self.dataset[index] for index in indices]
        if self.caps is not None:
            examples = [self._cut(index, example) for index, example in zip(indices, examples)]
        marked = [index if item >= 0 else -1 - index for index, item in zip(indices, items)]
        return list(zip(marked, examples))

    def _cut(self, index: int, example: Any) -> Any:
        assert self.caps is not None
        source, target = int(self.caps.source[index]), int(self.caps.target[index])
        changed = {}
        for name in (*_TOKENS, *_BESIDE_TOKENS):
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
    """Of tokens, and not a text, or the class of the whole."""
    if isinstance(value, (list, tuple)):
        return True
    return getattr(value, "ndim", 0) > 0


def _cut(tokens: Any, at_most: int, *, keep_last: bool) -> Any:
    """The first tokens; if asked, the last among them the sequence's own last: an end mark."""
    if len(tokens) <= at_most:
        return tokens
    if not keep_last:
        return tokens[:at_most]
    if isinstance(tokens, (list, tuple)):
        return type(tokens)([*tokens[: at_most - 1], tokens[-1]])
    cut = tokens[:at_most].copy() if isinstance(tokens, np.ndarray) else tokens[:at_most].clone()
    cut[-1] = tokens[-1]
    return cut


class PlannedCollator:
    """Collates what `PlannedDataset` gives, by the collator that the user has."""

    def __init__(self, collator: Callable[[list[Any]], Mapping[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, pairs: list[tuple[int, Any]]) -> PlannedBatch:
        """Collate ``(index, example)`` pairs.

        Raises:
            TypeError: if the collator returns no mapping.
        """
        inputs = self.collator([example for _, example in pairs])
        if not isinstance(inputs, Mapping):
            raise TypeError(
                f"data_collator must return a mapping of tensors, got {type(inputs).__name__}"
            )
        indices = [index if index >= 0 else -1 - index for index, _ in pairs]
        repeated = [row for row, (index, _) in enumerate(pairs) if index < 0]
        return PlannedBatch(inputs, indices, repeated)
