"""The batches of an epoch, by tokens, and which part of each is a rank's.

    batch b = examples items[offsets[b]:offsets[b + 1]],  their tokens together at most max_tokens

A batch is global: its tokens are those of all ranks together. So neither the batches nor the
learning rate's schedule change with the number of ranks, and no rank runs dry before the others:
each plans the whole epoch by itself, from the same lengths and seed, and takes its share of every
batch. How batches are made is in `tokenpack.trainer.batches`.

    share: longest first, each example to the rank with the fewest tokens, and of those that have
           about as few, to the one whose cost is least;  then swaps between the fullest rank and
           the emptiest while they narrow the gap

with ``cost = tokens + (source ** 2 + target ** 2 + source * target) / (6 * hidden_size)``, as in
`tokenpack.packing.ranks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heapreplace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from ..checks import at_least_one, check_seed
from ..packing.lengths import as_lengths
from ..packing.online import next_fit
from ..packing.ranks import sequence_costs
from ..segments import longest_first, offsets_of, ranges
from .batches import count_batches, cut_groups, find_plan, group_similar

_GRAIN = 1 / 400  # of a rank's tokens: a lead that small is none, and cost decides
_EVEN = 1 / 200  # of a rank's tokens: a gap that small is left alone
_JITTERS = (0.05, 0.02, 0.005, 0.0)  # of lengths before they are grouped, the first that fits
_SPARE = 0.015  # batches more than needed, so that a jitter does fit
_UNEVEN = 1.1  # slots of the fullest rank over the mean, above which groups are split
_PIECES = 8  # per rank at most


class _Epoch(NamedTuple):
    """The plan of one epoch.

    Attributes:
        epoch: which.
        items: ``(n,)`` int64, examples batch by batch.
        offsets: ``(num_batches + 1,)`` int64.
        group_of: ``(n,)`` int64, the group of each example by its index; None without groups.
        slots: tokens of all batches, padding of groups included.
    """

    epoch: int
    items: NDArray[np.int64]
    offsets: NDArray[np.int64]
    group_of: NDArray[np.int64] | None
    slots: int


class TokenBudgetBatchSampler(Sampler[list[int]]):
    """Batches of at most ``max_tokens`` tokens, over all ranks; yields this rank's share of each.

    For a `DataLoader`'s ``batch_sampler``. A share is a list of indices. Where a batch has fewer
    examples than there are ranks, those without one are given a *filler*, to have something to run
    in step with the others: ``[-1 - index]`` of the batch's shortest example. It must be given no
    weight; ``-1 - filler`` is its index again.

    It has no ``batch_size``: where there is an integer of that name, accelerate shards batches.

    Attributes:
        lengths: ``(n, 1)`` or ``(n, 2)`` int32, tokens of each example: (source, target).
        max_tokens: what a batch holds at most, over all ranks.
        num_ranks, rank: how many ranks share a batch, and which this is.
        epoch: what the next pass is planned for.
    """

    def __init__(
        self,
        lengths: Any,
        max_tokens: int,
        *,
        num_ranks: int = 1,
        rank: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        hidden_size: int = 1024,
        padded: bool = False,
        max_tokens_per_group: int | None = None,
    ) -> None:
        """Nothing is planned yet; that is done when it is first asked for.

        Args:
            lengths: ``(n,)`` tokens of each example, or ``(n, 2)``, source and target, of which the
                sum counts; integers.
            max_tokens: what a batch holds at most, over all ranks.
            num_ranks: how many ranks share a batch.
            rank: which of them this is, from 0.
            seed: of the shuffle, together with the epoch.
            shuffle: other batches in each epoch; else examples stay in order, each batch taking
                what fits (next fit).
            hidden_size: the model's: how much attention weighs in what a rank has to do.
            padded: count the slots of a padded model instead of tokens. Examples are put into
                groups of similar lengths, of ``rows * (longest source + longest target)`` slots,
                and groups into batches. A rank gets whole groups, one after the other, or a part of
                one where they are too few to share evenly.
            max_tokens_per_group: slots that a group has at most; by default a rank's part of
                ``max_tokens``. Given if and only if ``padded`` is.

        Raises:
            TypeError: if a number or a length is no integer.
            ValueError: if a number is out of range, there are no lengths, or one is negative, 0, or
                over ``max_tokens`` (or ``max_tokens_per_group``), saying which.
        """
        self.max_tokens = at_least_one("max_tokens", max_tokens)
        self.num_ranks = at_least_one("num_ranks", num_ranks)
        self.rank = _check_rank(rank, self.num_ranks)
        self.seed, self.shuffle = check_seed(seed), bool(shuffle)
        self.hidden_size = at_least_one("hidden_size", hidden_size)
        self.max_tokens_per_group = self._check_group(padded, max_tokens_per_group)
        limit, name = self.max_tokens, "max_tokens"
        if self.max_tokens_per_group is not None:
            limit, name = self.max_tokens_per_group, "max_tokens_per_group"
        self.lengths = _check_lengths(lengths, limit, name)
        self.epoch = 0
        self._num_batches: int | None = None
        self._planned: _Epoch | None = None

    def __len__(self) -> int:
        """Batches of an epoch: the same number on every rank and in every epoch."""
        if self._num_batches is None:
            self._num_batches = self._count()
        return self._num_batches

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's share of each batch of the epoch that is set."""
        items, offsets = self.plan()
        for first, last in zip(offsets[:-1], offsets[1:]):
            yield self.share(items[first:last])

    def set_epoch(self, epoch: int) -> None:
        """Plan the next pass for ``epoch``, an integer of 0 or more."""
        self.epoch = _check_epoch(epoch)

    def plan(self, epoch: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``items (n,)`` and ``offsets (num_batches + 1,)``, int64: the batches, of all ranks.

        Args:
            epoch: which; by default the one that is set.
        """
        planned = self._plan_of(self.epoch if epoch is None else _check_epoch(epoch))
        return planned.items, planned.offsets

    def share(self, batch_items: Any, rank: int | None = None) -> list[int]:
        """A rank's part of a batch: indices, in the batch's order, or one filler.

        Args:
            batch_items: ``(batch,)`` indices: a batch of the epoch planned last.
            rank: whose; by default this rank's.
        """
        items = np.asarray(batch_items, np.int64)
        rank = self.rank if rank is None else _check_rank(rank, self.num_ranks)
        mine = items[self.ranks_of(items) == rank]
        if len(mine):
            return mine.tolist()
        shortest = items[self._tokens(items).argmin()]
        return [-1 - int(shortest)]

    @property
    def fill(self) -> float:
        """Mean share of ``max_tokens`` that batches use; with ``padded``, by slots."""
        return self._plan_of(self.epoch).slots / (len(self) * self.max_tokens)

    def describe(self, batches: int = 5) -> str:
        """A table of the first batches of the epoch that is set: what is in them, and on each rank.

        Args:
            batches: how many of them.
        """
        items, offsets = self.plan()
        unit = "slots" if self.max_tokens_per_group is not None else "tokens"
        head = (
            f"epoch {self.epoch}: {len(items)} examples in {len(self)} batches of at most "
            f"{self.max_tokens} {unit}, {self.fill:.1%} used"
        )
        titles = ["batch", "examples", "tokens", "used", "shortest", "median", "longest"]
        if self.num_ranks > 1:
            titles.append("tokens per rank")
        shown = range(min(batches, len(self)))
        rows = [self._describe_batch(b, items[offsets[b] : offsets[b + 1]]) for b in shown]
        widths = [max(map(len, column)) for column in zip(titles, *rows)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths))
            for row in (titles, *rows)
        ]
        return "\n".join([head, *lines])

    def __getstate__(self) -> dict[str, Any]:
        """Without the plan, which is made again where it is needed."""
        return {**self.__dict__, "_planned": None}

    # ------------------------------------------------------------------------------------ planning

    def _check_group(self, padded: bool, max_tokens_per_group: int | None) -> int | None:
        if not padded:
            if max_tokens_per_group is not None:
                raise ValueError(
                    f"max_tokens_per_group is of groups, which only padded=True makes, got "
                    f"{max_tokens_per_group}"
                )
            return None
        if max_tokens_per_group is None:
            return max(self.max_tokens // self.num_ranks, 1)
        limit = at_least_one("max_tokens_per_group", max_tokens_per_group)
        if limit > self.max_tokens:
            raise ValueError(
                f"max_tokens_per_group must be at most max_tokens = {self.max_tokens}, got {limit}"
            )
        return limit

    def _tokens(self, items: NDArray[np.int64] | slice = slice(None)) -> NDArray[np.int64]:
        """``(len(items),)`` int64, of both sides."""
        return self.lengths[items].sum(1, dtype=np.int64)

    def _count(self) -> int:
        if not self.shuffle:
            return len(self._plan_of(self.epoch).offsets) - 1
        if self.max_tokens_per_group is None:
            return count_batches(self._tokens(), self.max_tokens)
        items, bounds = group_similar(self.lengths, self.max_tokens_per_group)
        return count_batches(self._slots(items, bounds), self.max_tokens, spare=_SPARE)

    def _plan_of(self, epoch: int) -> _Epoch:
        if self._planned is not None and self._planned.epoch == epoch:
            return self._planned
        if self.max_tokens_per_group is None:
            self._planned = self._plan_tokens(epoch)
        else:
            self._planned = self._plan_groups(epoch, self.max_tokens_per_group)
        return self._planned

    def _plan_tokens(self, epoch: int) -> _Epoch:
        tokens = self._tokens()
        if self.shuffle:
            plan = find_plan(tokens, self.max_tokens, len(self), (self.seed, epoch))
            assert plan is not None, "there is one for what count_batches says"
        else:
            plan = next_fit(tokens, self.max_tokens)
        return _Epoch(epoch, *plan, None, int(tokens.sum()))

    def _plan_groups(self, epoch: int, max_slots: int) -> _Epoch:
        if not self.shuffle:
            items = np.arange(len(self.lengths))
            bounds = cut_groups(self.lengths, max_slots)
            slots = self._slots(items, bounds)
            groups, offsets = next_fit(slots, self.max_tokens)
            return self._of_groups(epoch, items, bounds, groups, offsets, slots)
        seed = (self.seed, epoch)
        for jitter in _JITTERS:
            items, bounds = group_similar(self.lengths, max_slots, seed=seed, jitter=jitter)
            slots = self._slots(items, bounds)
            plan = find_plan(slots, self.max_tokens, len(self), seed)
            if plan is not None:
                return self._of_groups(epoch, items, bounds, *plan, slots)
        raise AssertionError("without jitter there is a plan for what count_batches says")

    def _slots(self, items: NDArray[np.int64], bounds: NDArray[np.int64]) -> NDArray[np.int64]:
        """``(num_groups,)`` int64, rows * (longest source + longest target)."""
        longest = np.maximum.reduceat(self.lengths[items], bounds[:-1]).astype(np.int64)
        return np.diff(bounds) * longest.sum(1)

    def _of_groups(
        self,
        epoch: int,
        items: NDArray[np.int64],
        bounds: NDArray[np.int64],
        groups: NDArray[np.int64],
        offsets: NDArray[np.int64],
        slots: NDArray[np.int64],
    ) -> _Epoch:
        """A plan of groups as one of examples, those of a group side by side."""
        rows = np.diff(bounds)
        group_of = np.empty(len(items), np.int64)
        group_of[items] = np.repeat(np.arange(len(rows)), rows)
        by_batch = items[ranges(bounds[groups], rows[groups])]
        return _Epoch(
            epoch, by_batch, offsets_of(rows[groups])[offsets], group_of, int(slots.sum())
        )

    # ------------------------------------------------------------------------------------- sharing

    def ranks_of(self, items: NDArray[np.int64]) -> NDArray[np.int64]:
        """``(batch,)`` int64, the rank that takes each example of a batch.

        Args:
            items: ``(batch,)`` int64 indices: a batch of the epoch planned last.
        """
        if self.num_ranks == 1:
            return np.zeros(len(items), np.int64)
        if self.max_tokens_per_group is None:
            return share_evenly(self._tokens(items), self._costs(items), self.num_ranks)
        planned = self._planned or self._plan_of(self.epoch)
        assert planned.group_of is not None
        groups = planned.group_of[items]
        bounds = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(items)]
        return _share_groups(self.lengths[items].astype(np.int64), bounds, self.num_ranks)

    def _costs(self, items: NDArray[np.int64]) -> NDArray[np.float64]:
        source, *target = self.lengths[items].T
        return sequence_costs(source, target[0] if target else 0, self.hidden_size)

    def _describe_batch(self, number: int, items: NDArray[np.int64]) -> list[str]:
        tokens = self._tokens(items)
        used = tokens
        if self.max_tokens_per_group is not None:
            planned = self._plan_of(self.epoch)
            assert planned.group_of is not None
            groups = planned.group_of[items]
            bounds = np.array([0, *(np.flatnonzero(np.diff(groups)) + 1), len(items)])
            used = self._slots(items, bounds)
        cells: list[Any] = [number, len(items), tokens.sum(), f"{used.sum() / self.max_tokens:.1%}"]
        cells += [tokens.min(), f"{np.median(tokens):g}", tokens.max()]
        if self.num_ranks > 1:
            ranks = np.bincount(self.ranks_of(items), tokens, self.num_ranks)
            cells.append(" ".join(f"{each:.0f}" for each in ranks))
        return list(map(str, cells))


def share_evenly(
    tokens: NDArray[np.int64], costs: NDArray[np.float64], num_ranks: int
) -> NDArray[np.int64]:
    """Deal the examples of a batch to ranks, so that all have about as many tokens.

    Longest processing time first (Graham 1969), then swaps between the fullest and the emptiest.

    Args:
        tokens: ``(n,)`` int64, of each example.
        costs: ``(n,)`` float64, what each takes to compute: decides between ranks whose tokens are
            within a quarter percent.
        num_ranks: how many ranks there are; with ``n`` examples or less, one example each at most.

    Returns:
        ``(n,)`` int64, a rank each.
    """
    grain = max(int(tokens.sum()) * _GRAIN / num_ranks, 1.0)
    loads = [0] * num_ranks
    heap: list[tuple[int, float, int]] = [(0, 0.0, rank) for rank in range(num_ranks)]
    heapify(heap)
    rank_of = np.empty(len(tokens), np.int64)
    order = longest_first(tokens)
    for item, length, cost in zip(order.tolist(), tokens[order].tolist(), costs[order].tolist()):
        _, spent, rank = heap[0]
        rank_of[item] = rank
        loads[rank] += length
        heapreplace(heap, (int(loads[rank] / grain), spent + cost, rank))
    _even_out(rank_of, tokens, np.array(loads, np.int64))
    return rank_of


def _even_out(
    rank_of: NDArray[np.int64], tokens: NDArray[np.int64], loads: NDArray[np.int64]
) -> None:
    """Move or swap examples between the fullest rank and the emptiest, in place, while it helps."""
    for _ in range(2 * len(loads)):
        full, empty = int(loads.argmax()), int(loads.argmin())
        gap = int(loads[full] - loads[empty])
        if gap <= _EVEN * loads.mean():
            return
        given = np.flatnonzero(rank_of == full)
        taken = np.flatnonzero(rank_of == empty)
        taken = taken[tokens[taken].argsort()]
        back = np.concatenate(([0], tokens[taken]))  # nothing, or what comes in return
        wanted = np.searchsorted(back, tokens[given] - gap / 2)
        choices = np.stack([np.maximum(wanted - 1, 0), np.minimum(wanted, len(back) - 1)])
        moved = tokens[given] - back[choices]  # [2, given]
        best = np.unravel_index(abs(moved - gap / 2).argmin(), moved.shape)
        more = int(moved[best])
        if not 0 < more < gap:
            return
        rank_of[given[best[1]]] = empty
        if choices[best]:
            rank_of[taken[choices[best] - 1]] = full
        loads[full] -= more
        loads[empty] += more


def _share_groups(sides: NDArray[np.int64], bounds: list[int], num_ranks: int) -> NDArray[np.int64]:
    """``(n,)`` int64, a rank for each example: whole groups, of which the largest are halved.

    Args:
        sides: ``(n, 1)`` or ``(n, 2)``, source and target of each example, group by group.
        bounds: ``(num_groups + 1,)``, where groups begin and end.
        num_ranks: how many ranks there are.
    """
    while True:
        edges = np.array(bounds, np.int64)
        rows = np.diff(edges)
        slots = rows * np.maximum.reduceat(sides, edges[:-1]).sum(1)
        rank_of = share_evenly(slots, slots.astype(np.float64), num_ranks)
        loads = np.bincount(rank_of, slots, num_ranks)
        divisible = np.flatnonzero(rows > 1)
        even = loads.max() <= _UNEVEN * loads.mean()
        if even or not len(divisible) or len(rows) >= _PIECES * num_ranks:
            return np.repeat(rank_of, rows)
        largest = divisible[(-slots[divisible]).argsort(kind="stable")]
        halved = largest[: max(num_ranks // 2, num_ranks - len(rows), 1)]
        bounds = sorted([*bounds, *(edges[halved] + rows[halved] // 2).tolist()])


def _check_lengths(lengths: Any, limit: int, name: str) -> NDArray[np.int32]:
    """``(n, 1)`` or ``(n, 2)`` int32."""
    sides = np.asarray(lengths) if np.ndim(lengths) == 2 else as_lengths(lengths)[:, None]
    if sides.shape[1] not in (1, 2) or not len(sides):
        raise ValueError(
            f"lengths must be (n,) or (n, 2), source and target of at least one example, "
            f"got shape {sides.shape}"
        )
    if sides.dtype.kind not in "iu":
        raise TypeError(f"lengths must be integers, got {sides.dtype}")
    _refuse((sides < 0).any(axis=1), sides, "lengths must not be negative")
    over = (sides > limit).any(1)
    if not over.any():
        total = sides.sum(1, dtype=np.int64)
        _refuse(total == 0, sides, "lengths must be 1 or more, both sides together")
        over = total > limit
    _refuse(over, sides, f"lengths must be at most {name} = {limit}, both sides together")
    return np.ascontiguousarray(sides, np.int32)


def _refuse(wrong: Any, sides: NDArray[Any], message: str) -> None:
    if wrong.any():
        at, count = int(wrong.argmax()), int(wrong.sum())
        more = f" and {count - 1} more" if count > 1 else ""
        got = " + ".join(map(str, sides[at].tolist()))
        raise ValueError(f"{message}, got lengths[{at}] = {got}{more}")


def _check_rank(rank: Any, num_ranks: int) -> int:
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)):
        raise TypeError(f"rank must be an integer, got {rank!r}")
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank must be from 0 to num_ranks - 1 = {num_ranks - 1}, got {rank}")
    return int(rank)


def _check_epoch(epoch: Any) -> int:
    if isinstance(epoch, bool) or not isinstance(epoch, (int, np.integer)):
        raise TypeError(f"epoch must be an integer, got {epoch!r}")
    if epoch < 0:
        raise ValueError(f"epoch must be 0 or more, got {epoch}")
    return int(epoch)
