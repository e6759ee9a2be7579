"""Train a byte-level BPE that serves T5, NLLB and Llama alike.

Byte-level: every text has an encoding, so there is no unknown token. The special tokens that the
three families need lie first, at fixed ids; the demo's configs are given these ids.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, EOS, BOS = "<pad>", "</s>", "<s>"
SENTINELS = tuple(f"<extra_id_{i}>" for i in range(100))  # T5: one per masked span
SOURCE_LANGUAGE, TARGET_LANGUAGE = "__body__", "__summary__"  # NLLB: one before each side
SPECIAL_TOKENS = (PAD, EOS, BOS, SOURCE_LANGUAGE, TARGET_LANGUAGE, *SENTINELS)

_BYTES = 256


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on ``texts``.

    Args:
        texts: what to learn the merges from.
        vocab_size: tokens at most, the special ones and the 256 bytes included. A small text may
            give fewer.

    Returns:
        A tokenizer that adds no special token by itself, and takes one that is spelled out in a
        text for ordinary characters.

    Raises:
        ValueError: if ``vocab_size`` leaves no room for the special tokens and the bytes.
    """
    least = len(SPECIAL_TOKENS) + _BYTES
    if vocab_size < least:
        raise ValueError(
            f"vocab_size: got {vocab_size}, takes {least} or more "
            f"({_BYTES} bytes and {len(SPECIAL_TOKENS)} special tokens)"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that the tokenizer must have.

    Raises:
        ValueError: if it has not.
    """
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"tokenizer: has no token {token!r}")
    return found
