"""Best-fit decreasing for all bins at once: in each round, every bin takes a sequence that fits.

If lengths hardly repeat, the histogram of `best_fit` saves nothing, and its moves cost more than
the sort. This module starts with the lower bound on the number of bins. In each round, every bin
with space takes one or more sequences. There are one or two dozen rounds of about a dozen NumPy
calls each. The method is data-parallel, so threads or a GPU could run it too.

    while bins have space for several of the longest sequences left:  deal these out in turn
    while there are many sequences per bin:  from the emptiest bin on, take the longest that fits
    then:  from the longest sequence on, go to the fullest bin with space

The last rule is best fit and finds the tight fits. The plan differs from that of best fit, because
a bin takes one sequence per round. On log-normal, exponential and uniform lengths it needs up to
0.2 % more bins than best fit. If far more bins are needed than the tokens would fill, it needs up
to 7 % more (docs/packing.md).

Sequences are represented by ``max_fill = capacity - length``: a sequence fits in a bin if the fill
of the bin is at most ``max_fill``. From the longest sequence on, ``max_fill`` increases, as do the
fills of the bins from the emptiest on.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..segments import Plan, group_by_bin, longest_first, stable_argsort

_DEALT = 5  # deal to bins with space for at least this many of the longest sequence
_MANY = 2.5  # sequences per bin above which it is too early to look for tight fits
_FEW = 1.02  # sequences per bin below which tight fits are not needed


def best_fit_in_rounds(
    lengths: NDArray[np.integer], capacity: int, max_sequences: int | None = None
) -> Plan:
    """Pack by best-fit decreasing in rounds.

    Args:
        lengths: ``(n,)`` integers from 1 to ``capacity``.
        capacity: tokens that fit in a bin.
        max_sequences: the largest number of sequences in a bin, or None for no limit.

    Returns:
        ``items (n,)`` and ``offsets (num_bins + 1,)``, both int64. The longest sequence of a bin
        comes first.
    """
    order = longest_first(lengths)
    max_fill = capacity - lengths[order].astype(np.int32)  # a capacity is below 2**31
    limit = len(order) if max_sequences is None else max_sequences
    bins = _Bins(capacity, max_sequences)
    over_half = int(np.searchsorted(max_fill, capacity - capacity // 2))  # over half the capacity
    bins.open(
        max(over_half, -(-int(lengths.sum(dtype=np.int64)) // capacity), -(-len(order) // limit))
    )
    bin_of = np.empty(len(order), np.int64)
    left = np.arange(len(order))
    while len(left):
        # The longest sequences, if they do not fit even in the emptiest bin, open new bins.
        too_long = len(max_fill)
        if len(bins.fill):
            too_long = int(np.searchsorted(max_fill, bins.fill[0]))
        if too_long:
            total = capacity * too_long - int(max_fill[:too_long].sum(dtype=np.int64))
            bins.open(max(-(-total // capacity), -(-too_long // limit)))
        placed, chosen = _round(bins, max_fill, capacity)
        bin_of[left[placed]] = chosen
        left, max_fill = _without(placed, left, max_fill)
        if len(left):
            bins.close_full(int(max_fill[-1]))
    return group_by_bin(bin_of, bins.num_opened, order)


class _Bins:
    """The open bins, from the emptiest to the fullest.

    Attributes:
        number: ``(num_open,)`` int64, the number of each bin.
        fill: ``(num_open,)`` int32, tokens in each bin.
        quota: ``(num_open,)`` int64, sequences that each bin may still take; None if unlimited.
        num_opened: the number of bins opened so far, closed ones included.
    """

    def __init__(self, capacity: int, limit: int | None) -> None:
        self.capacity, self.limit = capacity, limit
        self.num_opened = 0
        self.number = np.empty(0, np.int64)
        self.fill = np.empty(0, np.int32)
        self.quota = None if limit is None else np.empty(0, np.int64)

    def open(self, count: int) -> None:
        """Open empty bins. They go first, because the bins that are already open are not empty."""
        numbers = np.arange(self.num_opened, self.num_opened + count)
        self.num_opened += count
        self.number = np.concatenate((numbers, self.number))
        self.fill = np.concatenate((np.zeros(count, np.int32), self.fill))
        if self.quota is not None:
            self.quota = np.concatenate((np.full(count, self.limit), self.quota))

    def add(
        self, which: NDArray[np.int64] | slice, tokens: NDArray, sequences: NDArray | int
    ) -> None:
        """Add tokens and sequences to bins. No bin may occur twice."""
        self.fill[which] += tokens
        if self.quota is not None:
            self.quota[which] -= sequences

    def close_full(self, largest_max_fill: int) -> None:
        """Sort by fill, and close the bins that cannot take any of the sequences left."""
        fits = self.fill <= largest_max_fill
        if self.quota is not None:
            fits &= self.quota > 0
        kept = np.flatnonzero(fits)
        fill = self.fill[kept]
        if (fill[1:] <= fill[:-1]).all():  # decreasing after a round in which all bins were empty
            kept = kept[::-1]
        else:
            kept = kept[stable_argsort(fill, self.capacity + 1)]
        self.number, self.fill = self.number[kept], self.fill[kept]
        if self.quota is not None:
            self.quota = self.quota[kept]


def _round(
    bins: _Bins, max_fill: NDArray[np.int32], capacity: int
) -> tuple[NDArray[np.int64] | slice, NDArray[np.int64]]:
    """Run one round; return the sequences that are placed, and the number of the bin of each."""
    longest = capacity - int(max_fill[0])
    if capacity - int(bins.fill[0]) >= _DEALT * longest:
        return _deal(bins, max_fill, capacity, longest)
    which: NDArray[np.int64] | slice
    placed: NDArray[np.int64] | slice
    if bins.fill[0] == bins.fill[-1]:
        which = placed = slice(min(len(bins.fill), len(max_fill)))
    elif len(max_fill) > _MANY * len(bins.fill) or len(max_fill) <= _FEW * len(bins.fill):
        head = max_fill[: int(_MANY * len(bins.fill))]  # shorter sequences wait for later rounds
        which, placed = _emptiest_take_longest(bins.fill, head)
    else:
        which, placed = _longest_take_fullest(bins.fill, max_fill)
    bins.add(which, capacity - max_fill[placed], 1)
    return placed, bins.number[which]


def _deal(
    bins: _Bins, max_fill: NDArray[np.int32], capacity: int, longest: int
) -> tuple[slice, NDArray[np.int64]]:
    """Deal runs of the longest sequences to the emptiest bins, leaving space for one more each."""
    free = capacity - bins.fill
    num_bins = int(np.searchsorted(bins.fill, capacity - _DEALT * longest, side="right"))
    per_bin = free[:num_bins] // longest - 1
    if bins.quota is not None:
        per_bin = np.minimum(per_bin, bins.quota[:num_bins])
    ends = np.minimum(np.cumsum(per_bin, dtype=np.int64), len(max_fill))
    per_bin = np.diff(ends, prepend=0)
    tokens = np.cumsum(capacity - max_fill[: ends[-1]], dtype=np.int64)
    tokens = np.concatenate(([0], tokens))[ends]
    bins.add(slice(num_bins), np.diff(tokens, prepend=0).astype(np.int32), per_bin)
    return slice(int(ends[-1])), np.repeat(bins.number[:num_bins], per_bin)


def _emptiest_take_longest(
    fill: NDArray[np.int32], max_fill: NDArray[np.int32]
) -> tuple[slice, NDArray[np.int64]]:
    """From the emptiest bin on, each takes the longest sequence left that fits.

    Returns the indices of these bins, and the index of the sequence of each.
    """
    placed = strictly_increasing(np.searchsorted(max_fill, fill))
    placed = placed[: np.searchsorted(placed, len(max_fill))]
    return slice(len(placed)), placed


def strictly_increasing(lower_bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the smallest strictly increasing sequence that is at least ``lower_bounds``.

    If each bin takes the first item left from its lower bound on, these are the items.
    """
    arange = np.arange(len(lower_bounds))
    return np.fmax.accumulate(lower_bounds - arange) + arange


def _longest_take_fullest(
    fill: NDArray[np.int32], max_fill: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """From the longest sequence on, each goes to the fullest bin left that it fits in.

    Merge ``fill`` and ``max_fill`` in increasing order. Then this rule matches brackets: a bin
    opens a bracket, and a sequence closes the last open one, or is left over if none is open.
    Matching brackets are neighbors among the brackets of equal depth, where opening and closing
    brackets alternate. Returns bins and sequences as `_emptiest_take_longest` does.
    """
    # At equal values the bin comes first. NumPy's timsort merges the two sorted runs.
    order = np.concatenate((fill, max_fill)).argsort(kind="stable")
    closes = order >= len(fill)
    depth = np.cumsum(1 - 2 * closes.view(np.int8), dtype=np.int64)
    low = np.fmin.accumulate(depth)  # on integers equal to minimum, and five times as fast
    np.minimum(low, 0, out=low)
    left_over = np.empty(len(low), np.bool_)
    left_over[0] = low[0] < 0
    np.less(low[1:], low[:-1], out=left_over[1:])
    depth -= low
    depth += closes  # the depth of a closing bracket is that of the bracket it closes
    depth[left_over] = 0
    by_depth = order[stable_argsort(depth, len(fill) + 1)]
    closing = np.flatnonzero(by_depth >= len(fill))
    closing = closing[np.count_nonzero(left_over) :]
    return by_depth[closing - 1], by_depth[closing] - len(fill)


def _without(placed: NDArray[np.int64] | slice, *arrays: NDArray) -> list[NDArray]:
    """Return the arrays without the elements at ``placed``."""
    if isinstance(placed, slice):
        return [array[placed.stop :] for array in arrays]
    end = int(placed.max()) + 1
    keep = np.ones(end, np.bool_)
    keep[placed] = False
    # compress is four times as fast as array[keep].
    return [np.concatenate((array[:end].compress(keep), array[end:])) for array in arrays]
