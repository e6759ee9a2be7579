"""Count the tokens and query-key pairs in an epoch of batches, padded and packed, from lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

from ..cost import BatchCount

BATCH_SIZES = (8, 16, 32, 64, 128)

# Small files are shuffled several times, until this many texts are drawn: few batches vary widely.
_TEXTS_DRAWN = 50_000


@dataclass(frozen=True)
class TextLengths:
    """Tokens of each text, ``(texts,)`` int64; ``encoder`` is ``None`` for a decoder-only model."""

    encoder: np.ndarray | None
    decoder: np.ndarray


def random_orders(texts: int, seed: int) -> list[np.ndarray]:
    """Random permutations of the texts, one per epoch; more epochs for fewer texts."""
    random = np.random.default_rng(seed)
    return [random.permutation(texts) for _ in range(-(-_TEXTS_DRAWN // texts))]


def sorted_order(lengths: TextLengths) -> np.ndarray:
    """The texts in order of length; the encoder's length comes first."""
    if lengths.encoder is None:
        return np.argsort(lengths.decoder)
    return np.lexsort((lengths.decoder, lengths.encoder))


def count_packed_epoch(lengths: TextLengths) -> BatchCount:
    """Tokens and pairs of all texts without padding."""
    return _count(lengths.encoder, lengths.decoder, np.ones_like(lengths.decoder))


def count_padded_epoch(lengths: TextLengths, order: np.ndarray, batch_size: int) -> BatchCount:
    """Slots and pairs of padded batches of ``batch_size`` texts, taken in this order."""
    starts = np.arange(0, len(order), batch_size)
    rows = np.diff([*starts, len(order)])
    encoder = None
    if lengths.encoder is not None:
        encoder = np.maximum.reduceat(lengths.encoder[order], starts)
    return _count(encoder, np.maximum.reduceat(lengths.decoder[order], starts), rows)


def _count(encoder: np.ndarray | None, decoder: np.ndarray, rows: np.ndarray) -> BatchCount:
    """Tokens and pairs of batches; batch i has ``rows[i]`` rows of equal length."""
    if encoder is None:
        encoder = np.zeros_like(decoder)
    return BatchCount(
        encoder_tokens=int((rows * encoder).sum()),
        decoder_tokens=int((rows * decoder).sum()),
        encoder_pairs=int((rows * encoder**2).sum()),
        decoder_pairs=int((rows * decoder**2).sum()),
        cross_pairs=int((rows * encoder * decoder).sum()),
        sequences=int(rows.sum()),
    )


def sum_counts(counts: Sequence[BatchCount]) -> BatchCount:
    """The sum of several counts."""
    return BatchCount(*map(sum, zip(*map(astuple, counts))))
