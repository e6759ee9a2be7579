"""The examples, small: they learn, leave what they should, and do on ranks what they do alone."""

import importlib.util
import io
import json
import math
import re
import struct
import sys
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tokenpack.data import byte_tokenizer
from tokenpack.models.decoder import DecoderConfig
from tokenpack.samples.text import split_summary, standard_library_texts

from .setting import on_ranks

datasets = pytest.importorskip("datasets")
pytest.importorskip("accelerate")

EXAMPLES = Path(__file__).parents[2] / "examples"
NUMBER = r"([\d.,]+)"
LINE = re.compile(
    rf"{NUMBER} steps, {NUMBER} tokens/s, {NUMBER}% of padded slots are real tokens,"
    rf" loss {NUMBER} -> {NUMBER}, eval loss {NUMBER}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def texts():
    """Some hundred docstrings; all of them take five seconds to find."""
    return standard_library_texts(400)


def load(name, monkeypatch=None, texts=()):
    """An example as a module, that finds these texts alone."""
    monkeypatch = monkeypatch or pytest.MonkeyPatch()  # of a process that ends soon
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "standard_library_texts", lambda: texts)
    return module


def flags(folder, **more):
    values = {
        "output_dir": folder,
        "max_steps": 12,
        "learning_rate": 0.01,
        "warmup_steps": 2,
        "logging_steps": 1,
        "max_tokens_per_batch": 800,
        "max_tokens_per_microbatch": 400,
        "max_encoder_len": 200,
        "max_decoder_len": 100,
        "vocab_size": 600,
        "use_cpu": True,
        "disable_tqdm": True,
        **more,
    }
    given = {name: str(value) for name, value in values.items() if value is not None}
    return [part for name, value in given.items() for part in (f"--{name}", value)]


def logs_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def losses_of(trainer):
    return [entry["loss"] for entry in logs_of(trainer)]


def check_run(trainer, printed, folder, steps=12):
    """It learned, said so, and left a model that can be taken up."""
    line = LINE.search(printed)
    assert line, printed
    said = [float(number.replace(",", "")) for number in line.groups()]
    losses = losses_of(trainer)
    assert said[0] == trainer.state.global_step == steps
    assert said[1] > 0
    assert 0 < said[2] <= 100
    assert said[3:5] == [pytest.approx(loss, abs=1e-3) for loss in (losses[0], losses[-1])]
    assert losses[-1] < losses[0] - 0.5
    assert said[5] == pytest.approx(losses[-1], abs=1.0)  # held out, and not a mean of anything
    names = {"model.safetensors", "config.json", "tokenizer.json", f"checkpoint-{steps}"}
    assert names <= {path.name for path in Path(folder).iterdir()}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------------------------------- T5


def test_t5_learns_goes_on_and_is_taken_up(tmp_path, monkeypatch, texts, capsys):
    example = load("pretrain_t5", monkeypatch, texts)
    out = tmp_path / "out"
    given = {"eval_texts": 20, "save_steps": 5, "lr_scheduler_type": "constant_with_warmup"}
    trainer = example.main(flags(out, **given))
    check_run(trainer, capsys.readouterr().out, out)

    # As far as the last checkpoint, and from there.
    resumed = example.main(flags(out, max_steps=14, resume_from_checkpoint="last", **given))
    assert resumed.state.global_step == 14
    assert logs_of(resumed)[:12] == logs_of(trainer)  # speeds too: these steps were not done again
    resumed = example.main(flags(out, resume_from_checkpoint=out / "checkpoint-5", **given))
    assert logs_of(resumed)[:5] == logs_of(trainer)[:5]
    assert losses_of(resumed) == losses_of(trainer)

    # As a model: it begins where the other ended, on other texts.
    rows = write_jsonl(tmp_path / "more.jsonl", [{"body": text.source} for text in texts[200:]])
    more = {"train_file": rows, "text_column": "body", "model": out, "max_steps": 2}
    taken_up = example.main(flags(tmp_path / "more", **given | more))
    assert losses_of(taken_up)[0] < losses_of(trainer)[0] - 0.5
    anew = example.main(flags(tmp_path / "anew", **given | more, random_weights=True))
    assert losses_of(anew)[0] > losses_of(taken_up)[0] + 0.5


def test_t5_loses_nothing_of_long_texts(monkeypatch, texts):
    example = load("pretrain_t5", monkeypatch, texts)

    class Characters:
        eos_token_id = 0

        def __call__(self, texts, **_):
            return {"input_ids": [list(map(ord, text)) for text in texts]}

    rows = example.pieces(["abcdefg", "", "xyz"], Characters(), 4)["input_ids"]
    assert [[chr(token) for token in row[:-1]] for row in rows] == [
        [*"abc"],
        [*"def"],
        [*"g"],
        [*"xyz"],
    ]
    assert all(row[-1] == 0 for row in rows)


def test_t5_reads_paragraphs_and_folders(tmp_path, monkeypatch, texts):
    example = load("pretrain_t5", monkeypatch, texts)
    (tmp_path / "file.txt").write_text("one\ntwo\n\nthree\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"text": str(number)} for number in range(9)])

    def read(**given):
        parser = example.HfArgumentParser((example.Options, example.TokenBudgetArguments))
        options, args = parser.parse_args_into_dataclasses(flags(tmp_path, **given))
        return list(example.load_texts(options, args)["text"])

    assert [text.strip() for text in read(train_file=tmp_path / "file.txt")] == [
        "one\ntwo",
        "three",
    ]
    assert read(dataset=folder, dataset_split="train[:3]") == ["0", "1", "2"]


def t5_on_rank(_, given, cache):
    """The losses that the example prints, on each rank; torchrun sets the same variables."""
    datasets.config.HF_DATASETS_CACHE = cache
    printed = io.StringIO()
    with redirect_stdout(printed):
        load("pretrain_t5").main(given)
    return LINE.findall(printed.getvalue())


def test_t5_is_the_same_on_two_ranks(tmp_path, monkeypatch, texts, capsys):
    rows = write_jsonl(tmp_path / "texts.jsonl", [{"text": text.source} for text in texts[:200]])
    given = {"train_file": rows, "eval_texts": 20, "max_steps": 4, "learning_rate": 0.003}
    load("pretrain_t5", monkeypatch, texts).main(flags(tmp_path / "alone", **given))
    alone = LINE.search(capsys.readouterr().out).groups()

    # Without a GPU it must find by itself that ranks are to meet on the CPU.
    given["use_cpu"] = torch.accelerator.is_available() or None
    ranks = on_ranks(2, t5_on_rank, flags(tmp_path / "ranks", **given), tmp_path / "cache")
    lines = [line for printed in ranks for line in printed]
    assert len(lines) == 1, lines
    assert lines[0][0] == "4"
    for ours, theirs in zip(lines[0][3:], alone[3:]):
        assert float(ours) == pytest.approx(float(theirs), abs=2e-3)
    assert (tmp_path / "ranks" / "checkpoint-4" / "rng_state_1.pth").is_file()


# ----------------------------------------------------------------------------------------- NLLB


def write_mo(path, messages):
    """A gettext catalogue, as msgfmt writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    messages = {"": "Content-Type: text/plain; charset=UTF-8\n", **messages}
    pairs = sorted((key.encode(), value.encode()) for key, value in messages.items())
    tables, strings = ([], []), b""
    begin = 28 + 16 * len(pairs)
    for side, table in enumerate(tables):
        for pair in pairs:
            table += [len(pair[side]), begin + len(strings)]
            strings += pair[side] + b"\0"
    head = [0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0]
    numbers = [*head, *tables[0], *tables[1]]
    path.write_bytes(struct.pack(f"<{len(numbers)}I", *numbers) + strings)


def test_catalogues_are_read_as_pairs(tmp_path, monkeypatch, texts):
    example = load("translate_nllb", monkeypatch, texts)
    monkeypatch.setattr(example, "CATALOGUES", [str(tmp_path)])
    folder = tmp_path / "de" / "LC_MESSAGES"
    write_mo(
        folder / "one.mo",
        {
            "cannot open file": "kann Datei nicht öffnen",
            "menu\4three whole words": "drei ganze Wörter",
            "%d file was found\0%d files were found": "%d Datei gefunden\0%d Dateien gefunden",
            "the same again": "the same again",
            "too short": "zu kurz",
        },
    )
    write_mo(folder / "two.mo", {"cannot open file": "geht nicht auf"})
    (folder / "broken.mo").write_bytes(b"no catalogue")
    assert example.catalogue_pairs("de") == {
        "cannot open file": "kann Datei nicht öffnen",
        "three whole words": "drei ganze Wörter",
        "%d file was found": "%d Datei gefunden",
    }
    assert example.catalogue_pairs("fr") == {}


def test_nllb_learns_from_catalogues(tmp_path, monkeypatch, texts, capsys):
    example = load("translate_nllb", monkeypatch, texts)
    monkeypatch.setattr(example, "CATALOGUES", [str(tmp_path)])
    monkeypatch.setattr(example, "ENOUGH", 100)
    pairs = filter(None, (split_summary(text.source) for text in texts))
    catalogue = {body[:300]: f"de: {summary}" for body, summary in islice(pairs, 250)}
    write_mo(tmp_path / "de" / "LC_MESSAGES" / "one.mo", catalogue)
    given = {"eval_pairs": 16, "generation_max_length": 12}
    trainer = example.main(flags(tmp_path / "out", **given))
    printed = capsys.readouterr().out
    assert "messages in English and de" in printed
    check_run(trainer, printed, tmp_path / "out")
    evaluated = trainer.state.log_history[-1]
    assert {"eval_bleu", "eval_chrf", "eval_bleu_deu_Latn"} <= set(evaluated)
    assert f"BLEU {evaluated['eval_bleu']:.2f}, chrF++ {evaluated['eval_chrf']:.2f}" in printed

    # The language that is asked for comes first, in what is learned and what is generated.
    tokenizer = trainer.processing_class
    code = tokenizer.convert_tokens_to_ids("deu_Latn")
    assert code >= 600  # an own token, beyond those that were trained
    assert {row[0] for row in trainer.train_dataset["labels"]} == {code}
    assert {row[-1] for row in trainer.train_dataset["labels"]} == {tokenizer.eos_token_id}
    predicted = trainer.predict(trainer.eval_dataset).predictions
    assert set(predicted[:, 1]) == {code}
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert saved["forced_bos_token_id"] == code  # were it not learned yet
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(tokenizer)


def test_nllb_says_where_there_are_no_catalogues(tmp_path, monkeypatch, texts, capsys):
    example = load("translate_nllb", monkeypatch, texts)
    monkeypatch.setattr(example, "CATALOGUES", [str(tmp_path / "none")])
    example.main(flags(tmp_path / "out", max_steps=1, eval_pairs=4, generation_max_length=4))
    assert "pairs: docstrings and their summaries" in capsys.readouterr().out


def test_nllb_reads_columns_within_a_column(tmp_path, monkeypatch, texts, capsys):
    example = load("translate_nllb", monkeypatch, texts)
    pairs = list(filter(None, (split_summary(text.source) for text in texts)))[:60]
    rows = [{"id": 1, "translation": {"en": body[:200], "de": other}} for body, other in pairs]
    file = write_jsonl(tmp_path / "pairs.jsonl", rows)
    given = {"train_file": file, "eval_pairs": 4, "max_steps": 1, "generation_max_length": 4}
    columns = {"source_column": "translation.en", "target_column": "translation.de"}
    plain = {"source_language": "", "target_language": ""}  # as Marian
    trainer = example.main(flags(tmp_path / "out", **given, **columns, **plain))
    row, tokenizer = trainer.train_dataset[0], trainer.processing_class
    assert len(trainer.train_dataset) == 56
    assert tokenizer.decode(row["labels"]) == row["translation.de"] + tokenizer.eos_token
    assert tokenizer.decode(row["input_ids"]) == row["translation.en"] + tokenizer.eos_token
    assert "eval_copied_source" in trainer.state.log_history[-1]  # it finds the sources


# ---------------------------------------------------------------------------------------- Llama


def test_llama_learns_answers(tmp_path, monkeypatch, texts, capsys):
    example = load("instruct_llama", monkeypatch, texts)
    trainer = example.main(flags(tmp_path / "out", eval_rows=20))
    check_run(trainer, capsys.readouterr().out, tmp_path / "out")
    tokenizer = trainer.processing_class
    prompts = set()
    for row in trainer.train_dataset.select(range(30)):
        asked = row["labels"].count(-100)
        assert row["labels"] == [-100] * asked + row["input_ids"][asked:]
        assert row["input_ids"][0] == tokenizer.bos_token_id
        assert row["input_ids"].index(tokenizer.eos_token_id) == len(row["input_ids"]) - 1
        prompt = tokenizer.decode(row["input_ids"][:asked])
        assert prompt.endswith("\n### assistant\n")
        prompts.add(prompt.split("\n")[1])
    assert prompts == {"Summarize this in one line.", "Write the text that this summarizes."}
    assert max(map(len, trainer.train_dataset["input_ids"])) <= 200
    # What is saved can be asked in the same form.
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert saved.chat_template == example.CHAT_TEMPLATE


def test_llama_packed_learns_what_it_does_padded(tmp_path, monkeypatch, texts):
    example = load("instruct_llama", monkeypatch, texts)
    given = {"eval_rows": 4, "max_steps": 1, "max_tokens_per_batch": 4000, "eval_on_start": True}
    packed = example.main(flags(tmp_path / "packed", **given))
    padded = example.main(flags(tmp_path / "padded", **given, pack=False))
    first = [trainer.state.log_history[0]["eval_loss"] for trainer in (packed, padded)]
    assert first[0] == pytest.approx(first[1], abs=1e-4)
    names = [type(trainer.data_collator).__name__ for trainer in (packed, padded)]
    assert names == ["PackedCollator", "DataCollatorForSeq2Seq"]


def test_llama_takes_chats_and_prompts_by_the_tokenizers_template(tmp_path, monkeypatch, texts):
    example = load("instruct_llama", monkeypatch, texts)
    trained = example.main(flags(tmp_path / "out", eval_rows=4, max_steps=1))
    tokenizer = trained.processing_class
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "named")

    chat = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]}] * 8
    others = [{"instruction": "a", "input": "b" * (n % 2), "output": "c"} for n in range(8)]
    given = {"eval_rows": 2, "max_steps": 1, "tokenizer": tmp_path / "named"}
    columns = {"prompt_column": "instruction", "response_column": "output"}

    def seen(rows, **more):
        file = write_jsonl(tmp_path / f"{len(more)}.jsonl", rows)
        trainer = example.main(flags(tmp_path / "again", **given, train_file=file, **more))
        for row in trainer.train_dataset:
            asked = row["labels"].count(-100)
            yield (
                tokenizer.decode(row["input_ids"][:asked]),
                tokenizer.decode(row["labels"][asked:]),
            )

    end = tokenizer.eos_token
    begun = f"[user]a{end}\n[assistant]b{end}\n[user]c{end}\n[assistant]"
    assert set(seen(rows)) == {(begun, f"d{end}\n")}
    assert set(seen(others, **columns)) == {
        (f"[user]a\n\nb{end}\n[assistant]", f"c{end}\n"),
        (f"[user]a{end}\n[assistant]", f"c{end}\n"),
    }


# ----------------------------------------------------------------------------- rows without a text

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PAIR = {"source": "one two three", "target": "un deux trois"}
UNUSABLE = {
    "a null text": ("pretrain_t5", [{"text": "a"}, {"text": None}], r"'text' .* null in row 1 \("),
    "only null texts": ("pretrain_t5", [{"text": None}] * 2, r"'text' .* null in row 0 \("),
    "no column of texts": ("pretrain_t5", [{"body": "a"}], r"a column 'text' of texts, got body"),
    "a null target": ("translate_nllb", [PAIR, {**PAIR, "target": None}], "'target' .* in row 1 "),
    "a null source": ("translate_nllb", [{**PAIR, "source": None}, PAIR], "'source' .* in row 0 "),
    "a number": ("translate_nllb", [{**PAIR, "target": 5}], "'target' must hold texts, got int64"),
    "a null response": (
        "instruct_llama",
        [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": None}],
        "row 1 must have a text as 'response', got None",
    ),
    "no prompt": ("instruct_llama", [{"response": "b"}], "row 0 must have a text as 'prompt'"),
    "a null message": (
        "instruct_llama",
        [{"messages": CHAT}, {"messages": [{"role": "user", "content": None}, CHAT[1]]}],
        "row 1 must have a text in each message, got .*'user'",
    ),
    "a chat without an answer": (
        "instruct_llama",
        [{"messages": CHAT}, {"messages": CHAT[:1]}],
        "row 1 must have an answer",
    ),
    "a null chat": ("instruct_llama", [{"messages": CHAT}, {"messages": None}], "row 1 must have"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_row_without_a_text_ends_with_one_line(tmp_path, monkeypatch, case):
    name, rows, message = UNUSABLE[case]
    example = load(name, monkeypatch, None)
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(SystemExit, match=message) as ended:
        example.main(flags(tmp_path / "out", train_file=file))
    assert "\n" not in str(ended.value)


def test_a_call_of_a_tool_needs_no_text(tmp_path, monkeypatch):
    example = load("instruct_llama", monkeypatch, None)
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    row = {"messages": [CHAT[0], call]}
    assert example.chat_of(row, 0, example.Options()) == row["messages"]


# -------------------------------------------------------------------------------------- decoder


def decoder_flags(folder, **more):
    values = {
        "output_dir": folder,
        "config": folder.parent / "config",
        "vocab_size": 400,
        "seq_len": 24,
        "eval_windows": 8,
        "max_steps": 9,
        "learning_rate": 0.02,
        "warmup_steps": 2,
        "logging_steps": 1,
        "eval_steps": 3,
        "save_steps": 3,
        "max_tokens_per_batch": 200,
        "max_tokens_per_microbatch": 100,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        **more,
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def test_the_decoder_learns_resumes_and_generates(tmp_path, monkeypatch, texts, capsys):
    example = load("pretrain_decoder", monkeypatch, texts[:60])
    DecoderConfig(
        dim=16, n_layers=1, n_heads=2, ffn="moe", n_experts=4, dropout=0.1
    ).save_pretrained(tmp_path / "config")
    out = tmp_path / "out"
    trainer = example.main(decoder_flags(out))
    printed = capsys.readouterr().out
    assert "WriteReport" in printed
    evaluations = {log["step"]: log for log in trainer.state.log_history[:-1] if "eval_loss" in log}
    assert [*evaluations] == [0, 3, 6, 9]
    assert evaluations[0]["eval_loss"] == pytest.approx(math.log(400), abs=0.2)
    assert evaluations[9]["eval_loss"] < evaluations[0]["eval_loss"] - 0.5
    assert all(log["eval_is_best"] for log in evaluations.values())
    assert f"validation loss at step 0: {evaluations[0]['eval_loss']:.3f}, 3: " in printed
    assert "'Return the" in printed.splitlines()[-2]
    assert trainer.decay == "matrices"

    # From the middle: the same losses, with dropout, and the same weights, bit for bit.
    weights = (out / "model.safetensors").read_bytes()
    given = {"resume_from_checkpoint": out / "checkpoint-6", "max_steps": 9}
    resumed = example.main(decoder_flags(out, **given))
    assert "WriteReport" not in capsys.readouterr().out  # the corpus is there
    assert losses_of(resumed) == losses_of(trainer)
    assert (out / "model.safetensors").read_bytes() == weights


def test_the_presets_of_the_decoder(tmp_path, monkeypatch, texts):
    example = load("pretrain_decoder", monkeypatch, texts)
    tokenizer = byte_tokenizer()
    for preset in ("quickstart", "shakespeare", "moe"):
        full = example.make_config(example.Options(preset=preset, full=True), tokenizer)
        small = example.make_config(example.Options(preset=preset), tokenizer)
        assert full.hidden_size == example.PRESETS[preset]["dim"]
        assert small.hidden_size < full.hidden_size
        assert small.attention_type == full.attention_type
    with pytest.raises(SystemExit, match="--preset must be one of quickstart, shakespeare, moe"):
        example.make_config(example.Options(preset="large"), tokenizer)
    with pytest.raises(SystemExit, match="--tokenizer must be given with --shards"):
        example.prepare(example.Options(shards="corpus"), tmp_path)


def test_condense_docstrings(texts, monkeypatch, tmp_path, capsys):
    """For a decoder with random weights, which has nothing to recover."""
    from tokenpack.data.tokenizers import train_tokenizer
    from tokenpack.models.decoder import DecoderConfig, DecoderForCausalLM

    example = load("condense_docstrings", monkeypatch, texts[:60])
    tokenizer = train_tokenizer([text.source for text in texts[:60]], 400)
    sizes = {"vocab_size": len(tokenizer), "dim": 32, "n_layers": 1, "n_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    DecoderForCausalLM(DecoderConfig(**sizes, **ids)).save_pretrained(tmp_path / "decoder")
    tokenizer.save_pretrained(tmp_path / "decoder")
    trainer = example.main(
        ["--decoder", str(tmp_path / "decoder"), "--steps", "2", "--out", str(tmp_path / "run")]
    )
    assert trainer.state.global_step == 2
    assert "condensed minus each control" in capsys.readouterr().out
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
