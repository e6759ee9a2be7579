"""Load the user's tokenizer: a file, a folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

Encode = Callable[[list[str]], list[list[int]]]


def load_tokenizer(name_or_path: str) -> Encode:
    """A function from texts to their ids, with special tokens, without truncation and padding.

    Args:
        name_or_path: a ``tokenizer.json``, a folder that holds a tokenizer, or a name on the hub.
            The hub's local cache is tried before the network.

    Raises:
        ValueError: if there is no such tokenizer, or it cannot be read or downloaded.
    """
    path = Path(name_or_path)
    if path.is_file():
        return _load_file(path)
    tokenizer = _load_named(name_or_path)

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, truncation=False, padding=False, verbose=False)["input_ids"]

    return encode


def load_pretrained(name_or_path: str) -> Any:
    """A tokenizer of transformers, with its special tokens and its chat template.

    Args:
        name_or_path: as for `load_tokenizer`. The special tokens of a ``tokenizer.json`` are those
            of the ``tokenizer_config.json`` beside it, if there is one.

    Raises:
        ValueError: if there is no such tokenizer, or it cannot be read or downloaded.
    """
    path = Path(name_or_path)
    if not path.is_file():
        return _load_named(name_or_path)
    if path.name == "tokenizer.json" and (path.parent / "tokenizer_config.json").is_file():
        return _load_pretrained(str(path.parent), local=True)
    return PreTrainedTokenizerFast(tokenizer_object=_read_file(path))


def _load_named(name_or_path: str) -> Any:
    path = Path(name_or_path)
    if path.is_dir():
        return _load_pretrained(str(path), local=True)
    if path.suffix == ".json" or path.is_absolute() or name_or_path.count("/") > 1:
        raise ValueError(f"--tokenizer must be a file or folder that exists, got {name_or_path}")
    try:
        return _load_pretrained(name_or_path, local=True)
    except ValueError:
        _require_hub(name_or_path)
        return _load_pretrained(name_or_path, local=False)


def _load_file(path: Path) -> Encode:
    tokenizer = _read_file(path)
    # A file may have truncation and padding enabled.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def _read_file(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        message = f"--tokenizer must be a valid tokenizer.json, got {path}: {error}"
        raise ValueError(message) from None


def _load_pretrained(name: str, local: bool) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=local)
    except (OSError, ValueError, ImportError) as error:
        kind = "folder" if Path(name).is_dir() else "name"
        message = f"--tokenizer must be the {kind} of a tokenizer, got {name}: {error}"
        raise ValueError(message) from None


def _require_hub(name: str) -> None:
    """Fail at once without a network: the hub's client would retry for a minute."""
    if any(os.environ.get(f"{scheme}_proxy") for scheme in ("http", "https", "HTTPS", "HTTP")):
        return  # the proxy resolves host names
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        raise ValueError(
            f"--tokenizer must be a tokenizer.json, a folder, or a name on the hub, got {name}: no "
            f"such file or folder, not in the hub's local cache, and {host} cannot be reached"
        ) from None
