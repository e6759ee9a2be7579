"""Plan the batches of an epoch: full, random, and different in each epoch.

    sum of lengths in a batch <= max_tokens,   number of batches = a function of the lengths only

A bin packer finds the fewest bins, but it finds the same bins each time, and it puts long sequences
next to each other. Training needs random batches, equally full, and the same number in each epoch.
Therefore the number of batches is fixed first. Then examples are dealt to the batches, in order of
decreasing jittered length, by two rules:

    random:   a run of batches, starting at a random one, gets one example each, unless that lifts a
              batch above the mean of all batches by more than one example
    level:    for the shortest examples: the emptier half of the batches gets one example each, the
              emptiest batch the longest

The first rule mixes: any two examples that fit together may meet. The second rule is longest
processing time first (Graham 1969) for many batches at once. It levels the batches: log-normal
lengths end within 1 % of each other. A round is a few NumPy calls over half the batches, and there
are about three rounds per example of a batch. Examples that do not fit wait for the next round.

If many lengths are over a third of a batch, random dealing often fails. Then fewer examples are
dealt at random, and lengths get less jitter, finally none. The last resort is the bins of best-fit
packing. Afterwards, batches swap examples of similar lengths, so that these plans are random too.

The number of batches is the smallest, in steps of a quarter to half a percent, for which dealing
the sorted lengths with fixed seeds succeeds. Therefore it does not depend on the order of the
lengths, and a plan with this number always exists: that deal, with equal lengths shuffled.

With padding, batches are limited by slots instead. Examples of similar lengths form groups:

    slots of a group = rows * (longest source + longest target)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checks import at_least_one, check_seed
from ..packing.lengths import Lengths, as_lengths, fit
from ..packing.packer import pack_lengths
from ..segments import Plan, group_by_bin, longest_first, stable_argsort

_EXTRA = (0.0, 0.0025, 0.005)  # batches above the lower bound, as shares of it; tried in this order
_OVER_BEST_FIT = 0.02  # most batches above those of best fit, as a share of them
_CLUMP = 64  # a batch takes several examples per round while they are under 1/64 of max_tokens,
_SINGLE = 16  # but in the second rule at most 1/16 of the examples left per batch
_TRIALS = 3  # seeds that must all succeed with a number of batches,
_ONE_TRIAL = 1_000_000  # or one seed if there are this many examples, because deals differ little
_LOOK_AHEAD = 64  # rows that `cut_groups` examines first
_SWAPS = 16  # per batch, if the deal was not random
_PATIENCE = 64  # rounds that may place less than half of their examples before a deal fails
_REPEATS = 2  # seeds to try before the deal becomes less random


class _Freedom(NamedTuple):
    """How random a deal is.

    Attributes:
        strict: share of the tokens, in the shortest examples, that the second rule deals.
        jitter: lengths are divided by random factors of up to ``2 ** jitter`` before sorting.
    """

    strict: float
    jitter: float


_FREE = (_Freedom(0.25, 1.0), _Freedom(0.5, 0.5))
_STRICT = (_Freedom(1.0, 0.1), _Freedom(1.0, 0.0))


def count_batches(lengths: Lengths, max_tokens: int, *, spare: float = 0.0) -> int:
    """Return a number of batches for which `plan_batches` succeeds, in any order and with any seed.

    Args:
        lengths: ``(n,)`` integers from 1 to ``max_tokens``.
        max_tokens: the largest number of tokens in a batch.
        spare: batches to add, as a share, for lengths that vary a little.

    Returns:
        At most 2 % above the number of bins that best-fit decreasing needs, plus ``spare``.

    Raises:
        TypeError: if lengths or ``max_tokens`` are not integers.
        ValueError: if there are no lengths, or one is below 1 or over ``max_tokens``.
    """
    checked = _checked(lengths, max_tokens)
    ordered = checked[longest_first(checked)]
    low = _lower_bound(ordered, max_tokens)
    start = low + int(low * spare)
    for count, _ in _canonical(ordered, max_tokens, _steps(start, _EXTRA), _FREE):
        return count
    best = pack_lengths(ordered, max_tokens).num_bins
    most = best + int(best * (spare + _OVER_BEST_FIT))
    if start <= most:
        between = [count for count in ((best + most) // 2, most) if count >= start]
        for count, _ in _canonical(ordered, max_tokens, between, _FREE):
            return count
        counts = [*_steps(start, _EXTRA), *_steps(best + int(best * spare), _EXTRA), most]
        tried = sorted(count for count in counts if count <= most)
        for count, _ in _canonical(ordered, max_tokens, tried, _STRICT):
            return count
    return best


def plan_batches(
    lengths: Lengths, max_tokens: int, num_batches: int, seed: int | Sequence[int] = 0
) -> Plan:
    """Deal examples to batches of at most ``max_tokens`` tokens.

    Args:
        lengths: ``(n,)`` integers from 1 to ``max_tokens``.
        max_tokens: the largest number of tokens in a batch.
        num_batches: the number of batches, from `count_batches`.
        seed: an integer of 0 or more, or several, for example (seed, epoch). Equal seeds give the
            same plan on every machine; different seeds give different batches.

    Returns:
        ``items (n,)`` and ``offsets (num_batches + 1,)``, both int64: batch b has the examples
        ``items[offsets[b]:offsets[b + 1]]``. The batches and the examples in each batch are in
        random order. No batch is empty.

    Raises:
        TypeError: if lengths, ``max_tokens``, ``num_batches`` or ``seed`` are not integers.
        ValueError: if there are no lengths, if one is below 1 or over ``max_tokens``, or if no plan
            with ``num_batches`` was found.
    """
    plan = find_plan(lengths, max_tokens, num_batches, seed)
    if plan is None:
        raise ValueError(
            f"num_batches must be the result of count_batches for these lengths and max_tokens = "
            f"{max_tokens}, got {num_batches}"
        )
    return plan


def find_plan(
    lengths: Lengths, max_tokens: int, num_batches: int, seed: int | Sequence[int] = 0
) -> Plan | None:
    """Like `plan_batches`, but return None if no plan with ``num_batches`` is found."""
    checked = _checked(lengths, max_tokens)
    count = at_least_one("num_batches", num_batches)
    bits = _bits(seed)
    order = _shuffle(len(checked), bits)  # shuffles equal lengths, and the examples of a batch
    shuffled = checked[order]
    batch_of = _deal_freely(shuffled, max_tokens, count, bits)
    if batch_of is None:
        batch_of = _deal_strictly(shuffled, max_tokens, count, bits)
        if batch_of is None:
            return None
        _swap_similar(batch_of, shuffled, max_tokens, count, bits)
    return group_by_bin(_shuffle(count, bits)[batch_of], count, order)


def group_similar(
    lengths: NDArray[np.integer],
    max_slots: int,
    *,
    seed: int | Sequence[int] = 0,
    jitter: float = 0.0,
) -> Plan:
    """Group examples of similar lengths, so that padding a group wastes little.

    Examples are sorted by source length. If there are targets, the sorted examples are cut into
    strips, about as many as each strip has groups, and each strip is sorted by target length. Then
    source and target lengths vary about equally within a group.

    Args:
        lengths: ``(n, 2)``, source and target, or ``(n,)``; a row's sum from 1 to ``max_slots``.
        max_slots: the largest rows * (longest source + longest target) of a group.
        seed: seed of the shuffle of equal lengths, and of the jitter.
        jitter: divide the lengths by random factors of up to ``2 ** jitter`` before sorting, so
            that groups depend on the seed. With 0, the number of slots of each group does not
            depend on the seed or on the order of the examples.

    Returns:
        ``items (n,)`` and ``offsets (num_groups + 1,)``, both int64.
    """
    bits = _bits(seed)
    order = _shuffle(len(lengths), bits)
    source, *targets = lengths.reshape(len(lengths), -1)[order].T.astype(np.int64)
    noise = np.exp2(-jitter * _uniform(len(order), bits)) if jitter else np.float32(1)
    by_length = (-source * noise).argsort(kind="stable")
    if targets and np.ptp(targets[0]):
        target = targets[0]
        by_length = np.lexsort((target, -source * noise))
        strips = max(round((int(lengths.sum(dtype=np.int64)) / max_slots) ** 0.5), 1)
        strip = np.arange(len(order)) * strips // len(order)
        falling = (-target * noise)[by_length]
        by_length = by_length[np.lexsort((source[by_length], falling, strip))]
    items = order[by_length]
    return items, cut_groups(lengths[items], max_slots)


def cut_groups(lengths: NDArray[np.integer], max_slots: int) -> NDArray[np.int64]:
    """Cut examples, in the given order, into groups of at most ``max_slots`` slots.

    Args:
        lengths: ``(n, 2)``, source and target, or ``(n,)``; a row's sum is at most ``max_slots``.
        max_slots: the largest rows * (longest source + longest target) of a group.

    Returns:
        ``offsets (num_groups + 1,)`` int64, the first row of each group, and at the end n.
    """
    sides = lengths.reshape(len(lengths), -1).astype(np.int64, copy=False)
    offsets = [0]
    rows = np.arange(1, len(sides) + 1)
    while offsets[-1] < len(sides):
        first, seen = offsets[-1], _LOOK_AHEAD
        while True:
            longest = np.maximum.accumulate(sides[first : first + seen])
            fitting = np.searchsorted(longest.sum(1) * rows[: len(longest)], max_slots, "right")
            if fitting < seen or first + seen >= len(sides):
                break
            seen *= 4
        offsets.append(first + int(fitting))
    return np.array(offsets, np.int64)


def _checked(lengths: Lengths, max_tokens: int) -> NDArray[np.int32]:
    capacity = at_least_one("max_tokens", max_tokens)
    given = as_lengths(lengths)
    if int(given.max()) > capacity:
        at = int(given.argmax())
        raise ValueError(
            f"lengths must be at most max_tokens = {capacity}, got lengths[{at}] = {given[at]}"
        )
    return fit(given, capacity, "error", False, "lengths").lengths.astype(np.int32)


def _lower_bound(lengths: NDArray[np.int32], max_tokens: int) -> int:
    """A lower bound of the number of batches: total tokens, and lengths over half a batch."""
    over_half = int(np.count_nonzero(lengths > max_tokens // 2))
    return max(over_half, -(-int(lengths.sum(dtype=np.int64)) // max_tokens))


def _steps(count: int, shares: Sequence[float]) -> list[int]:
    return [count + int(count * share) for share in shares]


def _canonical(
    ordered: NDArray[np.int32], max_tokens: int, counts: Sequence[int], freedoms: Sequence[_Freedom]
) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """Deal lengths, longest first, with fixed seeds; yield ``(count, batch_of)`` if all succeed."""
    trials = _TRIALS if len(ordered) < _ONE_TRIAL else 1
    for count in dict.fromkeys(counts):
        for freedom in freedoms:
            dealt = (
                _deal(ordered, max_tokens, count, freedom, np.random.PCG64(trial))
                for trial in range(trials)
            )
            batch_of = next(dealt)
            if batch_of is not None and all(other is not None for other in dealt):
                yield count, batch_of


def _deal_freely(
    lengths: NDArray[np.int32], max_tokens: int, count: int, bits: np.random.PCG64
) -> NDArray[np.int32] | None:
    """``(n,)`` int32, the batch of each example, mostly random; None if that fails."""
    for freedom in _FREE:
        for _ in range(_REPEATS):
            batch_of = _deal(lengths, max_tokens, count, freedom, bits)
            if batch_of is not None:
                return batch_of
    return None


def _deal_strictly(
    lengths: NDArray[np.int32], max_tokens: int, count: int, bits: np.random.PCG64
) -> NDArray[np.int32] | None:
    """Like `_deal_freely`, with less freedom; if need be, the deal that `count_batches` found."""
    for freedom in _STRICT:
        batch_of = _deal(lengths, max_tokens, count, freedom, bits)
        if batch_of is not None:
            return batch_of
    order = longest_first(lengths)
    batch_of = np.empty(len(lengths), np.int32)
    for _, found in _canonical(lengths[order], max_tokens, [count], (*_FREE, *_STRICT)):
        batch_of[order] = found
        return batch_of
    best = pack_lengths(lengths[order], max_tokens)
    if len(best) != count:
        return None
    batch_of[order[best.items]] = np.repeat(np.arange(count), np.diff(best.offsets))
    return batch_of


def _deal(
    lengths: NDArray[np.int32],
    max_tokens: int,
    count: int,
    freedom: _Freedom,
    bits: np.random.PCG64,
) -> NDArray[np.int32] | None:
    """``(n,)`` int32, the batch of each example; None if some do not fit or a batch is empty."""
    if not _lower_bound(lengths, max_tokens) <= count <= len(lengths):
        return None
    order = _jittered_order(lengths, freedom.jitter, bits)
    tokens = lengths[order]
    left = np.cumsum(tokens[::-1], dtype=np.int64)[::-1]  # tokens of this example and all later
    num_random = int(np.count_nonzero(left > freedom.strict * left[0]))
    deal = _Deal(tokens, max_tokens, count)
    waiting = deal.at_random(num_random, bits) if num_random else np.empty(0, np.int32)
    if waiting is None or not deal.level(waiting, num_random) or not deal.fill.all():
        return None
    batch_of = np.empty(len(order), np.int32)
    batch_of[order] = deal.batch_of
    return batch_of


class _Deal:
    """The examples in the order of dealing, and the content of the batches so far.

    Attributes:
        tokens: ``(n,)`` int32, the length of each example.
        batch_of: ``(n,)`` int32, the batch of each example that has been dealt.
        fill: ``(count,)`` int64, the tokens of each batch.
    """

    def __init__(self, tokens: NDArray[np.int32], max_tokens: int, count: int) -> None:
        self.tokens, self.max_tokens = tokens, max_tokens
        self.batch_of = np.empty(len(tokens), np.int32)
        self.fill = np.zeros(count, np.int64)

    def at_random(self, end: int, bits: np.random.PCG64) -> NDArray[np.int32] | None:
        """Deal the first ``end`` examples; return those left over, or None if most do not fit."""
        run = (len(self.fill) + 1) // 2
        dealt = stalls = 0
        waiting = np.empty(0, np.int32)
        while dealt < end and stalls < _PATIENCE:
            clump = self._clump(waiting, dealt, run)
            now = self._with_next(waiting, dealt, min(dealt + run * clump - len(waiting), end))
            dealt += max(len(now) - len(waiting), 0)
            next_tokens = self.tokens[now[: run * clump]]
            mean = (self.fill.sum() + int(next_tokens.sum(dtype=np.int64))) / len(self.fill)
            level = int(mean + clump * int(next_tokens.max()))
            first = int(bits.random_raw() % len(self.fill))
            batches = (first + np.arange(run)) % len(self.fill)
            waiting = self._put(now, batches, clump, min(level, self.max_tokens))
            stalls += 2 * len(waiting) > len(now)
        return waiting if dealt == end else None

    def level(self, waiting: NDArray[np.int32], dealt: int) -> bool:
        """Deal the examples from ``dealt`` on and those that wait; return whether all fit."""
        stalls = 0
        while len(waiting) or dealt < len(self.tokens):
            roomy = np.flatnonzero(self.fill <= self.fill.mean())
            batches = roomy[stable_argsort(self.fill[roomy], self.max_tokens + 1)]
            left = len(self.tokens) - dealt + len(waiting)
            clump = self._clump(waiting, dealt, len(batches))
            clump = max(min(clump, left // (_SINGLE * len(self.fill))), 1)  # 1 towards the end
            now = self._with_next(waiting, dealt, dealt + len(batches) * clump - len(waiting))
            dealt += len(now) - len(waiting)
            now = now[longest_first(self.tokens[now])]
            if self.tokens[now[0]] + self.fill[batches[0]] > self.max_tokens:
                return False
            waiting = self._put(now, batches, clump, self.max_tokens)
            stalls += 2 * len(waiting) > len(now)
            if stalls > _PATIENCE:
                return False
        return True

    def _clump(self, waiting: NDArray[np.int32], dealt: int, run: int) -> int:
        """The number of examples that a batch takes per round: several if they are very short."""
        longest = self.tokens[waiting].max(initial=1)
        longest = self.tokens[dealt : dealt + run].max(initial=longest)
        return max(self.max_tokens // (_CLUMP * int(longest)), 1)

    def _with_next(self, waiting: NDArray[np.int32], dealt: int, end: int) -> NDArray[np.int32]:
        """The waiting examples, followed by those from ``dealt`` to ``end``."""
        end = min(end, len(self.tokens))
        return np.concatenate((waiting, np.arange(dealt, end, dtype=np.int32)))

    def _put(
        self, examples: NDArray[np.int32], batches: NDArray[np.int64], clump: int, level: int
    ) -> NDArray[np.int32]:
        """Give each batch ``clump`` examples, unless they would fill it above ``level``.

        Returns:
            The examples that no batch got.
        """
        clump = max(min(clump, len(examples) // len(batches)), 1)
        batches = batches[: len(examples) // clump]
        given = clump * len(batches)
        turns = examples[:given].reshape(clump, -1)  # [clump, batches]
        fill = self.fill[batches] + self.tokens[turns].sum(0, dtype=np.int64)
        fits = fill <= level
        self.fill[batches[fits]] = fill[fits]
        self.batch_of[turns[:, fits]] = batches[fits]
        return np.concatenate((turns[:, ~fits].reshape(-1), examples[given:]))


def _jittered_order(
    lengths: NDArray[np.int32], jitter: float, bits: np.random.PCG64
) -> NDArray[np.int64]:
    """The indices that sort by decreasing ``length / 2 ** (jitter * noise)``, noise in [0, 1)."""
    if not jitter:
        return longest_first(lengths)
    noise = _uniform(len(lengths), bits)
    # 16-bit keys are radix-sorted. On a logarithmic scale they resolve lengths to 0.03 %.
    keys = np.log2(lengths.astype(np.float32)) + np.float32(1) - np.float32(jitter) * noise
    return longest_first((keys * 2048).astype(np.int32))


def _bits(seed: int | Sequence[int]) -> np.random.PCG64:
    """A generator of raw bits. NumPy keeps these the same across versions, unlike its samples."""
    seeds = [check_seed(each) for each in (seed if isinstance(seed, Sequence) else [seed])]
    return np.random.PCG64([len(seeds), *seeds])


def _uniform(count: int, bits: np.random.PCG64) -> NDArray[np.float32]:
    """``(count,)`` float32 in [0, 1)."""
    return (bits.random_raw(count) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _shuffle(count: int, bits: np.random.PCG64) -> NDArray[np.int64]:
    """A random permutation, from 32-bit keys: they sort in half the time of 64-bit keys."""
    return stable_argsort((bits.random_raw(count) >> np.uint64(32)).astype(np.uint32), 1 << 32)


def _swap_similar(
    batch_of: NDArray[np.int32],
    lengths: NDArray[np.int32],
    max_tokens: int,
    count: int,
    bits: np.random.PCG64,
) -> None:
    """Randomize a plan in place: batches swap examples of similar lengths if both have room."""
    items, offsets = group_by_bin(batch_of, count)
    fill = np.add.reduceat(lengths[items], offsets[:-1], dtype=np.int64)
    counts = np.diff(offsets).astype(np.uint64)
    for turn in range(_SWAPS):
        batches = _shuffle(count, bits)
        chosen = offsets[batches] + (bits.random_raw(count) % counts[batches]).astype(np.int64)
        order = longest_first(lengths[items[chosen]])[turn % 2 :]
        longer, shorter = order[: len(order) // 2 * 2].reshape(-1, 2).T
        more = lengths[items[chosen[longer]]] - lengths[items[chosen[shorter]]]
        fits = fill[batches[shorter]] + more <= max_tokens
        longer, shorter, more = longer[fits], shorter[fits], more[fits]
        fill[batches[longer]] -= more
        fill[batches[shorter]] += more
        first, second = chosen[longer], chosen[shorter]
        items[first], items[second] = items[second], items[first]
    batch_of[items] = np.repeat(np.arange(count, dtype=np.int32), np.diff(offsets))
