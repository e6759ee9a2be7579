"""Write a file whole or not at all, write an array that grows, and lock a folder."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path`` and rename it to ``path`` when the block succeeds.

    A reader sees either the old file or the new one. If the block raises, the temporary file is
    deleted and ``path`` stays as it was. Each caller gets a temporary name of its own, so several
    processes may write the same path; the last one to finish wins.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked_folder(folder: Path, name: str) -> Iterator[None]:
    """Keep other runs out of the folder. The system ends the lock even if this process is killed.

    Where folders cannot be locked (Windows, some network file systems), this has no effect.

    Args:
        folder: which exists.
        name: the argument that named it, for the error message.

    Raises:
        ValueError: if another run has locked it.
    """
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{name} must not be in use, but another run writes {folder}"
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


class NpyWriter:
    """Writes a one-dimensional ``.npy`` file in parts.

    The header of a ``.npy`` file reserves room for any length, so `close` rewrites it in place.
    """

    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        self._file: IO[bytes] = path.open("wb")
        self._dtype = np.dtype(dtype)
        self._length = 0
        self._write_header()
        self._begin = self._file.tell()

    def append(self, part: NDArray[Any]) -> None:
        """Write more values; they are cast to the file's dtype."""
        self._file.write(np.ascontiguousarray(part, self._dtype).data)
        self._length += len(part)

    def close(self) -> None:
        """Write the final length into the header and close the file. Safe to call twice."""
        if self._file.closed:
            return
        self._file.seek(0)
        self._write_header()
        if self._file.tell() != self._begin:
            raise RuntimeError("the header of the .npy file changed its size")
        self._file.close()

    def _write_header(self) -> None:
        header = np.lib.format.header_data_from_array_1_0(np.empty(0, self._dtype))
        np.lib.format.write_array_header_1_0(self._file, {**header, "shape": (self._length,)})
