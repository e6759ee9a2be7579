"""`tokenpack inspect --gpus`: its predictions, the batches they are based on, and bad input."""

import json
from dataclasses import replace

import numpy as np
import pytest
from transformers import T5Config

from tokenpack.cli import main
from tokenpack.commands import prediction
from tokenpack.commands.epochs import TextLengths
from tokenpack.cost import Ceilings, StepMemory, write_ceilings
from tokenpack.samples.tokenizer import train_tokenizer

TEXTS = ["Summary. " + "Body of words. " * count for count in (1, 2, 4, 9, 15, 40)]
GIB = 2**30
DEVICE = Ceilings(
    "a GPU", "bfloat16", 4e14, 2e14, 2e12, 2e12, 5e-6, 1e-6, 1e-6, 0.0, 2e-6, 0.0, 80 * GIB
)


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Arguments of inspect: data of pairs, a tokenizer, a model's config; and a device's file."""
    monkeypatch.setattr(prediction, "_SEQUENCES", 1_000)
    data, tokenizer = tmp_path / "pairs.jsonl", tmp_path / "tokenizer.json"
    lines = [{"source": text, "target": "Summary."} for text in TEXTS]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    train_tokenizer(TEXTS, 400).save(str(tokenizer))
    T5Config(
        vocab_size=400, d_model=64, d_kv=16, d_ff=128, num_heads=4, num_layers=2
    ).save_pretrained(tmp_path / "model")
    write_ceilings(DEVICE, tmp_path / "device.json")
    return [
        *("inspect", "--data", str(data), "--tokenizer", str(tokenizer)),
        *("--model-config", str(tmp_path / "model"), "--out", str(tmp_path / "out")),
    ]


def test_it_prints_and_writes_a_prediction(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prediction, "_SEQUENCES", 20_000)  # to plan steps of 1,024 ranks
    device = ["--gpus", "4", "--ceilings", str(tmp_path / "device.json"), "--link", "50"]
    assert main([*arguments, *device]) == 0
    printed = capsys.readouterr().out
    assert "predicted for a GPU at its peak (bfloat16: products 400 TFLOP/s" in printed
    assert "over links of 50 GB/s" in printed
    found = json.loads((tmp_path / "out/inspect.json").read_text())["prediction"]
    assert f"max_tokens_per_microbatch={found['packed_budget']:,} fits" in printed
    assert [each["ranks"] for each in found["of_ranks"]] == [4, 8, 64, 1024]
    assert all(0.5 < each["balance"] <= 1 for each in found["of_ranks"])
    for each in found["of_rows"]:
        assert each["padded"]["products"] > each["packed"]["products"]
        assert each["padded_bytes"] > each["packed_bytes"]
    wider = [each["padded"]["products"] for each in found["of_rows"]]
    assert wider == sorted(wider)


def test_one_device_has_no_table_of_ranks(arguments, tmp_path, capsys):
    assert main([*arguments, "--gpus", "1", "--ceilings", str(tmp_path / "device.json")]) == 0
    assert "all-reduce" not in capsys.readouterr().out


def test_without_gpus_nothing_is_predicted(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    assert "predicted" not in capsys.readouterr().out
    assert "prediction" not in json.loads((tmp_path / "out/inspect.json").read_text())


def test_a_model_that_fits_no_device(arguments, tmp_path, capsys):
    small = replace(DEVICE, memory=2**20)
    write_ceilings(small, tmp_path / "small.json")
    assert main([*arguments, "--gpus", "2", "--ceilings", str(tmp_path / "small.json")]) == 0
    printed = capsys.readouterr().out
    assert "weights, gradients and optimizer do not fit into this device's memory" in printed
    assert "nor do they fit when sharded over 2 devices" in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ceilings", "device.json"], "--ceilings must be used with --gpus N"),
        (["--gpus", "0"], "--gpus"),
        (["--gpus", "2", "--link", "0"], "must be a number above 0"),
        (["--gpus", "2", "--ceilings", "absent.json"], "absent.json"),
        (
            ["--gpus", "2", "--model-config", "absent/config.json"],
            "--model-config must be",
        ),
    ],
)
def test_bad_input(arguments, more, message, capsys):
    try:
        code = main([*arguments, *more])
    except SystemExit as exit:  # raised by argparse
        code = exit.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_the_largest_batch_is_the_one_that_needs_most_memory():
    lengths = TextLengths(np.array([1, 9, 2, 2]), np.array([5, 1, 1, 8]))
    step = StepMemory(np.array([[7.0, 0.0, 1.0, 10.0]]))
    order = np.arange(4)
    assert prediction._largest_bytes(lengths, order, 2, np.add, step) == 7 + 4 + 90
    assert prediction._largest_bytes(lengths, order, 2, np.maximum, step) == 7 + 4 + 160


def test_no_batch_is_skipped():
    random = np.random.default_rng(0)
    lengths = TextLengths(random.integers(0, 50, 501), random.integers(0, 50, 501))
    order = random.permutation(501)
    for slopes in ((1.0, 1.0), (5.0, 1.0), (1.0, 5.0)):
        step = StepMemory(np.array([[0.0, 0.0, *slopes]]))
        bytes_of_all = [
            slopes[0] * lengths.encoder[order[at : at + 8]].sum()
            + slopes[1] * lengths.decoder[order[at : at + 8]].sum()
            for at in range(0, 501, 8)
        ]
        assert prediction._largest_bytes(lengths, order, 8, np.add, step) == max(bytes_of_all)
