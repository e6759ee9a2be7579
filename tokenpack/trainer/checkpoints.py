"""Checkpoints that are complete or absent, and runs that resume as if they had never stopped.

transformers writes a checkpoint file by file, and deletes older checkpoints before the new one is
complete. If a process is killed in between, it cannot resume from the folder that it leaves. Here,
a marker file is written last, after all ranks have written their files. Older checkpoints are
deleted only after that. ``resume_from_checkpoint=True`` selects the last checkpoint that has the
marker and all files that the marker lists.

    tokenpack_state.json    the marker, with the state that transformers does not save:
        files               size of each file of the checkpoint
        plan                what the plan of the batches depends on; it must not change
        epoch, batch        the position in the plan, because an epoch may end early
        loss                each rank's sum since the last log, and the step of that log
        evaluate            an evaluation was due, but deferred because training had to stop
        model_alone         whether ``save_only_model`` was set
        max_tokens_per_microbatch, counts, num_ranks

Only training advances the random number generators of training: an evaluation restores them,
loaders have generators of their own, and a resumed run restores them before it collates its first
batch. Therefore, with ``dataloader_num_workers=0``, a collator that uses these generators makes the
same batches again. Workers start with new generators. There, a collator must derive its random
numbers from the example and the epoch, as `T5SpanCorruptionCollatorFast` does.
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
import torch
from accelerate.utils import gather_object
from transformers.trainer_utils import IntervalStrategy, sort_checkpoints
from transformers.utils import logging

from ..files import written_whole
from .base import TrainerBase
from .sampler import TokenBudgetBatchSampler
from .step import Counts, Dice

logger = logging.get_logger(__name__)

STATE_NAME = "tokenpack_state.json"
_BACKUP = "-before"  # suffix of a complete checkpoint while the same step is saved again
_FOLDER = re.compile(r"checkpoint-(\d+)")


class CheckpointsMixin(TrainerBase):
    """Save checkpoints, and resume from them.

    Attributes:
        first_epoch: the epoch in which `train` started.
        budget_resumed: whether the micro-batch budget in force comes from a checkpoint.
    """

    first_epoch = 0
    budget_resumed = False
    _resumed: dict[str, Any] | None = None  # the marker of the checkpoint to resume from
    _rng_checkpoint: str | None = None  # random states to load before the next batch
    _rng_loaded: str | None = None  # the checkpoint whose random states have been loaded early
    _evaluation_deferred = False

    # --------------------------------------------------------------------------------------- saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        backup = folder.with_name(folder.name + _BACKUP)
        if self.args.should_save and folder.exists():
            # This step is saved again. Until that is done, keep a complete checkpoint of it. Start
            # with an empty folder, because a run with more ranks may have left more files.
            _delete(backup)
            if _defect(folder) is None:
                folder.rename(backup)
            else:
                _delete(folder)
        self.accelerator.wait_for_everyone()
        with self._keeping_checkpoints():
            super()._save_checkpoint(model, trial)
        self._write_marker(folder)
        if self.args.should_save:
            _delete(backup)
            self._delete_older(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Write the marker before the upload."""
        self._write_marker(Path(checkpoint_folder))
        super()._push_from_checkpoint(checkpoint_folder)

    def _finalize_training(self, *args: Any) -> Any:
        """Keep the last checkpoint of a stopped run, even if it is not the best one."""
        with self._keeping_checkpoints() if self.stop_agreed else contextlib.nullcontext():
            return super()._finalize_training(*args)

    @contextlib.contextmanager
    def _keeping_checkpoints(self) -> Iterator[None]:
        """Prevent transformers from deleting older checkpoints."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    def _write_marker(self, folder: Path) -> None:
        """Write the marker after all ranks have written their files."""
        losses = self.accelerator.gather(self._tr_loss.detach().reshape(1)).tolist()
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        runner = self.runner
        in_force = {"set": self.budget.max_tokens_per_microbatch, "in_force": runner.max_tokens}
        _write_json(
            folder / STATE_NAME,
            {
                "files": _sizes(folder),
                "plan": None if self.plan is None else _plan_settings(self.plan),
                **self._position(),
                "loss": {"sums": losses, "since": self._globalstep_last_logged},
                "evaluate": self._evaluation_deferred,
                "model_alone": self.args.save_only_model,
                "max_tokens_per_microbatch": in_force,
                "counts": dataclasses.asdict(runner.counts),
                "num_ranks": self.args.world_size,
            },
        )

    def _position(self) -> dict[str, int]:
        """The epoch in which to continue, and the number of its batches that are done."""
        plan = self.plan
        if plan is None:
            return {}
        done = round((self.state.epoch - plan.epoch) * len(plan))
        if self.control.should_epoch_stop or done >= len(plan):
            return {"epoch": plan.epoch + 1, "batch": 0}
        return {"epoch": plan.epoch, "batch": done}

    def _delete_older(self, newest: Path) -> None:
        """Keep ``save_total_limit`` checkpoints, including the newest and the best one.

        Incomplete checkpoints are deleted first, then the oldest ones.
        """
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        protected = {newest, Path(self.state.best_model_checkpoint or newest)}
        found = sort_checkpoints(output_dir=str(newest.parent), use_mtime=True)
        others = [folder for folder in map(Path, found) if folder not in protected]
        others.sort(key=lambda folder: (folder / STATE_NAME).exists())  # stable: by age otherwise
        surplus = len(found) - max(limit, len(found) - len(others))
        for folder in others[: max(surplus, 0)]:
            _delete(folder)

    # ------------------------------------------------------------------------------------- resuming

    def _checkpoint_to_resume(self, resume_from: str | bool | None) -> str | None:
        """Return the checkpoint to resume from, and restore its micro-batch budget and counts.

        Args:
            resume_from: a folder, or True for the last complete checkpoint.

        Raises:
            ValueError: if ``resume_from`` is True and there is no complete checkpoint.
        """
        self._resumed = self._rng_checkpoint = self._rng_loaded = None
        self._evaluation_deferred = self.budget_resumed = False
        if not resume_from:
            return None
        folder = self._last_complete() if resume_from is True else str(resume_from)
        defect = _defect(Path(folder))
        if defect is not None:
            logger.warning(f"{folder} is incomplete, or from another trainer: {defect}")
        marker = Path(folder, STATE_NAME)
        if not marker.is_file():
            return folder
        self._resumed = json.loads(marker.read_text())
        budget = self._resumed["max_tokens_per_microbatch"]
        if budget["set"] == self.budget.max_tokens_per_microbatch:  # the user did not change it
            self.runner.max_tokens, self.budget_resumed = budget["in_force"], True
        self.runner.counts = Counts(**self._resumed["counts"])
        if self._resumed["model_alone"]:
            logger.warning(
                f"{folder} contains only the model (save_only_model=True): the optimizer, the "
                "learning rate schedule and the random numbers start again"
            )
        return folder

    def _last_complete(self) -> str:
        """The last checkpoint that is complete on every rank."""
        output_dir = Path(self.args.output_dir)
        if self.args.should_save:
            _restore_backups(output_dir)
        self.accelerator.wait_for_everyone()
        found = _checkpoints(output_dir)
        complete = []
        for folder in found:
            defect = _defect(folder)
            if defect is None:
                complete.append(folder.name)
            elif self.args.should_save:
                logger.warning(f"{folder} is skipped: {defect}")
        if self.args.world_size > 1:
            by_rank = gather_object([complete])
            complete = [name for name in complete if all(name in names for names in by_rank)]
        if complete:
            return str(output_dir / complete[-1])
        content = f"only {found[-1].name}, which is incomplete" if found else "no checkpoint"
        raise ValueError(
            f"resume_from_checkpoint=True requires a complete checkpoint, but output_dir="
            f"{self.args.output_dir!r} contains {content}; pass a folder to use that one"
        )

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """Return the epoch in which to continue, and the number of its batches to skip."""
        epoch, skipped = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        marker = self._resumed or {}
        if "epoch" in marker and self.plan is not None:
            old, new = marker["plan"], _plan_settings(self.plan)
            if old == new:
                epoch, batch = marker["epoch"], marker["batch"]
                batch -= batch % self.args.gradient_accumulation_steps  # steps start there
                skipped = 0 if self.args.ignore_data_skip else batch
            elif skipped:
                changed = ", ".join(
                    f"{name}={new[name]!r} (was {old.get(name)!r})"
                    for name in new
                    if new[name] != old.get(name)
                )
                logger.warning(
                    f"The batches differ from those of the run that is resumed: {changed}. This "
                    "epoch may skip or repeat examples."
                )
        if resume_from_checkpoint is not None and self.state.global_step >= max_steps:
            # The run did all of its steps, but `train` did not return. transformers would run
            # another step.
            epoch, skipped = num_train_epochs, 0
        self._rng_checkpoint = resume_from_checkpoint if skipped else None
        self.first_epoch = epoch
        return epoch, skipped

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and checkpoint == self._rng_loaded:
            self._rng_loaded = None  # transformers loads them after the first batches are collated
            return
        super()._load_rng_state(checkpoint)

    def restore_random_state(self) -> None:
        """Load the random states before the first batches of a resumed epoch are collated."""
        if self._rng_checkpoint is not None:
            self._load_rng_state(self._rng_checkpoint)
            self._rng_loaded, self._rng_checkpoint = self._rng_checkpoint, None

    def restore_loss(self) -> None:
        """Restore the sum of losses since the last log; the next log reports its mean."""
        if self._resumed is None:
            return
        sums = self._resumed["loss"]["sums"]
        mean = sum(sums) / len(sums)
        same_ranks = len(sums) == self.args.world_size
        self._tr_loss += sums[self.args.process_index] if same_ranks else mean
        self._total_loss_scalar -= mean  # the total covers only the steps of this call of `train`
        self._globalstep_last_logged = self._resumed["loss"]["since"]

    def run_deferred_evaluation(self) -> None:
        """Evaluate if the run that is resumed was stopped when an evaluation was due."""
        if (self._resumed or {}).get("evaluate") and self.args.eval_strategy != IntervalStrategy.NO:
            metrics = self._evaluate(None, None)
            self._determine_best_metric(metrics=metrics, trial=None)

    def defer_evaluation(self) -> None:
        """Record in the next checkpoint that an evaluation was due."""
        self._evaluation_deferred = True

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate during training, without changing the random numbers of training."""
        dice = Dice(self.accelerator.device)
        python, numpy = random.getstate(), np.random.get_state()
        try:
            return super()._evaluate(*args, **kwargs)
        finally:
            dice.roll_back()
            random.setstate(python)
            np.random.set_state(numpy)


def seed_generator(seed: int, epoch: int, generator: torch.Generator) -> None:
    """Seed the generator from which a loader draws the seeds of its workers."""
    generator.manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))


def _plan_settings(plan: TokenBudgetBatchSampler) -> dict[str, Any]:
    """All that the batches of a plan depend on. The number of ranks has no effect on them."""
    return {
        "examples": len(plan.lengths),
        "lengths": zlib.crc32(plan.lengths.tobytes()),
        "max_tokens_per_batch": plan.max_tokens,
        "max_tokens_per_group": plan.max_tokens_per_group,
        "seed": plan.seed,
        "shuffle": plan.shuffle,
    }


def _checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders, sorted by step."""
    found = [(_FOLDER.fullmatch(path.name), path) for path in output_dir.glob("checkpoint-*")]
    ours = [(int(match[1]), path) for match, path in found if match]
    return [path for _, path in sorted(ours) if path.is_dir()]


def _restore_backups(output_dir: Path) -> None:
    """Restore each backup whose step was never completely saved again; delete the others."""
    for backup in output_dir.glob(f"checkpoint-*{_BACKUP}"):
        folder = backup.with_name(backup.name.removesuffix(_BACKUP))
        if _defect(folder) is None:
            _delete(backup)
        else:
            _delete(folder)
            backup.rename(folder)


def _sizes(folder: Path) -> dict[str, int]:
    """The size in bytes of each file, except for the marker, by its path in ``folder``."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in files
        if path.name != STATE_NAME
    }


def _defect(folder: Path) -> str | None:
    """Why a checkpoint is incomplete; None if it is complete."""
    marker = folder / STATE_NAME
    if not marker.is_file():
        return f"{STATE_NAME}, which is written last, is missing"
    for name, size in json.loads(marker.read_text()).get("files", {}).items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        # A user may edit a JSON file and make it shorter.
        if path.stat().st_size < (1 if path.suffix == ".json" else size):
            return f"{name} is truncated"
    return None


def _delete(folder: Path) -> None:
    """Delete a folder. If this is interrupted, files that the marker lists are missing."""
    shutil.rmtree(folder, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with written_whole(path) as partial, partial.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
