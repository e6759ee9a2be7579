"""The state that the parts of the trainers share."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from .arguments import TokenBudget
from .loading import PlannedCollator, PlannedDataset
from .microbatch import PlannedBatch
from .sampler import TokenBudgetBatchSampler
from .signals import StopSignals
from .step import StepRunner


class TrainerBase(Trainer):
    """transformers' trainer, with the attributes that the mixins share.

    Attributes:
        budget: the token budget.
        runner: runs the optimizer steps.
        plan: the plan of the training batches. None before training, and for an `IterableDataset`.
        planned_dataset, planned_collator: the view of the training dataset and the collate function
            of its loader.
        dropped_examples, truncated_examples: training examples that ``overlong`` changed.
    """

    budget: TokenBudget
    runner: StepRunner
    plan: TokenBudgetBatchSampler | None
    planned_dataset: PlannedDataset
    planned_collator: PlannedCollator
    evaluated_prefix: str | None = None  # of the metrics of the last evaluation
    dropped_examples: int
    truncated_examples: int
    # Attributes of transformers that the mixins replace for a while.
    compute_loss: Any
    compute_metrics: Any
    data_collator: Any
    model_wrapped: Any
    _step_batches: list[PlannedBatch]
    _stop: StopSignals
    _stop_agreed: bool
    _last_logged: float  # time of the last log, for tokens per second

    @property
    def stop_agreed(self) -> bool:
        """Whether some rank has received a request to stop, and all ranks have been informed."""
        return self._stop_agreed or (self.args.world_size == 1 and self._stop.requested)

    def restart_clock(self, now: float) -> None:
        """Measure tokens per second from ``now``."""
        self._last_logged = now

    def find_microbatch(self) -> None:
        """Search for the largest micro-batch budget that fits in memory, and use it."""
        raise NotImplementedError
