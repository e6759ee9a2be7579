"""Token lists as one flat array, and a plan carried out on it: rows of sequences side by side.

    sequence s               = values[offsets[s]:offsets[s + 1]]
    rows[r, c]               = values[source of slot (r, c)], or what pads
    source of slot (r, c)    = r * capacity + c + (first source - first slot) of the piece it is in

Every slot of a row is in one piece: a sequence, or the padding behind the last. So one number per
piece, repeated over its slots, says where all of them come from. That is done for as many rows at a
time as keep those numbers in the cache, and rows then cost what any copy in that order costs.

NumPy alone: torch, pyarrow and datasets are told by what they hand over, and never imported first.
"""

from __future__ import annotations

import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..checks import IGNORE_INDEX
from ..packing import PackResult
from ..packing.lengths import arrow_column
from ..segments import offsets_of, ranges

# Slots of a block: its sources, 8 bytes each, and the block itself stay in a core's cache.
_BLOCK = 1 << 15
_PADDED_AT_ONCE = 1 << 20


class Tokens(NamedTuple):
    """Sequences one after the other: s is ``values[offsets[s]:offsets[s + 1]]``.

    Attributes:
        values: ``(total,)`` integers; maybe a view of what they were taken from.
        offsets: ``(num_sequences + 1,)`` int64, from 0 to total.
    """

    values: NDArray[np.integer]
    offsets: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """``(num_sequences,)`` int64."""
        return np.diff(self.offsets)


# ------------------------------------------------------------------------------------- to one array


def flatten_tokens(
    sequences: Any, name: str = "token_ids", *, empty: bool = False, bools: bool = False
) -> Tokens:
    """Sequences of integers as one array, without a Python loop over them.

    Args:
        sequences: lists or tuples of ints, one-dimensional NumPy arrays or torch CPU tensors, an
            Arrow column of lists, a datasets column, or `Tokens`. An Arrow column of one chunk, and
            `Tokens`, are not copied.
        name: what errors call it.
        empty: whether sequences without tokens are welcome.
        bools: whether booleans are too, as 0 and 1.

    Raises:
        TypeError: if they are no sequences of integers.
        ValueError: if there are none, one is empty, or one is not one-dimensional.
    """
    if isinstance(sequences, Tokens):
        tokens = sequences
    elif (column := arrow_column(sequences)) is not None:
        tokens = _from_arrow(column, name, bools)
    else:
        tokens = _from_sequence(_as_list(sequences, name), name, bools)
    if len(tokens.offsets) < 2:
        raise ValueError(f"{name} must hold at least one sequence, got none")
    if not empty and (without := tokens.lengths == 0).any():
        raise ValueError(
            f"{name}[{without.argmax()}] must hold at least one token, got none{_more(without)}"
        )
    return tokens


def require_same_lengths(tokens: Tokens, name: str, other: Tokens, other_name: str) -> None:
    """Check that two lists of sequences have the same lengths.

    Raises:
        ValueError: naming the first sequence that differs, and both its lengths.
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
            f"got {theirs[at]}{_more(wrong)}"
        )


def require_fits(tokens: Tokens, name: str, capacity: int, limit: str, instead: str = "") -> None:
    """Check that no sequence is longer than ``capacity``, which errors call ``limit``.

    Raises:
        ValueError: naming the first that is; ``instead`` says what could be done about it.
    """
    lengths = tokens.lengths
    if (over := lengths > capacity).any():
        at = int(over.argmax())
        raise ValueError(
            f"{name}[{at}] must be at most {limit} = {capacity} tokens, "
            f"got {lengths[at]}{_more(over)}{instead}"
        )


def _as_list(sequences: Any, name: str) -> Sequence[Any]:
    """``sequences``, once it is sure to be a sequence of something."""
    if isinstance(sequences, (list, tuple)):
        return sequences
    ndim = getattr(sequences, "ndim", None)
    if ndim is not None and getattr(sequences, "dtype", None) != np.dtype(object):
        raise ValueError(
            f"{name} must be one sequence of its own length per item, got one {ndim}-dimensional "
            f"{type(sequences).__name__} of shape {tuple(sequences.shape)}"
            + (f": give list({name}) if no row is padded" if ndim == 2 else "")
        )
    if isinstance(sequences, (str, bytes, dict)) or not hasattr(sequences, "__len__"):
        raise TypeError(
            f"{name} must be a list of token lists, arrays or tensors, or an Arrow or datasets "
            f"column of them, got {type(sequences).__name__}"
        )
    return list(sequences)


def _from_sequence(sequences: Sequence[Any], name: str, bools: bool) -> Tokens:
    kinds = set(map(type, sequences))
    if kinds <= {list, tuple}:
        return _from_lists(sequences, name)
    torch = sys.modules.get("torch")  # whoever has tensors has imported it
    if torch is not None and all(issubclass(kind, torch.Tensor) for kind in kinds):
        return _from_tensors(torch, sequences, name, bools)
    if kinds != {np.ndarray}:
        sequences = [_as_array(each, name, at) for at, each in enumerate(sequences)]
    return _from_arrays(sequences, name, bools)


def _from_lists(sequences: Sequence[Any], name: str, first: int = 0) -> Tokens:
    """Of lists and tuples, of which the first one is ``name[first]``.

    `array` reads unsigned integers in a third of the time that signed ones take. So those are tried
    first, and a negative one (-100 in labels) has all of them read again.
    """
    lists = [each if type(each) is list else list(each) for each in sequences]
    try:
        flat = _array_of("Q", lists)
        if len(flat) and flat.min() < 0:  # 2**63 or more
            raise OverflowError
    except (TypeError, OverflowError):
        try:
            flat = _array_of("q", lists)
        except (TypeError, OverflowError):
            _refuse_lists(lists, name, first)
            raise
    return Tokens(flat, offsets_of(_lengths_of(lists)))


def _array_of(typecode: str, lists: list[list[Any]]) -> NDArray[np.int64]:
    values = array(typecode)
    # A loop in C. `fromlist` takes integers alone, where NumPy would cut fractions off.
    deque(map(values.fromlist, lists), maxlen=0)
    return np.frombuffer(values, np.int64) if values else np.empty(0, np.int64)


def _lengths_of(sequences: Sequence[Any]) -> NDArray[np.int64]:
    return np.fromiter(map(len, sequences), np.int64, len(sequences))


def _refuse_lists(sequences: Sequence[Any], name: str, first: int) -> None:
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

    def good(dtype: Any) -> bool:
        none = dtype.is_floating_point or dtype.is_complex or (dtype == torch.bool and not bools)
        return not none

    _require_integers(good, tensors, name)
    whole = list(tensors) if lengths.all() else [each for each in tensors if len(each)]
    values = torch.cat(whole).numpy() if whole else np.empty(0, np.int64)
    return Tokens(_integers(values, name), offsets_of(lengths))


def _from_arrays(arrays: Sequence[NDArray[Any]], name: str, bools: bool) -> Tokens:
    _require_all(arrays, lambda a: a.ndim == 1, "one-dimensional", attrgetter("shape"), name)
    lengths = _lengths_of(arrays)
    kinds = "iub" if bools else "iu"
    _require_integers(lambda dtype: dtype.kind in kinds, arrays, name)
    # An empty one has no dtype worth having.
    whole = arrays if lengths.all() else [each for each in arrays if len(each)]
    dtype = np.result_type(*set(map(attrgetter("dtype"), whole))) if whole else np.int64
    if dtype == np.float64:  # of signed and unsigned 64 bits
        for each in whole:
            _integers(each, name)
        dtype = np.int64
    values = np.concatenate(whole, dtype=dtype, casting="unsafe") if whole else np.empty(0, dtype)
    return Tokens(_integers(values, name), offsets_of(lengths))


def _as_array(values: Any, name: str, at: int) -> NDArray[Any]:
    """One sequence, where they are of several kinds."""
    if isinstance(values, (list, tuple)):
        return _from_lists([values], name, at).values
    try:
        if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
            raise TypeError
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError):
        device = getattr(values, "device", None)
        where = "" if device is None else f" on {device}"
        raise TypeError(
            f"{name}[{at}] must be a list, array or CPU tensor of integers, "
            f"got {type(values).__name__}{where}"
        ) from None


def _require_all(
    sequences: Sequence[Any],
    good: Callable[[Any], bool],
    wanted: str,
    got: Callable[[Any], Any],
    name: str,
) -> None:
    if not all(map(good, sequences)):
        at, wrong = next((i, each) for i, each in enumerate(sequences) if not good(each))
        raise ValueError(f"{name}[{at}] must be {wanted}, got {got(wrong)}")


def _require_integers(good: Callable[[Any], bool], sequences: Sequence[Any], name: str) -> None:
    """Refuse dtypes that are not good, but of sequences without tokens."""
    if all(map(good, set(map(attrgetter("dtype"), sequences)))):
        return
    for at, each in enumerate(sequences):
        if len(each) and not good(each.dtype):
            raise TypeError(f"{name}[{at}] must be integers, got {each.dtype}")


def _integers(values: NDArray[Any], name: str) -> NDArray[np.integer]:
    if values.dtype == np.uint64 and len(values) and int(values.max()) >= 2**63:
        raise ValueError(f"{name} must hold integers below 2**63, got {int(values.max())}")
    return values.view(np.uint8) if values.dtype == np.bool_ else values


def _from_arrow(column: Any, name: str, bools: bool) -> Tokens:
    import pyarrow.compute

    kind = getattr(column.type, "value_type", None)
    integers = kind is not None and (
        pyarrow.types.is_integer(kind) or (bools and pyarrow.types.is_boolean(kind))
    )
    if not integers:
        raise TypeError(f"{name} must be a column of lists of integers, got {column.type}")
    if column.null_count:
        at = np.flatnonzero(column.is_null())[0]
        raise TypeError(
            f"{name}[{at}] must be a list of integers, got null ({column.null_count} in the column)"
        )
    chunks = column.chunks if hasattr(column, "chunks") else [column]
    flat = [chunk.flatten() for chunk in chunks]  # a view: without nulls nothing is between lists
    lengths = np.asarray(pyarrow.compute.list_value_length(column))
    offsets = offsets_of(lengths)
    _require_no_nulls(flat, offsets, name)
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


def _more(wrong: NDArray[np.bool_]) -> str:
    count = int(wrong.sum()) - 1
    return f" ({count} more like it)" if count else ""


# ------------------------------------------------------------------------------------------ to rows


class Rows:
    """Where the tokens of some bins of a plan stand: a bin is a row, its sequences side by side.

    Attributes:
        num_rows: bins.
        capacity: slots of a row.
        sequences: ``(num_items,)`` int64, which sequence each item is, or is a piece of.
        lengths: ``(num_items,)`` int64, its tokens.
        starts: ``(num_items,)`` int64, its first slot, rows counted on: row * capacity + column.
        fills: ``(num_rows,)`` int64, tokens of each row; the slots behind them are padding.
    """

    def __init__(
        self,
        result: PackResult,
        offsets: NDArray[np.int64],
        name: str = "token_ids",
        *,
        first: int = 0,
        last: int | None = None,
    ) -> None:
        """Rows of the bins ``result[first:last]``.

        Args:
            result: the plan.
            offsets: of the `Tokens` that it was made for.
            name: what errors call those.

        Raises:
            ValueError: if the plan was made for other lengths.
        """
        first, last, _ = slice(first, last).indices(len(result))
        self.capacity = result.capacity
        self.num_rows = max(last - first, 0)
        bounds = result.offsets[first : first + self.num_rows + 1]
        items = slice(int(bounds[0]), int(bounds[-1]))
        self._bounds = np.asarray(bounds - bounds[0])  # of the rows, in the items
        self.sequences = np.asarray(result.items[items])
        self.lengths = result.item_lengths[items].astype(np.int64)
        begins = None if result.item_starts is None else result.item_starts[items]
        self._require_tokens(result, offsets, begins, name)

        self._cu_seqlens = offsets_of(self.lengths)
        cu_rows = self._cu_seqlens[self._bounds]
        self.fills = np.diff(cu_rows)
        counts = np.diff(self._bounds)
        padding_before = np.arange(self.num_rows) * self.capacity - cu_rows[:-1]
        self.starts = self._cu_seqlens[:-1] + np.repeat(padding_before, counts)
        self._sources = offsets[self.sequences]
        if begins is not None:
            self._sources += begins

    def _require_tokens(
        self,
        result: PackResult,
        offsets: NDArray[np.int64],
        begins: NDArray[np.int64] | None,
        name: str,
    ) -> None:
        if result.num_sequences != len(offsets) - 1:
            raise ValueError(
                f"{name} must hold the {result.num_sequences} sequences that were planned, "
                f"got {len(offsets) - 1}"
            )
        ends = self.lengths if begins is None else self.lengths + begins
        lengths = np.diff(offsets)[self.sequences]
        # A sequence ends with the last of its tokens, but for those that were cut, and pieces that
        # are followed by another.
        goes_on = np.isin(self.sequences, result.truncated)
        if len(result.split):
            goes_on |= (self.lengths == self.capacity) & np.isin(self.sequences, result.split)
        if (wrong := np.where(goes_on, lengths < ends, lengths != ends)).any():
            at = int(wrong.argmax())
            raise ValueError(
                f"{name}[{self.sequences[at]}] must be of the planned length, {ends[at]} tokens, "
                f"got {lengths[at]}{_more(wrong)}"
            )

    @property
    def ends(self) -> NDArray[np.int64]:
        """``(num_items,)`` int64, the slot behind each item's last."""
        return self.starts + self.lengths

    @property
    def cu_seqlens(self) -> NDArray[np.int32]:
        """``(num_items + 1,)`` int32, boundaries in the stream of the rows' tokens."""
        return self._cu_seqlens.astype(np.int32)

    @property
    def cu_seqlens_padded(self) -> NDArray[np.int32]:
        """``(num_items + 1,)`` int32, ``starts``, and last the number of slots."""
        return np.append(self.starts, self.num_rows * self.capacity).astype(np.int32)

    @property
    def row_bounds(self) -> NDArray[np.int64]:
        """``(num_rows + 1,)`` int64: row r's items are from ``row_bounds[r]`` to the next."""
        return self._bounds

    def boundaries(self, dtype: DTypeLike = np.int64) -> NDArray[Any]:
        """``(num_items, 2)``, columns of its row that each item begins and ends (excluded) at."""
        counts = np.diff(self._bounds)
        begins = self.starts - np.repeat(np.arange(self.num_rows) * self.capacity, counts)
        return np.stack([begins, begins + self.lengths], axis=1).astype(dtype, copy=False)

    def tokens(
        self, values: NDArray[Any], fill: Any, dtype: DTypeLike | None = None
    ) -> NDArray[Any]:
        """``(num_rows, capacity)``, each slot its token's value; ``fill`` where there is no token.

        Args:
            values: ``(total,)``, those of the `Tokens` that the plan was made for, or others that
                belong to them one by one.
            fill: what stands at padding.
            dtype: of the result; by default that of ``values``.
        """
        rows = np.empty((self.num_rows, self.capacity), dtype or values.dtype)
        counts, starts, sources, _ = self._pieces
        shifts = sources - starts
        for slots, block, pieces in self._blocks():
            index = np.repeat(shifts[pieces], counts[pieces])
            index += slots
            out = rows[block].reshape(-1)
            # "clip" alone writes without a buffer; what it clips is padding.
            if out.dtype == values.dtype:
                np.take(values, index, out=out, mode="clip")
            else:
                out[:] = values.take(index, mode="clip")
        self._pad(rows, fill)
        return rows

    def labels(
        self, values: NDArray[Any], fill: int = IGNORE_INDEX, dtype: DTypeLike | None = None
    ) -> NDArray[Any]:
        """``(num_rows, capacity)``, for a loss that shifts: ``fill`` at padding and first tokens.

        The first token of a sequence is what the last one of its neighbour would be asked for.
        """
        rows = self.tokens(values, fill, dtype)
        rows.reshape(-1)[self.starts] = fill
        return rows

    def labels_from(self, rows: NDArray[Any], fill: int = IGNORE_INDEX) -> NDArray[Any]:
        """`labels` of values that `tokens` has put in ``rows``: a copy in order, not a gather."""
        labels = rows.copy()
        self._pad(labels, fill)
        labels.reshape(-1)[self.starts] = fill
        return labels

    @staticmethod
    def shifted(labels: NDArray[Any], fill: int = IGNORE_INDEX) -> NDArray[Any]:
        """`labels` for a loss that does not shift: each token has the next one's.

        The last token of a sequence gets the ``fill`` of what follows it.
        """
        shifted = np.empty_like(labels)
        shifted.reshape(-1)[:-1] = labels.reshape(-1)[1:]
        shifted.reshape(-1)[-1:] = fill
        return shifted

    def position_ids(self, dtype: DTypeLike = np.int64) -> NDArray[Any]:
        """``(num_rows, capacity)``, from 0 in every sequence, and in the padding of every row.

        So padding is a sequence to itself wherever sequences are told by their positions.
        """
        rows = np.empty((self.num_rows, self.capacity), dtype)
        counts, starts, _, _ = self._pieces
        for slots, block, pieces in self._blocks():
            first = np.repeat(starts[pieces], counts[pieces])
            np.subtract(slots, first, out=rows[block].reshape(-1), casting="unsafe")
        return rows

    def attention_mask(self, dtype: DTypeLike = np.int64) -> NDArray[Any]:
        """``(num_rows, capacity)``, 1 at tokens and 0 at padding."""
        return (np.arange(self.capacity) < self.fills[:, None]).astype(dtype)

    @cached_property
    def _pieces(self) -> tuple[NDArray, NDArray, NDArray, NDArray]:
        """``(counts, starts, sources, bounds)`` of the pieces: of each row its items, then padding.

        ``bounds`` is ``(num_rows + 1,)``, of the rows in the pieces.
        """
        counts = np.insert(self.lengths, self._bounds[1:], self.capacity - self.fills)
        sources = np.insert(self._sources, self._bounds[1:], 0)
        bounds = self._bounds + np.arange(self.num_rows + 1)
        return counts, np.cumsum(counts) - counts, sources, bounds

    def _blocks(self) -> Iterator[tuple[NDArray[np.int64], slice, slice]]:
        """Rows, a few at a time: ``(slots, rows, pieces)``, slots counted over all rows."""
        bounds = self._pieces[3]
        at_once = max(_BLOCK // self.capacity, 1)
        within = np.arange(min(at_once, self.num_rows) * self.capacity)
        for first in range(0, self.num_rows, at_once):
            last = min(first + at_once, self.num_rows)
            slots = within[: (last - first) * self.capacity] + first * self.capacity
            yield slots, slice(first, last), slice(int(bounds[first]), int(bounds[last]))

    def _pad(self, rows: NDArray[Any], fill: Any) -> None:
        at_once = max(_PADDED_AT_ONCE // self.capacity, 1)
        for first in range(0, self.num_rows, at_once):
            fills = self.fills[first : first + at_once]
            begins = np.arange(first, first + len(fills)) * self.capacity + fills
            rows.reshape(-1)[ranges(begins, self.capacity - fills)] = fill
