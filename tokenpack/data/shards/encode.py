"""Texts and conversations to the tokens of documents.

A long text is tokenized in pieces, so that memory holds the tokens of one piece as Python integers,
and those of the others as arrays. A text may be cut before a space if that does not change its
tokens. This is checked at each cut:

    ids(left + right) = ids(left) + ids(right),    left, right: 2,000 characters on both sides

A tokenizer whose choice depends on text further away than that would not be exact, but none of the
tokenizers that split text into words first, or that merge pairs of bytes, looks that far. If no
place near passes, as with tokenizers that put a space before every text, the text is not cut.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...checks import IGNORE_INDEX, as_integer
from ..chat.pipeline import ChatOptions, ChatPipeline
from ..chat.templates import set_template

_PIECE = 1 << 20  # characters of a piece
_CONTEXT = 2000  # characters on both sides of a cut
_TRIES = 50
_BREAK = re.compile(r"(?<=\S)(?=\s)")


class Documents(NamedTuple):
    """Documents that follow each other.

    Attributes:
        tokens: ``(total,)`` int64.
        lengths: ``(documents,)`` int64.
        targets: ``(total,)`` bool, or None if all tokens are targets.
        skipped: rows that gave no document, because they have no tokens.
    """

    tokens: NDArray[np.int64]
    lengths: NDArray[np.int64]
    targets: NDArray[np.bool_] | None = None
    skipped: int = 0


class TextEncoder:
    """Tokenizes texts, each to one document.

    Args:
        tokenizer: of transformers.
        bos, eos: put the tokenizer's BOS before each document, and its EOS behind it; or the ids of
            other tokens. A text without tokens gets neither, and is skipped.

    Attributes:
        identity: equal for encoders that give the same tokens.

    Raises:
        ValueError: if the tokenizer has no BOS or EOS that could be added.
    """

    has_targets = False

    def __init__(self, tokenizer: Any, bos: bool | int | None, eos: bool | int | None) -> None:
        self._first, self._last = (
            [] if given is None or given is False else [_special(tokenizer, which, given)]
            for which, given in (("bos", bos), ("eos", eos))
        )
        self._encode, identity = _plain_encoder(tokenizer)
        self.identity = f"{identity}:{self._first}:{self._last}"
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1

    def __call__(self, texts: Sequence[str], first: int) -> Documents:
        """The documents of texts; ``first`` is the number of the first, for error messages."""
        for at, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"row {first + at} must be text, got {text!r:.80}")
        pieces = [self._pieces(text) for text in texts]
        tokens: list[NDArray[np.int64]] = []
        lengths = []
        short = iter(
            self._encode([piece for parts in pieces if len(parts) == 1 for piece in parts])
        )
        for parts in pieces:
            encoded = [next(short)] if len(parts) == 1 else [self._encode([p])[0] for p in parts]
            if any(map(len, encoded)):
                encoded = [self._first, *encoded, self._last]
            arrays = [np.asarray(each, np.int64) for each in encoded]
            tokens += arrays
            lengths.append(sum(map(len, arrays)))
        found = np.array(lengths, np.int64)
        return Documents(
            np.concatenate(tokens) if tokens else np.empty(0, np.int64),
            found[found > 0],
            skipped=int((found == 0).sum()),
        )

    def _pieces(self, text: str) -> list[str]:
        """Parts of the text that have the same tokens apart as together."""
        pieces, start = [], 0
        while len(text) - start > 2 * _PIECE:
            cut = self._cut(text, start + _PIECE)
            if cut is None:
                break
            pieces.append(text[start:cut])
            start = cut
        return [*pieces, text[start:]]

    def _cut(self, text: str, near: int) -> int | None:
        for found in islice(_BREAK.finditer(text, near, near + _PIECE // 2), _TRIES):
            cut = found.start()
            left, right = text[max(cut - _CONTEXT, 0) : cut], text[cut : cut + _CONTEXT]
            whole, *parts = self._encode([left + right, left, right])
            if np.array_equal(whole, np.concatenate(parts)):
                return cut
        return None


class ChatEncoder:
    """Renders and tokenizes conversations. A conversation is one document, or more if it is split.

    Args:
        tokenizer: of transformers.
        template: as for `chat_dataset`; None uses the tokenizer's own.
        max_length: tokens of a document; None does not cut.
        sparse: see `read_conversation`.

    Attributes:
        identity: equal for encoders that give the same tokens.
    """

    has_targets = True

    def __init__(self, tokenizer: Any, template: Any, max_length: int | None, sparse: bool) -> None:
        set_template(tokenizer, template)
        options = ChatOptions(max_length=max_length)
        self._pipeline, self._sparse = ChatPipeline(tokenizer, options), sparse
        self.identity = hashlib.sha256(f"{self._pipeline.identity}{options}".encode()).hexdigest()
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1

    def __call__(self, rows: Sequence[Any], first: int) -> Documents:
        """The documents of rows; ``first`` is the number of the first, for error messages."""
        numbered = [(first + at, row) for at, row in enumerate(rows) if row is not None]
        samples = self._pipeline.encode(numbered, sparse=self._sparse)
        kept = [each.encoded for each in samples if each.kept and len(each.encoded.ids)]
        lengths = np.array([len(each.ids) for each in kept], np.int64)
        if not kept:
            empty = np.empty(0, np.int64)
            return Documents(empty, lengths, np.empty(0, np.bool_), len(rows))
        labels = np.concatenate([each.labels for each in kept])
        tokens = np.concatenate([each.ids for each in kept]).astype(np.int64)
        used = {each.row for each in samples if each.kept}
        return Documents(tokens, lengths, labels != IGNORE_INDEX, len(rows) - len(used))


class IdsEncoder:
    """Documents that are token ids already, as `Tokens`.

    Args:
        vocab_size: ids are below it.
    """

    has_targets = False
    identity = "ids"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, tokens: Any, first: int) -> Documents:
        """The documents of a batch."""
        lengths = tokens.lengths
        return Documents(
            tokens.values.astype(np.int64), lengths[lengths > 0], skipped=int((lengths == 0).sum())
        )


def check_chat_options(
    chat: bool, column: str | None, bos: bool, template: Any, max_length: int | None
) -> None:
    """Raise ValueError if an option is given that would have no effect."""
    without_effect = (
        {"column": column, "bos": bos or None}
        if chat
        else {"template": template, "max_length": max_length}
    )
    given = [name for name, value in without_effect.items() if value is not None]
    if given:
        raise ValueError(
            f"{given[0]} must not be given {'with' if chat else 'without'} chat, where it has no "
            "effect"
        )


def _special(tokenizer: Any, which: str, given: Any) -> int:
    if given is not True:
        return as_integer(f"{which}_id", given)
    token = getattr(tokenizer, f"{which}_token_id")
    if token is None:
        instead = "leave out --bos" if which == "bos" else "use --no-eos"
        raise ValueError(
            f"tokenizer must have the {which.upper()} token to add it to each document, got none; "
            f"pass {which}=False ({instead})"
        )
    return int(token)


def _plain_encoder(tokenizer: Any) -> tuple[Callable[[list[str]], list[Any]], str]:
    """A function from texts to ids without special tokens, and an identity of the tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python
        vocabulary = sorted(tokenizer.get_vocab().items())
        identity = hashlib.sha256(repr((type(tokenizer), vocabulary)).encode()).hexdigest()
        options = {"add_special_tokens": False, "truncation": False, "verbose": False}
        return lambda texts: tokenizer(texts, **options)["input_ids"] if texts else [], identity
    from tokenizers import Tokenizer

    text = backend.to_str()
    own = Tokenizer.from_str(text)  # the user's may truncate and pad
    own.no_truncation()
    own.no_padding()

    def encode(texts: list[str]) -> list[Any]:
        return [each.ids for each in own.encode_batch_fast(texts, add_special_tokens=False)]

    return encode, hashlib.sha256(own.to_str().encode()).hexdigest()
