"""Reading one part of a source of samples, from a position that can be saved and restored.

A source is split into ``world_size * num_workers`` parts. Part p has the samples p, p + parts,
p + 2 * parts, ... A `datasets.IterableDataset` does the split itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from itertools import islice
from typing import Any


class PartReader:
    """An iterator over every ``parts``-th sample of a source, starting at sample ``part``."""

    def __init__(self, source: Iterable[Any], part: int, parts: int) -> None:
        self._source, self._parts, self._next = source, parts, part
        self._samples: Iterator[Any] | None = None

    def tell(self) -> Any:
        """Return the position of the next sample."""
        return self._next

    def seek(self, position: Any) -> None:
        """Continue from a position that `tell` returned; None keeps the current position."""
        self._next = self._next if position is None else position
        self._samples = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._samples is None:
            self._samples = islice(iter(self._source), self._next, None, self._parts)
        sample = next(self._samples)
        self._next += self._parts
        return sample


class IndexReader(PartReader):
    """A `PartReader` of a sequence, which does not read the samples before its position."""

    def __next__(self) -> Any:
        if self._next >= len(self._source):  # type: ignore[arg-type]
            raise StopIteration
        sample = self._source[self._next]  # type: ignore[index]
        self._next += self._parts
        return sample


class DatasetReader(PartReader):
    """A reader of a `datasets.IterableDataset`, which gives each worker its own samples.

    The position is the dataset's own state. That state does not include the samples in a shuffle
    buffer, so the position of a dataset with such a buffer is the number of samples read. To
    resume, the reader then reads them again.
    """

    def __init__(self, source: Any, epoch: int | None) -> None:
        self._dataset = source
        if epoch is not None:
            source.set_epoch(epoch)
        self._samples = None
        self._start: Any = {"epoch": source.epoch, "taken": 0}
        self._taken = 0
        self._counts = _has_shuffle_buffer(getattr(source, "_ex_iterable", None))

    def tell(self) -> Any:
        if self._samples is None:
            return self._start
        state = self._dataset.state_dict()
        return {"epoch": state["epoch"], "taken": self._taken} if self._counts else state

    def seek(self, position: Any) -> None:
        if position is None:
            return
        self._start = position
        self._dataset.set_epoch(position["epoch"])  # it ignores a state of another epoch
        if "taken" not in position:
            self._dataset.load_state_dict(position)
        for _ in islice(self, position.get("taken", 0)):
            pass

    def __next__(self) -> Any:
        if self._samples is None:
            self._samples = iter(self._dataset)
        sample = next(self._samples)
        self._taken += 1
        return sample


def read_part(
    source: Iterable[Any], epoch: int | None, rank: int, world_size: int, part: int, parts: int
) -> PartReader:
    """Return a reader of the samples of a rank's worker, ``part`` of ``parts``."""
    datasets = sys.modules.get("datasets")  # it is imported if the source is one of its datasets
    if datasets is not None and isinstance(source, datasets.IterableDataset):
        if world_size > 1:
            from datasets.distributed import split_dataset_by_node

            source = split_dataset_by_node(source, rank, world_size)
        # A deep copy, because shallow copies share the state that was loaded.
        return DatasetReader(deepcopy(source), epoch)
    if epoch is not None and hasattr(source, "set_epoch"):
        source.set_epoch(epoch)
    by_index = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    reader = IndexReader if by_index and not isinstance(source, Mapping) else PartReader
    return reader(source, rank * parts + part, world_size * parts)


def _has_shuffle_buffer(step: Any) -> bool:
    """Return whether a step of a dataset, or one before it, shuffles in a buffer.

    `datasets` has no public attribute for this, so the class names decide. For an unknown dataset
    the answer is True: counting samples is slow but always correct.
    """
    if step is None or "BufferShuffled" in type(step).__name__:
        return True
    attributes = [each for value in vars(step).values() for each in _as_list(value)]
    return any(_has_shuffle_buffer(each) for each in attributes if _is_step(each))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_step(value: Any) -> bool:
    return type(value).__name__.endswith("ExamplesIterable")
