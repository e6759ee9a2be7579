"""The strategies of `tokenpack.packing` on a user's own lengths, as `tokenpack inspect` shows them.

efficiency = tokens / (rows * capacity)          padding share = 1 - efficiency
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from ..packing import Packer, PackMetrics, PairPackResult, pack_lengths, pack_pairs
from .table import format_table

_LEAST_CAPACITY = 512


@dataclass(frozen=True)
class Comparison:
    """How each strategy packs the same texts.

    Attributes:
        capacity: tokens of a row.
        metrics: of each strategy's plan, by its short name.
        auto: what "auto" takes here.
    """

    capacity: int
    metrics: dict[str, PackMetrics]
    auto: str


def default_capacity(lengths: np.ndarray) -> int:
    """The smallest power of two that holds the longest text, and at least 512."""
    return max(_LEAST_CAPACITY, 1 << int(lengths.max() - 1).bit_length())


def compare_strategies(lengths: np.ndarray, capacity: int, seed: int) -> Comparison:
    """Plan once with every strategy.

    Args:
        lengths: ``(texts,)`` tokens of each. What is over capacity is cut, what is empty left out.
        capacity: tokens of a row.
        seed: of the strategy that shuffles.
    """
    # None is left out for being slow: all of them together are quicker than the tokenizer was.
    names = tqdm(Packer.strategies(), desc="planning", leave=False, disable=len(lengths) < 50_000)
    options: dict[str, Any] = {"seed": seed, "overlong": "truncate", "drop_empty": True}
    metrics = {name: pack_lengths(lengths, capacity, name, **options).metrics for name in names}
    return Comparison(capacity, metrics, pack_lengths(lengths, capacity, **options).strategy)


def format_comparison(comparison: Comparison) -> str:
    """A row per strategy, and what was done to get there."""
    textbook = {name: about.split(":")[0] for name, about in Packer.strategies().items()}
    rows = [
        [
            f"{name:<6}{textbook[name]}",
            f"{m.num_bins:,}",
            f"{m.efficiency:.2%}",
            f"{1 - m.efficiency:.2%}",
            f"{m.seconds:.3f}",
        ]
        for name, m in comparison.metrics.items()
    ]
    table = format_table(["strategy", "rows", "efficiency", "padding", "seconds"], rows)
    any_of = comparison.metrics[comparison.auto]
    capacity = comparison.capacity
    return "\n".join(
        [
            table,
            "",
            f"rows: of {capacity:,} tokens; {-(-any_of.tokens // capacity):,} would hold all tokens"
            " without any padding.",
            f"seconds: to plan, one run. `--strategy auto` takes {comparison.auto} here.",
            _what_was_done(any_of, f"the capacity of {capacity:,}", "text"),
        ]
    )


def format_pairs(plan: PairPackResult) -> str:
    """A row per side, and what was done to get there."""
    sides = [
        ("source", plan.capacity, plan.efficiency),
        ("target", plan.target_capacity, plan.target_efficiency),
    ]
    rows = [
        [side, f"{plan.num_bins:,}", f"{capacity:,}", f"{share:.2%}", f"{1 - share:.2%}"]
        for side, capacity, share in sides
    ]
    table = format_table(["pairs in rows", "rows", "capacity", "efficiency", "padding"], rows)
    return "\n".join(
        [
            table,
            "",
            f"A row holds pairs up to the capacity of either side; planned in {plan.seconds:.3f} s"
            " (pack_pairs).",
            _what_was_done(plan.metrics, "a capacity", "pair"),
        ]
    )


def plan_pairs(source: np.ndarray, target: np.ndarray, capacity: int | None) -> PairPackResult:
    """Plan pairs, each side with ``capacity``, or with the default of its own lengths."""
    capacities = [capacity or default_capacity(side) for side in (source, target)]
    return pack_pairs(source, target, *capacities, overlong="truncate", drop_empty=True)


def _what_was_done(metrics: PackMetrics, limit: str, item: str) -> str:
    of_all = f"of {metrics.num_sequences:,} {item}s"
    cut = metrics.truncated
    done = f"Cut to {limit}: {cut:,} {of_all}" if cut else f"None {of_all} is over {limit}"
    left_out = f"; left out for having no tokens: {metrics.dropped:,}" if metrics.dropped else ""
    return f"{done}{left_out}."
