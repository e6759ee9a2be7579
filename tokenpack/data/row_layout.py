"""A plan carried out on flat tokens: rows with sequences next to each other.

    rows[r, c]             = values[source of slot (r, c)], or padding
    source of slot (r, c)  = r * capacity + c + (first source - first slot) of its run

Each slot of a row belongs to one run: an item, or the padding after the last item. So one number
per run, repeated over its slots, gives the source of every slot. This is done for as many rows at a
time as keep these numbers in the cache. Making rows then costs as much as any copy in that order.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..checks import IGNORE_INDEX
from ..packing import PackResult
from ..segments import offsets_of, ranges
from .tokens import more_like_it

# Slots per block. A block and its sources (8 bytes per slot) fit into a core's cache.
_BLOCK_SLOTS = 1 << 15
_PADDED_SLOTS = 1 << 20


class RowLayout:
    """The positions of tokens in rows: one row per bin of a plan, its items next to each other.

    An item is a sequence or a piece of one. The slots of all rows are numbered in order: slot
    ``row * capacity + column``.

    Attributes:
        num_rows: number of rows.
        capacity: slots per row.
        sequences: ``(num_items,)`` int64, the sequence that each item belongs to.
        lengths: ``(num_items,)`` int64, tokens of each item.
        starts: ``(num_items,)`` int64, first slot of each item.
        fills: ``(num_rows,)`` int64, tokens of each row; the slots after them are padding.
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
        """Lay out the bins ``result[first:last]``.

        Args:
            result: the plan.
            offsets: the offsets of the `Tokens` that were planned.
            name: the argument's name for these tokens, for error messages.
            first: the first bin.
            last: the bin after the last one; None for the end of the plan.

        Raises:
            ValueError: if the plan was made for other lengths.
        """
        first, last, _ = slice(first, last).indices(len(result))
        self.capacity = result.capacity
        self.num_rows = max(last - first, 0)
        bounds = result.offsets[first : first + self.num_rows + 1]
        items = slice(int(bounds[0]), int(bounds[-1]))
        self._bounds = np.asarray(bounds - bounds[0])  # see `row_bounds`
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
        # An item ends where its sequence ends, unless the sequence was truncated, or the item is a
        # piece of a split sequence and not its last.
        goes_on = np.isin(self.sequences, result.truncated)
        if len(result.split):
            # A piece fills a bin, unless one bin holds all tokens (`build_batch` of a stream).
            piece = self.capacity if len(result) > 1 else result.item_lengths.max()
            goes_on |= (self.lengths == piece) & np.isin(self.sequences, result.split)
        if (wrong := np.where(goes_on, lengths < ends, lengths != ends)).any():
            at = int(wrong.argmax())
            raise ValueError(
                f"{name}[{self.sequences[at]}] must be of the planned length, {ends[at]} tokens, "
                f"got {lengths[at]}{more_like_it(wrong)}"
            )

    @property
    def ends(self) -> NDArray[np.int64]:
        """``(num_items,)`` int64, the slot after each item's last slot."""
        return self.starts + self.lengths

    @property
    def cu_seqlens(self) -> NDArray[np.int32]:
        """``(num_items + 1,)`` int32, boundaries of the items in the stream without padding."""
        return self._cu_seqlens.astype(np.int32)

    @property
    def cu_seqlens_padded(self) -> NDArray[np.int32]:
        """``(num_items + 1,)`` int32, ``starts`` and then the number of slots."""
        return np.append(self.starts, self.num_rows * self.capacity).astype(np.int32)

    @property
    def row_bounds(self) -> NDArray[np.int64]:
        """``(num_rows + 1,)`` int64, offset of each row's first item, then the number of items."""
        return self._bounds

    def boundaries(self, dtype: DTypeLike = np.int64) -> NDArray[Any]:
        """``(num_items, 2)``: the column of each item's first token, and the one after its last."""
        counts = np.diff(self._bounds)
        begins = self.starts - np.repeat(np.arange(self.num_rows) * self.capacity, counts)
        return np.stack([begins, begins + self.lengths], axis=1).astype(dtype, copy=False)

    def tokens(
        self, values: NDArray[Any], fill: Any, dtype: DTypeLike | None = None
    ) -> NDArray[Any]:
        """``(num_rows, capacity)``: the value of each slot's token, and ``fill`` at padding.

        Args:
            values: ``(total,)``, the values of the planned `Tokens`, or other values, one for each
                of these tokens.
            fill: the value at padding.
            dtype: the dtype of the result; by default that of ``values``.
        """
        rows = np.empty((self.num_rows, self.capacity), dtype or values.dtype)
        counts, starts, sources, _ = self._runs
        shifts = sources - starts
        for slots, block, runs in self._blocks():
            index = np.repeat(shifts[runs], counts[runs])
            index += slots
            out = rows[block].reshape(-1)
            # np.take writes to `out` without a buffer only in mode "clip". Only padding is clipped.
            if out.dtype == values.dtype:
                np.take(values, index, out=out, mode="clip")
            else:
                out[:] = values.take(index, mode="clip")
        self._pad(rows, fill)
        return rows

    def labels(
        self, values: NDArray[Any], fill: int = IGNORE_INDEX, dtype: DTypeLike | None = None
    ) -> NDArray[Any]:
        """``(num_rows, capacity)`` for a loss that shifts: ``fill`` at padding and first tokens.

        After the shift, the first token of an item would be the target of the item before it.
        """
        rows = self.tokens(values, fill, dtype)
        rows.reshape(-1)[self.starts] = fill
        return rows

    def labels_from(self, rows: NDArray[Any], fill: int = IGNORE_INDEX) -> NDArray[Any]:
        """`labels` from the rows that `tokens` returned: a copy, cheaper than a gather."""
        labels = rows.copy()
        self._pad(labels, fill)
        labels.reshape(-1)[self.starts] = fill
        return labels

    @staticmethod
    def shifted(labels: NDArray[Any], fill: int = IGNORE_INDEX) -> NDArray[Any]:
        """`labels` for a loss that does not shift: each token has the label of the next.

        The last token of an item gets ``fill``, the label of the slot after it.
        """
        shifted = np.empty_like(labels)
        shifted.reshape(-1)[:-1] = labels.reshape(-1)[1:]
        shifted.reshape(-1)[-1:] = fill
        return shifted

    def position_ids(self, dtype: DTypeLike = np.int64) -> NDArray[Any]:
        """``(num_rows, capacity)``, counted from 0 in each item and in each row's padding.

        Code that finds sequences by their positions then treats the padding as one more sequence.
        """
        rows = np.empty((self.num_rows, self.capacity), dtype)
        counts, starts, _, _ = self._runs
        for slots, block, runs in self._blocks():
            first = np.repeat(starts[runs], counts[runs])
            np.subtract(slots, first, out=rows[block].reshape(-1), casting="unsafe")
        return rows

    def attention_mask(self, dtype: DTypeLike = np.int64) -> NDArray[Any]:
        """``(num_rows, capacity)``, 1 at tokens and 0 at padding."""
        return (np.arange(self.capacity) < self.fills[:, None]).astype(dtype)

    @cached_property
    def _runs(self) -> tuple[NDArray, NDArray, NDArray, NDArray]:
        """``(counts, starts, sources, bounds)`` of the runs: each row's items, then its padding.

        ``bounds`` is ``(num_rows + 1,)``: offset of each row's first run, then the number of runs.
        """
        counts = np.insert(self.lengths, self._bounds[1:], self.capacity - self.fills)
        sources = np.insert(self._sources, self._bounds[1:], 0)
        bounds = self._bounds + np.arange(self.num_rows + 1)
        return counts, np.cumsum(counts) - counts, sources, bounds

    def _blocks(self) -> Iterator[tuple[NDArray[np.int64], slice, slice]]:
        """``(slots, rows, runs)``, a few rows at a time."""
        bounds = self._runs[3]
        at_once = max(_BLOCK_SLOTS // self.capacity, 1)
        within = np.arange(min(at_once, self.num_rows) * self.capacity)
        for first in range(0, self.num_rows, at_once):
            last = min(first + at_once, self.num_rows)
            slots = within[: (last - first) * self.capacity] + first * self.capacity
            yield slots, slice(first, last), slice(int(bounds[first]), int(bounds[last]))

    def _pad(self, rows: NDArray[Any], fill: Any) -> None:
        at_once = max(_PADDED_SLOTS // self.capacity, 1)
        for first in range(0, self.num_rows, at_once):
            fills = self.fills[first : first + at_once]
            begins = np.arange(first, first + len(fills)) * self.capacity + fills
            rows.reshape(-1)[ranges(begins, self.capacity - fills)] = fill
