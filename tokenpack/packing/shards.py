"""Plans of more sequences than one machine wants to hold: shard by shard, into a folder.

A shard is planned by itself, so that memory is a shard's and many machines can share the work. What
it costs is one bin per shard that is not full.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike

import numpy as np
from numpy.typing import NDArray

from ..checks import at_least_one
from .packer import Packer
from .result import PackResult
from .saving import PlanWriter, read_facts


def pack_shards(
    lengths: NDArray[np.integer],
    packer: Packer,
    folder: str | PathLike[str],
    *,
    shard_size: int = 10_000_000,
) -> PackResult:
    """Plan a long array of lengths, such as a memory-mapped file, in bounded memory.

    Memory is about 60 bytes per sequence of a shard, whatever the number of shards.

    Args:
        lengths: ``(n,)`` integers, read one shard at a time.
        packer: how to plan a shard.
        folder: where the plan is written.
        shard_size: sequences in a shard, but for the last.

    Returns:
        The plan, its arrays memory-mapped from the folder.

    Raises:
        FileExistsError: if there is a plan in the folder already.
        ValueError: as `pack_lengths`, naming the shard and the place in it.
    """
    size = at_least_one("shard_size", shard_size)
    if not len(lengths):
        raise ValueError("lengths must name at least one sequence, got none")

    def plan(first: int) -> PackResult:
        try:
            return packer.pack_some(lengths[first : first + size])
        except ValueError as error:
            raise ValueError(f"in the shard that begins at {first}: {error}") from error

    plans = map(plan, range(0, len(lengths), size))
    return _write(plans, folder, packer.overlong == "split")


def merge_saved(folders: Sequence[str | PathLike[str]], folder: str | PathLike[str]) -> PackResult:
    """Join saved plans of consecutive shards into one, in bounded memory.

    Args:
        folders: of the shards, in the order of their sequences.
        folder: where the joint plan is written.

    Returns:
        The plan, its arrays memory-mapped from ``folder``.

    Raises:
        FileExistsError: if there is a plan in ``folder`` already.
        FileNotFoundError: if a shard's is missing.
        ValueError: if there is no shard, one is damaged, or capacities differ.
    """
    if not folders:
        raise ValueError("folders must be at least one shard's, got none")
    facts = [read_facts(shard) for shard in folders]
    capacities = sorted({each["capacity"] for each in facts})
    if len(capacities) > 1:
        raise ValueError(f"folders must be of one capacity, got {capacities}")
    with_starts = any("item_starts" in each["arrays"] for each in facts)
    # One at a time: each that is mapped is a file held open.
    return _write((PackResult.load(shard) for shard in folders), folder, with_starts)


def _write(
    parts: Iterable[PackResult], folder: str | PathLike[str], with_starts: bool
) -> PackResult:
    """Write plans of consecutive shards as one: `merge_results`, on disk."""
    num_sequences, num_items, seconds = 0, 0, 0.0
    strategies = set()
    with PlanWriter(folder) as writer:
        writer.append("offsets", np.zeros(1, np.int64))
        for part in parts:
            for name in ("items", "dropped", "truncated", "split"):
                writer.append(name, getattr(part, name) + num_sequences)
            writer.append("offsets", part.offsets[1:] + num_items)
            writer.append("item_lengths", part.item_lengths)
            if with_starts:
                starts = part.item_starts
                writer.append(
                    "item_starts", np.zeros_like(part.items) if starts is None else starts
                )
            num_sequences += part.num_sequences
            num_items += len(part.items)
            seconds += part.seconds
            strategies.add(part.strategy)
        writer.finish(
            {
                "kind": PackResult.__name__,
                "capacity": part.capacity,
                "strategy": strategies.pop() if len(strategies) == 1 else "several",
                "num_sequences": num_sequences,
                "seed": part.seed,
                "seconds": seconds,
            }
        )
    return PackResult.load(folder)
