"""Packing a stream: bins come out as soon as they are final, and memory is bounded.

A window of sequences is held back. When it is full it is planned; the bins that are final come out,
and what is in the others stays for the next plan:

- next fit and harmonic: all but the bins still open, so that the stream's bins are those of one
  plan of everything (next fit needs no window, and has none);
- the other strategies: the fuller half of the bins, so that what fits badly waits for company.

Plans are made so seldom that time is linear in the number of sequences.
"""

from __future__ import annotations

from math import inf
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checks import at_least_one
from .arrival import HARMONIC_CLASSES
from .lengths import Lengths, Pieces, as_lengths, check_overlong, fit
from .packer import Packer


class StreamBin(NamedTuple):
    """A final bin.

    Attributes:
        items: ``(count,)`` int64, numbers of its sequences, in order of arrival from 0.
        lengths: ``(count,)`` int64, tokens of each.
        starts: ``(count,)`` int64, the token of its sequence that each begins with: 0 but for the
            later pieces of what was split.
    """

    items: NDArray[np.int64]
    lengths: NDArray[np.int64]
    starts: NDArray[np.int64]


class StreamPacker:
    """Packs lengths that come one by one, or in chunks.

    Args:
        capacity: tokens that a bin holds.
        strategy: as for `pack_lengths`, but for ``ffs``: a stream has no whole to shuffle.
        lookahead: sequences held back; more of them give fuller bins. It may come to somewhat more
            where bins hold very many short ones. Next fit holds those of the open bin alone.
        max_sequences, overlong, drop_empty: as for `pack_lengths`.

    Attributes:
        num_sequences: sequences added so far.
        dropped: how many of them were left out; likewise
        truncated: cut to the capacity, and
        split: cut in pieces.

    Raises:
        TypeError, ValueError: as `pack_lengths`.
    """

    def __init__(
        self,
        capacity: int,
        strategy: str = "auto",
        lookahead: int = 8192,
        *,
        max_sequences: int | None = None,
        overlong: str = "error",
        drop_empty: bool = False,
    ) -> None:
        self.lookahead = at_least_one("lookahead", lookahead)
        check_overlong(overlong)
        self._packer = Packer(capacity, strategy, max_sequences=max_sequences)
        if self._packer.strategy == "ffs":
            raise ValueError("strategy must not shuffle in a stream, got 'ffs'")
        self._overlong, self._drop_empty = overlong, drop_empty
        self._limit = inf if max_sequences is None else max_sequences
        self.num_sequences = self.dropped = self.truncated = self.split = 0
        self._held = np.empty((3, 0), np.int64)  # rows of a `StreamBin`
        self._added: list[int] = []  # lengths that come after those
        self._tokens = 0  # in both
        self._plan_at = self.lookahead

    @property
    def capacity(self) -> int:
        """Tokens that a bin holds."""
        return self._packer.capacity

    @property
    def num_held(self) -> int:
        """Sequences, or pieces of them, that are in no final bin yet."""
        return self._held.shape[1] + len(self._added)

    def add(self, length: int) -> list[StreamBin]:
        """Add one sequence; the bins that became final by it, mostly none."""
        if type(length) is not int or not 1 <= length <= self.capacity:
            return self.extend([length])  # which says what is wrong with it, or deals with it
        self._added.append(length)
        self._tokens += length
        return self.extend(()) if self._is_due() else []

    def extend(self, lengths: Lengths) -> list[StreamBin]:
        """Add sequences in their order; the bins that became final by them.

        Nothing is added if any of them is refused.
        """
        checked = as_lengths(lengths) if len(lengths) else np.empty(0, np.int64)
        pieces = self._fit(checked) if len(checked) else None
        added, self._added = np.array(self._added, np.int64), []
        self._tokens -= int(added.sum())
        bins = self._hold(self._fit(added), len(added))
        if pieces is not None:
            bins += self._hold(pieces, len(checked))
        return bins

    def finish(self) -> list[StreamBin]:
        """All bins that are left; the stream may go on after it, with new ones."""
        bins = self.extend(())
        if self._held.shape[1]:
            plan = self._packer.pack(self._held[1])
            bins += [self._bin(members) for members in plan.bins]
            self._held, self._tokens = self._held[:, :0], 0
        return bins

    def state_dict(self) -> dict[str, Any]:
        """All that the packer holds, as plain numbers; `load_state_dict` goes on from there."""
        return {
            "held": self._held.tolist(),
            "added": list(self._added),
            "plan_at": self._plan_at,
            "options": self._options,
            **{name: getattr(self, name) for name in _COUNTS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the packer that gave ``state`` was.

        Raises:
            ValueError: if that had other options.
        """
        if state.get("options") != self._options:
            raise ValueError(
                f"state must be of a packer with {self._options}, got {state.get('options')}"
            )
        held = np.array(state["held"], np.int64).reshape(3, -1)
        added, plan_at = list(state["added"]), int(state["plan_at"])
        counts = {name: int(state[name]) for name in _COUNTS}
        self._held, self._added, self._plan_at = held, added, plan_at
        self._tokens = int(held[1].sum()) + sum(added)
        for name, count in counts.items():
            setattr(self, name, count)

    @property
    def _options(self) -> dict[str, Any]:
        options = {"lookahead": self.lookahead, "overlong": self._overlong}
        return {**self._packer.options, **options, "drop_empty": self._drop_empty}

    def _fit(self, lengths: NDArray[np.integer]) -> Pieces:
        return fit(lengths, self.capacity, self._overlong, self._drop_empty, "lengths")

    def _hold(self, pieces: Pieces, count: int) -> list[StreamBin]:
        """Take in ``count`` sequences, planning each time the window is full."""
        rows = np.zeros((3, len(pieces.lengths)), np.int64)
        rows[0] = np.arange(count) if pieces.sequences is None else pieces.sequences
        rows[0] += self.num_sequences
        rows[1] = pieces.lengths
        if pieces.starts is not None:
            rows[2] = pieces.starts
        self.num_sequences += count
        self.dropped += len(pieces.dropped)
        self.truncated += len(pieces.truncated)
        self.split += len(pieces.split)
        bins: list[StreamBin] = []
        while rows.shape[1]:
            room = rows.shape[1] if self._is_next_fit else self._plan_at - self._held.shape[1]
            self._held = np.concatenate((self._held, rows[:, :room]), axis=1)
            self._tokens += int(rows[1, :room].sum())
            rows = rows[:, room:]
            if self._is_due():
                bins += self._emit()
        return bins

    @property
    def _is_next_fit(self) -> bool:
        return self._packer.strategy == "nf"

    def _is_due(self) -> bool:
        """Whether a plan would give bins out, or is at least due by number."""
        if self._is_next_fit:
            return self._tokens > self.capacity or self.num_held > self._limit
        return self.num_held >= self._plan_at

    def _emit(self) -> list[StreamBin]:
        """Plan what is held, give out the final bins, and keep the others' in order of arrival."""
        plan = self._packer.pack(self._held[1])
        final = self._final(plan.bin_tokens, plan.offsets, plan.items)
        bins = [self._bin(plan[b]) for b in np.flatnonzero(final).tolist()]
        stays = np.ones(self._held.shape[1], np.bool_)
        stays[plan.items[np.repeat(final, np.diff(plan.offsets))]] = False
        self._held = self._held[:, stays]
        self._tokens = int(self._held[1].sum())
        # So many new ones before the next plan that time stays linear.
        held = self._held.shape[1]
        waits = held + self.lookahead // 4 + 1 if bins else 2 * held
        self._plan_at = max(self.lookahead, waits)
        return bins

    def _final(
        self, tokens: NDArray[np.int64], offsets: NDArray[np.int64], items: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        final = np.zeros(len(tokens), np.bool_)
        if self._is_next_fit:
            final[:-1] = True
        elif self._packer.strategy == "hk":
            # The last bin of each class is open.
            first = self._held[1][items[offsets[:-1]]]
            classes = np.minimum(self.capacity // first, HARMONIC_CLASSES)
            last_of_class = len(classes) - 1 - np.unique(classes[::-1], return_index=True)[1]
            final[:] = True
            final[last_of_class] = False
        else:
            order = (-tokens).argsort(kind="stable")
            final[order[: len(order) // 2]] = True
        return final

    def _bin(self, members: NDArray[np.int64]) -> StreamBin:
        return StreamBin(*self._held[:, members])


_COUNTS = ("num_sequences", "dropped", "truncated", "split")
