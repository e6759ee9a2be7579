"""Convert the lengths of sequences to one checked integer array, and fit them to a capacity.

An array is not copied. `columns` reads the objects of other libraries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..segments import ranges
from .columns import arrow_to_numpy, column_of, is_arrow

OVERLONG = ("error", "truncate", "split", "drop")
Lengths = Sequence[int] | NDArray[np.integer] | Any
"""Integers, one per sequence, of any width and byte order: a list or another sequence, a NumPy
array or memory map, a torch CPU tensor, an Arrow array or chunked array, a datasets column in any
format or with a transform, a pandas or polars series."""


class Pieces(NamedTuple):
    """The pieces of sequences to pack, after overlong and empty sequences are handled.

    Attributes:
        lengths: ``(num_pieces,)`` integers from 1 to the capacity.
        sequences: ``(num_pieces,)`` int64, the sequence of each piece. None if piece i is the whole
            of sequence i.
        starts: ``(num_pieces,)`` int64, the token of its sequence at which each piece begins. None
            if all begin at token 0.
        dropped: ids of the dropped sequences, increasing.
        truncated: ids of the sequences truncated to the capacity, increasing.
        split: ids of the sequences split into several pieces, increasing.
    """

    lengths: NDArray[np.integer]
    sequences: NDArray[np.int64] | None
    starts: NDArray[np.int64] | None
    dropped: NDArray[np.int64]
    truncated: NDArray[np.int64]
    split: NDArray[np.int64]


def as_lengths(values: Lengths, name: str = "lengths") -> NDArray[np.integer]:
    """Return ``values`` as a one-dimensional integer array with at least one element.

    Raises:
        TypeError: if the values are not integers. The message names the first that is not.
        ValueError: if there are no values, or they are not one-dimensional.
    """
    array = as_integers(values, name)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} must contain at least one sequence, got none")
    return array


def as_integers(values: Any, name: str) -> NDArray[np.integer]:
    """Return ``values`` as an integer array of any shape. Like `as_lengths`, but it may be empty.

    Raises:
        TypeError, ValueError: as `as_lengths`.
    """
    array = _as_array(values, name)
    if array.size == 0 and array.dtype == np.float64:  # NumPy's dtype for an empty list
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(_not_integers(array, name))
    if array.dtype == np.uint64 and (beyond := array >= 2**63).any():
        raise ValueError(f"{name} must be below 2**63, got {_first(beyond, array, name)}")
    return array


def fit(
    lengths: NDArray[np.integer], capacity: int, overlong: str, drop_empty: bool, name: str
) -> Pieces:
    """Return the pieces to pack, each with 1 to ``capacity`` tokens.

    Raises:
        ValueError: if a length is negative; if it is 0 and ``drop_empty`` is False; if it exceeds
            the capacity and ``overlong`` is "error"; or if ``overlong`` is not in `OVERLONG`.
    """
    check_overlong(overlong)
    shortest, longest = int(lengths.min(initial=1)), int(lengths.max(initial=1))
    if shortest < 0:
        raise ValueError(f"{name} must not be negative, got {_first(lengths < 0, lengths, name)}")
    if shortest == 0 and not drop_empty:
        raise ValueError(
            f"{name} must be 1 or more, got {_first(lengths == 0, lengths, name)}; "
            "pass drop_empty=True to leave out empty sequences"
        )
    if longest > capacity and overlong == "error":
        raise ValueError(
            f"{name} must be at most capacity = {capacity}, got "
            f"{_first(lengths > capacity, lengths, name)}; "
            'pass overlong="truncate" or "drop" to accept longer sequences'
        )
    no_ids = np.empty(0, np.int64)
    if shortest > 0 and longest <= capacity:
        return Pieces(lengths, None, None, no_ids, no_ids, no_ids)
    keep = lengths > 0
    if overlong == "drop":
        keep &= lengths <= capacity
    dropped = np.flatnonzero(~keep)
    sequences = np.flatnonzero(keep)
    kept = lengths[sequences].astype(np.int64)  # a narrower dtype may not hold the capacity
    over = sequences[kept > capacity]
    if overlong == "truncate":
        return Pieces(np.minimum(kept, capacity), sequences, None, dropped, over, no_ids)
    if len(over) == 0:
        return Pieces(kept, sequences, None, dropped, no_ids, no_ids)
    counts = -(-kept // capacity)
    starts = ranges(np.zeros_like(counts), counts)
    starts *= capacity
    pieces = np.minimum(np.repeat(kept, counts) - starts, capacity)
    return Pieces(pieces, np.repeat(sequences, counts), starts, dropped, no_ids, over)


def check_overlong(overlong: str) -> None:
    """Raise a ValueError if ``overlong`` is not in `OVERLONG`."""
    if overlong not in OVERLONG:
        raise ValueError(f"overlong must be one of {', '.join(OVERLONG)}, got {overlong!r}")


def _as_array(values: Any, name: str) -> NDArray[Any]:
    column = column_of(values, name, "integers, one per sequence")
    if isinstance(column, np.ndarray):
        return column
    if is_arrow(column):
        return _from_arrow(column, name)
    device = getattr(column, "device", None)
    if getattr(device, "type", "cpu") != "cpu":
        raise TypeError(f"{name} must be on the CPU, got a tensor on {device}")
    try:
        return np.asarray(column)
    except ValueError as error:  # lists of different lengths
        raise ValueError(f"{name} must be one-dimensional, got a ragged sequence") from error


def _from_arrow(column: Any, name: str) -> NDArray[Any]:
    """A flat column, or a column of lists of equal length as the rows of an array."""
    if not hasattr(column.type, "value_type"):
        return arrow_to_numpy(column, name)
    import pyarrow.compute

    if len(pyarrow.compute.list_value_length(column).unique()) > 1:
        raise ValueError(f"{name} must be one-dimensional, got a column of lists")
    flat = arrow_to_numpy(pyarrow.compute.list_flatten(column), name)
    return flat.reshape(len(column), -1)


def _not_integers(array: NDArray[Any], name: str) -> str:
    message = f"{name} must be integers, got {array.dtype}"
    if array.dtype.kind == "f":
        wrong = ~(array == np.floor(array))  # NaN too
        if wrong.any():
            return f"{message}: {_first(wrong, array, name)}"
    return message


def _first(where: NDArray[np.bool_], values: NDArray[Any], name: str) -> str:
    index, count = np.unravel_index(where.argmax(), where.shape), int(where.sum())
    more = f" and {count - 1} more" if count > 1 else ""
    return f"{name}[{', '.join(map(str, index))}] = {values[index]}{more}"
