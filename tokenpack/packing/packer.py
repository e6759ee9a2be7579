"""Pack lengths into bins with a choice of strategies.

    pack_lengths(lengths, capacity=2048).bins

A strategy maps checked lengths to a `Plan`. All other options (overlong and empty sequences,
windows, seeds) are handled here, once for all strategies.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checks import at_least_one, check_seed, optional_at_least_one
from ..segments import Plan, length_histogram, random_permutation
from . import best_fit, decreasing, online, rounds
from .lengths import Lengths, as_lengths, check_overlong, fit
from .result import PackResult, common_strategy

# Thresholds of "auto".
_SEQUENCES_PER_LENGTH = 50  # a distinct length in `best_fit` costs as much as these in `rounds`
_SAMPLE = 10_000  # sequences sampled to estimate the number of distinct lengths
_SMALL = 2000  # up to this many sequences, `obfd` takes a millisecond at most
_WASTEFUL = 1.005  # number of bins relative to the lower bound above which `obfd` is tried too


class Strategy(NamedTuple):
    """A packing strategy.

    Attributes:
        short: short name, such as ``"obfd"``.
        name: textbook name, such as ``"optimized_best_fit_decreasing"``.
        plan: ``(lengths, capacity, max_sequences) -> (items, offsets)``.
        description: what the strategy does, in one line.
        shuffles: whether the sequences are shuffled by the seed first.
    """

    short: str
    name: str
    plan: Callable[[NDArray[np.integer], int, int | None], Plan]
    description: str
    shuffles: bool = False


_STRATEGIES = (
    Strategy("nf", "next_fit", online.next_fit, "one open bin; keeps the input order"),
    Strategy("ff", "first_fit", online.first_fit, "in input order, the first bin with space"),
    Strategy("bf", "best_fit", online.best_fit, "in input order, the fullest bin with space"),
    Strategy("wf", "worst_fit", online.worst_fit, "in input order, the emptiest open bin"),
    Strategy(
        "ffd",
        "first_fit_decreasing",
        decreasing.first_fit_decreasing,
        "ff from the longest to the shortest",
    ),
    Strategy(
        "bfd",
        "best_fit_decreasing",
        best_fit.best_fit_decreasing,
        "bf from the longest to the shortest",
    ),
    Strategy("ffs", "first_fit_shuffle", online.first_fit, "ff in random order", True),
    Strategy(
        "mffd",
        "modified_first_fit_decreasing",
        decreasing.modified_first_fit_decreasing,
        "ffd that fills the bins of the longest sequences first",
    ),
    Strategy(
        "obfd",
        "optimized_best_fit_decreasing",
        best_fit.best_fit_decreasing,
        "bfd over a histogram of lengths; the same as bfd here",
    ),
    Strategy(
        "obfdp",
        "parallel_best_fit_decreasing",
        rounds.best_fit_in_rounds,
        "bfd for all bins at once, in rounds",
    ),
    Strategy("hk", "harmonic", online.harmonic, "in input order, similar lengths together"),
)
_BY_NAME = {name: strategy for strategy in _STRATEGIES for name in (strategy.short, strategy.name)}
_BY_NAME |= {"harmonic_k": _BY_NAME["hk"]}


def pack_lengths(
    lengths: Lengths,
    capacity: int,
    strategy: str = "auto",
    seed: int | None = None,
    *,
    max_sequences: int | None = None,
    window: int | None = None,
    overlong: str = "error",
    drop_empty: bool = False,
) -> PackResult:
    """Plan which sequences share a bin.

    Args:
        lengths: ``(n,)`` integers, tokens of each sequence: a list or tuple, a NumPy array or
            memory map of any integer type and byte order, a torch CPU tensor of any integer type,
            an Arrow array or chunked array, a column of `datasets` in any format or with a
            transform, a pandas or polars series (docs/inputs.md).
        capacity: tokens that fit in a bin, at least 1.
        strategy: a short or textbook name (see `Packer.strategies`), or "auto". "auto" uses
            ``obfd`` if there are few sequences or their lengths repeat, and ``obfdp`` otherwise. If
            ``obfdp`` needs more than 1.005 times the lower bound on the number of bins, "auto" also
            tries ``obfd`` and returns the better plan. The result names the strategy used.
        seed: seed of the shuffle, for strategies that shuffle. None means 0, so that ranks that
            plan independently get the same plan. The same input and seed give the same bins on
            every machine.
        max_sequences: the largest number of sequences in a bin, or None for no limit.
        window: let sequences share a bin only within windows of this many consecutive sequences,
            and keep the order of the windows. This preserves a shuffle or a curriculum.
        overlong: what to do with a sequence over capacity: raise an "error", "truncate" it, "split"
            it into pieces that are packed separately, or "drop" it. The result counts them.
        drop_empty: leave out sequences of length 0. If False, they are an error.

    Returns:
        The plan.

    Raises:
        TypeError: if the lengths or a limit are not integers.
        ValueError: if a length is negative; if it is 0 or over capacity and the options do not
            allow that; if a limit is below 1; or if a name is unknown.
    """
    packer = Packer(
        capacity,
        strategy,
        seed,
        max_sequences=max_sequences,
        window=window,
        overlong=overlong,
        drop_empty=drop_empty,
    )
    return packer.pack(lengths)


class Packer:
    """Plans with one set of options, which are those of `pack_lengths`.

    Attributes:
        capacity: tokens that fit in a bin.
        strategy: short name of the strategy, or "auto".
        seed: seed of the shuffle.
        overlong: what to do with a sequence over capacity.
    """

    def __init__(
        self,
        capacity: int,
        strategy: str = "auto",
        seed: int | None = None,
        *,
        max_sequences: int | None = None,
        window: int | None = None,
        overlong: str = "error",
        drop_empty: bool = False,
    ) -> None:
        check_overlong(overlong)
        self.capacity = at_least_one("capacity", capacity)
        self._chosen = None if strategy == "auto" else find_strategy(strategy)
        self.seed = 0 if seed is None else check_seed(seed)
        self._max_sequences = optional_at_least_one("max_sequences", max_sequences)
        self._window = optional_at_least_one("window", window)
        self.overlong, self._drop_empty = overlong, drop_empty

    @property
    def strategy(self) -> str:
        """Short name of the strategy, or "auto"."""
        return "auto" if self._chosen is None else self._chosen.short

    @property
    def options(self) -> dict[str, Any]:
        """All options that affect the plan."""
        return {
            "capacity": self.capacity,
            "strategy": self.strategy,
            "seed": self.seed,
            "max_sequences": self._max_sequences,
            "window": self._window,
            "overlong": self.overlong,
            "drop_empty": self._drop_empty,
        }

    @staticmethod
    def strategies() -> dict[str, str]:
        """Return the short name and the description of each strategy."""
        return {s.short: f"{s.name}: {s.description}" for s in _STRATEGIES}

    def pack(self, lengths: Lengths) -> PackResult:
        """Plan which sequences share a bin; see `pack_lengths`."""
        result = self.pack_some(lengths)
        if not len(result):
            raise ValueError(
                "lengths must contain a sequence that is not dropped, got "
                f"{result.num_sequences} sequences, all dropped"
            )
        return result

    def pack_some(self, lengths: Lengths) -> PackResult:
        """Like `pack`, but return a plan without bins if all are dropped; see `pack_lengths`."""
        begin = time.perf_counter()
        _keep_freed_memory()
        given = as_lengths(lengths)
        pieces = fit(given, self.capacity, self.overlong, self._drop_empty, "lengths")
        compact = pieces.lengths.astype(np.min_scalar_type(self.capacity))  # usually 2 bytes each
        items, offsets, strategy = self._plan(compact)
        return PackResult(
            items=items if pieces.sequences is None else pieces.sequences[items],
            offsets=offsets,
            item_lengths=compact[items],
            item_starts=None if pieces.starts is None else pieces.starts[items],
            capacity=self.capacity,
            strategy=strategy,
            num_sequences=len(given),
            dropped=pieces.dropped,
            truncated=pieces.truncated,
            split=pieces.split,
            seed=self.seed if self._chosen is not None and self._chosen.shuffles else None,
            seconds=time.perf_counter() - begin,
        )

    def pack_flat(self, lengths: Lengths) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Like `pack`, but return only ``items`` and ``offsets``; see `pack_lengths`."""
        result = self.pack(lengths)
        return result.items, result.offsets

    def drops(self, lengths: Lengths) -> NDArray[np.bool_]:
        """``(n,)`` bool, True for sequences that are dropped; ``lengths`` as in `pack_lengths`."""
        given = as_lengths(lengths)
        dropped = (given > self.capacity) & (self.overlong == "drop")
        return dropped | ((given == 0) & self._drop_empty)

    def _plan(
        self, lengths: NDArray[np.integer]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], str]:
        """Plan window by window; return ``items``, ``offsets`` and the strategy used."""
        if not len(lengths):
            return np.empty(0, np.int64), np.zeros(1, np.int64), self.strategy
        window = self._window or len(lengths)
        firsts = range(0, len(lengths), window)  # the first sequence, and item, of each window
        planned = [self._plan_window(lengths[first : first + window], first) for first in firsts]
        if len(planned) == 1:
            return planned[0]
        items = np.concatenate([items + first for (items, _, _), first in zip(planned, firsts)])
        offsets = [offsets[:-1] + first for (_, offsets, _), first in zip(planned, firsts)]
        return (
            items,
            np.append(np.concatenate(offsets), len(items)),
            common_strategy({name for _, _, name in planned}),
        )

    def _plan_window(
        self, lengths: NDArray[np.integer], first: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], str]:
        if self._chosen is None:
            return _plan_auto(lengths, self.capacity, self._max_sequences)
        if self._chosen.shuffles:
            order = random_permutation(len(lengths), self.seed + first)
            lengths = lengths[order]
        items, offsets = self._chosen.plan(lengths, self.capacity, self._max_sequences)
        return order[items] if self._chosen.shuffles else items, offsets, self._chosen.short


def find_strategy(name: str) -> Strategy:
    """Return the strategy with a short or textbook name.

    Raises:
        ValueError: if there is no such strategy. The message lists all strategies.
    """
    found = _BY_NAME.get(str(name).lower().replace("-", "_").replace(" ", "_"))
    if found is None:
        known = ", ".join(f"{s.short} ({s.name})" for s in _STRATEGIES)
        raise ValueError(f"strategy must be auto or one of {known}, got {name!r}")
    return found


@cache
def _keep_freed_memory() -> None:
    """Make glibc reuse freed memory for large arrays. Runs once per process.

    glibc maps each large array separately and unmaps it when it is freed, until a mapped array of
    that size has been freed once. The arrays of a planner are short-lived, and page faults would
    take a third of its time. So this allocates and frees 30 MB without touching them, which takes
    10 µs and no memory. It has no effect on other allocators.
    """
    np.empty(30 << 20, np.uint8)


def _plan_auto(
    lengths: NDArray[np.integer], capacity: int, max_sequences: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], str]:
    """Plan with "auto"; see `pack_lengths`.

    ``obfd`` takes time per distinct length up to half the capacity, ``obfdp`` per sequence.
    """
    shareable = capacity // 2  # distinct lengths up to half the capacity, at most
    large = len(lengths) >= _SMALL
    if large and len(lengths) < _SEQUENCES_PER_LENGTH * shareable:
        sizes, _ = length_histogram(lengths[:: -(-len(lengths) // _SAMPLE)])
        shareable = int(np.searchsorted(sizes, shareable, side="right"))
    if not large or len(lengths) >= _SEQUENCES_PER_LENGTH * shareable:
        return *best_fit.best_fit_decreasing(lengths, capacity, max_sequences), "obfd"
    items, offsets = rounds.best_fit_in_rounds(lengths, capacity, max_sequences)
    over_half = int(np.count_nonzero(lengths > capacity // 2))
    fewest = max(over_half, -(-int(lengths.sum(dtype=np.int64)) // capacity))
    if max_sequences is not None:
        fewest = max(fewest, -(-len(lengths) // max_sequences))
    if len(offsets) - 1 <= _WASTEFUL * fewest:
        return items, offsets, "obfdp"
    other_items, other_offsets = best_fit.best_fit_decreasing(lengths, capacity, max_sequences)
    if len(offsets) <= len(other_offsets):
        return items, offsets, "obfdp"
    return other_items, other_offsets, "obfd"
