"""Train a byte-level BPE tokenizer for T5, NLLB and Llama.

A byte-level tokenizer encodes every text, so there is no unknown token. The special tokens of the
three families have the first ids, which are fixed. The demo's model configs use these ids.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer

from ..data.tokenizers import train_byte_level_bpe

PAD, EOS, BOS = "<pad>", "</s>", "<s>"
SENTINELS = tuple(f"<extra_id_{i}>" for i in range(100))  # T5: one per masked span
SOURCE_LANGUAGE, TARGET_LANGUAGE = "__body__", "__summary__"  # NLLB: one before each side
SPECIAL_TOKENS = (PAD, EOS, BOS, SOURCE_LANGUAGE, TARGET_LANGUAGE, *SENTINELS)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on ``texts``.

    Args:
        texts: the training texts.
        vocab_size: the largest number of tokens, including the special tokens and the 256 bytes.
            With little text the vocabulary may be smaller.

    Returns:
        A tokenizer that adds no special tokens. It encodes the name of a special token in a text as
        ordinary characters.

    Raises:
        ValueError: if ``vocab_size`` is too small for the special tokens and the bytes.
    """
    tokenizer = train_byte_level_bpe(texts, vocab_size, SPECIAL_TOKENS)
    tokenizer.encode_special_tokens = True
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a token.

    Raises:
        ValueError: if the tokenizer does not have it.
    """
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"tokenizer must have the token {token!r}, got one without it")
    return found
