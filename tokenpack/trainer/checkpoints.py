"""Checkpoints that are complete or ignored, and runs that resume from them exactly.

transformers writes a checkpoint file by file, and may delete older checkpoints first. If the
process is killed meanwhile, the folder cannot be resumed from. Here, a state file is written last,
after all ranks have written their files. Only then are older checkpoints deleted.
``resume_from_checkpoint=True`` uses the last checkpoint that has a state file and all files that it
lists.

    tokenpack_state.json    marks the checkpoint as complete, and stores what transformers does not:
        files               size of each file of the checkpoint
        plan                the inputs of the plan; other inputs would give other batches
        epoch, batch        position to resume from; the epoch may have been ended early
        pass, batch, datasets   instead of these, for a dataset without a length (`passes`)
        loss                each rank's sum over the steps since the last log, and that log's step
        evaluate            an evaluation was due, and was postponed because of a stop request
        model_alone         whether ``save_only_model`` was set
        max_tokens_per_microbatch, counts, num_ranks

Only training draws from the global random number generators: an evaluation restores them, loaders
have generators of their own, and a resumed run restores them before it collates its first batch.
With ``dataloader_num_workers=0``, a collator that draws random numbers therefore makes the same
batches after a resume. Worker processes start again, so there the random numbers of a collator must
depend only on the example and the epoch (`T5SpanCorruptionCollatorFast`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from transformers.trainer_utils import HubStrategy, IntervalStrategy, sort_checkpoints
from transformers.utils import logging

from ..files import written_whole
from .out_of_memory import Counts, RngSnapshot
from .passes import Passes, warn_without_position
from .planning import PlanningMixin
from .sampler import TokenBudgetBatchSampler

logger = logging.get_logger(__name__)

STATE_NAME = "tokenpack_state.json"
_BACKUP = "-before"  # suffix of the previous checkpoint of a step that is saved again
_FOLDER = re.compile(rf"checkpoint-(\d+)({_BACKUP})?")


class CheckpointsMixin(PlanningMixin):
    """Saves and finds checkpoints.

    Attributes:
        first_epoch: the epoch in which `train` began.
        budget_resumed: whether the micro-batch budget in force comes from a checkpoint.
        passes: the position in a dataset without a length.
    """

    passes: Passes

    first_epoch = 0
    _first_batch = 0  # batches of it that are skipped
    budget_resumed = False
    _resumed: dict[str, Any] | None = None  # state of the checkpoint that the run resumes from
    _rng_due: str | None = None  # checkpoint with the random number generators of the next batches
    _rng_loaded: str | None = None
    _evaluation_postponed = False

    # -------------------------------------------------------------------------------------- saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        backup = folder.with_name(folder.name + _BACKUP)
        if self.args.should_save and folder.exists():
            # The step is saved again. Keep a complete checkpoint until that is done. Delete other
            # files, because they may come from a run with another number of ranks.
            _delete(backup)
            if _missing(folder) is None:
                folder.rename(backup)
            else:
                _delete(folder)
        self.accelerator.wait_for_everyone()
        with self._without_rotation():
            super()._save_checkpoint(model, trial)
        self._write_state(folder)
        if self.args.should_save:
            _delete(backup)
            self._delete_older(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Write the state file before an upload.

        The checkpoint of a run that stops is uploaded in any case. transformers does not if
        ``hub_strategy`` is ``"end"``, or while another upload runs.
        """
        self._write_state(Path(checkpoint_folder))
        if not self.stop_agreed:
            super()._push_from_checkpoint(checkpoint_folder)
            return
        self._finish_current_push()
        strategy = self.args.hub_strategy
        if strategy == HubStrategy.END:
            self.args.hub_strategy = HubStrategy.EVERY_SAVE
        try:
            super()._push_from_checkpoint(checkpoint_folder)
        finally:
            self.args.hub_strategy = strategy

    def _finalize_training(self, *args: Any) -> Any:
        """Keep the last checkpoint of a run that was stopped, even if it is not the best."""
        with self._without_rotation() if self.stop_agreed else contextlib.nullcontext():
            return super()._finalize_training(*args)

    @contextlib.contextmanager
    def _without_rotation(self) -> Iterator[None]:
        """Keep transformers from deleting older checkpoints."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    def _write_state(self, folder: Path) -> None:
        """Mark the checkpoint as complete, after all ranks have written their files."""
        losses = self.accelerator.gather(self._tr_loss.detach().reshape(1)).tolist()
        position = self._position()
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        runner = self.runner
        budget = {"set": self.budget.max_tokens_per_microbatch, "in_force": runner.max_tokens}
        _write_json(
            folder / STATE_NAME,
            {
                "files": _sizes(folder),
                "plan": None if self.plan is None else _describe(self.plan),
                **position,
                "loss": {"sums": losses, "since": self._globalstep_last_logged},
                "evaluate": self._evaluation_postponed,
                "model_alone": self.args.save_only_model,
                "max_tokens_per_microbatch": budget,
                "counts": dataclasses.asdict(runner.counts),
                "num_ranks": self.args.world_size,
            },
        )

    def _position(self) -> dict[str, Any]:
        """The epoch to resume in, and the number of its batches that are done."""
        if self.plan is None:
            position = self.passes.position
            return {**position, "datasets": gather_object([position.pop("dataset")])}
        epoch = self.plan.epoch
        done = round((self.state.epoch - epoch) * len(self.plan))
        if self.control.should_epoch_stop or done >= len(self.plan):
            return {"epoch": epoch + 1, "batch": 0}
        return {"epoch": epoch, "batch": done}

    def _delete_older(self, newest: Path) -> None:
        """Keep ``save_total_limit`` checkpoints, including the newest and the best.

        Incomplete checkpoints are deleted first.
        """
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        kept = {newest, Path(self.state.best_model_checkpoint or newest)}
        found = sort_checkpoints(output_dir=str(newest.parent), use_mtime=True)
        others = [folder for folder in map(Path, found) if folder not in kept]
        others.sort(key=lambda folder: (folder / STATE_NAME).exists())  # stable: oldest first
        surplus = len(found) - max(limit, len(found) - len(others))
        for folder in others[: max(surplus, 0)]:
            _delete(folder)

    # ------------------------------------------------------------------------------------ resuming

    def _checkpoint_to_resume(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Find the checkpoint to resume from, and restore its budget and counts.

        Raises:
            ValueError: if ``resume_from_checkpoint`` is True and there is no complete checkpoint.
        """
        self._resumed = self._rng_due = self._rng_loaded = None
        self._evaluation_postponed = self.budget_resumed = False
        if not resume_from_checkpoint:
            return None
        if resume_from_checkpoint is True:
            folder = self._last_complete_checkpoint()
        else:
            folder = str(resume_from_checkpoint)
        missing = _missing(Path(folder))
        if missing is not None:
            logger.warning(
                f"{folder}: {missing}. The checkpoint is incomplete, or another trainer wrote it."
            )
        state = Path(folder, STATE_NAME)
        if not state.is_file():
            return folder
        self._resumed = json.loads(state.read_text())
        budget = self._resumed["max_tokens_per_microbatch"]
        if budget["set"] == self.budget.max_tokens_per_microbatch:  # the user has not changed it
            self.runner.max_tokens, self.budget_resumed = budget["in_force"], True
        self.runner.counts = Counts(**self._resumed["counts"])
        if self._resumed["model_alone"]:
            logger.warning(
                f"{folder} contains only the model (save_only_model=True): the optimizer, the "
                "learning rate schedule and the random number generators start again"
            )
        return folder

    def _last_complete_checkpoint(self) -> str:
        """The last checkpoint that is complete on every rank."""
        output_dir = Path(self.args.output_dir)
        if self.args.should_save:
            _restore_backups(output_dir)
        self.accelerator.wait_for_everyone()
        found = _checkpoints(output_dir)
        complete = []
        for folder in found:
            missing = _missing(folder)
            if missing is None:
                complete.append(folder.name)
            elif self.args.should_save:
                logger.warning(f"Skipping {folder}: {missing}")
        if self.args.world_size > 1:
            by_rank = gather_object([complete])
            complete = [name for name in complete if all(name in names for names in by_rank)]
        if complete:
            return str(output_dir / complete[-1])
        raise ValueError(
            "resume_from_checkpoint must name a checkpoint if output_dir contains no complete one, "
            f"got True and output_dir={self.args.output_dir!r}, which contains "
            + (f"only the incomplete {found[-1].name}" if found else "no checkpoint")
        )

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """The epoch to resume in, and the number of its batches to skip."""
        epoch, skipped = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        state = self._resumed or {}
        if "epoch" in state and self.plan is not None:
            before, now = state["plan"], _describe(self.plan)
            if before == now:
                batch = state["batch"] - state["batch"] % self.args.gradient_accumulation_steps
                epoch, skipped = state["epoch"], 0 if self.args.ignore_data_skip else batch
            elif skipped:
                changed = ", ".join(
                    f"{name}={now[name]!r} (was {before.get(name)!r})"
                    for name in now
                    if now[name] != before.get(name)
                )
                logger.warning(
                    f"The batches differ from those of the resumed run: {changed}. This epoch may "
                    "repeat or skip examples."
                )
        if resume_from_checkpoint is not None and self.plan is None:
            epoch, skipped = self._resumed_pass(epoch, skipped)
        if resume_from_checkpoint is not None and self.state.global_step >= max_steps:
            # The run was complete except for the end of `train`. transformers would train one more
            # step.
            epoch, skipped = num_train_epochs, 0
        self._rng_due = resume_from_checkpoint if skipped else None
        self.first_epoch, self._first_batch = epoch, skipped
        return epoch, skipped

    def _resumed_pass(self, epoch: int, skipped: int) -> tuple[int, int]:
        """The pass to resume in and the batches to skip, of a dataset without a length."""
        state = self._resumed or {}
        if "pass" not in state:
            warn_without_position(skipped)
            return epoch, skipped
        ranks, rank = self.args.world_size, self.args.process_index
        if state["num_ranks"] != ranks:
            logger.warning(
                f"The run had {state['num_ranks']} ranks and now has {ranks}. Batches of a dataset "
                "without a length depend on the number of ranks, so samples repeat or are missed."
            )
        own = state["datasets"][rank] if rank < len(state["datasets"]) else None
        number, done = self.passes.resume(state, own, self.train_dataset)
        return number, 0 if self.args.ignore_data_skip else done

    def begin_pass(self, number: int) -> None:
        """Begin a pass over the dataset, which counts if it has no length."""
        if self.plan is not None:
            return
        skipped = self._first_batch if number == self.first_epoch else 0
        self.passes.begin(number, skipped, self.train_dataset)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and checkpoint == self._rng_loaded:
            self._rng_loaded = None  # transformers loads it again, after the first batches
            return
        super()._load_rng_state(checkpoint)

    def restore_rng(self) -> None:
        """Restore the random number generators before a resumed epoch collates its first batch."""
        if self._rng_due is not None:
            self._load_rng_state(self._rng_due)
            self._rng_loaded, self._rng_due = self._rng_due, None

    def restore_loss(self) -> None:
        """Restore the sum of losses since the last log."""
        if self._resumed is None:
            return
        sums = self._resumed["loss"]["sums"]
        mean = sum(sums) / len(sums)
        same_ranks = len(sums) == self.args.world_size
        self._tr_loss += sums[self.args.process_index] if same_ranks else mean
        self._total_loss_scalar -= mean  # this total covers only the current call of `train`
        self._globalstep_last_logged = self._resumed["loss"]["since"]

    def run_postponed_evaluation(self) -> None:
        """Run the evaluation that the resumed run postponed when it was stopped, if any."""
        if (self._resumed or {}).get("evaluate") and self.args.eval_strategy != IntervalStrategy.NO:
            metrics = self._evaluate(None, None)
            self._determine_best_metric(metrics=metrics, trial=None)

    def postpone_evaluation(self) -> None:
        """Record in the next checkpoint that an evaluation was due."""
        self._evaluation_postponed = True

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate during training without changing the random numbers of training."""
        rng = RngSnapshot(self.accelerator.device)
        python, numpy = random.getstate(), np.random.get_state()
        try:
            return super()._evaluate(*args, **kwargs)
        finally:
            rng.restore()
            random.setstate(python)
            np.random.set_state(numpy)


def _describe(plan: TokenBudgetBatchSampler) -> dict[str, Any]:
    """The inputs that determine the batches of a plan. The number of ranks does not matter."""
    return {
        "examples": len(plan.lengths),
        "lengths": zlib.crc32(plan.lengths.tobytes()),
        "max_tokens_per_batch": plan.max_tokens,
        "max_tokens_per_group": plan.max_tokens_per_group,
        "seed": plan.seed,
        "shuffle": plan.shuffle,
    }


def _checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in ``output_dir``, without backups, sorted by step."""
    found = [(_FOLDER.fullmatch(path.name), path) for path in output_dir.glob("checkpoint-*")]
    by_step = [(int(match[1]), path) for match, path in found if match and not match[2]]
    return [path for _, path in sorted(by_step) if path.is_dir()]


def _restore_backups(output_dir: Path) -> None:
    """Restore the backup of each checkpoint that was being saved again and is incomplete."""
    for backup in output_dir.glob(f"checkpoint-*{_BACKUP}"):
        folder = backup.with_name(backup.name.removesuffix(_BACKUP))
        if _missing(folder) is None:
            _delete(backup)
        else:
            _delete(folder)
            backup.rename(folder)


def _sizes(folder: Path) -> dict[str, int]:
    """The size in bytes of each file in ``folder``, except for the state file."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in files
        if path.name != STATE_NAME
    }


def _missing(folder: Path) -> str | None:
    """What is missing in a checkpoint, or None if it is complete."""
    state = folder / STATE_NAME
    if not state.is_file():
        return f"{STATE_NAME}, which is written last, is missing"
    for name, size in json.loads(state.read_text()).get("files", {}).items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        # A user may edit a JSON file and make it shorter.
        if path.stat().st_size < (1 if path.suffix == ".json" else size):
            return f"{name} is truncated"
    return None


def _delete(folder: Path) -> None:
    """Delete a checkpoint. If this is interrupted, the rest counts as incomplete."""
    shutil.rmtree(folder, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with written_whole(path) as partial, partial.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
