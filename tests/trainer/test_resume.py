"""A run that is stopped or killed, and resumed, is bit-identical on the CPU to one that is not."""

import contextlib
import dataclasses
import inspect
import json
import multiprocessing as mp
import os
import random
import shutil
import signal
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)

from tokenpack.data import T5SpanCorruptionCollatorFast
from tokenpack.trainer import checkpoints
from tokenpack.trainer.checkpoints import STATE_NAME
from tokenpack.trainer.signals import StopSignals

from ..adapters.models import T5, VOCABULARY
from ..data.test_seq2seq import make_tokenizer
from .setting import collate, make_examples, make_trainer, on_ranks

# 40 examples in 5 batches. With two batches per step, the steps of an epoch have 2, 2 and 1.
EXAMPLES = make_examples(40)
OPTIONS = {
    "num_train_epochs": 3,
    "gradient_accumulation_steps": 2,
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "warmup_steps": 4,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "save_strategy": "steps",
    "save_steps": 2,
    "max_tokens_per_batch": 250,
    "max_tokens_per_microbatch": 250,
}


def t5(dropout=0.1, **options):
    """The T5 of the other tests, but smaller, and with dropout."""
    torch.manual_seed(0)
    options = {**T5.options, "num_layers": 1, "dropout_rate": dropout, **options}
    return dataclasses.replace(T5, options=options).build()


class Diary(TrainerCallback):
    """Records the examples and inputs of each step, also in a file that survives a kill."""

    def __init__(self, path=None):
        self.path, self.steps, self.carried = path, [], None

    def on_step_begin(self, args, state, control, **_):
        if self.carried is None:  # the loss that the first log includes from before the resume
            self.carried = self.trainer._tr_loss.item()

    def on_pre_optimizer_step(self, args, state, control, **_):
        batches = self.trainer._step_batches
        held = [] if batches[0].examples is None else batches
        examples = [i for b in held if not b.filler for i in b.examples]
        inputs = sum(int((b["input_ids"].long() ** 2).sum()) for b in batches)
        entry = [state.global_step, examples, inputs]
        self.steps.append(entry)
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")

    def on_train_end(self, args, state, control, train_dataloader=None, **_):
        """End persistent workers. Workers that are collected as garbage end after 5 s each."""
        if workers := getattr(train_dataloader, "_iterator", None):
            workers._shutdown_workers()


class At(TrainerCallback):
    """Calls a function at the end of a step, or of every n-th step."""

    def __init__(self, step, do, every=False):
        self.step, self.do, self.every = step, do, every

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step or (self.every and state.global_step % self.step == 0):
            self.do(control)
        return control


class Within(TrainerCallback):
    """Calls a function during a step."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_pre_optimizer_step(self, args, state, control, **_):
        if state.global_step == self.step - 1:
            self.do(control)


class AtEpochEnd(TrainerCallback):
    def __init__(self, do):
        self.do = do

    def on_epoch_end(self, args, state, control, **_):
        self.do(control)
        return control


def send(number):
    return lambda control: os.kill(os.getpid(), number)


def save(control):
    control.should_save = True


def end_training(control):
    control.should_save = control.should_training_stop = True


def end_epoch(control):
    control.should_epoch_stop = True


def trainer_of(folder, *callbacks, dropout=0.1, examples=EXAMPLES, path=None, **options):
    diary = Diary(path)
    options = {**OPTIONS, **options}
    if "model" not in options:
        options["model"] = t5(dropout)
    trainer = make_trainer("T5", folder, examples, callbacks=[*callbacks, diary], **options)
    trainer.diary = diary
    diary.trainer = trainer
    return trainer


def outcome(trainer):
    """The weights, the logs, and the examples and inputs of each step, which must be equal."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return weights, logged(trainer), trainer.diary.steps


def logged(trainer):
    names = ("step", "epoch", "loss", "grad_norm", "learning_rate")
    return [
        tuple(entry[name] for name in names)
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def run(folder, *callbacks, resume=None, **options):
    trainer = trainer_of(folder, *callbacks, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def check_same(resumed, whole, since=0):
    """Check that the resumed run is bit-identical to the whole run from step ``since`` on."""
    ours, theirs = outcome(resumed), outcome(whole)
    assert ours[2] == theirs[2][since:]
    assert ours[1] == theirs[1]
    assert ours[0].keys() == theirs[0].keys()
    for name, tensor in ours[0].items():
        assert torch.equal(tensor, theirs[0][name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without interruption."""
    return run(tmp_path_factory.mktemp("whole"), At(9, save), save_strategy="no")


@pytest.fixture
def warned(monkeypatch):
    """The warnings about checkpoints."""
    said = []
    monkeypatch.setattr(checkpoints.logger, "warning", said.append)
    return said


def steps_of(folder):
    return sorted(int(path.name.split("-")[1]) for path in Path(folder).glob("checkpoint-*"))


# ------------------------------------------------------------------------------------------- killed


def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


class KilledInSaving:
    """Kills the process during the n-th file operation, whose file is left truncated."""

    def __init__(self, trainer, at):
        self.left = at
        for owner, name in [
            (trainer.model, "save_pretrained"),
            (torch, "save"),
            (checkpoints, "_sizes"),
            (checkpoints, "_write_json"),
            (checkpoints, "_delete"),
        ]:
            setattr(owner, name, self._killing(getattr(owner, name), name))

    def _killing(self, function, name):
        def killing(*args, **kwargs):
            self.left -= 1
            if self.left == 0 and name == "_delete":
                checkpoints.shutil.rmtree = self._delete_half
            result = function(*args, **kwargs)
            if self.left == 0:
                if name == "save":
                    os.truncate(args[1], os.path.getsize(args[1]) // 2)
                kill()
            return result

        return killing

    def _delete_half(self, folder, **_):
        for path in list(Path(folder).glob("*"))[::2]:
            path.unlink()
        kill()


def use_own_progress_lock():
    """tqdm's lock is a semaphore shared with the parent: a child killed while it holds the lock
    would block every later progress bar. A subclass has a lock of its own if it was used first."""
    lock, kinds = threading.RLock(), [tqdm]
    while kinds:
        kind = kinds.pop()
        kind.set_lock(lock)
        kinds += kind.__subclasses__()


def test_a_child_shares_no_progress_lock_with_its_parent():
    class Used(tqdm):
        pass

    Used.set_lock(tqdm.get_lock())  # as `get_lock` does for the class that is used first
    child = os.fork()
    if child == 0:
        use_own_progress_lock()
        Used.get_lock().acquire()
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    assert status_of(child) == -signal.SIGKILL
    assert tqdm.get_lock().locks[0].acquire(timeout=5)
    tqdm.get_lock().locks[0].release()


def forked(function):
    """Run in a fork of this process, which has imported everything. Returns the process id."""
    child = os.fork()
    if child == 0:
        try:
            use_own_progress_lock()
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return child


def status_of(child, timeout=60):
    """The exit status of the process, or minus the signal that killed it."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("timeout")


def whole_steps(folder):
    """The steps with a complete checkpoint."""
    return [s for s in steps_of(folder) if (folder / f"checkpoint-{s}/{STATE_NAME}").exists()]


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def test_killed_ten_times(tmp_path):
    """Kill a run at random times during training and saving."""
    options = {
        "num_train_epochs": 24,  # more than ten attempts can finish on any machine
        "save_total_limit": 1,
        "logging_steps": 3,
    }
    whole = run(tmp_path / "whole", **{**options, "save_strategy": "no"})
    folder, diary, result = tmp_path / "killed", tmp_path / "diary", tmp_path / "result.pt"
    rng = random.Random(0)

    def attempt(in_saving=0):
        trainer = trainer_of(folder, path=diary, **options)
        save = torch.save
        if in_saving:
            KilledInSaving(trainer, in_saving)
        trainer.train(resume_from_checkpoint=bool(whole_steps(folder)))
        save(outcome(trainer)[:2], result)

    for kills in range(10):
        before = len(lines(diary))
        if kills % 2:
            in_saving = rng.randrange(1, 20)
            child = forked(lambda at=in_saving: attempt(at))
        else:
            child = forked(attempt)
            steps = rng.randrange(1, 5)
            while len(lines(diary)) < before + steps:
                time.sleep(0.002)
            time.sleep(rng.random() * 0.05)
            os.kill(child, signal.SIGKILL)
        assert status_of(child) == -signal.SIGKILL
    assert status_of(forked(attempt)) == 0

    weights, logs = torch.load(result)
    theirs = outcome(whole)
    assert logs == theirs[1]
    for name, tensor in weights.items():
        assert torch.equal(tensor, theirs[0][name]), name
    entries = [json.loads(line) for line in lines(diary)]
    assert len(entries) > len(theirs[2])  # some steps ran more than once
    assert sorted({entry[0] for entry in entries}) == list(range(len(theirs[2])))
    for entry in entries:
        assert entry == theirs[2][entry[0]]


@pytest.mark.parametrize("at", range(1, 9))
def test_killed_at_each_file_of_a_checkpoint(at, whole, tmp_path):
    """The older checkpoint is kept, and resumed from, until the newer one is complete."""
    options = {"save_total_limit": 1}
    run(tmp_path, At(2, end_training), **options)

    def attempt():
        trainer = trainer_of(tmp_path, **options)
        KilledInSaving(trainer, at)
        trainer.train(resume_from_checkpoint=True)

    assert status_of(forked(attempt)) == -signal.SIGKILL
    last = max(whole_steps(tmp_path))
    assert last == (
        2 if at < 7 else 4
    )  # six operations precede the state file: five files, and their sizes
    check_same(run(tmp_path, resume=True, **options), whole, since=last)
    assert steps_of(tmp_path) == [9]


@pytest.mark.parametrize("at", range(1, 10))
def test_killed_while_a_step_is_saved_again(at, whole, tmp_path):
    """There is no older checkpoint, so the complete one of the same step must be kept."""
    options = {"save_total_limit": 1, "save_steps": 3}

    def attempt():
        trainer = trainer_of(tmp_path, AtEpochEnd(save), **options)
        trainer.add_callback(At(3, lambda _: KilledInSaving(trainer, 8 + at)))
        trainer.train()

    assert status_of(forked(attempt)) == -signal.SIGKILL
    assert steps_of(tmp_path)[0] == 3
    check_same(run(tmp_path, resume=True, **options), whole, since=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-9"]


@pytest.mark.parametrize("fault", ["no state", "truncated", "missing"])
def test_incomplete_checkpoints_are_skipped(fault, whole, tmp_path, warned):
    run(tmp_path, At(4, end_training))
    assert whole_steps(tmp_path) == [2, 4]
    folder = tmp_path / "checkpoint-4"
    if fault == "no state":
        (folder / STATE_NAME).unlink()
    elif fault == "truncated":
        os.truncate(folder / "optimizer.pt", 100)
    else:
        (folder / "model.safetensors").unlink()
    check_same(run(tmp_path, resume=True), whole, since=2)
    assert "Skipping" in warned[0]
    assert "checkpoint-4: " in warned[0]


def test_incomplete_checkpoints_do_not_count_towards_the_limit(tmp_path):
    """An incomplete checkpoint is deleted first, so that two complete ones are kept."""
    run(tmp_path, At(4, end_training), save_total_limit=2)
    (tmp_path / "checkpoint-4" / STATE_NAME).unlink()
    run(tmp_path, At(3, end_training), resume=True, save_total_limit=2)
    assert whole_steps(tmp_path) == steps_of(tmp_path) == [2, 3]


def test_a_json_file_may_be_edited(whole, tmp_path, warned):
    run(tmp_path, At(2, end_training))
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text())))  # shorter
    check_same(run(tmp_path, resume=True), whole, since=2)
    assert not warned


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(ValueError, match=r"resume_from_checkpoint must .* contains no checkpoint"):
        run(tmp_path, resume=True)
    run(tmp_path, At(2, end_training))
    (tmp_path / "checkpoint-2" / STATE_NAME).unlink()
    with pytest.raises(ValueError, match=r"only the incomplete checkpoint-2"):
        run(tmp_path, resume=True)


def test_uploaded_checkpoints_have_the_state_file(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(
        Trainer, "_push_from_checkpoint", lambda self, folder: found.append(whole_steps(tmp_path))
    )
    trainer = trainer_of(tmp_path, At(2, end_training))
    trainer.args.push_to_hub = True
    trainer.train()
    assert found == [[2]]


# ------------------------------------------------------------------------------------ where resumed


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 6, 8])
def test_resuming_at_any_step(stop, whole, tmp_path):
    """Steps 3 and 6 end an epoch."""
    run(tmp_path, At(stop, end_training))
    check_same(run(tmp_path, resume=True), whole, since=stop)


def test_a_complete_run_takes_no_further_step(tmp_path):
    """The run was killed after its last checkpoint, within an epoch."""
    whole = run(tmp_path, max_steps=4)
    resumed = run(tmp_path, resume=True, max_steps=4)
    assert resumed.state.global_step == 4
    assert not resumed.diary.steps
    assert all(
        torch.equal(tensor, outcome(whole)[0][name]) for name, tensor in outcome(resumed)[0].items()
    )


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("stop", [2, 3])
def test_with_workers(stop, persistent, whole, tmp_path):
    options = {"dataloader_num_workers": 2, "dataloader_persistent_workers": persistent}
    run(tmp_path, At(stop, end_training), **options)
    check_same(run(tmp_path, resume=True, **options), whole, since=stop)


def noisy_collate(examples):
    """A collator that draws from all three random number generators that a run seeds."""
    batch = collate(examples)
    noise = torch.rand(batch["input_ids"].shape) < 0.2
    noise[:, 0] = np.random.random() < random.random()
    noise &= batch["attention_mask"].bool()
    batch["input_ids"] = batch["input_ids"].masked_fill(noise, 5)
    return batch


@pytest.mark.parametrize("stop", [2, 3])
def test_a_collator_that_draws_random_numbers(stop, tmp_path):
    options = {"data_collator": noisy_collate}
    whole = run(tmp_path / "whole", save_strategy="no", **options)
    run(tmp_path, At(stop, end_training), **options)
    check_same(run(tmp_path, resume=True, **options), whole, since=stop)


def test_a_collator_that_draws_random_numbers_in_workers(tmp_path):
    """This holds from the beginning of an epoch. Within an epoch, workers start again."""
    options = {"data_collator": noisy_collate, "dataloader_num_workers": 2}
    whole = run(tmp_path / "whole", save_strategy="no", **options)
    run(tmp_path, At(3, end_training), **options)
    check_same(run(tmp_path, resume=True, **options), whole, since=3)
    assert whole.diary.steps[0][2] != whole.diary.steps[3][2]


@pytest.mark.parametrize("workers", [0, 2])
def test_span_corruption(workers, tmp_path):
    tokenizer = make_tokenizer(VOCABULARY)
    texts = [{"input_ids": each["input_ids"]} for each in make_examples(40, longest=60)]

    def options():
        return {
            "model": t5(vocab_size=len(tokenizer)),
            "examples": texts,
            "data_collator": T5SpanCorruptionCollatorFast(tokenizer, max_encoder_len=80),
            "dataloader_num_workers": workers,
            "dataloader_persistent_workers": workers > 0,
            "max_tokens_per_batch": 400,
            "remove_unused_columns": False,
        }

    whole = run(tmp_path / "whole", save_strategy="no", **options())
    epoch = whole.state.max_steps // 3
    inputs = [entry[2] for entry in whole.diary.steps]
    assert len({sum(inputs[first : first + epoch]) for first in (0, epoch, 2 * epoch)}) == 3
    stop = epoch + 1
    run(tmp_path, At(stop, end_training), **options())
    check_same(run(tmp_path, resume=True, **options()), whole, since=stop)


def test_an_epoch_that_ended_early(tmp_path):
    """The step does not determine the epoch then, so the checkpoint stores it."""
    early = At(2, end_epoch, every=True)
    whole = run(tmp_path / "whole", early, save_strategy="no")
    assert whole.state.global_step == 6
    run(tmp_path, early, save_steps=1)
    for stop in (1, 2, 3):
        resumed = run(tmp_path, early, resume=str(tmp_path / f"checkpoint-{stop}"))
        check_same(resumed, whole, since=stop)


def test_ignore_data_skip(whole, tmp_path):
    """With ignore_data_skip, the epoch starts again."""
    run(tmp_path, At(4, end_training))
    resumed = run(tmp_path, resume=True, ignore_data_skip=True)
    examples = [entry[1] for entry in resumed.diary.steps]
    assert examples[:3] == [entry[1] for entry in whole.diary.steps[3:6]]
    assert resumed.state.global_step == 9


def test_resuming_with_another_accumulation(tmp_path):
    """2 batches are done, and a step now has 3: training resumes at a boundary of such steps."""
    run(tmp_path, At(1, end_training))
    options = {"gradient_accumulation_steps": 3}
    resumed = run(tmp_path, resume=True, **options)
    whole = run(tmp_path / "whole", save_strategy="no", **options)
    examples = [entry[1] for entry in whole.diary.steps]
    assert [entry[1] for entry in resumed.diary.steps] == examples[:5]


@pytest.mark.parametrize(
    "options", [{"data_seed": 5}, {"seed": 5}, {"train_sampling_strategy": "sequential"}]
)
def test_seeds_and_order(options, whole, tmp_path):
    other = run(tmp_path / "whole", save_strategy="no", **options)
    assert other.diary.steps[0][1] != whole.diary.steps[0][1]
    run(tmp_path, At(4, end_training), **options)
    check_same(run(tmp_path, resume=True, **options), other, since=4)


def test_the_data_seed_takes_precedence_over_the_seed(whole, tmp_path):
    other = run(tmp_path, save_strategy="no", seed=7, data_seed=whole.args.seed)
    assert other.diary.steps == whole.diary.steps


@pytest.mark.parametrize(
    "options, said",
    [
        ({"data_seed": 5}, "seed=5 (was 42)"),
        ({"max_tokens_per_batch": 240}, "max_tokens_per_batch=240 (was 250)"),
        ({"examples": EXAMPLES[:39]}, "examples=39 (was 40), lengths="),
    ],
)
def test_another_plan_gives_a_warning(options, said, tmp_path, warned):
    run(tmp_path, At(1, end_training))
    run(tmp_path, At(2, end_training), resume=True)
    assert not warned
    run(tmp_path, At(5, end_training), resume=True, **options)
    assert said in warned[0]


def test_the_budget_found_by_probing_is_kept(tmp_path):
    """Another probe could find another budget, and change the order of sums."""
    run(tmp_path, At(2, end_training), auto_find_microbatch=True)
    path = tmp_path / "checkpoint-2" / STATE_NAME
    state = json.loads(path.read_text())
    assert state["max_tokens_per_microbatch"]["in_force"] >= 240
    state["max_tokens_per_microbatch"]["in_force"] = 77
    path.write_text(json.dumps(state))
    resumed = run(tmp_path, At(3, end_training), resume=True, auto_find_microbatch=True)
    assert resumed.runner.max_tokens == 77


def test_logged_losses_continue(tmp_path):
    """The logged mean includes the steps since the last log that precede the checkpoint."""
    options = {"logging_steps": 4}
    whole = run(tmp_path / "whole", save_strategy="no", **options)
    run(tmp_path, At(3, end_training), **options)
    resumed = run(tmp_path, resume=True, **options)
    assert logged(resumed) == logged(whole)
    # `train` returns the mean loss of the steps that it ran.
    steps = run(tmp_path / "steps", save_strategy="no")
    losses = [entry[2] for entry in logged(steps)][3:]
    total = resumed.state.log_history[-1]["train_loss"]
    if "_initial_global_step" in vars(resumed):
        assert total == pytest.approx(sum(losses) / 6, abs=1e-3)


# -------------------------------------------------------------------------------- checkpoint kinds


def test_resuming_from_a_path(whole, tmp_path):
    run(tmp_path, At(5, end_training))
    moved = tmp_path.parent / (tmp_path.name + "-moved")
    shutil.move(tmp_path / "checkpoint-4", moved)
    check_same(run(tmp_path / "other", resume=str(moved)), whole, since=4)
    check_same(run(tmp_path / "other", resume=moved), whole, since=4)


def test_a_checkpoint_of_transformers(tmp_path):
    """A checkpoint of transformers' trainer: the same schedule and number of steps, our batches."""
    args = Seq2SeqTrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_steps=2,
        logging_steps=1,
        **{key: OPTIONS[key] for key in ("num_train_epochs", "learning_rate", "warmup_steps")},
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
    )
    theirs = Seq2SeqTrainer(
        t5(0.0),
        args,
        train_dataset=EXAMPLES,
        data_collator=collate,
        callbacks=[At(4, end_training)],
    )
    theirs.train()
    with pytest.raises(ValueError, match="must name a checkpoint"):
        run(tmp_path, resume=True)
    resumed = run(tmp_path, resume=str(tmp_path / "checkpoint-4"))
    assert [entry[0] for entry in resumed.diary.steps] == list(range(4, 9))
    whole = run(tmp_path / "whole", save_strategy="no")
    assert [entry[1] for entry in resumed.diary.steps] == [e[1] for e in whole.diary.steps[4:]]
    assert [e[4] for e in logged(resumed)][4:] == [e[4] for e in logged(whole)][4:]


def test_a_checkpoint_of_only_the_model(tmp_path, warned):
    run(tmp_path, At(4, end_training), save_only_model=True)
    assert not (tmp_path / "checkpoint-4" / "optimizer.pt").exists()
    resumed = run(tmp_path, resume=True)
    assert resumed.state.global_step == 9
    assert len(resumed.diary.steps) == 5
    assert "contains only the model" in warned[0]


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,  # so the first model is the best
    "eval_dataset": make_examples(8, seed=1),
}


def test_the_best_model(tmp_path):
    whole = run(tmp_path / "whole", **BEST)
    assert whole.state.best_global_step == 2
    assert steps_of(tmp_path / "whole") == [2]
    stopped = run(tmp_path, Within(5, send(signal.SIGTERM)), **BEST)
    assert stopped.state.global_step == 5
    assert steps_of(tmp_path) == whole_steps(tmp_path) == [2, 5]
    resumed = run(tmp_path, resume=True, **BEST)
    check_same(resumed, whole, since=5)
    assert resumed.state.best_global_step == 2
    assert steps_of(tmp_path) == [2]


def random_metrics(prediction):
    return {"rng": random.random() + np.random.random() + float(torch.rand(()))}


def test_evaluation_changes_nothing_in_training(tmp_path):
    options = {"save_strategy": "no", "data_collator": noisy_collate}
    whole = run(tmp_path, **options)
    evaluated = run(
        tmp_path,
        **options,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=EXAMPLES[:8],
        compute_metrics=random_metrics,
    )
    assert sum("eval_rng" in entry for entry in evaluated.state.log_history) == 9
    check_same(evaluated, whole)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(EXAMPLES)


@pytest.mark.parametrize("stop", [3, 5])
def test_a_dataset_without_a_length(stop, tmp_path):
    options = {"examples": Stream(), "max_steps": 8, "per_device_train_batch_size": 4}
    whole = run(tmp_path / "whole", save_strategy="no", dropout=0.0, **options)
    run(tmp_path, At(stop, end_training), dropout=0.0, **options)
    check_same(run(tmp_path, resume=True, dropout=0.0, **options), whole, since=stop)


# ------------------------------------------------------------------------------------------ signals


@pytest.fixture(autouse=True)
def handlers():
    """Default signal handlers, and a check that each test restores them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ours = {number: signal.getsignal(number) for number in before}
    yield
    assert {number: signal.getsignal(number) for number in before} == ours
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [2, 5, 6])
def test_a_signal(step, number, whole, tmp_path):
    """After a signal during a step, training ends with that step."""
    stopped = run(tmp_path, Within(step, send(number)), save_steps=4)
    assert stopped.state.global_step == step
    assert whole_steps(tmp_path)[-1] == step
    check_same(run(tmp_path, resume=True), whole, since=step)


@pytest.mark.parametrize("strategy", ["no", "epoch", "best"])
def test_a_signal_saves_with_any_save_strategy(strategy, tmp_path):
    options = {"save_strategy": strategy, "eval_strategy": "epoch"}
    if strategy == "best":
        options.update(BEST, greater_is_better=False, eval_steps=1, metric_for_best_model="worse")
        options["compute_metrics"] = lambda _: {"worse": time.monotonic()}
    for step in (2, 3):
        folder = tmp_path / str(step)
        options["eval_dataset"] = BEST["eval_dataset"]
        stopped = run(folder, Within(step, send(signal.SIGTERM)), **options)
        assert stopped.state.global_step == step
        assert whole_steps(folder)[-1] == step


def ended_by(function, *arguments):
    with pytest.raises(KeyboardInterrupt):
        function(*arguments)


def test_a_second_interrupt(tmp_path):
    def twice(control):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

    ended_by(run, tmp_path, Within(2, twice))
    assert steps_of(tmp_path) == []


def test_an_interrupt_after_sigterm_counts_as_the_first(tmp_path):
    def both(control):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

    assert run(tmp_path, Within(2, both)).state.global_step == 2


def test_other_handlers(tmp_path):
    """A SIGTERM handler is called too, ignored signals stay ignored, and all are restored."""
    called = []
    before = signal.signal(signal.SIGTERM, lambda *_: called.append(1))
    ours = signal.getsignal(signal.SIGTERM)
    assert run(tmp_path, Within(2, send(signal.SIGTERM))).state.global_step == 2
    assert called == [1]
    assert signal.getsignal(signal.SIGTERM) is ours
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert run(tmp_path, Within(2, send(signal.SIGTERM)), num_train_epochs=1).state.global_step == 3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    signal.signal(signal.SIGTERM, before)


def test_handlers_after_an_error(tmp_path):
    def fail(control):
        raise RuntimeError("of the user")

    with pytest.raises(RuntimeError, match="of the user"):
        run(tmp_path, Within(2, fail))  # `handlers` checks the handlers


def test_in_another_thread(whole, tmp_path):
    runs = []
    thread = threading.Thread(target=lambda: runs.append(run(tmp_path)))
    thread.start()
    thread.join()
    check_same(runs[0], whole)


class InEvaluation(TrainerCallback):
    def on_prediction_step(self, args, state, control, **_):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_during_evaluation(whole, tmp_path):
    """The next step stops training, and its evaluation is postponed."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": EXAMPLES[:8]}

    def evaluations(trainer):
        history = trainer.state.log_history
        return [(e["step"], e["eval_loss"]) for e in history if "eval_loss" in e]

    evaluated = run(tmp_path / "whole", **options)
    stopped = run(tmp_path, InEvaluation(), **options)
    assert [step for step, _ in evaluations(stopped)] == [1, 2]
    assert whole_steps(tmp_path) == [2, 3]
    resumed = run(tmp_path, resume=True, **options)
    check_same(resumed, whole, since=3)
    assert evaluations(resumed) == evaluations(evaluated)


def test_an_evaluation_at_the_end_of_an_epoch_is_postponed_too(tmp_path):
    options = {"eval_strategy": "epoch", "eval_dataset": EXAMPLES[:8]}
    stopped = run(tmp_path, Within(3, send(signal.SIGTERM)), **options)
    resumed = run(tmp_path, resume=True, **options)

    def evaluated(trainer):
        return [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]

    assert evaluated(stopped) == []
    assert evaluated(resumed) == [3, 6, 9]


def slow_collate(examples):
    time.sleep(0.3)  # so that the next step waits for workers
    return collate(examples)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_process_group(number, tmp_path):
    """A terminal or torchrun sends the signal to the whole process group."""

    def to_all(control):
        os.killpg(0, number)
        time.sleep(0.1)

    def attempt():
        os.setsid()
        trainer = trainer_of(tmp_path, data_collator=slow_collate, dataloader_num_workers=2)
        trainer.add_callback(At(1, to_all))  # after the exchange, so one more step runs
        trainer.train()
        assert trainer.state.global_step == 2

    assert status_of(forked(attempt)) == 0
    assert whole_steps(tmp_path) == [2]


def test_sigterm_ends_workers_outside_of_training(tmp_path):
    """At exit, a loader ends its workers with SIGTERM."""
    stop = StopSignals()
    with stop:
        batches = iter(stop.shield_workers(DataLoader(range(9), num_workers=1, prefetch_factor=1)))
        next(batches)
        worker = batches._workers[0]
        worker.terminate()
        assert [int(batch) for batch in batches] == list(range(1, 9))
        batches = iter(stop.shield_workers(DataLoader(range(9), num_workers=1, prefetch_factor=1)))
        next(batches)
        worker = batches._workers[0]
    with contextlib.suppress(RuntimeError):  # torch may raise an error about the dead worker
        worker.terminate()
        worker.join(30)  # an idle worker checks for the signal every 5 s
    worker.join(30)
    assert worker.exitcode == -signal.SIGTERM


def test_sigterm_ends_other_child_processes(tmp_path):
    """SIGTERM ends the process pool of a metric, which inherits the trainer's handler."""
    exits = []
    context = mp.get_context("fork")
    begun = context.Event()

    def wait():
        begun.set()
        time.sleep(60)

    def open_and_close(control):
        child = context.Process(target=wait)
        child.start()
        begun.wait()
        child.terminate()
        child.join(30)
        exits.append(child.exitcode)
        child.kill()

    assert run(tmp_path, Within(2, open_and_close)).state.global_step == 9
    assert exits == [-signal.SIGTERM]


# -------------------------------------------------------------------------------------------- ranks


def on_rank(rank, folder, resume, stop, signalled, options):
    """Train to step ``stop`` or to the end. The rank ``signalled`` gets a signal instead."""
    callbacks = [At(stop, end_training)] if stop and signalled is None else []
    if rank == signalled:
        callbacks = [Within(stop, send(signal.SIGTERM))]
    trainer = run(folder, *callbacks, resume=resume, **options)
    return trainer.state.global_step, *outcome(trainer), trainer.diary.carried


# transformers 5.15 to 5.17 load the optimizer to "cpu:0", which torch does not support.
needs_restorable_optimizer = pytest.mark.skipif(
    'self.args.device if self.args.world_size > 1 else "cpu"'
    in inspect.getsource(Trainer._load_optimizer_and_scheduler),
    reason="this transformers cannot resume on several ranks without a GPU",
)


def several_on_rank(rank, runs):
    return [on_rank(rank, *each) for each in runs]


def examples_of(ranks, which):
    """The examples of each step over all ranks."""
    by_rank = [[entry[1] for entry in rank[which][3]] for rank in ranks]
    return [sorted(i for share in step for i in share) for step in zip(*by_rank, strict=True)]


def check_close(rank, which, whole, since):
    _, weights, logs, *_ = rank[which]
    theirs = outcome(whole)
    for ours, other in zip(logs, theirs[1], strict=True):
        assert ours[:2] == other[:2]
        assert ours[2] == pytest.approx(other[2], abs=1e-5)
        assert ours[4] == other[4]
    for name, tensor in weights.items():
        assert torch.allclose(tensor, theirs[0][name], atol=1e-5), name


@needs_restorable_optimizer
def test_resuming_on_another_number_of_ranks(tmp_path):
    """From 1 to 2 and 3 ranks, from 2 to 1 and 3, from 3 to 1, within an epoch and at its end."""
    options = {"logging_steps": 3}
    whole = run(tmp_path / "whole", save_strategy="no", dropout=0.0, **options)
    steps = [sorted(entry[1]) for entry in whole.diary.steps]
    options = {**options, "dropout": 0.0}
    with_dropout = {**options, "dropout": 0.1, "logging_steps": 8}

    def copy(name, to):
        shutil.copytree(tmp_path / name, tmp_path / to)
        return tmp_path / to

    run(tmp_path / "one", At(4, end_training), **options)
    two = on_ranks(
        2,
        several_on_rank,
        [
            (copy("one", "one-two"), True, None, None, options),
            (tmp_path / "two", None, 5, None, options),
            (tmp_path / "dropout", None, None, None, with_dropout),
            (tmp_path / "dropout-5", None, 5, None, with_dropout),
            (tmp_path / "dropout-5", True, None, None, with_dropout),
        ],
    )
    three = on_ranks(
        3,
        several_on_rank,
        [
            (copy("one", "one-three"), True, None, None, options),
            (copy("two", "two-three"), True, None, None, options),
            (tmp_path / "three", None, 3, None, options),
        ],
    )
    for rank in two:
        check_close(rank, 0, whole, 4)
    for rank in three:
        check_close(rank, 0, whole, 4)
        check_close(rank, 1, whole, 5)
    assert examples_of(two, 0) == examples_of(three, 0) == steps[4:]
    assert examples_of(two, 1) == steps[:5]
    assert examples_of(three, 1) == steps[5:]
    assert examples_of(three, 2) == steps[:3]
    for name, since in (("two", 5), ("three", 3)):
        resumed = run(tmp_path / name, resume=True, **options)
        assert [sorted(entry[1]) for entry in resumed.diary.steps] == steps[since:]
        check_close([(9, *outcome(resumed))], 0, whole, since)
    state = json.loads((tmp_path / "dropout-5" / "checkpoint-5" / STATE_NAME).read_text())
    assert state["loss"]["sums"] == [rank[4][4] for rank in two]
    assert len(set(state["loss"]["sums"])) == 2
    for rank in two:  # with the same number of ranks, bit-identical with dropout
        assert rank[2][2] == rank[4][2]
        for name, tensor in rank[2][1].items():
            assert torch.equal(tensor, rank[4][1][name]), name


def signalled_on_rank(rank, folder):
    """Rank 1 gets a signal during step 3. Both ranks stop after the next exchange."""
    evaluated = {"eval_strategy": "steps", "eval_steps": 4, "eval_dataset": EXAMPLES[:8]}
    stopped = on_rank(rank, folder, None, 3, 1, evaluated)
    resumed = on_rank(rank, folder, True, None, None, evaluated)
    whole = on_rank(rank, f"{folder}-whole", None, None, None, evaluated)
    return stopped, resumed, whole


@needs_restorable_optimizer
def test_a_signal_to_one_rank(tmp_path):
    for stopped, resumed, whole in on_ranks(2, signalled_on_rank, str(tmp_path / "run")):
        assert stopped[0] in (3, 4)
        assert resumed[2] == whole[2]
        for name, tensor in whole[1].items():
            assert torch.equal(tensor, resumed[1][name]), name
    assert len(set(whole_steps(tmp_path / "run"))) >= 1
