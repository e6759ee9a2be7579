"""Bins with two capacities, for encoder-decoder models: source tokens and target tokens.

    sum of source lengths <= source_capacity   and   sum of target lengths <= target_capacity

Two-dimensional vector bin packing, in rounds as in `rounds`. While pairs are many, the next longest
ones go one to each bin, those that are mostly source to the bins that hold mostly target, so that
both sides fill alike. At the end each round looks for tight fits on one side, in turn source,
target and the fuller of both, and takes those of them that fit on the other side too. Where that
needs 2 % more bins than there must be at the least, first-fit decreasing is tried as well, and the
better plan taken.

Loads are integers: a source token counts target_capacity, a target token source_capacity, and a
side is full at their product.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..checks import at_least_one, optional_at_least_one
from ..segments import group_by_bin
from .lengths import Lengths, as_lengths, fit
from .result import PackResult

_PATIENCE = 6  # rounds that place few, each side looked at twice, before bins are opened
_FEW = 0.01  # of the bins
_WASTEFUL = 1.02  # bins over the least there can be, above which first fit is tried too
_FIRST_FIT_PAIRS = 10_000  # planned together by it
_BLOCK = 512  # bins that it looks at together


@dataclass(frozen=True, eq=False, repr=False)
class PairPackResult(PackResult):
    """Pairs in bins: a `PackResult` of the sources, and the targets beside.

    Attributes:
        item_target_lengths: ``(num_items,)`` integers, target tokens of each item.
        target_capacity: target tokens that a bin holds.
    """

    item_target_lengths: NDArray[np.integer] = field(default_factory=lambda: np.empty(0, np.int64))
    target_capacity: int = 0

    ARRAYS: ClassVar[tuple[str, ...]] = (*PackResult.ARRAYS, "item_target_lengths")
    NUMBERS: ClassVar[tuple[str, ...]] = (*PackResult.NUMBERS, "target_capacity")

    def _is_whole(self) -> bool:
        return super()._is_whole() and len(self.item_target_lengths) == len(self.items)

    @property
    def bin_target_tokens(self) -> NDArray[np.int64]:
        """``(num_bins,)`` int64, target tokens in each bin."""
        return np.add.reduceat(self.item_target_lengths, self.offsets[:-1], dtype=np.int64)

    @property
    def target_efficiency(self) -> float:
        """Share of the bins' target slots that hold a token; `efficiency` is the sources'."""
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
    """Plan which pairs share which bin, so that neither side of a bin is over its capacity.

    On log-normal lengths it needs at most about 1 % more bins than tokens alone demand, and takes a
    second for a million pairs. Where it comes to more than 2 %, it also tries first-fit decreasing,
    which takes half a minute for a million.

    Args:
        source_lengths: ``(n,)`` integers, as in `pack_lengths`.
        target_lengths: ``(n,)`` integers.
        source_capacity: source tokens that a bin holds.
        target_capacity: target tokens that a bin holds.
        max_sequences: how many pairs a bin may hold, if there is a limit.
        overlong: what to do with a pair either side of which is over capacity: raise an "error",
            "truncate" that side, or "drop" the pair.
        drop_empty: leave out pairs a side of which has no token; else they are an error.

    Returns:
        The plan, of strategy "pairs".

    Raises:
        TypeError: if lengths or a limit are no integers.
        ValueError: if the numbers of lengths differ, one is negative, 0 or over capacity and
            nothing was said about it, or ``overlong`` is "split", which would part a pair.
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
            "source_lengths and target_lengths must be as many, "
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
        raise ValueError(f"source_lengths: no pair is left of {len(sides[0])}, all were dropped")
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
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    full = source_capacity * target_capacity
    loads = np.stack([source * target_capacity, target * source_capacity])  # [2, n]
    order = (-loads.max(0)).argsort(kind="stable")
    loads = loads[:, order]
    limit = len(order) if limit is None else limit
    # Of those over half a side's capacity, no two share a bin.
    fewest = max(_fewest(loads, full, limit), int((loads > full // 2).sum(1).max()))
    bin_of, num_bins = _in_rounds(loads, full, limit, fewest)
    if num_bins > _WASTEFUL * fewest:
        other, other_bins = _first_fit(loads, full, limit)
        if other_bins < num_bins:
            bin_of, num_bins = other, other_bins
    return group_by_bin(bin_of, num_bins, order)


def _first_fit(loads: NDArray[np.int64], full: int, limit: int) -> tuple[NDArray[np.int64], int]:
    """Each pair in turn into the first bin that it fits, so from the longest on: decreasing.

    A loop in Python over pairs, with bins in blocks: what the roomiest of a block on either side
    has no room for fits none of it. Many pairs go in parts, each of every so many-th pair, so that
    time is linear in their number.
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
    blocks = -(-loads.shape[1] // _BLOCK)
    rooms = np.full((2, blocks, _BLOCK), full)
    roomiest = np.full((2, blocks), full)
    allowed = np.full((blocks, _BLOCK), limit)
    bin_of = []
    for one, other in loads.T.tolist():
        for block in np.flatnonzero((roomiest[0] >= one) & (roomiest[1] >= other)).tolist():
            fits = (rooms[0, block] >= one) & (rooms[1, block] >= other)
            at = int(fits.argmax())
            if fits[at]:
                break
        bin_of.append(block * _BLOCK + at)
        allowed[block, at] -= 1
        taken = (one, other) if allowed[block, at] else (full + 1, full + 1)
        rooms[:, block, at] -= taken
        roomiest[:, block] = rooms[:, block].max(1)
    return np.array(bin_of), max(bin_of) + 1


def _in_rounds(
    loads: NDArray[np.int64], full: int, limit: int, fewest: int
) -> tuple[NDArray[np.int64], int]:
    """The bin of each pair, and how many there are; the pairs come from the longest."""
    bins = _Bins(full, limit)
    bins.open(fewest)
    bin_of = np.empty(loads.shape[1], np.int64)
    left = np.arange(loads.shape[1])
    dealing, since_many, side = True, 0, 0
    while len(left):
        dealing = dealing and len(left) > 2 * len(bins.number)
        if dealing:
            where, which = bins.evened_by(loads[:, left])
        else:
            where, which = bins.tight_fits(loads[:, left], side)
            side = (side + 1) % 3
        fits = bins.have_room(where, loads[:, left[which]])
        if dealing and 2 * np.count_nonzero(fits) < len(fits):
            dealing = False
        where, which = where[fits], which[fits]
        bins.put(where, loads[:, left[which]])
        bin_of[left[which]] = bins.number[where]
        left = np.delete(left, which)
        since_many = 0 if len(which) > _FEW * len(bins.number) else since_many + 1
        if len(left) and (since_many == _PATIENCE or not len(bins.number)):
            bins.close_full(loads[:, left].min(1))
            bins.open(_fewest(loads[:, left], full, limit))
            since_many = 0
    return bin_of, bins.opened


def _fewest(loads: NDArray[np.int64], full: int, limit: int) -> int:
    """Bins that these pairs need at least."""
    # Shares of a bin, since sums of loads may be past int64.
    shares = (loads / full).sum(1).max()
    return max(1, int(np.ceil(shares - 1e-6)), -(-loads.shape[1] // limit))


class _Bins:
    """Open bins: numbers ``(open,)``, loads ``(2, open)``, and pairs that each may still take."""

    def __init__(self, full: int, limit: int) -> None:
        self.full, self.limit, self.opened = full, limit, 0
        self.number = self.allowed = np.empty(0, np.int64)
        self.loads = np.empty((2, 0), np.int64)

    def open(self, count: int) -> None:
        new = np.arange(self.opened, self.opened + count)
        self.opened += count
        self.number = np.concatenate((self.number, new))
        self.allowed = np.concatenate((self.allowed, np.full(count, self.limit)))
        self.loads = np.concatenate((self.loads, np.zeros((2, count), np.int64)), axis=1)

    def close_full(self, smallest: NDArray[np.int64]) -> None:
        """Close those with no room for the smallest load of each side, or no pair allowed."""
        still = ((self.loads + smallest[:, None]) <= self.full).all(0) & (self.allowed > 0)
        self.number, self.allowed = self.number[still], self.allowed[still]
        self.loads = self.loads[:, still]

    def put(self, where: NDArray[np.int64], loads: NDArray[np.int64]) -> None:
        self.loads[:, where] += loads
        self.allowed[where] -= 1

    def have_room(self, where: NDArray[np.int64], loads: NDArray[np.int64]) -> NDArray[np.bool_]:
        return ((self.loads[:, where] + loads) <= self.full).all(0) & (self.allowed[where] > 0)

    def evened_by(self, loads: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """A bin each for the first pairs, the most of a source where there is least of it."""
        count = len(self.number)
        where = (self.loads[0] - self.loads[1]).argsort(kind="stable")
        which = (loads[1, :count] - loads[0, :count]).argsort(kind="stable")
        return where, which

    def tight_fits(
        self, loads: NDArray[np.int64], side: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """From the roomiest bin on, each takes the longest pair that fits it on one side."""
        held, size = (
            (self.loads.max(0), loads.max(0)) if side == 2 else (self.loads[side], loads[side])
        )
        where, which = held.argsort(kind="stable"), (-size).argsort(kind="stable")
        turn = np.arange(len(where))
        fitting = np.searchsorted(self.full - size[which], held[where])
        taken = np.fmax.accumulate(fitting - turn) + turn
        there = taken < len(which)
        return where[there], which[taken[there]]
