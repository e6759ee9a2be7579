"""Batches of uneven lengths, and how a call is timed on either kind of device."""

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tokenpack.cost import Ceilings, measure_ceilings, read_ceilings

from . import length_distributions as lengths

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
DEVICE_NAME = torch.cuda.get_device_name() if ON_GPU else "cpu"


@dataclasses.dataclass
class Chosen:
    """What the suites were asked to run on; see the options in `conftest`."""

    lengths: str = lengths.DEFAULT
    ceilings: Path | None = None

    def check(self) -> None:
        """Raise for lengths that there are not, before anything runs."""
        lengths.draw(self.lengths, 1)


chosen = Chosen()


class Batch(NamedTuple):
    """Lengths of a batch's rows, and where its real tokens are; the longest sets the width."""

    lengths: Tensor
    mask: Tensor

    @property
    def padding_share(self) -> float:
        """Share of the padded batch's slots that hold no token."""
        return 1.0 - self.lengths.sum().item() / self.mask.numel()


def make_batch(rows: int, longest: int, preset: str | None = None) -> Batch:
    """``rows`` of ``longest`` tokens at most, prompt and completion in one."""
    drawn = lengths.draw(preset or chosen.lengths, rows).sum(axis=1)
    return _batch(lengths.scaled_to(drawn, longest))


def make_pair_batch(rows: int, longest: int, preset: str | None = None) -> tuple[Batch, Batch]:
    """Sources and targets, ``longest`` the longest of both."""
    drawn = lengths.scaled_to(lengths.draw(preset or chosen.lengths, rows), longest)
    return _batch(drawn[:, 0]), _batch(drawn[:, 1])


def _batch(of_rows: lengths.Lengths) -> Batch:
    tensor = torch.from_numpy(of_rows).to(DEVICE)
    return Batch(tensor, torch.arange(int(of_rows.max()), device=DEVICE) < tensor[:, None])


def measure(
    benchmark,
    function: Callable[[], object],
    *,
    batch: Batch | None = None,
    moved: int | None = None,
    rounds: int | None = None,
) -> None:
    """Time ``function`` until the device is done with it.

    Args:
        batch: whose real tokens and padding are noted.
        moved: bytes that it must read and write at the least, noted as GB/s.
        rounds: where it takes so long that they are counted rather than timed.
    """

    def until_done() -> None:
        function()
        if ON_GPU:
            torch.cuda.synchronize()

    notes = benchmark.extra_info
    notes["dtype"] = str(DTYPE)
    if batch is not None:
        notes["real tokens"] = int(batch.lengths.sum())
        notes["padding share"] = round(batch.padding_share, 3)
    if rounds is None:
        until_done()  # compiles, and fills caches
        benchmark(until_done)
    else:
        benchmark.pedantic(until_done, rounds=rounds)
    if moved is not None and benchmark.stats is not None:
        notes["GB/s"] = round(moved / benchmark.stats.stats.median / 1e9, 1)


@cache
def ceilings() -> Ceilings:
    """Of this device: those that the run began with, or measured now."""
    return measure_ceilings() if chosen.ceilings is None else read_ceilings(chosen.ceilings)


def liger(name: str) -> Any:
    """A function of Liger Kernel, whose kernels need a GPU; skips where it cannot run."""
    if not ON_GPU:
        pytest.skip("Liger Kernel needs a GPU")
    return getattr(pytest.importorskip("liger_kernel.transformers.functional"), name)
