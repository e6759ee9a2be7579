"""The command line: output, files, exit codes, errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models

from tokenpack import __version__, cli, commands
from tokenpack.cli import main
from tokenpack.commands import demo, figures, side_by_side
from tokenpack.data.packed.dataset import COLUMNS
from tokenpack.packing import Packer, pack_lengths
from tokenpack.samples.tokenizer import train_tokenizer

TEXTS = ["Summary.\n\n" + "Body of words. " * count for count in (1, 2, 4, 9, 15, 40)]


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def one_text(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("A text alone.")
    return path


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = [{"source": text, "target": "Summary."} for text in TEXTS]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    train_tokenizer(TEXTS, 400).save(str(path))
    return path


def run_demo(data, out, *others):
    arguments = ["demo", "--size", "tiny", "--device", "cpu", "--steps", "2", "--out", str(out)]
    return main([*arguments, "--data", str(data), *others])


# -------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["check"],
        ["demo"],
        ["doctor"],
        ["generate"],
        ["inspect"],
        ["inspect-model"],
        ["pack"],
        ["preview"],
    ],
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*command, "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert "tokenpack demo" in text or command != ["demo"]
    assert "example" in text or not command
    assert max(map(len, text.splitlines())) <= 100


def test_every_command_is_in_the_list_at_the_top(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = [line.split()[1] for line in capsys.readouterr().out.splitlines()
              if line.startswith("  tokenpack ")]  # fmt: skip
    folder = Path(commands.__file__).parent
    found = [path.stem for path in folder.glob("*.py") if "\ndef run(" in path.read_text()]
    assert listed == sorted(name.replace("_", "-") for name in found)


def test_help_of_pack_lists_all_strategies_and_columns(capsys):
    with pytest.raises(SystemExit):
        main(["pack", "--help"])
    words = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line]
    first = [line[0] for line in words]
    assert set(Packer.strategies()) | set(COLUMNS) <= set(first)
    assert cli._COLUMNS == COLUMNS


def test_module_and_version():
    done = subprocess.run(
        [sys.executable, "-m", "tokenpack", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"tokenpack {__version__}"


def test_help_does_not_import_torch():
    code = "import sys, tokenpack.cli as cli; cli.build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -------------------------------------------------------------------------------------------- demo


def test_demo_prints_a_row_per_model_and_writes_everything(texts, tmp_path, capsys):
    out = tmp_path / "a" / "b"
    assert run_demo(texts, out) == 0
    printed = capsys.readouterr().out
    for title in ("T5 ", "NLLB ", "Llama "):
        assert sum(line.startswith(title) for line in printed.splitlines()) == 1
    assert "2 steps each" in printed
    assert "inputs cut to 64 tokens" in printed
    report = json.loads((out / "demo.json").read_text())
    assert list(report["models"]) == ["t5", "nllb", "llama"]
    for model in report["models"].values():
        assert model["summary"]["largest_loss_difference"] <= 1e-4
        assert model["fallbacks"] == {}
        assert len(model["steps"]["padded"]["losses"]) == 2
        assert model["examples"]["usable"] == len(TEXTS)
    assert report["options"]["steps"] == 2
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("data", ["texts", "one_text"])
def test_demo_gives_the_same_losses_for_the_same_seed(data, tmp_path, request):
    # With a single text, the seed affects only the weights.
    data = request.getfixturevalue(data)
    losses = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run_demo(data, tmp_path / name, "--model", "llama", "--seed", seed) == 0
        report = json.loads((tmp_path / name / "demo.json").read_text())
        losses.append(report["models"]["llama"]["steps"]["padded"]["losses"])
    assert losses[0] == losses[1] != losses[2]


def test_demo_uses_pairs_unchanged(pairs, tmp_path, capsys):
    assert run_demo(pairs, tmp_path / "out", "--model", "nllb") == 0
    assert "left out" not in capsys.readouterr().out


def test_demo_works_without_matplotlib(texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    assert run_demo(texts, tmp_path / "out", "--model", "llama") == 0
    captured = capsys.readouterr()
    assert "pip install 'tokenpack[demo]'" in captured.err
    assert "Llama" in captured.out
    assert (tmp_path / "out" / "demo.json").exists()
    assert not (tmp_path / "out" / "demo.png").exists()


def test_demo_fails_when_a_step_was_not_packed(texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        side_by_side, "packing_stats", lambda model: Stats(packed_calls=1, fallbacks={"why": 3})
    )
    assert run_demo(texts, tmp_path / "out", "--model", "llama") == 1
    error = capsys.readouterr().err
    assert "check failed: Llama was not packed in some steps: 3 x why" in error
    assert "check failed: Llama was packed in 1 of 2 steps" in error


class Stats:
    def __init__(self, packed_calls, fallbacks):
        self.packed_calls = packed_calls
        self.fallbacks = fallbacks


@pytest.mark.parametrize("wrong", [lambda loss: loss * 1.001, lambda loss: loss * float("nan")])
def test_demo_fails_when_the_losses_differ(texts, tmp_path, capsys, monkeypatch, wrong):
    patch = side_by_side.patch_model

    def patch_with_wrong_loss(model):
        patch(model).register_forward_hook(change_loss)
        return model

    def change_loss(module, arguments, output):
        output.loss = wrong(output.loss)
        return output

    monkeypatch.setattr(side_by_side, "patch_model", patch_with_wrong_loss)
    assert run_demo(texts, tmp_path / "out", "--model", "llama") == 1
    assert "check failed: Llama: the losses differ by" in capsys.readouterr().err


def test_demo_uses_the_physical_cores_unless_omp_num_threads_is_set(monkeypatch):
    monkeypatch.setattr(demo.machine, "physical_cores", lambda: 1)
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    demo._use_physical_cores()
    assert torch.get_num_threads() == 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    demo._use_physical_cores()
    assert torch.get_num_threads() == 1


# ------------------------------------------------------------------------------------------ doctor


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert __version__ in printed
    reference = next(line for line in printed.splitlines() if "reference" in line)
    assert reference.split()[1] == "yes"
    assert "flash_attn" in printed


# ----------------------------------------------------------------------------------------- inspect


def test_inspect(texts, tokenizer, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["inspect", "--data", str(texts), "--tokenizer", str(tokenizer)]
    assert main([*arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "llama-1b" in printed
    assert "No text was cut" in printed
    report = json.loads((out / "inspect.json").read_text())
    assert report["lengths"]["text"]["texts"] == len(TEXTS)
    assert (out / "inspect.png").read_bytes().startswith(b"\x89PNG")
    # All six texts are in one batch, as wide as the longest.
    percentiles = report["lengths"]["text"]["percentiles"]
    tokens, longest = report["lengths"]["text"]["tokens"], percentiles["100"]
    share = report["batches"]["random"]["8"]["padding_share"]
    assert share == pytest.approx(1 - tokens / (6 * longest))
    assert report["batches"]["random"]["8"]["speed_up"] > 1
    assert report["packing"]["capacity"] == 512
    packed = report["packing"]["strategies"]
    assert list(packed) == list(Packer.strategies())
    assert {metrics["tokens"] for metrics in packed.values()} == {tokens}
    assert "None of 6 texts is over the capacity of 512." in printed


def test_inspect_packs_at_a_capacity_and_counts_cut_texts(texts, tokenizer, tmp_path, capsys):
    lengths = [len(Tokenizer.from_file(str(tokenizer)).encode(text).ids) for text in TEXTS]
    arguments = ["inspect", "--data", str(texts), "--tokenizer", str(tokenizer)]
    assert main([*arguments, "--capacity", "20", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    over = sum(length > 20 for length in lengths)
    assert 0 < over < 6
    assert f"Cut to the capacity of 20: {over} of 6 texts." in printed
    report = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert report["options"]["capacity"] == report["packing"]["capacity"] == 20
    plan = pack_lengths(lengths, 20, "nf", overlong="truncate")
    assert report["packing"]["strategies"]["nf"]["num_bins"] == plan.num_bins
    line = next(line for line in printed.splitlines() if line.startswith("nf "))
    assert line.split()[2:5] == [
        f"{plan.num_bins}", f"{plan.efficiency:.2%}", f"{1 - plan.efficiency:.2%}"
    ]  # fmt: skip


def test_inspect_pairs_and_cuts(pairs, tokenizer, tmp_path, capsys):
    arguments = ["inspect", "--data", str(pairs), "--tokenizer", str(tokenizer)]
    assert main([*arguments, "--max-length", "8", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "t5-base" in printed
    assert "Cut to 8 tokens: 6 of 6 sources, 0 of 6 targets" in printed
    lengths = json.loads((tmp_path / "out" / "inspect.json").read_text())["lengths"]
    assert lengths["source"]["tokens"] == 6 * 8


def test_inspect_packs_pairs_with_a_capacity_on_each_side(pairs, tokenizer, tmp_path, capsys):
    load = Tokenizer.from_file(str(tokenizer))
    sides = {
        "source": [len(load.encode(text).ids) for text in TEXTS],
        "target": [len(load.encode("Summary.").ids)] * 6,
    }
    arguments = ["inspect", "--data", str(pairs), "--tokenizer", str(tokenizer)]
    for capacity, over in ((None, 0), (12, sum(length > 12 for length in sides["source"]))):
        option = ["--capacity", str(capacity)] if capacity else []
        assert main([*arguments, *option, "--out", str(tmp_path / "out")]) == 0
        printed = capsys.readouterr().out
        packing = json.loads((tmp_path / "out" / "inspect.json").read_text())["packing"]
        assert packing["capacity"] == dict.fromkeys(sides, capacity or 512)
        assert packing["pairs"]["metrics"]["truncated"] == over
        rows = packing["pairs"]["metrics"]["num_bins"]
        for side, lengths in sides.items():
            tokens = sum(min(length, capacity or 512) for length in lengths)
            share = tokens / (rows * (capacity or 512))
            assert packing["pairs"]["efficiency"][side] == pytest.approx(share)
            assert f"{share:.2%}" in printed


def test_inspect_joins_pairs_for_a_decoder(pairs, tokenizer, tmp_path):
    arguments = ["inspect", "--data", str(pairs), "--tokenizer", str(tokenizer)]
    assert main([*arguments, "--shape", "llama-1b", "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "inspect.json").read_text())
    tokens = sum(report["lengths"][side]["tokens"] for side in ("source", "target"))
    assert report["packing"]["strategies"]["obfd"]["tokens"] == tokens


# --------------------------------------------------------------------------------------- bad input


def test_bad_input_is_one_line_and_exit_code_2(texts, tokenizer, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "words.txt").write_text("word\nword\n")
    Tokenizer(models.BPE()).save(str(tmp_path / "no_tokens.json"))
    inspect = ["inspect", "--data", str(texts), "--tokenizer"]
    tiny = ["demo", "--size", "tiny", "--steps", "1", "--out", str(tmp_path / "out")]
    for arguments, message in [
        ([*tiny, "--data", "missing.txt"], "must be a readable file, got missing.txt"),
        ([*tiny, "--data", "a.csv"], "must end in .txt or .jsonl"),
        (
            [*tiny, "--data", str(tmp_path / "words.txt"), "--model", "nllb"],
            "cannot be split",
        ),
        (["demo", "--out", str(tmp_path / "file")], "--out: cannot create the folder"),
        (
            [*inspect, "nowhere.json"],
            "must be a file or folder that exists, got nowhere.json",
        ),
        (
            [*inspect, str(tmp_path / "no_tokens.json")],
            "must produce tokens, got none for any text",
        ),
        ([*inspect, str(tokenizer), "--shape", "gpt"], "--shape must be one of t5-small"),
        ([*inspect, str(tokenizer), "--shape", "t5-base"], "needs 'source' and 'target'"),
    ]:
        assert main(arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("tokenpack: error: ")
        assert message in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_on_a_machine_without_it(tmp_path, capsys):
    assert main(["demo", "--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "--device must be cpu here, got cuda" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["demo", "--steps", "0"], "--steps: must be an integer of 1 or more, got '0'"),
        (["demo", "--seed", "-1"], "--seed: must be an integer of 0 or more, got '-1'"),
        (["demo", "--model", "bert"], "invalid choice: 'bert'"),
        (["inspect", "--tokenizer", "x"], "required: --data"),
        (["inspect", "--capacity", "0"], "--capacity: must be an integer of 1 or more, got '0'"),
        (["pack", "a.jsonl", "out"], "required: --capacity"),
        (["pack", "a.jsonl", "out", "--capacity", "1.5"], "--capacity: must be an integer of 1"),
        (["pack", "--overlong", "cut"], "invalid choice: 'cut'"),
        (["pack", "--columns", "ids"], "invalid choice: 'ids'"),
        (["pack", "--padding-value", "2147483648"], "must be a 32-bit integer"),
        ([], "required: COMMAND"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
