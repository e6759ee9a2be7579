"""The PNG files of demo and inspect. They need matplotlib, an optional dependency."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .side_by_side import Comparison

PADDED, PACKED, IDEAL = "#d1833a", "#2a6f97", "#8a8a8a"
LENGTHS = ("#4a7c59", "#b5a642")
ORDERS = ("#7b5e8b", "#b9a9c6")


def available() -> bool:
    """Whether matplotlib is installed. If not, print on stderr what to install."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    print(
        "tokenpack: no PNG: matplotlib is not installed (pip install 'tokenpack[demo]')",
        file=sys.stderr,
    )
    return False


def draw_demo(comparisons: Sequence[tuple[str, Comparison]], path: Path) -> None:
    """Draw loss curves (top) and real tokens per second (bottom), one column per model."""
    figure = new_figure(width=4.2 * len(comparisons) + 0.4, height=6.4)
    axes = figure.subplots(2, len(comparisons), squeeze=False, sharex=True)
    for (losses, throughput), (title, comparison) in zip(axes.T, comparisons):
        _draw_losses(losses, title, comparison)
        _draw_throughput(throughput, comparison)
    axes[0, 0].set_ylabel("loss (nats per token)")
    axes[1, 0].set_ylabel("real tokens / s, forward and backward")
    axes[0, 0].legend(frameon=False)
    axes[1, 0].legend(frameon=False, loc="upper left")
    figure.savefig(path)


def _draw_losses(axes: Axes, title: str, comparison: Comparison) -> None:
    steps = _steps(comparison)
    # The two curves coincide. The wide one stays visible under the narrow one.
    axes.plot(steps, comparison.padded.losses, color=PADDED, linewidth=5, alpha=0.5, label="padded")
    axes.plot(steps, comparison.packed.losses, color=PACKED, linewidth=1.5, label="packed")
    axes.set_title(
        f"{title}: losses within {max(comparison.loss_differences):.0e}", fontsize=11, loc="left"
    )
    axes.grid(alpha=0.25)


def _draw_throughput(axes: Axes, comparison: Comparison) -> None:
    steps = _steps(comparison)
    tokens = np.array(comparison.tokens)
    padded = tokens / comparison.padded.forward_backward_seconds
    packed = tokens / comparison.packed.forward_backward_seconds
    ideal = padded * comparison.ideal_ratios
    axes.plot(steps, ideal, ":", color=IDEAL, label="padded x operations saved (ideal)")
    axes.plot(steps, packed, "o-", markersize=3.5, color=PACKED, label="packed")
    axes.plot(steps, padded, "o-", markersize=3.5, color=PADDED, label="padded")
    axes.set_ylim(bottom=0, top=1.35 * max(packed.max(), ideal.max()))
    axes.set_title(
        f"{comparison.padding_share:.0%} padding, {comparison.time_ratio:.1f}x faster",
        fontsize=11,
        loc="left",
    )
    axes.set_xlabel("step")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(alpha=0.25)


def _steps(comparison: Comparison) -> range:
    return range(1, len(comparison.tokens) + 1)


def draw_inspect(
    lengths: Mapping[str, np.ndarray],
    batch_sizes: Sequence[int],
    padding: Mapping[str, Sequence[float]],
    speed_ups: Mapping[str, Sequence[float]],
    shape: str,
    path: Path,
) -> None:
    """Draw a histogram of lengths, and the padding share and expected speed-up by batch size.

    Args:
        lengths: tokens of each text, for each column of the data.
        batch_sizes: rows of a batch, the x axis of the last two panels.
        padding: padding share at each batch size, for random and sorted batches.
        speed_ups: padded / packed operations at each batch size, likewise.
        shape: name of the model whose operations were counted.
        path: of the PNG.
    """
    figure = new_figure(width=13, height=4)
    histogram, shares, gains = figure.subplots(1, 3)
    longest = max(int(side.max()) for side in lengths.values())
    # Lengths spread over orders of magnitude.
    edges = np.unique(np.geomspace(1, longest + 1, 40).round())
    for (side, values), color in zip(lengths.items(), LENGTHS):
        label = f"{side}: median {np.median(values):.0f}, longest {values.max()}"
        histogram.hist(values, edges, color=color, alpha=0.6, label=label)
    histogram.set_xscale("log")
    histogram.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    histogram.set(title="lengths", xlabel="tokens (log scale)", ylabel="texts")
    histogram.set_ylim(top=1.25 * histogram.get_ylim()[1])
    histogram.legend(frameon=False, loc="upper left", fontsize=9)
    _draw_bars(shares, batch_sizes, padding, lambda value: f"{value:.0%}")
    shares.set(title="share of the slots that is padding", ylim=(0, 1))
    shares.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _draw_bars(gains, batch_sizes, speed_ups, lambda value: f"{value:.1f}x")
    gains.set(title=f"expected speed-up, {shape}")
    gains.set_ylim(bottom=0, top=1.2 * gains.get_ylim()[1])
    gains.axhline(1, color=IDEAL, linewidth=1, linestyle=":")
    for axes in (shares, gains):
        axes.set_xlabel("rows per batch")
        axes.legend(frameon=False, loc="upper left", fontsize=9)
    figure.savefig(path)


def _draw_bars(
    axes: Axes, batch_sizes: Sequence[int], series: Mapping[str, Sequence[float]], label: Any
) -> None:
    places = np.arange(len(batch_sizes))
    for (name, values), shift, color in zip(series.items(), (-0.2, 0.2), ORDERS):
        bars = axes.bar(places + shift, values, width=0.38, color=color, label=name)
        axes.bar_label(bars, [label(value) for value in values], fontsize=8, padding=2)
    axes.set_xticks(places, [str(size) for size in batch_sizes])


def new_figure(width: float, height: float) -> Figure:
    """A figure of a size in inches."""
    # Without pyplot, which would select a GUI backend and keep the figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
