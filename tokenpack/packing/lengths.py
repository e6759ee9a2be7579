"""Lengths of sequences, from whatever holds them to one array of checked integers.

No copy is made of an array that already is one, and nothing here imports torch, pyarrow or
datasets: what they hand over is told by what it can do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

OVERLONG = ("error", "truncate", "split", "drop")
Lengths = Sequence[int] | NDArray[np.integer] | Any
"""Integers, one per sequence: NumPy, a torch CPU tensor, an Arrow or datasets column, a list."""


class Pieces(NamedTuple):
    """What is to be packed, after what was too long or empty was dealt with.

    Attributes:
        lengths: ``(num_pieces,)`` integers from 1 to the capacity.
        sequences: ``(num_pieces,)`` int64, the sequence of each; None where piece i is sequence i.
        starts: ``(num_pieces,)`` int64, where in its sequence each begins; None where all do at 0.
        dropped: ids of the sequences left out, rising.
        truncated: ids of the sequences cut to the capacity, rising.
        split: ids of the sequences in more than one piece, rising.
    """

    lengths: NDArray[np.integer]
    sequences: NDArray[np.int64] | None
    starts: NDArray[np.int64] | None
    dropped: NDArray[np.int64]
    truncated: NDArray[np.int64]
    split: NDArray[np.int64]


def as_lengths(values: Lengths, name: str = "lengths") -> NDArray[np.integer]:
    """The integers in ``values``, one-dimensional and at least one.

    Raises:
        TypeError: if they are no integers, saying which is not.
        ValueError: if there are none, or they are no single row of numbers.
    """
    array = _as_array(values, name)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} must name at least one sequence, got none")
    if array.dtype.kind not in "iu":
        raise TypeError(_not_integers(array, name))
    if array.dtype == np.uint64 and (beyond := array >= 2**63).any():
        raise ValueError(f"{name} must be below 2**63, got {_first(beyond, array, name)}")
    return array


def fit(
    lengths: NDArray[np.integer], capacity: int, overlong: str, drop_empty: bool, name: str
) -> Pieces:
    """What is to be packed, each piece from 1 to ``capacity`` long.

    Raises:
        ValueError: if a length is negative, is 0 and not to be dropped, or is over the capacity and
            ``overlong`` is "error"; if ``overlong`` is none of `OVERLONG`.
    """
    check_overlong(overlong)
    shortest, longest = int(lengths.min(initial=1)), int(lengths.max(initial=1))
    if shortest < 0:
        raise ValueError(f"{name} must not be negative, got {_first(lengths < 0, lengths, name)}")
    if shortest == 0 and not drop_empty:
        raise ValueError(
            f"{name} must be 1 or more, got {_first(lengths == 0, lengths, name)} "
            "(drop_empty=True leaves out sequences without tokens)"
        )
    if longest > capacity and overlong == "error":
        raise ValueError(
            f"{name} must be at most capacity = {capacity}, got "
            f"{_first(lengths > capacity, lengths, name)} (overlong= truncate, split or drop)"
        )
    none = np.empty(0, np.int64)
    if shortest > 0 and longest <= capacity:
        return Pieces(lengths, None, None, none, none, none)
    keep = lengths > 0
    if overlong == "drop":
        keep &= lengths <= capacity
    dropped = np.flatnonzero(~keep)
    sequences = np.flatnonzero(keep)
    kept = lengths[sequences].astype(np.int64)  # whatever they came in, a capacity fits
    over = sequences[kept > capacity]
    if overlong == "truncate":
        return Pieces(np.minimum(kept, capacity), sequences, None, dropped, over, none)
    if len(over) == 0:
        return Pieces(kept, sequences, None, dropped, none, none)
    counts = -(-kept // capacity)
    starts = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts *= capacity
    pieces = np.minimum(np.repeat(kept, counts) - starts, capacity)
    return Pieces(pieces, np.repeat(sequences, counts), starts, dropped, none, over)


def check_overlong(overlong: str) -> None:
    """Raise the ValueError of an unknown way to deal with what is over capacity."""
    if overlong not in OVERLONG:
        raise ValueError(f"overlong must be one of {', '.join(OVERLONG)}, got {overlong!r}")


def _as_array(values: Any, name: str) -> NDArray[Any]:
    if isinstance(values, np.ndarray):
        return values
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
        raise TypeError(f"{name} must be integers, one per sequence, got {type(values).__name__}")
    arrow = arrow_column(values)
    if arrow is not None:
        if arrow.null_count:
            raise TypeError(f"{name} must be integers, got a column with {arrow.null_count} nulls")
        return np.asarray(arrow)
    device = getattr(values, "device", None)
    if getattr(device, "type", "cpu") != "cpu":
        raise TypeError(f"{name} must be on the CPU, got a tensor on {device}")
    try:
        return np.asarray(values)
    except ValueError as error:  # of lists of unequal lengths
        raise ValueError(f"{name} must be one-dimensional, got a ragged sequence") from error


def arrow_column(values: Any) -> Any:
    """The Arrow array that ``values`` is, or that a datasets column reads, or None."""
    if hasattr(values, "null_count"):
        return values
    source, column = getattr(values, "source", None), getattr(values, "column_name", None)
    if source is None or column is None or not hasattr(source, "with_format"):
        return None
    return source.with_format("arrow")[column]


def _not_integers(array: NDArray[Any], name: str) -> str:
    message = f"{name} must be integers, got {array.dtype}"
    if array.dtype.kind == "f":
        wrong = ~(array == np.floor(array))  # NaN too
        if wrong.any():
            return f"{message}: {_first(wrong, array, name)}"
    return message


def _first(where: NDArray[np.bool_], values: NDArray[Any], name: str) -> str:
    at, count = int(where.argmax()), int(where.sum())
    more = f" and {count - 1} more" if count > 1 else ""
    return f"{name}[{at}] = {values[at]}{more}"
