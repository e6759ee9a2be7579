"""Split a collated batch into micro-batches that fit a token budget.

    a micro-batch  =  some rows of the batch, without the columns that are padding in all of them

Splitting does not change the loss or the gradient. Columns after the last real token are padding in
every row. Columns before the first real token (left padding) are removed only if ``padded=True``,
where the model would compute them. A model that counts positions by columns then sees other
positions, as it would in any other batch. No decoder column before the last label is removed,
because later tokens attend to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..packing.ranks import sequence_costs
from .batches import cut_groups
from .device_feed import pinned
from .measure import SequenceSizes, are_token_labels, is_packed, main_input, rounded_up

_LABELS = ("labels", "shift_labels")
_PER_TOKEN = frozenset(
    {
        "input_ids",
        "inputs_embeds",
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "decoder_input_ids",
        "decoder_inputs_embeds",
        "decoder_attention_mask",
    }
)


class PlannedBatch(dict[str, Any]):
    """A collated batch, and the examples in it.

    Attributes:
        inputs: the batch that the collator returned, which may have methods of its own.
        examples: the dataset index of each row. None if the rows do not correspond to examples, or
            if the dataset is iterable.
        repeated: rows that repeat an example of another rank. They only keep this rank in step, or
            fill it up before a gather, and have no weight.
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
        """In training: whether this rank has no example of the batch."""
        return bool(self.repeated)

    def pin_memory(self) -> PlannedBatch:
        """Return the batch in page-locked memory. `DataLoader` calls this."""
        return PlannedBatch(pinned(self.inputs), self.examples, self.repeated)


def plan_microbatches(
    sizes: SequenceSizes,
    max_tokens: int,
    *,
    padded: bool = False,
    multiple: int = 1,
    hidden_size: int = 1024,
    at_least: int = 1,
) -> list[NDArray[np.int64]]:
    """Assign rows to micro-batches: as few as the budget allows, of about equal cost.

    Without padding, each row goes to the cheapest micro-batch that has room, in order of decreasing
    cost (longest processing time first, Graham 1969). The cost of a row is that of
    `tokenpack.packing.balance_ranks`. With padding, rows of similar lengths stay together, and the
    largest micro-batch is as small as this number of micro-batches allows.

    Args:
        sizes: the sizes of the rows.
        max_tokens: maximum number of tokens of a micro-batch, or of slots with ``padded``. A row
            that exceeds it gets a micro-batch of its own. Callers that must not compute such rows
            check for them first.
        padded: count slots instead of tokens.
        multiple: round padded widths up to a multiple of this.
        hidden_size: the model's hidden size.
        at_least: the minimum number of micro-batches, if there are that many rows.

    Returns:
        The row numbers of each micro-batch. Each row occurs once.
    """
    counts = sizes.slots(multiple) if padded else sizes.tokens
    groups = [np.array([row]) for row in np.flatnonzero(counts > max_tokens)]
    rest = np.flatnonzero(counts <= max_tokens)
    at_least = max(at_least - len(groups), 1)
    if not len(rest):
        return groups
    if padded:
        return groups + _group_similar_rows(sizes, rest, max_tokens, multiple, at_least)
    costs = sequence_costs(sizes.source, sizes.target, hidden_size)
    rest = rest[np.argsort(-costs[rest], kind="stable")]
    num_groups = max(-(-int(counts[rest].sum()) // max_tokens), at_least)
    while True:
        dealt = _deal_to_groups(rest, counts, costs, min(num_groups, len(rest)), max_tokens)
        if dealt is not None:
            return groups + dealt
        num_groups += 1


def _deal_to_groups(
    order: NDArray[np.int64],
    tokens: NDArray[np.int64],
    costs: NDArray[np.float64],
    num_groups: int,
    max_tokens: int,
) -> list[NDArray[np.int64]] | None:
    """``num_groups`` groups of at most ``max_tokens`` tokens, or None if the greedy rule fails."""
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    used, spent = np.zeros(num_groups, np.int64), np.zeros(num_groups)
    for row in order.tolist():
        at = int(np.where(used + tokens[row] <= max_tokens, spent, np.inf).argmin())
        if used[at] + tokens[row] > max_tokens:
            return None
        groups[at].append(row)
        used[at] += tokens[row]
        # Never 0, so that an empty group is always the cheapest. Every group must get a row.
        spent[at] += max(costs[row], 1e-9)
    return [np.array(group) for group in groups]


def _group_similar_rows(
    sizes: SequenceSizes, rest: NDArray[np.int64], max_tokens: int, multiple: int, at_least: int
) -> list[NDArray[np.int64]]:
    """Groups of rows of similar lengths. ``rest`` are the rows that fit by themselves."""
    order = rest[np.lexsort((-sizes.target[rest], -sizes.columns[rest]))]
    sides = rounded_up(np.stack([sizes.columns[order], sizes.target[order]], axis=1), multiple)
    fewest = len(cut_groups(sides, max_tokens))
    # Bisect the smallest bound that needs no more groups.
    low, high = int(sides.sum(1).max()), max_tokens
    while low < high:
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


def select_rows(
    inputs: Any,
    sizes: SequenceSizes,
    rows: NDArray[np.int64],
    *,
    is_encoder_decoder: bool,
    padded: bool = False,
    multiple: int = 1,
) -> dict[str, Any]:
    """Select rows of a batch, and remove the columns that are padding in all of them.

    Args:
        inputs: a packed batch with a method ``select``, or a padded batch. In a padded batch, the
            rows of tensors and lists that have one entry per row are selected, and the columns of
            tensors that have one entry per token. Other values are passed on unchanged.
        sizes: the sizes of all rows of the batch.
        rows: the row numbers.
        is_encoder_decoder: labels belong to a decoder, otherwise to the source.
        padded: also remove the columns before the first real token.
        multiple: keep the width divisible by this, as far as the batch is wide enough.
    """
    if is_packed(inputs):
        return inputs.select(rows)
    count, columns = main_input(inputs).shape[:2]
    first = int(sizes.first[rows].min()) if padded else 0
    end = max(int(sizes.end[rows].max()), first + 1)
    width = min(rounded_up(end - first, multiple), columns)
    first = max(0, min(first, columns - width))
    source = slice(first, first + width)
    target = slice(0, max(rounded_up(int(sizes.target[rows].max(initial=0)), multiple), 1))
    index = torch.from_numpy(np.ascontiguousarray(rows))
    selects_all = len(rows) == count and bool((rows == np.arange(count)).all())

    def select(name: str, value: Any) -> Any:
        if isinstance(value, list) and len(value) == count:
            return [value[row] for row in rows]
        if not isinstance(value, Tensor) or not value.dim():
            return value
        if name == "position_ids" and value.shape == (1, columns):  # shared by all rows
            return value[:, source]
        if len(value) != count:
            return value
        per_token, of_decoder = _layout_of(name, value, inputs, is_encoder_decoder)
        if value.dim() > 1 and per_token:
            value = value[:, target if of_decoder else source]
        return value if selects_all else value.index_select(0, index.to(value.device))

    return {name: select(name, value) for name, value in inputs.items()}


def _layout_of(
    name: str, value: Tensor, inputs: Mapping[str, Any], is_encoder_decoder: bool
) -> tuple[bool, bool]:
    """Whether a tensor has one entry per token, and whether these are the decoder's tokens."""
    if name in _LABELS:
        return are_token_labels(value, inputs, is_encoder_decoder), is_encoder_decoder
    of_decoder = name.startswith("decoder_")
    if name in _PER_TOKEN or value.dim() != 2:
        return name in _PER_TOKEN, of_decoder
    # A tensor for the user's own loss, for example a weight per token.
    labels = inputs.get("labels")
    if is_encoder_decoder and isinstance(labels, Tensor) and value.shape == labels.shape:
        return True, True
    return value.shape[1] == main_input(inputs).shape[1], False
