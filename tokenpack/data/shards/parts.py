"""The parts that several machines write: their names and their rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...checks import as_integer, at_least_one


def check_ranks(rank: Any, world_size: Any) -> tuple[int, int]:
    """Return both as integers.

    Raises:
        TypeError: if one is not an integer.
        ValueError: if ``rank`` is not below ``world_size``, or one is out of range.
    """
    size = at_least_one("world_size", world_size)
    if not 0 <= as_integer("rank", rank) < size:
        raise ValueError(f"rank must be from 0 to world_size - 1 = {size - 1}, got {rank}")
    return int(rank), size


def part_name(name: Path, rank: int, world_size: int) -> Path:
    """The name of a rank's part."""
    return name.with_name(f"{name.name}-{rank:05d}-of-{world_size:05d}")


def part_of(total: int, rank: int, world_size: int) -> tuple[int, int]:
    """The first of a rank's rows, and the one after the last. The parts follow each other."""
    return rank * total // world_size, (rank + 1) * total // world_size
