"""The order of samples: a permutation of ``0, ..., count - 1`` that is computed, not stored.

    left, right = divmod(number, columns)
    left  = (left + mix(right, key 0)) % rows
    right = (right + mix(left, key 1)) % columns          and so on, for 8 keys
    number = left * columns + right, again from the top if it is ``count`` or more

This is a Feistel network on pairs (left, right) with additions modulo the two sides. Each step can
be undone, so the result is a permutation of ``rows * columns`` numbers. These are at most
``sqrt(count)`` more than ``count``. Applying it until the result is below ``count`` makes it a
permutation of ``count`` numbers ("cycle walking"; Black and Rogaway 2002, Ciphers with Arbitrary
Finite Domains). Nothing of the size of the data is in memory, any sample's place is known at once,
and the order depends on nothing but the seed, the epoch and the sample's number.

`mix` is the finalizer of SplitMix64 (Steele, Lea and Flood 2014). The keys are a BLAKE2b hash of
the seed and the epoch. The order is the same on every machine and with every version of NumPy.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_FEW = 24  # numbers up to which Python's integers are faster than NumPy's arrays
_MODULUS = (1 << 64) - 1
_SHIFTS = tuple(np.uint64(each) for each in (30, 27, 31))
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def permute(numbers: NDArray[np.int64], count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return where each number is in a random order of ``0, ..., count - 1``.

    Args:
        numbers: ``(n,)`` int64, from 0 to ``count - 1``.
        count: how many numbers are permuted.
        seed, epoch: integers of 0 or more; each pair has an order of its own.

    Returns:
        ``(n,)`` int64.
    """
    rows = max(math.isqrt(count - 1) + 1, 1)
    columns = -(-count // rows)
    keys = _keys(seed, epoch)
    if len(numbers) <= _FEW:
        few = [
            _apply_to_one(each, count, rows, columns, keys.tolist()) for each in numbers.tolist()
        ]
        return np.array(few, np.int64)
    found = _apply(numbers.astype(np.uint64), rows, columns, keys)
    while len(outside := np.flatnonzero(found >= count)):
        found[outside] = _apply(found[outside], rows, columns, keys)
    return found.astype(np.int64)


def _apply(
    numbers: NDArray[np.uint64], rows: int, columns: int, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    sides = (np.uint64(rows), np.uint64(columns))
    halves = list(np.divmod(numbers, sides[1]))
    for at, key in enumerate(keys):
        side = at % 2
        halves[side] = (halves[side] + _mix(halves[1 - side] + key) % sides[side]) % sides[side]
    return halves[0] * sides[1] + halves[1]


def _apply_to_one(number: int, count: int, rows: int, columns: int, keys: list[int]) -> int:
    """`_apply` with Python's integers, until the result is below ``count``."""
    while True:
        left, right = divmod(number, columns)
        for at in range(0, _ROUNDS, 2):
            left = (left + _mix_one(right + keys[at])) % rows
            right = (right + _mix_one(left + keys[at + 1])) % columns
        number = left * columns + right
        if number < count:
            return number


def _mix_one(value: int) -> int:
    value &= _MODULUS
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MODULUS
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MODULUS
    return value ^ (value >> 31)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Products and sums of arrays of uint64 are modulo 2^64."""
    values = (values ^ (values >> _SHIFTS[0])) * _FACTORS[0]
    values = (values ^ (values >> _SHIFTS[1])) * _FACTORS[1]
    return values ^ (values >> _SHIFTS[2])


def _keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)
