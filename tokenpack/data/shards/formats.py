"""Which format a file of tokens has. It is recognized by its content and never guessed.

What has no header, no index and no metadata can be any dtype. Then the caller must give it.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .datatrove import open_datatrove
from .file import ShardError, ShardFile, read_head, size_of
from .megatron import MAGIC, open_megatron
from .plain import NPY_MAGIC, llmc_magic, open_llmc, open_npy, open_olmo, open_raw

_SUFFIXES = (".bin", ".ds", ".npy")


def resolve_paths(paths: Any) -> list[Path]:
    """The files that ``paths`` names; see `TokenShards`.

    Raises:
        TypeError: if it is neither a path nor a list of paths.
        FileNotFoundError: if nothing matches a glob or a folder.
        ValueError: if it is an empty list.
    """
    if isinstance(paths, (str, os.PathLike)):
        return _expand(os.fspath(paths))
    if not isinstance(paths, Sequence) or not all(isinstance(p, (str, os.PathLike)) for p in paths):
        raise TypeError(f"paths must be a path or a list of paths, got {paths!r:.80}")
    if not paths:
        raise ValueError("paths must name at least one file, got an empty list")
    return [found for path in paths for found in _expand(os.fspath(path))]


def open_shard(path: Path, dtype: np.dtype[Any] | None) -> ShardFile:
    """Open one file.

    Args:
        path: the file of tokens, Megatron's index, or the prefix of both.
        dtype: of tokens whose file does not state it.

    Raises:
        FileNotFoundError: if there is no such file.
        ShardError: if the file is damaged, or its dtype is not known.
    """
    prefix = _megatron_prefix(path)
    if prefix is not None:
        return open_megatron(prefix)
    size_of(path)
    head = read_head(path, 12)
    if head.startswith(NPY_MAGIC):
        return open_npy(path)
    if llmc_magic(head) is not None:
        return open_llmc(path, head)
    table = path.with_suffix(".csv.gz")
    if table.is_file():
        return open_olmo(path, table)
    found = open_datatrove(path)
    if found is not None:
        return found
    if dtype is None:
        raise ShardError(
            f"dtype must be given for {path}, which has no header, index or metadata: for example "
            "dtype='uint16'"
        )
    return open_raw(path, dtype)


def _megatron_prefix(path: Path) -> Path | None:
    """The prefix of Megatron's files if ``path`` is one of them; None if it is not."""
    if path.suffix == ".idx":
        if path.is_file() and not read_head(path, len(MAGIC)) == MAGIC:
            raise ShardError(f"{path} must begin with {MAGIC!r}, got {read_head(path, 9)!r}")
        return path.with_suffix("")
    prefix = path.with_suffix("") if path.suffix == ".bin" else path
    idx = prefix.with_name(prefix.name + ".idx")
    return prefix if idx.is_file() and read_head(idx, len(MAGIC)) == MAGIC else None


def _expand(path: str) -> list[Path]:
    if os.path.isdir(path):
        found = sorted(each for each in Path(path).iterdir() if _holds_tokens(each))
        if not found:
            known = " ".join(_SUFFIXES)
            raise FileNotFoundError(
                f"paths must be a folder with a file that ends in {known}, got {path}"
            )
        return found
    if glob.has_magic(path) and not os.path.exists(path):
        found = sorted(Path(each) for each in glob.glob(path, recursive=True))
        found = [each for each in found if _holds_tokens(each)]
        if not found:
            raise FileNotFoundError(f"paths must match at least one file of tokens, got {path}")
        return found
    return [Path(path)]


def _holds_tokens(path: Path) -> bool:
    return path.is_file() and path.suffix in _SUFFIXES and not path.name.startswith(".")
