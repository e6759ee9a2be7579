"""Bins with two capacities, for the source and target tokens of encoder-decoder models.

    sum of source lengths <= source_capacity   and   sum of target lengths <= target_capacity

This is two-dimensional vector bin packing, in rounds as in `rounds`. While there are many pairs,
each bin takes one of the next longest pairs. The pairs with the most source tokens relative to
target tokens go to the bins with the fewest, so that both sides fill evenly. Later rounds look for
tight fits on one side (in turn source, target, and the fuller of the two) and place the pairs that
fit on the other side too. If the plan needs more than 1.02 times the lower bound on the number of
bins, first-fit decreasing runs as well, and the better plan is used.

Loads are integers in common units: a source token counts target_capacity, a target token counts
source_capacity, and a side is full at the product of both.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..checks import at_least_one, optional_at_least_one
from ..segments import Plan, group_by_bin, segment_sum
from .lengths import Lengths, as_lengths, fit
from .result import PackResult
from .rounds import strictly_increasing

_PATIENCE = 6  # consecutive rounds with few placements before bins are opened: two for each side
_FEW = 0.01  # few placements, relative to the number of open bins
_WASTEFUL = 1.02  # number of bins relative to the lower bound above which first fit is tried too
_FIRST_FIT_PAIRS = 10_000  # pairs that first fit plans together
_BLOCK = 512  # bins per NumPy call of first fit


@dataclass(frozen=True, eq=False, repr=False)
class PairPackResult(PackResult):
    """A plan of pairs: a `PackResult` for the sources, with the lengths of the targets.

    Attributes:
        item_target_lengths: ``(num_items,)`` integers, target tokens of each item.
        target_capacity: target tokens that fit in a bin.
    """

    item_target_lengths: NDArray[np.integer] = field(default_factory=lambda: np.empty(0, np.int64))
    target_capacity: int = 0

    ARRAYS: ClassVar[tuple[str, ...]] = (*PackResult.ARRAYS, "item_target_lengths")
    NUMBERS: ClassVar[tuple[str, ...]] = (*PackResult.NUMBERS, "target_capacity")

    def _is_consistent(self) -> bool:
        return super()._is_consistent() and len(self.item_target_lengths) == len(self.items)

    @property
    def bin_target_tokens(self) -> NDArray[np.int64]:
        """``(num_bins,)`` int64, target tokens in each bin."""
        return segment_sum(self.item_target_lengths, self.offsets, np.int64)

    @property
    def target_efficiency(self) -> float:
        """Share of the target slots that hold a token. `efficiency` is that of the source slots."""
        return int(self.bin_target_tokens.sum()) / (len(self) * self.target_capacity)


def pack_pairs(
    source_lengths: Lengths,
    target_lengths: Lengths,
    source_capacity: int,
    target_capacity: int,
    *,
    max_sequences: int | None = None,
    overlong: str = "error",
    drop_empty: bool = False,
) -> PairPackResult:
    """Plan which pairs share a bin, with a capacity for each side.

    On log-normal lengths the plan needs at most about 1 % more bins than the lower bound from the
    number of tokens, and takes a second for a million pairs. If it needs over 2 % more, first-fit
    decreasing runs too, which takes half a minute for a million pairs.

    Args:
        source_lengths: ``(n,)`` integers in any form, as in `pack_lengths`.
        target_lengths: the same for the targets.
        source_capacity: source tokens that fit in a bin.
        target_capacity: target tokens that fit in a bin.
        max_sequences: the largest number of pairs in a bin, or None for no limit.
        overlong: what to do with a pair if either side is over capacity: raise an "error",
            "truncate" that side, or "drop" the pair.
        drop_empty: leave out pairs with an empty side. If False, they are an error.

    Returns:
        The plan. Its strategy is "pairs".

    Raises:
        TypeError: if the lengths or a limit are not integers.
        ValueError: if the numbers of lengths differ; if a length is negative; if it is 0 or over
            capacity and the options do not allow that; if a limit is below 1; or if ``overlong`` is
            "split", which cannot be applied to pairs.
    """
    begin = time.perf_counter()
    capacities = (
        at_least_one("source_capacity", source_capacity),
        at_least_one("target_capacity", target_capacity),
    )
    limit = optional_at_least_one("max_sequences", max_sequences)
    names = ("source_lengths", "target_lengths")
    sides = [as_lengths(source_lengths, names[0]), as_lengths(target_lengths, names[1])]
    if len(sides[0]) != len(sides[1]):
        raise ValueError(
            "source_lengths and target_lengths must have the same size, "
            f"got {len(sides[0])} and {len(sides[1])}"
        )
    if overlong == "split":
        raise ValueError('overlong must be "error", "truncate" or "drop" for pairs, got "split"')
    pieces = [
        fit(side, capacity, overlong, drop_empty, name)
        for side, capacity, name in zip(sides, capacities, names)
    ]
    dropped = np.union1d(pieces[0].dropped, pieces[1].dropped)
    kept = np.delete(np.arange(len(sides[0])), dropped)
    if not len(kept):
        raise ValueError(
            "source_lengths must contain a pair that is not dropped, got "
            f"{len(sides[0])} pairs, all dropped"
        )
    source, target = (
        np.minimum(side[kept].astype(np.int64), capacity)
        for side, capacity in zip(sides, capacities)
    )
    items, offsets = _plan(source, target, *capacities, limit)
    truncated = np.union1d(pieces[0].truncated, pieces[1].truncated)
    return PairPackResult(
        items=kept[items],
        offsets=offsets,
        item_lengths=source[items],
        item_target_lengths=target[items],
        capacity=capacities[0],
        target_capacity=capacities[1],
        strategy="pairs",
        num_sequences=len(sides[0]),
        dropped=dropped,
        truncated=np.setdiff1d(truncated, dropped),
        seconds=time.perf_counter() - begin,
    )


def _plan(
    source: NDArray[np.int64],
    target: NDArray[np.int64],
    source_capacity: int,
    target_capacity: int,
    limit: int | None,
) -> Plan:
    full = source_capacity * target_capacity
    loads = np.stack([source * target_capacity, target * source_capacity])  # [2, n]
    order = (-loads.max(0)).argsort(kind="stable")
    loads = loads[:, order]
    limit = len(order) if limit is None else limit
    # Two pairs that both fill over half of one side never share a bin.
    fewest = max(_fewest(loads, full, limit), int((loads > full // 2).sum(1).max()))
    bin_of, num_bins = _in_rounds(loads, full, limit, fewest)
    if num_bins > _WASTEFUL * fewest:
        other, other_bins = _first_fit(loads, full, limit)
        if other_bins < num_bins:
            bin_of, num_bins = other, other_bins
    return group_by_bin(bin_of, num_bins, order)


def _first_fit(loads: NDArray[np.int64], full: int, limit: int) -> tuple[NDArray[np.int64], int]:
    """Put each pair, from the longest to the shortest, into the first bin with space for it.

    This is a Python loop over pairs. To keep the time linear, many pairs are planned in p separate
    parts: part i holds the pairs i, i + p, i + 2p, and so on.
    """
    parts = -(-loads.shape[1] // _FIRST_FIT_PAIRS)
    bin_of = np.empty(loads.shape[1], np.int64)
    num_bins = 0
    for part in range(parts):
        numbers, opened = _first_fit_part(loads[:, part::parts], full, limit)
        bin_of[part::parts] = numbers + num_bins
        num_bins += opened
    return bin_of, num_bins


def _first_fit_part(
    loads: NDArray[np.int64], full: int, limit: int
) -> tuple[NDArray[np.int64], int]:
    # Bins are in blocks. A pair that exceeds the largest free space of a block on either side fits
    # none of its bins.
    blocks = -(-loads.shape[1] // _BLOCK)
    free = np.full((2, blocks, _BLOCK), full)
    largest = np.full((2, blocks), full)
    quota = np.full((blocks, _BLOCK), limit)  # pairs that each bin may still take
    bin_of = []
    for source, target in loads.T.tolist():
        for block in np.flatnonzero((largest[0] >= source) & (largest[1] >= target)).tolist():
            fits = (free[0, block] >= source) & (free[1, block] >= target)
            index = int(fits.argmax())
            if fits[index]:
                break
        bin_of.append(block * _BLOCK + index)
        quota[block, index] -= 1
        taken = (source, target) if quota[block, index] else (full + 1, full + 1)
        free[:, block, index] -= taken
        largest[:, block] = free[:, block].max(1)
    return np.array(bin_of), max(bin_of) + 1


def _in_rounds(
    loads: NDArray[np.int64], full: int, limit: int, fewest: int
) -> tuple[NDArray[np.int64], int]:
    """Return the bin of each pair and the number of bins. Pairs are sorted longest first."""
    bins = _Bins(full, limit)
    bins.open(fewest)
    bin_of = np.empty(loads.shape[1], np.int64)
    left = np.arange(loads.shape[1])
    balancing, rounds_with_few, side = True, 0, 0
    while len(left):
        balancing = balancing and len(left) > 2 * len(bins.number)
        if balancing:
            which, pairs = bins.balanced_fits(loads[:, left])
        else:
            which, pairs = bins.tight_fits(loads[:, left], side)
            side = (side + 1) % 3
        fits = bins.have_space(which, loads[:, left[pairs]])
        if balancing and 2 * np.count_nonzero(fits) < len(fits):
            balancing = False
        which, pairs = which[fits], pairs[fits]
        bins.add(which, loads[:, left[pairs]])
        bin_of[left[pairs]] = bins.number[which]
        left = np.delete(left, pairs)
        many = len(pairs) > _FEW * len(bins.number)
        rounds_with_few = 0 if many else rounds_with_few + 1
        if len(left) and (rounds_with_few == _PATIENCE or not len(bins.number)):
            bins.close_full(loads[:, left].min(1))
            bins.open(_fewest(loads[:, left], full, limit))
            rounds_with_few = 0
    return bin_of, bins.num_opened


def _fewest(loads: NDArray[np.int64], full: int, limit: int) -> int:
    """Return a lower bound on the number of bins."""
    # Sums of loads may exceed int64, so sum shares of a bin.
    shares = (loads / full).sum(1).max()
    return max(1, int(np.ceil(shares - 1e-6)), -(-loads.shape[1] // limit))


class _Bins:
    """The open bins: their numbers, ``(2, num_open)`` loads, and pairs that each may still take."""

    def __init__(self, full: int, limit: int) -> None:
        self.full, self.limit, self.num_opened = full, limit, 0
        self.number = self.quota = np.empty(0, np.int64)
        self.loads = np.empty((2, 0), np.int64)

    def open(self, count: int) -> None:
        new = np.arange(self.num_opened, self.num_opened + count)
        self.num_opened += count
        self.number = np.concatenate((self.number, new))
        self.quota = np.concatenate((self.quota, np.full(count, self.limit)))
        self.loads = np.concatenate((self.loads, np.zeros((2, count), np.int64)), axis=1)

    def close_full(self, smallest: NDArray[np.int64]) -> None:
        """Close bins without space for the smallest load of each side, or without quota."""
        kept = ((self.loads + smallest[:, None]) <= self.full).all(0) & (self.quota > 0)
        self.number, self.quota = self.number[kept], self.quota[kept]
        self.loads = self.loads[:, kept]

    def add(self, which: NDArray[np.int64], loads: NDArray[np.int64]) -> None:
        """Add one pair to each of these bins. No bin may occur twice."""
        self.loads[:, which] += loads
        self.quota[which] -= 1

    def have_space(self, which: NDArray[np.int64], loads: NDArray[np.int64]) -> NDArray[np.bool_]:
        return ((self.loads[:, which] + loads) <= self.full).all(0) & (self.quota[which] > 0)

    def balanced_fits(
        self, loads: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Match bins with the next pairs: the least source-heavy with the most source-heavy."""
        which = (self.loads[0] - self.loads[1]).argsort(kind="stable")
        pairs = (loads[1, : len(which)] - loads[0, : len(which)]).argsort(kind="stable")
        return which, pairs

    def tight_fits(
        self, loads: NDArray[np.int64], side: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """From the emptiest bin on, match each with the longest pair left that fits on one side.

        Side 0 is the source, 1 the target, and 2 the larger load of both.
        """
        fill, size = (
            (self.loads.max(0), loads.max(0)) if side == 2 else (self.loads[side], loads[side])
        )
        which, pairs = fill.argsort(kind="stable"), (-size).argsort(kind="stable")
        taken = strictly_increasing(np.searchsorted(self.full - size[pairs], fill[which]))
        taken = taken[: np.searchsorted(taken, len(pairs))]
        return which[: len(taken)], pairs[taken]
