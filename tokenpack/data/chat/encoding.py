"""Texts and their learned spans as ids and labels.

A text is tokenized once and as a whole. Token t is learned if its first character lies in a learned
span:

    begin <= start of t < end        labels[t] = input_ids[t], else -100

So a token that joins the last character of a header with the first one of an answer is context. At
inference the header is tokenized alone, and the model could not begin in the middle of a token.
Such tokens are counted. The offsets of the tokenizer are never compared with decoded text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from ...checks import IGNORE_INDEX
from .rendering import Rendering


class Encoded(NamedTuple):
    """A text as tokens.

    Attributes:
        rendering: the text and its learned spans.
        ids: ``(tokens,)`` int32.
        labels: ``(tokens,)`` int32, the ids at learned tokens and -100 elsewhere; not shifted.
        weights: ``(tokens,)`` float32, the weight of each token in the loss.
        spans: ``(spans, 2)`` int64, first and last (exclusive) token of each learned span.
        merged: number of tokens that join a header with an answer.
        begin: the first of the text's tokens, if some are cut off.
    """

    rendering: Rendering
    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    weights: NDArray[np.float32]
    spans: NDArray[np.int64]
    merged: int
    begin: int = 0

    @property
    def targets(self) -> int:
        """Number of learned tokens."""
        return int(np.count_nonzero(self.labels != IGNORE_INDEX))

    def cut(self, kept: slice) -> Encoded:
        """Some of the tokens, in place of all."""
        first, stop, _ = kept.indices(len(self.ids))
        return self._replace(
            ids=self.ids[kept],
            labels=self.labels[kept],
            weights=self.weights[kept],
            spans=np.clip(self.spans, first, stop) - first,
            begin=self.begin + first,
        )


class Encoder:
    """Encodes texts with the offsets of a fast tokenizer.

    Args:
        tokenizer: of transformers, backed by the ``tokenizers`` library. Its own truncation,
            padding and special tokens are not used.

    Raises:
        TypeError: if the tokenizer has no backend of ``tokenizers``, which alone gives offsets.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise TypeError(
                "tokenizer must be one of transformers that is backed by the tokenizers library, "
                f"which gives the offsets of tokens, got {type(tokenizer).__name__}"
            )
        self._tokenizer = Tokenizer.from_str(backend.to_str())  # a copy: the user's keeps its state
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        split = getattr(tokenizer, "split_special_tokens", False)
        self._tokenizer.encode_special_tokens = bool(split)

    @property
    def identity(self) -> str:
        """Equal for tokenizers that give the same ids."""
        return f"{self._tokenizer.encode_special_tokens} {self._tokenizer.to_str()}"

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text."""
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [len(each) for each in found]

    def encode(self, renderings: Sequence[Rendering]) -> list[Encoded]:
        """Tokenize texts, and label the tokens of their learned spans."""
        texts = [each.text for each in renderings]
        found = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [_label(*each) for each in zip(renderings, found)]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """The first and the last character (exclusive) of each token."""
        return self._tokenizer.encode(text, add_special_tokens=False).offsets


def _label(rendering: Rendering, encoding: Encoding) -> Encoded:
    ids = np.array(encoding.ids, np.int32)
    labels = np.full_like(ids, IGNORE_INDEX)
    weights = np.zeros(len(ids), np.float32)
    spans = np.empty((len(rendering.spans), 2), np.int64)
    merged = 0
    for at, span in enumerate(rendering.spans):
        first = _first_token(encoding, span.begin, len(ids))
        last = _first_token(encoding, span.end, len(ids), first)
        labels[first:last] = ids[first:last]
        weights[first:last] = span.weight
        spans[at] = first, last
        merged += first > 0 and _characters(encoding, first - 1)[1] > span.begin
    return Encoded(rendering, ids, labels, weights, spans, merged)


def _first_token(encoding: Encoding, character: int, count: int, least: int = 0) -> int:
    """The first token that begins at a character or behind it."""
    token = encoding.char_to_token(character)
    if token is None:  # no token has it: the end, or white space that the offsets leave out
        return _search(encoding, character, count, least)
    while token < count and _characters(encoding, token)[0] < character:
        token += 1
    return token


def _search(encoding: Encoding, character: int, count: int, least: int) -> int:
    low, high = least, count
    while low < high:
        middle = (low + high) // 2
        begin, end = _characters(encoding, middle)
        # A token of white space may have an empty range, which then ends where the token ends.
        if begin - (begin == end) >= character:
            high = middle
        else:
            low = middle + 1
    return low


def _characters(encoding: Encoding, token: int) -> tuple[int, int]:
    """The first and the last character (exclusive) of a token."""
    found = encoding.token_to_chars(token)
    if found is None:
        raise IndexError(f"no token {token} among {len(encoding)}")
    return found
