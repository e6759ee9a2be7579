"""Where the rows of a stream go when groups of sequences are computed as batched matrices.

A *slot* holds one row of head_dim numbers. The slots of all groups are concatenated in the order
group, member, head, row. So one gather lays out a side of a batch, a group is a contiguous part of
it, and one gather puts a result back. The indices depend on lengths and numbers of heads only, so
all layers of a model share them.

Queries are in reverse order within each member, as `explicit` needs them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .grouping import Group, plan_groups
from .relative_bias import line_distances

Lines = dict[tuple, Tensor]
"""The results of `SlotPlan.line` for one table. Layers that share a table may share them."""


class Side(NamedTuple):
    """The slots of the queries or of the keys.

    Attributes:
        gather: ``(slots,)`` int64, the row of each slot in ``stream.reshape(-1, head_dim)``.
        scatter: ``(total * heads,)`` int64, the slot of each row and query head. The number of
            slots, one past the end, stands for a row of no group.
        real: ``(slots, 1)`` bool, False in padding. None if no slot is padding.
        is_complete: every row has a slot.
    """

    gather: Tensor
    scatter: Tensor
    real: Tensor | None
    is_complete: bool

    def take(self, stream: Tensor) -> Tensor:
        """``(total, stream_heads, width)`` to ``(slots, width)``."""
        return stream.reshape(-1, stream.shape[-1]).index_select(0, self.gather)

    def new_buffer(self, like: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """An empty ``(slots, width)``, and a row of zeros after it if some rows have no slot."""
        slots = self.gather.numel()
        if self.is_complete:
            return like.new_empty(slots, width, dtype=dtype)
        buffer = like.new_empty(slots + 1, width, dtype=dtype)
        buffer[slots:] = 0.0
        return buffer

    def put(self, buffer: Tensor, heads: int, stream_heads: int, dtype: torch.dtype) -> Tensor:
        """A buffer as ``(total, stream_heads, width)``. Heads that share a row are summed."""
        rows = buffer.index_select(0, self.scatter).view(-1, heads, buffer.shape[1])
        if stream_heads != heads:
            rows = rows.unflatten(1, (stream_heads, -1)).sum(2)
        return rows.to(dtype)


class Part(NamedTuple):
    """One group: how many members, queries and keys it has, and its spans of slots.

    ``hidden``, ``(members * heads, 1, width_k)`` bool, is True at padded keys; None if there are
    none.
    """

    members: int
    width_q: int
    width_k: int
    span_q: tuple[int, int]
    span_k: tuple[int, int]
    hidden: Tensor | None


class SlotPlan:
    """The slots of a batch, and the terms that its layers add to their scores.

    Attributes:
        heads, kv_heads: numbers of heads of queries, and of keys and values.
        parts: the groups.
        q: the slots of the queries.
        k: the slots of the keys and values, repeated for the query heads that share them.
    """

    def __init__(
        self,
        groups: tuple[Group, ...],
        totals: tuple[int, int],
        heads: int,
        kv_heads: int,
        device: torch.device,
    ) -> None:
        self.heads, self.kv_heads = heads, kv_heads
        rows = [_indices(g.span_q, g.rows, device).flip(1) for g in groups]
        real = [None if g.real_rows is None else g.real_rows.flip(1) for g in groups]
        self.q = _side(rows, real, totals[0], (heads, heads), device)
        keys = [_indices(g.span_k, g.keys, device) for g in groups]
        self.k = _side(keys, [g.real_keys for g in groups], totals[1], (heads, kv_heads), device)
        self.parts: list[Part] = []
        end_q = end_k = 0
        for group, members in zip(groups, map(len, rows), strict=True):
            first_q, end_q = end_q, end_q + members * heads * group.width_q
            first_k, end_k = end_k, end_k + members * heads * group.width_k
            hidden = None
            if group.real_keys is not None:
                hidden = ~group.real_keys.repeat_interleave(heads, 0)[:, None]
            widths = group.width_q, group.width_k
            self.parts.append(Part(members, *widths, (first_q, end_q), (first_k, end_k), hidden))
        self._constants: dict[tuple, Tensor] = {}

    def hidden(self, part: Part, dtype: torch.dtype) -> Tensor | None:
        """``part.hidden`` as numbers to add to scores: -inf at padded keys."""
        if part.hidden is None:
            return None
        key = ("hidden", part.span_k, dtype)
        if key not in self._constants:
            zeros = torch.zeros(part.hidden.shape, dtype=dtype, device=part.hidden.device)
            self._constants[key] = zeros.masked_fill_(part.hidden, float("-inf"))
        return self._constants[key]

    def line(
        self,
        part: Part,
        table: Tensor | None,
        limits: tuple[int, int],
        dtype: torch.dtype,
        lines: Lines,
    ) -> Tensor | None:
        """``(heads or 1, width_q, width_k)``, the bias, causal mask and window of a part.

        None if there are none. ``lines`` has what was computed before from the same table.
        """
        mask = self._mask_line(part, limits, dtype)
        if table is None:
            return None if mask is None else mask.unfold(1, part.width_k, 1)
        key = (part.width_q, part.width_k, limits, dtype)
        if key not in lines:
            line = table.to(dtype).index_select(1, self.distances(part, table))
            if mask is not None:
                line = line + mask
            lines[key] = line.unfold(1, part.width_k, 1)
        return lines[key]

    def distances(self, part: Part, table: Tensor) -> Tensor:
        """``(width_q + width_k - 1,)`` int64, the index into the table of each line entry."""
        key = ("distances", part.width_q, part.width_k, table.shape[1])
        found = self._constants.get(key)
        if found is None:
            found = line_distances(part.width_q, part.width_k, table.device, table)
            self._constants[key] = found
        return found

    def _mask_line(self, part: Part, limits: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
        """``(1, width_q + width_k - 1)``, -inf where the causal mask or the window hides a key."""
        left, right = limits
        if left < 0 and right < 0:
            return None
        key = ("mask", part.width_q, part.width_k, limits, dtype)
        if key not in self._constants:
            distance = line_distances(part.width_q, part.width_k, self.q.gather.device)
            line = torch.zeros(1, distance.numel(), dtype=dtype, device=distance.device)
            if right >= 0:
                line.masked_fill_(distance > right, float("-inf"))
            if left >= 0:
                line.masked_fill_(distance < -left, float("-inf"))
            self._constants[key] = line
        return self._constants[key]


@lru_cache(maxsize=32)  # all layers of a model need the same plan
@torch.inference_mode(False)  # autograd cannot save inference tensors, which would be cached too
def plan_slots(
    starts_q: tuple[int, ...],
    starts_k: tuple[int, ...],
    heads: int,
    kv_heads: int,
    device: torch.device,
) -> SlotPlan:
    """The slots of sequences of equal ``keys - queries``, grouped by `plan_groups`.

    Args:
        starts_q: ``cu_seqlens_q`` on the host.
        starts_k: ``cu_seqlens_k`` on the host.
        heads: number of query heads.
        kv_heads: number of heads of keys and values.
        device: device of the index tensors.
    """
    groups = plan_groups(starts_q, starts_k, heads, True, device).groups
    return SlotPlan(groups, (starts_q[-1], starts_k[-1]), heads, kv_heads, device)


def _indices(span: tuple[int, int] | None, rows: Tensor | None, device: torch.device) -> Tensor:
    """``(members, width)``, the row of the stream for each slot of one head."""
    if rows is not None:
        return rows
    assert span is not None
    return torch.arange(*span, device=device)[None]


def _side(
    rows: list[Tensor],
    real: list[Tensor | None],
    total: int,
    all_heads: tuple[int, int],
    device: torch.device,
) -> Side:
    heads, stream_heads = all_heads
    head = torch.arange(heads, device=device)[:, None]
    gathers, slots_of, reals = [], [], []
    for indices, is_real in zip(rows, real, strict=True):
        per_head = indices[:, None, :]  # [members, 1, width]
        gathers.append((per_head * stream_heads + head // (heads // stream_heads)).flatten())
        slots_of.append((per_head * heads + head).flatten())
        shape = (indices.shape[0], heads, indices.shape[1])
        filled = torch.ones_like(indices, dtype=torch.bool) if is_real is None else is_real
        reals.append(filled[:, None, :].expand(shape).flatten())
    empty = torch.empty(0, dtype=torch.long, device=device)
    gather, slot_of = torch.cat([empty, *gathers]), torch.cat([empty, *slots_of])
    is_real = torch.cat([empty.bool(), *reals])
    scatter = torch.full((total * heads,), gather.numel(), device=device)
    scatter[slot_of[is_real]] = is_real.nonzero().squeeze(1)
    all_real = all(mask is None for mask in real)
    complete = bool((scatter < gather.numel()).all())
    return Side(gather, scatter, None if all_real else is_real[:, None], complete)
