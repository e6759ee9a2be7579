"""Memory for what lies along a batch's tokens and is done with before the batch is.

Fresh memory of a megabyte is not in the cache, and where the C library has given it back to the
system in between it comes page by page, which takes longer than what is written to it.
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray


class _Scratch(threading.local):
    words: NDArray[np.int64] = np.empty(0, np.int64)


_scratch = _Scratch()


def scratch(count: int) -> NDArray[np.int64]:
    """``(count,)`` of anything, this thread's own until it asks again; never to be handed on."""
    if len(_scratch.words) < count:
        _scratch.words = np.empty(1 << count.bit_length(), np.int64)
    return _scratch.words[:count]
