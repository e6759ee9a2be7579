"""Dealing the rows of a stream to ranks in turn, so that every rank gets the same number.

    row n of a pass  ->  rank n % ranks        n // ranks is the row's group

A rank gets the row of a group once the group is complete. The rows of the last group, if it is not,
are dropped, or the ranks without a row repeat one. With one rank, every row is a complete group.

The position to resume from is the number of the next row, and the window that its group begins in.
"""

from __future__ import annotations

from collections import deque
from typing import Any

Row = dict[str, Any]


class RowDeal:
    """One rank's share of the rows of a pass, window by window.

    Attributes:
        dropped: own rows that were dropped, 0 or 1.
        repeated: rows that this rank repeats, 0 or 1.
    """

    def __init__(self, rank: int, ranks: int, repeat: bool, position: dict[str, Any]) -> None:
        self._rank, self._ranks, self._repeat = rank, ranks, repeat
        self._dealt: int = position["dealt"]  # rows of the windows before
        self._next: int = max(position["next"], rank)
        self._windows: deque[tuple[Any, int]] = deque()  # where each begins; rows before it
        self._held: dict[int, Row] = {}  # rows of the last group, while it is incomplete
        self.dropped = self.repeated = 0

    def open(self, window: Any) -> None:
        """Begin a window, which is at this position of the source."""
        self._windows.append((window, self._dealt))

    def due(self, count: int) -> tuple[list[Row], range, list[int]]:
        """Deal the rows of the open window.

        Args:
            count: the number of rows in the window.

        Returns:
            A row held back from earlier windows, if it is due now. Then numbers of rows of the
            window: those that are due, and those to `hold`.
        """
        first, end = self._dealt, self._dealt + count
        complete = end - end % self._ranks
        waiting = [row for n, row in self._held.items() if n == self._next and n < complete]
        if complete > first:
            self._held = {}
        least = max(self._next + len(waiting) * self._ranks, first)
        begin = least + (self._rank - least) % self._ranks
        own = range(begin - first, max(complete - first, 0), self._ranks)
        rest = range(max(complete, first), end)
        kept = [n - first for n in rest if self._repeat or n % self._ranks == self._rank]
        return waiting, own, kept

    def hold(self, number: int, row: Row) -> None:
        """Keep a row of the open window, whose group is not complete."""
        self._held[self._dealt + number] = row

    def close(self, count: int) -> None:
        """End the open window, after its rows that are due were taken."""
        self._dealt += count

    def last(self) -> list[Row]:
        """Return the row of the last, incomplete group that this rank gets at the end, if any."""
        missing = -self._dealt % self._ranks
        group = self._dealt + missing - self._ranks
        if not missing or self._next > group + self._rank:
            return []
        is_own = group + self._rank < self._dealt
        if not self._repeat:
            self.dropped = int(is_own)
            return []
        self.repeated = int(not is_own)
        return [self._held[group + self._rank % (self._ranks - missing)]]

    def advance(self) -> None:
        """Count one row as yielded."""
        self._next += self._ranks

    @property
    def position(self) -> dict[str, Any]:
        """The position to resume from, after the rows that were counted."""
        group = self._next - self._rank
        while len(self._windows) > 1 and self._windows[1][1] <= group:
            self._windows.popleft()
        window, dealt = self._windows[0]
        return {"window": window, "dealt": dealt, "next": self._next}


def beginning() -> dict[str, Any]:
    """Return the position before the first row."""
    return {"window": None, "dealt": 0, "next": 0}
