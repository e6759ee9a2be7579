"""The gradient of a step equals that of its whole padded batch on the unpatched model."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tokenpack import packing_stats
from tokenpack.data import CappedSeq2SeqCollator, packed_collate_fn
from tokenpack.trainer.measure import measure
from tokenpack.trainer.microbatch import plan_microbatches

from ..adapters.models import EOS, PAD
from ..long import long_unless
from .setting import (
    CASES,
    KeepGradients,
    collate,
    collate_left,
    distance,
    make_examples,
    make_trainer,
    on_ranks,
    padded_gradient,
)

TOLERANCE = 1e-5


def is_causal(name):
    return CASES[name].labels != "seq2seq"


class Seen(KeepGradients):
    """Also records the examples of each step on this rank."""

    def __init__(self):
        super().__init__()
        self.examples, self.microbatches = [], []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        batches = self.trainer._step_batches
        self.examples.append([i for b in batches if not b.filler for i in b.examples])
        self.microbatches.append(self.trainer.runner.progress.microbatches)


def train(name, folder, *, microbatches=1, accumulation=1, **options):
    """Train three steps. Returns examples, micro-batches, gradients and logged losses."""
    examples = make_examples(40, causal=is_causal(name))
    seen = Seen()
    per_batch = 250
    trainer = make_trainer(
        name,
        folder,
        examples,
        callbacks=[seen],
        max_tokens_per_batch=per_batch,
        max_tokens_per_microbatch=per_batch if microbatches == 1 else 60,
        gradient_accumulation_steps=accumulation,
        max_steps=3,
        learning_rate=0.0,  # all steps have the initial weights
        **options,
    )
    seen.trainer = trainer
    trainer.train()
    if trainer.budget.pack:
        assert packing_stats(trainer.accelerator.unwrap_model(trainer.model)).packed_calls > 0
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return seen.examples, seen.microbatches, seen.steps, logged


def check(name, smoothing, examples_by_step, gradients, losses):
    examples = make_examples(40, causal=is_causal(name))
    for chosen, gradient, logged in zip(examples_by_step, gradients, losses, strict=True):
        loss, expected = padded_gradient(name, [examples[i] for i in chosen], smoothing)
        assert distance(gradient, expected) < TOLERANCE
        assert logged == pytest.approx(loss, rel=1e-5)


ALL_PAIRS = [
    *[("T5", 1, 1, 0.1), ("T5", 7, 4, 0.0), ("NLLB", 7, 1, 0.0), ("NLLB", 1, 4, 0.1)],
    *[("Llama", 1, 1, 0.0), ("Llama", 7, 4, 0.1)],
]
STEPS = product(CASES, [1, 7], [1, 4], [0.0, 0.1])


@pytest.mark.parametrize(
    "name, microbatches, accumulation, smoothing", long_unless(ALL_PAIRS, STEPS)
)
def test_one_process(name, microbatches, accumulation, smoothing, tmp_path):
    examples, counts, gradients, losses = train(
        name,
        tmp_path,
        microbatches=microbatches,
        accumulation=accumulation,
        label_smoothing_factor=smoothing,
    )
    check(name, smoothing, examples, gradients, losses)
    if microbatches == 1:
        assert counts[0] == accumulation
    elif accumulation == 4:
        assert counts[0] >= 7


@pytest.mark.parametrize("name", CASES)
def test_seven_microbatches_in_one_batch(name, tmp_path):
    """The budget is chosen so that the batch has exactly 7 micro-batches."""
    causal = is_causal(name)
    examples = make_examples(30, causal=causal)
    rows = measure(collate(examples), is_encoder_decoder=not causal, shifts_labels=causal)
    bounds = (bound for bound in range(200, 40, -1) if len(plan_microbatches(rows, bound)) == 7)
    seen = Seen()
    trainer = make_trainer(
        name,
        tmp_path,
        examples,
        callbacks=[seen],
        max_tokens_per_batch=10_000,
        max_tokens_per_microbatch=next(bounds),
        learning_rate=0.0,
        max_steps=1,
    )
    seen.trainer = trainer
    trainer.train()
    assert seen.microbatches == [7]
    loss, expected = padded_gradient(name, examples)
    assert distance(seen.steps[0], expected) < TOLERANCE
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("name", ["T5", "Llama"])
def test_unpatched(name, tmp_path):
    """With pack=False, the model's own loss is a mean that ignores num_items_in_batch."""
    examples, _, gradients, losses = train(name, tmp_path, microbatches=7, pack=False)
    check(name, 0.0, examples, gradients, losses)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("pack", [True, False])
def test_left_padding(name, pack, tmp_path):
    options = {"data_collator": collate_left, "pack": pack}
    examples, _, gradients, losses = train(name, tmp_path, microbatches=7, **options)
    check(name, 0.0, examples, gradients, losses)


def packing_collator(name):
    if is_causal(name):
        return packed_collate_fn(10_000, stream=True)
    return CappedSeq2SeqCollator(
        SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS, padding_side="right"), packed=True
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_batches_that_come_packed(name, on_device, smoothing, tmp_path):
    examples, _, gradients, losses = train(
        name,
        tmp_path,
        microbatches=7,
        data_collator=packing_collator(name),
        use_cpu_microbatch=not on_device,
        label_smoothing_factor=smoothing,
    )
    check(name, smoothing, examples, gradients, losses)


@pytest.mark.parametrize("on_device", [True, False])
def test_split_on_the_device_or_the_host(on_device, tmp_path):
    examples, _, gradients, losses = train(
        "T5", tmp_path, microbatches=7, use_cpu_microbatch=not on_device
    )
    check("T5", 0.0, examples, gradients, losses)


def mean_of_the_batch(outputs, labels, num_items_in_batch=None):
    """A loss function that ignores the number of targets of the step."""
    return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())


def sum_over_items(outputs, labels, num_items_in_batch=None):
    total = torch.nn.functional.cross_entropy(
        outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )
    return total / num_items_in_batch


@pytest.mark.parametrize("function", [mean_of_the_batch, sum_over_items])
def test_a_loss_function_of_the_user(function, tmp_path):
    examples, _, gradients, losses = train(
        "T5", tmp_path, microbatches=7, accumulation=2, compute_loss_func=function
    )
    check("T5", 0.0, examples, gradients, losses)


def trainers_with_own_loss():
    from tokenpack.trainer import HierarchicalTokenTrainer

    class WithoutNumItems(HierarchicalTokenTrainer):
        def compute_loss(self, model, inputs, return_outputs=False):
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    class IgnoringNumItems(HierarchicalTokenTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    class UsingNumItems(HierarchicalTokenTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    return [WithoutNumItems, IgnoringNumItems, UsingNumItems]


@pytest.mark.parametrize("which", range(3))
def test_a_compute_loss_of_the_user(which, tmp_path):
    examples, _, gradients, losses = train(
        "T5",
        tmp_path,
        microbatches=7,
        accumulation=2,
        trainer_class=trainers_with_own_loss()[which],
    )
    check("T5", 0.0, examples, gradients, losses)


def examples_half_without_targets():
    examples = make_examples(12)
    for each in examples[::2]:
        each["labels"] = [-100] * len(each["labels"])
    return examples


@pytest.mark.parametrize("pack", [True, False])
def test_examples_without_targets(pack, tmp_path):
    """Some batches and some micro-batches have no targets."""
    examples = examples_half_without_targets()
    seen = Seen()
    trainer = make_trainer(
        "T5",
        tmp_path,
        examples,
        callbacks=[seen],
        max_tokens_per_microbatch=62,
        max_tokens_per_batch=62,
        gradient_accumulation_steps=2,
        learning_rate=0.0,
        pack=pack,
    )
    seen.trainer = trainer
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    num_with_targets = 0
    for chosen, gradient, logged in zip(seen.examples, seen.steps, losses, strict=True):
        with_targets = [examples[i] for i in chosen if i % 2]
        if not with_targets:
            assert not gradient or all(not g.any() for g in gradient.values())
            assert logged == 0.0
            continue
        num_with_targets += len(with_targets)
        loss, expected = padded_gradient("T5", with_targets)
        assert distance(gradient, expected) < TOLERANCE
        assert logged == pytest.approx(loss, rel=1e-5)
    assert num_with_targets == 6


# ------------------------------------------------------------------------------------------- ranks


def train_on_rank(rank, name, folder, options):
    return train(name, folder, **options)


@pytest.mark.parametrize(
    "name, smoothing",
    long_unless([("T5", 0.1), ("NLLB", 0.0), ("Llama", 0.1)], product(CASES, [0.0, 0.1])),
)
def test_two_ranks(name, smoothing, tmp_path):
    options = {"microbatches": 7, "accumulation": 4, "label_smoothing_factor": smoothing}
    first, second = on_ranks(2, train_on_rank, name, tmp_path, options)
    together = [a + b for a, b in zip(first[0], second[0], strict=True)]
    assert all(set(a).isdisjoint(b) for a, b in zip(first[0], second[0]))
    check(name, smoothing, together, first[2], first[3])
    assert distance(first[2][0], second[2][0]) == 0.0


@pytest.mark.parametrize(
    "options", [{"microbatches": 1}, {"microbatches": 7}, {"oom_max_retries": 0}]
)
def test_two_ranks_without_accumulation(options, tmp_path):
    first, second = on_ranks(2, train_on_rank, "T5", tmp_path, options)
    together = [a + b for a, b in zip(first[0], second[0], strict=True)]
    check("T5", 0.0, together, first[2], first[3])


def test_ranks_average_over_their_own_targets_on_request(tmp_path):
    """average_tokens_across_devices=False: the mean over ranks of each rank's mean."""
    options = {"average_tokens_across_devices": False}
    first, second = on_ranks(2, train_on_rank, "T5", tmp_path, options)
    examples = make_examples(40)
    (loss_a, a), (loss_b, b) = (
        padded_gradient("T5", [examples[i] for i in each[0][0]]) for each in (first, second)
    )
    expected = {name: (a[name] + b[name]) / 2 for name in a}
    assert distance(first[2][0], expected) < TOLERANCE
    assert first[3][0] == pytest.approx(np.mean([loss_a, loss_b]), rel=1e-5)


def train_half_without_targets(rank, folder, options):
    examples = examples_half_without_targets()
    seen = Seen()
    trainer = make_trainer(
        "T5",
        folder,
        examples,
        callbacks=[seen],
        max_tokens_per_microbatch=62,
        max_tokens_per_batch=62,
        learning_rate=0.0,
        **options,
    )
    seen.trainer = trainer
    trainer.train()
    return seen.examples, seen.steps


@pytest.mark.parametrize("oom_max_retries", [0, 3])
@pytest.mark.parametrize("average", [False, True])
def test_a_rank_without_targets(average, oom_max_retries, tmp_path):
    """A rank without targets contributes zeros to the average. The others do not wait for it."""
    options = {"average_tokens_across_devices": average, "oom_max_retries": oom_max_retries}
    ranks = on_ranks(2, train_half_without_targets, tmp_path, options)
    examples = make_examples(12)
    alone = 0
    for first, second, gradient in zip(ranks[0][0], ranks[1][0], ranks[0][1], strict=True):
        with_targets = [[examples[i] for i in chosen if i % 2] for chosen in (first, second)]
        if all(with_targets) or not any(with_targets):
            continue
        alone += 1
        _, expected = padded_gradient("T5", with_targets[0] or with_targets[1])
        if not average:  # the mean over ranks of each rank's mean, one of which is 0
            expected = {name: grad / 2 for name, grad in expected.items()}
        assert distance(gradient, expected) < TOLERANCE
    assert alone
