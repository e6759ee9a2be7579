"""The PNG file of ``tokenpack condense eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..models.condenser.evaluation import ARMS, CondenserEvaluation
from .figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = dict(
    zip(ARMS, ("#8a8a8a", "#d1833a", "#b9a9c6", "#b5a642", "#2a6f97", "#4a7c59"), strict=True)
)


def draw(result: CondenserEvaluation, path: Path) -> None:
    """Draw likelihoods, recovered shares, and the cost of the prefill, by ratio."""
    figure = new_figure(width=13, height=4)
    likelihoods, shares, costs = figure.subplots(1, 3)
    names = ["fixed" if each.ratio is None else str(each.ratio) for each in result.ratios]
    places = np.arange(len(names))
    for at, arm in enumerate(ARMS):
        values = [each.nll[arm] for each in result.ratios]
        shift = (at - 2.5) * 0.14
        bars = likelihoods.bar(
            places + shift, values, 0.13, color=_COLORS[arm], label=arm.replace("_", " ")
        )
        likelihoods.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=6, rotation=90)
    every = [value for each in result.ratios for value in each.nll.values()]
    room = max(max(every) - min(every), 1e-3)
    likelihoods.set_ylim(min(every) - 0.3 * room, max(every) + 0.6 * room)
    likelihoods.set_title("negative log likelihood, nats per target")
    likelihoods.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")
    recovered = [each.recovered for each in result.ratios]
    bars = shares.bar(places, np.nan_to_num(recovered), 0.5, color=_COLORS["condensed"])
    shares.bar_label(bars, ["-" if np.isnan(r) else f"{r:.0%}" for r in recovered])
    shares.axhline(1, color=_COLORS["full"], linestyle=":", linewidth=1)
    shares.set_title("recovered share of the full context's gain")
    shares.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _draw_costs(costs, result)
    for axes in (likelihoods, shares):
        axes.set_xticks(places, names)
        axes.set_xlabel("tokens per vector")
    figure.savefig(path)


def _draw_costs(axes: Axes, result: CondenserEvaluation) -> None:
    names = [*("fixed" if e.ratio is None else str(e.ratio) for e in result.ratios), "full"]
    seconds = [*(e.prefill_seconds for e in result.ratios), result.full_prefill_seconds]
    cache = [*(e.cache_bytes for e in result.ratios), result.full_cache_bytes]
    places = np.arange(len(names))
    axes.bar(places - 0.2, 1e3 * np.array(seconds), 0.38, color="#2a6f97", label="time, ms")
    axes.set_ylabel("ms")
    other = axes.twinx()
    other.bar(places + 0.2, np.array(cache) / 1024, 0.38, color="#d1833a", label="cache, KiB")
    other.set_ylabel("KiB")
    axes.set_title("prefill of the longest context")
    axes.set_xticks(places, names)
    axes.set_xlabel("tokens per vector")
    handles = [axes.patches[0], other.patches[0]]
    axes.legend(handles, ["time", "cache"], frameon=False, fontsize=8)
