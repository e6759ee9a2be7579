"""Budgets, arguments, limits, logs and probing of the trainers."""

import inspect
from types import SimpleNamespace
from typing import get_type_hints

import pytest
import torch
from transformers import HfArgumentParser, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_utils import HPSearchBackend

from tokenpack import is_patched, packing_stats
from tokenpack.data import CappedSeq2SeqCollator
from tokenpack.trainer import (
    HierarchicalTokenTrainer,
    TokenBudget,
    TokenBudgetArguments,
    TokenBudgetTrainer,
)

from ..adapters.models import EOS, PAD
from .setting import CASES, collate, make_examples, make_trainer, on_ranks
from .test_exactness import Seen


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ------------------------------------------------------------------- compared with Seq2SeqTrainer


class SameBatches(Seq2SeqTrainer):
    """transformers' trainer with the batches of another trainer."""

    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(
            self.train_dataset, batch_sampler=self.planned, collate_fn=self.data_collator
        )


def test_80_steps_have_the_losses_of_seq2seq_trainer(tmp_path):
    """T5 with span corruption of real text. transformers trains on the same batches, padded."""
    from tokenpack.data import T5SpanCorruptionCollatorFast
    from tokenpack.samples.text import standard_library_texts
    from tokenpack.samples.tokenizer import train_tokenizer

    texts = [text.source for text in standard_library_texts(900)]
    plain = train_tokenizer(texts, 500)
    tokenizer = as_transformers(plain)
    examples = [{"input_ids": ids[:60]} for ids in tokenizer(texts)["input_ids"] if len(ids) > 3]

    def model():
        torch.manual_seed(0)
        config = CASES["T5"].build().config
        config.vocab_size = len(tokenizer)
        return type(CASES["T5"].build())(config)

    def collator():
        return T5SpanCorruptionCollatorFast(tokenizer, length_column_name=None, seed=1)

    options = {
        "max_steps": 80,
        "optim": "adamw_torch",
        "learning_rate": 3e-3,
        "max_grad_norm": 1.0,
        "seed": 5,
    }
    ours = make_trainer(
        "T5",
        tmp_path,
        examples,
        model=model(),
        data_collator=collator(),
        max_tokens_per_batch=300,
        max_tokens_per_microbatch=120,
        **options,
    )
    ours.train()
    args = Seq2SeqTrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **options,
    )
    theirs = SameBatches(model(), args, train_dataset=ours.train_dataset, data_collator=collator())
    theirs.planned = ours.plan
    theirs.planned.set_epoch(0)
    theirs.train()
    assert len(losses_of(ours)) == 80 <= len(ours.plan)  # within the epoch of `planned`
    assert losses_of(ours)[-1] < 0.9 * losses_of(ours)[0]
    assert losses_of(ours) == pytest.approx(losses_of(theirs), abs=1e-3)
    assert ours.state.log_history[0]["microbatches_per_step"] > 2


def as_transformers(tokenizer):
    from transformers import PreTrainedTokenizerFast

    from tokenpack.samples import tokenizer as names

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=names.PAD,
        eos_token=names.EOS,
        unk_token=None,
        additional_special_tokens=list(names.SENTINELS),
    )


# -------------------------------------------------------------------------------------- arguments


def test_the_signature_names_every_field_of_a_budget():
    parameters = inspect.signature(HierarchicalTokenTrainer).parameters
    assert set(TokenBudget.__dataclass_fields__) <= set(parameters)
    defaults = TokenBudget()
    assert (defaults.max_tokens_per_batch, defaults.max_tokens_per_microbatch) == (8192, 1024)
    assert (defaults.max_encoder_len, defaults.max_decoder_len) == (512, 256)


def test_arguments_have_the_same_fields_and_keywords_take_precedence(tmp_path):
    (args,) = HfArgumentParser(TokenBudgetArguments).parse_args_into_dataclasses(
        [
            *("--output_dir", str(tmp_path), "--max_tokens_per_batch", "4000", "--pack", "false"),
            *("--max_tokens_per_microbatch", "500", "--debug_batches", "--use_cpu"),
            *("--overlong", "drop", "--report_to", "none"),
        ]
    )
    trainer = HierarchicalTokenTrainer(
        CASES["T5"].build(),
        args,
        train_dataset=make_examples(3),
        data_collator=collate,
        max_tokens_per_microbatch=600,
    )
    budget = trainer.budget
    assert (budget.max_tokens_per_batch, budget.max_tokens_per_microbatch) == (4000, 600)
    assert (budget.pack, budget.debug, budget.overlong) == (False, True, "drop")
    assert not is_patched(trainer.model)
    assert set(TokenBudget.__dataclass_fields__) - {"debug"} <= set(
        TokenBudgetArguments.__dataclass_fields__
    )


def test_arguments_copy_types_defaults_and_help_of_the_budget():
    copies = TokenBudgetArguments.__dataclass_fields__
    types, copied_types = get_type_hints(TokenBudget), get_type_hints(TokenBudgetArguments)
    types["overlong"] = str  # HfArgumentParser gets the choices from the metadata
    for name, option in TokenBudget.__dataclass_fields__.items():
        copied_name = "debug_batches" if name == "debug" else name
        copy = copies[copied_name]
        assert copy.default == option.default
        assert copy.metadata["help"] == option.metadata["help"]
        assert copy.metadata.keys() <= {"help", "choices"}  # HfArgumentParser accepts no others
        assert copied_types[copied_name] == types[name]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch must be 1 or more, got 0"),
        ({"max_tokens_per_microbatch": 2.5}, "max_tokens_per_microbatch must be an integer"),
        ({"max_encoder_len": -1}, "max_encoder_len must be 1 or more"),
        ({"oom_max_retries": None}, "oom_max_retries must be an integer"),
        ({"overlong": "split"}, "overlong must be 'error', 'truncate' or 'drop'"),
        ({"auto_find_batch_size": True}, "auto_find_microbatch"),
        ({"optim": "lomo"}, "in each backward"),
        ({"optim": "galore_adamw_layerwise"}, "in each backward"),
        ({"neftune_noise_alpha": 5.0}, "pass pack=False"),
        ({"pack": "no"}, "pack must be True or False"),
    ],
)
def test_invalid_options(wrong, message, tmp_path):
    with pytest.raises((TypeError, ValueError), match=message):
        make_trainer("T5", tmp_path, make_examples(3), **wrong)


def made_without_use_cpu(rank, folder):
    with pytest.raises(ValueError, match=r"started 2 processes.* use_cpu=True"):
        make_trainer("T5", folder, make_examples(3), use_cpu=False)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="ranks find each other then")
def test_processes_without_a_process_group_are_an_error(tmp_path):
    on_ranks(2, made_without_use_cpu, tmp_path)


def test_a_model_that_cannot_be_packed_needs_pack_false(tmp_path):
    from transformers import LongT5Config, LongT5ForConditionalGeneration

    config = LongT5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = LongT5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"pack=True, but .*pack=False"):
        make_trainer("T5", tmp_path, make_examples(3), model=model)
    make_trainer("T5", tmp_path, make_examples(3), model=model, pack=False)


def test_a_model_patched_by_the_user_keeps_its_options(tmp_path):
    from tokenpack import patch_model

    model = patch_model(CASES["T5"].build(), logits="always", strict=True)
    trainer = make_trainer("T5", tmp_path, make_examples(3), model=model)
    assert trainer.model._tokenpack_entry.state.logits == "always"
    assert trainer.model._tokenpack_entry.state.strict


@pytest.mark.parametrize("name", ["T5", "Llama"])
def test_micro_batches_of_constant_shapes_train_the_same(name, tmp_path):
    runs = []
    for total in (None, 64):
        examples = make_examples(30, causal=name == "Llama")
        trainer = make_trainer(name, tmp_path, examples, pad_to_total=total)
        trainer.train()
        runs.append((losses_of(trainer), packing_stats(trainer.model)))
    (plain, expected), (filled, stats) = runs
    assert filled == pytest.approx(plain, rel=1e-5)
    assert stats.packed_tokens == expected.packed_tokens
    assert (stats.packed_tokens + stats.dead_tokens) % 64 == 0
    assert stats.dead_tokens > expected.dead_tokens == 0


def test_pad_to_total_belongs_to_whom_the_patch_does(tmp_path):
    from tokenpack import patch_model
    from tokenpack.data import packed_collate_fn

    with pytest.raises(ValueError, match="pad_to_total must be None for a model that is patched"):
        make_trainer(
            "T5", tmp_path, make_examples(3), model=patch_model(CASES["T5"].build()), pad_to_total=8
        )
    trainer = make_trainer(
        *("Llama", tmp_path, make_examples(3, causal=True)),
        data_collator=packed_collate_fn(40, stream=True, pad_to_total=8),
    )
    with pytest.raises(ValueError, match="pass pad_to_total to the trainer"):
        trainer.train()


def test_model_init_is_patched_each_time(tmp_path):
    args = Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True, report_to=[], max_steps=1)
    trainer = HierarchicalTokenTrainer(
        None,
        args,
        model_init=lambda: CASES["T5"].build(),
        train_dataset=make_examples(10),
        data_collator=collate,
    )
    trainer.train()
    assert is_patched(trainer.model)


# ----------------------------------------------------------------------------------------- limits


def with_long_ones():
    examples = make_examples(20, longest=30)
    examples[3]["input_ids"] = [*range(3, 60), EOS]
    examples[7]["labels"] = [*range(3, 40), EOS]
    return examples


def test_overlong_examples_are_an_error(tmp_path):
    trainer = make_trainer("T5", tmp_path, with_long_ones(), max_encoder_len=40, max_decoder_len=30)
    with pytest.raises(ValueError, match=r"2 of 20 .*example 3 is the first, with 58"):
        trainer.train()


def test_overlong_examples_are_dropped(tmp_path):
    seen = Seen()
    trainer = make_trainer(
        "T5",
        tmp_path,
        with_long_ones(),
        max_encoder_len=40,
        max_decoder_len=30,
        overlong="drop",
        callbacks=[seen],
    )
    seen.trainer = trainer
    trainer.train()
    assert trainer.dropped_examples == 2
    assert sorted(i for step in seen.examples for i in step) == sorted(set(range(20)) - {3, 7})


@pytest.mark.parametrize("kind", ["list", "datasets"])
def test_overlong_examples_are_truncated_and_keep_their_eos(kind, tmp_path):
    given = []

    def recording(examples):
        given.extend(examples)
        return collate(examples)

    examples = with_long_ones()
    if kind == "datasets":
        datasets = pytest.importorskip("datasets")
        examples = datasets.Dataset.from_list(examples)
    trainer = make_trainer(
        "T5",
        tmp_path,
        examples,
        max_encoder_len=40,
        max_decoder_len=30,
        overlong="truncate",
        data_collator=recording,
    )
    trainer.train()
    assert trainer.truncated_examples == 2
    longest = max(given, key=lambda each: len(each["input_ids"]))
    assert list(longest["input_ids"]) == [*range(3, 42), EOS]
    deepest = max(given, key=lambda each: len(each["labels"]))
    assert list(deepest["labels"]) == [*range(3, 32), EOS]


def test_a_collator_cannot_exceed_the_budget(tmp_path):
    def doubling(examples):
        return collate([{**each, "input_ids": each["input_ids"] * 3} for each in examples])

    trainer = make_trainer("T5", tmp_path, make_examples(10), data_collator=doubling)
    with pytest.raises(ValueError, match=r"example \d+ has \d+ tokens after collation"):
        trainer.train()


@pytest.mark.parametrize("pack", [True, False])
def test_no_microbatch_exceeds_the_budget(pack, tmp_path):
    sizes = []
    examples = make_examples(60)
    trainer = make_trainer(
        "T5", tmp_path, examples, pack=pack, max_tokens_per_microbatch=70, max_tokens_per_batch=500
    )
    inner = trainer._mean_loss

    def recording(model, inputs, targets):
        slots = inputs["input_ids"].numel() + inputs["labels"].numel()
        real = int(inputs["attention_mask"].sum() + (inputs["labels"] != -100).sum())
        sizes.append(real if pack else slots)
        return inner(model, inputs, targets)

    trainer.runner.mean_loss = recording
    trainer.train()
    total = sum(len(each["input_ids"]) + len(each["labels"]) for each in examples)
    assert max(sizes) <= 70
    assert sum(sizes) == total if pack else sum(sizes) >= total


# ----------------------------------------------------------------------------------------- logs


def test_logs(tmp_path):
    trainer = make_trainer("T5", tmp_path, make_examples(60), log_longest_every=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in logs:
        assert 0 < entry["real_token_share"] <= 1
        assert entry["tokens_per_second"] > 0
        assert entry["max_tokens_per_microbatch"] == 100
        assert entry["microbatches_per_step"] >= 3
        assert entry["out_of_memory"] == 0
    longest = max(len(e["input_ids"]) + len(e["labels"]) for e in trainer.train_dataset)
    assert [("longest_sequence" in entry) for entry in logs[:4]] == [False, True, False, True]
    assert logs[-1 - len(logs) % 2]["longest_sequence"] <= longest


def test_a_length_column_of_the_collator_does_not_prevent_packing(tmp_path):
    tokenizer = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS, padding_side="right")
    collator = CappedSeq2SeqCollator(tokenizer)
    assert "input_length" in collator(make_examples(2))
    trainer = make_trainer("T5", tmp_path, make_examples(20), data_collator=collator)
    trainer.train()
    stats = packing_stats(trainer.model)
    assert stats.packed_calls > 0
    assert not stats.fallbacks


def test_debug_prints_the_plan(tmp_path, capsys):
    make_trainer("T5", tmp_path, make_examples(60), debug=True, max_steps=1).train()
    printed = capsys.readouterr().out
    assert "longest" in printed
    assert "tokens" in printed


def test_an_iterable_dataset_is_batched_by_rows_and_split(tmp_path):
    examples = make_examples(40)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(examples)

    trainer = make_trainer("T5", tmp_path, Stream(), max_steps=4, per_device_train_batch_size=10)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 4
    assert logs[0]["microbatches_per_step"] >= 3


def test_sequential_sampling_keeps_the_order(tmp_path):
    seen = Seen()
    trainer = make_trainer(
        "T5", tmp_path, make_examples(30), callbacks=[seen], train_sampling_strategy="sequential"
    )
    seen.trainer = trainer
    trainer.train()
    assert [i for step in seen.examples for i in step] == list(range(30))


def test_epochs_differ_and_seeds_repeat(tmp_path):
    def order(seed):
        seen = Seen()
        trainer = make_trainer(
            "T5", tmp_path, make_examples(60), callbacks=[seen], num_train_epochs=2, seed=seed
        )
        seen.trainer = trainer
        trainer.train()
        half = len(seen.examples) // 2
        return seen.examples[:half], seen.examples[half:]

    first, second = order(1)
    assert first != second
    for epoch in (first, second):
        assert sorted(i for step in epoch for i in step) == list(range(60))
    assert order(1) == (first, second)
    assert order(2) != (first, second)


# ---------------------------------------------------------------------------------------- probing


def test_the_largest_budget_that_fits_is_found(tmp_path, monkeypatch):
    """Micro-batches over 333 tokens run out of memory."""
    trainer = make_trainer(
        "T5",
        tmp_path,
        make_examples(100),
        max_tokens_per_batch=2000,
        max_tokens_per_microbatch=100,
        auto_find_microbatch=True,
        max_steps=2,
    )
    inner = trainer.runner.mean_loss
    tried = []

    def bounded(model, inputs, targets):
        tokens = int(inputs["attention_mask"].sum() + (inputs["labels"] != -100).sum())
        tried.append(tokens)
        if tokens > 333:
            raise torch.OutOfMemoryError("CUDA out of memory. Injected.")
        return inner(model, inputs, targets)

    trainer.runner.mean_loss = bounded
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    state = torch.get_rng_state()
    trainer.set_plan_epoch = lambda epoch: None
    trainer._get_train_sampler()
    trainer.get_train_dataloader()
    trainer.find_microbatch()
    assert 300 <= trainer.runner.max_tokens <= 333 * 17 // 16
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    assert all(p.grad is None for p in trainer.model.parameters())
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("pack", [True, False])
def test_probing_includes_the_longest_targets(pack, tmp_path):
    """Only targets have logits. With padding, slots count."""
    examples = [
        {"input_ids": [5] * source, "labels": [6] * target}
        for source, target in [(60, 2), (2, 20)] * 40
    ]
    trainer = make_trainer(
        "T5",
        tmp_path,
        examples,
        max_tokens_per_batch=600,
        auto_find_microbatch=True,
        max_steps=1,
        pack=pack,
    )
    inner, tried = trainer.runner.mean_loss, []

    def recording(model, inputs, targets):
        tried.append((inputs["input_ids"].numel(), inputs["labels"].numel()))
        return inner(model, inputs, targets)

    trainer.runner.mean_loss = recording
    trainer._get_train_sampler()
    trainer.get_train_dataloader()
    trainer.find_microbatch()
    assert trainer.runner.max_tokens == 600
    assert max(targets for _, targets in tried) >= 20 * (600 // 22)
    assert pack or max(map(sum, tried)) <= 600


def test_values_of_a_search_take_precedence_over_keywords(tmp_path):
    """Like optuna's search, which sets fields of the arguments before each trial."""
    args = TokenBudgetArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = HierarchicalTokenTrainer(
        CASES["T5"].build(),
        args,
        train_dataset=make_examples(20),
        data_collator=collate,
        max_tokens_per_batch=300,
        max_tokens_per_microbatch=100,
    )
    trainer.hp_search_backend = HPSearchBackend.OPTUNA
    trainer.hp_space = lambda trial: trial.params
    trainer.runner.max_tokens = 7
    trainer._hp_search_setup(SimpleNamespace(params={"max_tokens_per_batch": 600}))
    assert trainer.budget.max_tokens_per_batch == 600
    assert trainer.budget.max_tokens_per_microbatch == trainer.runner.max_tokens == 100
    assert trainer.runner.accelerator is trainer.accelerator


def log_on_first_rank(rank, folder):
    trainer = make_trainer("T5", folder, make_examples(20))
    inner = trainer.compute_loss

    def compute_loss(*args, **kwargs):
        if rank == 0:
            trainer.log({"loss": 1.0})
        return inner(*args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    return [entry for entry in trainer.state.log_history if "tokens_per_second" in entry]


def test_a_user_may_log_on_one_rank(tmp_path):
    """Only the trainer's own logs gather from other ranks and reset the counts."""
    first, second = on_ranks(2, log_on_first_rank, tmp_path)
    assert len(first) == len(second) > 0
    assert all(entry["tokens_per_second"] > 0 for entry in first)


def test_the_longest_is_logged_in_each_training(tmp_path):
    trainer = make_trainer("T5", tmp_path, make_examples(20), log_longest_every=1)
    for _ in range(2):
        trainer.train()
        assert any("longest_sequence" in entry for entry in trainer.state.log_history)
        trainer.state.log_history.clear()


def test_a_causal_trainer_has_no_caps_of_its_own(tmp_path):
    examples = [{"input_ids": [5] * 600, "labels": [5] * 600}] * 2
    trainer = make_trainer(
        "Llama", tmp_path, examples, max_tokens_per_microbatch=700, max_tokens_per_batch=700
    )
    assert isinstance(trainer, TokenBudgetTrainer)
    assert trainer.budget.max_encoder_len is None
