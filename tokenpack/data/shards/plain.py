"""Formats that store tokens and no index: llm.c's, true ``.npy``, OLMo's and raw ids.

llm.c, modded-nanogpt   256 x i32: magic, version, number of tokens; then the tokens.
                        magic 20240520, version 1: u16. magic 20240801, version 7: u32
true .npy               NumPy's own header
OLMo .npy               no header, despite its name; NAME.csv.gz has "start,end,..." in tokens
                        for each document
raw                     no header: the caller must give the dtype
"""

from __future__ import annotations

import csv
import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np

from .columns import Column, DocumentEnds, EndsInArray
from .file import ShardError, ShardFile, size_of, whole_column

NPY_MAGIC = b"\x93NUMPY"
LLMC = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
_LLMC_HEADER = 1024


def llmc_magic(head: bytes) -> int | None:
    """The magic number and version of llm.c at the beginning of a file; None if they are not."""
    if len(head) < 12:
        return None
    magic, version, _ = struct.unpack("<3i", head[:12])
    return magic if magic in LLMC and version == LLMC[magic][0] else None


def open_llmc(path: Path, head: bytes) -> ShardFile:
    """Open a file that begins with a header of llm.c.

    Raises:
        ShardError: if the header's count does not match the file's size.
    """
    magic, version, count = struct.unpack("<3i", head[:12])
    dtype = np.dtype(LLMC[magic][1])
    expected = _LLMC_HEADER + count * dtype.itemsize
    if count < 0 or size_of(path) != expected:
        raise ShardError(
            f"{path} must have {expected:,} bytes for the {count:,} tokens of its header, got "
            f"{size_of(path):,}: it is cut short or damaged"
        )
    tokens = Column(path, dtype, _LLMC_HEADER, count)
    return ShardFile(path, "llm.c", tokens, details={"magic": magic, "version": version})


def open_npy(path: Path) -> ShardFile:
    """Open a true ``.npy`` file.

    Raises:
        ShardError: if it is not one row of integers, or is cut short.
    """
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = read(file)
        except (ValueError, KeyError) as error:
            raise ShardError(f"{path} has a damaged header of .npy: {error}") from None
        offset = file.tell()
    if len(shape) != 1 or dtype.kind not in "iu":
        raise ShardError(f"{path} must hold one row of integers, got {dtype} of shape {shape}")
    if size_of(path) - offset != shape[0] * dtype.itemsize:
        raise ShardError(
            f"{path} must have {shape[0] * dtype.itemsize:,} bytes after its header, got "
            f"{size_of(path) - offset:,}: it is cut short or damaged"
        )
    return ShardFile(path, "npy", Column(path, dtype, offset, shape[0]))


def open_olmo(path: Path, table: Path) -> ShardFile:
    """Open tokens whose documents are in a compressed table.

    Raises:
        ShardError: if the table does not cover the tokens.
    """
    ends: list[int] = []
    with gzip.open(table, "rt", newline="") as file:
        try:
            for number, row in enumerate(csv.reader(file)):
                start, end = int(row[0]), int(row[1])
                if start != (ends[-1] if ends else 0) or end < start:
                    raise ShardError(
                        f"{table}: document {number:,} must begin where the one before it ends, "
                        f"got {start:,} to {end:,}"
                    )
                ends.append(end)
        except (ValueError, IndexError, EOFError, OSError) as error:
            if isinstance(error, ShardError):
                raise
            raise ShardError(f"{table} must have 'start,end' in each line: {error}") from None
    count, size = (ends[-1] if ends else 0), size_of(path)
    itemsize = size // count if count else 0
    if count and (itemsize not in (1, 2, 4, 8) or itemsize * count != size):
        raise ShardError(
            f"{path} must have 1, 2, 4 or 8 bytes for each of the {count:,} tokens of "
            f"{table.name}, got {size:,} bytes: one of them is cut short"
        )
    dtype = np.dtype(f"<u{itemsize or 2}")
    found = DocumentEnds(len(ends), EndsInArray(np.array(ends, np.int64)))
    return ShardFile(path, "olmo", Column(path, dtype, 0, count), found)


def open_raw(path: Path, dtype: np.dtype[Any]) -> ShardFile:
    """Open tokens without a header.

    Raises:
        ShardError: if the file ends within a token.
    """
    return ShardFile(path, "raw", whole_column(path, dtype))
