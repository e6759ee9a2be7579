"""Batches of shard samples, for any number of ranks and workers, with one number as state.

The samples ``n, n + 1, ..., n + G - 1`` are the next global batch of ``G = batch_size *
world_size`` samples. Rank r gets every ``world_size``-th of them, from the r-th. A worker gets the
numbers of a batch, so it needs no state.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from torch.utils.data import DataLoader

from ...checks import as_integer, at_least_one
from ..packed.batch import PackedBatch
from ..packed.collate import collate_packed_rows
from ..packed.stream import require_state
from .samples import Row, ShardSamples


class ShardLoader(DataLoader):
    """A `DataLoader` of shard samples that stops after any batch and resumes exactly.

    Each iteration goes from the current position to the end of its epoch. The position is the
    number of the next sample, counted through all epochs and ranks, so a state may be loaded with
    another number of ranks or workers, or another batch size.

    Args:
        samples: what `shard_windows` or `blend_shards` returned.
        batch_size: samples of a batch of this rank.
        rank, world_size: of this process.
        drop_last: drop the samples that do not fill a global batch at the end of an epoch. Without
            it, the last batch is smaller, and may be missing on some ranks.
        skip: ranges ``(start, stop)`` of sample numbers to leave out, for example after a spike of
            the loss.
        collate_fn: makes a batch of rows. By default `collate_packed_rows`; labels that are shifted
            become an attribute of the batch, as in `packed_collate_fn`.
        options: further options of `DataLoader` that are valid with a batch sampler.

    Attributes:
        samples: the samples.

    Raises:
        TypeError: if ``samples`` is something else, or a number is not an integer.
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        samples: ShardSamples,
        batch_size: int = 1,
        *,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        skip: Sequence[tuple[int, int]] = (),
        collate_fn: Callable[[list[Row]], Any] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(samples, ShardSamples):
            raise TypeError(f"samples must be what shard_windows returned, got {samples!r:.80}")
        size, ranks = at_least_one("batch_size", batch_size), at_least_one("world_size", world_size)
        if not 0 <= as_integer("rank", rank) < ranks:
            raise ValueError(f"rank must be from 0 to world_size - 1 = {ranks - 1}, got {rank}")
        batches = _Batches(len(samples), size, (rank, ranks), drop_last, _checked(skip))
        left = len(samples) % (size * ranks)
        if not drop_last and 0 < left < ranks:
            warnings.warn(
                f"the last batch of an epoch has {left} samples for {ranks} ranks, so some ranks "
                "get a batch less, and DDP waits for them. Pass drop_last=True",
                stacklevel=2,
            )
        default = _collate_shifted if samples.labels_shifted else collate_packed_rows
        super().__init__(
            _Numbered(samples),  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=collate_fn or default,
            **options,
        )
        self.samples, self._batches = samples, batches

    @property
    def position(self) -> int:
        """The number of the next sample, counted through all epochs and ranks."""
        return self._batches.position

    @property
    def epoch(self) -> int:
        """The epoch of the next sample."""
        return self.position // len(self.samples)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        end = self._batches.end
        steps = self._batches.steps()
        for batch in super().__iter__():
            self._batches.position = next(steps)[0]
            yield batch
        self._batches.position = end

    def __getitem__(self, number: Any) -> NoReturn:
        raise TypeError(
            "train_dataset and eval_dataset of a trainer must be datasets, got a ShardLoader, "
            "which has batches: pass its attribute samples"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what decides which samples the numbers are."""
        return {"sample": self.position, "options": self.samples.options}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iteration continue from ``state``.

        Raises:
            ValueError: if ``state`` is not a state, or is of other samples.
        """
        (position,) = require_state(state, self.samples.options, "sample")
        if as_integer("sample", position) < 0:
            raise ValueError(f"sample must be 0 or more, got {position}")
        self._batches.position = int(position)


class _Batches:
    """The batches of sample numbers of one rank, from the position to the end of its epoch."""

    def __init__(
        self,
        count: int,
        batch_size: int,
        ranks: tuple[int, int],
        drop_last: bool,
        skip: list[tuple[int, int]],
    ) -> None:
        self.position, self._count = 0, count
        self._rank, self._world_size = ranks
        self._step = batch_size * self._world_size
        self._drop_last, self._skip = drop_last, skip

    @property
    def end(self) -> int:
        """The end of the epoch of the position."""
        return (self.position // self._count + 1) * self._count

    def __iter__(self) -> Iterator[list[int]]:
        for _, numbers in self.steps():
            yield numbers

    def __len__(self) -> int:
        full, rest = divmod(self._left(), self._step)
        return full + (not self._drop_last and rest > self._rank)

    def steps(self) -> Iterator[tuple[int, list[int]]]:
        """The position after each batch, and the batch."""
        for position, spans in self._spans():
            numbers = [number for span in spans for number in span]
            yield position, numbers[self._rank :: self._world_size]

    def _spans(self) -> Iterator[tuple[int, list[range]]]:
        """The position after each global batch, and its numbers, where this rank has some."""
        at, end = self.position, self.end
        spans, size = self._next(at, end)
        while size:
            if size < self._step and (self._drop_last or size <= self._rank):
                return
            at = spans[-1].stop
            following, next_size = self._next(at, end)
            more = next_size == self._step or (next_size and not self._drop_last)
            yield (at if more else end), spans
            spans, size = following, next_size

    def _left(self) -> int:
        """How many numbers there are to the end of the epoch, without those to skip."""
        at, left = self.position, self.end - self.position
        for start, stop in sorted(self._skip):
            covered = min(stop, self.end) - max(start, at)
            if covered > 0:
                left, at = left - covered, min(stop, self.end)
        return left

    def _next(self, at: int, end: int) -> tuple[list[range], int]:
        """The next numbers that are not skipped, enough for a global batch if there are."""
        spans, size = [], 0
        while at < end and size < self._step:
            inside = [stop for start, stop in self._skip if start <= at < stop]
            if inside:
                at = max(inside)
                continue
            limits = [start for start, _ in self._skip if start > at]
            stop = min([end, at + self._step - size, *limits])
            spans.append(range(at, stop))
            size, at = size + stop - at, stop
        return spans, size


class _Numbered:
    """Samples by the number that counts through all epochs."""

    def __init__(self, samples: ShardSamples) -> None:
        self._samples = samples

    def __getitem__(self, number: int) -> Row:
        return self._samples.sample(number)

    def __getitems__(self, numbers: list[int]) -> list[Row]:
        return self._samples.numbered(numbers)


def _collate_shifted(rows: list[Row]) -> PackedBatch:
    batch = collate_packed_rows(rows)
    batch.labels = batch.pop("labels")  # no field: a model would shift them again
    return batch


def _checked(skip: Any) -> list[tuple[int, int]]:
    ranges = [tuple(as_integer("skip", each) for each in pair) for pair in skip]
    for pair in ranges:
        if len(pair) != 2 or not 0 <= pair[0] < pair[1]:
            raise ValueError(f"skip must be ranges (start, stop), 0 <= start < stop, got {pair}")
    return [(start, stop) for start, stop in ranges]
