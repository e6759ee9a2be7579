"""Unusual batches of collators, and the truncation of examples."""

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    GPT2Config,
    GPT2LMHeadModel,
)

from tokenpack.trainer.device_feed import on_device
from tokenpack.trainer.loading import Caps, PlannedDataset

from .setting import (
    CASES,
    KeepGradients,
    collate,
    collate_left,
    distance,
    make_examples,
    make_trainer,
    padded_gradient,
)

TOLERANCE = 1e-5


def check_like_unsplit(build, examples, collator, tmp_path, **options):
    """Check that a step in micro-batches has the loss and gradient of the unsplit batch."""
    seen = KeepGradients()
    trainer = make_trainer(
        "Llama",
        tmp_path,
        examples,
        model=build(),
        data_collator=collator,
        callbacks=[seen],
        max_tokens_per_batch=10_000,
        max_tokens_per_microbatch=100,
        learning_rate=0.0,
        **options,
    )
    trainer.train()
    assert trainer.state.log_history[0]["microbatches_per_step"] > 1
    model = build()
    # All examples are in the only batch, and their order does not change the mean loss.
    loss = model(**collator(examples)).loss
    loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert distance(seen.steps[0], expected) < TOLERANCE
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97, n_positions=64, n_embd=32, n_layer=1, n_head=4, use_cache=False
    )
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(config, name, 0.0)
    return GPT2LMHeadModel(config)


def test_positions_that_count_left_padding_do_not_change(tmp_path):
    """GPT-2 adds a position embedding per column, unless it gets position_ids."""

    def collator(examples):
        batch = collate_left(examples)
        first = batch["attention_mask"].argmax(1)
        batch["labels"][torch.arange(len(first)), first] = -100  # not predicted from padding
        return batch

    check_like_unsplit(gpt2, make_examples(12, causal=True), collator, tmp_path, pack=False)


def bert_for_answers():
    torch.manual_seed(0)
    return BertForQuestionAnswering(
        BertConfig(
            vocab_size=97,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def test_answers_are_columns_counted_from_the_left(tmp_path):
    def collator(examples):
        batch = dict(collate_left(examples))
        width = batch.pop("labels").shape[1]
        batch["start_positions"] = torch.tensor([width - len(e["input_ids"]) for e in examples])
        batch["end_positions"] = batch["start_positions"] + 1
        return batch

    examples = make_examples(12, causal=True)
    options = {"pack": False, "remove_unused_columns": False}
    check_like_unsplit(bert_for_answers, examples, collator, tmp_path, **options)


@pytest.mark.parametrize("pack", [True, False])
def test_position_ids_of_one_row_apply_to_all(pack, tmp_path):
    def collator(examples):
        batch = collate(examples)
        return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None]}

    build = CASES["Llama"].build
    check_like_unsplit(build, make_examples(12, causal=True), collator, tmp_path, pack=pack)


def test_a_tensor_of_the_user_with_one_value_per_token(tmp_path):
    """A tensor with a weight per token is split in rows and columns like the tokens."""
    shapes = []

    def collator(examples):
        batch = collate(examples)
        return {**batch, "weights": batch["attention_mask"].float()}

    trainer = make_trainer(
        "Llama", tmp_path, make_examples(12, causal=True), data_collator=collator
    )
    inner = trainer.compute_loss

    def compute_loss(model, inputs, **options):
        weights = inputs.pop("weights")
        shapes.append((weights.shape, inputs["input_ids"].shape))
        assert torch.equal(weights.long(), inputs["attention_mask"])
        return inner(model, inputs, **options)

    trainer.compute_loss = compute_loss
    trainer.train()
    assert len({columns for (_, columns), _ in shapes}) > 1


@pytest.mark.parametrize("pack", [True, False])
def test_labels_at_padding_are_an_error(pack, tmp_path):
    def collator(examples):
        batch = collate(examples)
        return {**batch, "labels": batch["input_ids"].clone()}

    examples = make_examples(12, causal=True)
    trainer = make_trainer("Llama", tmp_path, examples, data_collator=collator, pack=pack)
    with pytest.raises(ValueError, match=r"labels must be -100 where attention_mask is 0"):
        trainer.train()


def test_a_collator_that_joins_examples_gives_an_error_without_an_index(tmp_path):
    def collator(examples):
        several = [{"input_ids": [5], "labels": [5]}] * len(examples)
        return collate([*several, {"input_ids": [5] * 200, "labels": [5] * 200}])

    trainer = make_trainer("Llama", tmp_path, make_examples(6, causal=True), data_collator=collator)
    with pytest.raises(ValueError, match="every sequence, got 100, but a row has 200"):
        trainer.train()


@pytest.mark.parametrize("pack", [True, False])
def test_prompt_tuning_predicts_first_tokens_too(pack, tmp_path):
    """A virtual token precedes each row and predicts its first token."""
    peft = pytest.importorskip("peft")

    def build():
        torch.manual_seed(0)
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        return peft.get_peft_model(CASES["Llama"].build(), config)

    check_like_unsplit(build, make_examples(12, causal=True), collate, tmp_path, pack=pack)


def test_tensors_are_copied_to_the_device_and_other_objects_are_not():
    class Notes:
        def to(self, *args, **options):
            raise AssertionError

    batch = {"input_ids": torch.ones(2), "pair": ({"x": [torch.ones(2)]}, 1), "notes": Notes()}
    copied = on_device(batch, torch.device("meta"))
    assert copied["input_ids"].is_meta
    assert copied["pair"][0]["x"][0].is_meta
    assert copied["pair"][1] == 1
    assert copied["notes"] is batch["notes"]


@pytest.mark.parametrize("plain", [dict, lambda batch: batch])
def test_training_step_called_directly(plain, tmp_path):
    examples = make_examples(6, causal=True)
    trainer = make_trainer("Llama", tmp_path, examples)
    loss = trainer.training_step(trainer.model, plain(collate(examples)))
    expected, gradient = padded_gradient("Llama", examples)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert distance({n: p.grad for n, p in trainer.model.named_parameters()}, gradient) < TOLERANCE


# --------------------------------------------------------------------------------------------- cut


def cut(example, source, target=0):
    dataset = PlannedDataset([example], np.arange(1), Caps(np.array([source]), np.array([target])))
    return dataset[0][1]


KINDS = {
    "list": list,
    "tuple": tuple,
    "numpy": np.array,
    "torch": torch.tensor,
}


@pytest.mark.parametrize("kind", KINDS)
def test_truncation_keeps_the_last_token_and_consecutive_positions(kind):
    ids, positions = [5, 6, 7, 8, 1], [0, 1, 2, 3, 4]
    example = {
        "input_ids": ids,
        "labels": ids,
        "attention_mask": [1] * 5,
        "position_ids": positions,
    }
    example = {name: KINDS[kind](value) for name, value in example.items()}
    short = cut(example, 3)
    assert {name: list(map(int, value)) for name, value in short.items()} == {
        "input_ids": [5, 6, 1],
        "labels": [5, 6, 1],
        "attention_mask": [1, 1, 1],
        "position_ids": [0, 1, 2],
    }
    assert type(short["input_ids"]) is type(example["input_ids"])
    assert list(map(int, example["input_ids"])) == ids


@pytest.mark.parametrize("labels", [1, torch.tensor(1), np.int64(1), "a text", [0.0, 1.0, 0.0]])
def test_labels_of_the_whole_example_are_not_cut(labels):
    short = cut({"input_ids": [5] * 9, "labels": labels}, 2)
    assert short["labels"] is labels
    assert short["input_ids"] == [5, 5]


def test_source_and_target_share_the_budget(tmp_path):
    """The longer side is cut first, but not below half of the total."""
    examples = [
        {"input_ids": [5] * source, "labels": [6] * target}
        for source, target in ((30, 200), (200, 30), (200, 200), (10, 10))
    ]
    kept = []

    def collator(given):
        kept.extend((len(each["input_ids"]), len(each["labels"])) for each in given)
        return collate(given)

    trainer = make_trainer(
        "T5", tmp_path, examples, overlong="truncate", data_collator=collator,
        max_encoder_len=None, max_decoder_len=None,
    )  # fmt: skip
    trainer.train()
    assert sorted(kept) == [(10, 10), (30, 70), (50, 50), (70, 30)]
