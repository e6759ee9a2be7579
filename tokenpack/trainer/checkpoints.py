"""Checkpoints that are whole or not there, and runs that go on from one as if never stopped.

transformers writes a checkpoint file by file, and deletes older ones before it is sure to have a
newer. A process that is killed meanwhile leaves a folder that cannot be resumed from. Here a mark
is written last, once all ranks have written their files; only then are older checkpoints deleted;
and ``resume_from_checkpoint=True`` takes the last checkpoint that bears the mark and holds the
files that the mark names.

    tokenpack_state.json    the mark, with what transformers does not save:
        files               size of each file of the checkpoint
        plan                what batches were planned by: with another plan, others would follow
        epoch, batch        where in it to go on; epochs may have been ended early
        loss                each rank's sum over the steps since the last log; which step that was
        evaluate            an evaluation was due, and put off because training was to stop
        model_alone         by ``save_only_model``
        max_tokens_per_microbatch, counts, num_ranks

The random numbers of training are drawn by training alone: an evaluation gives them back, loaders
have generators of their own, and a resumed run has them before its first batch is collated. So with
``dataloader_num_workers=0`` a collator that draws from them makes the same batches; in workers,
which begin anew, one that draws by example and epoch does (`T5SpanCorruptionCollatorFast`).
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
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers.trainer_utils import IntervalStrategy, sort_checkpoints
from transformers.utils import logging

from ..files import written_whole
from .base import TrainerBase
from .step import Counts, Dice

if TYPE_CHECKING:
    from .sampler import TokenBudgetBatchSampler

logger = logging.get_logger(__name__)

STATE_NAME = "tokenpack_state.json"
_ASIDE = "-before"  # of a checkpoint whose step is being saved again
_FOLDER = re.compile(rf"checkpoint-(\d+)({_ASIDE})?")


class CheckpointsMixin(TrainerBase):
    """Saving and finding checkpoints.

    Attributes:
        first_epoch: the epoch that `train` began with.
        budget_resumed: whether the micro-batch budget in force comes from a checkpoint.
    """

    first_epoch = 0
    budget_resumed = False
    _resumed: dict[str, Any] | None = None  # the mark of the checkpoint that is resumed from
    _rng_due: str | None = None  # where the random numbers of the next batches lie
    _rng_loaded: str | None = None
    _put_off_evaluation = False

    # --------------------------------------------------------------------------------------- saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        aside = folder.with_name(folder.name + _ASIDE)
        if self.args.should_save and folder.exists():
            # A step that is saved again. Until that is done, what was whole must stay so; and what
            # another number of ranks left must not be taken for this run's.
            _delete(aside)
            if _missing(folder) is None:
                folder.rename(aside)
            else:
                _delete(folder)
        self.accelerator.wait_for_everyone()
        with self._deleting_none():
            super()._save_checkpoint(model, trial)
        self._mark_whole(folder)
        if self.args.should_save:
            _delete(aside)
            self._delete_older(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """What is uploaded bears the mark as well."""
        self._mark_whole(Path(checkpoint_folder))
        super()._push_from_checkpoint(checkpoint_folder)

    def _finalize_training(self, *args: Any) -> Any:
        """A run that was stopped keeps its last checkpoint, though it may not be the best."""
        with self._deleting_none() if self.stop_agreed else contextlib.nullcontext():
            return super()._finalize_training(*args)

    @contextlib.contextmanager
    def _deleting_none(self) -> Iterator[None]:
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    def _mark_whole(self, folder: Path) -> None:
        """Once all ranks have come here."""
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
                "plan": None if self.plan is None else _described(self.plan),
                **self._position(),
                "loss": {"sums": losses, "since": self._globalstep_last_logged},
                "evaluate": self._put_off_evaluation,
                "model_alone": self.args.save_only_model,
                "max_tokens_per_microbatch": in_force,
                "counts": dataclasses.asdict(runner.counts),
                "num_ranks": self.args.world_size,
            },
        )

    def _position(self) -> dict[str, int]:
        """The epoch to go on in, and how many of its batches are done."""
        plan: TokenBudgetBatchSampler | None = self.plan
        if plan is None:
            return {}
        done = round((self.state.epoch - plan.epoch) * len(plan))
        if self.control.should_epoch_stop or done >= len(plan):
            return {"epoch": plan.epoch + 1, "batch": 0}
        return {"epoch": plan.epoch, "batch": done}

    def _delete_older(self, newest: Path) -> None:
        """Keep ``save_total_limit`` checkpoints, the newest and the best among them.

        Those that are not whole go first.
        """
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        kept = {newest, Path(self.state.best_model_checkpoint or newest)}
        found = sort_checkpoints(output_dir=str(newest.parent), use_mtime=True)
        others = [folder for folder in map(Path, found) if folder not in kept]
        others.sort(key=lambda folder: (folder / STATE_NAME).exists())  # else the oldest first
        surplus = len(found) - max(limit, len(found) - len(others))
        for folder in others[: max(surplus, 0)]:
            _delete(folder)

    # ------------------------------------------------------------------------------------- resuming

    def _whole_checkpoint(self, asked: str | bool | None) -> str | None:
        """The checkpoint to resume from, its budget put in force.

        Raises:
            ValueError: if the last one is asked for and there is none, or none that is whole.
        """
        self._resumed = self._rng_due = self._rng_loaded = None
        self._put_off_evaluation = self.budget_resumed = False
        if not asked:
            return None
        folder = self._last_whole() if asked is True else str(asked)
        missing = _missing(Path(folder))
        if missing is not None:
            logger.warning(f"{folder}: {missing}. It is another trainer's, or not whole.")
        mark = Path(folder, STATE_NAME)
        if not mark.is_file():
            return folder
        self._resumed = json.loads(mark.read_text())
        budget = self._resumed["max_tokens_per_microbatch"]
        if budget["set"] == self.budget.max_tokens_per_microbatch:  # else the user set it anew
            self.runner.max_tokens, self.budget_resumed = budget["in_force"], True
        self.runner.counts = Counts(**self._resumed["counts"])
        if self._resumed["model_alone"]:
            logger.warning(
                f"{folder} holds the model alone (save_only_model=True): optimizer, learning rate "
                "and random numbers begin anew"
            )
        return folder

    def _last_whole(self) -> str:
        """The last checkpoint that every rank finds whole."""
        output_dir = Path(self.args.output_dir)
        if self.args.should_save:
            _put_back(output_dir)
        self.accelerator.wait_for_everyone()
        found = _checkpoints(output_dir)
        whole = []
        for folder in found:
            missing = _missing(folder)
            if missing is None:
                whole.append(folder.name)
            elif self.args.should_save:
                logger.warning(f"{folder} is passed over: {missing}")
        if self.args.world_size > 1:
            everyone = gather_object([whole])
            whole = [name for name in whole if all(name in names for names in everyone)]
        if whole:
            return str(output_dir / whole[-1])
        raise ValueError(
            f"resume_from_checkpoint=True, but output_dir={self.args.output_dir!r} holds "
            + (f"only {found[-1].name}, not whole (name it to use it)" if found else "none")
        )

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """The epoch to go on in, and batches of it to skip."""
        epoch, skipped = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        mark = self._resumed or {}
        if "epoch" in mark and self.plan is not None:
            was, now = mark["plan"], _described(self.plan)
            if was == now:
                whole_steps = mark["batch"] - mark["batch"] % self.args.gradient_accumulation_steps
                epoch, skipped = mark["epoch"], 0 if self.args.ignore_data_skip else whole_steps
            elif skipped:
                changed = ", ".join(
                    f"{name}={now[name]!r} (was {was.get(name)!r})"
                    for name in now
                    if now[name] != was.get(name)
                )
                logger.warning(
                    f"Batches are not those of the run that is resumed: {changed}. In this epoch, "
                    "examples may be left out or come again."
                )
        if resume_from_checkpoint is not None and self.state.global_step >= max_steps:
            # It was complete, and only the end of `train` was not reached. transformers would train
            # a further step.
            epoch, skipped = num_train_epochs, 0
        self._rng_due = resume_from_checkpoint if skipped else None
        self.first_epoch = epoch
        return epoch, skipped

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and checkpoint == self._rng_loaded:
            self._rng_loaded = None  # transformers' way is to do this after the first batches
            return
        super()._load_rng_state(checkpoint)

    def take_up_random_numbers(self) -> None:
        """Before the first batches of a resumed epoch are collated."""
        if self._rng_due is not None:
            self._load_rng_state(self._rng_due)
            self._rng_loaded, self._rng_due = self._rng_due, None

    def take_up_loss(self) -> None:
        """Go on with the sum that the next log is the mean of."""
        if self._resumed is None:
            return
        sums = self._resumed["loss"]["sums"]
        mean = sum(sums) / len(sums)
        same_ranks = len(sums) == self.args.world_size
        self._tr_loss += sums[self.args.process_index] if same_ranks else mean
        self._total_loss_scalar -= mean  # which is of this call to `train` alone
        self._globalstep_last_logged = self._resumed["loss"]["since"]

    def take_up_evaluation(self) -> None:
        """Evaluate if that was put off when the run that is resumed was stopped."""
        if (self._resumed or {}).get("evaluate") and self.args.eval_strategy != IntervalStrategy.NO:
            metrics = self._evaluate(None, None)
            self._determine_best_metric(metrics=metrics, trial=None)

    def put_off_evaluation(self) -> None:
        """Note in the next checkpoint that an evaluation was due."""
        self._put_off_evaluation = True

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """In training: whether and when one evaluates changes nothing in what is trained."""
        dice = Dice(self.accelerator.device)
        python, numpy = random.getstate(), np.random.get_state()
        try:
            return super()._evaluate(*args, **kwargs)
        finally:
            dice.roll_back()
            random.setstate(python)
            np.random.set_state(numpy)


def seeded(seed: int, epoch: int, generator: torch.Generator) -> None:
    """Let a loader give its workers seeds that follow from these."""
    generator.manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))


def _described(plan: TokenBudgetBatchSampler) -> dict[str, Any]:
    """What a plan's batches follow from; the number of ranks is not of it."""
    return {
        "examples": len(plan.lengths),
        "lengths": zlib.crc32(plan.lengths.tobytes()),
        "max_tokens_per_batch": plan.max_tokens,
        "max_tokens_per_group": plan.max_tokens_per_group,
        "seed": plan.seed,
        "shuffle": plan.shuffle,
    }


def _checkpoints(output_dir: Path) -> list[Path]:
    """By step."""
    found = [(_FOLDER.fullmatch(path.name), path) for path in output_dir.glob("checkpoint-*")]
    ours = [(int(match[1]), path) for match, path in found if match and not match[2]]
    return [path for _, path in sorted(ours) if path.is_dir()]


def _put_back(output_dir: Path) -> None:
    """What was put aside for a checkpoint of the same step, if that was never finished."""
    for aside in output_dir.glob(f"checkpoint-*{_ASIDE}"):
        folder = aside.with_name(aside.name.removesuffix(_ASIDE))
        if _missing(folder) is None:
            _delete(aside)
        else:
            _delete(folder)
            aside.rename(folder)


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in files
        if path.name != STATE_NAME
    }


def _missing(folder: Path) -> str | None:
    """What a checkpoint lacks to be whole, if anything."""
    mark = folder / STATE_NAME
    if not mark.is_file():
        return f"there is no {STATE_NAME} in it, which is written last"
    for name, size in json.loads(mark.read_text()).get("files", {}).items():
        path = folder / name
        if not path.is_file():
            return f"there is no {name}"
        # Whoever edits a text may well shorten it.
        if path.stat().st_size < (1 if path.suffix == ".json" else size):
            return f"{name} is cut short"
    return None


def _delete(folder: Path) -> None:
    """What is left of this when it is cut short is not whole: it lacks what the mark names."""
    shutil.rmtree(folder, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with written_whole(path) as partial, partial.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
