"""What a trainer does at the seams of transformers' loop."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from .checkpoints import CheckpointsMixin


class PlanCallback(TrainerCallback):
    """Tells the plan of each epoch, prints it if asked, and ends training after a signal."""

    def __init__(self, trainer: CheckpointsMixin) -> None:
        self._trainer = trainer
        self._epoch = 0
        self._stopping = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Go on where training is resumed at; probe, print."""
        trainer = self._trainer
        plan = trainer.plan
        self._epoch, self._stopping = trainer.first_epoch, False
        trainer.set_plan_epoch(self._epoch)
        if plan is not None and trainer.budget.debug and state.is_world_process_zero:
            print(plan.describe())
        if trainer.budget.auto_find_microbatch and not trainer.budget_resumed:
            trainer.find_microbatch()
        trainer.restore_loss()
        trainer.run_deferred_evaluation()
        trainer.restart_clock(time.perf_counter())

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Before the loader is asked for the epoch's batches."""
        self._trainer.set_plan_epoch(self._epoch)
        self._epoch += 1

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """All ranks heard of the signal with the step's numbers, so all stop at this one.

        There may be little time before a harder signal: an evaluation that is due waits until
        training is resumed.
        """
        if self._trainer.stop_agreed:
            self._stopping = True
            at_end = float(state.epoch or 0).is_integer() or control.should_epoch_stop
            if control.should_evaluate or (args.eval_strategy == IntervalStrategy.EPOCH and at_end):
                self._trainer.defer_evaluation()
            control.should_evaluate = False
            control.should_training_stop = control.should_save = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """An epoch that was cut short is neither evaluated nor saved as one."""
        if self._stopping:
            control.should_evaluate = control.should_save = False
        return control
