"""Argument checks that several packages share, and the label that the loss ignores.

NumPy only: `tokenpack.packing` imports this file and must not import torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

IGNORE_INDEX = -100
"""The label that PyTorch's cross-entropy and transformers ignore by default."""


def at_least_one(name: str, value: Any) -> int:
    """Return ``value`` as an int if it is an integer from 1 to 2**31 - 1.

    Args:
        name: the argument's name, for the error message.

    Raises:
        TypeError: if ``value`` is not an integer.
        ValueError: if ``value`` is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not 1 <= value < 2**31:
        raise ValueError(f"{name} must be from 1 to 2**31 - 1, got {value}")
    return int(value)


def optional_at_least_one(name: str, value: Any) -> int | None:
    """Like `at_least_one`, but return None for None."""
    return None if value is None else at_least_one(name, value)


def check_seed(seed: Any) -> int:
    """Return ``seed`` as an int if it is an integer of 0 or more.

    Raises:
        TypeError: if ``seed`` is not an integer.
        ValueError: if ``seed`` is negative.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    return int(seed)


def as_integer(name: str, value: Any) -> int:
    """Return ``value`` as an int if it is an integer of at most 64 bits.

    Any type with ``__index__`` counts as an integer, for example a NumPy scalar or a tensor with
    one element.

    Raises:
        TypeError: if ``value`` is not an integer.
        ValueError: if ``value`` needs more than 64 bits.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r:.80}")
    number = value.__index__()
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} must be an integer of at most 64 bits, got {number}")
    return number
