"""Packing a stream of samples: an `IterableDataset` of packed rows that can stop and resume.

The stream reads samples in windows. It plans each window by itself and yields all of its bins. So
its position is where a window begins in the source, the number of rows before that window, and the
number of the next row (`RowDeal`). To resume, the stream reads one window again. The cost is about
one partly filled bin per window.

    stream = pack_stream(samples, 2048)
    loader = PackedStreamLoader(stream, batch_size=8, num_workers=2)
    for batch in loader: ...; loader.state_dict()
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ...checks import IGNORE_INDEX, as_integer
from ...packing import Packer
from .batch import PackedBatch
from .collate import collate_packed_rows
from .deal import Row, RowDeal, beginning
from .sources import SHARDED_BY, Share, as_source, read_part
from .window import PlannedWindow

UNEVEN_ROWS = ("warn", "allow", "drop", "repeat")


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
    sharded_by: str = "auto",
    uneven_rows: str = "warn",
) -> PackedStream:
    """Pack a stream of samples.

    Args:
        iterable: the samples, as in `packed_collate_fn`: sequences of integers, or mappings with
            such ``input_ids`` and, if present, ``labels`` and ``attention_mask``. Or a column of
            lists, as in `pack_dataset`, or of a `datasets.IterableDataset`. It must give the same
            samples each time it is iterated. Samples of a sequence are read by index. A
            `datasets.IterableDataset` resumes from its own state, without reading earlier samples
            again. Other iterables, and a `datasets.IterableDataset` with a shuffle buffer (give it
            a seed), are read again from the start up to the position.
        capacity: slots per row.
        strategy, seed, max_sequences, overlong, drop_empty: as for `pack_lengths`.
        padding_value: the value of ``input_ids`` at padding.
        label_padding_value: the value of ``labels`` where the loss ignores them.
        lookahead: samples per window. A larger window gives fuller rows and uses more memory.
        rank, world_size: this process's share of the samples. Do not set them if something else
            distributes samples or batches to ranks: ``iterable`` itself, accelerate or `Trainer`.
            With several processes, those need ``dispatch_batches=False``, because packed batches
            cannot be joined and cut by rows.
        sharded_by: who gives each worker of a `DataLoader` its own samples: the "stream", which
            reads all samples in every worker and keeps every n-th, or the "source", as with
            WebDataset and other datasets that call `get_worker_info`. "auto" is "source" if
            ``iterable`` reads its worker's ``id`` and ``num_workers``, with a warning, and "stream"
            otherwise. A `datasets.IterableDataset` always shares its samples itself, and a sequence
            is always shared by the stream.
        uneven_rows: what to do about unequal numbers of rows per rank, for which DDP waits forever.
            "warn" and "allow" give every rank the rows of its own samples. "drop" and "repeat" give
            every rank exactly the same number: each rank reads and plans all samples, and makes
            every ``world_size``-th row. At the end of a pass of each worker, up to
            ``world_size - 1`` rows over all ranks are dropped or repeated; `PackedStream.counts`
            counts them. All ranks need the same number of workers.

    Returns:
        A dataset of rows. Each worker of a `DataLoader` reads its own share of the samples.

    Raises:
        TypeError: if a number is not an integer, or ``iterable`` is a table or can be iterated only
            once.
        ValueError: as in `pack_lengths`, if ``rank`` is not below ``world_size``, or if an option
            has an unknown value.
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
        Share(rank, world_size),
        sharded_by,
        uneven_rows,
    )


class StreamCounts(NamedTuple):
    """What one worker has read and given in the current pass, or in the last one.

    Attributes:
        samples: samples read, up to the end of the window that is being packed. If a
            `datasets.IterableDataset` was resumed from its own state, those since then.
        rows_dropped: rows dropped at the end (``uneven_rows="drop"``), 0 or 1.
        rows_repeated: rows repeated at the end (``uneven_rows="repeat"``), 0 or 1.
    """

    samples: int
    rows_dropped: int
    rows_repeated: int


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
        share: Share,
        sharded_by: str,
        uneven_rows: str,
    ) -> None:
        for name, value in (("lookahead", lookahead), ("world_size", share.world_size)):
            if as_integer(name, value) < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if not 0 <= as_integer("rank", share.rank) < share.world_size:
            raise ValueError(
                f"rank must be from 0 to world_size - 1 = {share.world_size - 1}, got {share.rank}"
            )
        for name, choice, known in (
            ("sharded_by", sharded_by, SHARDED_BY),
            ("uneven_rows", uneven_rows, UNEVEN_ROWS),
        ):
            if choice not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {choice!r}")
        if share.world_size > 1 and uneven_rows == "warn":
            warnings.warn(
                "each rank packs its own samples, so ranks get unequal numbers of rows, and DDP "
                "waits for a rank that ends early. Pass uneven_rows='drop' or 'repeat' for equal "
                "numbers, or 'allow' if your loop handles it",
                stacklevel=3,
            )
        self.source, self.packer, self.lookahead = as_source(source), packer, lookahead
        self.padding_value, self.label_padding_value = padding_value, label_padding_value
        self.rank, self.world_size = share.rank, share.world_size
        self.sharded_by, self.uneven_rows = sharded_by, uneven_rows
        self._epoch: int | None = None
        self._position: dict[str, Any] | None = None
        self._part = 0
        self._starts: dict[int, dict[str, Any]] = {}  # by part: the position to resume from
        self._blanks: dict[int, int] = {}  # by part: see `resume`
        self.count_parts(1)

    @property
    def options(self) -> dict[str, Any]:
        """The options that decide which samples share a row. A state is valid only with these."""
        return {
            **self.packer.options,
            "lookahead": self.lookahead,
            "rank": self.rank,
            "world_size": self.world_size,
            "sharded_by": self.sharded_by,
            "uneven_rows": self.uneven_rows,
        }

    @property
    def counts(self) -> list[StreamCounts]:
        """What each worker has read. With workers, only a `PackedStreamLoader` knows it."""
        return [StreamCounts(*each) for each in self._counts.tolist()]

    def count_parts(self, parts: int) -> None:
        """Count this number of workers, in memory that is shared with them."""
        self._counts = torch.zeros(parts, len(StreamCounts._fields), dtype=torch.int64)
        self._counts.share_memory_()

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
        start = self._starts.get(part, beginning())
        blanks = self._blanks.get(part, 0)
        self._part, self._starts, self._blanks = part, {}, {}
        self._position = start
        yield from [{}] * blanks
        deals = self.uneven_rows in ("drop", "repeat")
        ranks = (self.rank, self.world_size)
        share = Share(*((0, 1) if deals else ranks), part, parts)
        reader = read_part(self.source, self._epoch, share, self.sharded_by)
        reader.seek(start["window"])
        deal = RowDeal(*(ranks if deals else (0, 1)), self.uneven_rows == "repeat", start)
        while True:
            deal.open(reader.tell())
            samples = list(islice(reader, self.lookahead))
            self._count(reader.taken, deal)
            if not samples:
                break
            for row in self._rows(samples, deal):
                deal.advance()
                self._position = deal.position
                yield row
        for row in deal.last():
            self._count(reader.taken, deal)
            deal.advance()
            self._position = deal.position
            yield row
        self._count(reader.taken, deal)
        self._position = deal.position

    def _count(self, samples: int, deal: RowDeal) -> None:
        if self._part < len(self._counts):
            counts = (samples, deal.dropped, deal.repeated)
            self._counts[self._part] = torch.tensor(counts)

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

    def warn_if_incomplete(self) -> None:
        """After a pass: warn if the samples that were read are not those of the source's length."""
        if not hasattr(self.source, "__len__"):
            return
        total, read = len(self.source), sum(each.samples for each in self.counts)
        deals = self.uneven_rows in ("drop", "repeat")
        expected = total if deals else len(range(self.rank, total, self.world_size))
        if read != expected:
            warnings.warn(
                f"{read} samples were read, and this rank's share of len(iterable) = {total} is "
                f"{expected}; by worker: {[each.samples for each in self.counts]}. If the source "
                "shares its samples among workers, pass sharded_by='source', otherwise 'stream'",
                stacklevel=3,
            )

    def _rows(self, samples: list[Any], deal: RowDeal) -> Iterator[Row]:
        """Yield the rows of a window that this rank gets now; hold back those for later."""
        window = PlannedWindow(samples, self.packer, self.padding_value, self.label_padding_value)
        waiting, due, rest = deal.due(len(window))
        yield from waiting
        yield from window.rows(due)
        for number, row in zip(rest, window.rows(rest)):
            deal.hold(number, row)
        deal.close(len(window))


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
        stream.count_parts(max(self.num_workers, 1))

    @property
    def counts(self) -> list[StreamCounts]:
        """What each worker has read and given in the current pass, or in the last one.

        Workers read ahead, so compare after a pass: the ``samples`` of all workers and ranks
        together are the samples of the source. If the source has a length, the loader compares
        them itself at the end of a pass and warns if they differ.
        """
        return self._stream.counts

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
        if not self.drop_last:
            self._stream.warn_if_incomplete()

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
