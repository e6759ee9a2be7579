"""What the trainers add to transformers' options: decay, marks of an evaluation, push on a stop."""

import math
import os
import signal
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
import transformers.trainer
from transformers import Trainer, TrainerCallback, TrainingArguments

from tokenpack import is_patched, patch_model
from tokenpack.data import collate_packed_rows
from tokenpack.models.decoder import DecoderConfig, DecoderForCausalLM, RouterBiasCallback
from tokenpack.trainer import TokenBudgetArguments, TokenBudgetTrainer

from ..adapters.models import VOCABULARY
from .setting import CASES, collate, make_examples, make_trainer, on_ranks

EXAMPLES = make_examples(40, causal=True)
FEW = EXAMPLES[:9]


def decoder(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    return DecoderForCausalLM(DecoderConfig(vocab_size=VOCABULARY, **sizes, **changes))


# ------------------------------------------------------------------------------------------- decay


def decayed(trainer):
    """The names of the decayed parameters, by the groups of the optimizer."""
    names = {id(each): name for name, each in trainer.model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    return {names[id(each)] for g in groups if g["weight_decay"] > 0 for each in g["params"]}


def test_decay_on_matrices_alone(tmp_path):
    options = {"weight_decay": 0.1}
    model = decoder(ffn_type="moe", num_local_experts=4, norm_type="layernorm", attention_bias=True)
    model.register_parameter("gain", torch.nn.Parameter(torch.ones(3)))
    matrices = {name for name, each in model.named_parameters() if each.dim() > 1}
    assert "model.layers.0.mlp.experts.down_proj" in matrices
    own = make_trainer("Llama", tmp_path, FEW, model=model, decay="matrices", **options)
    assert decayed(own) == matrices
    default = make_trainer("Llama", tmp_path, FEW, model=model, **options)
    assert decayed(default) == {*matrices, "gain"}
    # As transformers does it, for every kind of model.
    for name, case in CASES.items():
        ours = make_trainer(name, tmp_path, make_examples(9, causal=name == "Llama"), **options)
        theirs = Trainer(case.build(), TrainingArguments(str(tmp_path), use_cpu=True, **options))
        assert decayed(ours) == decayed(theirs)
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    t5 = make_trainer("T5", tmp_path, make_examples(9), decay="matrices", **options)
    assert table in decayed(t5)


def test_decay_is_an_argument_too(tmp_path):
    common = {"use_cpu": True, "report_to": []}
    args = TokenBudgetArguments(str(tmp_path), decay="matrices", **common)
    assert TokenBudgetTrainer(decoder(), args, data_collator=collate).decay == "matrices"
    own = TokenBudgetTrainer(decoder(), args, data_collator=collate, decay="transformers")
    assert own.decay == "transformers"
    with pytest.raises(ValueError, match="decay must be 'transformers' or 'matrices', got 'all'"):
        make_trainer("Llama", tmp_path, FEW, decay="all")
    flat = torch.nn.Module()
    flat.weight = torch.nn.Parameter(torch.ones(6))
    trainer = make_trainer("Llama", tmp_path, FEW, decay="matrices")
    with pytest.raises(ValueError, match="decay must be 'transformers' for a model without matri"):
        trainer.get_decay_parameter_names(flat)
    flat.weight.ds_shape = (2, 3)  # as under ZeRO-3
    assert trainer.get_decay_parameter_names(flat) == ["weight"]


def test_the_cosine_has_a_floor(tmp_path):
    cosine = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 3e-5}}
    options = {"learning_rate": 3e-4, "max_steps": 8, "warmup_steps": 2, **cosine}
    trainer = make_trainer("Llama", tmp_path, EXAMPLES, **options)
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "loss" in log]
    assert max(rates) == pytest.approx(3e-4)
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(3e-5)


# ------------------------------------------------------------------------------------------- marks


def evaluations(trainer):
    return [log for log in trainer.state.log_history if "eval_loss" in log]


def test_the_log_of_an_evaluation_has_perplexity_and_the_best_mark(tmp_path):
    losses = iter([3.0, 1.0, 2.0, 0.5])
    options = {
        "eval_dataset": FEW,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 3,
        "metric_for_best_model": "worst",
        "greater_is_better": False,
        "compute_metrics": lambda _: {"worst": next(losses)},
    }
    trainer = make_trainer("Llama", tmp_path, EXAMPLES, **options)
    trainer.train()
    logs = evaluations(trainer)
    assert [log["eval_is_best"] for log in logs] == [True, True, False]
    for log in logs:
        assert log["eval_perplexity"] == pytest.approx(math.exp(log["eval_loss"]))
    # What a search of hyperparameters sums is as in transformers.
    metrics = trainer.evaluate()
    assert not {"eval_perplexity", "eval_is_best"} & set(metrics)
    after = evaluations(trainer)[-1]  # not in training: nothing is kept as the best
    assert "eval_is_best" not in after
    assert "eval_perplexity" in after


def test_no_perplexity_of_other_losses(tmp_path):
    trainer = make_trainer("Llama", tmp_path, FEW, eval_dataset=FEW, label_smoothing_factor=0.1)
    trainer.evaluate()
    trainer.predict(FEW)
    assert [*evaluations(trainer)[0]].count("eval_perplexity") == 0
    assert len(trainer.state.log_history) == 1


# ---------------------------------------------------------------------------------- push on a stop


class Stop(TrainerCallback):
    """Sends Ctrl-C within a step."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **_):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def hub(monkeypatch):
    """The uploads of a hub that does not exist."""
    uploads = []

    def upload(**options):
        uploads.append((options["commit_message"], sorted(os.listdir(options["folder_path"]))))
        done = Future()
        done.set_result(None)
        return done

    api = SimpleNamespace(
        create_repo=lambda name, **_: SimpleNamespace(repo_id=f"me/{name}"), upload_folder=upload
    )
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: api)
    return uploads


@pytest.mark.parametrize("strategy", ["every_save", "end"])
def test_a_stop_pushes_what_it_saves(strategy, hub, tmp_path):
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        options = {"push_to_hub": True, "hub_strategy": strategy, "callbacks": [Stop(2)]}
        trainer = make_trainer("Llama", tmp_path / "run", EXAMPLES, max_steps=4, **options)
        trainer.train()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert trainer.state.global_step == 2
    ((message, files),) = hub
    assert message.startswith("Training in progress")
    assert {"model.safetensors", "config.json"} <= set(files)
    assert trainer.args.hub_strategy == strategy
    hub.clear()  # a run that ends by itself does what transformers does
    trainer = make_trainer("Llama", tmp_path / "all", EXAMPLES, max_steps=2, save_strategy="steps",
                           save_steps=1, push_to_hub=True, hub_strategy=strategy)  # fmt: skip
    trainer.train()
    assert len(hub) == {"every_save": 2, "end": 0}[strategy]


# -------------------------------------------------------------------------- a model without a patch


def test_the_decoder_trains_without_a_patch(tmp_path):
    with pytest.raises(ValueError, match="DecoderForCausalLM cannot be patched, and needs no pat"):
        patch_model(decoder())
    with pytest.raises(ValueError, match="pad_to_total must be None for DecoderForCausalLM"):
        make_trainer("Llama", tmp_path, EXAMPLES, model=decoder(), pad_to_total=8)
    runs = []
    for budget in (100, 10_000):  # several micro-batches, and one
        moe = decoder(ffn_type="moe", num_local_experts=4, router_bias_update_rate=0.1)
        options = {"max_tokens_per_microbatch": budget, "callbacks": [RouterBiasCallback()]}
        trainer = make_trainer(
            "Llama", tmp_path, EXAMPLES, model=moe, max_steps=3, eval_dataset=FEW, **options
        )
        assert not is_patched(moe)
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        runs.append((losses, trainer.evaluate()["eval_loss"]))
        assert bool(moe.model.layers[0].mlp.gate.e_score_correction_bias.any())
    assert runs[0][0] == pytest.approx(runs[1][0], abs=1e-3)
    assert runs[0][0][2] < runs[0][0][0]
    one = {"max_steps": 1, "max_tokens_per_batch": 100_000}  # one batch of all examples
    packed = make_trainer("Llama", tmp_path, EXAMPLES, model=decoder(), **one)
    padded = make_trainer("Llama", tmp_path, EXAMPLES, model=decoder(), pack=False, **one)
    for trainer in (packed, padded):
        trainer.train()
    first = [trainer.state.log_history[0]["loss"] for trainer in (packed, padded)]
    assert first[0] == pytest.approx(first[1], abs=1e-6)


# ------------------------------------------------------------------------ rows of several documents


def packed_row(documents):
    ids = [token for each in documents for token in each["input_ids"]]
    labels = [label for each in documents for label in [-100, *each["input_ids"][1:]]]
    lengths = [len(each["input_ids"]) for each in documents]
    free = 120 - len(ids)
    ids, labels = ids + [0] * free, labels + [-100] * free
    return {"input_ids": ids, "labels": labels, "seq_lengths": lengths}


ROWS = [packed_row(EXAMPLES[3 * at : 3 * at + 1 + at % 3]) for at in range(12)]


def run_rows(folder, model, **options):
    given = {"max_steps": 2, "eval_dataset": ROWS[:7], "remove_unused_columns": False}
    given = {**given, "max_tokens_per_microbatch": 120, **options}
    trainer = make_trainer(
        "Llama", folder, ROWS, model=model, data_collator=collate_packed_rows, **given
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return before, [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("kind", ["decoder", "Llama"])
def test_rows_of_several_documents(kind, tmp_path):
    make = decoder if kind == "decoder" else CASES["Llama"].build
    losses = targets = 0.0
    model = make().eval()
    for row in ROWS[:7]:
        tokens = torch.tensor(row["input_ids"][: sum(row["seq_lengths"])])
        for ids in tokens.split(row["seq_lengths"]):
            loss = model(input_ids=ids[None], labels=ids[None]).loss.item() if len(ids) > 1 else 0.0
            losses, targets = losses + loss * (len(ids) - 1), targets + len(ids) - 1
    small, large = (
        run_rows(tmp_path, make(), max_tokens_per_microbatch=size) for size in (120, 10_000)
    )
    assert small[0] == pytest.approx(losses / targets, rel=1e-5)
    assert small[1] == pytest.approx(large[1], rel=1e-5)


def rows_on_rank(rank, folder):
    return run_rows(folder, decoder(initializer_range=0.5), eval_dataset=ROWS[2:9])


def test_rows_of_several_documents_on_two_ranks(tmp_path):
    before, losses = rows_on_rank(0, tmp_path / "alone")
    for ranks in on_ranks(2, rows_on_rank, str(tmp_path / "ranks")):
        assert ranks[0] == pytest.approx(before, rel=1e-5)
        assert ranks[1] == pytest.approx(losses, rel=1e-5)
