"""Denoisers: how much of a text becomes noise, in how many spans, and with which prefix.

For a text of L tokens, with halves rounded to even:

    noise tokens  N = round(L * noise_density), from 1 to L - 1
    spans         k = round(N / mean_noise_span_length), at least 1, and at most L - N

This depends only on lengths, not on tokens. So the lengths of a batch, and the longest text that
fits a limit, are known before the batch is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...checks import as_integer
from ...segments import offsets_of
from ..tokens import Tokens
from .random_parts import words

DENSITY, MEAN = 0.15, 3.0

# The last bytes, from the highest down, as in the pretraining of the released models. The ids of
# ByT5Tokenizer's <extra_id_0>, ... follow the bytes, and no text that the models saw contains them.
_BYT5_SENTINELS = range(258, 158, -1)


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """One way to corrupt a text, for `T5SpanCorruptionCollatorFast`.

    Table 1 of UL2 (Tay et al. 2022) lists a mixture of denoisers.

    Attributes:
        noise_density: the fraction of the tokens that become noise, above 0 and below 1.
        mean_noise_span_length: the mean number of tokens per span, at least 1. None means one span
            at the end of the text, without a sentinel (sequential denoising, or prefix-LM).
        weight: the relative probability of this denoiser in a mixture.
        prefix: the tokens at the front of the source: one id, several ids, or a string for the
            tokenizer (UL2's "[NLU]", "[S2S]", "[NLG]").
    """

    noise_density: float = DENSITY
    mean_noise_span_length: float | None = MEAN
    weight: float = 1.0
    prefix: int | str | Sequence[int] | None = None

    def __post_init__(self) -> None:
        mean = self.mean_noise_span_length
        if not 0 < self.noise_density < 1:
            raise ValueError(
                f"noise_density must be above 0 and below 1, got {self.noise_density!r}"
            )
        if mean is not None and not 1 <= mean < float("inf"):
            raise ValueError(f"mean_noise_span_length must be None or at least 1, got {mean!r}")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight must be above 0 and finite, got {self.weight!r}")


class CorruptionCounts(NamedTuple):
    """Numbers of tokens and spans of each corrupted text, ``(num_texts,)`` int64 each.

    Attributes:
        prefix: prefix tokens at the front of the source.
        kept: tokens of the text that stay in the source.
        noise: tokens of the text that move to the target.
        spans: spans of noise. There is the same number of spans of kept tokens.
        sentinels: sentinels in the target. The source has the same number, but no sentinel if the
            text has no noise.
    """

    prefix: NDArray[np.int64]
    kept: NDArray[np.int64]
    noise: NDArray[np.int64]
    spans: NDArray[np.int64]
    sentinels: NDArray[np.int64]

    @property
    def source_lengths(self) -> NDArray[np.int64]:
        """Tokens of each source, including EOS."""
        return self.prefix + self.kept + np.minimum(self.sentinels, self.noise) + 1

    @property
    def target_lengths(self) -> NDArray[np.int64]:
        """Tokens of each target, including EOS."""
        return self.noise + self.sentinels + 1


class Mixture:
    """Several denoisers. Each text draws one, with probability proportional to its weight.

    Attributes:
        denoisers: the denoisers.
        prefixes: the prefix tokens of each denoiser.
    """

    def __init__(self, denoisers: Sequence[Denoiser], tokenizer: Any) -> None:
        """Create a mixture. The tokenizer converts prefixes that are strings.

        Raises:
            TypeError: if a prefix is not a token id, a list of ids or a string.
            ValueError: if the tokenizer cannot encode a prefix without unknown tokens.
        """
        self.denoisers = tuple(denoisers)
        prefixes = [_prefix(tokenizer, each.prefix) for each in denoisers]
        flat = np.array([token for each in prefixes for token in each], np.int64)
        self.prefixes = Tokens(flat, offsets_of([len(each) for each in prefixes]))
        weights = np.array([each.weight for each in denoisers], float)
        self._shares = np.cumsum(weights / weights.sum())[:-1]
        self._densities = np.array([each.noise_density for each in denoisers], float)
        # A sequential denoiser is one span, as for an infinite mean length, without a sentinel.
        means = [each.mean_noise_span_length for each in denoisers]
        self._means = np.array([np.inf if mean is None else mean for mean in means], float)

    def draw(self, keys: NDArray[np.uint64], number: NDArray[np.int64]) -> NDArray[np.int64]:
        """Draw the denoiser of each text from word ``number`` of its key, ``(num_texts,)``."""
        if len(self.denoisers) == 1:
            return np.zeros(len(keys), np.int64)
        uniform = (words(keys, number) >> np.uint64(11)) * 2.0**-53
        return np.searchsorted(self._shares, uniform, side="right")

    def counts(self, lengths: NDArray[np.int64], drawn: NDArray[np.int64]) -> CorruptionCounts:
        """Return the counts of texts with these lengths and the denoisers drawn for them."""
        noise = np.rint(lengths * self._densities[drawn]).astype(np.int64)
        noise = np.minimum(np.maximum(noise, 1), lengths - 1)
        kept = lengths - noise
        means = self._means[drawn]
        spans = np.rint(noise / means).astype(np.int64)
        spans = np.minimum(np.maximum(spans, 1), kept)
        sentinels = np.where(np.isinf(means), 0, spans)
        return CorruptionCounts(self.prefixes.lengths[drawn], kept, noise, spans, sentinels)

    def longest(self, denoiser: int, fits: Callable[[CorruptionCounts], Any]) -> int:
        """Return the length of the longest text whose counts fit, or 0 if two tokens do not fit.

        It is found by bisection: a longer text never has fewer tokens on a side or fewer spans.
        """

        def fits_length(length: int) -> bool:
            return bool(fits(self.counts(np.array([length]), np.array([denoiser])))[0])

        if not fits_length(2):
            return 0
        low, high = 2, 4
        while fits_length(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits_length(middle) else (low, middle)
        return low


def sentinel_ids_of(tokenizer: Any, given: Sequence[int] | None) -> NDArray[np.int64]:
    """Return the ids of the sentinels, in the order of their use."""
    if given is not None:
        ids = [as_integer(f"sentinel_ids[{at}]", each) for at, each in enumerate(given)]
        if not ids:
            raise ValueError("sentinel_ids must hold at least one id, got none")
        return np.array(ids, np.int64)
    if any(kind.__name__ == "ByT5Tokenizer" for kind in type(tokenizer).__mro__):
        return np.array(_BYT5_SENTINELS, np.int64)
    vocabulary = tokenizer.get_vocab()
    for pattern in ("<extra_id_{}>", "▁<extra_id_{}>"):
        ids = []
        while (found := vocabulary.get(pattern.format(len(ids)))) is not None:
            ids.append(found)
        if ids:
            return np.array(ids, np.int64)
    raise ValueError(
        "tokenizer must have sentinels <extra_id_0>, <extra_id_1>, ... in its vocabulary, got a "
        f"{type(tokenizer).__name__} of {len(vocabulary)} tokens without them; pass sentinel_ids"
    )


def _prefix(tokenizer: Any, prefix: int | str | Sequence[int] | None) -> list[int]:
    if prefix is None:
        return []
    if not isinstance(prefix, str):
        given = prefix if isinstance(prefix, Sequence) else [prefix]
        return [as_integer("prefix", each) for each in given]
    token_id = tokenizer.get_vocab().get(prefix)
    if token_id is not None:
        return [token_id]
    ids: list[int] = tokenizer.encode(prefix, add_special_tokens=False)
    if not ids or getattr(tokenizer, "unk_token_id", None) in ids:
        raise ValueError(
            f"prefix must have no unknown tokens, got {prefix!r}; add it to the tokenizer"
        )
    return ids
