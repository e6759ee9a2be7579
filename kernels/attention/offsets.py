"""Check on the device that offsets cover their tensor, without waiting for it.

The kernels write the rows of sequences and no others. If the offsets ended before the tensor, the
output's last rows would hold whatever the memory held before.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

_CHECKED: list[tuple[weakref.ref[Tensor], int, int]] = []
"""The offsets that were checked last, their versions, and the lengths of their tensors."""
_MOST_CHECKED = 4  # a step of an encoder-decoder has two


def assert_offsets(name: str, offsets: Tensor, total: int) -> None:
    """Assert on the device that ``offsets`` are non-decreasing from 0 to ``total``.

    The layers of a model pass the same offsets, which are checked once.

    Args:
        name: of the argument.
        offsets: ``(num_seqs + 1,)`` int32.
        total: the number of rows that the sequences must cover.
    """
    version = None if offsets.is_inference() else offsets._version
    for known, known_version, known_total in _CHECKED:
        if known() is offsets and known_version == version and known_total == total:
            return
    covers = (offsets[0] == 0) & (offsets[-1] == total) & (offsets.diff() >= 0).all()
    torch._assert_async(covers, f"{name} must be non-decreasing from 0 to {total}")
    if version is not None:
        _CHECKED.append((weakref.ref(offsets), version, total))
        del _CHECKED[:-_MOST_CHECKED]
