"""``tokenpack condense``: train, eval and run on a small model."""

import json
import random

import pytest

from tokenpack.cli import main
from tokenpack.commands.condense import report
from tokenpack.data.tokenizers import train_tokenizer
from tokenpack.models.condenser.evaluation import CondenserEvaluation, RatioResult
from tokenpack.models.decoder import DecoderConfig, DecoderForCausalLM

SENTENCE = "the condenser reads a long context and writes few vectors for one frozen decoder"
WORDS = SENTENCE.split(" ")


def text(seed, length=60):
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(length))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A decoder with its tokenizer, texts, and a condenser that was trained for two steps."""
    root = tmp_path_factory.mktemp("condense")
    tokenizer = train_tokenizer([SENTENCE] * 3, 330)
    config = DecoderConfig(
        vocab_size=330, dim=32, n_layers=1, n_heads=2, max_seq=256,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=1,
    )  # fmt: skip
    DecoderForCausalLM(config).save_pretrained(root / "decoder")
    tokenizer.save_pretrained(root / "decoder")
    lines = [json.dumps({"text": text(seed)}) for seed in range(40)]
    (root / "texts.jsonl").write_text("\n".join(lines))
    code = main(
        [
            *("condense", "train", "--decoder", str(root / "decoder"), "--out", str(root / "run")),
            *("--data", str(root / "texts.jsonl"), "--held-out", "0.2", "--steps", "2"),
            *("--context-tokens", "40", "--continuation-tokens", "8", "--eval-steps", "1"),
            *("--ratios", "4", "8", "--reconstruction-weight", "0.5", "--lora-rank", "2"),
        ]
    )
    assert code == 0
    return root


def test_train_writes_a_condenser(folder, capsys):
    names = {path.name for path in (folder / "run").iterdir()}
    assert {"config.json", "model.safetensors", "adapter_model.safetensors"} <= names
    assert {"generated-1.jsonl", "generated-2.jsonl"} <= names


def test_eval_prints_tables_and_fails_if_a_control_is_not_beaten(folder, capsys):
    out = folder / "eval"
    arguments = [
        *("condense", "eval", "--model", str(folder / "run"), "--out", str(out)),
        *("--data", str(folder / "texts.jsonl"), "--documents", "6"),
        *("--context-tokens", "40", "--continuation-tokens", "8"),
    ]
    assert main(arguments) == 1  # two steps teach nothing
    printed = capsys.readouterr().out
    assert "condensed minus each control" in printed
    assert "not beaten by two standard errors at ratio 8" in printed
    found = json.loads((out / "condense.json").read_text())
    assert [each["ratio"] for each in found["ratios"]] == [4, 8]
    for each in found["ratios"]:
        assert 0 <= each["vectors"] - found["context_tokens"] / each["ratio"] < 1
    assert found["ratios"][1]["cache_bytes"] < found["full_cache_bytes"]
    assert found["ratios"][0]["nll"]["full"] == found["ratios"][1]["nll"]["full"]
    assert (out / "condense.png").stat().st_size > 0


def test_run_answers_each_context(folder, capsys, tmp_path):
    (tmp_path / "context.txt").write_text(text(1))
    arguments = [
        *("condense", "run", "--model", str(folder / "run"), "--prompt", "the"),
        *("--context", str(tmp_path / "context.txt"), "--context", "a long context"),
    ]
    assert main([*arguments, "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.count("the") >= 2
    assert main([*arguments, "--prompt", "a", "--prompt", "b"]) == 2
    assert "--prompt must be given once or 2 times" in capsys.readouterr().err


def test_bad_input_is_named(folder, capsys, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"question": "a"}))
    start = ["condense", "train", "--out", str(tmp_path / "run"), "--data", str(data)]
    assert main([*start, "--decoder", str(folder / "decoder")]) == 2
    assert "--data must have the columns context, prompt and completion" in capsys.readouterr().err
    assert main([*start, "--decoder", str(tmp_path)]) == 2
    assert "--condenser must be a folder or a hub name of a causal" in capsys.readouterr().err


def test_a_report_of_a_condenser_that_wins():
    nll = {
        "none": 3.0,
        "last_k": 2.5,
        "untrained": 3.1,
        "other": 2.9,
        "condensed": 2.2,
        "full": 2.0,
    }
    difference = {name: 2.2 - nll[name] for name in ("none", "last_k", "untrained", "other")}
    error = dict.fromkeys(difference, 0.01)
    entry = RatioResult(4, 16.0, nll, difference, error, 0.8)
    printed = report(CondenserEvaluation(100, 6400, 64.0, [entry]))
    assert "80%" in printed
    assert "-0.3000 ± 0.0100" in printed
    assert "not beaten" not in printed
    entry.standard_error["last_k"] = 0.2
    assert "ratio 4: last k" in report(CondenserEvaluation(100, 6400, 64.0, [entry]))
