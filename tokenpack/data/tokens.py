"""Token lists as one flat array.

    sequence s = values[offsets[s]:offsets[s + 1]]

NumPy only. torch and pyarrow are never imported before the caller has imported them: their objects
are recognized by their attributes (`tokenpack.packing.columns`).
"""

from __future__ import annotations

import sys
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..packing import Packer, PackResult
from ..packing.columns import (
    arrow_to_numpy,
    as_arrow,
    column_of,
    holds_arrow,
    is_arrow,
    without_mask,
)
from ..segments import offsets_of

_EXPECTED = (
    "a list of token lists, arrays or tensors, or one column of lists from Arrow, datasets, pandas "
    "or polars"
)


class Tokens(NamedTuple):
    """Concatenated sequences: sequence s is ``values[offsets[s]:offsets[s + 1]]``.

    Attributes:
        values: ``(total,)`` integers; possibly a view of the caller's array.
        offsets: ``(num_sequences + 1,)`` int64, from 0 to total.
    """

    values: NDArray[np.integer]
    offsets: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """``(num_sequences,)`` int64."""
        return np.diff(self.offsets)


def flatten_tokens(
    sequences: Any, name: str = "token_ids", *, empty: bool = False, bools: bool = False
) -> Tokens:
    """Concatenate sequences of integers, without a Python loop over the tokens.

    Args:
        sequences: a list or another sequence of lists or tuples of ints, one-dimensional NumPy
            arrays, memory maps, torch CPU tensors, Arrow arrays or series, of any integer type and
            also mixed. Or one column of lists: an Arrow array (list, large list, list view or of
            fixed size; also chunked), a datasets column in any format or with a transform, a pandas
            or polars series. Or `Tokens`. An Arrow column of one chunk, and `Tokens`, are not
            copied.
        name: the argument's name, for error messages.
        empty: accept sequences without tokens.
        bools: accept booleans, as 0 and 1.

    Raises:
        TypeError: if ``sequences`` does not hold sequences of integers.
        ValueError: if there is no sequence, or a sequence is empty or not one-dimensional.
    """
    if isinstance(sequences, Tokens):
        tokens = sequences
    else:
        column = column_of(sequences, name, _EXPECTED)
        if is_arrow(column):
            tokens = _from_arrow(column, name, bools)
        else:
            tokens = _from_sequence(_as_list(column, name), name, bools)
    if len(tokens.offsets) < 2:
        raise ValueError(f"{name} must hold at least one sequence, got none")
    if not empty and (without := tokens.lengths == 0).any():
        raise ValueError(
            f"{name}[{without.argmax()}] must hold at least one token, got none"
            f"{more_like_it(without)}"
        )
    return tokens


def require_same_lengths(tokens: Tokens, name: str, other: Tokens, other_name: str) -> None:
    """Check that two lists of sequences have the same lengths.

    Raises:
        ValueError: if they differ; names the first sequence that does, and both lengths.
    """
    ours, theirs = tokens.lengths, other.lengths
    if len(ours) != len(theirs):
        raise ValueError(
            f"{other_name} must hold as many sequences as {name}, {len(ours)}, got {len(theirs)}"
        )
    if (wrong := ours != theirs).any():
        at = int(wrong.argmax())
        raise ValueError(
            f"{other_name}[{at}] must be as long as {name}[{at}], {ours[at]} tokens, "
            f"got {theirs[at]}{more_like_it(wrong)}"
        )


def plan_of(
    packer: Packer,
    tokens: Tokens,
    name: str,
    limit: str = "capacity",
    instead: str = "; pass overlong='truncate', 'split' or 'drop'",
) -> PackResult:
    """Plan which sequences share a bin.

    Args:
        name: what error messages call the sequences.
        limit: what they call the capacity.
        instead: the end of the message about a sequence that is too long, with the alternatives.

    Raises:
        ValueError: if a sequence is too long, or all are dropped.
    """
    lengths = tokens.lengths
    if packer.overlong == "error" and (over := lengths > packer.capacity).any():
        at = int(over.argmax())
        raise ValueError(
            f"{name}[{at}] must be at most {limit} = {packer.capacity} tokens, got {lengths[at]}"
            f"{more_like_it(over)}{instead}"
        )
    if packer.drops(lengths).all():
        raise ValueError(
            f"{name} must hold a sequence of 1 to {limit} = {packer.capacity} tokens, got lengths "
            f"from {lengths.min()} to {lengths.max()}, all dropped"
        )
    return packer.pack(lengths)


def _as_list(sequences: Any, name: str) -> Sequence[Any]:
    """``sequences`` as a list or tuple."""
    if isinstance(sequences, (list, tuple)):
        return sequences
    ndim = getattr(sequences, "ndim", None)
    if ndim is not None and getattr(sequences, "dtype", None) != np.dtype(object):
        raise ValueError(
            f"{name} must be a list of sequences, got one {ndim}-dimensional "
            f"{type(sequences).__name__} of shape {tuple(sequences.shape)}"
            + (f"; pass list({name}) if no row is padded" if ndim == 2 else "")
        )
    return list(sequences)


def _from_sequence(sequences: Sequence[Any], name: str, bools: bool) -> Tokens:
    kinds = set(map(type, sequences))
    if kinds <= {list, tuple}:
        return _from_lists(sequences, name, bools)
    torch = sys.modules.get("torch")  # imported already if there are tensors
    if torch is not None and all(issubclass(kind, torch.Tensor) for kind in kinds):
        return _from_tensors(torch, sequences, name, bools)
    if kinds != {np.ndarray}:
        sequences = [_as_array(each, name, at, bools) for at, each in enumerate(sequences)]
    return _from_arrays(sequences, name, bools)


def _from_lists(sequences: Sequence[Any], name: str, bools: bool, first: int = 0) -> Tokens:
    """Concatenate lists and tuples. Errors call the first one ``name[first]``.

    `array` takes booleans for integers, so a list of them is recognized by its first value.

    `array` reads unsigned integers three times as fast as signed ones. So unsigned is tried first,
    and a negative integer (-100 in labels) causes a second, signed pass.
    """
    lists = [each if type(each) is list else list(each) for each in sequences]
    for at, each in enumerate(lists, first):
        if each and type(each[0]) is bool and not bools:
            raise TypeError(f"{name}[{at}] must be integers, got bool")
    try:
        flat = _array_of("Q", lists)
        if len(flat) and flat.min() < 0:  # 2**63 or more
            raise OverflowError
    except (TypeError, OverflowError):
        try:
            flat = _array_of("q", lists)
        except (TypeError, OverflowError):
            _raise_first_invalid(lists, name, first)
            raise
    return Tokens(flat, offsets_of(_lengths_of(lists)))


def _array_of(typecode: str, lists: list[list[Any]]) -> NDArray[np.int64]:
    values = array(typecode)
    # A loop in C. `fromlist` rejects floats, where NumPy would truncate them.
    deque(map(values.fromlist, lists), maxlen=0)
    return np.frombuffer(values, np.int64) if values else np.empty(0, np.int64)


def _lengths_of(sequences: Sequence[Any]) -> NDArray[np.int64]:
    return np.fromiter(map(len, sequences), np.int64, len(sequences))


def _raise_first_invalid(sequences: Sequence[Any], name: str, first: int) -> None:
    """Raise TypeError for the first token that is not an integer of at most 64 bits."""
    for at, each in enumerate(sequences, first):
        for token_at, token in enumerate(each):
            try:
                array("q").append(token)
            except (TypeError, OverflowError):
                raise TypeError(
                    f"{name}[{at}][{token_at}] must be an integer of at most 64 bits, "
                    f"got {token!r:.80}"
                ) from None


def _from_tensors(torch: Any, tensors: Sequence[Any], name: str, bools: bool) -> Tokens:
    _require_all(tensors, lambda t: t.dim() == 1, "one-dimensional", lambda t: tuple(t.shape), name)
    _require_all(tensors, lambda t: t.is_cpu, "on the CPU", attrgetter("device"), name)
    lengths = _lengths_of(tensors)

    def is_integer(dtype: Any) -> bool:
        if dtype == torch.bool:
            return bools
        return not (dtype.is_floating_point or dtype.is_complex)

    _require_integers(is_integer, tensors, name)
    filled = list(tensors) if lengths.all() else [each for each in tensors if len(each)]
    if len({each.dtype for each in filled}) > 1:  # torch does not join all integer types
        return _from_arrays([each.numpy() for each in tensors], name, bools)
    values = torch.cat(filled).numpy() if filled else np.empty(0, np.int64)
    return Tokens(_integers(values, name), offsets_of(lengths))


def _from_arrays(arrays: Sequence[NDArray[Any]], name: str, bools: bool) -> Tokens:
    _require_all(arrays, lambda a: a.ndim == 1, "one-dimensional", attrgetter("shape"), name)
    lengths = _lengths_of(arrays)
    kinds = "iub" if bools else "iu"
    _require_integers(lambda dtype: dtype.kind in kinds, arrays, name)
    # The dtype of an empty array does not count: np.array([]) is float64.
    filled = arrays if lengths.all() else [each for each in arrays if len(each)]
    dtype = np.result_type(*set(map(attrgetter("dtype"), filled))) if filled else np.int64
    if dtype == np.float64:  # the common dtype of int64 and uint64
        for each in filled:
            _integers(each, name)
        dtype = np.int64
    values = np.concatenate(filled, dtype=dtype, casting="unsafe") if filled else np.empty(0, dtype)
    return Tokens(_integers(values, name), offsets_of(lengths))


def _as_array(values: Any, name: str, at: int, bools: bool) -> NDArray[Any]:
    """One sequence of a list that mixes lists, arrays and tensors."""
    if isinstance(values, (list, tuple)):
        return _from_lists([values], name, bools, at).values
    values = getattr(values, "values", values) if hasattr(values, "as_py") else values
    if holds_arrow(values):
        return arrow_to_numpy(as_arrow(values, name), f"{name}[{at}]")
    try:
        if isinstance(values, (str, bytes, Mapping, Set)) or not hasattr(values, "__len__"):
            raise TypeError
        array = np.asanyarray(values)
    except (TypeError, ValueError, RuntimeError):
        device = getattr(values, "device", None)
        where = "" if device is None else f" on {device}"
        raise TypeError(
            f"{name}[{at}] must be a list, array or CPU tensor of integers, "
            f"got {type(values).__name__}{where}"
        ) from None
    return without_mask(array, f"{name}[{at}]")


def _require_all(
    sequences: Sequence[Any],
    is_valid: Callable[[Any], bool],
    requirement: str,
    describe: Callable[[Any], Any],
    name: str,
) -> None:
    if not all(map(is_valid, sequences)):
        at, wrong = next((i, each) for i, each in enumerate(sequences) if not is_valid(each))
        raise ValueError(f"{name}[{at}] must be {requirement}, got {describe(wrong)}")


def _require_integers(
    is_integer: Callable[[Any], bool], sequences: Sequence[Any], name: str
) -> None:
    """Check the dtypes of all sequences that have tokens."""
    if all(map(is_integer, set(map(attrgetter("dtype"), sequences)))):
        return
    for at, each in enumerate(sequences):
        if len(each) and not is_integer(each.dtype):
            raise TypeError(f"{name}[{at}] must be integers, got {each.dtype}")


def _integers(values: NDArray[Any], name: str) -> NDArray[np.integer]:
    if values.dtype == np.uint64 and len(values) and int(values.max()) >= 2**63:
        raise ValueError(f"{name} must hold integers below 2**63, got {int(values.max())}")
    if values.dtype == np.bool_:
        return values.view(np.uint8)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _from_arrow(column: Any, name: str, bools: bool) -> Tokens:
    import pyarrow.compute

    kind = getattr(column.type, "value_type", None)
    types = pyarrow.types
    integers = kind is not None and (
        types.is_integer(kind) or types.is_null(kind) or (bools and types.is_boolean(kind))
    )
    if not integers:
        raise TypeError(f"{name} must be a column of lists of integers, got {column.type}")
    if column.null_count:
        at = np.flatnonzero(column.is_null())[0]
        raise TypeError(
            f"{name}[{at}] must be a list of integers, got null ({column.null_count} in the column)"
        )
    chunks = column.chunks if hasattr(column, "chunks") else [column]
    flat = [chunk.flatten() for chunk in chunks]  # a view, because there are no nulls
    lengths = np.asarray(pyarrow.compute.list_value_length(column))
    offsets = offsets_of(lengths)
    _require_no_nulls(flat, offsets, name)
    if types.is_null(kind):  # all lists are empty
        return Tokens(np.empty(0, np.int64), offsets)
    parts = [values.to_numpy(zero_copy_only=False) for values in flat]
    if len(parts) == 1:
        return Tokens(_integers(parts[0], name), offsets)
    values = np.concatenate(parts) if parts else np.empty(0, np.int64)
    return Tokens(_integers(values, name), offsets)


def _require_no_nulls(flat: list[Any], offsets: NDArray[np.int64], name: str) -> None:
    before = 0
    for values in flat:
        if values.null_count:
            token = before + int(np.flatnonzero(values.is_null())[0])
            at = int(np.searchsorted(offsets, token, side="right")) - 1
            raise TypeError(f"{name}[{at}][{token - offsets[at]}] must be an integer, got null")
        before += len(values)


def more_like_it(wrong: NDArray[np.bool_]) -> str:
    """The end of an error message: how many more are ``wrong`` than the one that it names."""
    count = int(wrong.sum()) - 1
    return f" ({count} more like it)" if count else ""
