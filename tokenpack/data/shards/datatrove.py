"""datatrove's ``.ds`` and the files next to it.

    NAME.ds             the tokens, u16 or u32, without a header
    NAME.ds.index       u64 for each document: the token after its last
    NAME.ds.loss        one byte per token, 1 where it is a target; optional
    NAME.ds.metadata    "TOKENIZER|BYTES PER TOKEN", then the number of tokens, then that number for
                        people; optional

The layout is that of ``datatrove/pipeline/tokens/tokenizer.py`` in huggingface/datatrove.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .columns import Column, DocumentEnds, EndsInArray, first_decrease
from .file import ShardError, ShardFile, bytes_of, check_mask, size_of, whole_column

_DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


def open_datatrove(path: Path) -> ShardFile | None:
    """Open ``path``, with the index, the loss and the metadata next to it.

    Returns:
        The file, or None if there is neither an index nor metadata, so that the dtype is not known.

    Raises:
        ShardError: if the files do not belong together, or one is cut short.
    """
    index, metadata = companion(path, "index"), companion(path, "metadata")
    if not index.exists() and not metadata.exists():
        return None
    size = size_of(path)
    stated, tokenizer, count = _read_metadata(metadata) if metadata.exists() else (None, None, None)
    ends = None
    if index.exists():
        column = whole_column(index, "<u8")
        at = first_decrease(column)
        if at is not None:
            raise ShardError(f"{index}: ends of documents must not decrease, but entry {at:,} does")
        ends = DocumentEnds(len(column), EndsInArray(column))
        indexed = ends[len(ends) - 1] if len(ends) else 0
        if count is not None and indexed != count:
            raise ShardError(f"{index} must end at {count:,}, as {metadata.name} says: {indexed:,}")
        count = indexed
    assert count is not None
    dtype = _dtype_of(path, size, count, stated)
    loss = companion(path, "loss")
    return ShardFile(
        path,
        "datatrove",
        Column(path, dtype, 0, count),
        ends,
        check_mask(whole_column(loss, "u1"), count) if loss.exists() else None,
        {"tokenizer": tokenizer} if tokenizer else {},
    )


def companion(path: Path, suffix: str) -> Path:
    """``NAME.ds.SUFFIX`` of ``NAME.ds``."""
    return path.with_name(f"{path.name}.{suffix}")


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """The dtype that datatrove chooses for a vocabulary."""
    return _DTYPES[2 if vocab_size <= 65_536 else 4]


def check_dtype(dtype: np.dtype[Any]) -> None:
    """Raise ValueError if datatrove cannot store a dtype."""
    if dtype not in _DTYPES.values():
        raise ValueError(f"dtype must be uint16 or uint32 for datatrove, got {dtype}")


def write_index(file: BinaryIO, lengths: NDArray[np.int64]) -> None:
    """Write the index of documents of the given lengths, in tokens."""
    file.write(bytes_of(np.cumsum(lengths).astype("<u8")))


def write_metadata(file: BinaryIO, tokenizer: str, itemsize: int, count: int) -> None:
    """Write the metadata. ``tokenizer`` is a name; datatrove reads it back."""
    power = 0
    while count >= 999.5 * 1000**power and power < 5:
        power += 1
    number = count / 1000**power
    decimals = 2 if number < 9.995 else 1 if number < 99.95 else 0
    unit = " kMGTP"[power].strip()
    name = tokenizer.replace("\n", " ") or "unknown"
    file.write(f"{name}|{itemsize}\n{count}\n{number:.{decimals}f} {unit}T".encode())


def _read_metadata(path: Path) -> tuple[int, str, int]:
    lines = path.read_text(encoding="utf-8").splitlines()
    name, _, itemsize = (lines or [""])[0].rpartition("|")
    if len(lines) < 2 or not itemsize.isdecimal() or not lines[1].isdecimal():
        raise ShardError(
            f"{path} must be 'TOKENIZER|BYTES PER TOKEN' and the number of tokens, got "
            f"{' / '.join(lines)[:80]!r}"
        )
    return int(itemsize), name, int(lines[1])


def _dtype_of(path: Path, size: int, count: int, stated: int | None) -> np.dtype[Any]:
    """The dtype, from the number of tokens and of bytes."""
    if stated is not None and stated not in _DTYPES:
        raise ShardError(f"{companion(path, 'metadata')} must state 2 or 4 bytes, got {stated}")
    fitting = [each for each in ([stated] if stated else _DTYPES) if each * count == size]
    if not fitting:
        expected = " or ".join(f"{each * count:,}" for each in ([stated] if stated else _DTYPES))
        raise ShardError(
            f"{path} must have {expected} bytes for {count:,} tokens, got {size:,}: it is cut "
            "short, or belongs to another index"
        )
    return _DTYPES[fitting[0]]
