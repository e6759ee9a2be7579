"""chat_dataset: every kind of source gives the same rows, as a dataset and as a stream."""

import gzip
import json
import threading
import warnings

import datasets
import pytest
from datasets import Dataset, IterableDataset

from tokenpack.data import ChatTemplate, chat_dataset, collate_packed_rows, pack_dataset
from tokenpack.data.chat import dataset as module
from tokenpack.data.chat.pipeline import ChatOptions, ChatPipeline

from .helpers import assistant, make_tokenizer, runs, system, user

CALLS = [
    {"function": {"name": "f", "arguments": {"city": "Zürich"}}},
    {"function": {"name": "g", "arguments": {"count": 3}}},
]
ROWS = [
    {"messages": [system("s"), user("a"), assistant("b"), user("c"), assistant("d")]},
    {"prompt": "a", "response": "b\u2028c"},
    {"instruction": "i", "input": "", "output": "o"},
    {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]},
    *({"messages": [user("a"), assistant("b" * count)]} for count in range(1, 30)),
]
TOOL_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% generation %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}<|im_end|>"
    "{% endgeneration %}{% endfor %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def tokenizer():
    return make_tokenizer("chatml")


def encoded(source, tokenizer, **options):
    options = {"checks": "ignore", **options}
    return list(chat_dataset(source, tokenizer, **options))


@pytest.fixture
def expected(tokenizer):
    return encoded(ROWS, tokenizer)


def write_lines(path, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


def test_rows_of_a_list(tokenizer, expected):
    assert [len(row["input_ids"]) for row in expected] == [row["length"] for row in expected]
    assert expected[0]["labels"].count(-100) < expected[0]["length"]
    ids = tokenizer.apply_chat_template(ROWS[0]["messages"])["input_ids"]
    assert expected[0]["input_ids"] == ids
    dataset = chat_dataset(ROWS, tokenizer, checks="ignore")
    assert isinstance(dataset, Dataset)
    assert dataset.column_names == ["input_ids", "labels", "length"]
    assert dataset.features["labels"].feature.dtype == "int32"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["list", "jsonl", "gz", "array", "two files", "folder", "blank"])
def test_every_source_gives_the_same_rows(kind, streaming, tokenizer, expected, tmp_path):
    source = ROWS
    if kind == "jsonl":
        source = write_lines(tmp_path / "a.jsonl", ROWS)
    elif kind == "gz":
        source = str(write_lines(tmp_path / "a.jsonl.gz", ROWS))
    elif kind == "array":
        source = tmp_path / "a.json"
        source.write_text(json.dumps(ROWS, indent=1))
    elif kind in ("two files", "folder"):
        (tmp_path / "f").mkdir()
        source = [tmp_path / "f/a.jsonl", tmp_path / "f/b.jsonl"]
        write_lines(source[0], ROWS[:7]), write_lines(source[1], ROWS[7:])
        source = source if kind == "two files" else tmp_path / "f"
    elif kind == "blank":
        source = tmp_path / "a.jsonl"
        lines = "\n\n".join(map(json.dumps, ROWS))
        source.write_text(f"\ufeff{lines}\n", encoding="utf-8")
    found = chat_dataset(source, tokenizer, checks="ignore", streaming=streaming)
    assert isinstance(found, IterableDataset if streaming else Dataset)
    assert list(found) == expected


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["dataset", "parquet", "stream"])
def test_arrow_sources_do_not_get_keys_of_other_rows(kind, streaming, tmp_path):
    """A struct of Arrow has the same keys in all rows, and templates would write the missing."""
    tokenizer = make_tokenizer(TOOL_TEMPLATE)
    rows = [{"messages": [user("a"), assistant(tool_calls=[call])]} for call in CALLS]
    source = Dataset.from_list(rows)
    if kind == "parquet":
        source.to_parquet(tmp_path / "a.parquet")
        source = tmp_path / "a.parquet"
    elif kind == "stream":
        source = source.to_iterable_dataset()
    found = encoded(source, tokenizer, streaming=streaming)
    assert found == encoded(rows, tokenizer)
    text = tokenizer.decode(found[1]["input_ids"])
    assert json.loads(text[text.index("{") : text.rindex("}") + 1]) == CALLS[1]


def test_a_transform_of_the_users_is_applied(tokenizer, expected):
    dataset = Dataset.from_list([{"number": at} for at in range(5)])
    given = {"messages": [user("a"), assistant("b")]}
    dataset.set_transform(lambda batch: {"messages": [given["messages"] for _ in batch["number"]]})
    assert encoded(dataset, tokenizer) == encoded([given] * 5, tokenizer)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_name_on_the_hub(tokenizer, expected, monkeypatch, streaming):
    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        rows = Dataset.from_list(
            [{"messages": row["messages"]} for row in ROWS if "messages" in row]
        )
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = encoded("owner/name", tokenizer, split="train_sft", streaming=streaming)
    assert found == [row for row, source in zip(expected, ROWS) if "messages" in source]
    assert asked == [("owner/name", "train_sft", streaming)]


def test_processes_give_the_same_rows(tokenizer, expected):
    assert encoded(ROWS, tokenizer, num_proc=2) == expected


def test_large_sources_take_several_batches(tokenizer, monkeypatch, expected):
    monkeypatch.setattr(module, "_BATCH", 4)
    monkeypatch.setattr("tokenpack.data.chat.pipeline._PART", 3)
    assert encoded(ROWS, tokenizer) == expected
    assert encoded(ROWS, tokenizer, streaming=True) == expected


def test_rows_come_from_the_cache(tokenizer, expected, tmp_path, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", ROWS)
    assert encoded(path, tokenizer) == expected
    assert encoded(ROWS, tokenizer, cache_dir=tmp_path / "rows") == expected
    report = chat_dataset(path, tokenizer, checks="ignore").chat_report

    def fail(*_):
        raise AssertionError("encoded again")

    monkeypatch.setattr(module._Encode, "__call__", fail)
    tokenizer(["a", "b"], padding=True, truncation=True, max_length=3)  # leaves state behind
    again = chat_dataset(path, tokenizer, checks="ignore")
    assert list(again) == expected
    assert again.chat_report == report
    assert encoded(ROWS, tokenizer, cache_dir=tmp_path / "rows") == expected
    for changed in ({"loss_on": "last"}, {"template": "llama3"}, {"max_length": 9}):
        with pytest.raises(AssertionError, match="encoded again"):
            encoded(path, tokenizer, **changed)


@pytest.mark.parametrize("taken", [0, 1, 5, 32])
def test_a_stream_resumes_exactly(taken, tokenizer, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCH", 4)
    path = write_lines(tmp_path / "a.jsonl", ROWS)
    stream = chat_dataset(path, tokenizer, checks="ignore", streaming=True)
    rows = iter(stream)
    first = [next(rows) for _ in range(taken)]
    state = stream.state_dict()
    resumed = chat_dataset(path, tokenizer, checks="ignore", streaming=True)
    resumed.load_state_dict(state)
    assert first + list(resumed) == expected


def test_a_stream_leaves_out_what_a_dataset_does(tokenizer):
    options = {"max_length": 22, "truncation": "drop"}
    found = encoded(ROWS, tokenizer, **options)
    assert 0 < len(found) < len(ROWS)
    assert encoded(ROWS, tokenizer, streaming=True, **options) == found


def test_everything_is_counted(tokenizer):
    long = [user("a" * 200), assistant("b")]
    rows = [*ROWS[:2], {"messages": long}, {"messages": ROWS[0]["messages"] + long}]
    rows += [{"messages": [user("only")]}]
    dataset = chat_dataset(rows, tokenizer, max_length=100, checks="ignore")
    report = dataset.chat_report
    assert (report.rows, report.samples, report.dropped) == (5, 3, 2)
    assert (report.cut_messages, report.cut_tokens) == (2, 0)
    assert report.tokens == sum(dataset["length"])
    learned = [[label for label in row if label != -100] for row in dataset["labels"]]
    assert report.targets == sum(map(len, learned))
    assert {name: count for name, count in report.problems.items() if count} == {
        **{"no_target": 1, "lost_target": 1, "unstopped_terminator": 3}
    }
    assert report.first_rows == {"no_target": 4, "lost_target": 2, "unstopped_terminator": 0}
    assert str(report).startswith("5 rows -> 3 samples, 2 dropped, ")
    cut = chat_dataset(rows, tokenizer, max_length=20, truncation="token", checks="ignore")
    assert cut.chat_report.cut_tokens > 0
    assert all(row["length"] <= 20 for row in cut)


def test_weights(tokenizer):
    rows = [[user("a"), assistant("b", weight=0.5), user("c"), assistant("d")]]
    (row,) = encoded(rows, tokenizer, loss_weights=True)
    learned = [w for w, label in zip(row["loss_weights"], row["labels"]) if label != -100]
    assert learned == [0.5, 0.5, 1.0, 1.0]
    assert sum(row["loss_weights"]) == 3
    with pytest.raises(ValueError, match=r"row 0: weight must be 0 or 1, got 0.5"):
        encoded(rows, tokenizer)


def test_the_template_is_set_on_the_tokenizer():
    tokenizer = make_tokenizer()
    chat_dataset(ROWS, tokenizer, template=ChatTemplate("llama3"), checks="ignore")
    assert tokenizer.chat_template == ChatTemplate("llama3").jinja
    jinja = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    (row,) = encoded([ROWS[1]], tokenizer, template=jinja)
    assert tokenizer.decode(row["input_ids"]) == "ab\u2028c"


def test_rows_can_be_packed(tokenizer, expected):
    dataset = chat_dataset(ROWS, tokenizer, checks="ignore")
    rows = pack_dataset(dataset["input_ids"], 128, labels=dataset["labels"], progress=False)
    batch = collate_packed_rows([rows[at] for at in range(len(rows))])
    assert batch.cu_seqlens[-1] == sum(row["length"] for row in expected)
    learned = [label for row in expected for label in row["labels"] if label != -100]
    assert sorted(batch.labels[batch.labels != -100].tolist()) == sorted(learned)


# ------------------------------------------------------------------------------------------ errors


def test_wrong_sources(tokenizer, tmp_path):
    with pytest.raises(TypeError, match=r"source must be a list of rows, a path .* got generator"):
        chat_dataset((row for row in ROWS), tokenizer)
    with pytest.raises(
        TypeError, match="source must be rows or one split, got a DatasetDict of tr"
    ):
        chat_dataset(datasets.DatasetDict({"train": Dataset.from_list(ROWS[:1])}), tokenizer)
    with pytest.raises(ValueError, match="source must hold at least one row, got none"):
        chat_dataset([], tokenizer)
    with pytest.raises(ValueError, match=r"row 1 must have the columns .*; got text"):
        chat_dataset([ROWS[0], {"text": "x"}], tokenizer, checks="ignore")
    with pytest.raises(FileNotFoundError, match="must be an existing file"):
        chat_dataset(tmp_path / "missing.jsonl", tokenizer)
    bad = tmp_path / "a.jsonl"
    bad.write_text('{"prompt": "a", "response": "b"}\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"one JSON object per line, got .* in row 1: "):
        chat_dataset(bad, tokenizer, checks="ignore")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"source must be .json, .jsonl, .parquet .* got .*a.txt"):
        chat_dataset(tmp_path / "a.txt", tokenizer)
    with pytest.raises(TypeError, match="row 0 must hold values of JSON: got a object"):
        chat_dataset([{"messages": [user("a"), assistant("b", x=object())]}], tokenizer)


@pytest.mark.parametrize("streaming", [False, True])
def test_json_over_several_lines(streaming, tokenizer, tmp_path):
    """One array or one row in a file, as editors and other programs write them."""

    def found(value, *more):
        for at, each in enumerate([value, *more]):
            text = each if isinstance(each, str) else json.dumps(each, indent=2)
            (tmp_path / f"{at}.json").write_text(text)
        paths = [tmp_path / f"{at}.json" for at in range(1 + len(more))]
        return encoded(paths, tokenizer, streaming=streaming)

    row = ROWS[0]
    (one,) = encoded([row], tokenizer)
    assert found([row, row]) == [one, one]
    assert found(row) == [one]
    assert found(row["messages"]) == [one]
    assert found(row, [row], f"{json.dumps(row)}\n\n{json.dumps(row)}\n") == [one] * 4
    text = json.dumps(row, indent=2)
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(text.encode()))
    assert encoded(path, tokenizer, streaming=streaming) == [one]
    for wrong, where in ((f"{text}\n{text}", "Extra data: line "), (text[:-9], "line ")):
        with pytest.raises(ValueError, match=f"0.json must have one JSON object per .*{where}"):
            found(wrong)
    with pytest.raises(ValueError, match=r"one JSON object per line, got .* in row 0"):
        found(f"{json.dumps(row)[:-1]}\n{json.dumps(row)}")  # a line that is cut off


def test_lines_that_are_lists_of_messages(tokenizer, tmp_path):
    rows = [row["messages"] for row in ROWS if "messages" in row]
    path = tmp_path / "a.jsonl"
    for count in (1, 2, len(rows)):
        for streaming in (False, True):
            write_lines(path, rows[:count])
            found = encoded(path, tokenizer, streaming=streaming)
            assert found == encoded(rows[:count], tokenizer)
    path.write_text("\n" + json.dumps(ROWS) + "\r\n\r\n")  # an array of rows in one line
    assert encoded(path, tokenizer) == encoded(ROWS, tokenizer)


@pytest.mark.parametrize("streaming", [False, True])
def test_text_that_is_not_unicode(tokenizer, tmp_path, streaming):
    path = tmp_path / "a.jsonl"
    line = json.dumps({"prompt": "a", "response": "é"}, ensure_ascii=False) + "\n"
    for encoding in ("latin-1", "utf-16"):
        path.write_bytes(line.encode(encoding))
        with pytest.raises(ValueError, match=r"a.jsonl must be text in UTF-8: 'utf-8' codec can't"):
            encoded(path, tokenizer, streaming=streaming)
    if not streaming:  # behind what is read at first
        path.write_bytes((line * 400).encode() + line.encode("latin-1"))
        with pytest.raises(ValueError, match=r"a.jsonl must be text in UTF-8: 'utf-8' codec can't"):
            encoded(path, tokenizer)
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "\\ud83d", "response": "b"}\n')
    with pytest.raises(ValueError, match=r"row 1: text must be valid Unicode: .*surrogates"):
        encoded(path, tokenizer, streaming=streaming)


def test_wrong_options(tokenizer):
    for options, message in (
        ({"loss_on": "first"}, r'loss_on must be "all", "last" or a list of roles, got \'first\''),
        ({"loss_on": []}, "loss_on must be .* got ()"),
        ({"truncation": "cut"}, "truncation must be one of turn, token, drop, error, got 'cut'"),
        ({"keep": "middle"}, "keep must be one of first, last, got 'middle'"),
        ({"schema": "chat"}, "schema must be one of None, messages, .* got 'chat'"),
        ({"max_length": 0}, "max_length must be from 1"),
        ({"checks": "raise"}, "checks must be warn, error, ignore, got 'raise'"),
        ({"checks": {"typo": "warn"}}, "checks must name no_target, .* got typo"),
        ({"template": 3}, "template must be a preset's name, a ChatTemplate or jinja, got int"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            chat_dataset(ROWS, tokenizer, **options)


def test_a_tokenizer_without_offsets(tokenizer):
    class Slow:
        chat_template = "{{ x }}"
        backend_tokenizer = None

    with pytest.raises(TypeError, match="tokenizer must be one of transformers that is backed by"):
        chat_dataset(ROWS, Slow())


def test_no_row_is_left(tokenizer):
    with pytest.raises(ValueError, match="source must have a row that can be learned from, got no"):
        chat_dataset([[user("a")]], tokenizer, checks="ignore")


def test_runs_are_whole_answers(tokenizer):
    """The columns hold the spans: decoded, they are the answers."""
    from types import SimpleNamespace

    import numpy as np

    (row,) = encoded(ROWS[:1], tokenizer)
    parts = runs(tokenizer, SimpleNamespace(labels=np.array(row["labels"])))
    assert parts == ["b<|im_end|>", "d<|im_end|>"]


# ------------------------------------------------------------------------------------------ checks


def test_problems_are_warned_about_once(tokenizer):
    with pytest.warns(
        UserWarning, match="chat data: unstopped_terminator: 33 times in 33 rows, first in row 0"
    ):
        chat_dataset(ROWS, tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chat_dataset(
            ROWS, tokenizer, generation_config=[tokenizer.convert_tokens_to_ids("<|im_end|>")]
        )
        chat_dataset(ROWS, tokenizer, checks={"unstopped_terminator": "ignore"})
    with pytest.raises(ValueError, match="rows must pass the checks of chat data, got unstopped_t"):
        chat_dataset(ROWS, tokenizer, checks="error")


def test_a_problem_behind_the_first_rows_is_found(tokenizer):
    rows = [ROWS[0]] * 150 + [[user("only")]]
    options = {"checks": {"unstopped_terminator": "ignore", "no_target": "error"}}
    with pytest.raises(ValueError, match=r"got no_target: 1 times .* row 150: no token is"):
        chat_dataset(rows, tokenizer, **options)
    stream = chat_dataset(rows, tokenizer, streaming=True, **options)
    with pytest.raises(ValueError, match=r"got no_target: 1 times in \d+ rows, first in row 150"):
        list(stream)
    stream = chat_dataset(
        rows, tokenizer, streaming=True, checks={"unstopped_terminator": "ignore"}
    )
    with pytest.warns(UserWarning, match=r"1 times in \d+ rows, first in row 150") as found:
        assert len(list(stream)) == 150
    assert len(found) == 1


def test_the_error_is_of_the_first_wrong_row(tokenizer, monkeypatch):
    """Rows are read, rendered and cut in turns, and their errors still come in order."""
    monkeypatch.setattr("tokenpack.data.chat.pipeline._PART", 2)
    good, long = [user("a"), assistant("b")], [user("a"), assistant("b" * 500)]
    unwritten = [user("a"), assistant("b", tool_calls=[CALLS[0]])]
    unread = {"text": "x"}
    wrong = {"max_length = 100": long, "the chat template cannot": unwritten, "columns": unread}
    for message, first in wrong.items():
        for other in wrong.values():
            for between in range(4):
                rows = [good] * 2 + [first] + [good] * between + [other]
                with pytest.raises(ValueError, match=f"row 2.*{message}"):
                    encoded(rows, tokenizer, max_length=100, truncation="error")


@pytest.mark.parametrize("first, message", [("[", "got '\\['"), ('{"text": 1}', "columns")])
def test_lines_are_read_in_their_order_too(first, message, tokenizer, tmp_path, monkeypatch):
    """A line that is no JSON hides no error of an earlier row, and no later one comes first."""
    monkeypatch.setattr("tokenpack.data.chat.pipeline._PART", 2)
    good = json.dumps({"prompt": "a", "response": "b"})
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([good, good, first, good, '{"text": 1}', good, "["]))
    with pytest.raises(ValueError, match=rf"{message}.*row 2|row 2.*{message}"):
        encoded(path, tokenizer)
    with pytest.raises(ValueError, match=rf"{message}.*row 2|row 2.*{message}"):
        encoded(path, tokenizer, streaming=True)


def test_parts_in_flight_are_few_and_end_with_an_interrupt(tokenizer, monkeypatch):
    monkeypatch.setattr("tokenpack.data.chat.pipeline._PART", 2)
    monkeypatch.setattr("tokenpack.data.chat.pipeline._WAITING", 3)
    pipeline = ChatPipeline(tokenizer, ChatOptions())
    taken = []

    def rows(interrupted):
        for number in range(100):
            taken.append(number)
            if number == interrupted:
                raise KeyboardInterrupt
            yield number, {"prompt": "a", "response": "b" * number}

    before = threading.active_count()
    parts = pipeline.encode_parts(rows(None))
    for at in range(5):
        assert [sample.row for sample in next(parts)] == [2 * at, 2 * at + 1]
        assert len(taken) == 2 * (at + 4)  # three wait while a fourth is rendered
    parts.close()
    assert threading.active_count() == before
    with pytest.raises(KeyboardInterrupt):
        pipeline.encode(rows(21))
    assert threading.active_count() == before
