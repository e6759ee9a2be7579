"""Random numbers derived from texts, and random partitions of totals into parts.

    key of a text      splitmix64 of (seed, epoch, tokens, number of tokens)
    word i of a key    splitmix64(key + i)
    total = part + part + ... + part, each of the C(total - 1, parts - 1) partitions equally likely

Words are 64-bit outputs of splitmix64 (Steele, Lea and Flood 2014). A word is a function of its key
and its number. So words can be computed in any order, and the words of a text do not depend on
other texts.

A partition of a total is a set of ``parts - 1`` cuts out of ``total - 1`` places. Floyd's algorithm
(Bentley and Floyd 1987) draws such a set with one draw per cut and no retries. The published
algorithm is sequential. `_random_subsets` runs it for all totals at once.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from ...segments import offsets_of
from .scratch import scratch

# splitmix64: the odd integer nearest to 2**64 / golden ratio, and the constants of the finalizer.
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
    """Return a key for each text ``values[begin : begin + length]``, ``(num_texts,)``.

    The key depends on the sum of token i times gamma**i modulo 2**64, where gamma is an odd number.
    The exponents run over the whole batch, so the sum of each text is multiplied by the inverse of
    gamma**begin.
    """
    bounds = np.stack([begins, begins + lengths], axis=1).ravel()
    powers, inverses = _powers(_capacity(int(bounds[-1])))
    terms = scratch(int(bounds[-1])).view(np.uint64)
    np.multiply(values[: bounds[-1]].view(np.uint64), powers[: bounds[-1]], out=terms)
    sums = np.add.reduceat(terms, bounds[:-1])[::2] * inverses[begins]
    sums = words(sums, lengths)  # adds the length, because trailing ids of 0 do not change the sum
    given = np.array([[seed & _64_BITS], [epoch & _64_BITS]], np.uint64)
    return words(sums ^ words(*given), np.zeros(1, np.int64))


def words(keys: NDArray[np.uint64], numbers: NDArray[np.integer]) -> NDArray[np.uint64]:
    """Return word ``number`` of each key.

    The arguments are arrays that broadcast. NumPy would warn about overflow of scalars.
    """
    return _mix(keys + (numbers.astype(np.uint64) + _ONE) * _GAMMA)


def random_part_starts(
    keys: NDArray[np.uint64], totals: NDArray[np.int64], parts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Split positive integers into positive parts at random, and return where the parts begin.

    All partitions of a total into the given number of parts are equally likely.

    Args:
        keys: ``(n,)``, the keys that determine the cuts of each total.
        totals: ``(n,)``.
        parts: ``(n,)``, the number of parts of each total, from 1 to the total.

    Returns:
        ``(parts.sum(),)``, increasing, with the totals laid out one after another: the parts of the
        first total begin at 0 or later, those of the second at ``totals[0]`` or later, and so on.
    """
    offsets = offsets_of(totals)
    places, cuts = totals - 1, parts - 1
    chosen = np.minimum(cuts, places - cuts)  # the cuts or their complement, whichever is smaller
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
    """Mark ``sizes`` of the ``places`` after each offset at random, in ``(offsets[-1],)`` bool.

    Floyd's algorithm, for a subset of size c of the places 1 to m:

        for last in m - c + 1, ..., m:  draw one of 1, ..., last; if it is taken, take last instead

    A draw is replaced by its `last` in two cases. First, an earlier draw hit the same place: one
    scatter and one gather find these for all draws. Second, the draw hit a place that an earlier
    draw took as its `last`. This is rare but can chain from draw to draw, so it is repeated until
    nothing changes. The arrays hold the draws in reverse order, so that the scatter writes the
    earliest draw of a place last. A draw is (32 random bits * `last`) >> 32, which is uniform up to
    a relative error of last / 2**32.
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

    draw_ids = numbers.astype(np.int32)
    earliest = np.empty(offsets[-1], np.int32)
    earliest[place] = draw_ids
    replaced = earliest[place] != draw_ids
    # The draws that hit the `last` of some draw, and the index of that draw. The draws of one total
    # have consecutive values of `last`.
    chained = np.flatnonzero(place >= np.repeat(offsets[:-1] + 1 + places - sizes, sizes))
    hit = last[chained] + chained - place[chained]
    while (more := replaced[hit] & ~replaced[chained]).any():
        replaced[chained[more]] = True

    marked = np.zeros(offsets[-1], bool)
    marked[np.where(replaced, last, place)] = True
    return marked


def _capacity(count: int) -> int:
    """Return a power of two above ``count``. Few distinct sizes keep the cache of powers small."""
    return 1 << count.bit_length()


@functools.lru_cache(maxsize=4)
def _powers(count: int) -> NDArray[np.uint64]:
    """Return 1, gamma, gamma**2, ... modulo 2**64 and their inverses, ``(2, count)``."""
    inverse = pow(int(_GAMMA), -1, 2**64)
    powers = np.repeat(np.array([[_GAMMA], [inverse]], np.uint64), count, axis=1)
    powers[:, 0] = 1
    np.multiply.accumulate(powers, axis=1, out=powers)
    powers.flags.writeable = False
    return powers


def _mix(states: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finalizer of splitmix64 in place."""
    states ^= states >> _SHIFTS[0]
    states *= _MULTIPLIERS[0]
    states ^= states >> _SHIFTS[1]
    states *= _MULTIPLIERS[1]
    states ^= states >> _SHIFTS[2]
    return states
