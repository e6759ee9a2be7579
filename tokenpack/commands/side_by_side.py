"""Train a model padded and packed on the same batches, and time both.

The two runs alternate step by step, and the run that goes first alternates too. Other load on the
machine therefore affects both alike, and the ratio of their times within a step is more reliable
than either time. Forward and backward are timed apart from the optimizer, whose work is the same
in both runs.
"""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import packing_stats, patch_model
from ..cost import Operations, count_operations, count_packed, count_padded
from ..cost.allocations import peak_bytes

Batch = dict[str, Tensor]

LEARNING_RATE = 5e-4
WARMUP_STEPS = 5


@dataclass
class TrainingLog:
    """Measurements of one run, step by step. Times in seconds.

    Attributes:
        losses: loss of each step.
        forward_backward_seconds: time of forward and backward in each step.
        step_seconds: time of forward, backward and optimizer in each step.
        operations: floating-point operations of each step, counted.
        peak_bytes: memory that one forward and backward allocates on the largest batch.
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
        slots: per step, positions of the padded batch, on both sides of an encoder-decoder.
        tokens: per step, the number of slots that hold a real token.
        packed_calls: packed forwards of the patched model, including two of the memory probe.
        fallbacks: number of forwards that were not packed, by reason; empty in a valid run.
    """

    padded: TrainingLog
    packed: TrainingLog
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
        """The share of all slots, over all steps, that hold no token."""
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

        A disturbance in one step changes the ratio of that step, and hardly changes the median. It
        would change a ratio of sums.
        """
        return statistics.median(self.time_ratios)

    @property
    def ideal_ratio(self) -> float:
        """Median over the steps of padded / packed operations."""
        return statistics.median(self.ideal_ratios)

    @property
    def share_of_ideal(self) -> float:
        """Median over the steps of time ratio / ideal ratio.

        The operations of the steps differ widely, so each step is compared with its own ideal. On a
        quiet machine this equals ``time_ratio / ideal_ratio``; on a busy one it varies less.
        """
        return statistics.median(_ratios(self.time_ratios, self.ideal_ratios))

    @property
    def loss_differences(self) -> list[float]:
        """Per step, ``|padded - packed| / |padded|``."""
        return [abs(a - b) / abs(a) for a, b in zip(self.padded.losses, self.packed.losses)]

    def tokens_per_second(self, log: TrainingLog) -> float:
        """Real tokens per second of forward and backward in one of the runs, over all steps."""
        return sum(self.tokens) / sum(log.forward_backward_seconds)


def _ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(numerators, denominators)]


def train_side_by_side(
    model: nn.Module,
    batches: Sequence[Batch],
    device: torch.device,
    on_step: Callable[[float], None],
) -> Comparison:
    """Train ``model`` and a patched copy of it, one optimizer step per batch.

    Args:
        model: in the state that both runs start from. The padded run trains it in place.
        batches: padded batches, on the CPU.
        device: where to train. On CUDA under bf16 autocast.
        on_step: called with the loss after every step of either run.
    """
    models = {"padded": model.to(device).train()}
    models["packed"] = patch_model(copy.deepcopy(model))
    logs = {name: TrainingLog() for name in models}
    _probe_memory(models, logs, batches, device)
    trainers = {name: _Trainer(models[name], device) for name in models}
    for step, batch in enumerate(batches):
        batch = {key: value.to(device) for key, value in batch.items()}
        order = ("padded", "packed") if step % 2 == 0 else ("packed", "padded")
        for name in order:
            trainers[name].step(batch, logs[name])
            on_step(logs[name].losses[-1])
    for name, log in logs.items():
        log.operations = [
            count_operations(model, batch, packed=name == "packed") for batch in batches
        ]
    stats = packing_stats(models["packed"])
    return Comparison(
        padded=logs["padded"],
        packed=logs["packed"],
        slots=[count_padded(model, batch).tokens for batch in batches],
        tokens=[count_packed(model, batch).tokens for batch in batches],
        packed_calls=stats.packed_calls,
        fallbacks=dict(stats.fallbacks),
    )


class _Trainer:
    """AdamW with a linear warm-up; measures the time of its steps."""

    def __init__(self, model: nn.Module, device: torch.device):
        self.model = model
        self.device = device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS)
        )

    def step(self, batch: Batch, log: TrainingLog) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        begin = self._now()
        loss = _forward_backward(self.model, batch, self.device)
        computed = self._now()
        self.optimizer.step()
        end = self._now()
        self.schedule.step()
        log.losses.append(loss.item())
        log.forward_backward_seconds.append(computed - begin)
        log.step_seconds.append(end - begin)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _forward_backward(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        loss = model(**batch).loss
    loss.backward()
    return loss.detach()


def _probe_memory(
    models: dict[str, nn.Module],
    logs: dict[str, TrainingLog],
    batches: Sequence[Batch],
    device: torch.device,
) -> None:
    """Measure the peak memory of both models on the batch with the most slots.

    This batch would be the first to run out of memory. The probe also warms up the models before
    they are timed. Each model first runs on a single row, so that memory that is allocated only
    once is not counted.
    """
    largest = max(batches, key=lambda batch: batch["input_ids"].numel())
    largest = {key: value.to(device) for key, value in largest.items()}
    row = {key: value[:1] for key, value in largest.items()}
    for name, model in models.items():
        _forward_backward(model, row, device)
        model.zero_grad(set_to_none=True)
        run = functools.partial(_forward_backward, model, largest, device)
        logs[name].peak_bytes = peak_bytes(run, device)
        model.zero_grad(set_to_none=True)
