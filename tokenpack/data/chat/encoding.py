"""Texts and their learned spans as ids and labels.

A text is tokenized once and as a whole. Token t is learned if its first character lies in a learned
span:

    begin <= start of t < end        labels[t] = input_ids[t], else -100

So a token that joins the last character of a header with the first one of an answer is context. At
inference the header is tokenized alone, and the model could not begin in the middle of a token.
Such tokens are counted. The starts are the tokenizer's offsets, or, for a byte-level tokenizer,
sums of the lengths of tokens (`byte_lengths`). They are never found by decoding ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from ...checks import IGNORE_INDEX
from .ascii_texts import for_ascii
from .byte_lengths import byte_lengths
from .rendering import Rendering

# Texts after which a tokenizer for ASCII is made. For a vocabulary of 128,000 tokens that takes a
# second, about as long as it saves for this many.
_MANY = 10_000


class Encoded(NamedTuple):
    """A text as tokens.

    Attributes:
        rendering: the text and its learned spans.
        ids: ``(tokens,)`` int32.
        labels: ``(tokens,)`` int32, the ids at learned tokens and -100 elsewhere; not shifted.
        weights: ``(tokens,)`` float32, the weight of each token in the loss.
        spans: ``(spans, 2)`` int64, first and last (exclusive) token of each learned span.
        merged: number of tokens that join a header with an answer.
        targets: number of learned tokens.
        begin: the first of the text's tokens, if some are cut off.
    """

    rendering: Rendering
    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    weights: NDArray[np.float32]
    spans: NDArray[np.int64]
    merged: int
    targets: int
    begin: int = 0

    def cut(self, kept: slice) -> Encoded:
        """Some of the tokens, in place of all."""
        first, stop, _ = kept.indices(len(self.ids))
        labels = self.labels[kept]
        return self._replace(
            ids=self.ids[kept],
            labels=labels,
            weights=self.weights[kept],
            spans=np.clip(self.spans, first, stop) - first,
            targets=int(np.count_nonzero(labels != IGNORE_INDEX)),
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
        description = backend.to_str()
        self._tokenizer = Tokenizer.from_str(description)  # a copy: the user's keeps its state
        self._lengths = byte_lengths(description)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        split = getattr(tokenizer, "split_special_tokens", False)
        self._tokenizer.encode_special_tokens = bool(split)
        self._for_ascii: Tokenizer | None = None
        self._expected = 0

    @property
    def identity(self) -> str:
        """Equal for tokenizers that give the same ids."""
        return f"{self._tokenizer.encode_special_tokens} {self._tokenizer.to_str()}"

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text."""
        return [len(each) for each in self._without_offsets(texts)]

    def expect(self, count: int) -> None:
        """Prepare for more texts. Not while another thread calls this."""
        before, self._expected = self._expected, self._expected + count
        if before <= _MANY < self._expected and self._lengths is not None:
            self._for_ascii = for_ascii(self._tokenizer)

    def encode(self, renderings: Sequence[Rendering]) -> list[Encoded]:
        """Tokenize texts, and label the tokens of their learned spans."""
        placed = self._by_length(renderings)
        others = [at for at, each in enumerate(placed) if each is None]
        texts = [renderings[at].text for at in others]
        found = self._tokenizer.encode_batch(texts, add_special_tokens=False) if texts else []
        for at, encoding in zip(others, found):
            placed[at] = _by_offset(renderings[at], encoding)
        return _label(renderings, [each for each in placed if each is not None])

    def _by_length(self, renderings: Sequence[Rendering]) -> list[_Placed | None]:
        """The tokens of texts whose places follow from the ids, and None for the others."""
        placed: list[_Placed | None] = [None] * len(renderings)
        lengths = self._lengths
        if lengths is None:
            return placed
        numbers = [
            at
            for at, each in enumerate(renderings)
            if not lengths.ascii_only or each.text.isascii()
        ]
        chosen = [renderings[at] for at in numbers]
        if not chosen:
            return placed
        texts = [each.text for each in chosen]
        lists = [each.ids for each in self._without_offsets(texts)]
        # The texts one behind the other: text k has the tokens edges[k] to edges[k + 1].
        edges = [0, *accumulate(map(len, lists))]
        ids = np.fromiter(chain.from_iterable(lists), np.int32, edges[-1])
        starts = np.concatenate([[0], np.cumsum(lengths.of[ids])])  # in bytes
        begins = starts[edges].tolist()
        places = [
            begin + _bytes(each.text, place)
            for each, begin in zip(chosen, begins)
            for span in each.spans
            for place in (span.begin, span.end)
        ]
        tokens = np.searchsorted(starts, places).clip(max=len(ids)).reshape(-1, 2)
        counts = [len(each.spans) for each in chosen]
        owners = np.repeat(np.arange(len(chosen)), counts)  # the text of each span
        merged = starts[tokens[:, 0]] > places[::2]
        merges = np.bincount(owners, merged, len(chosen)).astype(np.int64).tolist()
        spans = np.split(tokens - np.array(edges)[owners, None], np.cumsum(counts)[:-1])
        for k, at in enumerate(numbers):
            if begins[k + 1] - begins[k] == _bytes(texts[k]):
                own = ids[edges[k] : edges[k + 1]]
                placed[at] = _Placed(own, spans[k], merges[k])
        return placed

    def _without_offsets(self, texts: Sequence[str]) -> list[Encoding]:
        """The tokens of texts."""
        for_ascii = self._for_ascii
        if for_ascii is None:
            return self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        kinds: dict[bool, list[int]] = {True: [], False: []}
        for at, text in enumerate(texts):
            kinds[text.isascii()].append(at)
        found: dict[int, Encoding] = {}
        for tokenizer, chosen in ((for_ascii, kinds[True]), (self._tokenizer, kinds[False])):
            some = [texts[at] for at in chosen]
            encodings = tokenizer.encode_batch_fast(some, add_special_tokens=False)
            found.update(zip(chosen, encodings))
        return [found[at] for at in range(len(texts))]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """The first and the last character (exclusive) of each token."""
        return self._tokenizer.encode(text, add_special_tokens=False).offsets


class _Placed(NamedTuple):
    """The tokens of a text, and where its spans are; see `Encoded`."""

    ids: NDArray[np.int32]
    spans: NDArray[np.int64]
    merged: int


def _bytes(text: str, stop: int | None = None) -> int:
    """The bytes of a text, or of its first characters."""
    if text.isascii():
        return len(text) if stop is None else stop
    return len(text[:stop].encode())


def _by_offset(rendering: Rendering, encoding: Encoding) -> _Placed:
    ids = np.array(encoding.ids, np.int32)
    spans = np.empty((len(rendering.spans), 2), np.int64)
    merged = 0
    done = 0
    for at, span in enumerate(rendering.spans):
        first = max(_first_token(encoding, span.begin, len(ids)), done)
        done = max(_first_token(encoding, span.end, len(ids), first), first)
        spans[at] = first, done
        merged += first > 0 and _characters(encoding, first - 1)[1] > span.begin
    return _Placed(ids, spans, merged)


def _label(renderings: Sequence[Rendering], placed: Sequence[_Placed]) -> list[Encoded]:
    """The labels of texts, which are views into arrays of all of them."""
    if not placed:
        return []
    edges = [0, *accumulate(len(each.ids) for each in placed)]
    ids = np.concatenate([each.ids for each in placed])
    spans = np.concatenate([each.spans + edge for each, edge in zip(placed, edges)])
    # Runs of context and of learned tokens take turns.
    runs = np.diff([0, *spans.ravel().tolist(), len(ids)])
    of_runs = np.zeros(len(runs), np.float32)
    of_runs[1::2] = [span.weight for each in renderings for span in each.spans]
    weights = np.repeat(of_runs, runs)
    is_learned = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    labels = np.where(is_learned, ids, np.int32(IGNORE_INDEX))
    learned = np.concatenate([[0], np.cumsum(is_learned)])
    targets = np.diff(learned[edges]).tolist()
    return [
        Encoded(
            rendering,
            ids[begin:end],
            labels[begin:end],
            weights[begin:end],
            each.spans,
            each.merged,
            count,
        )
        for rendering, each, (begin, end), count in zip(
            renderings, placed, pairwise(edges), targets
        )
    ]


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
