"""The batches of an epoch, planned by tokens, and each rank's share of every batch.

    batch b = examples items[offsets[b]:offsets[b + 1]], at most max_tokens tokens in total

A batch is global: ``max_tokens`` is the limit over all ranks. So neither the batches nor the
learning rate schedule depends on the number of ranks, and all ranks have the same number of
batches. Each rank plans the whole epoch itself, from the same lengths and seed, and takes its share
of every batch. `tokenpack.trainer.batches` makes the batches, and `tokenpack.trainer.shares` makes
the shares.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from ..checks import at_least_one, check_seed
from ..packing.lengths import as_lengths
from ..packing.online import next_fit
from ..packing.ranks import sequence_costs
from ..segments import offsets_of, ranges
from .batches import count_batches, cut_groups, find_plan, group_similar
from .shares import share_evenly, share_groups

_JITTERS = (0.05, 0.02, 0.005, 0.0)  # of lengths before grouping; the first that fits is used
_SPARE = 0.015  # part of the batches to add, so that a jitter fits


class _Epoch(NamedTuple):
    """The plan of one epoch.

    Attributes:
        epoch: the epoch.
        items: ``(n,)`` int64, the examples, batch after batch.
        offsets: ``(num_batches + 1,)`` int64.
        group_of: ``(n,)`` int64, the group of each example, by example. None without groups.
        slots: the tokens of all batches, including the padding in groups.
    """

    epoch: int
    items: NDArray[np.int64]
    offsets: NDArray[np.int64]
    group_of: NDArray[np.int64] | None
    slots: int


class TokenBudgetBatchSampler(Sampler[list[int]]):
    """Plans batches of at most ``max_tokens`` tokens over all ranks, and yields this rank's share.

    Use it as the ``batch_sampler`` of a `DataLoader`. A share is a list of indices. If a batch has
    fewer examples than there are ranks, the ranks without an example get a *filler*, which keeps
    them in step with the others: ``[-1 - index]`` of the batch's shortest example. Give a filler no
    weight. ``-1 - filler`` is the index.

    The class has no attribute ``batch_size``, because accelerate splits the batches of samplers
    that have one.

    Attributes:
        lengths: ``(n, 1)`` or ``(n, 2)`` int32, tokens of each example: (source, target).
        max_tokens: maximum number of tokens of a batch, over all ranks.
        num_ranks: the number of ranks.
        rank: this rank.
        epoch: the epoch of the next pass.
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
        """Check the arguments. The first use makes the plan.

        Args:
            lengths: integers, ``(n,)`` tokens of each example, or ``(n, 2)`` source and target
                tokens, whose sum counts.
            max_tokens: maximum number of tokens of a batch, over all ranks.
            num_ranks: the number of ranks.
            rank: this rank, from 0.
            seed: seed of the shuffle, in addition to the epoch.
            shuffle: make other batches in each epoch. If False, examples stay in order, and each
                batch takes the next examples that fit (next fit).
            hidden_size: the model's hidden size, which sets the cost of attention in the share of a
                rank.
            padded: count the slots of a padded model instead of tokens. Examples form groups of
                similar lengths with ``rows * (longest source + longest target)`` slots, and groups
                form batches. A rank gets whole groups, one after the other, or parts of groups if
                there are too few to share evenly.
            max_tokens_per_group: maximum number of slots of a group. Only with ``padded``. By
                default ``max_tokens // num_ranks``.

        Raises:
            TypeError: if a number or a length is not an integer.
            ValueError: if a number is out of range, there are no lengths, or a length is negative,
                0, or larger than ``max_tokens`` (or ``max_tokens_per_group``).
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
        """The number of batches, which is the same on every rank and in every epoch."""
        if self._num_batches is None:
            self._num_batches = self._count()
        return self._num_batches

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's share of each batch of the current epoch."""
        items, offsets = self.plan()
        for first, last in zip(offsets[:-1], offsets[1:]):
            yield self.share(items[first:last])

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass, an integer of 0 or more."""
        self.epoch = _check_epoch(epoch)

    def plan(self, epoch: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The batches over all ranks: ``items (n,)`` and ``offsets (num_batches + 1,)``, int64.

        Args:
            epoch: the epoch. By default the current one.
        """
        planned = self._plan_of(self.epoch if epoch is None else _check_epoch(epoch))
        return planned.items, planned.offsets

    def share(self, batch_items: Any, rank: int | None = None) -> list[int]:
        """A rank's share of a batch: indices in the order of the batch, or one filler.

        Args:
            batch_items: ``(batch,)`` indices, a batch of the epoch that was planned last.
            rank: the rank. By default this one.
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
        """The mean part of ``max_tokens`` that batches use, in slots with ``padded``."""
        return self._plan_of(self.epoch).slots / (len(self) * self.max_tokens)

    def describe(self, batches: int = 5) -> str:
        """A table of the first batches of the current epoch, with the tokens of each rank.

        Args:
            batches: the number of batches.
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
        """The state without the plan, which is made again when it is needed."""
        return {**self.__dict__, "_planned": None}

    # ------------------------------------------------------------------------------------ planning

    def _check_group(self, padded: bool, max_tokens_per_group: int | None) -> int | None:
        if not padded:
            if max_tokens_per_group is not None:
                raise ValueError(
                    f"max_tokens_per_group must be None unless padded=True, got "
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
        """``(len(items),)`` int64, source plus target tokens."""
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
            assert plan is not None, "count_batches returns a number for which there is a plan"
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
        raise AssertionError("without jitter, there is a plan with count_batches batches")

    def _slots(self, items: NDArray[np.int64], bounds: NDArray[np.int64]) -> NDArray[np.int64]:
        """``(num_groups,)`` int64, rows * (longest source + longest target) of each group."""
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
        """Turn a plan of groups into a plan of examples. The examples of a group stay together."""
        rows = np.diff(bounds)
        group_of = np.empty(len(items), np.int64)
        group_of[items] = np.repeat(np.arange(len(rows)), rows)
        by_batch = items[ranges(bounds[groups], rows[groups])]
        return _Epoch(
            epoch, by_batch, offsets_of(rows[groups])[offsets], group_of, int(slots.sum())
        )

    # ------------------------------------------------------------------------------------- sharing

    def ranks_of(self, items: NDArray[np.int64]) -> NDArray[np.int64]:
        """``(batch,)`` int64, the rank of each example of a batch.

        Args:
            items: ``(batch,)`` int64 indices, a batch of the epoch that was planned last.
        """
        if self.num_ranks == 1:
            return np.zeros(len(items), np.int64)
        if self.max_tokens_per_group is None:
            return share_evenly(self._tokens(items), self._costs(items), self.num_ranks)
        planned = self._planned or self._plan_of(self.epoch)
        assert planned.group_of is not None
        groups = planned.group_of[items]
        bounds = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(items)]
        return share_groups(self.lengths[items].astype(np.int64), bounds, self.num_ranks)

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


def _check_lengths(lengths: Any, limit: int, name: str) -> NDArray[np.int32]:
    """``(n, 1)`` or ``(n, 2)`` int32."""
    sides = np.asarray(lengths) if np.ndim(lengths) == 2 else as_lengths(lengths)[:, None]
    if sides.shape[1] not in (1, 2) or not len(sides):
        raise ValueError(
            "lengths must be (n,) or (n, 2), source and target of at least one example, got shape "
            f"{sides.shape}"
        )
    if sides.dtype.kind not in "iu":
        raise TypeError(f"lengths must be integers, got {sides.dtype}")
    _require_none((sides < 0).any(axis=1), sides, "lengths must not be negative")
    over = (sides > limit).any(1)
    if not over.any():
        total = sides.sum(1, dtype=np.int64)
        _require_none(total == 0, sides, "lengths must be 1 or more, source plus target")
        over = total > limit
    _require_none(over, sides, f"lengths must be at most {name} = {limit}, source plus target")
    return np.ascontiguousarray(sides, np.int32)


def _require_none(wrong: Any, sides: NDArray[Any], message: str) -> None:
    """Raise an error if an element of ``wrong`` is True. It names the first such length."""
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
