"""The bytes of each token, for tokenizers whose tokens are the bytes of the text.

A byte-level BPE cuts a text into pieces and changes none of its bytes. Token t of a text then
begins at byte

    start[t] = sum of length[id[s]] over s < t

so its place follows from the ids alone, and the tokenizer need not keep track of offsets, which
takes a third of its time. `byte_lengths` reads the tokenizer's own description, and gives lengths
only if none of its parts can change a byte. The sum over a text must be the number of its bytes, so
bytes that are dropped, because no token has them, are found.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

# No text has as many bytes. A text with such a token has another sum than its bytes.
UNKNOWN = 1 << 40
_ALPHABET = frozenset(pre_tokenizers.ByteLevel.alphabet())  # one character for each byte


class ByteLengths(NamedTuple):
    """How many bytes each token has.

    Attributes:
        of: ``(ids,)`` int64, the length of each id; `UNKNOWN` where it is not always the same.
        ascii_only: the tokenizer changes other texts before it cuts them.
    """

    of: NDArray[np.int64]
    ascii_only: bool


def byte_lengths(description: str) -> ByteLengths | None:
    """The lengths of a tokenizer's tokens, or None if these do not give their places.

    Args:
        description: the tokenizer as JSON, from ``to_str`` of the ``tokenizers`` library.
    """
    parts = json.loads(description)
    normalizers = {part["type"] for part in flat_parts(parts["normalizer"], "normalizers")}
    keeps = (
        normalizers <= {"NFC"}  # which changes no ASCII
        and _cuts(list(flat_parts(parts["pre_tokenizer"], "pretokenizers")))
        and all(map(_keeps_offsets, flat_parts(parts["post_processor"], "processors")))
        and _merges_bytes(parts["model"])
    )
    if not keeps:
        return None
    return ByteLengths(_lengths(parts["model"], parts["added_tokens"]), bool(normalizers))


def flat_parts(part: Any, members: str) -> Iterator[Any]:
    """The parts of a sequence, at any depth."""
    if part is not None and part["type"] == "Sequence":
        for each in part[members]:
            yield from flat_parts(each, members)
    elif part is not None:
        yield part


def _cuts(parts: list[Any]) -> bool:
    """Whether the text is cut and its bytes are then written as characters, without a new space."""
    if not parts or parts[-1]["type"] != "ByteLevel" or parts[-1]["add_prefix_space"]:
        return False
    cutting = ("Split", "Digits")
    return all(part["type"] in cutting and part.get("behavior") != "Removed" for part in parts[:-1])


def _keeps_offsets(part: Any) -> bool:
    # A template adds special tokens, which are not asked for. With trim_offsets, the space before a
    # word does not belong to the word's token.
    return part["type"] == "TemplateProcessing" or (
        part["type"] == "ByteLevel" and not part["trim_offsets"]
    )


def _merges_bytes(model: Any) -> bool:
    changes = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    return model["type"] == "BPE" and not any(model.get(name) for name in changes)


def _lengths(model: Any, added: list[Any]) -> NDArray[np.int64]:
    vocabulary = model["vocab"]
    count = 1 + max([*vocabulary.values(), *(token["id"] for token in added)], default=-1)
    lengths = np.full(count, UNKNOWN, np.int64)
    for token, at in vocabulary.items():
        if token and _ALPHABET.issuperset(token):
            lengths[at] = len(token)
    for token in added:
        at, length = token["id"], len(token["content"].encode())
        # The white space next to a token that strips it belongs to the token. And merges may give
        # the same id to other bytes: "é" is two bytes as a text, and one in the alphabet of bytes.
        strips = token["lstrip"] or token["rstrip"]
        lengths[at] = length if not strips and lengths[at] in (UNKNOWN, length) else UNKNOWN
    if model.get("unk_token") in vocabulary:
        lengths[vocabulary[model["unk_token"]]] = UNKNOWN
    return lengths
