"""A rank's share of the batches of an optimizer step, and its micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .measure import ModelTraits, SequenceSizes, rounded_up
from .microbatch import PlannedBatch, plan_microbatches, select_rows


class MicroBatch(NamedTuple):
    """One micro-batch of a rank's share.

    Attributes:
        batch: the number of its batch in the step.
        rows: ``(n,)`` int64, its rows in this batch.
        num_targets: its targets of the loss.
        tokens: its real tokens.
        slots: its rows x columns.
        filler: it keeps this rank in step with the others and has no weight.
    """

    batch: int
    rows: NDArray[np.int64]
    num_targets: int
    tokens: int
    slots: int
    filler: bool = False


class StepShare:
    """This rank's share of the batches of a step.

    Attributes:
        batches: the rank's part of each batch.
        sizes: the sizes of the sequences in each batch.
        inputs: the model's inputs for each batch, on the host or on the device.
        skipped: ``(batch, row)`` of the sequences that are not computed.
    """

    def __init__(
        self,
        batches: Sequence[PlannedBatch],
        sizes: list[SequenceSizes],
        inputs: list[Mapping[str, Any]],
        traits: ModelTraits,
    ) -> None:
        self.batches, self.sizes, self.inputs, self._traits = batches, sizes, inputs, traits
        self.skipped: set[tuple[int, int]] = set()

    def split(self, max_tokens: int, extra: int = 0) -> list[MicroBatch]:
        """Split the share into as few micro-batches as possible.

        Args:
            max_tokens: maximum number of tokens, or slots, of a micro-batch.
            extra: make this many more, if there are enough rows.
        """
        microbatches: list[MicroBatch] = []
        for at, sizes in enumerate(self.sizes):
            if self.batches[at].filler:
                continue
            rows = np.array([r for r in range(len(sizes.source)) if (at, r) not in self.skipped])
            if not len(rows):
                continue
            selected = SequenceSizes(*(values[rows] for values in sizes))
            groups = self._plan(selected, max_tokens, 1)
            more = min(extra, len(rows) - len(groups))
            if more > 0:
                groups = self._plan(selected, max_tokens, len(groups) + more)
                extra -= more
            microbatches += [self.microbatch(at, rows[group]) for group in groups]
        return microbatches

    def split_into(
        self, count: int, microbatches: list[MicroBatch], max_tokens: int
    ) -> list[MicroBatch]:
        """Split the share into ``count`` micro-batches, the number of another rank.

        Args:
            count: the number of micro-batches.
            microbatches: what `split` returned for ``max_tokens``: at most ``count``.
            max_tokens: maximum number of tokens, or slots, of a micro-batch.

        Returns:
            ``count`` micro-batches. If there are not enough rows, the last ones are fillers.
        """
        if len(microbatches) < count:
            microbatches = self.split(max_tokens, count - len(microbatches))
        if len(microbatches) < count:
            batch = min(range(len(self.sizes)), key=lambda at: self.sizes[at].tokens.min())
            shortest = np.array([self.sizes[batch].tokens.argmin()])
            filler = self.microbatch(batch, shortest, filler=True)
            microbatches = microbatches + [filler] * (count - len(microbatches))
        return microbatches

    def _plan(
        self, sizes: SequenceSizes, max_tokens: int, at_least: int
    ) -> list[NDArray[np.int64]]:
        return plan_microbatches(
            sizes,
            max_tokens,
            padded=self._traits.padded,
            multiple=self._traits.multiple,
            hidden_size=self._traits.hidden_size,
            at_least=at_least,
        )

    def microbatch(
        self, batch: int, rows: NDArray[np.int64], *, filler: bool = False
    ) -> MicroBatch:
        """The micro-batch of some rows of a batch."""
        sizes = self.sizes[batch]
        widths = np.array([sizes.columns[rows].max(), sizes.target[rows].max()])
        return MicroBatch(
            batch,
            rows,
            0 if filler else int(sizes.num_targets[rows].sum()),
            int(sizes.tokens[rows].sum()),
            len(rows) * int(rounded_up(widths, self._traits.multiple).sum()),
            filler,
        )

    def inputs_of(self, microbatch: MicroBatch) -> dict[str, Any]:
        """The model's inputs for a micro-batch."""
        inputs = select_rows(
            self.inputs[microbatch.batch],
            self.sizes[microbatch.batch],
            microbatch.rows,
            is_encoder_decoder=self._traits.is_encoder_decoder,
            padded=self._traits.padded,
            multiple=self._traits.multiple,
        )
        for name in ("labels", "shift_labels"):
            labels = inputs.get(name)
            if not microbatch.num_targets and isinstance(labels, Tensor):
                # The mean of zero targets is NaN, and 0 * NaN is NaN. So set one label.
                inputs[name] = labels = labels.clone()
                labels.view(len(labels), -1)[0, -1] = 0
        return inputs
