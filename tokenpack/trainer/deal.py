"""One deal of examples to batches: most of them at random, the shortest to level the batches.

`tokenpack.trainer.batches` describes the rules. A deal fails if some examples do not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checks import check_seed
from ..segments import longest_first, stable_argsort

_CLUMP = 64  # deal several examples to a batch at once if they fill at most 1/64 of it
_SINGLE = 16  # but at most 1/16 of the examples that are left for a batch
_PATIENCE = 64  # rounds that place less than half of their examples before a deal fails


class Freedom(NamedTuple):
    """How random a deal is.

    Attributes:
        strict: the part of the tokens that levels the batches. These are the shortest examples.
        jitter: sort examples as if they were up to ``2 ** jitter`` times shorter, at random.
    """

    strict: float
    jitter: float


def lower_bound(lengths: NDArray[np.int32], max_tokens: int) -> int:
    """A lower bound of the number of batches.

    It is the larger of the tokens over ``max_tokens``, and the number of examples that are longer
    than half of ``max_tokens``, no two of which fit together.
    """
    over_half = int(np.count_nonzero(lengths > max_tokens // 2))
    return max(over_half, -(-int(lengths.sum(dtype=np.int64)) // max_tokens))


def deal(
    lengths: NDArray[np.int32],
    max_tokens: int,
    count: int,
    freedom: Freedom,
    bits: np.random.PCG64,
) -> NDArray[np.int32] | None:
    """``(n,)`` int32, the batch of each example. None if some examples do not fit."""
    if not lower_bound(lengths, max_tokens) <= count <= len(lengths):
        return None
    order = _jittered_order(lengths, freedom.jitter, bits)
    tokens = lengths[order]
    remaining = np.cumsum(tokens[::-1], dtype=np.int64)[::-1]  # tokens from here to the end
    at_random = int(np.count_nonzero(remaining > freedom.strict * remaining[0]))
    state = _Deal(tokens, max_tokens, count)
    waiting = state.at_random(at_random, bits) if at_random else np.empty(0, np.int32)
    if waiting is None or not state.level(waiting, at_random) or not state.fill.all():
        return None
    batch_of = np.empty(len(order), np.int32)
    batch_of[order] = state.batch_of
    return batch_of


class _Deal:
    """A deal in progress. Examples are in the order in which they are dealt.

    Attributes:
        tokens: ``(n,)`` int32, the length of each example.
        batch_of: ``(n,)`` int32, the batch of each example that has been dealt.
        fill: ``(count,)`` int64, the tokens of each batch so far.
    """

    def __init__(self, tokens: NDArray[np.int32], max_tokens: int, count: int) -> None:
        self.tokens, self.max_tokens = tokens, max_tokens
        self.batch_of = np.empty(len(tokens), np.int32)
        self.fill = np.zeros(count, np.int64)

    def at_random(self, end: int, bits: np.random.PCG64) -> NDArray[np.int32] | None:
        """Deal the first ``end`` examples at random.

        Returns:
            The examples that are left over, or None if too many do not fit.
        """
        run = (len(self.fill) + 1) // 2
        dealt = stalls = 0
        waiting = np.empty(0, np.int32)
        while dealt < end and stalls < _PATIENCE:
            clump = self._clump(waiting, dealt, run)
            now = self._with_next(waiting, dealt, min(dealt + run * clump - len(waiting), end))
            dealt += max(len(now) - len(waiting), 0)
            longest, coming = self._longest_and_sum(now[: run * clump])
            level = int((self.fill.sum() + coming) / len(self.fill) + clump * longest)
            first = int(bits.random_raw() % len(self.fill))
            batches = (first + np.arange(run)) % len(self.fill)
            waiting = self._put(now, batches, clump, min(level, self.max_tokens))
            stalls += 2 * len(waiting) > len(now)
        return waiting if dealt == end else None

    def level(self, waiting: NDArray[np.int32], dealt: int) -> bool:
        """Deal the waiting examples and all from ``dealt`` on. Returns whether all of them fit."""
        stalls = 0
        while len(waiting) or dealt < len(self.tokens):
            roomy = np.flatnonzero(self.fill <= self.fill.mean())
            batches = roomy[stable_argsort(self.fill[roomy], self.max_tokens + 1)]
            left = len(self.tokens) - dealt + len(waiting)
            clump = self._clump(waiting, dealt, len(batches))
            clump = max(
                min(clump, left // (_SINGLE * len(self.fill))), 1
            )  # smaller towards the end
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
        """How many examples a batch gets at once: several if they are short."""
        longest = self.tokens[waiting].max(initial=1)
        longest = self.tokens[dealt : dealt + run].max(initial=longest)
        return max(self.max_tokens // (_CLUMP * int(longest)), 1)

    def _with_next(self, waiting: NDArray[np.int32], dealt: int, end: int) -> NDArray[np.int32]:
        end = min(end, len(self.tokens))
        return np.concatenate((waiting, np.arange(dealt, end, dtype=np.int32)))

    def _longest_and_sum(self, examples: NDArray[np.int32]) -> tuple[int, int]:
        """The tokens of the longest of ``examples``, and of all of them."""
        tokens = self.tokens[examples]
        return int(tokens.max()), int(tokens.sum(dtype=np.int64))

    def _put(
        self, examples: NDArray[np.int32], batches: NDArray[np.int64], clump: int, level: int
    ) -> NDArray[np.int32]:
        """Give ``clump`` examples to each batch that does not exceed ``level`` with them.

        Returns:
            The examples that were not given.
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
    """Indices by decreasing ``length / 2 ** (jitter * noise)``, with noise from 0 to 1."""
    if not jitter:
        return longest_first(lengths)
    noise = uniform(len(lengths), bits)
    # 16-bit keys are sorted by radix. On a logarithmic scale, they resolve 0.03 % of a length.
    keys = np.log2(lengths.astype(np.float32)) + np.float32(1) - np.float32(jitter) * noise
    return longest_first((keys * 2048).astype(np.int32))


def random_bits(seed: int | Sequence[int]) -> np.random.PCG64:
    """A source of raw random bits, which do not depend on the version of NumPy."""
    seeds = [check_seed(each) for each in (seed if isinstance(seed, Sequence) else [seed])]
    return np.random.PCG64([len(seeds), *seeds])


def uniform(count: int, bits: np.random.PCG64) -> NDArray[np.float32]:
    """``(count,)`` float32, uniform random numbers from 0 to 1."""
    return (bits.random_raw(count) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def shuffle(count: int, bits: np.random.PCG64) -> NDArray[np.int64]:
    """A random permutation. It sorts 32-bit keys, in half the time of 64-bit keys."""
    return stable_argsort((bits.random_raw(count) >> np.uint64(32)).astype(np.uint32), 1 << 32)
