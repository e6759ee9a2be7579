"""Megatron's ``.bin`` and ``.idx``.

    .idx    9 bytes   MMIDIDX, then two zero bytes
            u64       version, 1
            u8        code of the dtype
            u64       S, number of sequences
            u64       E, number of document indices: documents + 1
            i32[S]    lengths of the sequences, in tokens
            i64[S]    first byte of each sequence in .bin
            i64[E]    first sequence of each document, then S
            i8[S]     modes of the sequences; absent unless the data is multimodal
    .bin    the tokens, without a header

All numbers are little-endian. A document is one or more sequences. Lengths have 32 bits, so a
document of more than 2^31 - 1 tokens needs several sequences. The layout is that of
``megatron/core/datasets/indexed_dataset.py`` in NVIDIA/Megatron-LM.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .columns import Column, DocumentEnds, first_decrease
from .file import ShardError, ShardFile, bytes_of, read_head, size_of

MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOATS = {6: "float64", 7: "float32"}
MAX_SEQUENCE = 2**31 - 1
_AT_ONCE = 1 << 16  # sequences that are checked at once, in a core's cache


def open_megatron(prefix: Path) -> ShardFile:
    """Open ``prefix.idx`` and ``prefix.bin``. Reads and checks the whole index.

    Raises:
        FileNotFoundError: if one of them is missing.
        ShardError: if the index is damaged, or does not belong to the tokens.
    """
    idx, tokens_path = _with(prefix, ".idx"), _with(prefix, ".bin")
    size, tokens_size = size_of(idx), size_of(tokens_path)
    head = read_head(idx, _HEADER.size)
    if not head.startswith(MAGIC):
        raise ShardError(f"{idx} must begin with {MAGIC!r}, got {head[:9]!r}")
    if len(head) < _HEADER.size:
        raise ShardError(f"{idx} is cut short: its header must have {_HEADER.size} bytes")
    _, version, code, sequences, entries = _HEADER.unpack(head)
    if version != 1:
        raise ShardError(f"{idx} must be of version 1, got {version}")
    dtype = _dtype_of(idx, code)
    expected = _HEADER.size + 12 * sequences + 8 * entries
    if size not in (expected, expected + sequences):  # with modes
        raise ShardError(
            f"{idx} must have {expected:,} bytes for {sequences:,} sequences and {entries:,} "
            f"document indices, got {size:,}: it is cut short or damaged"
        )
    at = _HEADER.size
    lengths = Column(idx, "<i4", at, sequences)
    pointers = Column(idx, "<i8", at + 4 * sequences, sequences)
    documents = Column(idx, "<i8", at + 12 * sequences, entries)
    total = _check_sequences(idx, lengths, pointers, dtype.itemsize)
    if total * dtype.itemsize != tokens_size:
        raise ShardError(
            f"{tokens_path} must have {total * dtype.itemsize:,} bytes for the {total:,} tokens of "
            f"{idx.name}, got {tokens_size:,}: it is cut short, or belongs to another index"
        )
    _check_documents(idx, documents, sequences)
    read = _Ends(pointers, documents, total, dtype.itemsize)
    return ShardFile(
        tokens_path,
        "megatron",
        Column(tokens_path, dtype, 0, total),
        DocumentEnds(entries - 1, read),
        details={"sequences": sequences, "modes": size > expected and sequences > 0},
    )


def write_index(file: BinaryIO, dtype: np.dtype[Any], lengths: NDArray[np.int64]) -> None:
    """Write the index of documents of the given lengths, in tokens.

    A document has one sequence, or more if it is longer than a length can say.
    """
    pieces = np.maximum(-(-lengths // MAX_SEQUENCE), 1)  # of each document
    documents = np.concatenate([[0], np.cumsum(pieces)]).astype("<i8")
    sequences = lengths
    if documents[-1] != len(lengths):
        sequences = np.full(documents[-1], MAX_SEQUENCE, np.int64)
        sequences[documents[1:] - 1] = lengths - (pieces - 1) * MAX_SEQUENCE
    file.write(_HEADER.pack(MAGIC, 1, code_of_dtype(dtype), len(sequences), len(documents)))
    file.write(bytes_of(sequences.astype("<i4")))
    starts = (np.cumsum(sequences) - sequences) * dtype.itemsize
    file.write(bytes_of(starts.astype("<i8")))
    file.write(bytes_of(documents))


def code_of_dtype(dtype: np.dtype[Any]) -> int:
    """The code of a dtype.

    Raises:
        ValueError: if Megatron has none for it.
    """
    codes = {np.dtype(each): code for code, each in _DTYPES.items()}
    if dtype not in codes:
        known = ", ".join(each.name for each in codes)
        raise ValueError(f"dtype must be one that Megatron has a code for, {known}; got {dtype}")
    return codes[dtype]


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """The dtype that Megatron's preprocessing chooses for a vocabulary."""
    return np.dtype("<u2") if vocab_size < 65_500 else np.dtype("<i4")


class _Ends:
    """The ends of documents, from the first byte of the sequence that follows each."""

    def __init__(self, pointers: Column, documents: Column, total: int, itemsize: int) -> None:
        self._pointers, self._documents = pointers, documents
        self._total, self._itemsize = total, itemsize

    def __call__(self, first: int, last: int) -> NDArray[np.int64]:
        following = self._documents.array[first + 1 : last + 1].astype(np.int64)
        ends = np.full(len(following), self._total, np.int64)
        inside = following < len(self._pointers)
        ends[inside] = self._pointers.array[following[inside]] // self._itemsize
        return ends


def _with(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _dtype_of(idx: Path, code: int) -> np.dtype[Any]:
    if code not in _DTYPES:
        found = _FLOATS.get(code, f"the unknown code {code}")
        raise ShardError(f"{idx} must be an index of integers, got {found}")
    return np.dtype(_DTYPES[code])


def _check_sequences(idx: Path, lengths: Column, pointers: Column, itemsize: int) -> int:
    """Check that sequences lie one after the other. Returns the number of tokens."""
    total = 0
    for first in range(0, len(lengths), _AT_ONCE):
        block = lengths.array[first : first + _AT_ONCE].astype(np.int64)
        if block.min() < 0:
            at = first + int(block.argmin())
            raise ShardError(f"{idx}: sequence {at:,} must not have a negative length")
        starts = total + np.cumsum(block) - block
        wrong = pointers.array[first : first + _AT_ONCE] != starts * itemsize
        if wrong.any():
            at = int(wrong.argmax())
            raise ShardError(
                f"{idx}: sequence {first + at:,} must begin at byte {starts[at] * itemsize:,}, "
                f"where the one before it ends, got {pointers.array[first + at]:,}"
            )
        total += int(block.sum())
    return total


def _check_documents(idx: Path, documents: Column, sequences: int) -> None:
    if not len(documents) or documents.array[0] != 0 or documents.array[-1] != sequences:
        raise ShardError(f"{idx}: document indices must go from 0 to {sequences:,}, the end")
    at = first_decrease(documents)
    if at is not None:
        raise ShardError(f"{idx}: document indices must not decrease, but entry {at:,} does")
