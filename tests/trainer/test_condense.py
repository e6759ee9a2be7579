"""The condenser's trainer: exact steps, on ranks and after faults, resume, groups, evaluation."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from tokenpack.adapters.patching import transformers_model
from tokenpack.data.condense import CondenseCollator
from tokenpack.trainer.condense import CondenseTrainer

from ..adapters.models import VOCABULARY
from ..models.condensers import make_condenser
from .setting import KeepGradients, distance, on_ranks

OPTIONS = {
    "num_condense_tokens": None,
    "ratios": [4, 2],
    "segment_length": 16,
    "reconstruction_weight": 0.5,
    "distillation_weight": 0.25,
}


def make_rows(count=24, seed=0):
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return rng.integers(3, VOCABULARY, rng.integers(low, high)).tolist()

    return [
        {
            "context_ids": ids(1, 30), "reference_ids": ids(1, 30), "prompt_ids": ids(0, 4),
            "completion_ids": [*ids(1, 8), 1], "is_text": bool(at % 2),
        }
        for at in range(count)
    ]  # fmt: skip


def make_trainer(folder, rows=None, model=None, **options):
    own = {
        name: options.pop(name)
        for name in list(options)
        if name not in TrainingArguments.__dataclass_fields__
    }
    defaults = {
        "use_cpu": True, "report_to": [], "save_strategy": "no", "logging_steps": 1,
        "num_train_epochs": 1, "learning_rate": 1e-2, "optim": "sgd", "max_grad_norm": 0,
        "disable_tqdm": True,
    }  # fmt: skip
    return CondenseTrainer(
        make_condenser(**OPTIONS) if model is None else model,
        TrainingArguments(str(folder), **{**defaults, **options}),
        train_dataset=make_rows() if rows is None else rows,
        **{"max_tokens_per_batch": 1500, "max_tokens_per_microbatch": 300, **own},
    )


def whole_step_gradient(rows):
    """The gradient of all rows in one batch, by the model alone."""
    model = make_condenser(**OPTIONS)
    batch = CondenseCollator(OPTIONS["ratios"], seed=42)(rows)
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def one_step(folder, fault=None, **options):
    seen = KeepGradients()
    trainer = make_trainer(
        folder, callbacks=[seen], max_steps=1, max_tokens_per_batch=10_000, **options
    )
    if fault is not None:
        fault(trainer)
    trainer.train()
    (logged,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    return logged, seen.steps[0], trainer


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path):
    loss, gradient = whole_step_gradient(make_rows())
    logged, ours, _ = one_step(tmp_path)
    assert logged["microbatches_per_step"] > 4
    assert logged["loss"] == pytest.approx(loss, rel=1e-4)
    assert distance(ours, gradient) < 1e-5
    assert {"completion_loss", "continuation_loss", "distillation_loss"} <= logged.keys()


def test_accumulation_weighs_targets(tmp_path):
    rows = make_rows(40)
    seen = KeepGradients()
    trainer = make_trainer(
        tmp_path, rows, callbacks=[seen], gradient_accumulation_steps=8, max_steps=1
    )
    trainer.train()
    assert len(trainer.plan) > 1
    _, gradient = whole_step_gradient(rows)
    assert distance(seen.steps[0], gradient) < 1e-5


class OutOfMemory:
    """Runs out of memory in the n-th forward of a part, in its forward or its backward."""

    def __init__(self, part, where, at=2):
        self.part, self.where, self.at, self.calls = part, where, at, 0

    def __call__(self, trainer):
        model = trainer.accelerator.unwrap_model(trainer.model)
        inner = transformers_model(getattr(model, self.part))
        inner.model.layers[0].register_forward_hook(self.hook)

    def hook(self, module, inputs, outputs):
        if not torch.is_grad_enabled():
            return
        self.calls += 1
        if self.calls != self.at:
            return
        if self.where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Injected.")
        hidden = outputs[0] if isinstance(outputs, tuple) else outputs
        hidden.register_hook(self.fail)

    def fail(self, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Injected.")


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("part", ["condenser", "decoder"])
def test_out_of_memory_in_either_stream_leaves_the_gradient_exact(part, where, tmp_path):
    fault = OutOfMemory(part, where)
    logged, ours, trainer = one_step(tmp_path, fault)
    assert trainer.runner.counts.out_of_memory == 1
    loss, gradient = whole_step_gradient(make_rows())
    assert logged["loss"] == pytest.approx(loss, rel=1e-4)
    assert distance(ours, gradient) < 1e-5


def on_rank(rank, folder):
    torch.set_num_threads(1)
    seen = KeepGradients()
    trainer = make_trainer(folder, callbacks=[seen], max_steps=2)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    metrics = trainer.evaluate(make_rows(7, seed=1))
    return losses, seen.steps, metrics["eval_loss"]


def test_two_ranks_equal_one_process(tmp_path):
    (alone,) = on_ranks(1, on_rank, tmp_path)
    for losses, steps, evaluated in on_ranks(2, on_rank, tmp_path):
        assert losses == pytest.approx(alone[0], rel=1e-5)
        assert evaluated == pytest.approx(alone[2], rel=1e-5)
        for ours, theirs in zip(steps, alone[1], strict=True):
            assert distance(ours, theirs) < 1e-5


# ----------------------------------------------------------------------------------------- resume


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_resumes_to_the_bit(tmp_path):
    options = {
        "optim": "adamw_torch", "num_train_epochs": 2, "max_tokens_per_batch": 700,
        "save_strategy": "steps", "save_steps": 2, "max_grad_norm": 1.0,
        "model": None,
    }  # fmt: skip

    def trainer_of(folder, **more):
        model = make_condenser(**OPTIONS, lora={"lora_dropout": 0.1})
        return make_trainer(folder, **{**options, **more, "model": model})

    whole = trainer_of(tmp_path / "whole")
    whole.train()
    stopped = trainer_of(tmp_path / "stopped", callbacks=[StopAfter(3)])
    stopped.train()
    assert stopped.state.global_step == 3 < whole.state.global_step
    resumed = trainer_of(tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step
    expected = whole.model.state_dict()
    assert all(value.equal(expected[n]) for n, value in resumed.model.state_dict().items())
    losses = [
        [entry["loss"] for entry in each.state.log_history if "loss" in entry]
        for each in (whole, resumed)
    ]
    assert losses[0][3:] == losses[1][-len(losses[0][3:]) :]
    # As after a kill: the last checkpoint that was written is older than the last step.
    killed = trainer_of(tmp_path / "stopped")
    killed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-2"))
    assert all(value.equal(expected[n]) for n, value in killed.model.state_dict().items())
    files = {path.name for path in (tmp_path / "stopped" / "checkpoint-2").iterdir()}
    assert {"model.safetensors", "adapter_model.safetensors", "config.json"} <= files


# ------------------------------------------------------------------- groups, evaluation, the best


def test_each_group_has_its_learning_rate(tmp_path):
    trainer = make_trainer(tmp_path, slots_learning_rate=0.0, projection_learning_rate=0.5)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    rates = {group["lr"] for group in trainer.create_optimizer().param_groups}
    assert rates == {1e-2, 0.0, 0.5}
    trainer.args.max_steps = 1
    trainer.train()
    changed = {n for n, p in trainer.model.named_parameters() if not p.equal(before[n])}
    assert not changed & {"slots", "reconstruction_flags"}
    assert {"projection.linear.weight", "projection.norm.weight"} <= changed
    assert any("lora_B" in name for name in changed)


def test_evaluates_generates_and_keeps_the_best(tmp_path):
    held_out = make_rows(6, seed=3)
    trainer = make_trainer(
        tmp_path, eval_dataset=held_out, generate_samples=2, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, max_steps=3, load_best_model_at_end=True,
        learning_rate=1.0, max_eval_tokens_per_microbatch=200,
    )  # fmt: skip
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    losses = [entry["eval_loss"] for entry in logged]
    assert len(losses) == 3
    assert trainer.state.best_metric == min(losses)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    batch = CondenseCollator(OPTIONS["ratios"], draw=False)(held_out)
    with torch.no_grad():
        assert trainer.model.eval()(**batch).loss.item() == pytest.approx(min(losses), rel=1e-5)
    lines = (tmp_path / "generated-1.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[0])["completion"] == held_out[0]["completion_ids"]


def test_the_budget_counts_both_streams(tmp_path):
    from tokenpack import packing_stats

    model = make_condenser(**OPTIONS)
    trainer = make_trainer(tmp_path, model=model)
    batch = CondenseCollator(OPTIONS["ratios"], seed=42)(make_rows())
    sizes = trainer.runner.traits.measure(batch)
    model(**batch)  # checks the head
    parts = [packing_stats(model.condenser), packing_stats(model.decoder)]
    before = [part.packed_tokens for part in parts]
    model(**batch)
    computed = [part.packed_tokens - count for part, count in zip(parts, before)]
    assert computed == [sizes.source.sum(), sizes.target.sum()]
    assert (trainer._lengths_of(make_rows()) >= np.stack(sizes[:2], axis=1)).all()


def test_what_does_not_go_together_is_named(tmp_path):
    with pytest.raises(TypeError, match="model must be a Condenser, got a Linear"):
        CondenseTrainer(torch.nn.Linear(2, 2))
    for options, message in (
        ({"pack": False}, "pack must be True"),
        ({"pad_to_total": 64}, "pad_to_total must be None"),
        ({"overlong": "truncate"}, "overlong must be 'error' or 'drop'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, **options)
    rows = make_rows(3)
    rows[1]["context_ids"] = []
    with pytest.raises(ValueError, match="context must have at least one token, got example 1"):
        make_trainer(tmp_path, rows).train()
