"""``tokenpack check``: the model of a folder, on a file."""

import json
from dataclasses import replace

import pytest
import torch
import transformers as hf

from tokenpack.adapters import head
from tokenpack.cli import main
from tokenpack.commands.one_batch import load_model, make_batch
from tokenpack.samples.tokenizer import train_tokenizer

from ..adapters.models import BY_NAME, LLAMA, PAD, T5
from ..comparison.test_faults import replaced, scaled_gradient

TEXTS = ["One.", "A text of several words.", "Two words", "The longest text of all, by far."]


def with_vocabulary(case):
    return replace(case, options={**case.options, "vocab_size": 400})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    with_vocabulary(LLAMA).build().save_pretrained(folder)
    train_tokenizer(TEXTS, 400).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def run(folder, tmp_path, capsys):
    def run(text, *options, name="data.txt", model=folder):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        tokenizer = ["--tokenizer", str(folder / "tokenizer.json")]
        code = main(["check", "--model", str(model), "--data", str(path), *tokenizer, *options])
        out = capsys.readouterr()
        return code, out.out + out.err

    return run


def test_a_right_model(run):
    code, text = run("\n".join(TEXTS))
    assert code == 0, text
    assert text.startswith("LlamaForCausalLM, 4 rows, ")
    assert "the packed run equals the padded one (float32, training mode, cpu)" in text
    assert "gradients of model.layers.0" in text
    code, text = run("\n".join(TEXTS), "--eval", "--no-gradients", "--dtype", "float64",
                     "--batch-size", "2", "--max-length", "5")  # fmt: skip
    assert code == 0, text
    assert text.startswith("LlamaForCausalLM, 2 rows, ")
    assert "(float64, evaluation mode, cpu)" in text
    assert "gradients" not in text


def test_a_wrong_model(run):
    with replaced(head, "mean_of_counted", scaled_gradient(0.5)):
        code, text = run("\n".join(TEXTS))
    assert code == 1
    assert "the packed run DIFFERS from the padded one" in text


def test_nothing_packed(run, tmp_path):
    config = hf.LlamaConfig(**{**LLAMA.options, "vocab_size": 400})
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config.save_pretrained(tmp_path / "dynamic")
    code, text = run("\n".join(TEXTS), "--random", model=tmp_path / "dynamic")
    assert code == 1
    assert "NOTHING PACKED, so the patch was not tested" in text
    assert "ran padded: rotary embeddings depend on the length of the padded batch (1)" in text


def test_pairs_and_columns(run, tmp_path):
    with_vocabulary(T5).build().save_pretrained(tmp_path / "t5")
    pairs = [{"source": text, "target": text[:5]} for text in TEXTS]
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    code, text = run(lines, name="pairs.jsonl", model=tmp_path / "t5")
    assert code == 0, text
    columns = ["--column", "source", "--target-column", "target"]
    assert run(lines, *columns, name="pairs.jsonl", model=tmp_path / "t5")[0] == 0
    ids = "".join(json.dumps({"ids": list(range(3, 3 + n))}) + "\n" for n in (4, 9))
    code, text = run(ids, "--column", "ids", name="ids.jsonl")
    assert code == 0
    assert "2 rows, 13 tokens in 18 slots" in text


@pytest.mark.parametrize(
    "text, options, message",
    [
        (
            '{"text": "a"}',
            ["--model", "/nowhere/at/all"],
            "--model must be a folder or a name on the hub",
        ),
        ('{"other": "a"}', ["--column", "ids"], "no column"),
        ('{"ids": 3}', ["--column", "ids"], "--column must name texts or lists of ids, got ids"),
        (
            '{"ids": [5, 400]}',
            ["--column", "ids"],
            "--data must have ids below 400, the vocabulary",
        ),
        ('{"ids": []}', ["--column", "ids"], "--data must hold rows that are not empty"),
    ],
)
def test_bad_input(run, text, options, message):
    code, printed = run(text, *options, name="data.jsonl")
    assert code == 2
    assert message in printed


LABELED = ("BertForSequenceClassification", "BertForMaskedLM", "LlamaForTokenClassification")


@pytest.mark.parametrize("name", ["T5Model", *LABELED, "T5ForConditionalGeneration"])
def test_labels_suit_the_model(name):
    model = BY_NAME[name].build()
    batch = make_batch(model, [([3, 4, 5], [6, 7]), ([8], [9, 10])])
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    outputs = model(**batch)
    assert name == "T5Model" or torch.isfinite(outputs.loss)
    if name == "BertForMaskedLM":  # the ids of the target alone, behind those of the source
        assert batch["input_ids"].tolist() == [[3, 4, 5, 6, 7], [8, 9, 10, PAD, PAD]]
        expected = [[-100, -100, -100, 6, 7], [-100, 9, 10, -100, -100]]
        assert batch["labels"].tolist() == expected


def test_a_model_without_a_named_class(tmp_path):
    hf.T5Config(**{**T5.options, "vocab_size": 97}).save_pretrained(tmp_path)
    assert type(load_model(str(tmp_path), random=True)) is hf.T5ForConditionalGeneration
    hf.BertConfig(**BY_NAME["BertForMaskedLM"].options, vocab_size=97).save_pretrained(tmp_path)
    assert type(load_model(str(tmp_path), random=True)) in (hf.BertForMaskedLM, hf.BertLMHeadModel)
