"""Denoisers: how much of a text becomes noise, in how many spans, behind which prefix.

    noise tokens  N = round(L * noise_density), from 1 to L - 1
    spans         k = round(N / mean_noise_span_length), at least 1, and at most L - N

of a text of L tokens, halves rounded to even: arithmetic on lengths, without the tokens. So the
lengths of a batch are known before it is made, and so is where a text must be cut to fit a limit.
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


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """One way to corrupt a text; see `span_corruption`, and UL2's table 1 for a mixture.

    Attributes:
        noise_density: share of the tokens that become noise, above 0 and below 1.
        mean_noise_span_length: tokens of a span on average, 1 at least; None for one span that
            reaches the end of the text and leaves no sentinel (sequential, or prefix-LM).
        weight: how often it is drawn, relative to the others.
        prefix: what stands at the front of the source: a token id, several, or a string for the
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


class Shape(NamedTuple):
    """What becomes of each text, ``(num_texts,)`` int64 each.

    Attributes:
        prefix: tokens before the source.
        kept: tokens of the text that stay in the source.
        noise: tokens of the text that go to the target.
        spans: parts that each of these falls into.
        marks: sentinels in the target; in the source, as many where there is noise.
    """

    prefix: NDArray[np.int64]
    kept: NDArray[np.int64]
    noise: NDArray[np.int64]
    spans: NDArray[np.int64]
    marks: NDArray[np.int64]

    @property
    def source_marks(self) -> NDArray[np.int64]:
        return np.minimum(self.marks, self.noise)

    @property
    def source_lengths(self) -> NDArray[np.int64]:
        return self.prefix + self.kept + self.source_marks + 1

    @property
    def target_lengths(self) -> NDArray[np.int64]:
        return self.noise + self.marks + 1


class Mixture:
    """Denoisers of which each text draws one by weight.

    Attributes:
        denoisers: as given.
        prefixes: the tokens before the source of each.
    """

    def __init__(self, denoisers: Sequence[Denoiser], tokenizer: Any) -> None:
        """Take the prefixes from a tokenizer, where they are strings.

        Raises:
            TypeError: if a prefix is no token id, several, nor a string.
            ValueError: if the tokenizer does not know one.
        """
        self.denoisers = tuple(denoisers)
        prefixes = [_prefix(tokenizer, each.prefix) for each in denoisers]
        flat = np.array([token for each in prefixes for token in each], np.int64)
        self.prefixes = Tokens(flat, offsets_of([len(each) for each in prefixes]))
        weights = np.array([each.weight for each in denoisers], float)
        self._shares = np.cumsum(weights / weights.sum())[:-1]
        self._densities = np.array([each.noise_density for each in denoisers], float)
        # A sequential denoiser is one span of any mean that is long enough, without its sentinel.
        means = [each.mean_noise_span_length for each in denoisers]
        self._means = np.array([np.inf if mean is None else mean for mean in means], float)

    def draw(self, keys: NDArray[np.uint64], number: NDArray[np.int64]) -> NDArray[np.int64]:
        """``(num_texts,)``, the denoiser of each text, by word ``number`` of its key."""
        if len(self.denoisers) == 1:
            return np.zeros(len(keys), np.int64)
        uniform = (words(keys, number) >> np.uint64(11)) * 2.0**-53
        return np.searchsorted(self._shares, uniform, side="right")

    def shape(self, lengths: NDArray[np.int64], drawn: NDArray[np.int64]) -> Shape:
        """Of texts of so many tokens, each with the denoiser drawn for it."""
        noise = np.rint(lengths * self._densities[drawn]).astype(np.int64)
        noise = np.minimum(np.maximum(noise, 1), lengths - 1)
        kept = lengths - noise
        means = self._means[drawn]
        spans = np.rint(noise / means).astype(np.int64)
        spans = np.minimum(np.maximum(spans, 1), kept)
        marks = np.where(np.isinf(means), 0, spans)
        return Shape(self.prefixes.lengths[drawn], kept, noise, spans, marks)

    def longest(self, denoiser: int, fits: Callable[[Shape], Any]) -> int:
        """Tokens of the longest text whose shape ``fits``; 0 if not even one of two does.

        By bisection: longer texts never have fewer tokens on either side, nor fewer spans.
        """

        def good(length: int) -> bool:
            return bool(fits(self.shape(np.array([length]), np.array([denoiser])))[0])

        if not good(2):
            return 0
        low, high = 2, 4
        while good(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if good(middle) else (low, middle)
        return low


def sentinel_ids_of(tokenizer: Any, given: Sequence[int] | None) -> NDArray[np.int64]:
    """Ids of the sentinels, in the order of their use."""
    if given is not None:
        ids = [as_integer(f"sentinel_ids[{at}]", each) for at, each in enumerate(given)]
        if not ids:
            raise ValueError("sentinel_ids must hold at least one id, got none")
        return np.array(ids, np.int64)
    vocabulary = tokenizer.get_vocab()
    for pattern in ("<extra_id_{}>", "▁<extra_id_{}>"):
        ids = []
        while (found := vocabulary.get(pattern.format(len(ids)))) is not None:
            ids.append(found)
        if ids:
            return np.array(ids, np.int64)
    raise ValueError(
        "tokenizer must have sentinels <extra_id_0>, <extra_id_1>, ... in its vocabulary, got a "
        f"{type(tokenizer).__name__} of {len(vocabulary)} tokens without (give sentinel_ids)"
    )


def _prefix(tokenizer: Any, prefix: int | str | Sequence[int] | None) -> list[int]:
    if prefix is None:
        return []
    if not isinstance(prefix, str):
        given = prefix if isinstance(prefix, Sequence) else [prefix]
        return [as_integer("prefix", each) for each in given]
    known = tokenizer.get_vocab().get(prefix)
    if known is not None:
        return [known]
    ids: list[int] = tokenizer.encode(prefix, add_special_tokens=False)
    if not ids or getattr(tokenizer, "unk_token_id", None) in ids:
        raise ValueError(f"prefix must be a string that the tokenizer knows, got {prefix!r}")
    return ids
