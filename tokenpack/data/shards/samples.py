"""Samples in an order that is computed: the base of windows, packed documents and blends.

Samples are numbered through all epochs. Sample ``epoch * len(samples) + place`` is the sample at
``place`` of that epoch, so one number says how far a training is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...checks import IGNORE_INDEX, as_integer, check_seed
from .order import permute
from .shards import TokenShards

Row = dict[str, NDArray[np.int64]]


class ShardSamples:
    """A dataset whose sample number decides, with seed and epoch, which row it is.

    It can be the dataset of a ``DataLoader`` or the ``train_dataset`` of a ``Trainer``, with
    `collate_packed_rows`. `ShardLoader` also resumes, skips and divides the samples among ranks.

    Attributes:
        slots: slots of a row.
        labels_shifted: whether a row's labels are already shifted.
    """

    slots: int
    labels_shifted: bool = False

    def __init__(self, count: int, seed: int, epoch: int, shuffle: bool) -> None:
        self._count, self.seed, self.shuffle = count, check_seed(seed), shuffle
        self.set_epoch(epoch)

    @property
    def options(self) -> dict[str, Any]:
        """What decides which sample a number is. The state of a loader is valid only with these."""
        return {"samples": len(self), "seed": self.seed, "shuffle": self.shuffle}

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order ``samples[i]`` follows."""
        if as_integer("epoch", epoch) < 0:
            raise ValueError(f"epoch must be 0 or more, got {epoch}")
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int) -> Row:
        at = as_integer("index", place)
        if not -len(self) <= at < len(self):
            raise IndexError(f"index must be below {len(self)}, the number of samples, got {at}")
        return self.sample(self.epoch * len(self) + at % len(self))

    def __getitems__(self, places: Sequence[int]) -> list[Row]:
        return [self[place] for place in places]

    def sample(self, number: int) -> Row:
        """The sample of a number that counts through all epochs, 0 or more."""
        return self.numbered([number])[0]

    def numbered(self, numbers: Sequence[int]) -> list[Row]:
        """Like `sample`, for several numbers."""
        return [self.row(index) for index in self.rows_of(numbers)]

    def rows_of(self, numbers: Sequence[int]) -> list[int]:
        """Which row each sample is."""
        epochs, places = np.divmod(np.asarray(numbers, np.int64), len(self))
        if not self.shuffle:
            return places.tolist()
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = permute(places[here], len(self), self.seed, int(epoch))
        return rows.tolist()

    def row(self, index: int) -> Row:
        """The row of an index, from 0 to ``len(self) - 1``."""
        raise NotImplementedError


def make_row(
    shards: TokenShards,
    parts: Sequence[tuple[int, int]],
    slots: int,
    padding_value: int,
    shifted: bool,
) -> Row:
    """Lay out parts of the stream as the sequences of one row.

    Args:
        shards: the tokens.
        parts: start and stop of each sequence in the stream, one token at least, adjacent parts
            in order.
        slots: of the row. If ``shifted``, the last token may lie behind the last slot: then it is
            only a label.
        padding_value: the id behind the last token.
        shifted: give each token the label of the next one, instead of its own.

    Returns:
        ``input_ids`` and ``labels``, ``(slots,)``, and ``seq_lengths``, the tokens of each
        sequence. All int64.
    """
    lengths = np.array([stop - start for start, stop in parts], np.int64)
    ends = lengths.cumsum()
    total = int(ends[-1])
    ids = np.empty(max(slots, total), np.int64)
    at = 0
    for start, stop in _joined(parts):
        ids[at : at + stop - start] = shards.tokens(start, stop)
        at += stop - start
    ids[total:] = padding_value
    labels = ids.copy()
    labels[total:] = IGNORE_INDEX
    if shards.has_mask:
        masks = [shards.targets(start, stop) for start, stop in parts]
        labels[:total][~np.concatenate(masks)] = IGNORE_INDEX  # type: ignore[arg-type]
    labels[ends - lengths] = IGNORE_INDEX  # would be predicted from elsewhere
    if not shifted:
        return {"input_ids": ids, "labels": labels, "seq_lengths": lengths}
    next_labels = np.append(labels[1:], IGNORE_INDEX)[:slots]
    lengths[-1] -= max(total - slots, 0)
    return {
        "input_ids": ids[:slots],
        "labels": next_labels,
        "seq_lengths": lengths[lengths > 0],
    }


def _joined(parts: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Adjacent parts as one, which is read at once."""
    joined = [parts[0]]
    for start, stop in parts[1:]:
        if start == joined[-1][1]:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined
