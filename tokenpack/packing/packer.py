"""Lengths to bins: which strategy plans, and what happens to what does not fit.

    pack_lengths(lengths, capacity=2048).bins

A strategy is a function of checked lengths, `Plan` its answer; everything a user may pass beside
(what is too long or empty, windows, seeds) is dealt with here, once for all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checks import at_least_one, check_seed, optional_at_least_one
from ..segments import distinct_lengths, shuffled
from . import arrival, best_fit, decreasing, rounds
from .arrival import Plan
from .lengths import Lengths, as_lengths, check_overlong, fit
from .result import PackResult

# What a move of `best_fit` costs beside a sequence in `rounds`, so that `auto` takes the faster.
_SEQUENCES_PER_LENGTH = 50
_SAMPLE = 10_000  # sequences that it looks at for how many lengths there are
_SMALL = 2000  # sequences, below which `obfd` takes a millisecond at most
_WASTEFUL = 1.005  # bins over the least there can be, above which `auto` tries `obfd` too


class Strategy(NamedTuple):
    """One way to plan.

    Attributes:
        short: short name, ``"obfd"``.
        name: the textbook's, ``"optimized_best_fit_decreasing"``.
        plan: ``(lengths, capacity, max_sequences) -> (items, offsets)``.
        about: what it does, in a line.
        shuffles: whether it takes the sequences in random order, by the seed.
    """

    short: str
    name: str
    plan: Callable[[NDArray[np.integer], int, int | None], Plan]
    about: str
    shuffles: bool = False


_STRATEGIES = (
    Strategy("nf", "next_fit", arrival.next_fit, "one open bin; order is kept"),
    Strategy("ff", "first_fit", arrival.first_fit, "as they come, the first bin with room"),
    Strategy("bf", "best_fit", arrival.best_fit, "as they come, the fullest bin with room"),
    Strategy("wf", "worst_fit", arrival.worst_fit, "as they come, the emptiest open bin"),
    Strategy(
        "ffd", "first_fit_decreasing", decreasing.first_fit_decreasing, "ff from the longest on"
    ),
    Strategy("bfd", "best_fit_decreasing", best_fit.best_fit_decreasing, "bf from the longest on"),
    Strategy("ffs", "first_fit_shuffle", arrival.first_fit, "ff in random order", True),
    Strategy(
        "mffd",
        "modified_first_fit_decreasing",
        decreasing.modified_first_fit_decreasing,
        "ffd that pairs long ones with care first",
    ),
    Strategy(
        "obfd",
        "optimized_best_fit_decreasing",
        best_fit.best_fit_decreasing,
        "bfd over a histogram of lengths; here bfd is the same",
    ),
    Strategy(
        "obfdp",
        "parallel_best_fit_decreasing",
        rounds.best_fit_in_rounds,
        "bfd for all bins at once, in rounds",
    ),
    Strategy("hk", "harmonic", arrival.harmonic, "as they come, like lengths together"),
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
    """Plan which sequences share which bin.

    Args:
        lengths: tokens of each sequence: any integer array or sequence, a torch CPU tensor, an
            Arrow or datasets column.
        capacity: tokens that a bin holds, at least 1.
        strategy: a short or a textbook's name (`Packer.strategies`), or "auto": ``obfd`` where
            sequences are few or their lengths repeat, else ``obfdp``, and ``obfd`` all the same
            where the latter needs 0.5 % more bins than tokens demand at the least. The result says
            which it was.
        seed: of the shuffle, where the strategy shuffles. None is 0: ranks that plan for themselves
            must plan alike. The same input and seed give the same bins on every machine.
        max_sequences: how many sequences a bin may hold, if there is a limit.
        window: let sequences share a bin only within this many that follow one another, and keep
            the windows in order, so that a shuffle or a curriculum survives.
        overlong: what to do with a sequence over capacity: raise an "error", "truncate" it, "split"
            it into pieces that are packed by themselves, or "drop" it. The result counts them.
        drop_empty: leave out sequences without tokens; else they are an error.

    Returns:
        The plan.

    Raises:
        TypeError: if lengths or a limit are no integers.
        ValueError: if a length is negative, 0 or over capacity and nothing was said about it, a
            limit is below 1, or a name is unknown.
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
    """Plans with one set of options again and again; they are those of `pack_lengths`.

    Attributes:
        capacity: tokens that a bin holds.
        strategy: short name of the strategy, or "auto".
        seed: what a shuffle is seeded with.
        overlong: what is done with a sequence over capacity.
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
        """All that decides about bins."""
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
        """Short names of all strategies, and what each does."""
        return {s.short: f"{s.name}: {s.about}" for s in _STRATEGIES}

    def pack(self, lengths: Lengths) -> PackResult:
        """Plan which sequences share which bin; see `pack_lengths`."""
        result = self.pack_some(lengths)
        if not len(result):
            raise ValueError(
                f"lengths: no sequence is left of {result.num_sequences}, all were dropped"
            )
        return result

    def pack_some(self, lengths: Lengths) -> PackResult:
        """`pack`, but a plan without bins where all sequences were dropped."""
        begin = time.perf_counter()
        _keep_freed_memory()
        given = as_lengths(lengths)
        pieces = fit(given, self.capacity, self.overlong, self._drop_empty, "lengths")
        compact = pieces.lengths.astype(np.min_scalar_type(self.capacity))  # 2 bytes each, mostly
        items, offsets, strategy = self._plan(compact)
        result = PackResult(
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
        return result

    def pack_flat(self, lengths: Lengths) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`pack`, as the two arrays alone: ``items`` and ``offsets`` (see `PackResult`)."""
        result = self.pack(lengths)
        return result.items, result.offsets

    def drops(self, lengths: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Which of these the packer leaves out, as it was told to."""
        dropped = (lengths > self.capacity) & (self.overlong == "drop")
        return dropped | ((lengths == 0) & self._drop_empty)

    def _plan(
        self, lengths: NDArray[np.integer]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], str]:
        """``items, offsets`` and what planned them, window by window."""
        if not len(lengths):
            return np.empty(0, np.int64), np.zeros(1, np.int64), self.strategy
        window = self._window or len(lengths)
        firsts = range(0, len(lengths), window)  # of sequences, and so of items
        planned = [self._plan_window(lengths[first : first + window], first) for first in firsts]
        if len(planned) == 1:
            return planned[0]
        items = np.concatenate([items + first for (items, _, _), first in zip(planned, firsts)])
        offsets = [offsets[:-1] + first for (_, offsets, _), first in zip(planned, firsts)]
        names = {name for _, _, name in planned}
        return (
            items,
            np.append(np.concatenate(offsets), len(items)),
            names.pop() if len(names) == 1 else "several",
        )

    def _plan_window(
        self, lengths: NDArray[np.integer], first: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], str]:
        if self._chosen is None:
            return _plan_fast(lengths, self.capacity, self._max_sequences)
        if self._chosen.shuffles:
            order = shuffled(len(lengths), self.seed + first)
            lengths = lengths[order]
        items, offsets = self._chosen.plan(lengths, self.capacity, self._max_sequences)
        return order[items] if self._chosen.shuffles else items, offsets, self._chosen.short


def find_strategy(name: str) -> Strategy:
    """The strategy of a short or a textbook's name.

    Raises:
        ValueError: if there is none, listing those there are.
    """
    found = _BY_NAME.get(str(name).lower().replace("-", "_").replace(" ", "_"))
    if found is None:
        known = ", ".join(f"{s.short} ({s.name})" for s in _STRATEGIES)
        raise ValueError(f"strategy must be auto or one of {known}; got {name!r}")
    return found


@cache
def _keep_freed_memory() -> None:
    """Have the C library keep what is freed for the next array; once a process.

    glibc maps each large array anew, and hands it back, until an array as large was freed once. A
    planner's arrays are short-lived, and a third of its time would go into fresh pages. So one of
    30 MB is allocated and freed, without ever being touched: 10 µs, no memory. Other allocators do
    not mind.
    """
    np.empty(30 << 20, np.uint8)


def _plan_fast(
    lengths: NDArray[np.integer], capacity: int, max_sequences: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], str]:
    """What `auto` does: ``obfd`` pays by distinct lengths up to half the capacity, or ``obfdp``."""
    shareable = capacity // 2
    few = len(lengths) < _SMALL
    if not few and len(lengths) < _SEQUENCES_PER_LENGTH * shareable:  # else no need to look
        some, _ = distinct_lengths(lengths[:: -(-len(lengths) // _SAMPLE)])
        shareable = int(np.searchsorted(some, shareable, side="right"))
    if not few and len(lengths) < _SEQUENCES_PER_LENGTH * shareable:
        items, offsets = rounds.best_fit_in_rounds(lengths, capacity, max_sequences)
        alone = int(np.count_nonzero(lengths > capacity // 2))
        fewest = max(alone, -(-int(lengths.sum(dtype=np.int64)) // capacity))
        if max_sequences is not None:
            fewest = max(fewest, -(-len(lengths) // max_sequences))
        if len(offsets) - 1 <= _WASTEFUL * fewest:
            return items, offsets, "obfdp"
        other_items, other_offsets = best_fit.best_fit_decreasing(lengths, capacity, max_sequences)
        if len(offsets) <= len(other_offsets):
            return items, offsets, "obfdp"
        return other_items, other_offsets, "obfd"
    return *best_fit.best_fit_decreasing(lengths, capacity, max_sequences), "obfd"
