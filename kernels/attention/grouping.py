"""Which sequences share one batched call on the CPU, and where their tokens are.

A call costs a fixed time whatever its size, so sequences of similar lengths are worth padding to
one width, as long as the scores computed for nothing cost less than the call that is saved.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Measured on one and two cores of an x86 server, in whole steps and by itself: a sequence's calls,
# forward and backward, take as long as about this many scores of all heads. From 2**10 to 2**13 all
# is alike; at 2**15 small models' steps are 2 to 5 % slower, tiny ones' 8 to 16 %.
# And beyond so many scores a batch outgrows the caches.
_SCORES_PER_CALL = 2**12
_SCORES_PER_GROUP = 2**21


class Group(NamedTuple):
    """Sequences that are computed together, padded to the widest.

    A group of one is a span of the stream and has no padding; ``span_q`` and ``span_k`` are its
    ends. Otherwise they are None, ``rows`` is ``(members, width_q)``, the row of the stream for
    each slot (padding names the sequence's last), and ``real_rows`` tells which are real, or is
    None if all are; ``keys`` and ``real_keys`` likewise.
    """

    width_q: int
    width_k: int
    span_q: Any = None  # (first, behind the last)
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
        """Write the real ones of ``(members, width_q, ...)`` into the stream."""
        _put(stream, values, self.span_q, self.rows, self.real_rows)

    def put_keys(self, stream: Tensor, values: Tensor) -> None:
        """Write the real ones of ``(members, width_k, ...)`` into the stream."""
        _put(stream, values, self.span_k, self.keys, self.real_keys)


class Plan(NamedTuple):
    """All groups, those of one sequence first and as they lie in the stream.

    ``slots`` ``(total_q,)`` int64 is where each row of the stream is among the slots of all groups,
    laid end to end; None where that is the stream's own order. (A row without keys, of no group,
    has the slot 0.)
    """

    groups: tuple[Group, ...]
    slots: Tensor | None


@lru_cache(maxsize=32)  # the layers of a model ask for the same plan, one after the other
@torch.inference_mode(False)  # an evaluation may ask first, and training must be able to save it
def plan_groups(
    starts_q: tuple[int, ...],
    starts_k: tuple[int, ...],
    heads: int,
    one_offset: bool,
    device: torch.device,
) -> Plan:
    """Group all sequences that have both queries and keys.

    Args:
        starts_q: ``cu_seqlens_q`` on the host; ``starts_k`` likewise.
        heads: how many heads each score is computed for.
        one_offset: members must agree in keys minus queries, because distances count from the end.
        device: where the index tensors go.
    """
    lengths = [
        (starts_q[s + 1] - starts_q[s], starts_k[s + 1] - starts_k[s])
        for s in range(len(starts_q) - 1)
    ]
    waiting = [s for s, (rows, keys) in enumerate(lengths) if rows and keys]
    waiting.sort(key=lambda s: (one_offset and lengths[s][1] - lengths[s][0], *lengths[s]))
    groups: list[list[int]] = []
    for s in reversed(waiting):
        if groups and _joins(s, groups[-1], lengths, heads, one_offset):
            groups[-1].append(s)
        else:
            groups.append([s])
    groups.sort(key=lambda members: (len(members) > 1, members[0] if len(members) == 1 else 0))
    made = tuple(_group(members, lengths, starts_q, starts_k, device) for members in groups)
    return Plan(made, _slots(made, starts_q[-1], device))


def _slots(groups: tuple[Group, ...], total: int, device: torch.device) -> Tensor | None:
    alone = [group.span_q for group in groups if group.span_q is not None]
    if len(alone) == len(groups) and sum(last - first for first, last in alone) == total:
        return None
    slots = torch.zeros(total, dtype=torch.long, device=device)
    begin = 0
    for group in groups:
        members = 1 if group.rows is None else len(group.rows)
        end = begin + members * group.width_q
        of_group = torch.arange(begin, end, device=device)
        group.put_rows(slots, of_group.view(members, group.width_q))
        begin = end
    return slots


def _joins(
    s: int, members: list[int], lengths: list[tuple[int, int]], heads: int, one_offset: bool
) -> bool:
    rows, keys = lengths[s]
    first_rows, first_keys = lengths[members[0]]
    if one_offset and first_keys - first_rows != keys - rows:
        return False
    width_q = max(rows, first_rows)
    width_k = max(keys, *(lengths[m][1] for m in members))
    before = sum(lengths[m][0] * lengths[m][1] for m in members)
    area = (len(members) + 1) * width_q * width_k
    wasted = area - before - rows * keys
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

    def side(starts: tuple[int, ...], of: int) -> tuple[Tensor, Tensor | None, int]:
        sizes = [lengths[s][of] for s in members]
        width = max(sizes)
        first = torch.tensor([starts[s] for s in members], device=device)[:, None]
        size = torch.tensor(sizes, device=device)[:, None]
        column = torch.arange(width, device=device)
        real = None if min(sizes) == width else column < size
        return first + torch.minimum(column, size - 1), real, width

    rows, real_rows, width_q = side(starts_q, 0)
    keys, real_keys, width_k = side(starts_k, 1)
    return Group(width_q, width_k, None, None, rows, keys, real_rows, real_keys)


def _take(stream: Tensor, span: Any, where: Any) -> Tensor:
    if span is not None:
        return stream[span[0] : span[1]][None]
    return stream.index_select(0, where.flatten()).unflatten(0, where.shape)


def _put(stream: Tensor, values: Tensor, span: Any, where: Any, real: Tensor | None) -> None:
    if span is not None:
        stream[span[0] : span[1]] = values[0]
    elif real is None:
        stream.index_copy_(0, where.flatten(), values.flatten(0, 1).to(stream.dtype))
    else:
        stream.index_copy_(0, where[real], values[real].to(stream.dtype))
