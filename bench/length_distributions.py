"""Lengths as data have them: named presets, or a file of the user's own.

A preset states what was published, mean lengths mostly (written down from memory of the papers that
are named, and not yet checked against them); how lengths scatter around a mean, seldom
published, is taken to be log-normal with a standard deviation of 0.7 in the logarithm, so that one
in twenty is over three times the median. Where a suite's batches are smaller than the data's, all
lengths are divided by one number: padding depends on their shape alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Lengths = NDArray[np.int64]  # (n, 2): tokens of prompt and completion, or of source and target

_SCATTER = 0.7


class Preset(NamedTuple):
    """A distribution of lengths.

    Attributes:
        draw: ``(rng, n)`` to ``(n, 2)`` float64.
        longest: tokens of a sequence at most, prompt and completion together; longer ones are cut.
        source: where the shape is from.
    """

    draw: Callable[[np.random.Generator, int], NDArray[np.float64]]
    longest: int
    source: str


def _scattered(rng: np.random.Generator, means: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log-normal, each with its mean."""
    return means * rng.lognormal(-(_SCATTER**2) / 2, _SCATTER, means.shape)


def _around(prompt: float, completion: float):
    return lambda rng, n: _scattered(rng, np.tile([prompt, completion], (n, 1)))


# Examples, and mean tokens of all prompts and of all completions of one: rounds x those of a round.
_TULU = {
    "CoT": (100_000, 266.0, 53.2),
    "Flan V2": (100_000, 355.7, 31.2),
    "Dolly": (15_011, 118.1, 91.3),
    "Open Assistant 1": (34_795, 1.6 * 34.8, 1.6 * 212.5),
    "GPT4-Alpaca": (52_002, 28.0, 161.8),
    "Code-Alpaca": (20_022, 35.6, 67.8),
    "ShareGPT": (168_864, 3.2 * 71.0, 3.2 * 357.8),
}


def _instruction_mix(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    table = np.array(list(_TULU.values()))
    chosen = rng.choice(len(table), n, p=table[:, 0] / table[:, 0].sum())
    return _scattered(rng, table[chosen, 1:])


def _translation_pairs(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    source = _scattered(rng, np.full(n, 21 * 1.5))
    return np.stack([source, source * rng.lognormal(0.0, 0.2, n)], axis=1)


PRESETS = {
    "short chat": Preset(
        _around(27.8, 64.6),
        512,
        "Alpaca: mean prompt 27.8, completion 64.6 (Wang et al. 2023, arXiv:2306.04751, table 1)",
    ),
    "translation pairs": Preset(
        _translation_pairs,
        512,
        "FLORES-200: 21 words a sentence (NLLB Team 2022, arXiv:2207.04672); taken: 1.5 tokens a "
        "word, targets within 20 % of their sources",
    ),
    "instruction mix": Preset(
        _instruction_mix,
        2048,
        "Tülu's seven datasets with their means and sizes (arXiv:2306.04751, table 1), cut at "
        "2,048 as it trains",
    ),
    "long documents": Preset(
        _around(4938 * 1.3, 220 * 1.3),
        16384,
        "arXiv papers and abstracts: 4,938 and 220 words (Cohan et al. 2018, arXiv:1804.05685); "
        "taken: 1.3 tokens a word; cut at 16,384",
    ),
    "uniform": Preset(
        lambda rng, n: rng.integers(1, 513, (n, 2)).astype(float),
        1024,
        "each length from 1 to 512 alike",
    ),
    "constant": Preset(
        lambda rng, n: np.full((n, 2), 256.0),
        512,
        "no padding: what packing costs where there is nothing to gain",
    ),
}
DEFAULT = "instruction mix"


def draw(name: str, count: int, seed: int = 0) -> Lengths:
    """``(count, 2)`` lengths of a preset or a file, the same on every machine.

    Args:
        name: of a preset, or of a file; see `read_lengths`. Of a file a random sample is taken,
            with repetitions if it has fewer lengths.
        count: how many.
        seed: of the draw.

    Raises:
        ValueError, OSError: if there is no such preset and no such file, or it holds no lengths.
    """
    rng = np.random.default_rng(seed)
    if name not in PRESETS:
        lengths = read_lengths(name)
        return lengths[rng.choice(len(lengths), count, replace=len(lengths) < count)]
    preset = PRESETS[name]
    lengths = np.maximum(preset.draw(rng, count).round().astype(np.int64), 1)
    lengths[:, 0] = np.minimum(lengths[:, 0], preset.longest - 1)
    lengths[:, 1] = np.minimum(lengths[:, 1], preset.longest - lengths[:, 0])
    return lengths


def scaled_to(lengths: Lengths, longest: int) -> Lengths:
    """Lengths divided by one number, so that the longest of all is ``longest``; none below 1."""
    return np.maximum(lengths * longest // lengths.max(), 1)


def read_lengths(path: str | Path) -> Lengths:
    """``(n, 2)`` lengths from a file.

    Args:
        path: ``.npy`` of shape ``(n,)`` or ``(n, 2)``, or text with one or two integers a line,
            separated by a comma or spaces. One is a prompt, without a completion but one token.

    Raises:
        ValueError, OSError: if it cannot be read as such, or a length is below 1.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(
            f"--lengths: {path} is no file, nor one of the presets: {', '.join(PRESETS)}"
        )
    if path.suffix == ".npy":
        table = np.load(path)
    else:
        lines = path.read_text(encoding="utf-8").replace(",", " ").splitlines()
        table = np.array([[int(word) for word in line.split()] for line in lines if line.strip()])
    if table.ndim == 1:
        table = np.stack([table, np.ones_like(table)], axis=1)
    if (
        table.ndim != 2
        or table.shape[1] not in (1, 2)
        or not np.issubdtype(table.dtype, np.integer)
    ):
        raise ValueError(f"--lengths: {path} must hold one or two integers a line")
    if table.shape[1] == 1:
        table = np.concatenate([table, np.ones_like(table)], axis=1)
    if not len(table) or table.min() < 1:
        raise ValueError(f"--lengths: {path} must hold lengths of 1 or more")
    return table.astype(np.int64)
