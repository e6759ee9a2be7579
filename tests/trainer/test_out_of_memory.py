"""If memory runs out anywhere, the step is repeated exactly, or an error explains what to do."""

import functools
import json
from itertools import product

import pytest
import torch
from transformers import TrainerCallback

from tokenpack.trainer import OutOfMemoryInStepError
from tokenpack.trainer.out_of_memory import is_out_of_memory

from ..long import long_unless
from .setting import CASES, KeepGradients, distance, make_examples, make_trainer, on_ranks

TOLERANCE = 1e-6


class Fault:
    """Raises an error in the forward or backward of the ``at``-th micro-batch, ``times`` times."""

    def __init__(self, model, at, where, error=None, times=1):
        self.calls, self.at, self.where, self.times = 0, at, where, times
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Injected.")
        block = model.encoder.block[0] if hasattr(model, "encoder") else model.model.layers[0]
        block.register_forward_hook(self.forward)

    def forward(self, module, inputs, outputs):
        if not torch.is_grad_enabled():
            return
        self.calls += 1
        if self.calls - 1 < self.at or self.times == 0:
            return
        if self.where == "forward":
            self.fail()
        else:
            hidden = outputs[0] if isinstance(outputs, tuple) else outputs
            hidden.register_hook(lambda gradient: self.fail())

    def fail(self):
        if self.times:
            self.times -= 1
            raise self.error


def run(name, folder, fault=None, steps=2, examples=None, **options):
    """Gradients and losses of some steps, and the trainer."""
    examples = examples or make_examples(40, causal=name == "Llama")
    seen = KeepGradients()
    trainer = make_trainer(
        name,
        folder,
        examples,
        **{
            "callbacks": [seen],
            "max_tokens_per_batch": 250,
            "max_tokens_per_microbatch": 80,
            "max_steps": steps,
            **options,
        },
    )
    if fault is not None:
        Fault(trainer.accelerator.unwrap_model(trainer.model), **fault)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return seen.steps, losses, trainer


@functools.cache
def sound_run(name, accumulation, folder):
    """The same without a fault. Several tests compare with it."""
    return run(name, folder, gradient_accumulation_steps=accumulation)


@functools.cache
def sound_ranks(accumulation, folder):
    options = {"gradient_accumulation_steps": accumulation}
    return on_ranks(2, run_on_rank, folder, None, [], options)


@pytest.fixture(scope="module")
def sound_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sound")


def check_same(faulty, sound):
    for ours, theirs in zip(faulty[0], sound[0], strict=True):
        assert distance(ours, theirs) < TOLERANCE
    assert faulty[1] == pytest.approx(sound[1], rel=1e-6)


ALL_PAIRS = [
    *[("T5", 0, "forward", 1), ("Llama", 0, "backward", 3), ("T5", 1, "backward", 3)],
    *[("Llama", 1, "forward", 1), ("T5", 3, "forward", 3), ("Llama", 3, "backward", 1)],
]
FAULTS = product(["T5", "Llama"], [0, 1, 3], ["forward", "backward"], [1, 3])


@pytest.mark.parametrize("name, at, where, accumulation", long_unless(ALL_PAIRS, FAULTS))
def test_one_process(name, at, where, accumulation, tmp_path, sound_folder):
    """``at=3`` is the last micro-batch of the step, or one of the second batch."""
    options = {"gradient_accumulation_steps": accumulation}
    faulty = run(name, tmp_path, {"at": at, "where": where}, **options)
    check_same(faulty, sound_run(name, accumulation, sound_folder))
    runner = faulty[2].runner
    assert runner.counts.out_of_memory == 1
    assert 30 <= runner.max_tokens <= 40  # lowered once, from at most 80, and kept
    logged = [entry for entry in faulty[2].state.log_history if "loss" in entry]
    assert logged[-1]["out_of_memory"] == 1
    assert logged[-1]["max_tokens_per_microbatch"] == runner.max_tokens


def test_the_last_microbatch_of_a_step(tmp_path):
    sound = run("T5", tmp_path, steps=1)
    last = int(sound[2].state.log_history[0]["microbatches_per_step"]) - 1
    for where in ("forward", "backward"):
        faulty = run("T5", tmp_path, {"at": last, "where": where}, steps=1)
        assert faulty[2].runner.counts.out_of_memory == 1
        check_same(faulty, sound)


def test_random_numbers_are_repeated(tmp_path):
    """With one sequence per micro-batch, a smaller budget changes nothing, so dropout repeats."""

    def model():
        made = CASES["T5"].build()
        for module in made.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        return made

    options = {"max_tokens_per_microbatch": 62, "max_tokens_per_batch": 130}
    examples = [{"input_ids": [5] * 30, "labels": [7] * 20} for _ in range(8)]
    sound = run("T5", tmp_path, model=model(), examples=examples, **options)
    fault = {"at": 1, "where": "backward"}
    faulty = run("T5", tmp_path, fault, model=model(), examples=examples, **options)
    assert faulty[2].runner.counts.out_of_memory == 1
    check_same(faulty, sound)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_what_counts_as_out_of_memory(error, tmp_path):
    assert is_out_of_memory(error)
    faulty = run("T5", tmp_path, {"at": 1, "where": "forward", "error": error})
    assert faulty[2].runner.counts.out_of_memory == 1


def test_other_errors_are_not_caught(tmp_path):
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        run("T5", tmp_path, {"at": 0, "where": "forward", "error": RuntimeError("shapes")})


def test_gives_up_after_the_retries(tmp_path):
    with pytest.raises(OutOfMemoryInStepError, match=r"after 2 retries .*oom_max_retries"):
        run(
            "T5",
            tmp_path,
            {"at": 0, "where": "forward", "times": 10},
            oom_max_retries=2,
            max_tokens_per_microbatch=250,
        )


def test_skips_the_step_after_the_retries(tmp_path):
    faulty = run(
        "T5",
        tmp_path,
        {"at": 0, "where": "forward", "times": 2},
        oom_max_retries=1,
        oom_skip_batch_on_fail=True,
        max_tokens_per_microbatch=250,
    )
    assert not faulty[0][0]  # no gradient reached the optimizer
    assert faulty[0][1]
    assert faulty[1][0] == 0
    assert faulty[2].runner.counts.skipped_steps == 1
    assert faulty[2].runner.counts.out_of_memory == 2


def long_one(examples):
    longest = max(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    examples[longest]["input_ids"] = (examples[longest]["input_ids"] * 3)[:70]
    return longest


class TooLong:
    """Raises out of memory for every micro-batch with a sequence of more than 60 tokens."""

    def __init__(self, trainer, causal=False):
        inner = trainer.compute_loss

        def compute_loss(model, inputs, *args, **kwargs):
            if inputs["input_ids"].shape[1] > 60:
                raise torch.OutOfMemoryError("CUDA out of memory. Injected.")
            return inner(model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss


def run_with_a_long_one(folder, **options):
    examples = make_examples(12, longest=30)
    longest = long_one(examples)
    seen = KeepGradients()
    trainer = make_trainer(
        "T5",
        folder,
        examples,
        callbacks=[seen],
        max_tokens_per_batch=2000,
        max_tokens_per_microbatch=200,
        learning_rate=0.0,
        **options,
    )
    return examples, longest, seen, trainer


def test_a_single_sequence_that_does_not_fit(tmp_path):
    examples, longest, _, trainer = run_with_a_long_one(tmp_path)
    TooLong(trainer)
    length = len(examples[longest]["input_ids"]) + len(examples[longest]["labels"])
    with pytest.raises(OutOfMemoryInStepError, match=rf"example {longest} \({length} tokens\)"):
        trainer.train()


def test_a_single_sequence_that_does_not_fit_is_skipped_on_request(tmp_path):
    examples, longest, seen, trainer = run_with_a_long_one(tmp_path, oom_skip_batch_on_fail=True)
    TooLong(trainer)
    trainer.train()
    assert trainer.runner.counts.skipped_sequences == 1
    assert trainer.runner.counts.skipped_steps == 0
    assert trainer.runner.max_tokens == 200  # lowering it did not help, so it was restored
    rest = [each for i, each in enumerate(examples) if i != longest]
    from .setting import padded_gradient

    loss, expected = padded_gradient("T5", rest)
    assert distance(seen.steps[0], expected) < 1e-5
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("why", ["has no targets", "is skipped"])
def test_a_scaler_accepts_a_step_without_gradients(why, tmp_path):
    """fp16's scaler needs a gradient. The step changes nothing, and training continues."""
    examples = [{"input_ids": [5] * 20, "labels": [5] * 20} for _ in range(6)]
    if why == "has no targets":
        for each in examples[:2]:
            each["labels"] = [-100] * 20
    trainer = make_trainer(
        "Llama",
        tmp_path,
        examples,
        max_tokens_per_batch=40,
        max_tokens_per_microbatch=40,
        oom_max_retries=1,
        oom_skip_batch_on_fail=True,
        train_sampling_strategy="sequential",
    )
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    if why == "is skipped":
        # Fails for two sequences together, then for one of them: more than one retry.
        fault = Fault(trainer.model, 0, "forward", times=2)
        fault.at = 0
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    after_first = {}

    class First(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if not after_first:
                after_first.update({n: p.clone() for n, p in trainer.model.named_parameters()})

    trainer.add_callback(First())
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.runner.counts.skipped_steps == (why == "is skipped")
    assert all(torch.equal(before[name], after_first[name]) for name in before)
    assert not all(torch.equal(before[n], p) for n, p in trainer.model.named_parameters())


def test_the_budget_is_saved_and_restored(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    faulty = run("T5", tmp_path, {"at": 0, "where": "forward"}, **options)
    lowered = faulty[2].runner.max_tokens
    saved = json.loads((tmp_path / "checkpoint-2" / "tokenpack_state.json").read_text())
    assert saved["max_tokens_per_microbatch"] == {"set": 80, "in_force": lowered}
    trainer = make_trainer(
        "T5",
        tmp_path,
        make_examples(40),
        max_tokens_per_batch=250,
        max_tokens_per_microbatch=80,
        max_steps=3,
        **options,
    )
    trainer.train(resume_from_checkpoint=True)
    assert trainer.runner.max_tokens == lowered
    assert trainer.runner.counts.out_of_memory == 1


def test_a_changed_budget_takes_precedence_over_the_saved_one(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    run("T5", tmp_path, {"at": 0, "where": "forward"}, **options)
    trainer = make_trainer(
        "T5",
        tmp_path,
        make_examples(40),
        max_tokens_per_batch=250,
        max_tokens_per_microbatch=90,
        max_steps=3,
        **options,
    )
    trainer.train(resume_from_checkpoint=True)
    assert trainer.runner.max_tokens == 90


# ------------------------------------------------------------------------------------------- ranks


def run_on_rank(rank, folder, fault, failing, options):
    steps, losses, trainer = run("T5", folder, fault if rank in failing else None, **options)
    return steps, losses, trainer.runner.max_tokens, trainer.runner.counts.out_of_memory


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("at", [0, 1])
def test_one_rank_of_two(at, where, accumulation, tmp_path, sound_folder):
    options = {"gradient_accumulation_steps": accumulation}
    fault = {"at": at, "where": where}
    faulty = on_ranks(2, run_on_rank, tmp_path, fault, [1], options)
    sound = sound_ranks(accumulation, sound_folder)
    for ours, theirs in zip(faulty, sound):
        check_same(ours, theirs)
        assert ours[3] == 1
    assert faulty[0][2] == faulty[1][2] < 80
    assert distance(faulty[0][0][0], faulty[1][0][0]) == 0


def probe_on_rank(rank, folder, failing, options):
    trainer = make_trainer(
        "Llama", folder, make_examples(20, causal=True), auto_find_microbatch=True, **options
    )
    if rank in failing:
        Fault(trainer.accelerator.unwrap_model(trainer.model), 0, "forward", times=2)
    trainer.train()
    return trainer.runner.max_tokens, trainer.state.global_step


@pytest.mark.parametrize("options", [{}, {"oom_max_retries": 0}, {"ddp_broadcast_buffers": True}])
def test_probing_if_one_rank_has_less_memory(options, tmp_path):
    """Llama has buffers, which DDP would send in a forward that a failing rank does not reach."""
    first, second = on_ranks(2, probe_on_rank, tmp_path, [1], options)
    assert first == second
    assert first[0] < 300


def buffers_on_rank(rank, folder, broadcasts):
    """The values that each forward finds in a buffer that every rank sets to its number."""
    model, found = CASES["Llama"].build(), []
    model.register_buffer("number", torch.zeros(()))

    class Number(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            model.number.fill_(rank)

    trainer = make_trainer(
        "Llama",
        folder,
        make_examples(20, causal=True),
        model=model,
        callbacks=[Number()],
        max_steps=3,
        ddp_broadcast_buffers=broadcasts,
    )
    model.model.register_forward_pre_hook(lambda *_: found.append(model.number.item()))
    trainer.train()
    return set(found)


@pytest.mark.parametrize("broadcasts", [True, False])
def test_buffers_of_the_first_rank_are_broadcast_on_request(broadcasts, tmp_path):
    ranks = on_ranks(2, buffers_on_rank, tmp_path, broadcasts)
    assert ranks == [{0.0}, {0.0 if broadcasts else 1.0}]


def fails_on_rank(rank, folder):
    """The error message of each rank if a sequence of rank 1 does not fit by itself."""
    _, longest, _, trainer = run_with_a_long_one(folder)
    TooLong(trainer)
    try:
        trainer.train()
    except OutOfMemoryInStepError as error:
        return longest, str(error)


def test_every_rank_names_the_sequence_that_did_not_fit(tmp_path):
    for longest, message in on_ranks(2, fails_on_rank, tmp_path):
        assert f"example {longest} (" in message
