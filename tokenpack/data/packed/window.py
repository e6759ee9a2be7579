"""The rows of one window of samples: planned as a whole, made a few at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...packing import Packer, PackResult
from ...segments import offsets_of, ranges
from ..row_layout import RowLayout
from .collate import flatten_samples
from .deal import Row

_SLOTS = 1 << 16  # made at once, so that memory use stays close to the window's tokens


class PlannedWindow:
    """A window of samples and the plan of its rows. Its length is the number of rows."""

    def __init__(
        self, samples: list[Any], packer: Packer, padding_value: int, label_padding_value: int
    ) -> None:
        self._ids, labels, _ = flatten_samples(samples, empty=True)
        self._labels = self._ids if labels is None else labels
        self._fills = padding_value, label_padding_value
        lengths = self._ids.lengths
        self._plan = None if packer.drops(lengths).all() else packer.pack(lengths)

    def __len__(self) -> int:
        return 0 if self._plan is None else len(self._plan)

    def rows(self, numbers: Sequence[int]) -> Iterator[Row]:
        """Yield some of the rows.

        A row has ``input_ids``, ``labels`` and ``position_ids``, ``(capacity,)`` int64, and
        ``seq_lengths``.
        """
        if self._plan is None:
            return
        at_once = max(1, _SLOTS // self._plan.capacity)
        for first in range(0, len(numbers), at_once):
            bins = np.asarray(numbers[first : first + at_once])
            rows = RowLayout(_some_bins(self._plan, bins), self._ids.offsets)
            columns = {
                "input_ids": rows.tokens(self._ids.values, self._fills[0], np.int64),
                "labels": rows.labels(self._labels.values, self._fills[1], np.int64),
                "position_ids": rows.position_ids(),
            }
            bounds = rows.row_bounds
            for number in range(rows.num_rows):
                row: Row = {name: column[number] for name, column in columns.items()}
                row["seq_lengths"] = rows.lengths[bounds[number] : bounds[number + 1]]
                yield row


def _some_bins(plan: PackResult, bins: NDArray[np.integer]) -> PackResult:
    """The plan with only these bins."""
    counts = np.diff(plan.offsets)[bins]
    items = ranges(plan.offsets[bins], counts)
    return dataclasses.replace(
        plan,
        items=plan.items[items],
        offsets=offsets_of(counts),
        item_lengths=plan.item_lengths[items],
        item_starts=None if plan.item_starts is None else plan.item_starts[items],
    )
