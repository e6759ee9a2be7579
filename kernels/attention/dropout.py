"""Device functions for dropout of attention weights: which ones a seed keeps."""

from __future__ import annotations

from typing import NamedTuple

from .._triton import tl, triton


class DropoutParams(NamedTuple):
    """Run-time values that determine which attention weights dropout keeps."""

    seed: tl.tensor
    seq: tl.tensor
    head: tl.tensor
    threshold: tl.tensor  # uint32: random bits below it drop the weight
    factor: tl.tensor  # 1 / (1 - dropout_p), of the weights that are kept


@triton.jit
def dropout_params(seed, seq, head, dropout_p):
    """The `DropoutParams` of one head."""
    threshold = tl.full([], dropout_p * 4294967296.0, tl.float32).to(tl.uint32)
    return DropoutParams(seed, seq, head, threshold, 1.0 / (1.0 - dropout_p))


@triton.jit
def dropout_keep_mask(dropout, first_query, row, first_key, column):
    """True where dropout keeps the weight of a query and a key.

    ``row`` and ``column`` are counted from the first query and key of the tile, whose indices are
    multiples of 16. The mask is a function of the seed, the sequence number, the head, the query
    and the key. The backward can therefore recompute it with other tiles, and it does not depend on
    the lengths of the other sequences. The random bits are Philox4x32 with 7 rounds, the fewest
    that pass BigCrush (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

    One call gives four numbers. The queries m, m + 8 and the keys n, n + 8 share it, because the
    matrix units leave their scores in the same thread: the compiler merges the four equal calls.
    """
    zeros = row * 0 + column * 0  # broadcasts each part of the counter to the tile's shape
    bits = tl.philox(
        dropout.seed,
        first_key + (column & ~8) + zeros,
        first_query + (row & ~8) + zeros,
        dropout.head + zeros,
        dropout.seq + zeros,
        n_rounds=7,
    )
    later_key, later_query = (column & 8) != 0, (row & 8) != 0
    first = tl.where(later_key, bits[1], bits[0])
    second = tl.where(later_key, bits[3], bits[2])
    return tl.where(later_query, second, first).to(tl.uint32, bitcast=True) >= dropout.threshold
