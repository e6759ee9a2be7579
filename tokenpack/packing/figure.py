"""Draw a plan: a histogram of the lengths and one of how full the bins are."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray


def plot_plan(
    item_lengths: NDArray[np.integer], bin_tokens: NDArray[np.int64], capacity: int, title: str
) -> Figure:
    """Draw two histograms: the tokens of each item, and the filled share of each bin."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    lengths, fills = figure.subplots(1, 2)
    lengths.hist(item_lengths, bins=min(capacity, 60), range=(0, capacity), color="#3b6ea5")
    lengths.set(title="lengths", xlabel="tokens", ylabel="sequences")
    fills.hist(bin_tokens / capacity, bins=60, range=(0, 1), color="#3b6ea5", log=True)
    fills.set(title="bins", xlabel="share filled", ylabel="bins (log)")
    figure.suptitle(title)
    return figure
