"""Group sequences that share one batched call on the CPU, and locate their tokens.

Each call has a fixed cost. Padding sequences of similar lengths to one width saves calls, and pays
off as long as the wasted scores cost less than the calls saved.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The fixed cost of a sequence's calls, forward and backward, in scores over all heads. Measured on
# one and two cores of an x86 server. Values from 2**10 to 2**13 perform alike; with 2**15, training
# steps of small models are 2 to 5 % slower, and those of tiny models 8 to 16 %.
_SCORES_PER_CALL = 2**12
# The most scores of a group, over all heads. Larger batches exceed the CPU's caches.
_SCORES_PER_GROUP = 2**21


class Group(NamedTuple):
    """Sequences that are computed together, padded to the longest.

    A group of one sequence is a span of the stream, ``span_q`` and ``span_k``, and has no padding.
    A larger group has no spans. Its ``rows``, of shape ``(members, width_q)``, hold the row of the
    stream for each slot; padding repeats the sequence's last row. ``real_rows`` is True where a
    slot is not padding, or None if no slot is. ``keys`` and ``real_keys`` are the same for keys.
    """

    width_q: int
    width_k: int
    span_q: Any = None  # (first row, last row + 1)
    span_k: Any = None
    rows: Any = None
    keys: Any = None
    real_rows: Tensor | None = None
    real_keys: Tensor | None = None

    def take_rows(self, stream: Tensor) -> Tensor:
        """``(total_q, ...)`` to ``(members, width_q, ...)``."""
        return _take(stream, self.span_q, self.rows)

    def take_keys(self, stream: Tensor) -> Tensor:
        """``(total_k, ...)`` to ``(members, width_k, ...)``."""
        return _take(stream, self.span_k, self.keys)

    def put_rows(self, stream: Tensor, values: Tensor) -> None:
        """Write ``(members, width_q, ...)`` into the stream, without the padding."""
        _put(stream, values, self.span_q, self.rows, self.real_rows)

    def put_keys(self, stream: Tensor, values: Tensor) -> None:
        """Write ``(members, width_k, ...)`` into the stream, without the padding."""
        _put(stream, values, self.span_k, self.keys, self.real_keys)


class Plan(NamedTuple):
    """All groups. Groups of one sequence come first, in the order of the stream.

    ``slots``, ``(total_q,)`` int64, is the index of each row of the stream among the slots of all
    groups, concatenated. It is None if that is the order of the stream. A row without keys belongs
    to no group and has slot 0. ``key_slots`` is the same for keys. ``lonely_keys`` are the keys
    without queries, or None if there are none. ``masks`` is for the masks that layers share.
    """

    groups: tuple[Group, ...]
    slots: Tensor | None
    key_slots: Tensor | None
    lonely_keys: Tensor | None
    masks: dict[tuple[int, torch.dtype], Tensor]


@lru_cache(maxsize=32)  # all layers of a model need the same plan
@torch.inference_mode(False)  # autograd cannot save inference tensors, which would be cached too
def plan_groups(
    starts_q: tuple[int, ...],
    starts_k: tuple[int, ...],
    heads: int,
    one_offset: bool,
    device: torch.device,
) -> Plan:
    """Group all sequences that have both queries and keys.

    Args:
        starts_q: ``cu_seqlens_q`` on the host.
        starts_k: ``cu_seqlens_k`` on the host.
        heads: number of query heads.
        one_offset: group only sequences of equal ``keys - queries``, because distances count from
            the end.
        device: device of the index tensors.
    """
    lengths = [
        (starts_q[s + 1] - starts_q[s], starts_k[s + 1] - starts_k[s])
        for s in range(len(starts_q) - 1)
    ]
    remaining = [s for s, (rows, keys) in enumerate(lengths) if rows and keys]
    remaining.sort(key=lambda s: (one_offset and lengths[s][1] - lengths[s][0], *lengths[s]))
    groups: list[list[int]] = []
    for s in reversed(remaining):
        if groups and _fits(s, groups[-1], lengths, heads, one_offset):
            groups[-1].append(s)
        else:
            groups.append([s])
    groups.sort(key=lambda members: (len(members) > 1, members[0] if len(members) == 1 else 0))
    built = tuple(_group(members, lengths, starts_q, starts_k, device) for members in groups)
    q = [(group.width_q, group.span_q, group.rows, group.real_rows) for group in built]
    k = [(group.width_k, group.span_k, group.keys, group.real_keys) for group in built]
    lonely = [
        torch.arange(starts_k[s], starts_k[s + 1], device=device)
        for s, (rows, keys) in enumerate(lengths)
        if keys and not rows
    ]
    return Plan(
        built,
        _slots(q, starts_q[-1], device),
        _slots(k, starts_k[-1], device),
        torch.cat(lonely) if lonely else None,
        {},
    )


def _slots(
    sides: list[tuple[int, Any, Any, Tensor | None]], total: int, device: torch.device
) -> Tensor | None:
    spans = [span for _, span, _, _ in sides if span is not None]
    if len(spans) == len(sides) and sum(last - first for first, last in spans) == total:
        return None
    slots = torch.zeros(total, dtype=torch.long, device=device)
    begin = 0
    for width, span, indices, real in sides:
        members = 1 if indices is None else len(indices)
        end = begin + members * width
        group_slots = torch.arange(begin, end, device=device)
        _put(slots, group_slots.view(members, width), span, indices, real)
        begin = end
    return slots


def _fits(
    s: int, members: list[int], lengths: list[tuple[int, int]], heads: int, one_offset: bool
) -> bool:
    """Whether adding sequence s to a group costs less than a call of its own."""
    rows, keys = lengths[s]
    first_rows, first_keys = lengths[members[0]]
    if one_offset and first_keys - first_rows != keys - rows:
        return False
    width_q = max(rows, first_rows)
    width_k = max(keys, *(lengths[m][1] for m in members))
    real_area = sum(lengths[m][0] * lengths[m][1] for m in members)
    area = (len(members) + 1) * width_q * width_k
    wasted = area - real_area - rows * keys
    return heads * wasted <= _SCORES_PER_CALL * len(members) and heads * area <= _SCORES_PER_GROUP


def _group(
    members: list[int],
    lengths: list[tuple[int, int]],
    starts_q: tuple[int, ...],
    starts_k: tuple[int, ...],
    device: torch.device,
) -> Group:
    if len(members) == 1:
        (s,) = members
        return Group(*lengths[s], starts_q[s : s + 2], starts_k[s : s + 2])

    def index(starts: tuple[int, ...], side: int) -> tuple[Tensor, Tensor | None, int]:
        sizes = [lengths[s][side] for s in members]
        width = max(sizes)
        first = torch.tensor([starts[s] for s in members], device=device)[:, None]
        size = torch.tensor(sizes, device=device)[:, None]
        column = torch.arange(width, device=device)
        real = None if min(sizes) == width else column < size
        return first + torch.minimum(column, size - 1), real, width

    rows, real_rows, width_q = index(starts_q, 0)
    keys, real_keys, width_k = index(starts_k, 1)
    return Group(width_q, width_k, None, None, rows, keys, real_rows, real_keys)


def _take(stream: Tensor, span: Any, indices: Any) -> Tensor:
    if span is not None:
        return stream[span[0] : span[1]][None]
    return stream.index_select(0, indices.flatten()).unflatten(0, indices.shape)


def _put(stream: Tensor, values: Tensor, span: Any, indices: Any, real: Tensor | None) -> None:
    if span is not None:
        stream[span[0] : span[1]] = values[0]
    elif real is None:
        stream.index_copy_(0, indices.flatten(), values.flatten(0, 1).to(stream.dtype))
    else:
        stream.index_copy_(0, indices[real], values[real].to(stream.dtype))
