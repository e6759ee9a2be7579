"""A plan: which sequences share which bin, and how full the bins are.

It is two flat arrays, as everything that carries it out wants it, and a bin is a slice of the
first. A plan can be saved to a folder and comes back memory-mapped, so that a hundred million
sequences need not be in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from ..segments import offsets_of
from .saving import PlanWriter, read_plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class PackMetrics(NamedTuple):
    """How well a plan packs, and what it took.

    Attributes:
        num_sequences: sequences asked for, dropped ones included.
        num_bins: bins.
        tokens: tokens in bins.
        padding: slots in bins that hold none.
        efficiency: ``tokens / (tokens + padding)``.
        utilization_mean, utilization_std, utilization_min, utilization_max: of the bins' shares of
            slots that hold a token.
        sequences_per_bin: mean number of items in a bin.
        dropped, truncated, split: sequences left out, cut to the capacity, and cut in pieces.
        seconds: time that planning took; 0 where it was not measured.
        sequences_per_second: ``num_sequences / seconds``; 0 likewise.
    """

    num_sequences: int
    num_bins: int
    tokens: int
    padding: int
    efficiency: float
    utilization_mean: float
    utilization_std: float
    utilization_min: float
    utilization_max: float
    sequences_per_bin: float
    dropped: int
    truncated: int
    split: int
    seconds: float
    sequences_per_second: float


def _no_ids() -> NDArray[np.int64]:
    return np.empty(0, np.int64)


@dataclass(frozen=True, eq=False, repr=False)
class PackResult(Sequence[NDArray[np.int64]]):
    """Sequences in bins of a capacity. A sequence of bins: ``result[b]`` are the items of bin b.

    Attributes:
        items: ``(num_items,)`` int64, ids of the sequences, one bin after the other. With
            ``overlong="split"`` a sequence may be there several times.
        offsets: ``(num_bins + 1,)`` int64; bin b is ``items[offsets[b]:offsets[b + 1]]``.
        item_lengths: ``(num_items,)`` integers, tokens of each item.
        item_starts: ``(num_items,)`` int64, the token of its sequence that an item begins with;
            None where all begin with the first.
        capacity: tokens that a bin holds.
        strategy: short name of the strategy that ran.
        num_sequences: how many there were to be packed.
        dropped: ids of the sequences left out, rising.
        truncated: ids of the sequences cut to the capacity, rising.
        split: ids of the sequences in more than one item, rising.
        seed: what the shuffle was seeded with, where there was one.
        seconds: time that planning took.
    """

    items: NDArray[np.int64]
    offsets: NDArray[np.int64]
    item_lengths: NDArray[np.integer]
    capacity: int
    strategy: str
    num_sequences: int
    item_starts: NDArray[np.int64] | None = None
    dropped: NDArray[np.int64] = field(default_factory=_no_ids)
    truncated: NDArray[np.int64] = field(default_factory=_no_ids)
    split: NDArray[np.int64] = field(default_factory=_no_ids)
    seed: int | None = None
    seconds: float = 0.0

    # What a saved plan holds, and what two equal plans have in common.
    ARRAYS: ClassVar[tuple[str, ...]] = (
        *("items", "offsets", "item_lengths", "item_starts"),
        *("dropped", "truncated", "split"),
    )
    NUMBERS: ClassVar[tuple[str, ...]] = ("capacity", "num_sequences")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> NDArray[np.int64]: ...

    @overload
    def __getitem__(self, index: slice) -> list[NDArray[np.int64]]: ...

    def __getitem__(self, index: int | slice) -> NDArray[np.int64] | list[NDArray[np.int64]]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]  # which knows negative ones, and raises IndexError
        return self.items[self.offsets[at] : self.offsets[at + 1]]

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        bounds = self.offsets.tolist()
        return (self.items[start:end] for start, end in zip(bounds, bounds[1:]))

    def __eq__(self, other: object) -> bool:
        """Whether both plans put the same items into the same bins; time does not count."""
        if not isinstance(other, PackResult):
            return NotImplemented
        return (
            type(self) is type(other)
            and all(getattr(self, name) == getattr(other, name) for name in self.NUMBERS)
            and all(np.array_equal(getattr(self, n), getattr(other, n)) for n in self.ARRAYS)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(num_bins={self.num_bins}, capacity={self.capacity}, "
            f"strategy={self.strategy!r}, num_sequences={self.num_sequences}, "
            f"efficiency={self.efficiency:.4f})"
        )

    @property
    def num_bins(self) -> int:
        """How many bins there are."""
        return len(self)

    @property
    def bins(self) -> list[NDArray[np.int64]]:
        """The ids of each bin, views of ``items``."""
        return list(self)

    @property
    def bin_tokens(self) -> NDArray[np.int64]:
        """``(num_bins,)`` int64, tokens in each bin."""
        if not len(self):
            return _no_ids()
        return np.add.reduceat(self.item_lengths, self.offsets[:-1], dtype=np.int64)

    @property
    def efficiency(self) -> float:
        """Share of the bins' slots that hold a token."""
        return int(self.item_lengths.sum(dtype=np.int64)) / max(len(self) * self.capacity, 1)

    @property
    def metrics(self) -> PackMetrics:
        """How well the plan packs, and what it took."""
        fills = self.bin_tokens / self.capacity
        tokens = int(self.item_lengths.sum(dtype=np.int64))
        return PackMetrics(
            num_sequences=self.num_sequences,
            num_bins=len(self),
            tokens=tokens,
            padding=len(self) * self.capacity - tokens,
            efficiency=self.efficiency,
            utilization_mean=float(fills.mean()),
            utilization_std=float(fills.std()),
            utilization_min=float(fills.min()),
            utilization_max=float(fills.max()),
            sequences_per_bin=len(self.items) / len(self),
            dropped=len(self.dropped),
            truncated=len(self.truncated),
            split=len(self.split),
            seconds=self.seconds,
            sequences_per_second=self.num_sequences / self.seconds if self.seconds else 0.0,
        )

    def plot(self, path: str | PathLike[str] | None = None) -> Figure:
        """Draw the lengths that were packed and how full the bins are; needs matplotlib.

        Args:
            path: where to save it too, as an image of the kind its name says.
        """
        from .figure import plot_plan  # matplotlib is an extra

        figure = plot_plan(self)
        if path is not None:
            figure.savefig(path)
        return figure

    def save(self, folder: str | PathLike[str]) -> None:
        """Write the plan into a folder, as one ``.npy`` per array and ``plan.json``.

        Raises:
            FileExistsError: if there is a plan in it already.
        """
        with PlanWriter(folder) as writer:
            for name in self.ARRAYS:
                if getattr(self, name) is not None:
                    writer.append(name, getattr(self, name))
            writer.finish(self._facts())

    @classmethod
    def load(cls, folder: str | PathLike[str], *, mmap: bool = True) -> PackResult:
        """Read a plan that `save` wrote.

        Args:
            folder: where it is.
            mmap: leave the arrays on disk, read-only, until they are looked at.

        Raises:
            FileNotFoundError: if there is no plan in the folder, or an array of it is missing.
            ValueError: if a file of it is damaged, of another version, or a plan of pairs where
                there should be one of sequences, or the other way round.
        """
        facts, arrays = read_plan(folder, mmap)
        contents: dict[str, Any] = {**facts, **arrays}
        kind = contents.pop("kind", cls.__name__)
        if kind != cls.__name__:
            raise ValueError(
                f"{folder} holds a {kind}: load it by {kind}.load, not {cls.__name__}'s"
            )
        try:
            plan = cls(**contents)
            whole = plan._is_whole()
        except (TypeError, IndexError) as error:
            raise ValueError(f"{folder} is no whole plan: {error}") from error
        if not whole:
            raise ValueError(f"{folder} is no whole plan: its arrays do not belong together")
        return plan

    def _is_whole(self) -> bool:
        """Whether the arrays are as long as one another says; their values are trusted."""
        return (
            len(self.items) == len(self.item_lengths)
            and self.offsets[0] == 0
            and self.offsets[-1] == len(self.items)
            and self.items.dtype.kind == self.offsets.dtype.kind == "i"
        )

    def _facts(self) -> dict[str, Any]:
        names = (*self.NUMBERS, "strategy", "seed", "seconds")
        return {"kind": type(self).__name__, **{name: getattr(self, name) for name in names}}


def merge_results(results: Sequence[PackResult]) -> PackResult:
    """One plan of several, of consecutive shards of the sequences.

    The ids of a shard go on where those of the one before it ended, and so do the bins.

    Raises:
        TypeError: if one is a plan of pairs; those are planned whole.
        ValueError: if there is none, or capacities differ.
    """
    if not results:
        raise ValueError("results must be at least one plan, got none")
    for result in results:
        if type(result) is not PackResult:
            raise TypeError(f"results must be of type PackResult, got {type(result).__name__}")
    capacities = sorted({result.capacity for result in results})
    if len(capacities) > 1:
        raise ValueError(f"results must have one capacity, got {capacities}")
    first_ids = offsets_of([result.num_sequences for result in results])
    first_items = offsets_of([len(result.items) for result in results])

    def shifted(name: str) -> NDArray[np.int64]:
        return np.concatenate([getattr(r, name) + at for r, at in zip(results, first_ids)])

    starts = None
    if any(result.item_starts is not None for result in results):
        none = [np.zeros(len(result.items), np.int64) for result in results]
        starts = np.concatenate(
            [zeros if r.item_starts is None else r.item_starts for r, zeros in zip(results, none)]
        )
    offsets = [result.offsets[:-1] + at for result, at in zip(results, first_items)]
    strategies = {result.strategy for result in results}
    return PackResult(
        items=shifted("items"),
        offsets=np.concatenate([*offsets, first_items[-1:]]),
        item_lengths=np.concatenate([result.item_lengths for result in results]),
        item_starts=starts,
        capacity=capacities[0],
        strategy=strategies.pop() if len(strategies) == 1 else "several",
        num_sequences=int(first_ids[-1]),
        dropped=shifted("dropped"),
        truncated=shifted("truncated"),
        split=shifted("split"),
        seconds=sum(result.seconds for result in results),
    )
