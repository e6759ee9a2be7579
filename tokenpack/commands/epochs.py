"""Count the tokens and query-key pairs in an epoch of batches, padded and packed, from lengths."""

from __future__ import annotations

from dataclasses import dataclass

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


def random_orders(texts: int, seed: int) -> np.ndarray:
    """Random permutations of the texts, ``(epochs, texts)``; more epochs for fewer texts."""
    random = np.random.default_rng(seed)
    return np.stack([random.permutation(texts) for _ in range(-(-_TEXTS_DRAWN // texts))])


def sorted_order(lengths: TextLengths) -> np.ndarray:
    """The texts in order of length, ``(1, texts)``; the encoder's length comes first."""
    if lengths.encoder is None:
        return np.argsort(lengths.decoder)[None]
    return np.lexsort((lengths.decoder, lengths.encoder))[None]


def count_packed(lengths: TextLengths, epochs: int = 1) -> BatchCount:
    """Tokens and pairs of all texts in all epochs, without padding."""
    return _count(lengths.encoder, lengths.decoder, np.full_like(lengths.decoder, epochs))


def count_padded(lengths: TextLengths, orders: np.ndarray, batch_size: int) -> BatchCount:
    """Slots and pairs of padded batches of ``batch_size`` texts.

    ``orders`` is ``(epochs, texts)``; an epoch takes the texts in its order.
    """
    texts = orders.shape[1]
    starts = np.arange(0, texts, batch_size)
    rows = np.diff([*starts, texts])
    decoder = np.maximum.reduceat(lengths.decoder[orders], starts, axis=1)
    encoder = None
    if lengths.encoder is not None:
        encoder = np.maximum.reduceat(lengths.encoder[orders], starts, axis=1)
    return _count(encoder, decoder, np.broadcast_to(rows, decoder.shape))


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
