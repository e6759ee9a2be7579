"""Plan more sequences than fit in memory: shard by shard, into a folder.

Each shard is planned separately. So memory depends on the size of a shard only, and several
machines can share the work. The cost is one bin per shard that is not full.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike

import numpy as np

from ..checks import at_least_one
from .columns import column_of
from .lengths import Lengths
from .packer import Packer
from .result import PackResult, common_strategy, merged_arrays, renumbered
from .saving import PlanWriter, read_facts


def pack_shards(
    lengths: Lengths,
    packer: Packer,
    folder: str | PathLike[str],
    *,
    shard_size: int = 10_000_000,
) -> PackResult:
    """Plan a long array of lengths, such as a memory-mapped file, in bounded memory.

    Memory is about 60 bytes per sequence of one shard, for any number of shards.

    Args:
        lengths: ``(n,)`` integers in any form, as for `pack_lengths`, read one shard at a time.
        packer: plans each shard.
        folder: the folder to write the plan to.
        shard_size: the number of sequences in a shard. The last shard may have fewer.

    Returns:
        The plan, with arrays memory-mapped from the folder.

    Raises:
        FileExistsError: if the folder already contains a plan.
        ValueError: as for `pack_lengths`. The message names the shard and the index in it.
    """
    size = at_least_one("shard_size", shard_size)
    column = column_of(lengths, "lengths", "integers, one per sequence")
    if not len(column):
        raise ValueError("lengths must contain at least one sequence, got none")

    def plan(first: int) -> PackResult:
        try:
            return packer.pack_some(column[first : first + size])
        except ValueError as error:
            raise ValueError(f"in the shard that begins at {first}: {error}") from error

    plans = map(plan, range(0, len(column), size))
    return _write(plans, folder, packer.overlong == "split")


def merge_saved(folders: Sequence[str | PathLike[str]], folder: str | PathLike[str]) -> PackResult:
    """Merge saved plans of consecutive shards into one saved plan, in bounded memory.

    Args:
        folders: the folders of the shards, in the order of their sequences.
        folder: the folder to write the merged plan to.

    Returns:
        The merged plan, with arrays memory-mapped from ``folder``.

    Raises:
        FileExistsError: if ``folder`` already contains a plan.
        FileNotFoundError: if the plan of a shard is missing.
        ValueError: if there are no shards, a plan is damaged, or capacities differ.
    """
    if not folders:
        raise ValueError("folders must contain at least one shard, got none")
    facts = [read_facts(shard) for shard in folders]
    capacities = sorted({each["capacity"] for each in facts})
    if len(capacities) > 1:
        raise ValueError(f"folders must have plans of one capacity, got {capacities}")
    with_starts = any("item_starts" in each["arrays"] for each in facts)
    # Load one plan at a time: every memory-mapped array keeps a file open.
    return _write((PackResult.load(shard) for shard in folders), folder, with_starts)


def _write(
    plans: Iterable[PackResult], folder: str | PathLike[str], with_starts: bool
) -> PackResult:
    """Write plans of consecutive shards as one plan: `merge_results` on disk."""
    num_sequences, num_items, seconds = 0, 0, 0.0
    strategies = set()
    with PlanWriter(folder) as writer:
        writer.append("offsets", np.zeros(1, np.int64))
        for plan in plans:
            for name in merged_arrays(with_starts):
                writer.append(name, renumbered(plan, name, num_sequences, num_items))
            num_sequences += plan.num_sequences
            num_items += len(plan.items)
            seconds += plan.seconds
            strategies.add(plan.strategy)
        writer.finish(
            {
                "kind": PackResult.__name__,
                "capacity": plan.capacity,
                "strategy": common_strategy(strategies),
                "num_sequences": num_sequences,
                "seed": plan.seed,
                "seconds": seconds,
            }
        )
    return PackResult.load(folder)
