"""Packing samples that stream by: an `IterableDataset` of packed rows that can stop and go on.

Samples are taken in windows. A window is planned by itself and all its bins are given out, so that
what a stream is in the middle of is told by two things: where its window began in the source, and
how many of its rows are out. That is the whole state, whatever the window holds, and to go on is to
read one window again. It costs one bin per window that is not full.

    stream = pack_stream(samples, 2048)
    loader = PackedStreamLoader(stream, batch_size=8, num_workers=2)
    for batch in loader: ...; loader.state_dict()
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ...checks import IGNORE_INDEX, as_integer
from ...packing import Packer
from ..tokens import Rows
from .batch import PackedBatch
from .collate import collate_packed_rows, flatten_samples

Row = dict[str, Any]
"""``input_ids``, ``labels`` and ``position_ids``, ``(capacity,)`` int64, and ``seq_lengths``."""


def pack_stream(
    iterable: Iterable[Any],
    capacity: int,
    strategy: str = "auto",
    seed: int | None = None,
    padding_value: int = 0,
    label_padding_value: int = IGNORE_INDEX,
    *,
    lookahead: int = 8192,
    max_sequences: int | None = None,
    overlong: str = "error",
    drop_empty: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> PackedStream:
    """Pack samples as they stream by.

    Args:
        iterable: of samples: lists, NumPy arrays or tensors of integers, or mappings with such
            ``input_ids``, and maybe ``labels`` and ``attention_mask``, as for `packed_collate_fn`.
            It must give the same samples each time it is iterated. A `datasets.IterableDataset` is
            asked for its own state, so that going on need not read what was read; one that
            shuffles (give it a seed) is read again up to where it was, as any other iterable is.
            Of a sequence the samples are taken by index.
        capacity: slots of a row.
        strategy, seed, max_sequences, overlong, drop_empty: as for `pack_lengths`.
        padding_value: what stands in ``input_ids`` where there is no token.
        label_padding_value: what stands in ``labels`` where nothing is to be predicted.
        lookahead: samples in a window. More of them give fuller rows, and take more memory.
        rank, world_size: which part of the samples this process takes, of how many. Do not give
            them where something else deals samples or batches out to ranks, as accelerate and a
            `Trainer` do; with several processes those need ``dispatch_batches=False``, since
            packed batches cannot be joined and cut by rows.

    Returns:
        A dataset of rows. Each worker of a `DataLoader` takes its own part of the samples.

    Raises:
        TypeError: if a number is no integer, or ``iterable`` can be iterated only once.
        ValueError: as `pack_lengths`, and if ``rank`` is not below ``world_size``.
    """
    return PackedStream(
        iterable,
        Packer(
            capacity,
            strategy,
            seed,
            max_sequences=max_sequences,
            overlong=overlong,
            drop_empty=drop_empty,
        ),
        as_integer("padding_value", padding_value),
        as_integer("label_padding_value", label_padding_value),
        lookahead,
        rank,
        world_size,
    )


class PackedStream(IterableDataset):
    """What `pack_stream` returns: rows, and the state to go on from.

    Iterating goes on from the state that was loaded, once; the next time it begins anew.
    """

    def __init__(
        self,
        source: Iterable[Any],
        packer: Packer,
        padding_value: int,
        label_padding_value: int,
        lookahead: int,
        rank: int,
        world_size: int,
    ) -> None:
        if iter(source) is source:
            raise TypeError(
                "iterable must give its samples anew each time it is iterated, "
                f"got a {type(source).__name__}, which can be iterated once"
            )
        for name, value in (("lookahead", lookahead), ("world_size", world_size)):
            if as_integer(name, value) < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if not 0 <= as_integer("rank", rank) < world_size:
            raise ValueError(
                f"rank must be from 0 to world_size - 1 = {world_size - 1}, got {rank}"
            )
        self.source, self.packer, self.lookahead = source, packer, lookahead
        self.padding_value, self.label_padding_value = padding_value, label_padding_value
        self.rank, self.world_size = rank, world_size
        self._epoch: int | None = None
        self._position: dict[str, Any] | None = None
        self._part = 0
        self._starts: dict[int, dict[str, Any]] = {}  # by part; what to go on from
        self._blanks: dict[int, int] = {}  # by part; see `resume`

    @property
    def options(self) -> dict[str, Any]:
        """What decides which samples share a row: a state is of a stream with the same."""
        return {
            **self.packer.options,
            "lookahead": self.lookahead,
            "rank": self.rank,
            "world_size": self.world_size,
        }

    @property
    def epoch(self) -> int | None:
        """The epoch that the source was told of, here or by itself; None if it has none."""
        return getattr(self.source, "epoch", None) if self._epoch is None else self._epoch

    def set_epoch(self, epoch: int | None) -> None:
        """Tell the source, if it shuffles by epochs; workers that persist do not hear of it."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        part, parts = (worker.id, worker.num_workers) if worker else (0, 1)
        start = self._starts.get(part, {"window": None, "rows": 0})
        blanks = self._blanks.get(part, 0)
        self._part, self._starts, self._blanks = part, {}, {}
        self._position = start
        yield from [{}] * blanks
        reader = _reader(self.source, self._epoch, self.rank, self.world_size, part, parts)
        reader.seek(start["window"])
        skip = start["rows"]
        while True:
            window = reader.tell()
            samples = list(islice(reader, self.lookahead))
            if not samples:
                self._position = {"window": window, "rows": 0}
                return
            for number, row in enumerate(self._rows(samples)):
                if number >= skip:
                    self._position = {"window": window, "rows": number + 1}
                    yield row
            skip = 0

    def state_dict(self) -> dict[str, Any]:
        """What to go on from after the rows given out so far; in a worker, those of its part."""
        return {
            "part": self._part,
            "position": self._position,
            "epoch": self.epoch,
            "options": self.options,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on from ``state``.

        A stream that several workers read goes on by `PackedStreamLoader`.

        Raises:
            ValueError: if it is no state, or of a stream with other options.
        """
        part, position, epoch = require_state(state, self.options, "part", "position", "epoch")
        self.set_epoch(epoch)
        self.resume({part: position}, {})

    def resume(
        self, positions: Mapping[int, dict[str, Any] | None], blanks: Mapping[int, int]
    ) -> None:
        """Let each part go on from its position, after as many blank rows as it is told to give.

        A loader asks its workers in turn, from the first on. Where it was another's turn, those
        before that one give blanks.
        """
        self._starts = {part: dict(at) for part, at in positions.items() if at is not None}
        self._blanks = dict(blanks)

    def _rows(self, samples: list[Any]) -> Iterator[Row]:
        ids, own_labels, _ = flatten_samples(samples, empty=True)
        labels = ids if own_labels is None else own_labels
        if self.packer.drops(ids.lengths).all():
            return
        plan = self.packer.pack(ids.lengths)
        # A few rows at a time, so that memory is the window's tokens and little more.
        at_once = max(1, (1 << 16) // plan.capacity)
        for first in range(0, len(plan), at_once):
            rows = Rows(plan, ids.offsets, first=first, last=first + at_once)
            columns = {
                "input_ids": rows.tokens(ids.values, self.padding_value, np.int64),
                "labels": rows.labels(labels.values, self.label_padding_value, np.int64),
                "position_ids": rows.position_ids(),
            }
            bounds = rows.row_bounds
            for number in range(rows.num_rows):
                row: Row = {name: column[number] for name, column in columns.items()}
                row["seq_lengths"] = rows.lengths[bounds[number] : bounds[number + 1]]
                yield row


def require_state(state: dict[str, Any], options: dict[str, Any], *names: str) -> list[Any]:
    """The entries of a state.

    Raises:
        ValueError: if one is missing, or the state is of other options, naming them.
    """
    missing = [name for name in (*names, "options") if name not in state]
    if missing:
        raise ValueError(f"state has no {missing[0]!r}, it has only {sorted(state)}")
    differ = [name for name in options if state["options"].get(name) != options[name]]
    if differ:
        theirs, ours = (
            f"{differ[0]}={each.get(differ[0])!r}" for each in (state["options"], options)
        )
        raise ValueError(f"state is of a stream with {theirs}, and this one has {ours}")
    return [state[name] for name in names]


class PackedStreamLoader(DataLoader):
    """A `DataLoader` of a `PackedStream` that can stop after any batch, and go on elsewhere.

    Args:
        stream: what to load.
        batch_size: rows of a batch.
        collate_fn: rows to a batch; by default `collate_packed_rows`.
        options: of `DataLoader`, but for those that an iterable dataset cannot have.
    """

    def __init__(
        self,
        stream: PackedStream,
        batch_size: int = 1,
        *,
        collate_fn: Callable[[list[Row]], Any] | None = None,
        **options: Any,
    ) -> None:
        collate = _WithPosition(stream, collate_fn or collate_packed_rows)
        super().__init__(stream, batch_size, collate_fn=collate, **options)
        self._stream = stream
        self._positions: dict[int, dict[str, Any] | None] = {}
        self._next_part = 0
        self._goes_on = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        parts = max(self.num_workers, 1)
        if not self._goes_on:
            self._positions, self._next_part = {}, 0
        self._goes_on = False
        blanks = dict.fromkeys(range(self._next_part), self.batch_size or 1)
        self._stream.resume(self._positions, blanks)
        for came in super().__iter__():
            if isinstance(came, PackedBatch):
                (part, position), batch = came.stream_position, came
            else:
                part, position, batch = came
            if batch is not None:
                self._positions[part], self._next_part = position, (part + 1) % parts
                yield batch
        self._positions, self._next_part = {}, 0

    def state_dict(self) -> dict[str, Any]:
        """What to go on from after the last batch given out; between epochs, the beginning."""
        return {
            "num_workers": self.num_workers,
            "next_part": self._next_part,
            "positions": dict(self._positions),
            "epoch": self._stream.epoch,
            "options": self._stream.options,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on from ``state``.

        Raises:
            ValueError: if it is no state, or of another number of workers, among whom samples are
                dealt out, or of a stream with other options.
            RuntimeError: if workers of an earlier iteration persist, which cannot be told of it.
        """
        if self.persistent_workers and self._iterator is not None:
            raise RuntimeError("workers persist and run already: load the state into a new loader")
        num_workers, next_part, positions, epoch = require_state(
            state, self._stream.options, "num_workers", "next_part", "positions", "epoch"
        )
        if num_workers != self.num_workers:
            raise ValueError(
                f"state is of num_workers={num_workers}, and this loader has "
                f"num_workers={self.num_workers}: its workers would take other samples"
            )
        self._stream.set_epoch(epoch)  # for parts that had given nothing out
        self._positions = {int(part): at for part, at in positions.items()}
        self._next_part, self._goes_on = next_part, True


class _WithPosition:
    """Runs where the rows are made, and sends along where the stream then is.

    A `PackedBatch` carries it as an attribute, so that whoever takes the loader apart (accelerate
    does) still finds batches in it.
    """

    def __init__(self, stream: PackedStream, collate: Callable[[list[Row]], Any]) -> None:
        self.stream, self.collate = stream, collate

    def __call__(self, rows: list[Row]) -> Any:
        blank = not (rows[0] if isinstance(rows, list) else rows)
        worker = get_worker_info()
        # A worker iterates a copy of the stream.
        stream: Any = worker.dataset if worker else self.stream
        state = stream.state_dict()
        batch = None if blank else self.collate(rows)
        if not isinstance(batch, PackedBatch):
            return state["part"], state["position"], batch
        batch.stream_position = (state["part"], state["position"])
        return batch


# ------------------------------------------------------------------------------- parts of a source


class _Reader:
    """Every ``parts``-th sample of a source from the ``part``-th on, and where it is."""

    def __init__(self, source: Iterable[Any], part: int, parts: int) -> None:
        self._source, self._parts, self._next = source, parts, part
        self._samples: Iterator[Any] | None = None

    def tell(self) -> Any:
        return self._next

    def seek(self, position: Any) -> None:
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


class _IndexReader(_Reader):
    """The same of a sequence, which need not be read up to where the part goes on."""

    def __next__(self) -> Any:
        if self._next >= len(self._source):  # type: ignore[arg-type]
            raise StopIteration
        sample = self._source[self._next]  # type: ignore[index]
        self._next += self._parts
        return sample


class _DatasetReader(_Reader):
    """A `datasets.IterableDataset`, which deals its samples out to a loader's workers by itself.

    Its own state says where it is, unless it holds samples in a buffer to shuffle them, which that
    state leaves out. Then samples are counted, and going on takes them again.
    """

    def __init__(self, source: Any, epoch: int | None) -> None:
        self._dataset = source
        if epoch is not None:
            source.set_epoch(epoch)
        self._samples = None
        self._begins_at: Any = {"epoch": source.epoch, "taken": 0}
        self._taken = 0
        self._counts = _shuffles_in_a_buffer(getattr(source, "_ex_iterable", None))

    def tell(self) -> Any:
        if self._samples is None:
            return self._begins_at
        state = self._dataset.state_dict()
        return {"epoch": state["epoch"], "taken": self._taken} if self._counts else state

    def seek(self, position: Any) -> None:
        if position is None:
            return
        self._begins_at = position
        self._dataset.set_epoch(position["epoch"])  # a state of another epoch would be ignored
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


def _shuffles_in_a_buffer(step: Any) -> bool:
    """Whether a step of a dataset, or one before it, does. Only their classes' names tell."""
    if step is None:
        return True  # unknown: to count is slow, and right
    if "BufferShuffled" in type(step).__name__:
        return True
    before = [each for value in vars(step).values() for each in _as_list(value)]
    return any(_shuffles_in_a_buffer(each) for each in before if _is_step(each))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_step(value: Any) -> bool:
    return type(value).__name__.endswith("ExamplesIterable")


def _reader(
    source: Iterable[Any], epoch: int | None, rank: int, world_size: int, part: int, parts: int
) -> _Reader:
    datasets = sys.modules.get("datasets")  # whoever has one of its has imported it
    if datasets is not None and isinstance(source, datasets.IterableDataset):
        if world_size > 1:
            from datasets.distributed import split_dataset_by_node

            source = split_dataset_by_node(source, rank, world_size)
        # A state that was loaded stays in what shallow copies share.
        return _DatasetReader(deepcopy(source), epoch)
    if epoch is not None and hasattr(source, "set_epoch"):
        source.set_epoch(epoch)
    by_index = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    kind = _IndexReader if by_index and not isinstance(source, Mapping) else _Reader
    return kind(source, rank * parts + part, world_size * parts)
