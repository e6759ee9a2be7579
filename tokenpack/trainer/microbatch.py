"""A collated batch: how long its sequences are, and pieces of it that fit a budget.

    tokens of row i  =  real tokens of the source + target up to its last label
    a micro-batch    =  some rows, without the columns that are padding in all of them

Rows are measured after collating, on the host, since only then is it known what a collator made of
the examples. What an unpatched model computes is rows x columns instead: ``padded=True`` counts so.

A cut changes no number. Columns behind the last real token are padding to every row. Those before
the first (left padding) go only with ``padded=True``, where they would be paid for: there, a model
that counts positions by columns sees other positions, as it does with any other batch composition.
Nothing before the last label of a decoder is dropped, for it attends to that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checks import IGNORE_INDEX
from ..packing.ranks import sequence_costs
from .batches import cut_groups

_TARGET = ("labels", "shift_labels")  # beside what begins with decoder_


class PlannedBatch(dict[str, Any]):
    """What the loader hands to a trainer: a collated batch, and which examples are in it.

    Attributes:
        inputs: the batch as the collator made it, maybe with methods of its own.
        examples: index of each row in the dataset, or None where the collator's rows are not the
            examples (or came from an iterable dataset).
        repeated: rows of examples that another rank has: there to have something to run, or to
            gather, and without weight.
    """

    def __init__(
        self,
        inputs: Mapping[str, Any],
        examples: list[int] | None = None,
        repeated: list[int] | None = None,
    ) -> None:
        super().__init__(inputs)
        self.inputs, self.examples, self.repeated = inputs, examples, repeated or []

    @property
    def filler(self) -> bool:
        """In training: this rank has no share of the batch."""
        return bool(self.repeated)

    def pin_memory(self) -> PlannedBatch:
        """The same in page-locked memory; ``DataLoader`` calls this."""
        return PlannedBatch(_pinned(self.inputs), self.examples, self.repeated)


class Rows(NamedTuple):
    """The sequences of a batch, measured.

    Attributes:
        source: ``(n,)`` int64, real tokens on the encoder's side or of a causal model.
        target: ``(n,)`` int64, tokens of the decoder: up to the last that is asked for. 0 for
            causal models.
        asked: ``(n,)`` int64, targets of the loss; 1 each where the batch has no labels.
        first, last: ``(n,)`` int64, columns that the source begins and ends at.
    """

    source: NDArray[np.int64]
    target: NDArray[np.int64]
    asked: NDArray[np.int64]
    first: NDArray[np.int64]
    last: NDArray[np.int64]

    @property
    def tokens(self) -> NDArray[np.int64]:
        """``(n,)`` int64, both sides."""
        return self.source + self.target

    @property
    def columns(self) -> NDArray[np.int64]:
        """``(n,)`` int64, what the source takes in a padded batch; holes in the mask included."""
        return self.last - self.first

    def sizes(self, multiple: int) -> NDArray[np.int64]:
        """``(n,)`` int64, slots of each row when it is padded by itself."""
        return rounded_up(self.columns, multiple) + rounded_up(self.target, multiple)


def is_packed(inputs: Mapping[str, Any]) -> bool:
    """Whether the batch holds its sequences side by side, told apart by ``cu_seqlens``."""
    return "cu_seqlens" in inputs


def ask_no_padding(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """A left-padded causal batch in which no pad is asked for a row's first token.

    A collator that copies ids to labels leaves a label there, and the loss would then take the
    model's guess from a pad, which attends to nothing, for a prediction. Padded on the right, or
    alone, the same sequence is asked no such thing.
    """
    labels, mask = inputs.get("labels"), inputs.get("attention_mask")
    if is_packed(inputs) or not isinstance(labels, Tensor) or not isinstance(mask, Tensor):
        return inputs
    if mask.shape != labels.shape or "shift_labels" in inputs:
        return inputs
    first = (mask[:, 1:] != 0) & (mask[:, :-1] == 0)
    if not bool((first & (labels[:, 1:] != IGNORE_INDEX)).any()):
        return inputs
    labels = labels.clone()
    labels[:, 1:].masked_fill_(first, IGNORE_INDEX)
    return {**inputs, "labels": labels}


def measure(inputs: Mapping[str, Any], *, two_sided: bool, shifts_labels: bool) -> Rows:
    """Measure a batch on the host.

    Args:
        inputs: padded (``input_ids`` or ``inputs_embeds`` of ``(rows, columns, ...)``, maybe
            ``attention_mask`` and ``labels``) or packed (``cu_seqlens``).
        two_sided: labels are of a decoder; else they are of the source.
        shifts_labels: the loss asks nothing by the label in a row's first column, since it takes
            each token's neighbour for its target.

    Raises:
        ValueError: if there is nothing to count tokens by, or labels ask for padding.
    """
    if is_packed(inputs):
        return _measure_packed(inputs)
    source, first, last = _sources(inputs)
    labels = inputs.get("shift_labels", inputs.get("labels"))
    asked = np.ones_like(source)
    target = np.zeros_like(source)
    if isinstance(labels, Tensor) and _one_a_row(labels):
        asked = (_numbers(labels) != IGNORE_INDEX).astype(np.int64)
    elif _by_token(labels, inputs, two_sided):
        valid = _numbers(labels) != IGNORE_INDEX
        if not two_sided:
            _refuse_labels_of_padding(valid, inputs)
        asked = valid[:, int(shifts_labels and "shift_labels" not in inputs) :].sum(1)
        target = _extent(valid) if two_sided else target
    else:  # what it asks for may be columns, counted from the left, as answers to questions are
        first = np.zeros_like(first)
    if two_sided:
        target = np.maximum(target, _decoder_extent(inputs, has_labels=labels is not None))
    return Rows(source, target, asked, first, last)


def _measure_packed(inputs: Mapping[str, Any]) -> Rows:
    source = _numbers(inputs["cu_seqlens"].diff())
    starts = inputs.get("cu_seqlens_padded", inputs["cu_seqlens"])
    decoder = inputs.get("decoder_cu_seqlens")
    target = np.zeros_like(source) if decoder is None else _numbers(decoder.diff())
    labels = inputs.get("labels")
    asked = np.ones_like(source)
    if labels is not None:
        bounds = _numbers(starts if decoder is None else decoder)
        counted = np.append(0, (_numbers(labels.flatten()) != IGNORE_INDEX).cumsum())
        asked = np.diff(counted[bounds])
    return Rows(source, target, asked, np.zeros_like(source), source)


def _one_a_row(labels: Tensor) -> bool:
    """Classes of whole sequences."""
    return labels.dim() == 1 and not labels.is_floating_point()


def _by_token(labels: Any, inputs: Mapping[str, Any], two_sided: bool) -> TypeGuard[Tensor]:
    """Whether each token has a label; several classes of a row are as wide as they like."""
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
        return False
    rows, columns = _main(inputs).shape[:2]
    return len(labels) == rows and (two_sided or labels.shape[1] == columns)


def _sources(inputs: Mapping[str, Any]) -> tuple[NDArray[np.int64], ...]:
    """Real tokens of each row, and the columns that they begin and end at."""
    rows, columns = _main(inputs).shape[:2]
    mask = inputs.get("attention_mask")
    if not (isinstance(mask, Tensor) and mask.dim() == 2):
        whole = np.full(rows, columns, np.int64)
        return whole, np.zeros_like(whole), whole
    real = _numbers(mask) != 0
    some = real.any(1)
    return real.sum(1), np.where(some, real.argmax(1), 0), _extent(real)


def _refuse_labels_of_padding(valid: NDArray[np.bool_], inputs: Mapping[str, Any]) -> None:
    """Padding is not computed, so its labels cannot count, and they were hardly meant to."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == valid.shape:
        wrong = int((valid & (_numbers(mask) == 0)).sum())
        if wrong:
            raise ValueError(
                f"labels must be {IGNORE_INDEX} where attention_mask is 0, but {wrong} are not: a "
                "data collator that copies input_ids to labels has to leave padding out"
            )


def _decoder_extent(inputs: Mapping[str, Any], *, has_labels: bool) -> NDArray[np.int64] | int:
    """Columns that the decoder's own inputs ask for, beside what labels do."""
    mask, ids = inputs.get("decoder_attention_mask"), inputs.get("decoder_input_ids")
    if isinstance(mask, Tensor):
        return _extent(_numbers(mask) != 0)
    return ids.shape[1] if isinstance(ids, Tensor) and not has_labels else 0


def _extent(valid: NDArray[np.bool_]) -> NDArray[np.int64]:
    """``(rows,)``: columns up to each row's last True."""
    columns = valid.shape[1]
    if not columns:
        return np.zeros(len(valid), np.int64)
    return np.where(valid.any(1), columns - valid[:, ::-1].argmax(1), 0)


def _main(inputs: Mapping[str, Any]) -> Tensor:
    for name in ("input_ids", "inputs_embeds", "input_features"):
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.dim() >= 2:
            return value
    raise ValueError(
        "the data collator must give input_ids or inputs_embeds of (rows, columns, ...) to count "
        f"tokens by, got {sorted(inputs)}"
    )


def _numbers(tensor: Tensor) -> NDArray[Any]:
    array = tensor.detach().cpu().numpy()
    return array.astype(np.int64) if array.dtype == np.int32 else array


# ----------------------------------------------------------------------------------------- a budget


def plan_microbatches(
    rows: Rows,
    max_tokens: int,
    *,
    padded: bool = False,
    multiple: int = 1,
    hidden_size: int = 1024,
    at_least: int = 1,
) -> list[NDArray[np.int64]]:
    """Rows to micro-batches: as few as the budget allows, and of about equal cost.

    Packed, each row goes to the cheapest micro-batch that has room, the costliest first (Graham's
    LPT rule); what a row costs is as in `tokenpack.packing.balance_ranks`. Padded, rows of similar
    lengths stay together, and the largest micro-batch is as small as that number of them allows.

    Args:
        max_tokens: most tokens of a micro-batch, with ``padded`` most slots. A row over it stands
            by itself: who must not compute it has looked before.
        multiple: padded widths are rounded up to this.
        at_least: make this many of them, if there are as many rows.

    Returns:
        Row numbers of each micro-batch; together every row once.
    """
    sizes = rows.sizes(multiple) if padded else rows.tokens
    groups = [np.array([row]) for row in np.flatnonzero(sizes > max_tokens)]
    rest = np.flatnonzero(sizes <= max_tokens)
    at_least = max(at_least - len(groups), 1)
    if not len(rest):
        return groups
    if padded:
        return groups + _group_similar(rows, rest, max_tokens, multiple, at_least)
    costs = sequence_costs(rows.source, rows.target, hidden_size)
    rest = rest[np.argsort(-costs[rest], kind="stable")]
    count = max(-(-int(sizes[rest].sum()) // max_tokens), at_least)
    while (dealt := _deal(rest, sizes, costs, min(count, len(rest)), max_tokens)) is None:
        count += 1
    return groups + dealt


def _deal(
    order: NDArray[np.int64],
    tokens: NDArray[np.int64],
    costs: NDArray[np.float64],
    count: int,
    max_tokens: int,
) -> list[NDArray[np.int64]] | None:
    """``count`` groups of at most ``max_tokens``, or None if this rule finds no such."""
    groups: list[list[int]] = [[] for _ in range(count)]
    used, spent = np.zeros(count, np.int64), np.zeros(count)
    for row in order.tolist():
        # An empty group comes first whatever else there is: no micro-batch may stay without rows.
        at = int(np.where(used + tokens[row] <= max_tokens, spent, np.inf).argmin())
        if used[at] + tokens[row] > max_tokens:
            return None
        groups[at].append(row)
        used[at] += tokens[row]
        spent[at] += max(costs[row], 1e-9)
    return [np.array(group) for group in groups]


def _group_similar(
    rows: Rows, rest: NDArray[np.int64], max_tokens: int, multiple: int, at_least: int
) -> list[NDArray[np.int64]]:
    """Groups of similar lengths, ``rest`` being the rows that fit alone."""
    order = rest[np.lexsort((-rows.target[rest], -rows.columns[rest]))]
    sides = rounded_up(np.stack([rows.columns[order], rows.target[order]], axis=1), multiple)
    fewest = len(cut_groups(sides, max_tokens))
    low, high = int(sides.sum(1).max()), max_tokens
    while low < high:  # the smallest bound that takes no more micro-batches
        middle = (low + high) // 2
        if len(cut_groups(sides, middle)) <= fewest:
            high = middle
        else:
            low = middle + 1
    groups = np.split(order, cut_groups(sides, high)[1:-1])
    while len(groups) < min(at_least, len(order)):
        largest = max(range(len(groups)), key=lambda at: len(groups[at]))
        groups[largest : largest + 1] = np.array_split(groups[largest], 2)
    return groups


def rounded_up(lengths: Any, multiple: int) -> Any:
    """An integer, or an array of them, rounded up to a multiple."""
    return -(-lengths // multiple) * multiple


# -------------------------------------------------------------------------------------------- a cut


def select_rows(
    inputs: Any,
    rows: Rows,
    chosen: NDArray[np.int64],
    *,
    two_sided: bool,
    padded: bool = False,
    multiple: int = 1,
) -> dict[str, Any]:
    """Some rows of a batch, without the columns that are padding in all of them.

    Args:
        inputs: a packed batch with ``select``, or a padded one. There, tensors and lists with an
            entry for each row are cut, and tensors with one for each token by columns as well;
            anything else is handed on.
        chosen: row numbers.
        two_sided: labels are of a decoder; else they are of the source.
        padded: drop the columns before the first real token as well.
        multiple: keep widths that are divisible by this, as far as the batch is that wide.
    """
    if is_packed(inputs):
        return inputs.select(chosen)
    count, columns = _main(inputs).shape[:2]
    first = int(rows.first[chosen].min()) if padded else 0
    last = max(int(rows.last[chosen].max()), first + 1)
    width = min(rounded_up(last - first, multiple), columns)
    first = max(0, min(first, columns - width))
    source = slice(first, first + width)
    depth = int(rows.target[chosen].max(initial=0))
    target = slice(0, max(rounded_up(depth, multiple), 1))
    index = torch.from_numpy(np.ascontiguousarray(chosen))
    whole = len(chosen) == count and bool((chosen == np.arange(count)).all())

    def one(name: str, value: Any) -> Any:
        if isinstance(value, list) and len(value) == count:
            return [value[row] for row in chosen]
        if not isinstance(value, Tensor) or not value.dim():
            return value
        if name == "position_ids" and value.shape == (1, columns):  # the same for all rows
            return value[:, source]
        if len(value) != count:
            return value
        decoder = name.startswith("decoder_") or (name in _TARGET and two_sided)
        by_column = name in _BY_COLUMN
        if name in _TARGET:
            by_column = _by_token(value, inputs, two_sided)
        elif not by_column and value.dim() == 2:  # of the user's own loss: weights of tokens, say
            decoder = two_sided and value.shape == _shape_of(inputs.get("labels"))
            by_column = decoder or value.shape[1] == columns
        if value.dim() > 1 and by_column:
            value = value[:, target if decoder else source]
        return value if whole else value.index_select(0, index.to(value.device))

    return {name: one(name, value) for name, value in inputs.items()}


def _shape_of(value: Any) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None


_BY_COLUMN = frozenset(
    {
        "input_ids",
        "inputs_embeds",
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "labels",
        "shift_labels",
        "decoder_input_ids",
        "decoder_inputs_embeds",
        "decoder_attention_mask",
    }
)


class DeviceFeed:
    """Micro-batches on the device, the next one copied while the current one is computed.

    On a GPU copies run on a stream of their own, out of page-locked memory. The compute stream
    waits for a copy by an event before it reads, and the allocator is told that it reads
    (``record_stream``), so that it hands the memory out again no sooner than that is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, pieces: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """Move each of ``pieces``, one ahead."""
        ahead = None
        for piece in pieces:
            moved = self._move(piece)
            if ahead is not None:
                yield self._arrived(*ahead)
            ahead = moved
        if ahead is not None:
            yield self._arrived(*ahead)

    def _move(self, piece: Mapping[str, Any]) -> tuple[Mapping[str, Any], Any]:
        if self._stream is None:
            return to_device(piece, self.device), None
        with torch.cuda.stream(self._stream):
            moved = to_device(_pinned(piece), self.device)
            return moved, self._stream.record_event()

    def _arrived(self, piece: Mapping[str, Any], copied: Any) -> Mapping[str, Any]:
        if copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            for value in piece.values():
                if isinstance(value, Tensor) and value.is_cuda:
                    value.record_stream(current)
        return piece


def to_device(inputs: Mapping[str, Any], device: torch.device) -> Mapping[str, Any]:
    """The batch on ``device``; asynchronously where its memory is pinned."""
    move = getattr(inputs, "to", None)
    if move is not None:
        return move(device, non_blocking=True)
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def _pinned(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    pin = getattr(inputs, "pin_memory", None)
    if pin is not None:
        return pin()
    return {
        name: value.pin_memory() if isinstance(value, Tensor) and value.is_cpu else value
        for name, value in inputs.items()
    }
