"""An epoch on several ranks: each example once, equally many steps, and the same weights."""

import importlib.util
from itertools import product

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

from tokenpack.trainer.step import StepRunner

from ..long import long_unless
from .setting import CASES, distance, make_examples, make_trainer, on_ranks, whole
from .test_exactness import Seen

COUNT = 1000


class Epoch(Seen):
    """Records the examples and micro-batches of each step, and the gradients of the first step."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        del self.steps[1:]


def epoch_on_rank(rank, name, folder, options):
    causal = CASES[name].labels != "seq2seq"
    examples = make_examples(COUNT, causal=causal)
    seen = Epoch()
    trainer = make_trainer(
        name,
        folder,
        examples,
        callbacks=[seen],
        **{
            "max_tokens_per_batch": 2500,
            "max_tokens_per_microbatch": 400,
            "logging_steps": 1,
            **options,
        },
    )
    seen.trainer = trainer
    counts = []
    note = trainer.runner._note

    def recording(share, microbatches):
        tokens = sum(each.tokens for each in microbatches if not each.filler)
        counts.append((len(microbatches), tokens))
        note(share, microbatches)

    trainer.runner._note = recording
    trainer.train()
    weights = {
        name: whole(parameter.detach()).clone()
        for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    }
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "examples": seen.examples,
        "counts": counts,
        "gradient": seen.steps[0],
        "losses": losses,
        "weights": weights,
        "steps": trainer.state.global_step,
    }


def check_epoch(ranks, *, microbatches_alike=True):
    """Check the properties that hold for any number of ranks."""
    seen = [i for rank in ranks for step in rank["examples"] for i in step]
    assert sorted(seen) == list(range(COUNT))
    assert len({rank["steps"] for rank in ranks}) == 1
    tokens = [[count[1] for count in rank["counts"]] for rank in ranks]
    for step, shares in enumerate(zip(*tokens, strict=True)):
        assert max(shares) <= 1.02 * min(shares), (step, shares)
    if microbatches_alike:
        assert len({tuple(count[0] for count in rank["counts"]) for rank in ranks}) == 1


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    made = {name: on_ranks(1, epoch_on_rank, name, folder, {}) for name in ("T5", "Llama")}
    for ranks in made.values():
        check_epoch(ranks)
    return {name: ranks[0] for name, ranks in made.items()}


def check_like(ranks, one):
    """Check that batches, losses and weights are those of one process."""
    for rank in ranks:
        assert rank["losses"] == pytest.approx(one["losses"], rel=1e-4)
        assert distance(rank["weights"], one["weights"]) < 1e-4
    steps = zip(*(rank["examples"] for rank in ranks))
    together = [sorted(i for part in parts for i in part) for parts in steps]
    assert together == [sorted(step) for step in one["examples"]]


@pytest.mark.parametrize(
    "name, world", long_unless([("T5", 3), ("Llama", 2)], product(["T5", "Llama"], [2, 3]))
)
def test_ddp(name, world, alone, tmp_path):
    ranks = on_ranks(world, epoch_on_rank, name, tmp_path, {})
    check_epoch(ranks)
    check_like(ranks, alone[name])


FSDP2 = {
    "fsdp": "full_shard auto_wrap",
    "fsdp_config": {
        "version": 2,
        "fsdp_version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "reshard_after_forward": True,
    },
}


def fsdp_on_the_cpu():
    """Let accelerate shard on the CPU, which torch supports, by reporting an accelerator."""
    original = AcceleratorState.__init__

    def initialize(self, *args, **kwargs):
        PartialState()
        if PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        original(self, *args, **kwargs)

    AcceleratorState.__init__ = initialize


def sharded_on_rank(rank, function, *arguments):
    """Run ``function``, and check that FSDP2 shards its model."""
    fsdp_on_the_cpu()
    run = StepRunner.run

    def sharded(self, model, *rest):
        assert self.accelerator.distributed_type == DistributedType.FSDP
        assert isinstance(model, FSDPModule)
        return run(self, model, *rest)

    StepRunner.run = sharded
    return function(rank, *arguments)


# Without T5 and NLLB: accelerate's wrapping does not support their tied embeddings ("shared with a
# parameter already managed by another FSDP group"), not even in an unpatched model.
@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.long), 3])
def test_fsdp2(world, alone, tmp_path):
    ranks = on_ranks(world, sharded_on_rank, epoch_on_rank, "Llama", tmp_path, FSDP2)
    check_epoch(ranks)
    check_like(ranks, alone["Llama"])


def few_on_rank(rank, name, folder, options):
    """Train with fewer examples per batch than ranks, so that some ranks have no example."""
    examples = make_examples(7, longest=20, causal=name == "Llama")
    seen = Epoch()
    trainer = make_trainer(
        name,
        folder,
        examples,
        callbacks=[seen],
        max_tokens_per_batch=40,
        max_tokens_per_microbatch=40,
        **options,
    )
    seen.trainer = trainer
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return seen.examples, losses


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_fewer_examples_than_ranks(how, tmp_path):
    name, options = ("T5", {}) if how == "ddp" else ("Llama", FSDP2)
    one = on_ranks(1, few_on_rank, name, tmp_path, {})[0]
    if how == "ddp":
        ranks = on_ranks(3, few_on_rank, name, tmp_path, options)
    else:
        ranks = on_ranks(3, sharded_on_rank, few_on_rank, name, tmp_path, options)
    assert sorted(i for rank in ranks for step in rank[0] for i in step) == list(range(7))
    assert any(not step for rank in ranks for step in rank[0])  # some ranks had no example
    for rank in ranks:
        assert rank[1] == pytest.approx(one[1], rel=1e-5)


def unused_on_rank(rank, folder):
    """Train a model with a parameter that no forward uses."""
    model = CASES["T5"].build()
    model.spare = torch.nn.Parameter(torch.ones(3))
    trainer = make_trainer(
        "T5", folder, make_examples(20), model=model, weight_decay=0.5, optim="adamw_torch"
    )
    trainer.train()
    return trainer.model.spare.detach()


def test_parameters_that_no_rank_uses_do_not_change(tmp_path):
    for spare in on_ranks(2, unused_on_rank, tmp_path):
        assert torch.equal(spare, torch.ones(3))


def deepspeed_on_rank(rank, folder, options):
    run = StepRunner.run

    def by_deepspeed(self, model, *rest):
        assert self.accelerator.distributed_type == DistributedType.DEEPSPEED
        return run(self, model, *rest)

    StepRunner.run = by_deepspeed
    return epoch_on_rank(rank, "T5", folder, options)


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
@pytest.mark.parametrize("world", [1, 2])
def test_deepspeed_zero_2(world, alone, tmp_path):
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    ranks = on_ranks(world, deepspeed_on_rank, tmp_path, {"deepspeed": config})
    check_epoch(ranks)
    check_like(ranks, alone["T5"])
