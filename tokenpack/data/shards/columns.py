"""A memory-mapped column of integers, and the ends of documents that are stored in one.

Objects of this file hold paths, not maps: they can be pickled, and a worker maps the file again.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 12  # ends that are read at once
_CHECKED = 1 << 16  # values that are checked at once, in a core's cache


class Column:
    """``count`` values of a file, mapped when they are first read.

    Args:
        path: the file.
        dtype: of the values.
        offset: bytes before the first value.
        count: number of values.
    """

    def __init__(self, path: Path, dtype: Any, offset: int, count: int) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        self.offset, self.count = offset, count
        self._map: NDArray[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_map": None}

    def __len__(self) -> int:
        return self.count

    @property
    def array(self) -> NDArray[Any]:
        """``(count,)``, read-only. Pages are read from the disk when they are used."""
        if self._map is None:
            if self.count:
                mapped = np.memmap(self.path, self.dtype, "r", self.offset, (self.count,))
                self._map = mapped.view(np.ndarray)
            else:  # an empty file cannot be mapped
                self._map = np.empty(0, self.dtype)
        return self._map


class ArrayColumn(Column):
    """The same for values in memory."""

    def __init__(self, values: NDArray[Any]) -> None:
        super().__init__(Path("memory"), values.dtype, 0, len(values))
        self._map = values

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))


class DocumentEnds:
    """The ends of a file's documents: ``ends[i]`` is the token after document i, not decreasing.

    Args:
        count: number of documents.
        read: returns ``ends[first:last]`` as int64.
    """

    def __init__(self, count: int, read: Callable[[int, int], NDArray[np.int64]]) -> None:
        self.count, self.read = count, read
        self._first, self._block = 0, np.empty(0, np.int64)

    def __reduce__(self) -> Any:
        return type(self), (self.count, self.read)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return int(self.read(index, index + 1)[0])

    def up_to(self, position: int) -> int:
        """How many documents end at ``position`` or before it."""
        block = self._block
        if not (len(block) and block[0] <= position < block[-1]):
            at = bisect.bisect_right(self, position)
            # The next call is likely to ask for a position a little further on.
            self._first = max(at - 1, 0)
            self._block = self.read(self._first, min(self._first + _BLOCK, self.count))
            return at
        return self._first + int(block.searchsorted(position, side="right"))

    def between(self, start: int, stop: int) -> NDArray[np.int64]:
        """The ends ``e`` with ``start < e <= stop``."""
        first = self.up_to(start)
        begin = first - self._first
        if len(self._block) and self._block[-1] > stop:
            block = self._block[begin:]
            return block[: block.searchsorted(stop, side="right")]
        last = bisect.bisect_right(self, stop, lo=first)
        return self.read(first, last)


class EndsInArray:
    """Ends that are in memory, or in a column."""

    def __init__(self, values: NDArray[np.int64] | Column) -> None:
        self._values = values

    def __call__(self, first: int, last: int) -> NDArray[np.int64]:
        array = self._values.array if isinstance(self._values, Column) else self._values
        return array[first:last].astype(np.int64)


def first_decrease(column: Column) -> int | None:
    """The first index whose value is below the one before it, or below 0; None if there is none."""
    before = 0
    for first in range(0, len(column), _CHECKED):
        values = column.array[first : first + _CHECKED].astype(np.int64)
        falls = values[1:] < values[:-1]
        if values[0] < before or falls.any():
            return first if values[0] < before else first + 1 + int(falls.argmax())
        before = int(values[-1])
    return None
