"""Packing a stream of samples: an `IterableDataset` of packed rows that can stop and resume.

The stream reads samples in windows. It plans each window by itself and yields all of its bins. So
two numbers describe its position: where the window began in the source, and how many of the
window's rows have been yielded. To resume, the stream reads one window again. The cost is about one
partly filled bin per window.

    stream = pack_stream(samples, 2048)
    loader = PackedStreamLoader(stream, batch_size=8, num_workers=2)
    for batch in loader: ...; loader.state_dict()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ...checks import IGNORE_INDEX, as_integer
from ...packing import Packer
from ..row_layout import RowLayout
from .batch import PackedBatch
from .collate import collate_packed_rows, flatten_samples
from .sources import read_part

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
    """Pack a stream of samples.

    Args:
        iterable: the samples, as in `packed_collate_fn`: lists, NumPy arrays or tensors of
            integers, or mappings with such ``input_ids`` and, if present, ``labels`` and
            ``attention_mask``. It must give the same samples each time it is iterated. Samples of a
            sequence are read by index. A `datasets.IterableDataset` resumes from its own state,
            without reading earlier samples again. Other iterables, and a
            `datasets.IterableDataset` with a shuffle buffer (give it a seed), are read again from
            the start up to the position.
        capacity: slots per row.
        strategy, seed, max_sequences, overlong, drop_empty: as for `pack_lengths`.
        padding_value: the value of ``input_ids`` at padding.
        label_padding_value: the value of ``labels`` where the loss ignores them.
        lookahead: samples per window. A larger window gives fuller rows and uses more memory.
        rank, world_size: this process's share of the samples. Do not set them if something else
            distributes samples or batches to ranks, as accelerate and `Trainer` do. With several
            processes, those need ``dispatch_batches=False``, because packed batches cannot be
            joined and cut by rows.

    Returns:
        A dataset of rows. Each worker of a `DataLoader` reads its own share of the samples.

    Raises:
        TypeError: if a number is not an integer, or ``iterable`` can be iterated only once.
        ValueError: as in `pack_lengths`, and if ``rank`` is not below ``world_size``.
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
    """A stream of packed rows that can resume; `pack_stream` returns it.

    After a state is loaded, the next iteration continues from it. The one after that starts at the
    beginning.
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
                "iterable must give its samples each time it is iterated, got a "
                f"{type(source).__name__}, which can be iterated once; pass a list or a dataset"
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
        self._starts: dict[int, dict[str, Any]] = {}  # by part: the position to resume from
        self._blanks: dict[int, int] = {}  # by part: see `resume`

    @property
    def options(self) -> dict[str, Any]:
        """The options that decide which samples share a row. A state is valid only with these."""
        return {
            **self.packer.options,
            "lookahead": self.lookahead,
            "rank": self.rank,
            "world_size": self.world_size,
        }

    @property
    def epoch(self) -> int | None:
        """The epoch set by `set_epoch`, or the source's own; None if neither exists."""
        return getattr(self.source, "epoch", None) if self._epoch is None else self._epoch

    def set_epoch(self, epoch: int | None) -> None:
        """Set the epoch of a source that shuffles by epoch.

        It does not reach persistent workers that already run.
        """
        self._epoch = epoch

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        part, parts = (worker.id, worker.num_workers) if worker else (0, 1)
        start = self._starts.get(part, {"window": None, "rows": 0})
        blanks = self._blanks.get(part, 0)
        self._part, self._starts, self._blanks = part, {}, {}
        self._position = start
        yield from [{}] * blanks
        reader = read_part(self.source, self._epoch, self.rank, self.world_size, part, parts)
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
        """Return the position after the rows yielded so far. In a worker, that of its part."""
        return {
            "part": self._part,
            "position": self._position,
            "epoch": self.epoch,
            "options": self.options,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iteration continue from ``state``.

        If several workers read the stream, use the methods of `PackedStreamLoader` instead.

        Raises:
            ValueError: if ``state`` is not a state, or is of a stream with other options.
        """
        part, position, epoch = require_state(state, self.options, "part", "position", "epoch")
        self.set_epoch(epoch)
        self.resume({part: position}, {})

    def resume(
        self, positions: Mapping[int, dict[str, Any] | None], blanks: Mapping[int, int]
    ) -> None:
        """Make each part continue from its position, after some blank rows.

        A loader fetches batches from its workers in turn and starts with the first worker. If the
        next batch is due from a later worker, the workers before it yield blank rows first.
        """
        self._starts = {part: dict(at) for part, at in positions.items() if at is not None}
        self._blanks = dict(blanks)

    def _rows(self, samples: list[Any]) -> Iterator[Row]:
        ids, own_labels, _ = flatten_samples(samples, empty=True)
        labels = ids if own_labels is None else own_labels
        if self.packer.drops(ids.lengths).all():
            return
        plan = self.packer.pack(ids.lengths)
        # A few rows at a time, so that memory use stays close to the size of the window's tokens.
        at_once = max(1, (1 << 16) // plan.capacity)
        for first in range(0, len(plan), at_once):
            rows = RowLayout(plan, ids.offsets, first=first, last=first + at_once)
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
    """Return the named entries of a state.

    Raises:
        ValueError: if an entry is missing, or the state is of a stream with other options.
    """
    missing = [name for name in (*names, "options") if name not in state]
    if missing:
        raise ValueError(f"state must have {missing[0]!r}, got only {sorted(state)}")
    for name, value in options.items():
        if (found := state["options"].get(name)) != value:
            raise ValueError(
                f"state must be of a stream with {name}={value!r}, got {name}={found!r}"
            )
    return [state[name] for name in names]


class PackedStreamLoader(DataLoader):
    """A `DataLoader` of a `PackedStream` that can stop after any batch and resume in a new process.

    Args:
        stream: the stream to load.
        batch_size: rows per batch.
        collate_fn: makes a batch of rows. By default, `collate_packed_rows`.
        options: further options of `DataLoader` that are valid for an iterable dataset.
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
        self._resumes = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        parts = max(self.num_workers, 1)
        if not self._resumes:
            self._positions, self._next_part = {}, 0
        self._resumes = False
        blanks = dict.fromkeys(range(self._next_part), self.batch_size or 1)
        self._stream.resume(self._positions, blanks)
        for item in super().__iter__():
            if isinstance(item, PackedBatch):
                (part, position), batch = item.stream_position, item
            else:
                part, position, batch = item
            if batch is not None:
                self._positions[part], self._next_part = position, (part + 1) % parts
                yield batch
        self._positions, self._next_part = {}, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch; between epochs, the position of the start."""
        return {
            "num_workers": self.num_workers,
            "next_part": self._next_part,
            "positions": dict(self._positions),
            "epoch": self._stream.epoch,
            "options": self._stream.options,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iteration continue from ``state``.

        Raises:
            ValueError: if ``state`` is not a state, is of a stream with other options, or is of a
                loader with another number of workers, which would share the samples differently.
            RuntimeError: if persistent workers already run, because they cannot receive the state.
        """
        if self.persistent_workers and self._iterator is not None:
            raise RuntimeError(
                "state must be loaded before persistent workers start; load it into a new loader"
            )
        num_workers, next_part, positions, epoch = require_state(
            state, self._stream.options, "num_workers", "next_part", "positions", "epoch"
        )
        if num_workers != self.num_workers:
            raise ValueError(
                f"state must be of a loader with num_workers={self.num_workers}, got "
                f"num_workers={num_workers}; other numbers of workers share samples differently"
            )
        self._stream.set_epoch(epoch)  # for parts without a position of their own
        self._positions = {int(part): at for part, at in positions.items()}
        self._next_part, self._resumes = next_part, True


class _WithPosition:
    """A collate function that runs where rows are made and adds the stream's position to a batch.

    On a `PackedBatch` the position is an attribute, so that code that wraps the inner loader, such
    as accelerate, still gets batches from it. Other batches become ``(part, position, batch)``.
    """

    def __init__(self, stream: PackedStream, collate: Callable[[list[Row]], Any]) -> None:
        self.stream, self.collate = stream, collate

    def __call__(self, rows: list[Row]) -> Any:
        blank = not (rows[0] if isinstance(rows, list) else rows)
        worker = get_worker_info()
        # A worker iterates over a copy of the stream.
        stream: Any = worker.dataset if worker else self.stream
        state = stream.state_dict()
        batch = None if blank else self.collate(rows)
        if not isinstance(batch, PackedBatch):
            return state["part"], state["position"], batch
        batch.stream_position = (state["part"], state["position"])
        return batch
