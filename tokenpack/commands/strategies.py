"""Plan a user's lengths with every strategy of `tokenpack.packing`, for `tokenpack inspect`.

efficiency = tokens / (rows * capacity)          padding share = 1 - efficiency
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from ..packing import Packer, PackMetrics, PairPackResult, pack_lengths, pack_pairs
from ..table import format_table

_LEAST_CAPACITY = 512


@dataclass(frozen=True)
class StrategyComparison:
    """Metrics of every strategy on the same texts.

    Attributes:
        capacity: tokens of a row.
        metrics: of each strategy's plan, by the strategy's short name.
        auto: the strategy that "auto" chooses for these lengths.
    """

    capacity: int
    metrics: dict[str, PackMetrics]
    auto: str


def default_capacity(lengths: np.ndarray) -> int:
    """The smallest power of two, 512 or more, that holds the longest text."""
    return max(_LEAST_CAPACITY, 1 << int(lengths.max() - 1).bit_length())


def compare_strategies(lengths: np.ndarray, capacity: int, seed: int) -> StrategyComparison:
    """Plan the lengths once with every strategy.

    Args:
        lengths: ``(texts,)`` tokens. Texts over capacity are cut, empty ones are dropped.
        capacity: tokens of a row.
        seed: for the strategy that shuffles.
    """
    # All strategies together take less time than the tokenizer did.
    names = tqdm(Packer.strategies(), desc="planning", leave=False, disable=len(lengths) < 50_000)
    options: dict[str, Any] = {"seed": seed, "overlong": "truncate", "drop_empty": True}
    metrics = {name: pack_lengths(lengths, capacity, name, **options).metrics for name in names}
    return StrategyComparison(
        capacity, metrics, pack_lengths(lengths, capacity, **options).strategy
    )


def format_comparison(comparison: StrategyComparison) -> str:
    """A table with a row per strategy, and notes."""
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
    metrics = comparison.metrics[comparison.auto]
    capacity = comparison.capacity
    return "\n".join(
        [
            table,
            "",
            f"rows: each has {capacity:,} tokens; without any padding, "
            f"{-(-metrics.tokens // capacity):,} would hold all tokens.",
            f"seconds: time to plan, one run. `--strategy auto` uses {comparison.auto} here.",
            _cut_and_dropped(metrics, f"the capacity of {capacity:,}", "text"),
        ]
    )


def format_pairs(plan: PairPackResult) -> str:
    """A table with a row per side of the pairs, and notes."""
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
            f"A row holds pairs up to the capacity of each side. Planned in {plan.seconds:.3f} s"
            " (pack_pairs).",
            _cut_and_dropped(plan.metrics, "a capacity", "pair"),
        ]
    )


def plan_pairs(source: np.ndarray, target: np.ndarray, capacity: int | None) -> PairPackResult:
    """Plan pairs with ``capacity`` on each side; ``None`` is the default for the side's lengths."""
    capacities = [capacity or default_capacity(side) for side in (source, target)]
    return pack_pairs(source, target, *capacities, overlong="truncate", drop_empty=True)


def _cut_and_dropped(metrics: PackMetrics, limit: str, item: str) -> str:
    of_all = f"of {metrics.num_sequences:,} {item}s"
    cut = metrics.truncated
    text = f"Cut to {limit}: {cut:,} {of_all}" if cut else f"None {of_all} is over {limit}"
    dropped = f"; dropped because they have no tokens: {metrics.dropped:,}"
    return f"{text}{dropped if metrics.dropped else ''}."
