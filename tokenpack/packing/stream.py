"""Pack a stream of lengths: emit bins as soon as they are final, in bounded memory.

The packer buffers a window of sequences. When the window is full, it plans them and emits the bins
that are final. The sequences of the other bins stay in the buffer. Which bins are final depends on
the strategy:

- next fit and harmonic: all bins that are closed. So the bins of the stream are those of one plan
  of all sequences. Next fit needs no window and has none.
- other strategies: the fuller half of the bins. Sequences that fit badly wait for better matches.

The time between plans grows with the buffer, so that the total time is linear in the number of
sequences.
"""

from __future__ import annotations

from math import inf
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checks import at_least_one
from .lengths import Lengths, Pieces, as_lengths, check_overlong, fit
from .online import HARMONIC_CLASSES
from .packer import Packer


class StreamBin(NamedTuple):
    """A final bin.

    Attributes:
        items: ``(count,)`` int64, the sequences of the bin, numbered from 0 in input order.
        lengths: ``(count,)`` int64, tokens of each.
        starts: ``(count,)`` int64, the token of its sequence at which each begins. It is 0 except
            for the later pieces of a split sequence.
    """

    items: NDArray[np.int64]
    lengths: NDArray[np.int64]
    starts: NDArray[np.int64]


class StreamPacker:
    """Packs lengths that arrive one at a time or in chunks.

    Args:
        capacity: tokens that fit in a bin.
        strategy: as for `pack_lengths`, except ``ffs``, which would have to shuffle the whole
            stream.
        lookahead: number of sequences to buffer; larger values give fuller bins. The buffer may
            grow somewhat larger if bins hold very many short sequences. Next fit buffers only the
            sequences of the open bin. Harmonic makes the same bins with any lookahead, so a small
            one only emits them sooner, at more time per sequence.
        max_sequences, overlong, drop_empty: as for `pack_lengths`.

    Attributes:
        dropped: number of sequences dropped so far.
        truncated: number of sequences truncated to the capacity so far.
        split: number of sequences split into pieces so far.

    Raises:
        TypeError, ValueError: as for `pack_lengths`.
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
        self.dropped = self.truncated = self.split = 0
        self._num_planned = 0  # sequences added, without those in `_added`
        self._held = np.empty((3, 0), np.int64)  # the buffer; its rows are the fields of StreamBin
        self._added: list[int] = []  # lengths from `add` that are not in the buffer yet
        self._tokens = 0  # in both
        self._plan_at = self.lookahead  # plan when this many sequences are held

    @property
    def capacity(self) -> int:
        """Tokens that fit in a bin."""
        return self._packer.capacity

    @property
    def num_sequences(self) -> int:
        """Number of sequences added so far."""
        return self._num_planned + len(self._added)

    @property
    def num_held(self) -> int:
        """Number of sequences, or pieces of sequences, that are not in a final bin yet."""
        return self._held.shape[1] + len(self._added)

    def add(self, length: int) -> list[StreamBin]:
        """Add one sequence; return the bins that are final now, usually none."""
        if type(length) is not int or not 1 <= length <= self.capacity:
            return self.extend([length])  # handles overlong and empty sequences, or raises
        self._added.append(length)
        self._tokens += length
        return self.extend(()) if self._is_due() else []

    def extend(self, lengths: Lengths) -> list[StreamBin]:
        """Add sequences in order; return the bins that are final now.

        The lengths may be in any form, as for `pack_lengths`, and may be empty. If one of them is
        invalid, none is added.
        """
        is_empty = hasattr(lengths, "__len__") and len(lengths) == 0
        checked = np.empty(0, np.int64) if is_empty else as_lengths(lengths)
        pieces = self._fit(checked) if len(checked) else None
        added, self._added = np.array(self._added, np.int64), []
        self._tokens -= int(added.sum())
        bins = self._hold(self._fit(added), len(added))
        if pieces is not None:
            bins += self._hold(pieces, len(checked))
        return bins

    def finish(self) -> list[StreamBin]:
        """Return the bins of all sequences left. More sequences may be added afterwards."""
        bins = self.extend(())
        if self._held.shape[1]:
            plan = self._packer.pack(self._held[1])
            bins += [self._bin(members) for members in plan.bins]
            self._held, self._tokens = self._held[:, :0], 0
        return bins

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers; see `load_state_dict`."""
        return {
            "held": self._held.tolist(),
            "added": list(self._added),
            "plan_at": self._plan_at,
            "options": self._options,
            "num_sequences": self.num_sequences,
            **{name: getattr(self, name) for name in _COUNTS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from the state of another packer.

        Raises:
            ValueError: if that packer had other options.
        """
        if state.get("options") != self._options:
            raise ValueError(
                f"state must come from a packer with {self._options}, got {state.get('options')}"
            )
        held = np.array(state["held"], np.int64).reshape(3, -1)
        added, plan_at = list(state["added"]), int(state["plan_at"])
        counts = {name: int(state[name]) for name in _COUNTS}
        self._held, self._added, self._plan_at = held, added, plan_at
        self._tokens = int(held[1].sum()) + sum(added)
        self._num_planned = int(state["num_sequences"]) - len(added)
        for name, count in counts.items():
            setattr(self, name, count)

    @property
    def _options(self) -> dict[str, Any]:
        options = {"lookahead": self.lookahead, "overlong": self._overlong}
        return {**self._packer.options, **options, "drop_empty": self._drop_empty}

    def _fit(self, lengths: NDArray[np.integer]) -> Pieces:
        return fit(lengths, self.capacity, self._overlong, self._drop_empty, "lengths")

    def _hold(self, pieces: Pieces, count: int) -> list[StreamBin]:
        """Add the pieces of ``count`` sequences to the buffer; plan each time it is full."""
        rows = np.zeros((3, len(pieces.lengths)), np.int64)
        rows[0] = np.arange(count) if pieces.sequences is None else pieces.sequences
        rows[0] += self._num_planned
        rows[1] = pieces.lengths
        if pieces.starts is not None:
            rows[2] = pieces.starts
        self._num_planned += count
        self.dropped += len(pieces.dropped)
        self.truncated += len(pieces.truncated)
        self.split += len(pieces.split)
        bins: list[StreamBin] = []
        while rows.shape[1]:
            space = rows.shape[1] if self._is_next_fit else self._plan_at - self._held.shape[1]
            self._held = np.concatenate((self._held, rows[:, :space]), axis=1)
            self._tokens += int(rows[1, :space].sum())
            rows = rows[:, space:]
            if self._is_due():
                bins += self._emit()
        return bins

    @property
    def _is_next_fit(self) -> bool:
        return self._packer.strategy == "nf"

    def _is_due(self) -> bool:
        """Whether it is time to plan. Next fit plans only if that closes a bin."""
        if self._is_next_fit:
            return self._tokens > self.capacity or self.num_held > self._limit
        return self.num_held >= self._plan_at

    def _emit(self) -> list[StreamBin]:
        """Plan the buffer, remove and return the final bins. The rest keeps its order."""
        plan = self._packer.pack(self._held[1])
        final = self._final(plan.bin_tokens, plan.offsets, plan.items)
        bins = [self._bin(plan[b]) for b in np.flatnonzero(final).tolist()]
        stays = np.ones(self._held.shape[1], np.bool_)
        stays[plan.items[np.repeat(final, np.diff(plan.offsets))]] = False
        self._held = self._held[:, stays]
        self._tokens = int(self._held[1].sum())
        # Wait for enough new sequences to keep the total time linear.
        held = self._held.shape[1]
        plan_at = held + self.lookahead // 4 + 1 if bins else 2 * held
        self._plan_at = max(self.lookahead, plan_at)
        return bins

    def _final(
        self, tokens: NDArray[np.int64], offsets: NDArray[np.int64], items: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """``(num_bins,)`` bool, True for the bins of a plan that are final."""
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


_COUNTS = ("dropped", "truncated", "split")
