"""Lengths as in real data: named presets, or a file of the user's own.

A preset follows published numbers, mostly mean lengths. They are written from memory of the cited
papers and not yet checked against them. The spread around the mean is rarely published. Here it is
log-normal with a standard deviation of 0.7 in the logarithm, so that one length in twenty exceeds
three times the median. If a suite's batches are smaller than the data's, all lengths are divided by
the same number, because padding depends only on the shape of the distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LengthPairs = NDArray[np.int64]  # (n, 2): tokens of prompt and completion, or source and target

_SCATTER = 0.7


class Preset(NamedTuple):
    """A distribution of lengths.

    Attributes:
        draw: maps ``(rng, n)`` to ``(n, 2)`` float64.
        longest: maximum tokens of prompt and completion together; longer sequences are cut.
        source: origin of the numbers.
    """

    draw: Callable[[np.random.Generator, int], NDArray[np.float64]]
    longest: int
    source: str


def _scattered(rng: np.random.Generator, means: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log-normal numbers with the given means."""
    return means * rng.lognormal(-(_SCATTER**2) / 2, _SCATTER, means.shape)


def _around(prompt: float, completion: float):
    return lambda rng, n: _scattered(rng, np.tile([prompt, completion], (n, 1)))


# Number of examples; mean tokens of all prompts and of all completions per example, as rounds
# times tokens per round.
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
    datasets = rng.choice(len(table), n, p=table[:, 0] / table[:, 0].sum())
    return _scattered(rng, table[datasets, 1:])


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
        "FLORES-200: 21 words per sentence (NLLB Team 2022, arXiv:2207.04672); assumed: 1.5 tokens "
        "per word, targets within 20 % of their sources",
    ),
    "instruction mix": Preset(
        _instruction_mix,
        2048,
        "Tülu's seven datasets with their means and sizes (arXiv:2306.04751, table 1), cut at "
        "2,048 tokens as in its training",
    ),
    "long documents": Preset(
        _around(4938 * 1.3, 220 * 1.3),
        16384,
        "arXiv papers and abstracts: 4,938 and 220 words (Cohan et al. 2018, arXiv:1804.05685); "
        "assumed: 1.3 tokens per word; cut at 16,384",
    ),
    "uniform": Preset(
        lambda rng, n: rng.integers(1, 513, (n, 2)).astype(float),
        1024,
        "each length from 1 to 512 with equal probability",
    ),
    "constant": Preset(
        lambda rng, n: np.full((n, 2), 256.0),
        512,
        "no padding: shows the overhead of packing if there is nothing to gain",
    ),
}
DEFAULT = "instruction mix"


def draw(name: str, count: int, seed: int = 0) -> LengthPairs:
    """Draw lengths of a preset or a file, the same on every machine.

    Args:
        name: of a preset, or of a file; see `read_lengths`. A file is sampled at random, with
            replacement if it has fewer lengths than ``count``.
        count: number of lengths.
        seed: random seed.

    Returns:
        ``(count, 2)`` int64.

    Raises:
        ValueError: if there is no such preset and no such file, or the file holds no lengths.
        OSError: if the file cannot be read.
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


def scale_to(lengths: NDArray[np.int64], longest: int) -> NDArray[np.int64]:
    """Divide lengths by a common number so that the maximum is ``longest`` and the minimum 1."""
    return np.maximum(lengths * longest // lengths.max(), 1)


def read_lengths(path: str | Path) -> LengthPairs:
    """Read lengths from a file.

    Args:
        path: ``.npy`` of shape ``(n,)`` or ``(n, 2)``, or text with one or two integers per line,
            separated by a comma or spaces. A single integer is the length of a prompt, whose
            completion has one token.

    Returns:
        ``(n, 2)`` int64.

    Raises:
        ValueError: if the file does not hold such lengths, or a length is below 1.
        OSError: if the file cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"--lengths must be a file or one of {', '.join(PRESETS)}, got {path}")
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
        raise ValueError(f"--lengths: {path} must hold one or two integers per line")
    if table.shape[1] == 1:
        table = np.concatenate([table, np.ones_like(table)], axis=1)
    if not len(table) or table.min() < 1:
        raise ValueError(f"--lengths: {path} must hold lengths of 1 or more")
    return table.astype(np.int64)
