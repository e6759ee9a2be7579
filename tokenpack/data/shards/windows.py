"""Rows from token shards: windows of the stream, or whole documents that a planner packs.

A window has ``seq_len`` inputs, and the target of its last input is the token after it:

    inputs    t0 t1 ... t127         of tokens t0 ... t128 at seq_len 128: one window
    targets   t1 t2 ... t128

So windows follow each other without a gap in the targets: each token of the stream but the first is
a target once. Models of transformers shift the labels themselves, so a row has ``seq_len + 1``
slots. The last one holds the last target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from ...checks import as_integer, at_least_one
from ...packing import Packer
from .samples import Row, ShardSamples, make_row
from .shards import TokenShards


@overload
def shard_windows(
    shards: Any,
    seq_len: int,
    *,
    stride: int | None = None,
    isolate_documents: bool = True,
    strategy: str | None = None,
    overlong: str = "error",
    split: None = None,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    labels_shifted: bool = False,
    padding_value: int = 0,
) -> ShardSamples: ...
@overload
def shard_windows(
    shards: Any,
    seq_len: int,
    *,
    stride: int | None = None,
    isolate_documents: bool = True,
    strategy: str | None = None,
    overlong: str = "error",
    split: float,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    labels_shifted: bool = False,
    padding_value: int = 0,
) -> tuple[ShardSamples, ShardSamples]: ...
def shard_windows(
    shards: Any,
    seq_len: int,
    *,
    stride: int | None = None,
    isolate_documents: bool = True,
    strategy: str | None = None,
    overlong: str = "error",
    split: float | None = None,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    labels_shifted: bool = False,
    padding_value: int = 0,
) -> ShardSamples | tuple[ShardSamples, ShardSamples]:
    """Rows of token shards, in an order that depends only on seed, epoch and the sample's number.

    Args:
        shards: a `TokenShards`, or the paths for one.
        seq_len: inputs of a row.
        stride: tokens from the start of a window to that of the next, from 1 to ``seq_len``, which
            is the default. With a smaller stride, windows overlap.
        isolate_documents: keep the documents of a window apart: each is a sequence of its own in
            attention, and its first token is not a target of the document before. Otherwise a
            window is one sequence.
        strategy: None cuts the stream into windows. Otherwise the documents are packed whole into
            rows of ``seq_len`` slots, by one of `tokenpack.packing.Packer.strategies()` or "auto".
        overlong: with a strategy, what to do with documents of more than ``seq_len`` tokens: raise
            an "error", "truncate" or "drop" them. ``samples.plan`` lists them.
        split: the share of the tokens that is for training, between 0 and 1. The stream is cut
            once, at the nearest end of a document if ends are known. A single document is cut too,
            and so are a few long ones, if their ends would change the smaller part by over half.
            A strategy never cuts documents.
        seed, epoch: of the order.
        shuffle: False keeps the order of the stream.
        labels_shifted: give each input the label of the next token, for a loss that does not shift.
            Rows then have ``seq_len`` slots.
        padding_value: the id behind the last token of a row that is not full.

    Returns:
        A dataset with the rows, or ``(train, validation)`` if ``split`` is given; validation rows
        are in the order of the stream. A row has ``input_ids``, ``labels`` (-100 where there is no
        target) and ``seq_lengths``: NumPy arrays of int64. The last window of the stream may be
        shorter than its row.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: if a number is out of range, if documents cannot be kept apart because a file
            does not store their ends, or if there are too few tokens.
    """
    if not isinstance(shards, TokenShards):
        shards = TokenShards(shards)
    seq_len = at_least_one("seq_len", seq_len)
    step = seq_len if stride is None else at_least_one("stride", stride)
    if step > seq_len:
        raise ValueError(
            f"stride must be at most seq_len = {seq_len}, or tokens are never read; got {stride}"
        )
    if strategy is not None and stride is not None:
        raise ValueError("stride must not be given with a strategy, which does not cut documents")
    if (isolate_documents or strategy is not None) and not shards.has_boundaries:
        _raise_no_boundaries(shards)
    packer = None
    if strategy is not None:
        if overlong not in ("error", "truncate", "drop"):
            raise ValueError(f"overlong must be error, truncate or drop, got {overlong!r}")
        packer = Packer(seq_len, strategy, seed, overlong=overlong, drop_empty=True)

    def make(start: int, stop: int, shuffled: bool) -> ShardSamples:
        order = (seed, epoch, shuffled)
        row = (labels_shifted, as_integer("padding_value", padding_value))
        if packer is not None:
            return ShardDocuments(shards, packer, (start, stop), order, row)
        cut = (seq_len, step, isolate_documents)
        return ShardWindows(shards, cut, (start, stop), order, row)

    if split is None:
        return make(0, shards.num_tokens, shuffle)
    cut = _cut(shards, split, whole=strategy is not None)
    return make(0, cut, shuffle), make(cut, shards.num_tokens, False)


class ShardWindows(ShardSamples):
    """Windows of a stream of tokens; `shard_windows` returns it.

    Attributes:
        shards: the tokens.
        seq_len, stride, isolate_documents: as for `shard_windows`.
        bounds: the part of the stream that is read, in tokens.
    """

    def __init__(
        self,
        shards: TokenShards,
        cut: tuple[int, int, bool],
        bounds: tuple[int, int],
        order: tuple[int, int, bool],
        row: tuple[bool, int],
    ) -> None:
        self.shards, self.bounds = shards, bounds
        self.seq_len, self.stride, self.isolate_documents = cut
        self.labels_shifted, self.padding_value = row
        self.slots = self.seq_len + (not self.labels_shifted)
        targets = bounds[1] - bounds[0] - 1
        if targets < 1:
            raise ValueError(f"shards must have at least 2 tokens for a window, got {targets + 1}")
        super().__init__(1 + -(-max(targets - self.seq_len, 0) // self.stride), *order)

    @property
    def options(self) -> dict[str, Any]:
        """See `ShardSamples.options`."""
        return {
            **super().options,
            "seq_len": self.seq_len,
            "stride": self.stride,
            "isolate_documents": self.isolate_documents,
            "bounds": list(self.bounds),
        }

    def row(self, index: int) -> Row:
        """Window ``index`` of the stream."""
        start = self.bounds[0] + index * self.stride
        stop = min(start + self.seq_len + 1, self.bounds[1])
        ends: Sequence[int] = ()
        if self.isolate_documents:
            ends = self.shards.ends_between(start, stop).tolist()
        edges = [start, *ends, stop]
        parts = list(zip(edges, edges[1:]))
        return make_row(self.shards, parts, self.slots, self.padding_value, self.labels_shifted)


class ShardDocuments(ShardSamples):
    """Whole documents packed into rows; `shard_windows` returns it.

    Attributes:
        shards: the tokens.
        plan: which documents share a row, and which were truncated or dropped. Documents are
            numbered from the first of ``bounds``.
        bounds: the part of the stream that is read, in tokens.
    """

    def __init__(
        self,
        shards: TokenShards,
        packer: Packer,
        bounds: tuple[int, int],
        order: tuple[int, int, bool],
        row: tuple[bool, int],
    ) -> None:
        self.shards, self.bounds, self._packer = shards, bounds, packer
        self.labels_shifted, self.padding_value = row
        self.slots = packer.capacity
        ends: NDArray[np.int64] = shards.ends
        ends = ends[(ends > bounds[0]) & (ends <= bounds[1])]
        self._starts = np.append(bounds[0], ends[:-1])
        lengths = ends - self._starts
        longest = int(lengths.max(initial=0))
        if packer.overlong == "error" and longest > packer.capacity:
            raise ValueError(
                f"documents must have at most seq_len = {packer.capacity} tokens, got one of "
                f"{longest:,} (and {int((lengths > packer.capacity).sum()) - 1:,} more); pass "
                "overlong='truncate' or 'drop', or strategy=None, which cuts the stream"
            )
        self.plan = packer.pack(lengths)
        if not len(self.plan):
            raise ValueError("shards must have a document that fits into a row, got none")
        super().__init__(len(self.plan), *order)

    @property
    def options(self) -> dict[str, Any]:
        """See `ShardSamples.options`."""
        return {**super().options, **self._packer.options, "bounds": list(self.bounds)}

    def row(self, index: int) -> Row:
        """Row ``index`` of the plan."""
        first, last = self.plan.offsets[index : index + 2]
        starts = self._starts[self.plan.items[first:last]]
        stops = starts + self.plan.item_lengths[first:last]
        parts = list(zip(starts.tolist(), stops.tolist()))
        return make_row(self.shards, parts, self.slots, self.padding_value, self.labels_shifted)


def _cut(shards: TokenShards, split: Any, whole: bool) -> int:
    """The token at which the stream is divided; ``whole`` if no document may be cut."""
    if isinstance(split, bool) or not isinstance(split, (int, float)) or not 0 < split < 1:
        raise ValueError(f"split must be between 0 and 1, got {split!r}")
    wanted = round(shards.num_tokens * split)
    cut = min(max(wanted, 2), shards.num_tokens - 2)
    if shards.has_boundaries:
        ends = shards.ends
        ends = ends[(ends >= 2) & (ends <= shards.num_tokens - 2)]
        if whole and not len(ends):
            raise ValueError(
                "split must leave a document of 2 tokens or more on each side, but the shards have "
                f"{len(shards):,} documents; pass split=None, or strategy=None, which cuts them"
            )
        allowed = min(wanted, shards.num_tokens - wanted) / 2
        if whole or np.abs(ends - wanted).min(initial=shards.num_tokens) <= allowed:
            cut = int(ends[np.abs(ends - wanted).argmin()])
    if cut < 2:
        raise ValueError(f"shards must have at least 4 tokens to be split, got {shards.num_tokens}")
    return cut


def _raise_no_boundaries(shards: TokenShards) -> None:
    file = next(each for each in shards.files if each.ends is None)
    raise ValueError(
        "isolate_documents must be False for files that do not store the ends of documents, got "
        f"{file.path} ({file.format}); or open it with TokenShards(..., eos_token_id=) or "
        "bos_token_id="
    )
