"""The lengths of a file's texts, and what an epoch of batches of them holds, padded and packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

from ..cost import BatchCount

BATCH_SIZES = (8, 16, 32, 64, 128)

# Random batches of few texts vary; enough epochs of them to draw this many texts.
_TEXTS_DRAWN = 50_000


@dataclass(frozen=True)
class Sides:
    """Tokens of each text, ``(texts,)`` int64. ``encoder`` is ``None`` in a decoder-only model."""

    encoder: np.ndarray | None
    decoder: np.ndarray


def random_orders(texts: int, seed: int) -> list[np.ndarray]:
    """Epochs of the shuffled texts, as many as it takes for batches of few texts to even out."""
    random = np.random.default_rng(seed)
    return [random.permutation(texts) for _ in range(-(-_TEXTS_DRAWN // texts))]


def sorted_order(sides: Sides) -> np.ndarray:
    """Texts by length, the encoder's first."""
    if sides.encoder is None:
        return np.argsort(sides.decoder)
    return np.lexsort((sides.decoder, sides.encoder))


def count_packed(sides: Sides) -> BatchCount:
    """Tokens and pairs of all texts."""
    return _count(sides.encoder, sides.decoder, np.ones_like(sides.decoder))


def count_padded(sides: Sides, order: np.ndarray, batch_size: int) -> BatchCount:
    """Slots and pairs of batches of ``batch_size`` texts each, in this order."""
    starts = np.arange(0, len(order), batch_size)
    rows = np.diff([*starts, len(order)])
    encoder = None
    if sides.encoder is not None:
        encoder = np.maximum.reduceat(sides.encoder[order], starts)
    return _count(encoder, np.maximum.reduceat(sides.decoder[order], starts), rows)


def _count(encoder: np.ndarray | None, decoder: np.ndarray, rows: np.ndarray) -> BatchCount:
    """Tokens and pairs of batches with ``rows`` rows each, all of them as long as given."""
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


def add(counts: Sequence[BatchCount]) -> BatchCount:
    """All of them together."""
    return BatchCount(*map(sum, zip(*map(astuple, counts))))
