"""One file of tokens, whatever its format."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .columns import Column, DocumentEnds, EndsInArray

_SCANNED = 1 << 22  # tokens that are searched at once


class ShardError(ValueError):
    """A file of token shards that is damaged, cut short, or not what it should be."""


@dataclass
class ShardFile:
    """One file of tokens.

    Attributes:
        path: the file that holds the tokens.
        format: its name: ``"megatron"``, ``"datatrove"``, ``"llm.c"``, ``"npy"``, ``"olmo"`` or
            ``"raw"``.
        tokens: the tokens.
        ends: the ends of the documents, counted in tokens from the file's start; None if the format
            does not store them.
        mask: one byte per token, 1 where the token is a target of the loss; None if there is none.
        details: what else the files say, for `tokenpack shards info`.
    """

    path: Path
    format: str
    tokens: Column
    ends: DocumentEnds | None = None
    mask: Column | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return len(self.tokens)


def size_of(path: Path) -> int:
    """The size of a file in bytes.

    Raises:
        FileNotFoundError: if it does not exist.
        ShardError: if it is not a regular file.
    """
    if not path.exists():
        raise FileNotFoundError(f"paths must name existing files, got {path}")
    if not path.is_file():
        raise ShardError(f"paths must name regular files, got {path}")
    return path.stat().st_size


def whole_column(path: Path, dtype: Any, offset: int = 0) -> Column:
    """All values of a file after ``offset`` bytes.

    Raises:
        ShardError: if the file ends within a value.
    """
    dtype = np.dtype(dtype)
    count, rest = divmod(size_of(path) - offset, dtype.itemsize)
    if rest:
        raise ShardError(
            f"{path} is cut short or is not of {dtype}: its size must be a multiple of "
            f"{dtype.itemsize} bytes{f' after {offset}' if offset else ''}, got "
            f"{size_of(path) - offset:,}"
        )
    return Column(path, dtype, offset, count)


def check_mask(mask: Column, num_tokens: int) -> Column:
    """Return the mask.

    Raises:
        ShardError: if it does not have one byte per token.
    """
    if len(mask) != num_tokens:
        raise ShardError(
            f"{mask.path} must have one byte for each of {num_tokens:,} tokens, got "
            f"{len(mask):,}: it is cut short, or belongs to other tokens"
        )
    return mask


def ends_by_token(tokens: Column, token_id: int, begins: bool) -> DocumentEnds:
    """Find the ends of documents by their first or last token.

    Args:
        tokens: to search; they are read once, from the start to the end.
        token_id: the token.
        begins: whether it is the first token of a document, or else the last.
    """
    found = []
    for first in range(0, len(tokens), _SCANNED):
        at = np.flatnonzero(tokens.array[first : first + _SCANNED] == token_id)
        found.append(at + (first if begins else first + 1))
    ends = np.concatenate(found) if found else np.empty(0, np.int64)
    if begins:
        ends = ends[ends > 0]
    return DocumentEnds(len(ends), EndsInArray(ends))


def read_head(path: Path, count: int) -> bytes:
    """The first bytes of a file."""
    with path.open("rb") as file:
        return file.read(count)


def as_token_dtype(name: str, dtype: Any) -> np.dtype[Any]:
    """A dtype of tokens, little-endian.

    Raises:
        ValueError: if it is not a dtype of integers.
    """
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.kind not in "iu":
        raise ValueError(f"{name} must be a dtype of integers, such as 'uint16', got {dtype!r}")
    return found.newbyteorder("<")


def bytes_of(array: NDArray[Any]) -> memoryview:
    """The bytes of an array, without a copy if it is contiguous."""
    return np.ascontiguousarray(array).data
