"""Batches of uneven lengths, and how a call is timed on either kind of device."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


class Batch(NamedTuple):
    """Lengths as text has them: many short, a few long, the longest sets the width."""

    lengths: Tensor
    mask: Tensor

    @property
    def padding_share(self) -> float:
        """Share of the padded batch's slots that hold no token."""
        return 1.0 - self.lengths.sum().item() / self.mask.numel()


def make_batch(rows: int, longest: int) -> Batch:
    """``rows`` lengths up to ``longest``, log-normal, the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(rows, generator=generator) * 0.8).exp() * longest / 6
    lengths = lengths.long().clamp(1, longest)
    lengths[0] = longest
    lengths = lengths.to(DEVICE)
    return Batch(lengths, torch.arange(longest, device=DEVICE) < lengths[:, None])


def measure(benchmark, batch: Batch, function: Callable[[], object]) -> None:
    """Time ``function`` until the device is done with it."""

    def until_done() -> None:
        function()
        if ON_GPU:
            torch.cuda.synchronize()

    until_done()  # compiles, and fills caches
    benchmark.extra_info["device"] = torch.cuda.get_device_name() if ON_GPU else "cpu"
    benchmark.extra_info["dtype"] = str(DTYPE)
    benchmark.extra_info["real tokens"] = int(batch.lengths.sum())
    benchmark.extra_info["padding share"] = round(batch.padding_share, 3)
    benchmark(until_done)
