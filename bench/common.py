"""Batches of sequences of different lengths, and timing on a CPU or a GPU."""

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenpack.cost import Ceilings, measure_ceilings, read_ceilings

from . import length_distributions as lengths

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
DEVICE_NAME = torch.cuda.get_device_name() if ON_GPU else "cpu"


@dataclasses.dataclass
class Options:
    """Options of this run; see `conftest`."""

    lengths: str = lengths.DEFAULT
    ceilings: Path | None = None

    def check(self) -> None:
        """Raise if there are no such lengths, before anything runs."""
        lengths.draw(self.lengths, 1)


options = Options()


class RaggedBatch(NamedTuple):
    """A padded batch of rows of different lengths.

    Attributes:
        lengths: ``(rows,)`` int64, real tokens.
        mask: ``(rows, longest)`` bool, True at real tokens.
    """

    lengths: Tensor
    mask: Tensor

    @property
    def padding_share(self) -> float:
        """Share of the slots that hold no token."""
        return 1.0 - self.lengths.sum().item() / self.mask.numel()


def make_batch(rows: int, longest: int, preset: str | None = None) -> RaggedBatch:
    """``rows`` rows, the longest of ``longest`` tokens; prompt and completion share a row."""
    drawn = lengths.draw(preset or options.lengths, rows).sum(axis=1)
    return _batch(lengths.scale_to(drawn, longest))


def make_pair_batch(
    rows: int, longest: int, preset: str | None = None
) -> tuple[RaggedBatch, RaggedBatch]:
    """Sources and targets; the longest of all has ``longest`` tokens."""
    drawn = lengths.scale_to(lengths.draw(preset or options.lengths, rows), longest)
    return _batch(drawn[:, 0]), _batch(drawn[:, 1])


def _batch(tokens: NDArray[np.int64]) -> RaggedBatch:
    tensor = torch.from_numpy(tokens).to(DEVICE)
    return RaggedBatch(tensor, torch.arange(int(tokens.max()), device=DEVICE) < tensor[:, None])


def measure(
    benchmark,
    function: Callable[[], object],
    *,
    batch: RaggedBatch | None = None,
    moved: int | None = None,
    rounds: int | None = None,
) -> None:
    """Time ``function``, including its work on the device.

    Args:
        batch: input of ``function``; its real tokens and padding share are recorded.
        moved: bytes that ``function`` must at least read and write, recorded as GB/s.
        rounds: number of rounds for a slow function; by default, pytest-benchmark chooses it.
    """

    def run_and_wait() -> None:
        function()
        if ON_GPU:
            torch.cuda.synchronize()

    notes = benchmark.extra_info
    notes["dtype"] = str(DTYPE)
    if batch is not None:
        notes["real tokens"] = int(batch.lengths.sum())
        notes["padding share"] = round(batch.padding_share, 3)
    if rounds is None:
        run_and_wait()  # compiles kernels and fills caches
        benchmark(run_and_wait)
    else:
        benchmark.pedantic(run_and_wait, rounds=rounds)
    if moved is not None and benchmark.stats is not None:
        notes["GB/s"] = round(moved / benchmark.stats.stats.median / 1e9, 1)


@cache
def ceilings() -> Ceilings:
    """Ceilings of this device, from the run's file or measured now."""
    return measure_ceilings() if options.ceilings is None else read_ceilings(options.ceilings)


def liger(name: str) -> Any:
    """A function of Liger Kernel. Skips the benchmark without a GPU or the package."""
    if not ON_GPU:
        pytest.skip("Liger Kernel needs a GPU")
    return getattr(pytest.importorskip("liger_kernel.transformers.functional"), name)
