"""What the parts of a token-budget trainer share: the attributes and methods that they use.

Evaluation, checkpoints, the callback and the memory probe each use a trainer. They import this
class instead of the trainer itself, because the trainer imports them.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import Trainer

from .arguments import TokenBudget
from .loading import PlannedCollator, PlannedDataset
from .sampler import TokenBudgetBatchSampler
from .signals import StopSignals
from .step import StepRunner


class TrainerBase(Trainer):
    """The interface between the parts of `TokenBudgetTrainer`, which implements it.

    Attributes:
        budget: the `TokenBudget` as the user set it.
        runner: runs optimizer steps. ``runner.max_tokens`` is the micro-batch budget in force.
        planned_dataset: the training examples that the plan refers to.
        planned_collator: collates training examples.
    """

    budget: TokenBudget
    runner: StepRunner
    planned_dataset: PlannedDataset
    planned_collator: PlannedCollator
    data_collator: Any  # Trainer's own, which evaluation and steps replace for some time
    compute_metrics: Any
    compute_loss: Any
    model_wrapped: Any
    _plan: TokenBudgetBatchSampler | None
    _stop: StopSignals
    _stop_agreed: bool
    _last_logged: float  # time.perf_counter() at the last training log

    @property
    def plan(self) -> TokenBudgetBatchSampler | None:
        """The plan of the training batches; None before training and for an `IterableDataset`."""
        return self._plan

    @property
    def stop_agreed(self) -> bool:
        """Whether a rank received a stop signal and all ranks have been notified."""
        return self._stop_agreed or (self.args.world_size == 1 and self._stop.requested)

    def restart_clock(self, now: float) -> None:
        """Measure tokens per second from ``now``, a value of `time.perf_counter`."""
        self._last_logged = now

    def set_plan_epoch(self, epoch: int) -> None:
        """Shuffle the training batches for ``epoch``."""
        raise NotImplementedError

    def find_microbatch(self) -> None:
        """Set the micro-batch budget to the largest one that fits into memory."""
        raise NotImplementedError

    def _lengths_of(self, dataset: Any) -> NDArray[np.int64]:
        """``(n, 2)`` source and target tokens of each example."""
        raise NotImplementedError

    def _planned_loader(
        self, dataset: PlannedDataset, sampler: Any, description: str
    ) -> DataLoader[Any]:
        """A loader of ``sampler``'s batches, which accelerate does not shard."""
        raise NotImplementedError

    def _with_decoder_inputs(self, inputs: Any) -> dict[str, Any]:
        """The inputs, with ``decoder_input_ids`` if the loss removes the labels from them."""
        raise NotImplementedError

    def _by_itself(self) -> contextlib.AbstractContextManager[None]:
        """Compute losses per micro-batch, without averaging over ranks."""
        raise NotImplementedError
