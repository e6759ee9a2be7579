"""Best-fit decreasing for all bins at once: rounds in which each bin takes what fits it.

The histogram of `best_fit` saves nothing where hardly two sequences have one length, and its moves
then cost more than the sort. Here the number of bins is guessed first, at the least there can be,
and each round gives every bin that still has room a sequence, or several. A round is a dozen NumPy
calls, and there are a dozen or two, so this is data-parallel: what threads or a GPU would do too.

    while bins have room for several of the longest sequence left:  deal them out in turn
    while sequences are many:   the roomiest bin takes the longest that fits, and so on down
    then:                       each sequence, from the longest, takes the fullest bin it fits in

The last rule is best fit, and there the tight fits are found. The plan is not best fit's, since a
bin takes one sequence a round. On log-normal, exponential and uniform lengths it needs as many bins
or up to 0.2 % more; where far more are needed than tokens demand, up to 7 % (docs/packing.md).

Sequences are held by their ceiling, ``capacity - length``: what a bin may be filled to and still
have room. Longest first, that rises, and so do the fills of bins from the emptiest.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..segments import group_by_bin, longest_first, stable_argsort

_ROOMY = 5  # deal to bins that have room for this many of the longest sequence
_MANY = 2.5  # sequences per bin, down to which tight fits are not looked for yet,
_FEW = 1.02  # and below which they are not needed: a bin each is enough


def best_fit_in_rounds(
    lengths: NDArray[np.integer], capacity: int, max_sequences: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pack by best-fit decreasing in rounds.

    Args:
        lengths: ``(n,)`` integers from 1 to ``capacity``.
        capacity: what a bin may hold.
        max_sequences: how many sequences a bin may hold, or None.

    Returns:
        ``items (n,)`` and ``offsets (num_bins + 1,)``, both int64; in a bin the longest is first.
    """
    order = longest_first(lengths)
    # Half the bytes: a capacity is below 2**31.
    ceilings = capacity - lengths[order].astype(np.int32)
    limit = len(order) if max_sequences is None else max_sequences
    bins = _Bins(capacity, max_sequences)
    alone = int(np.searchsorted(ceilings, capacity - capacity // 2))  # over half the capacity
    bins.open(max(alone, -(-int(lengths.sum(dtype=np.int64)) // capacity), -(-len(order) // limit)))
    bin_of = np.empty(len(order), np.int64)
    left = np.arange(len(order))
    while len(left):
        fitless = len(ceilings)
        if len(bins.fill):
            fitless = int(np.searchsorted(ceilings, bins.fill[0]))
        if fitless:
            total = capacity * fitless - int(ceilings[:fitless].sum(dtype=np.int64))
            bins.open(max(-(-total // capacity), -(-fitless // limit)))
        placed, where = _round(bins, ceilings, capacity)
        bin_of[left[placed]] = where
        left, ceilings = _without(placed, left, ceilings)
        if len(left):
            bins.tidy(int(ceilings[-1]))
    return group_by_bin(bin_of, bins.opened, order)


class _Bins:
    """The open bins from the emptiest: which they are, their fills, and what each may still take.

    Attributes:
        number: ``(open,)`` int64.
        fill: ``(open,)`` int32, tokens.
        allowed: ``(open,)`` int64, sequences; None without a limit.
        opened: how many were ever opened.
    """

    def __init__(self, capacity: int, limit: int | None) -> None:
        self.capacity, self.limit = capacity, limit
        self.opened = 0
        self.number = np.empty(0, np.int64)
        self.fill = np.empty(0, np.int32)
        self.allowed = None if limit is None else np.empty(0, np.int64)

    def open(self, count: int) -> None:
        """Open empty ones; those that are open have something in them, so the order stays."""
        numbers = np.arange(self.opened, self.opened + count)
        self.opened += count
        self.number = np.concatenate((numbers, self.number))
        self.fill = np.concatenate((np.zeros(count, np.int32), self.fill))
        if self.allowed is not None:
            self.allowed = np.concatenate((np.full(count, self.limit), self.allowed))

    def put(
        self, which: NDArray[np.int64] | slice, tokens: NDArray, sequences: NDArray | int
    ) -> None:
        """Fill bins up, each named once."""
        self.fill[which] += tokens
        if self.allowed is not None:
            self.allowed[which] -= sequences

    def tidy(self, highest_ceiling: int) -> None:
        """Sort by fill, and close those that nothing fits into any more."""
        fits = self.fill <= highest_ceiling
        if self.allowed is not None:
            fits &= self.allowed > 0
        kept = np.flatnonzero(fits)
        fill = self.fill[kept]
        if (fill[1:] <= fill[:-1]).all():  # after a round over empty bins, which gave longest first
            kept = kept[::-1]
        else:
            kept = kept[stable_argsort(fill, self.capacity + 1)]
        self.number, self.fill = self.number[kept], self.fill[kept]
        if self.allowed is not None:
            self.allowed = self.allowed[kept]


def _round(
    bins: _Bins, ceilings: NDArray[np.int32], capacity: int
) -> tuple[NDArray[np.int64] | slice, NDArray[np.int64]]:
    """One round: which sequences are placed, and into which bins."""
    longest = capacity - int(ceilings[0])
    if capacity - int(bins.fill[0]) >= _ROOMY * longest:
        return _deal(bins, ceilings, capacity, longest)
    which: NDArray[np.int64] | slice
    placed: NDArray[np.int64] | slice
    if bins.fill[0] == bins.fill[-1]:
        which = placed = slice(min(len(bins.fill), len(ceilings)))
    elif len(ceilings) > _MANY * len(bins.fill) or len(ceilings) <= _FEW * len(bins.fill):
        head = ceilings[: int(_MANY * len(bins.fill))]  # the others' turn comes
        which, placed = _roomiest_take_longest(bins.fill, head)
    else:
        which, placed = _longest_take_fullest(bins.fill, ceilings)
    bins.put(which, capacity - ceilings[placed], 1)
    return placed, bins.number[which]


def _deal(
    bins: _Bins, ceilings: NDArray[np.int32], capacity: int, longest: int
) -> tuple[slice, NDArray[np.int64]]:
    """Deal runs of the longest sequences to the roomy bins, leaving room for one more each."""
    rooms = capacity - bins.fill
    roomy = int(np.searchsorted(bins.fill, capacity - _ROOMY * longest, side="right"))
    each = rooms[:roomy] // longest - 1
    if bins.allowed is not None:
        each = np.minimum(each, bins.allowed[:roomy])
    ends = np.minimum(np.cumsum(each, dtype=np.int64), len(ceilings))
    each = np.diff(ends, prepend=0)
    tokens = np.cumsum(capacity - ceilings[: ends[-1]], dtype=np.int64)
    tokens = np.concatenate(([0], tokens))[ends]
    bins.put(slice(roomy), np.diff(tokens, prepend=0).astype(np.int32), each)
    return slice(int(ends[-1])), np.repeat(bins.number[:roomy], each)


def _roomiest_take_longest(
    fill: NDArray[np.int32], ceilings: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """From the roomiest bin on, each takes the longest sequence that fits and is left."""
    turn = np.arange(len(fill))
    fitting = np.searchsorted(ceilings, fill)
    placed = np.fmax.accumulate(fitting - turn) + turn  # the first that fits, or the next left
    which = turn[placed < len(ceilings)]
    return which, placed[which]


def _longest_take_fullest(
    fill: NDArray[np.int32], ceilings: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """From the longest sequence on, each takes the fullest bin that it fits into and is left.

    Along rising fills and ceilings this is how brackets match: a bin opens one, and a sequence
    closes the last that is open, or stays out where none is. Brackets match at one depth, where
    opening and closing ones alternate.
    """
    # Bins first where equal. Two runs that are sorted: NumPy's timsort merges them.
    order = np.concatenate((fill, ceilings)).argsort(kind="stable")
    closes = order >= len(fill)
    depth = np.cumsum(1 - 2 * closes.view(np.int8), dtype=np.int64)
    low = np.fmin.accumulate(depth)  # on integers the minimum, five times as fast
    np.minimum(low, 0, out=low)
    stays_out = np.empty(len(low), np.bool_)
    stays_out[0] = low[0] < 0
    np.less(low[1:], low[:-1], out=stays_out[1:])
    depth -= low
    depth += closes  # of a closing bracket, the depth that it closes
    depth[stays_out] = 0
    at_one_depth = order[stable_argsort(depth, len(fill) + 1)]
    closing = np.flatnonzero(at_one_depth >= len(fill))
    closing = closing[np.count_nonzero(stays_out) :]
    return at_one_depth[closing - 1], at_one_depth[closing] - len(fill)


def _without(placed: NDArray[np.int64] | slice, *arrays: NDArray) -> list[NDArray]:
    if isinstance(placed, slice):
        return [array[placed.stop :] for array in arrays]
    behind = int(placed.max()) + 1
    keep = np.ones(behind, np.bool_)
    keep[placed] = False
    # compress is four times as fast as array[keep].
    return [np.concatenate((array[:behind].compress(keep), array[behind:])) for array in arrays]
