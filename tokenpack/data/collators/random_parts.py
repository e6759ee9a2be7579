"""Randomness that follows from texts, and totals cut into parts by it.

    key of a text      splitmix64 of (seed, epoch, tokens, their number)
    word i of a key    splitmix64(key + i)
    total = part + part + ... + part, each of the C(total - 1, parts - 1) ways equally likely

Words are 64 bits of splitmix64 (Steele, Lea and Flood 2014). A word is a function of its key and
its number, so any of them can be had at any time, and what one text draws never depends on another.

A way to cut a total is a set of ``parts - 1`` places out of ``total - 1``. Floyd's algorithm
(Bentley and Floyd 1987) draws it with as many draws as there are places to choose, and no retries.
It is sequential as published, and is done here for all totals at once: see `_random_subsets`.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from ...segments import offsets_of
from .scratch import scratch

# splitmix64: the odd integer nearest to 2**64 / golden ratio, and the finalizer's numbers.
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)

_ONE, _HALF = np.uint64(1), np.uint64(32)
_64_BITS = 2**64 - 1


def text_keys(
    values: NDArray[np.int64],
    begins: NDArray[np.int64],
    lengths: NDArray[np.int64],
    seed: int,
    epoch: int,
) -> NDArray[np.uint64]:
    """``(num_texts,)``, a word for each text ``values[begin : begin + length]``.

    The text goes in as its tokens times powers of an odd number, one a place, summed modulo 2**64.
    The powers are counted over the whole batch, and those before each text divided out again.
    """
    bounds = np.stack([begins, begins + lengths], axis=1).ravel()
    powers, inverses = _powers(_room(int(bounds[-1])))
    terms = scratch(int(bounds[-1])).view(np.uint64)
    np.multiply(values[: bounds[-1]].view(np.uint64), powers[: bounds[-1]], out=terms)
    sums = np.add.reduceat(terms, bounds[:-1])[::2] * inverses[begins]
    sums = words(sums, lengths)  # ids of 0 at the end add nothing
    given = np.array([[seed & _64_BITS], [epoch & _64_BITS]], np.uint64)
    return words(sums ^ words(*given), np.zeros(1, np.int64))


def words(keys: NDArray[np.uint64], numbers: NDArray[np.integer]) -> NDArray[np.uint64]:
    """Word ``number`` of each key; arrays that broadcast, as scalars would warn of overflow."""
    return _mix(keys + (numbers.astype(np.uint64) + _ONE) * _GAMMA)


def random_part_starts(
    keys: NDArray[np.uint64], totals: NDArray[np.int64], parts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Where parts begin, if positive integers are cut into parts, every way equally likely.

    Args:
        keys: ``(n,)``, what the cuts of each total follow from.
        totals: ``(n,)``.
        parts: ``(n,)``, from 1 to the total.

    Returns:
        ``(parts.sum(),)`` rising, the totals side by side: the parts of the first begin from 0 on,
        those of the second from ``totals[0]`` on, ...
    """
    offsets = offsets_of(totals)
    places, cuts = totals - 1, parts - 1
    chosen = np.minimum(cuts, places - cuts)  # the cuts, or those left out: whichever are fewer
    begins = _random_subsets(keys, offsets, places, chosen)
    if (complement := chosen < cuts).any():
        begins ^= np.repeat(complement, totals)
    begins[offsets[:-1]] = True
    return np.flatnonzero(begins)


def _random_subsets(
    keys: NDArray[np.uint64],
    offsets: NDArray[np.int64],
    places: NDArray[np.int64],
    sizes: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """``(offsets[-1],)``: ``sizes`` of the ``places`` behind each offset marked, at random.

    Floyd's algorithm, for m places 1 to m and a size of c:

        for last in m - c + 1, ..., m:  draw one of 1, ..., last; if it is taken, take last instead

    A draw is refused if an earlier one was the same, which one scatter and one gather say of all
    draws, or if it hit what an earlier refused draw took instead, its `last`. The second is rare
    but may go on from draw to draw: it is repeated until nothing changes. Draws are put in reverse
    order, so that of those that hit one place the earliest is written last. A draw is 32 bits
    times `last` over 2**32, uniform to within last / 2**32.
    """
    draws = offsets_of(sizes)
    numbers = np.arange(draws[-1])
    begin = np.repeat(offsets[:-1] + 1, sizes)
    last = np.repeat(places + draws[:-1], sizes) - numbers
    states = np.repeat(keys + _GAMMA - draws[:-1].view(np.uint64) * _GAMMA, sizes)
    states += numbers.view(np.uint64) * _GAMMA
    drawn = _mix(states)  # words 0, 1, ... of each key
    drawn >>= _HALF
    drawn *= last.view(np.uint64)
    drawn >>= _HALF
    place = drawn.view(np.int64) + begin
    last += begin
    last -= 1

    short = numbers.astype(np.int32)
    earliest = np.empty(offsets[-1], np.int32)
    earliest[place] = short
    refused = earliest[place] != short
    # Which hit some draw's `last`, and whose: the draws of a total have consecutive ones.
    chained = np.flatnonzero(place >= np.repeat(offsets[:-1] + 1 + places - sizes, sizes))
    whose = last[chained] + chained - place[chained]
    while (more := refused[whose] & ~refused[chained]).any():
        refused[chained[more]] = True

    marked = np.zeros(offsets[-1], bool)
    marked[np.where(refused, last, place)] = True
    return marked


def _room(count: int) -> int:
    """A power of two above ``count``: few sizes, of which each is kept."""
    return 1 << count.bit_length()


@functools.lru_cache(maxsize=4)
def _powers(count: int) -> NDArray[np.uint64]:
    """``(2, count)``: 1, gamma, gamma squared, ... modulo 2**64, and their inverses."""
    inverse = pow(int(_GAMMA), -1, 2**64)
    powers = np.repeat(np.array([[_GAMMA], [inverse]], np.uint64), count, axis=1)
    powers[:, 0] = 1
    np.multiply.accumulate(powers, axis=1, out=powers)
    powers.flags.writeable = False
    return powers


def _mix(states: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64, in place."""
    states ^= states >> _SHIFTS[0]
    states *= _MULTIPLIERS[0]
    states ^= states >> _SHIFTS[1]
    states *= _MULTIPLIERS[1]
    states ^= states >> _SHIFTS[2]
    return states
