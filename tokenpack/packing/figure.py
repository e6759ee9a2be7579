"""A plan drawn: the lengths that were packed, and how full the bins are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from .result import PackResult


def plot_plan(plan: PackResult) -> Figure:
    """Two histograms, of item lengths and of bins' fills."""
    metrics = plan.metrics
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    lengths, fills = figure.subplots(1, 2)
    bins = min(plan.capacity, 60)
    lengths.hist(plan.item_lengths, bins=bins, range=(0, plan.capacity), color="#3b6ea5")
    lengths.set(title="lengths", xlabel="tokens", ylabel="sequences")
    fills.hist(plan.bin_tokens / plan.capacity, bins=60, range=(0, 1), color="#3b6ea5", log=True)
    fills.set(title="bins", xlabel="share filled", ylabel="bins (log)")
    figure.suptitle(
        f"{plan.strategy}: {metrics.num_sequences:,} sequences in {metrics.num_bins:,} bins of "
        f"{plan.capacity:,}, {metrics.efficiency:.2%} filled"
    )
    return figure
