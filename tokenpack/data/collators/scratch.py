"""Reusable memory for temporary arrays with one value per token of a batch.

A newly allocated megabyte is not in the cache. If the C library returned the memory to the system
in the meantime, page faults take longer than the writes themselves.
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray


class _Scratch(threading.local):
    words: NDArray[np.int64] = np.empty(0, np.int64)


_scratch = _Scratch()


def scratch(count: int) -> NDArray[np.int64]:
    """Return an uninitialized ``(count,)`` array of this thread.

    The next call in the same thread reuses the memory, so the array must not be returned to users.
    """
    if len(_scratch.words) < count:
        _scratch.words = np.empty(1 << count.bit_length(), np.int64)
    return _scratch.words[:count]
