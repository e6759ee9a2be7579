"""New tokenizers of transformers: a byte-level BPE trained on texts, and one token per byte.

Both encode every text, so no token is unknown, and both are saved and loaded like any other
tokenizer (``save_pretrained``, ``AutoTokenizer``). They add no special tokens by themselves: a chat
template writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

try:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
except ImportError as error:
    raise ImportError("train_tokenizer needs tokenizers: pip install 'tokenpack[data]'") from error
from transformers import PreTrainedTokenizerFast

from ..checks import at_least_one
from .chat.templates import ChatTemplate, set_template

# Their positions are their ids in a trained tokenizer, whatever the size of its vocabulary.
CHAT_TOKENS = (
    *("[UNK]", "[PAD]", "[BOS]", "[EOS]", "[SEP]", "[MASK]", "[CLS]"),
    *("<|im_start|>", "<|im_end|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>"),
    *("<|tool_call|>", "<|tool_result|>"),
    *("<|doc_start|>", "<|doc_end|>", "<|code_start|>", "<|code_end|>", "<|system|>"),
)
_BYTES = 256
_ROLES = ("unk", "pad", "bos", "eos", "sep", "mask", "cls")


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    special_tokens: str | Sequence[str] = "chat",
    pad_token: str = "[PAD]",
    bos_token: str = "[BOS]",
    eos_token: str = "[EOS]",
    chat_template: str | ChatTemplate | None = None,
    min_frequency: int = 2,
    progress: bool = False,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (Sennrich et al. 2016, on bytes as in GPT-2).

    Args:
        texts: the training texts, read once.
        vocab_size: the largest number of tokens, with the special tokens and the 256 bytes. With
            little text the vocabulary is smaller.
        special_tokens: tokens with the ids from 0 on, in this order. ``"chat"`` stands for
            ``[UNK] [PAD] [BOS] [EOS] [SEP] [MASK] [CLS]`` and the tokens of the chat templates
            ``chatml``, ``llama3`` and ``gemma``, of tools, documents and code, with the ids 0
            to 20.
        pad_token, bos_token, eos_token: which of the special tokens have these roles.
        chat_template: a preset's name, a `ChatTemplate` or jinja.
        min_frequency: how often a pair must occur to be merged.
        progress: show a progress bar.

    Returns:
        A tokenizer with padding, BOS and EOS token. Special tokens in a text are encoded as such.

    Raises:
        TypeError: if ``texts`` is one text.
        ValueError: if ``vocab_size`` is too small for the special tokens and the bytes, if special
            tokens repeat, or if a role's token is none of them.
    """
    if isinstance(texts, (str, bytes)):
        raise TypeError("texts must be an iterable of texts, got one text; pass [text]")
    tokens = _special_tokens(special_tokens)
    backend = train_byte_level_bpe(
        texts, vocab_size, tokens, at_least_one("min_frequency", min_frequency), progress
    )
    return _finish(backend, tokens, (pad_token, bos_token, eos_token), chat_template)


def byte_tokenizer(
    *,
    special_tokens: str | Sequence[str] = "chat",
    pad_token: str = "[PAD]",
    bos_token: str = "[BOS]",
    eos_token: str = "[EOS]",
    chat_template: str | ChatTemplate | None = None,
) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte of UTF-8: the ids 0 to 255 are the bytes.

    Args:
        special_tokens, pad_token, bos_token, eos_token, chat_template: as for `train_tokenizer`.
            The special tokens have the ids from 256 on.

    Returns:
        The tokenizer.

    Raises:
        ValueError: as for `train_tokenizer`.
    """
    tokens = _special_tokens(special_tokens)
    backend = Tokenizer(models.BPE(vocab=_characters_of_bytes(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    return _finish(backend, tokens, (pad_token, bos_token, eos_token), chat_template)


def train_byte_level_bpe(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str],
    min_frequency: int = 0,
    progress: bool = False,
) -> Tokenizer:
    """Train the backend of `train_tokenizer`; see there.

    Raises:
        ValueError: if ``vocab_size`` is too small for the special tokens and the bytes.
    """
    least = len(special_tokens) + _BYTES
    if vocab_size < least:
        raise ValueError(
            f"vocab_size must be at least {least}, for {_BYTES} bytes and {len(special_tokens)} "
            f"special tokens, got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _special_tokens(given: str | Sequence[str]) -> tuple[str, ...]:
    if given == "chat":
        return CHAT_TOKENS
    if isinstance(given, str) or not all(isinstance(token, str) and token for token in given):
        raise ValueError(f'special_tokens must be "chat" or a list of tokens, got {given!r}')
    if len(set(given)) < len(given):
        raise ValueError(f"special_tokens must name each token once, got {list(given)}")
    return tuple(given)


def _finish(
    backend: Tokenizer,
    tokens: tuple[str, ...],
    roles: tuple[str, str, str],
    template: str | ChatTemplate | None,
) -> PreTrainedTokenizerFast:
    named: dict[str, Any] = {
        f"{role}_token": f"[{role.upper()}]" for role in _ROLES if f"[{role.upper()}]" in tokens
    }
    for role, token in zip(("pad_token", "bos_token", "eos_token"), roles):
        if token not in tokens:
            raise ValueError(f"{role} must be one of special_tokens, got {token!r}")
        named[role] = token
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **named
    )
    if template is not None:
        set_template(tokenizer, template)
    return tokenizer


def _characters_of_bytes() -> dict[str, int]:
    """The character that the byte-level pre-tokenizer writes for each byte: the byte's own if it is
    printable in Latin-1, else the next one from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(_BYTES) if byte not in printable)
    codes = {byte: byte for byte in printable} | {byte: _BYTES + n for n, byte in enumerate(others)}
    return {chr(codes[byte]): byte for byte in range(_BYTES)}
