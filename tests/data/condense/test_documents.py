"""Documents for the condenser: ids, one EOS, windows, the split, and packed batches."""

import random

import numpy as np
import pytest
import torch
from datasets import Dataset

from tokenpack.data.condense import (
    CondenseBatch,
    CondenseCollator,
    split_by_content,
    tokenize_documents,
)
from tokenpack.data.tokenizers import train_tokenizer

SENTENCE = "the condenser reads a long context and writes few vectors for one frozen decoder"
WORDS = SENTENCE.split(" ")
TRIPLES = {
    "context": ["a long context", "the frozen decoder reads"],
    "prompt": ["reads?", ""],
    "completion": ["few vectors", "one[EOS][EOS]"],
}


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer([" ".join(WORDS)] * 3, 330, pad_token="[EOS]")
    assert made.pad_token_id == made.eos_token_id
    return made


def text(length, seed=0):
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(length))


def test_completions_end_with_one_eos_although_it_is_the_padding(tokenizer):
    made = tokenize_documents(Dataset.from_dict(TRIPLES), tokenizer, tokenizer)
    eos = tokenizer.eos_token_id
    for ids in made["completion_ids"]:
        assert ids.count(eos) == 1
        assert ids[-1] == eos
    batch = CondenseCollator(None)([made[0], made[1]])
    learned = batch["labels"][batch["labels"] != -100]
    assert learned.tolist() == [token for ids in made["completion_ids"] for token in ids]
    assert tokenizer.decode(made[0]["context_ids"]) == "a long context"
    assert made["is_text"] == [False, False]
    assert made["prompt_length"] == [len(ids) for ids in made["prompt_ids"]]


def test_windows_of_texts_join_to_the_text(tokenizer):
    texts = [text(200), text(30, seed=1), "a"]
    made = tokenize_documents(
        Dataset.from_dict({"text": texts}), tokenizer, tokenizer,
        max_context_tokens=40, continuation_tokens=12, prompt_tokens=4,
    )  # fmt: skip
    joined = [[*row["reference_ids"], *row["prompt_ids"], *row["completion_ids"]] for row in made]
    flat = [token for ids in joined for token in ids if token != tokenizer.eos_token_id]
    assert tokenizer.decode(flat) == texts[0] + texts[1]
    assert max(map(len, joined)) <= 40 + 12 + 4 + 1
    assert {len(row["prompt_ids"]) for row in made} == {4}
    assert sum(ids[-1] == tokenizer.eos_token_id for ids in made["completion_ids"]) == 2
    assert all(row["is_text"] and row["context_length"] >= 1 for row in made)
    for row in made:  # nothing of the prompt is in the context
        assert tokenizer.decode(row["context_ids"]) == tokenizer.decode(row["reference_ids"])


def test_no_content_is_on_both_sides():
    texts = [text(5, seed=at % 40) for at in range(200)]
    train, held_out = split_by_content(Dataset.from_dict({"text": texts}), 0.3)
    assert len(train) + len(held_out) == 200
    assert not set(train["text"]) & set(held_out["text"])
    shuffled = Dataset.from_dict({"text": texts[::-1]})
    assert set(split_by_content(shuffled, 0.3)[1]["text"]) == set(held_out["text"])
    contents = [f"{letter}{space}" for letter in "abcdefghijkl" for space in ("", " ")]
    rows = {"context": contents, "prompt": list(map(str, range(24)))}
    one, other = split_by_content(Dataset.from_dict(rows), 0.5)
    contexts = [{each.strip() for each in side["context"]} for side in (one, other)]
    assert not contexts[0] & contexts[1]


def rows_of(count=5):
    rng = np.random.default_rng(0)
    return [
        {
            f"{name}_ids": rng.integers(3, 90, low + at).tolist()
            for name, low in (("context", 1), ("reference", 2), ("prompt", 0), ("completion", 1))
        }
        | {"is_text": bool(at % 2)}
        for at in range(count)
    ]


def test_select_is_the_batch_of_those_documents():
    rows, collator = rows_of(), CondenseCollator([4, 8], seed=1)
    batch = collator(rows).select([3, 0])
    expected = collator([rows[3], rows[0]])
    assert isinstance(batch, CondenseBatch)
    assert batch.keys() == expected.keys()
    assert all(batch[name].equal(value) for name, value in expected.items())
    with pytest.raises(ValueError, match="cu_seqlens must end at the"):
        CondenseBatch({**batch, "cu_seqlens": torch.tensor([0, 3])})


def test_ratios_depend_on_the_context_the_seed_and_the_epoch_alone():
    rows = rows_of(60)
    collator = CondenseCollator([2, 4, 8], seed=5)
    first = collator(rows)["ratios"]
    assert set(first.tolist()) == {2, 4, 8}
    assert collator(rows[::-1])["ratios"].flip(0).equal(first)
    assert collator(rows[7:9])["ratios"].equal(first[7:9])
    collator.set_epoch(1)
    assert not collator(rows)["ratios"].equal(first)
    assert CondenseCollator([2, 4, 8], draw=False)(rows)["ratios"].tolist() == [2] * 60


def test_bad_rows_are_named(tokenizer):
    def tokenize(columns, **options):
        return tokenize_documents(Dataset.from_dict(columns), tokenizer, tokenizer, **options)

    with pytest.raises(ValueError, match="must have the columns context, prompt and completion"):
        tokenize({"question": ["a"]})
    empty = {**TRIPLES, "context": ["a", ""]}
    with pytest.raises(ValueError, match="context must not be empty, got row 1"):
        tokenize(empty)
    with pytest.raises(ValueError, match="at most max_context_tokens=2 tokens, got row"):
        tokenize(TRIPLES, max_context_tokens=2)
    with pytest.raises(ValueError, match="dataset must have a text with a context"):
        tokenize({"text": ["a"]})
    with pytest.raises(ValueError, match="held_out must leave rows on both sides"):
        split_by_content(Dataset.from_dict({"text": ["a", "a"]}), 0.5)
    with pytest.raises(ValueError, match="got document 1 of a batch with none"):
        CondenseCollator(None)([rows_of()[0], {**rows_of()[1], "context_ids": []}])


def test_only_tokens_move_to_a_device(tokenizer):
    made = tokenize_documents(Dataset.from_dict(TRIPLES), tokenizer, tokenizer)
    batch = CondenseCollator([2, 4])([made[0], made[1]])
    moved = batch.to("meta")
    tokens = {"input_ids", "decoder_input_ids", "labels", "reference_ids"}
    assert {name for name, value in moved.items() if value.is_meta} == tokens
    assert torch.equal(moved["cu_seqlens"], batch["cu_seqlens"])
