"""A byte-level tokenizer for ASCII texts alone, which gives the same ids in less time.

A byte-level tokenizer writes each byte of a text as a character before it merges them: the space as
"Ġ", and so on. ASCII has one byte per character. So the tokens can be written with the texts' own
characters once, and this step, a quarter of the tokenizer's time, is left out:

    as it is     text " is" -> "Ġis" -> token "Ġis"
    for ASCII    text " is" -> token " is", with the same id
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from .byte_lengths import flat_parts

# Where `ByteLevel` cuts a text, unless other parts do.
_CUTS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_NAMES = {_BYTE_LEVEL.pre_tokenize_str(chr(byte))[0][0]: chr(byte) for byte in range(128)}
_OWN_NAMES = str.maketrans(_NAMES)
_NAMELESS = frozenset(map(chr, range(128))).difference(_NAMES)  # such as the space
# All characters, and what tokenizers cut: words, numbers, white space, contractions.
_PROBE = (
    "".join(map(chr, range(128)))
    + " It's we'll  don't\n\n\tI'M 3.14 1234567   if x_y == {a: b} :\r\n // CamelCase...  \n end "
)


def for_ascii(tokenizer: Tokenizer) -> Tokenizer | None:
    """A tokenizer that gives the same ids for ASCII texts, or None if there is none.

    Args:
        tokenizer: one that `byte_lengths` gives lengths for. It is not changed.
    """
    parts = json.loads(tokenizer.to_str())
    model = parts["model"]
    vocabulary = {_renamed(token): at for token, at in model["vocab"].items()}
    if None in vocabulary or not all(isinstance(pair, list) for pair in model["merges"]):
        return None
    model["vocab"] = vocabulary
    model["merges"] = [[token.translate(_OWN_NAMES) for token in pair] for pair in model["merges"]]
    model["unk_token"] = model["unk_token"] and model["unk_token"].translate(_OWN_NAMES)
    parts["pre_tokenizer"] = _cutting(parts["pre_tokenizer"])
    found = Tokenizer.from_str(json.dumps(parts))
    found.encode_special_tokens = tokenizer.encode_special_tokens
    added = parts["added_tokens"]
    keeps_ids = all(found.token_to_id(token["content"]) == token["id"] for token in added)
    return found if keeps_ids and _ids(found) == _ids(tokenizer) else None


def _renamed(token: str) -> str | None:
    """A token in the characters of texts; None if it has one that stands for no byte, which could
    not be told from a byte's then."""
    return token.translate(_OWN_NAMES) if _NAMELESS.isdisjoint(token) else None


def _cutting(pre_tokenizer: Any) -> dict[str, Any] | None:
    """What cuts the text, without what writes its bytes as characters."""
    *cutting, byte_level = flat_parts(pre_tokenizer, "pretokenizers")
    if byte_level["use_regex"]:
        pattern = {"Regex": _CUTS}
        cutting += [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}]
    return {"type": "Sequence", "pretokenizers": cutting} if cutting else None


def _ids(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(_PROBE, add_special_tokens=False).ids
