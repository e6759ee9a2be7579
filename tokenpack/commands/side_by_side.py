"""Train a model padded and packed at once, on the same batches, and time both.

The two take turns step by step, and the one that goes first alternates: whatever else the machine
does then falls on both alike, and the ratio of their times within a step is worth more than either
time. Forward and backward are timed apart from the optimizer, whose work is the same for both.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from .. import packing_stats, patch_model
from ..cost import Operations, count_operations, count_packed, count_padded

Batch = dict[str, Tensor]

LEARNING_RATE = 5e-4
WARMUP_STEPS = 5


@dataclass
class Side:
    """What one of the two runs did, step by step. Times in seconds.

    Attributes:
        step_seconds: forward, backward and optimizer together.
        peak_bytes: memory that a forward and backward takes beyond what is there before it.
    """

    losses: list[float] = field(default_factory=list)
    forward_backward_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    operations: list[Operations] = field(default_factory=list)
    peak_bytes: int = 0


@dataclass
class Comparison:
    """A padded and a packed run over the same batches.

    Attributes:
        slots: per step, positions of the padded batch, both sides of an encoder-decoder.
        tokens: per step, those of them that are real.
        packed_calls: forwards of the patched model that were packed, two of the memory probe
            among them.
        fallbacks: forwards that were not, by reason; should be empty.
    """

    padded: Side
    packed: Side
    slots: list[int]
    tokens: list[int]
    packed_calls: int
    fallbacks: dict[str, int]

    @property
    def padding_shares(self) -> list[float]:
        """Per step, the share of the slots that hold no token."""
        return [1 - tokens / slots for tokens, slots in zip(self.tokens, self.slots)]

    @property
    def padding_share(self) -> float:
        """The share of all steps' slots that hold no token."""
        return 1 - sum(self.tokens) / sum(self.slots)

    @property
    def time_ratios(self) -> list[float]:
        """Per step, padded / packed time of forward and backward."""
        return _ratios(self.padded.forward_backward_seconds, self.packed.forward_backward_seconds)

    @property
    def ideal_ratios(self) -> list[float]:
        """Per step, padded / packed operations."""
        return _ratios(
            [operations.total for operations in self.padded.operations],
            [operations.total for operations in self.packed.operations],
        )

    @property
    def time_ratio(self) -> float:
        """Median over the steps of padded / packed time, forward and backward.

        The median of ratios within a step: a disturbance that hits one step moves neither it nor,
        as a ratio of sums would, the result.
        """
        return statistics.median(self.time_ratios)

    @property
    def ideal_ratio(self) -> float:
        """Median over the steps of padded / packed operations."""
        return statistics.median(self.ideal_ratios)

    @property
    def share_of_ideal(self) -> float:
        """Median over the steps of the time ratio by the ratio of operations.

        Each step's times are held against its own operations, which differ widely; on a quiet
        machine it is ``time_ratio / ideal_ratio``, on a busy one it wavers less.
        """
        return statistics.median(_ratios(self.time_ratios, self.ideal_ratios))

    @property
    def loss_differences(self) -> list[float]:
        """Per step, ``|padded - packed| / |padded|``."""
        return [abs(a - b) / abs(a) for a, b in zip(self.padded.losses, self.packed.losses)]

    def tokens_per_second(self, side: Side) -> float:
        """Real tokens per second of forward and backward, over all steps."""
        return sum(self.tokens) / sum(side.forward_backward_seconds)


def _ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(numerators, denominators)]


def train_side_by_side(
    model: nn.Module,
    batches: Sequence[Batch],
    device: torch.device,
    on_step: Callable[[float], None],
) -> Comparison:
    """Train ``model`` as it is and a patched copy of it, one optimizer step per batch.

    Args:
        model: in the state both begin with; trained in place, as the padded side.
        batches: padded batches, on the CPU.
        device: where to train. On CUDA under bf16 autocast.
        on_step: called with the loss after every step of either side.
    """
    models = {"padded": model.to(device).train()}
    models["packed"] = patch_model(copy.deepcopy(model))
    sides = {name: Side() for name in models}
    _probe_memory(models, sides, batches, device)
    trainers = {name: _Trainer(models[name], device) for name in models}
    for step, batch in enumerate(batches):
        batch = {key: value.to(device) for key, value in batch.items()}
        order = ("padded", "packed") if step % 2 == 0 else ("packed", "padded")
        for name in order:
            trainers[name].step(batch, sides[name])
            on_step(sides[name].losses[-1])
    for name, side in sides.items():
        side.operations = [
            count_operations(model, batch, packed=name == "packed") for batch in batches
        ]
    stats = packing_stats(models["packed"])
    return Comparison(
        padded=sides["padded"],
        packed=sides["packed"],
        slots=[count_padded(model, batch).tokens for batch in batches],
        tokens=[count_packed(model, batch).tokens for batch in batches],
        packed_calls=stats.packed_calls,
        fallbacks=dict(stats.fallbacks),
    )


class _Trainer:
    """AdamW with a linear warm-up, and a clock."""

    def __init__(self, model: nn.Module, device: torch.device):
        self.model = model
        self.device = device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS)
        )

    def step(self, batch: Batch, side: Side) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        begin = self._now()
        loss = _forward_backward(self.model, batch, self.device)
        computed = self._now()
        self.optimizer.step()
        end = self._now()
        self.schedule.step()
        side.losses.append(loss.item())
        side.forward_backward_seconds.append(computed - begin)
        side.step_seconds.append(end - begin)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _forward_backward(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        loss = model(**batch).loss
    loss.backward()
    return loss.detach()


# ------------------------------------------------------------------------------------------- memory


def _probe_memory(
    models: dict[str, nn.Module],
    sides: dict[str, Side],
    batches: Sequence[Batch],
    device: torch.device,
) -> None:
    """Measure both on the batch with the most slots, the one that would run out of memory.

    Doubles as the warm-up of the timing. Before it each model runs on a single row, so that what is
    allocated once and for all is not counted.
    """
    largest = max(batches, key=lambda batch: batch["input_ids"].numel())
    largest = {key: value.to(device) for key, value in largest.items()}
    row = {key: value[:1] for key, value in largest.items()}
    for name, model in models.items():
        _forward_backward(model, row, device)
        model.zero_grad(set_to_none=True)
        run = functools.partial(_forward_backward, model, largest, device)
        sides[name].peak_bytes = peak_bytes(run, device)
        model.zero_grad(set_to_none=True)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most memory that tensors take while ``run()`` runs, beyond what they take before it.

    On CUDA by the allocator's own statistics. The CPU's allocator keeps none, but reports every
    allocation and release, those inside C++ operators too, to torch's profiler: their running sum
    is what the statistics would be. Unlike the process's resident memory it does not depend on what
    the system has got back so far. Scratch memory of the matrix libraries is in neither.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    current = peak = 0
    for _, change in sorted(changes, key=lambda timed: timed[0]):
        current += change
        peak = max(peak, current)
    return peak


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler warns, in C++, of releases whose allocation it did not see: no matter here."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
