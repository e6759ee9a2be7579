"""An epoch's examples to batches of tokens: full, mixed, and other ones in each epoch.

    sum of lengths in a batch <= max_tokens,   number of batches: of the lengths alone

A packer of bins finds the fewest bins, and the same ones each time, with long sequences side by
side. Training wants batches at random, equally full, and as many in each epoch. So the number of
batches is fixed first, and examples are dealt out to them, longest first by jittered lengths:

    while many tokens are left:   a run of batches, from a random one on, gets an example each,
                                  unless that lifts it over the mean of all by a whole example
    then, of the shortest:        the emptier half gets them, the emptiest batch the longest

The first rule mixes: any two examples may meet that fit. The second is longest processing time
first (Graham 1969) for many batches at once, and levels them: on log-normal lengths to 1 % of each
other. A round is a few NumPy calls over half the batches, and there are about three rounds to each
example of a batch. What would be too much for its batch waits for the next round.

Where lengths leave no such freedom (many of them over a third of a batch), less is dealt at random
and lengths are jittered less, in the end not at all; the last resort are best fit's bins. Such
plans are mixed afterwards, by swapping examples of similar lengths between batches.

The number of batches is the smallest, in steps of a quarter to half a percent, that a deal of the
sorted lengths with fixed seeds gets by with. So it is the same for any order of the lengths, and
there always is a plan for it: that one, with equal lengths shuffled.

With padding a batch is filled by slots instead, which examples have in groups of similar lengths:

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

_NEAR = (0.0, 0.0025, 0.005)  # batches over the least there can be, tried in turn,
_OVER_BEST_FIT = 0.02  # and at most this over what best fit needs
_CLUMP = 64  # examples of which several make this part of a batch are dealt together,
_SINGLE = 16  # but no more of them than this part of what is left for a batch
_TRIALS = 3  # seeds that a number of batches must do for,
_ALIKE = 1_000_000  # examples, from which on a deal goes like any other
_LOOK_AHEAD = 64  # rows that a group is first thought to have
_SWAPS = 16  # per batch, where the deal was not random
_PATIENCE = 64  # rounds that place less than half, before a deal is given up
_REPEATS = 2  # seeds tried before the deal gets stricter


class _Freedom(NamedTuple):
    """How much of a deal is left to chance.

    Attributes:
        strict: share of the tokens, in the shortest examples, that is dealt to level batches.
        jitter: lengths are ordered as if up to ``2 ** jitter`` times shorter.
    """

    strict: float
    jitter: float


_FREE = (_Freedom(0.25, 1.0), _Freedom(0.5, 0.5))
_STRICT = (_Freedom(1.0, 0.1), _Freedom(1.0, 0.0))


def count_batches(lengths: Lengths, max_tokens: int, *, spare: float = 0.0) -> int:
    """How many batches `plan_batches` makes of these lengths, in any order and with any seed.

    Args:
        lengths: ``(n,)`` integers from 1 to ``max_tokens``.
        max_tokens: what a batch holds at most.
        spare: room to leave, as a share of the batches, for lengths that vary a little.

    Returns:
        At most 2 % above the number of bins that best-fit decreasing needs, plus ``spare``.

    Raises:
        TypeError: if lengths or ``max_tokens`` are no integers.
        ValueError: if there are no lengths, or one is below 1 or over ``max_tokens``.
    """
    checked = _checked(lengths, max_tokens)
    ordered = checked[longest_first(checked)]
    low = _fewest(ordered, max_tokens)
    start = low + int(low * spare)
    for count, _ in _canonical(ordered, max_tokens, _steps(start, _NEAR), _FREE):
        return count
    best = pack_lengths(ordered, max_tokens).num_bins
    most = best + int(best * (spare + _OVER_BEST_FIT))
    if start <= most:
        between = [count for count in ((best + most) // 2, most) if count >= start]
        for count, _ in _canonical(ordered, max_tokens, between, _FREE):
            return count
        counts = [*_steps(start, _NEAR), *_steps(best + int(best * spare), _NEAR), most]
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
        max_tokens: what a batch holds at most.
        num_batches: as `count_batches` says.
        seed: an integer of 0 or more, or several, as (seed, epoch). The same ones give the same
            plan on every machine; others give other batches.

    Returns:
        ``items (n,)`` and ``offsets (num_batches + 1,)``, both int64: batch b has the examples
        ``items[offsets[b]:offsets[b + 1]]``. Batches, and the examples in each, come in random
        order; none is empty.

    Raises:
        TypeError: if lengths, ``max_tokens``, ``num_batches`` or ``seed`` are no integers.
        ValueError: if there are no lengths, one is below 1 or over ``max_tokens``, or no plan with
            ``num_batches`` was found.
    """
    plan = find_plan(lengths, max_tokens, num_batches, seed)
    if plan is None:
        raise ValueError(
            f"num_batches must be what count_batches says for these lengths and max_tokens = "
            f"{max_tokens}, got {num_batches}"
        )
    return plan


def find_plan(
    lengths: Lengths, max_tokens: int, num_batches: int, seed: int | Sequence[int] = 0
) -> Plan | None:
    """`plan_batches`, but None where it finds no plan with ``num_batches``."""
    checked = _checked(lengths, max_tokens)
    count = at_least_one("num_batches", num_batches)
    bits = _bits(seed)
    order = _shuffle(len(checked), bits)  # the order of equal lengths, and within a batch
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
    """Group examples of similar lengths, which waste little where a group is padded.

    Sources are sorted. Where there are targets too, that is cut into about as many strips as a
    strip then has groups, and each sorted by target: what is left unequal is as much on both sides.

    Args:
        lengths: ``(n, 2)``, source and target, or ``(n,)``; a row's sum from 1 to ``max_slots``.
        max_slots: what rows * (longest source + longest target) of a group may come to.
        seed: what shuffles equal lengths, and jitters.
        jitter: sort by lengths up to ``2 ** jitter`` times shorter, at random, so that other seeds
            give other groups. Without, the slots of all groups are the same for every seed and
            order of the examples.

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
    """Cut examples, in the order they are in, into groups of at most ``max_slots`` slots.

    Args:
        lengths: ``(n, 2)``, source and target, or ``(n,)``; a row's sum is at most ``max_slots``.
        max_slots: what rows * (longest source + longest target) of a group may come to.

    Returns:
        ``offsets (num_groups + 1,)`` int64: group g is from ``offsets[g]`` to the next.
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


def _fewest(ordered: NDArray[np.int32], max_tokens: int) -> int:
    """Fewer batches cannot hold these: by tokens, and by those of which no two fit together."""
    alone = int(np.count_nonzero(ordered > max_tokens // 2))
    return max(alone, -(-int(ordered.sum(dtype=np.int64)) // max_tokens))


def _steps(count: int, shares: Sequence[float]) -> list[int]:
    return [count + int(count * share) for share in shares]


def _canonical(
    ordered: NDArray[np.int32], max_tokens: int, counts: Sequence[int], freedoms: Sequence[_Freedom]
) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """``(count, batch_of)`` of what can be dealt by fixed seeds, to lengths longest first."""
    trials = _TRIALS if len(ordered) < _ALIKE else 1
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
    """``(n,)`` int32, the batch of each, at random for the most part; None if that cannot be."""
    for freedom in _FREE:
        for _ in range(_REPEATS):
            batch_of = _deal(lengths, max_tokens, count, freedom, bits)
            if batch_of is not None:
                return batch_of
    return None


def _deal_strictly(
    lengths: NDArray[np.int32], max_tokens: int, count: int, bits: np.random.PCG64
) -> NDArray[np.int32] | None:
    """``(n,)`` int32, the batch of each, as `count_batches` found it if nothing else goes."""
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
    """``(n,)`` int32, the batch of each example; None if that freedom leaves no room for some."""
    if not _fewest(lengths, max_tokens) <= count <= len(lengths):
        return None
    order = _jittered_order(lengths, freedom.jitter, bits)
    tokens = lengths[order]
    behind = np.cumsum(tokens[::-1], dtype=np.int64)[::-1]  # its own tokens and those of all later
    at_random = int(np.count_nonzero(behind > freedom.strict * behind[0]))
    deal = _Deal(tokens, max_tokens, count)
    waiting = deal.at_random(at_random, bits) if at_random else np.empty(0, np.int32)
    if waiting is None or not deal.level(waiting, at_random) or not deal.fill.all():
        return None
    batch_of = np.empty(len(order), np.int32)
    batch_of[order] = deal.batch_of
    return batch_of


class _Deal:
    """Examples in the order in which they are dealt, and what the batches hold so far.

    Attributes:
        tokens: ``(n,)`` int32, lengths.
        batch_of: ``(n,)`` int32, set for those that were dealt.
        fill: ``(count,)`` int64, tokens of each batch.
    """

    def __init__(self, tokens: NDArray[np.int32], max_tokens: int, count: int) -> None:
        self.tokens, self.max_tokens = tokens, max_tokens
        self.batch_of = np.empty(len(tokens), np.int32)
        self.fill = np.zeros(count, np.int64)

    def at_random(self, end: int, bits: np.random.PCG64) -> NDArray[np.int32] | None:
        """Deal the first ``end``; returns those left over, or None if they hardly go in."""
        run = (len(self.fill) + 1) // 2
        dealt = stalls = 0
        waiting = np.empty(0, np.int32)
        while dealt < end and stalls < _PATIENCE:
            clump = self._clump(waiting, dealt, run)
            now = self._with_next(waiting, dealt, min(dealt + run * clump - len(waiting), end))
            dealt += max(len(now) - len(waiting), 0)
            longest, coming = self._of(now[: run * clump])
            level = int((self.fill.sum() + coming) / len(self.fill) + clump * longest)
            first = int(bits.random_raw() % len(self.fill))
            batches = (first + np.arange(run)) % len(self.fill)
            waiting = self._put(now, batches, clump, min(level, self.max_tokens))
            stalls += 2 * len(waiting) > len(now)
        return waiting if dealt == end else None

    def level(self, waiting: NDArray[np.int32], dealt: int) -> bool:
        """Deal all from ``dealt`` on and those that wait; returns whether they went in."""
        stalls = 0
        while len(waiting) or dealt < len(self.tokens):
            roomy = np.flatnonzero(self.fill <= self.fill.mean())
            batches = roomy[stable_argsort(self.fill[roomy], self.max_tokens + 1)]
            left = len(self.tokens) - dealt + len(waiting)
            clump = self._clump(waiting, dealt, len(batches))
            clump = max(min(clump, left // (_SINGLE * len(self.fill))), 1)  # ever finer to the end
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
        """How many examples a batch takes at once: several where they are short beside it."""
        longest = self.tokens[waiting].max(initial=1)
        longest = self.tokens[dealt : dealt + run].max(initial=longest)
        return max(self.max_tokens // (_CLUMP * int(longest)), 1)

    def _with_next(self, waiting: NDArray[np.int32], dealt: int, end: int) -> NDArray[np.int32]:
        end = min(end, len(self.tokens))
        return np.concatenate((waiting, np.arange(dealt, end, dtype=np.int32)))

    def _of(self, examples: NDArray[np.int32]) -> tuple[int, int]:
        """Tokens of the longest, and of all."""
        tokens = self.tokens[examples]
        return int(tokens.max()), int(tokens.sum(dtype=np.int64))

    def _put(
        self, examples: NDArray[np.int32], batches: NDArray[np.int64], clump: int, level: int
    ) -> NDArray[np.int32]:
        """Give ``clump`` examples to each batch that they do not fill over ``level``.

        Returns:
            The examples not given.
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
    """Indices by falling ``length / 2 ** (jitter * noise)``, noise from 0 to 1."""
    if not jitter:
        return longest_first(lengths)
    noise = _uniform(len(lengths), bits)
    # On a scale of logarithms 16 bits, which sort by radix, tell lengths 0.03 % apart.
    keys = np.log2(lengths.astype(np.float32)) + np.float32(1) - np.float32(jitter) * noise
    return longest_first((keys * 2048).astype(np.int32))


def _bits(seed: int | Sequence[int]) -> np.random.PCG64:
    """Raw bits, which NumPy keeps the same over versions, unlike what it makes of them."""
    seeds = [check_seed(each) for each in (seed if isinstance(seed, Sequence) else [seed])]
    return np.random.PCG64([len(seeds), *seeds])


def _uniform(count: int, bits: np.random.PCG64) -> NDArray[np.float32]:
    """From 0 to 1."""
    return (bits.random_raw(count) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _shuffle(count: int, bits: np.random.PCG64) -> NDArray[np.int64]:
    """A permutation; of 32 bits each, which sort in half the time of 64."""
    return stable_argsort((bits.random_raw(count) >> np.uint64(32)).astype(np.uint32), 1 << 32)


def _swap_similar(
    batch_of: NDArray[np.int32],
    lengths: NDArray[np.int32],
    max_tokens: int,
    count: int,
    bits: np.random.PCG64,
) -> None:
    """Mix a plan in place: batches swap examples of similar lengths, where both have room."""
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
        here, there = chosen[longer], chosen[shorter]
        items[here], items[there] = items[there], items[here]
    batch_of[items] = np.repeat(np.arange(count, dtype=np.int32), np.diff(offsets))
