"""A batch sampler that limits the tokens of a batch and splits each batch over ranks.

    batch b = examples items[offsets[b]:offsets[b + 1]],  at most max_tokens tokens in total

A batch is global: ``max_tokens`` limits the tokens of all ranks together. Therefore the batches and
the learning rate schedule do not depend on the number of ranks. Every rank plans the whole epoch
from the same lengths and the same seed, and takes its share of every batch. Therefore all ranks
have the same number of batches, and no rank waits for another one at the end of an epoch.

`tokenpack.trainer.batches` plans the batches, `tokenpack.trainer.sharing` splits them over ranks.
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
from ..segments import Plan, offsets_of, ranges
from .batches import count_batches, cut_groups, find_plan, group_similar
from .sharing import share_evenly, share_groups

_JITTERS = (0.05, 0.02, 0.005, 0.0)  # jitter of the lengths in grouping; tried in this order
_SPARE = 0.015  # extra batches, as a share of those needed, so that a plan with jitter fits


class _Epoch(NamedTuple):
    """The plan of one epoch.

    Attributes:
        epoch: the epoch number.
        items: ``(n,)`` int64, the example indices of the first batch, of the second batch, ...
        offsets: ``(num_batches + 1,)`` int64, where each batch begins in ``items``.
        group_of: ``(n,)`` int64, the group of each example, by example index; None without groups.
        slots: the tokens of all batches, including the padding within groups.
    """

    epoch: int
    items: NDArray[np.int64]
    offsets: NDArray[np.int64]
    group_of: NDArray[np.int64] | None
    slots: int


class TokenBudgetBatchSampler(Sampler[list[int]]):
    """Plan batches of at most ``max_tokens`` tokens over all ranks; yield this rank's shares.

    Pass it to a `DataLoader` as ``batch_sampler``. A share is a list of example indices. If a batch
    has fewer examples than there are ranks, each rank without an example gets a *filler*,
    ``[-1 - index]`` of the batch's shortest example, so that it can run a step with the others. A
    filler must have zero weight in the loss. ``-1 - filler`` is the example index.

    The sampler has no ``batch_size`` attribute. If it had an integer one, accelerate would shard
    the batches.

    Attributes:
        lengths: ``(n, 1)`` or ``(n, 2)`` int32, the tokens of each example: (source, target).
        max_tokens: the largest number of tokens in a batch, over all ranks.
        num_ranks: the number of ranks that share a batch.
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
        """Check the arguments. The plan is made when it is first needed.

        Args:
            lengths: ``(n,)`` integers, the tokens of each example, or ``(n, 2)``, source and target
                tokens, which are added.
            max_tokens: the largest number of tokens in a batch, over all ranks.
            num_ranks: the number of ranks that share a batch.
            rank: this rank, from 0.
            seed: seed of the shuffle, together with the epoch.
            shuffle: plan different batches in each epoch. If False, examples stay in order, and
                each batch takes the next examples that fit (next fit).
            hidden_size: the model's hidden size, which sets the cost of attention relative to the
                linear layers.
            padded: count the slots (rows x columns) of padded batches instead of tokens. Examples
                of similar lengths form groups of ``rows * (longest source + longest target)``
                slots, and groups form batches. A rank gets whole groups. If the groups are too few
                for even shares, they are split.
            max_tokens_per_group: the largest number of slots in a group. By default
                ``max_tokens // num_ranks``. Requires ``padded=True``.

        Raises:
            TypeError: if a number or a length is not an integer.
            ValueError: if a number is out of range, if there are no lengths, or if a length is
                negative, 0, or over ``max_tokens`` (or ``max_tokens_per_group``).
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
        """The number of batches in an epoch: the same on every rank and in every epoch."""
        if self._num_batches is None:
            self._num_batches = self._count()
        return self._num_batches

    def __iter__(self) -> Iterator[list[int]]:
        """Iterate over this rank's share of each batch of the current epoch."""
        items, offsets = self.plan()
        for first, last in zip(offsets[:-1], offsets[1:]):
            yield self.share(items[first:last])

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass, an integer of 0 or more."""
        self.epoch = _check_epoch(epoch)

    def plan(self, epoch: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the batches of all ranks.

        Batch b has the examples ``items[offsets[b]:offsets[b + 1]]``. Both arrays are int64.

        Args:
            epoch: the epoch to plan; by default the current one.

        Returns:
            ``items (n,)`` and ``offsets (num_batches + 1,)``.
        """
        planned = self._plan_of(self.epoch if epoch is None else _check_epoch(epoch))
        return planned.items, planned.offsets

    def share(self, batch_items: Any, rank: int | None = None) -> list[int]:
        """Return a rank's share of a batch: example indices in the batch's order, or one filler.

        Args:
            batch_items: ``(batch,)`` example indices: a batch of the epoch planned last.
            rank: the rank; by default this one.
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
        """The mean share of ``max_tokens`` that batches use, in slots if ``padded``."""
        return self._plan_of(self.epoch).slots / (len(self) * self.max_tokens)

    def describe(self, batches: int = 5) -> str:
        """Return a table of the first batches of the current epoch, with the tokens per rank.

        Args:
            batches: the number of batches to show.
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
        """Omit the plan. The copy makes it again when it is needed."""
        return {**self.__dict__, "_planned": None}

    # ------------------------------------------------------------------------------------ planning

    def _check_group(self, padded: bool, max_tokens_per_group: int | None) -> int | None:
        """Return the largest number of slots in a group; None without padding."""
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
            assert plan is not None, "count_batches returned a number without a plan"
        else:
            plan = next_fit(tokens, self.max_tokens)
        return _Epoch(epoch, *plan, None, int(tokens.sum()))

    def _plan_groups(self, epoch: int, max_slots: int) -> _Epoch:
        if not self.shuffle:
            items = np.arange(len(self.lengths))
            bounds = cut_groups(self.lengths, max_slots)
            slots = self._slots(items, bounds)
            groups, offsets = next_fit(slots, self.max_tokens)
            return _epoch_of_groups(epoch, (items, bounds), (groups, offsets), slots)
        seed = (self.seed, epoch)
        for jitter in _JITTERS:
            items, bounds = group_similar(self.lengths, max_slots, seed=seed, jitter=jitter)
            slots = self._slots(items, bounds)
            plan = find_plan(slots, self.max_tokens, len(self), seed)
            if plan is not None:
                return _epoch_of_groups(epoch, (items, bounds), plan, slots)
        raise AssertionError("count_batches returned a number without a plan")

    def _slots(self, items: NDArray[np.int64], bounds: NDArray[np.int64]) -> NDArray[np.int64]:
        """``(num_groups,)`` int64, rows * (longest source + longest target) of each group."""
        longest = np.maximum.reduceat(self.lengths[items], bounds[:-1]).astype(np.int64)
        return np.diff(bounds) * longest.sum(1)

    # ------------------------------------------------------------------------------------- sharing

    def ranks_of(self, items: NDArray[np.int64]) -> NDArray[np.int64]:
        """``(batch,)`` int64, the rank of each example of a batch.

        Args:
            items: ``(batch,)`` int64 example indices: a batch of the epoch planned last.
        """
        if self.num_ranks == 1:
            return np.zeros(len(items), np.int64)
        if self.max_tokens_per_group is None:
            return share_evenly(self._tokens(items), self._costs(items), self.num_ranks)
        bounds = self._group_bounds(items, self._planned or self._plan_of(self.epoch))
        return share_groups(self.lengths[items].astype(np.int64), bounds, self.num_ranks)

    def _group_bounds(self, items: NDArray[np.int64], planned: _Epoch) -> NDArray[np.int64]:
        """``(num_groups + 1,)`` int64, where each group of a batch begins in ``items``."""
        assert planned.group_of is not None
        edges = np.flatnonzero(np.diff(planned.group_of[items])) + 1
        return np.concatenate(([0], edges, [len(items)]))

    def _costs(self, items: NDArray[np.int64]) -> NDArray[np.float64]:
        source, *target = self.lengths[items].T
        return sequence_costs(source, target[0] if target else 0, self.hidden_size)

    def _describe_batch(self, number: int, items: NDArray[np.int64]) -> list[str]:
        tokens = self._tokens(items)
        used = tokens
        if self.max_tokens_per_group is not None:
            used = self._slots(items, self._group_bounds(items, self._plan_of(self.epoch)))
        cells: list[Any] = [number, len(items), tokens.sum(), f"{used.sum() / self.max_tokens:.1%}"]
        cells += [tokens.min(), f"{np.median(tokens):g}", tokens.max()]
        if self.num_ranks > 1:
            ranks = np.bincount(self.ranks_of(items), tokens, self.num_ranks)
            cells.append(" ".join(f"{each:.0f}" for each in ranks))
        return list(map(str, cells))


def _epoch_of_groups(epoch: int, groups: Plan, batches: Plan, slots: NDArray[np.int64]) -> _Epoch:
    """Turn a plan of groups into a plan of examples, those of a group next to each other.

    Args:
        epoch: the epoch number.
        groups: the examples of each group.
        batches: the groups of each batch.
        slots: ``(num_groups,)`` int64, the slots of each group.
    """
    (items, bounds), (order, offsets) = groups, batches
    rows = np.diff(bounds)
    group_of = np.empty(len(items), np.int64)
    group_of[items] = np.repeat(np.arange(len(rows)), rows)
    by_batch = items[ranges(bounds[order], rows[order])]
    return _Epoch(epoch, by_batch, offsets_of(rows[order])[offsets], group_of, int(slots.sum()))


def _check_lengths(lengths: Any, limit: int, name: str) -> NDArray[np.int32]:
    """Return the lengths as an ``(n, 1)`` or ``(n, 2)`` int32 array."""
    sides = np.asarray(lengths) if np.ndim(lengths) == 2 else as_lengths(lengths)[:, None]
    if sides.shape[1] not in (1, 2) or not len(sides):
        raise ValueError(
            f"lengths must have shape (n,) or (n, 2) and at least one row, got shape {sides.shape}"
        )
    if sides.dtype.kind not in "iu":
        raise TypeError(f"lengths must be integers, got {sides.dtype}")
    _reject((sides < 0).any(axis=1), sides, "lengths must not be negative")
    over = (sides > limit).any(1)
    if not over.any():
        total = sides.sum(1, dtype=np.int64)
        _reject(total == 0, sides, "lengths must be 1 or more, source and target together")
        over = total > limit
    _reject(over, sides, f"lengths must be at most {name} = {limit}, source and target together")
    return np.ascontiguousarray(sides, np.int32)


def _reject(wrong: Any, sides: NDArray[Any], message: str) -> None:
    """Raise ``message`` with the first wrong row, if there is one."""
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
