"""The functions with the names of transformer-toolkit return training and validation data."""

import json

import datasets
import pytest

from tokenpack.data import (
    SFTDataConfig,
    chat_dataset,
    from_sft_files,
    from_sft_hf,
    from_sft_json,
    from_sft_strings,
)

from . import families
from .helpers import assistant, make_tokenizer, user

pytestmark = pytest.mark.filterwarnings("ignore:chat data")
ROWS = [{"prompt": f"q{at}", "response": "b" * (at + 1)} for at in range(20)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def ids_of(*parts):
    return sorted(tuple(ids) for part in parts for ids in part["input_ids"])


def test_every_row_is_in_one_part(tmp_path):
    tokenizer = make_tokenizer("chatml")
    cfg = SFTDataConfig(seq_len=64)
    expected = from_sft_strings(ROWS, tokenizer, cfg)
    assert [len(part) for part in expected] == [18, 2]
    assert ids_of(*expected) == ids_of(chat_dataset(ROWS, tokenizer))
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    paths = [tmp_path / "b.jsonl", tmp_path / "c.jsonl"]
    for path, rows in zip(paths, (ROWS[:5], ROWS[5:])):
        path.write_text("\n".join(map(json.dumps, rows)))
    for found in (
        from_sft_json(tmp_path / "a.json", tokenizer, cfg),
        from_sft_files(paths, tokenizer, cfg),
        from_sft_hf(str(tmp_path / "a.json"), tokenizer, cfg),
    ):
        assert [ids_of(part) for part in found] == [ids_of(part) for part in expected]
    other = from_sft_strings(ROWS, tokenizer, SFTDataConfig(seq_len=64, seed=1, split=0.5))
    assert [len(part) for part in other] == [10, 10]
    assert ids_of(*other) == ids_of(*expected)


def test_parts_of_a_conversation_stay_together():
    tokenizer = make_tokenizer(families.QWEN3)
    rows = [
        [user(f"{at}"), assistant("b", reasoning_content="x"), user("c"), assistant("d")]
        for at in range(10)
    ]
    parts = from_sft_strings(rows, tokenizer, SFTDataConfig(split=0.5))
    assert [len(part) for part in parts] == [10, 10]
    first = [{tokenizer.decode(ids)[:30] for ids in part["input_ids"]} for part in parts]
    assert not first[0] & first[1]


def test_options_and_debug(capsys):
    tokenizer = make_tokenizer()
    cfg = SFTDataConfig(
        tokenizer=tokenizer, seq_len=24, template="chatml", debug=True, debug_n=1, split=0.5,
        truncation_strategy="token", schema="prompt_response",
    )  # fmt: skip
    train, _ = from_sft_strings(ROWS, None, cfg)
    assert max(train["length"]) == 24
    printed = capsys.readouterr().out
    assert printed.count("── ") == 1
    assert "⟦b" in printed
    with pytest.raises(ValueError, match="must have the columns prompt and completion; prompt and"):
        from_sft_strings([[user("a"), assistant("b")]] * 3, None, cfg)


@pytest.mark.filterwarnings("default:chat data")
def test_a_problem_of_both_parts_is_said_once(recwarn):
    tokenizer = make_tokenizer("chatml")
    from_sft_strings(ROWS, tokenizer, SFTDataConfig())
    (warning,) = recwarn
    assert str(warning.message).startswith("chat data: unstopped_terminator: 18 times in 18 rows, ")
    assert warning.filename == __file__
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    from_sft_strings(ROWS, tokenizer, SFTDataConfig(generation_config=[stop]))
    assert len(recwarn) == 1  # no other


def test_wrong_options():
    for options, message in (
        ({"split": 1.0}, "split must be between 0 and 1, got 1.0"),
        ({"seq_len": 0}, "seq_len must be from 1"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"schema": "chat"}, "schema must be one of auto, messages, .* got 'chat'"),
        ({"truncation_strategy": "cut"}, "truncation_strategy must be one of turn, .* got 'cut'"),
    ):
        with pytest.raises(ValueError, match=message):
            SFTDataConfig(**options)
    with pytest.raises(ValueError, match="rows must be at least 2, to be divided, got 1"):
        from_sft_strings(ROWS[:1], make_tokenizer("chatml"), SFTDataConfig())
