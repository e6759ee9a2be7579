"""Reading one part of a source of samples, from a position that can be saved and restored.

A source is split into ``world_size * num_workers`` parts. Part p has the samples p, p + parts,
p + 2 * parts, ... A `datasets.IterableDataset`, and a source that asks for its worker, share their
samples among the workers themselves; then a part is split over the ranks only.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset

from ...packing.columns import as_arrow, column_of, holds_arrow, is_arrow, table_columns
from .worker_watch import WorkerWatch

SHARDED_BY = ("auto", "stream", "source")
_EXPECTED = "a dataset or another iterable of samples"


class Share(NamedTuple):
    """Which samples a reader reads: those of a rank, and of one of its workers."""

    rank: int = 0
    world_size: int = 1
    worker: int = 0
    num_workers: int = 1


class PartReader:
    """An iterator over every n-th sample of a source.

    Attributes:
        taken: the number of samples read since the start of the pass.
    """

    def __init__(self, source: Iterable[Any], share: Share, sharded_by: str) -> None:
        self._source, self._share, self._sharded_by = source, share, sharded_by
        self._samples: Iterator[Any] | None = None
        self._watch = WorkerWatch()
        self.taken = 0

    def tell(self) -> Any:
        """Return the position of the next sample."""
        return self.taken

    def seek(self, position: Any) -> None:
        """Continue from a position that `tell` returned; None keeps the current position."""
        self.taken = self.taken if position is None else position
        self._samples = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        with self._watch:
            if self._samples is None:
                self._samples = self._start()
            sample = next(self._samples)
        if self._sharded_by == "stream?" and self._watch.asked:
            raise ValueError(
                f"sharded_by must be 'source' or 'stream' for a {type(self._source).__name__} "
                "that asks for its worker after its first sample, got 'auto'"
            )
        self.taken += 1
        return sample

    def _start(self) -> Iterator[Any]:
        samples = iter(self._source)
        first = list(islice(samples, 1))  # a generator runs up to its first sample
        if self._sharded_by == "auto":
            self._sharded_by = self._decide()
        rank, world_size, worker, workers = self._share
        if self._sharded_by == "source":
            worker, workers = 0, 1
        begin, step = rank * workers + worker, world_size * workers
        return islice(chain(first, samples), begin + self.taken * step, None, step)

    def _decide(self) -> str:
        if self._share.num_workers == 1 or not self._watch.asked:
            return "stream?"
        if self._share.worker == 0:
            name = type(self._source).__name__
            warnings.warn(
                f"iterable ({name}) asks for its worker and the number of workers, so it is taken "
                "to share its samples among the workers itself. Pass sharded_by='source' to say "
                "so, or sharded_by='stream' if every worker gets all samples",
                stacklevel=2,
            )
        return "source"


class IndexReader(PartReader):
    """A `PartReader` of a sequence, which does not read the samples before its position."""

    def __next__(self) -> Any:
        rank, world_size, worker, workers = self._share
        at = rank * workers + worker + self.taken * world_size * workers
        if at >= len(self._source):  # type: ignore[arg-type]
            raise StopIteration
        sample = self._source[at]  # type: ignore[index]
        self.taken += 1
        return sample


class DatasetReader(PartReader):
    """A reader of a `datasets.IterableDataset`, which gives each worker its own samples.

    The position is the dataset's own state. That state does not include the samples in a shuffle
    buffer, so the position of a dataset with such a buffer is the number of samples read. To
    resume, the reader then reads them again.
    """

    def __init__(self, source: Any, epoch: int | None, column: list[str]) -> None:
        self._dataset, self._column = source, column
        if epoch is not None:
            source.set_epoch(epoch)
        self._samples = None
        self._start_state: Any = {"epoch": source.epoch, "taken": 0}
        self.taken = 0
        self._counts = _has_shuffle_buffer(getattr(source, "_ex_iterable", None))

    def tell(self) -> Any:
        if self._samples is None:
            return self._start_state
        state = self._dataset.state_dict()
        return {"epoch": state["epoch"], "taken": self.taken} if self._counts else state

    def seek(self, position: Any) -> None:
        if position is None:
            return
        self._start_state = position
        self._dataset.set_epoch(position["epoch"])  # it ignores a state of another epoch
        if "taken" not in position:
            self._dataset.load_state_dict(position)
        for _ in islice(self, position.get("taken", 0)):
            pass

    def __next__(self) -> Any:
        if self._samples is None:
            self._samples = iter(self._dataset)
        sample = next(self._samples)
        self.taken += 1
        for name in self._column:
            sample = sample[name]
        return sample


def as_source(iterable: Any) -> Any:
    """Return a source of samples: ``iterable``, or its samples as an Arrow or object array.

    Raises:
        TypeError: if it is a table or a mapping, or can be iterated only once.
        ValueError: if it is one array, whose rows may be padded.
    """
    is_dataset = hasattr(iterable, "__getitems__") or hasattr(iterable, "_ex_iterable")
    names = None if is_dataset else table_columns(iterable)
    if names is not None or isinstance(iterable, (str, bytes, set, frozenset)):
        column_of(iterable, "iterable", _EXPECTED)  # raises
    if holds_arrow(iterable):
        column = as_arrow(iterable, "iterable")
        return _ArrowSamples(column) if is_arrow(column) else column
    if hasattr(iterable, "iloc"):
        iterable = column_of(iterable, "iterable", _EXPECTED)
    ndim = getattr(iterable, "ndim", None)
    if ndim is not None and getattr(iterable, "dtype", None) != np.dtype(object):
        raise ValueError(
            f"iterable must be a list of samples, got one {ndim}-dimensional "
            f"{type(iterable).__name__} of shape {tuple(iterable.shape)}"
            + ("; pass list(iterable) if no row is padded" if ndim == 2 else "")
        )
    if not hasattr(iterable, "__iter__") and not _is_indexed(iterable):
        raise TypeError(f"iterable must be {_EXPECTED}, got {type(iterable).__name__}")
    if hasattr(iterable, "__iter__") and iter(iterable) is iterable:
        raise TypeError(
            "iterable must give its samples each time it is iterated, got a "
            f"{type(iterable).__name__}, which can be iterated once; pass a list or a dataset"
        )
    return iterable


class _ArrowSamples(Sequence[Any]):
    """The lists of an Arrow column, each as an Arrow array."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, at: Any) -> Any:
        return self._column[at]


def _is_indexed(source: Any) -> bool:
    """Whether samples can be read by position. `IterableDataset` inherits an index without use."""
    has_index = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    return has_index and not isinstance(source, IterableDataset)


def read_part(source: Any, epoch: int | None, share: Share, sharded_by: str) -> PartReader:
    """Return a reader of the samples of a rank's worker."""
    datasets = sys.modules.get("datasets")  # it is imported if the source is one of its datasets
    root, column = _column_path(source)
    if datasets is not None and isinstance(root, datasets.IterableDataset):
        if share.world_size > 1:
            from datasets.distributed import split_dataset_by_node

            if getattr(getattr(root, "_distributed", None), "world_size", 1) > 1:
                raise ValueError(
                    f"world_size must be 1, got {share.world_size}: the dataset is already split "
                    "by split_dataset_by_node, and a second split would lose samples"
                )
            root = split_dataset_by_node(root, share.rank, share.world_size)
        # A deep copy, because shallow copies share the state that was loaded.
        return DatasetReader(deepcopy(root), epoch, column)
    if epoch is not None and hasattr(source, "set_epoch"):
        source.set_epoch(epoch)
    reader = IndexReader if _is_indexed(source) else PartReader
    return reader(source, share, sharded_by)


def _column_path(source: Any) -> tuple[Any, list[str]]:
    """The dataset of a `datasets` column, and the names that lead to the column."""
    names: list[str] = []
    while hasattr(source, "source") and hasattr(source, "column_name"):
        names.insert(0, source.column_name)
        source = source.source
    return source, names


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
