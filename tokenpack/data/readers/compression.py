"""Compressed files: which compression one has, by its first bytes, and its decompressed bytes.

A file may hold several compressed streams, one after the other, as parallel compressors write them.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO

import pyarrow as pa

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}

_INPUT_BYTES = 1 << 16
_MAGIC = {b"\x1f\x8b": "gzip", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BZ2_PARTS = (b"1AY&", b"\x17rE8")  # after "BZh" and a digit: a block, or the end of the stream
_SKIPPABLE_ZSTD = b"\x2a\x4d\x18"  # after a byte from 0x50 to 0x5f; such a frame may come first


def compression_of(head: bytes) -> str | None:
    """The compression of a file that begins with ``head``, 8 bytes or the whole file, or None."""
    if head.startswith(b"BZh") and head[4:8] in _BZ2_PARTS:
        return "bz2"
    if head[1:4] == _SKIPPABLE_ZSTD and head[0] >> 4 == 5:
        return "zstd"
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


def open_compressed(path: str, compression: str) -> BinaryIO:
    """Open a file for reading bytes, decompressed. Reading raises OSError if it is damaged."""
    # Some builds of Python lack one of the two modules.
    if compression == "bz2":
        import bz2

        return io.BufferedReader(_Streams(path, bz2.BZ2Decompressor, OSError, b""))
    if compression == "xz":
        import lzma

        decoder = partial(lzma.LZMADecompressor, lzma.FORMAT_XZ)
        return io.BufferedReader(_Streams(path, decoder, lzma.LZMAError, b"\0"))
    return pa.CompressedInputStream(pa.OSFile(path), compression)


class _Streams(io.RawIOBase):
    """The bytes of a file of one or more compressed streams.

    Python's `bz2.open` and `lzma.open` would end without an error at bytes that begin no stream.

    Args:
        new_decoder: makes a decoder of one stream.
        invalid: what the decoder raises for bytes that are damaged.
        padding: the byte that may follow a stream, any number of times.
    """

    def __init__(
        self,
        path: str,
        new_decoder: Callable[[], Any],
        invalid: type[Exception],
        padding: bytes,
    ) -> None:
        self._file = open(path, "rb")  # noqa: SIM115
        self._new_decoder, self._invalid, self._padding = new_decoder, invalid, padding
        self._decoder = new_decoder()

    def close(self) -> None:
        self._file.close()
        super().close()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` with decompressed bytes. Return their number, 0 at the end of the file.

        Raises:
            OSError: if the file is damaged or ends within a stream.
        """
        while True:
            data = b""
            if self._decoder.eof:
                data = self._next_stream()
                if not data:
                    return 0
            elif self._decoder.needs_input:
                data = self._file.read(_INPUT_BYTES)
                if not data:
                    raise OSError("the file ends within a compressed stream")
            try:
                decoded = self._decoder.decompress(data, len(buffer))
            except self._invalid as error:
                raise OSError(str(error)) from error
            if decoded:
                buffer[: len(decoded)] = decoded
                return len(decoded)

    def _next_stream(self) -> bytes:
        """Begin the next stream. Return its first bytes, none at the end of the file."""
        data = self._decoder.unused_data or self._file.read(_INPUT_BYTES)
        while data and not (data := data.lstrip(self._padding)):
            data = self._file.read(_INPUT_BYTES)
        if data:
            self._decoder = self._new_decoder()
        return data
