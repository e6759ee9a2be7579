"""A tokenizer that the user names: a file, a folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from tokenizers import Tokenizer
from transformers import AutoTokenizer

Encode = Callable[[list[str]], list[list[int]]]


def load_tokenizer(name_or_path: str) -> Encode:
    """A function from texts to their ids, special tokens included; nothing is cut or padded.

    Args:
        name_or_path: a ``tokenizer.json``, a folder that holds a tokenizer, or a name on the hub,
            taken from the local cache where it is there.

    Raises:
        ValueError: if there is no such tokenizer, or it cannot be read or fetched.
    """
    path = Path(name_or_path)
    if path.is_file():
        return _load_file(path)
    if path.is_dir():
        return _load_pretrained(str(path), local=True)
    if path.suffix == ".json" or path.is_absolute() or name_or_path.count("/") > 1:
        raise ValueError(f"--tokenizer: no file or folder {name_or_path}")
    try:
        return _load_pretrained(name_or_path, local=True)
    except ValueError:
        _require_hub(name_or_path)
        return _load_pretrained(name_or_path, local=False)


def _load_file(path: Path) -> Encode:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower one
        raise ValueError(f"--tokenizer: {path} is not a tokenizer.json: {error}") from None
    # A file may carry both from its training; the ids must be the text's.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def _load_pretrained(name: str, local: bool) -> Encode:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
    except (OSError, ValueError, ImportError) as error:
        where = "in the folder" if Path(name).is_dir() else "of the name"
        raise ValueError(f"--tokenizer: no tokenizer {where} {name}: {error}") from None

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, truncation=False, padding=False, verbose=False)["input_ids"]

    return encode


def _require_hub(name: str) -> None:
    """Fail at once where there is no network: the hub's client would try again for a minute."""
    if any(os.environ.get(f"{scheme}_proxy") for scheme in ("http", "https", "HTTPS", "HTTP")):
        return  # the proxy resolves names
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        raise ValueError(
            f"--tokenizer: {name} is no file or folder here and not in the hub's local cache, and "
            f"{host} cannot be reached; takes a tokenizer.json, a folder, or a name on the hub"
        ) from None
