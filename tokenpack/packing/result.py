"""A plan: which sequences share a bin, and how full the bins are.

A plan is two flat arrays, ``items`` and ``offsets``. A bin is a slice of ``items``. A saved plan is
read back memory-mapped, so plans of a hundred million sequences need not fit in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from ..segments import offsets_of, segment_sum
from .saving import PlanWriter, read_plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class PackMetrics(NamedTuple):
    """How full the bins of a plan are, and how long planning took.

    Attributes:
        num_sequences: number of input sequences, including dropped ones.
        num_bins: number of bins.
        tokens: tokens in all bins.
        padding: slots in all bins without a token.
        efficiency: ``tokens / (tokens + padding)``.
        utilization_mean, utilization_std, utilization_min, utilization_max: statistics over bins of
            the share of slots that hold a token.
        sequences_per_bin: mean number of items in a bin.
        dropped, truncated, split: number of sequences dropped, truncated to the capacity, and split
            into several items.
        seconds: planning time; 0 if it was not measured.
        sequences_per_second: ``num_sequences / seconds``; 0 if the time was not measured.
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
    """A plan, as a sequence of bins: ``result[b]`` holds the items of bin b.

    Attributes:
        items: ``(num_items,)`` int64, ids of the sequences, bin after bin. With
            ``overlong="split"`` a sequence may occur several times.
        offsets: ``(num_bins + 1,)`` int64; bin b is ``items[offsets[b]:offsets[b + 1]]``.
        item_lengths: ``(num_items,)`` integers, tokens of each item.
        item_starts: ``(num_items,)`` int64, the token of its sequence at which each item begins.
            None if all items begin at token 0.
        capacity: tokens that fit in a bin.
        strategy: short name of the strategy that ran.
        num_sequences: number of input sequences, including dropped ones.
        dropped: ids of the dropped sequences, increasing.
        truncated: ids of the sequences truncated to the capacity, increasing.
        split: ids of the sequences split into several items, increasing.
        seed: seed of the shuffle, or None if the strategy does not shuffle.
        seconds: planning time.
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

    # The fields that equality compares. A saved plan holds them too.
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
            return [self[b] for b in range(*index.indices(len(self)))]
        b = range(len(self))[index]  # handles negative indices and raises IndexError
        return self.items[self.offsets[b] : self.offsets[b + 1]]

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        bounds = self.offsets.tolist()
        return (self.items[start:end] for start, end in zip(bounds, bounds[1:]))

    def __eq__(self, other: object) -> bool:
        """Whether both plans put the same items into the same bins. Planning time is ignored."""
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
        """The number of bins."""
        return len(self)

    @property
    def bins(self) -> list[NDArray[np.int64]]:
        """The sequence ids of each bin, as views of ``items``."""
        return list(self)

    @property
    def bin_tokens(self) -> NDArray[np.int64]:
        """``(num_bins,)`` int64, tokens in each bin."""
        return segment_sum(self.item_lengths, self.offsets, np.int64)

    @property
    def efficiency(self) -> float:
        """Share of the bins' slots that hold a token."""
        return int(self.item_lengths.sum(dtype=np.int64)) / max(len(self) * self.capacity, 1)

    @property
    def metrics(self) -> PackMetrics:
        """How full the bins are, and how long planning took."""
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
        """Draw histograms of the packed lengths and of how full the bins are. Needs matplotlib.

        Args:
            path: also save the figure here, as an image of the type that the extension names.
        """
        from .figure import plot_plan  # matplotlib is an extra

        title = (
            f"{self.strategy}: {self.num_sequences:,} sequences in {self.num_bins:,} bins of "
            f"{self.capacity:,}, {self.efficiency:.2%} filled"
        )
        figure = plot_plan(self.item_lengths, self.bin_tokens, self.capacity, title)
        if path is not None:
            figure.savefig(path)
        return figure

    def save(self, folder: str | PathLike[str]) -> None:
        """Write the plan to a folder, as one ``.npy`` file per array and ``plan.json``.

        Raises:
            FileExistsError: if the folder already contains a plan.
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
            folder: the folder of the plan.
            mmap: memory-map the arrays, read-only, instead of reading them into memory.

        Raises:
            FileNotFoundError: if the folder contains no plan, or one of its arrays is missing.
            ValueError: if a file is damaged or has another format version, or if the plan is of
                another class (a plan of pairs loaded as a plan of sequences, or the reverse).
        """
        facts, arrays = read_plan(folder, mmap)
        contents: dict[str, Any] = {**facts, **arrays}
        kind = contents.pop("kind", cls.__name__)
        if kind != cls.__name__:
            raise ValueError(
                f"folder must contain a {cls.__name__}, got a {kind} in {folder}; use {kind}.load"
            )
        try:
            plan = cls(**contents)
            consistent = plan._is_consistent()
        except (TypeError, IndexError) as error:
            raise ValueError(
                f"folder must contain a complete plan, got {folder}: {error}"
            ) from error
        if not consistent:
            raise ValueError(
                f"folder must contain a complete plan, got arrays of inconsistent sizes in {folder}"
            )
        return plan

    def _is_consistent(self) -> bool:
        """Whether the sizes and dtypes of the arrays match. Other values are not checked."""
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
    """Merge plans of consecutive shards of the sequences into one plan.

    The ids of a shard continue after those of the previous shard, and so do the bins.

    Raises:
        TypeError: if a result is a plan of pairs. Those cannot be planned in shards.
        ValueError: if there are no results, or capacities differ.
    """
    if not results:
        raise ValueError("results must contain at least one plan, got none")
    for result in results:
        if type(result) is not PackResult:
            raise TypeError(f"results must be of type PackResult, got {type(result).__name__}")
    capacities = sorted({result.capacity for result in results})
    if len(capacities) > 1:
        raise ValueError(f"results must have one capacity, got {capacities}")
    with_starts = any(result.item_starts is not None for result in results)
    first_ids = offsets_of([result.num_sequences for result in results])
    first_items = offsets_of([len(result.items) for result in results])
    arrays: dict[str, Any] = {
        name: np.concatenate(
            [renumbered(r, name, *firsts) for r, *firsts in zip(results, first_ids, first_items)]
        )
        for name in merged_arrays(with_starts)
    }
    arrays["offsets"] = np.append(0, arrays["offsets"])
    return PackResult(
        **arrays,
        capacity=capacities[0],
        strategy=common_strategy({result.strategy for result in results}),
        num_sequences=int(first_ids[-1]),
        seconds=sum(result.seconds for result in results),
    )


def merged_arrays(with_starts: bool) -> list[str]:
    """Return the names of the arrays of a merged plan."""
    return [name for name in PackResult.ARRAYS if with_starts or name != "item_starts"]


def renumbered(plan: PackResult, name: str, first_id: int, first_item: int) -> NDArray[Any]:
    """Return one array of a shard's plan, renumbered to follow the shards before it.

    Those have ``first_id`` sequences and ``first_item`` items. ``offsets`` leaves out the first,
    which is the last of the shard before.
    """
    if name == "offsets":
        return plan.offsets[1:] + first_item
    if name == "item_lengths":
        return plan.item_lengths
    if name == "item_starts":
        return np.zeros_like(plan.items) if plan.item_starts is None else plan.item_starts
    return getattr(plan, name) + first_id


def common_strategy(names: set[str]) -> str:
    """Return the one name in a set of strategies, or "several"."""
    return next(iter(names)) if len(names) == 1 else "several"
