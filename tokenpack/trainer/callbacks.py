"""The callback that connects transformers' training loop with the plan and the checkpoints."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from .checkpoints import CheckpointsMixin


class PlanCallback(TrainerCallback):
    """Sets the epoch of the plan, continues a resumed run, and ends training after a signal."""

    def __init__(self, trainer: CheckpointsMixin) -> None:
        self._trainer = trainer
        self._epoch = 0
        self._stopping = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Restore the position of a resumed run, print the plan, and probe for the budget."""
        trainer = self._trainer
        self._epoch, self._stopping = trainer.first_epoch, False
        trainer.set_plan_epoch(self._epoch)
        if trainer.plan is not None and trainer.budget.debug and state.is_world_process_zero:
            print(trainer.plan.describe())
        if trainer.budget.auto_find_microbatch and not trainer.budget_resumed:
            trainer.find_microbatch()
        trainer.restore_loss()
        trainer.run_postponed_evaluation()
        trainer.restart_clock(time.perf_counter())

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Set the epoch before the loader yields its first batch."""
        self._trainer.set_plan_epoch(self._epoch)
        self._trainer.begin_pass(self._epoch)
        self._epoch += 1

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Stop after this step if any rank has received a signal.

        All ranks learn of the signal in the exchange of the step, so all stop at the same step. An
        evaluation that is due is postponed until training is resumed, because a second, harder
        signal may follow soon.
        """
        if self._trainer.stop_agreed:
            self._stopping = True
            at_end = float(state.epoch or 0).is_integer() or control.should_epoch_stop
            if control.should_evaluate or (args.eval_strategy == IntervalStrategy.EPOCH and at_end):
                self._trainer.postpone_evaluation()
            control.should_evaluate = False
            control.should_training_stop = control.should_save = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Do not evaluate or save at the end of an epoch that was stopped early."""
        if self._stopping:
            control.should_evaluate = control.should_save = False
        return control
