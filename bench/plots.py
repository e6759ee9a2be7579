"""Draw the plots of a report from its measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from .results import Result, Run

OURS, OTHERS, LIMIT = "#2a6f97", ("#d1833a", "#7b5e8b", "#4a7c59", "#b5a642", "#9c4a4a"), "#8a8a8a"


class Picture(NamedTuple):
    """A PNG and its title."""

    path: Path
    title: str


def draw(run: Run) -> dict[str, list[Picture]]:
    """Draw a plot for each suite that has results. Without matplotlib, draw nothing.

    Returns:
        Pictures by suite.
    """
    try:
        import matplotlib
    except ImportError:
        return {}
    matplotlib.use("Agg")
    pictures: dict[str, list[Picture]] = {}
    for suite, name, title, function in (
        ("training_step", "speed_up", "Speed-up against the share of padding", _speed_up),
        ("attention", "attention", "Attention rate against length", _attention),
        ("loss", "loss_memory", "Memory of head and loss against the vocabulary size", _memory),
        ("packing", "packing", "Planning time against the number of sequences", _packing),
    ):
        results = run.of(suite)
        path = run.folder / f"{name}.png"
        if results and function(results, path, title):
            pictures.setdefault(suite, []).append(Picture(path, title))
    return pictures


def _figure(columns: int = 1, rows: int = 1) -> tuple:
    import matplotlib.pyplot as plt

    size = (max(7.0, 4.6 * columns), 3.9 * rows + 0.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=True)
    for each in axes.flat:
        each.grid(True, color="#e3e7ea", linewidth=0.8)
        each.set_axisbelow(True)
        for side in ("top", "right"):
            each.spines[side].set_visible(False)
    return figure, axes


def _save(figure: object, path: Path, title: str) -> bool:
    import matplotlib.pyplot as plt

    figure.suptitle(title, x=0.02, ha="left", fontweight="bold")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _colors(names: Sequence[str], limits: Sequence[str] = ()) -> dict[str, str]:
    """tokenpack in one color, limits in gray, other contenders in the remaining colors."""
    others = iter(OTHERS * 3)
    ours = next((name for name in _OURS if name in names), None)
    return {
        name: LIMIT if name in limits else OURS if name == ours else next(others) for name in names
    }


# tokenpack's contenders; the first that occurs is highlighted. On a CPU "auto" is the reference and
# runs only once.
_OURS = ("tokenpack", "packed, auto", "packed, reference", "auto", "packed", "token budget")


def _speed_up(results: Sequence[Result], path: Path, title: str) -> bool:
    ratio = "forward and backward, round by round"  # without the optimizer, like the ideal
    points = [each for each in results if "preset" in each.notes and ratio in each.notes]
    if not points:
        return False
    figure, axes = _figure()
    (axis,) = axes.flat
    models = list(dict.fromkeys(each.parameters["name"] for each in points))
    for model, color in zip(models, (OURS, *OTHERS)):
        own = sorted(
            (each for each in points if each.parameters["name"] == model),
            key=lambda each: each.notes["padding share"],
        )
        shares = [100 * each.notes["padding share"] for each in own]
        axis.plot(shares, [each.notes[ratio] for each in own], "o-", color=color, label=model)
        ideals = [each.notes["ideal, forward and backward"] for each in own]
        axis.plot(shares, ideals, "_", color=color, markersize=13, markeredgewidth=2)
    axis.plot([], [], "_", color=LIMIT, markersize=13, markeredgewidth=2, label="ideal, counted")
    named = sorted(
        (each for each in points if each.parameters["name"] == models[0]),
        key=lambda each: each.notes["padding share"],
    )
    place = -10.0
    for each in named:
        place = max(100 * each.notes["padding share"], place + 3)  # so that labels do not overlap
        text = {"rotation": 90, "fontsize": 8, "color": LIMIT, "ha": "right", "va": "bottom"}
        axis.annotate(each.notes["preset"], (place, 0.55), **text)
    axis.axhline(1, color=LIMIT, linewidth=1)
    axis.set(xlabel="padding, % of the slots", ylabel="speed-up of forward and backward")
    axis.set_ylim(bottom=0.5)
    axis.legend(frameon=False, loc="upper left")
    return _save(figure, path, title)


def _attention(results: Sequence[Result], path: Path, title: str) -> bool:
    both = [each for each in results if each.parameters.get("passes") == "forward and backward"]
    if not both:
        return False
    limit = next((each for each in results if each.role == "limit"), None)
    biases = list(dict.fromkeys(each.parameters["bias"] for each in both))
    head_dim = min(each.parameters["head_dim"] for each in both)
    figure, axes = _figure(columns=len(biases))
    colors = _colors(_ordered(each.by for each in both))
    for axis, bias in zip(axes.flat, biases):
        selected = [
            each
            for each in both
            if each.parameters["bias"] == bias
            and each.parameters["head_dim"] == head_dim
            and each.parameters["direction"] == "both ways"
        ]
        _lines(axis, selected, lambda each: each.parameters["longest"], _rate, colors)
        if limit is not None:
            axis.axhline(_rate(limit), color=LIMIT, linestyle="--", label="matrix product")
        axis.set_xscale("log", base=2)
        axis.set(xlabel="longest sequence, tokens", title=f"{bias}, head_dim {head_dim}")
    axes.flat[0].set_ylabel("TFLOP/s of real tokens, forward and backward")
    axes.flat[-1].legend(frameon=False, fontsize=9)
    return _save(figure, path, title)


def _rate(each: Result) -> float:
    return float(each.notes["TFLOP/s"])


def _memory(results: Sequence[Result], path: Path, title: str) -> bool:
    selected = [each for each in results if "extra memory, MiB" in each.notes]
    figure, axis = _by_contender(
        selected,
        lambda each: each.parameters["classes"] / 1024,
        lambda each: max(each.notes["extra memory, MiB"], 0.1),
    )
    axis.set(xlabel="vocabulary size / 1,024", ylabel="peak memory without gradients, MiB")
    return bool(selected) and _save(figure, path, title)


def _packing(results: Sequence[Result], path: Path, title: str) -> bool:
    selected = [
        each
        for each in results
        if each.parameters.get("shape") == "lognormal" and each.parameters.get("capacity") == 2048
    ]
    figure, axis = _by_contender(
        selected, lambda each: each.parameters["count"], lambda each: each.median * 1e3
    )
    axis.set_xscale("log")
    axis.set(xlabel="sequences (log-normal lengths, bins of 2,048)", ylabel="milliseconds")
    return bool(selected) and _save(figure, path, title)


def _by_contender(
    results: Sequence[Result], x: Callable[[Result], float], y: Callable[[Result], float]
) -> tuple:
    """A figure with one line per contender and a logarithmic y axis."""
    figure, axes = _figure()
    (axis,) = axes.flat
    limits = [each.by for each in results if each.role == "limit"]
    _lines(axis, results, x, y, _colors(_ordered(each.by for each in results), limits))
    axis.set_yscale("log")
    if results:
        axis.legend(frameon=False)
    return figure, axis


def _ordered(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _lines(
    axis: object,
    results: Sequence[Result],
    x: Callable[[Result], float],
    y: Callable[[Result], float],
    colors: dict[str, str],
) -> None:
    for name, color in colors.items():
        own = sorted((each for each in results if each.by == name), key=x)
        if own:
            width = 2.4 if color == OURS else 1.5
            xs, ys = [x(each) for each in own], [y(each) for each in own]
            axis.plot(xs, ys, "o-", color=color, label=name, linewidth=width, markersize=4)
