"""Assign the examples of an epoch to batches of tokens: full, mixed, and different in each epoch.

    sum of lengths in a batch <= max_tokens,   the number of batches depends only on the lengths

A bin packer finds the fewest bins, but the same bins each time, with long sequences together.
Training needs random batches that are equally full, and the same number in each epoch. So the
number of batches is fixed first. Then examples are dealt to the batches in order of decreasing
length, after a random jitter of the lengths:

    while many tokens are left:   a run of consecutive batches, from a random one on, gets one
                                  example each, unless the batch would exceed the mean of all
                                  batches by more than an example
    for the shortest examples:    the emptier half of the batches gets them, and the emptiest batch
                                  gets the longest

The first rule mixes: any two examples that fit together can meet. The second rule is longest
processing time first (Graham 1969) for many batches at once, and levels the batches: for log-normal
lengths, they differ by 1 %. A round takes a few NumPy calls over half of the batches, and there are
about three rounds per example of a batch. Examples that do not fit their batch wait for the next
round.

Some lengths leave less freedom, for example many lengths over a third of a batch. Then less is
dealt at random and the jitter is smaller, down to none. The last resort is the best-fit packing.
These plans are mixed afterwards: batches swap examples of similar lengths.

The number of batches is the smallest, in steps of 0.25 to 0.5 %, for which a deal of the sorted
lengths with fixed seeds succeeds. It is therefore the same for any order of the lengths, and there
is always a plan for it: this deal, with equal lengths shuffled.

With padding, a batch is filled with slots instead of tokens. Examples form groups of similar
lengths:

    slots of a group = rows * (longest source + longest target)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ..checks import at_least_one
from ..packing.lengths import Lengths, as_lengths, fit
from ..packing.packer import pack_lengths
from ..segments import Plan, group_by_bin, longest_first
from .deal import Freedom, deal, lower_bound, random_bits, shuffle, uniform

_NEAR = (0.0, 0.0025, 0.005)  # parts of the lower bound to add to it, tried in turn
_OVER_BEST_FIT = 0.02  # at most this part more batches than best fit
_TRIALS = 3  # seeds that must succeed for a number of batches
_MANY = 1_000_000  # examples; from here on, one trial is enough because deals hardly differ
_LOOK_AHEAD = 64  # rows of a group to look at first
_SWAPS = 16  # rounds of swaps if the deal was not random
_REPEATS = 2  # seeds to try before the deal gets stricter


_FREE = (Freedom(0.25, 1.0), Freedom(0.5, 0.5))
_STRICT = (Freedom(1.0, 0.1), Freedom(1.0, 0.0))


def count_batches(lengths: Lengths, max_tokens: int, *, spare: float = 0.0) -> int:
    """The number of batches that `plan_batches` makes, for any order of the lengths and any seed.

    Args:
        lengths: ``(n,)`` integers from 1 to ``max_tokens``.
        max_tokens: maximum number of tokens of a batch.
        spare: part of the batches to add, so that slightly different lengths fit too.

    Returns:
        A number at most 2 % (plus ``spare``) above the bins that best-fit decreasing needs.

    Raises:
        TypeError: if the lengths or ``max_tokens`` are not integers.
        ValueError: if there are no lengths, or a length is less than 1 or more than ``max_tokens``.
    """
    checked = _checked(lengths, max_tokens)
    ordered = checked[longest_first(checked)]
    low = lower_bound(ordered, max_tokens)
    start = low + int(low * spare)
    for count, _ in _fixed_seed_deals(ordered, max_tokens, _increased(start, _NEAR), _FREE):
        return count
    best = pack_lengths(ordered, max_tokens).num_bins
    most = best + int(best * (spare + _OVER_BEST_FIT))
    if start <= most:
        between = [count for count in ((best + most) // 2, most) if count >= start]
        for count, _ in _fixed_seed_deals(ordered, max_tokens, between, _FREE):
            return count
        counts = [*_increased(start, _NEAR), *_increased(best + int(best * spare), _NEAR), most]
        tried = sorted(count for count in counts if count <= most)
        for count, _ in _fixed_seed_deals(ordered, max_tokens, tried, _STRICT):
            return count
    return best


def plan_batches(
    lengths: Lengths, max_tokens: int, num_batches: int, seed: int | Sequence[int] = 0
) -> Plan:
    """Deal examples to batches of at most ``max_tokens`` tokens.

    Args:
        lengths: ``(n,)`` integers from 1 to ``max_tokens``.
        max_tokens: maximum number of tokens of a batch.
        num_batches: the number of batches, from `count_batches`.
        seed: an integer of 0 or more, or several, such as (seed, epoch). A seed gives the same plan
            on every machine.

    Returns:
        ``items (n,)`` and ``offsets (num_batches + 1,)``, both int64: batch b has the examples
        ``items[offsets[b]:offsets[b + 1]]``. The batches and the examples of a batch are in random
        order. No batch is empty.

    Raises:
        TypeError: if the lengths, ``max_tokens``, ``num_batches`` or ``seed`` are not integers.
        ValueError: if there are no lengths, a length is less than 1 or more than ``max_tokens``, or
            no plan with ``num_batches`` batches was found.
    """
    plan = find_plan(lengths, max_tokens, num_batches, seed)
    if plan is None:
        raise ValueError(
            "num_batches must be the result of count_batches for these lengths and max_tokens = "
            f"{max_tokens}, got {num_batches}"
        )
    return plan


def find_plan(
    lengths: Lengths, max_tokens: int, num_batches: int, seed: int | Sequence[int] = 0
) -> Plan | None:
    """Call `plan_batches`, but return None if there is no plan with ``num_batches`` batches."""
    checked = _checked(lengths, max_tokens)
    count = at_least_one("num_batches", num_batches)
    bits = random_bits(seed)
    order = shuffle(len(checked), bits)  # of equal lengths, and within a batch
    shuffled = checked[order]
    batch_of = _deal_freely(shuffled, max_tokens, count, bits)
    if batch_of is None:
        batch_of = _deal_strictly(shuffled, max_tokens, count, bits)
        if batch_of is None:
            return None
        _swap_similar(batch_of, shuffled, max_tokens, count, bits)
    return group_by_bin(shuffle(count, bits)[batch_of], count, order)


def group_similar(
    lengths: NDArray[np.integer],
    max_slots: int,
    *,
    seed: int | Sequence[int] = 0,
    jitter: float = 0.0,
) -> Plan:
    """Group examples of similar lengths, so that padding a group wastes little.

    Examples are sorted by source. If there are targets too, the sorted examples are cut into about
    as many strips as a strip has groups, and each strip is sorted by target. This balances the
    padding of sources and targets.

    Args:
        lengths: ``(n, 2)`` source and target tokens, or ``(n,)``. The sum of a row is from 1 to
            ``max_slots``.
        max_slots: maximum of rows * (longest source + longest target) of a group.
        seed: seed of the shuffle of equal lengths, and of the jitter.
        jitter: sort by lengths that are up to ``2 ** jitter`` times shorter, at random, so that
            other seeds give other groups. With 0, the slots of the groups do not depend on the seed
            or on the order of the examples.

    Returns:
        ``items (n,)`` and ``offsets (num_groups + 1,)``, both int64.
    """
    bits = random_bits(seed)
    order = shuffle(len(lengths), bits)
    source, *targets = lengths.reshape(len(lengths), -1)[order].T.astype(np.int64)
    noise = np.exp2(-jitter * uniform(len(order), bits)) if jitter else np.float32(1)
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
    """Cut a sequence of examples into groups of at most ``max_slots`` slots.

    Args:
        lengths: ``(n, 2)`` source and target tokens, or ``(n,)``. The sum of a row is at most
            ``max_slots``.
        max_slots: maximum of rows * (longest source + longest target) of a group.

    Returns:
        ``offsets (num_groups + 1,)`` int64: group g has the examples from ``offsets[g]`` to
        ``offsets[g + 1] - 1``.
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


def _increased(count: int, parts: Sequence[float]) -> list[int]:
    """``count``, increased by each of ``parts`` of it."""
    return [count + int(count * part) for part in parts]


def _fixed_seed_deals(
    ordered: NDArray[np.int32], max_tokens: int, counts: Sequence[int], freedoms: Sequence[Freedom]
) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """``(count, batch_of)`` of each deal that succeeds with fixed seeds, for sorted lengths."""
    trials = _TRIALS if len(ordered) < _MANY else 1
    for count in dict.fromkeys(counts):
        for freedom in freedoms:
            dealt = (
                deal(ordered, max_tokens, count, freedom, np.random.PCG64(trial))
                for trial in range(trials)
            )
            batch_of = next(dealt)
            if batch_of is not None and all(other is not None for other in dealt):
                yield count, batch_of


def _deal_freely(
    lengths: NDArray[np.int32], max_tokens: int, count: int, bits: np.random.PCG64
) -> NDArray[np.int32] | None:
    """``(n,)`` int32, the batch of each example, mostly random. None if no such deal succeeds."""
    for freedom in _FREE:
        for _ in range(_REPEATS):
            batch_of = deal(lengths, max_tokens, count, freedom, bits)
            if batch_of is not None:
                return batch_of
    return None


def _deal_strictly(
    lengths: NDArray[np.int32], max_tokens: int, count: int, bits: np.random.PCG64
) -> NDArray[np.int32] | None:
    """``(n,)`` int32, the batch of each example. The last resort is the deal of `count_batches`."""
    for freedom in _STRICT:
        batch_of = deal(lengths, max_tokens, count, freedom, bits)
        if batch_of is not None:
            return batch_of
    order = longest_first(lengths)
    batch_of = np.empty(len(lengths), np.int32)
    for _, found in _fixed_seed_deals(lengths[order], max_tokens, [count], (*_FREE, *_STRICT)):
        batch_of[order] = found
        return batch_of
    best = pack_lengths(lengths[order], max_tokens)
    if len(best) != count:
        return None
    batch_of[order[best.items]] = np.repeat(np.arange(count), np.diff(best.offsets))
    return batch_of


def _swap_similar(
    batch_of: NDArray[np.int32],
    lengths: NDArray[np.int32],
    max_tokens: int,
    count: int,
    bits: np.random.PCG64,
) -> None:
    """Mix a plan in place: batches swap examples of similar lengths if both have room."""
    items, offsets = group_by_bin(batch_of, count)
    fill = np.add.reduceat(lengths[items], offsets[:-1], dtype=np.int64)
    counts = np.diff(offsets).astype(np.uint64)
    for turn in range(_SWAPS):
        batches = shuffle(count, bits)
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
