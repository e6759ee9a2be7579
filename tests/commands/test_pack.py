"""``tokenpack pack``: the contents of OUT for every kind of IN, and bad input."""

import gzip
import json
import shutil
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tokenpack.cli import main
from tokenpack.commands import figures, pack
from tokenpack.packing import PackResult, merge_results, pack_lengths, pack_shards
from tokenpack.samples.tokenizer import train_tokenizer

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")

TOKENS = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11, 12]]
TEXTS = ["One text.", "Another text, which is longer.", "A third."]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def tokens(tmp_path):
    return write_lines(tmp_path / "tokens.jsonl", [{"input_ids": ids} for ids in TOKENS])


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    train_tokenizer(TEXTS, 400).save(str(path))
    return path


def run(source, out, *options, capacity=8):
    return main(["pack", str(source), str(out), "--capacity", str(capacity), *map(str, options)])


def rows_of(out):
    return datasets.Dataset.from_file(str(out / "dataset.arrow"))[:]


# -------------------------------------------------------------------------------------------- rows


def test_rows_are_a_dataset(tokens, tmp_path):
    assert run(tokens, tmp_path / "out", "--strategy", "nf") == 0
    assert rows_of(tmp_path / "out") == {
        "input_ids": [[1, 2, 3, 4, 5, 0, 0, 0], [6, 7, 8, 9, 10, 11, 12, 0]],
        "attention_mask": [[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0]],
        "labels": [[-100, 2, 3, -100, 5, -100, -100, -100], [-100, 7, 8, 9, -100, 11, 12, -100]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 0]],
        "seq_lengths": [[3, 2], [4, 3]],
    }


def test_labels_columns_and_padding_values(tmp_path):
    records = [{"ids": ids, "wanted": [-each for each in ids]} for ids in TOKENS]
    source = write_lines(tmp_path / "labelled.jsonl", records)
    options = ["--column", "ids", "--labels", "wanted", "--columns", "labels", "input_ids"]
    values = ["--padding-value", 99, "--label-padding-value", -1]
    assert run(source, tmp_path / "out", *options, *values, "--strategy", "next-fit") == 0
    assert rows_of(tmp_path / "out") == {
        "labels": [[-1, -2, -3, -1, -5, -1, -1, -1], [-1, -7, -8, -9, -1, -11, -12, -1]],
        "input_ids": [[1, 2, 3, 4, 5, 99, 99, 99], [6, 7, 8, 9, 10, 11, 12, 99]],
    }


@pytest.mark.parametrize(
    "overlong, rows",
    [
        ("truncate", [[1, 2, 3], [4, 5, 0], [6, 7, 8], [10, 11, 12]]),
        ("split", [[1, 2, 3], [4, 5, 0], [6, 7, 8], [9, 0, 0], [10, 11, 12]]),
        ("drop", [[1, 2, 3], [4, 5, 0], [10, 11, 12]]),
    ],
)
def test_overlong_sequences(tokens, tmp_path, overlong, rows):
    options = ["--strategy", "nf", "--overlong", overlong]
    assert run(tokens, tmp_path / "out", *options, capacity=3) == 0
    assert rows_of(tmp_path / "out")["input_ids"] == rows
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]
    name = {"truncate": "truncated", "split": "split", "drop": "dropped"}[overlong]
    assert metrics[name] == 1


def test_limits_and_seed_reach_the_planner(tokens, tmp_path):
    assert run(tokens, tmp_path / "limit", "--max-sequences", 1) == 0
    assert len(rows_of(tmp_path / "limit")["input_ids"]) == 4
    assert run(tokens, tmp_path / "window", "--window", 1) == 0
    assert len(rows_of(tmp_path / "window")["input_ids"]) == 4
    lengths = [len(ids) for ids in TOKENS]
    seeds = [0, next(s for s in range(9) if starts(lengths, s) != starts(lengths, 0))]
    for seed in seeds:
        out = tmp_path / str(seed)
        assert run(tokens, out, "--strategy", "ffs", "--seed", seed) == 0
        assert [row[0] for row in rows_of(out)["input_ids"]] == starts(lengths, seed)


def starts(lengths, seed):
    return [TOKENS[each[0]][0] for each in pack_lengths(lengths, 8, "ffs", seed=seed)]


# ---------------------------------------------------------------------------------------------- IN


def as_parquet(path):
    import pyarrow.parquet

    # Row groups, large lists and wide integers.
    column = pa.array(TOKENS, pa.large_list(pa.int64()))
    pyarrow.parquet.write_table(pa.table({"input_ids": column}), path, row_group_size=1)


def as_arrow(path):
    datasets.Dataset.from_dict({"input_ids": TOKENS, "other": list("abcd")}).save_to_disk(path)


def as_compressed(path):
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"input_ids": ids}) + "\n" for ids in TOKENS)


def as_folder(path):
    path.mkdir()
    write_lines(path / "a.jsonl", [{"input_ids": ids} for ids in TOKENS[:1]])
    write_lines(path / "b.jsonl", [{"input_ids": ids} for ids in TOKENS[1:]])


@pytest.mark.parametrize(
    "name, write, given",
    [
        ("t.parquet", as_parquet, "t.parquet"),
        ("saved", as_arrow, "saved"),
        ("t.jsonl.gz", as_compressed, "t.jsonl.gz"),
        ("folder", as_folder, "folder"),
        ("folder", as_folder, "folder/?.jsonl"),
    ],
)
def test_all_kinds_of_files(tmp_path, name, write, given):
    write(tmp_path / name)
    assert run(tmp_path / given, tmp_path / "out", "--strategy", "nf") == 0
    assert rows_of(tmp_path / "out")["input_ids"] == [
        [1, 2, 3, 4, 5, 0, 0, 0],
        [6, 7, 8, 9, 10, 11, 12, 0],
    ]


def test_json_that_begins_with_a_block_of_empty_lists(tmp_path):
    # More empty lists than fit into the MiB from which the type is inferred.
    source = write_lines(tmp_path / "t.jsonl", [{"input_ids": []}] * 70_000 + [{"input_ids": [7]}])
    assert run(source, tmp_path / "out", "--drop-empty", capacity=2) == 0
    assert rows_of(tmp_path / "out")["input_ids"] == [[7, 0]]


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_texts_become_the_tokenizers_ids(tmp_path, tokenizer, kind):
    from tokenizers import Tokenizer

    source = tmp_path / f"texts.{kind}"
    if kind == "jsonl":
        write_lines(source, [{"body": text} for text in TEXTS])
    else:
        source.write_text("".join(text + "\n" for text in TEXTS))
    options = ["--text-column", "body"] if kind == "jsonl" else []
    options += ["--tokenizer", tokenizer, "--max-sequences", 1, "--strategy", "nf"]
    assert run(source, tmp_path / "out", *options, capacity=64) == 0
    encoded = [Tokenizer.from_file(str(tokenizer)).encode(text).ids for text in TEXTS]
    rows = rows_of(tmp_path / "out")
    assert rows["seq_lengths"] == [[len(ids)] for ids in encoded]
    assert [row[: len(ids)] for row, ids in zip(rows["input_ids"], encoded)] == encoded


def test_lengths_without_tokens_give_a_plan_made_in_shards_of_a_mapped_file(
    tmp_path, monkeypatch, capsys
):
    lengths = np.random.default_rng(0).integers(1, 9, 100).astype(np.uint16)
    np.save(tmp_path / "lengths.npy", lengths)
    given = []

    def in_small_shards(lengths, *others):
        given.append(lengths._values)
        return pack_shards(lengths, *others, shard_size=40)

    monkeypatch.setattr(pack, "pack_shards", in_small_shards)
    out = tmp_path / "out"
    assert run(tmp_path / "lengths.npy", out) == 0
    assert isinstance(given[0], np.memmap)
    shards = [pack_lengths(lengths[first : first + 40], 8) for first in (0, 40, 80)]
    assert PackResult.load(out / "plan") == merge_results(shards)
    assert sorted(path.name for path in out.iterdir()) == ["metrics.json", "plan", "plan.png"]
    captured = capsys.readouterr()
    assert f'PackResult.load("{out / "plan"}")' in captured.out
    assert "100/100" in captured.err


def test_reading_keeps_tokens_once_and_no_python_integers(tmp_path):
    import pyarrow.parquet

    lengths = np.full(4000, 500, np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = np.arange(offsets[-1], dtype=np.int64)
    table = pa.table({"input_ids": pa.ListArray.from_arrays(offsets, values)})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet", row_group_size=500)
    del table
    read = partial(pack._read, str(tmp_path / "t.parquet"), ["input_ids"], pack._token_lists)
    read()  # imports modules
    tracemalloc.start()
    (tokens,) = read()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert tokens.values.dtype == np.int32
    assert np.array_equal(tokens.values, values)
    assert np.array_equal(tokens.offsets, offsets)
    # The spare room of a growing array, and a batch of 1000 rows at 8 and 4 bytes per token.
    assert peak < 4 * len(values) * 1.07 + 12 * 500 * 1000


# ------------------------------------------------------------------------------------------ report


def test_the_table_and_the_json_have_the_plans_metrics(tokens, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(tokens, out, "--overlong", "drop", "--strategy", "nf", capacity=3) == 0
    captured = capsys.readouterr()
    table = dict(line.rsplit(maxsplit=1) for line in captured.out.splitlines()[4:-3])
    report = json.loads((out / "metrics.json").read_text())
    metrics = report["metrics"]
    assert {name: table.pop(name) for name in ("seconds to plan", "sequences per second")} == {
        "seconds to plan": f"{metrics['seconds']:.3f}",
        "sequences per second": f"{metrics['sequences_per_second']:,.0f}",
    }
    assert table == {
        "sequences": "4",
        "rows": "3",
        "tokens": "8",
        "padding": "11.11%",
        "efficiency": "88.89%",
        "utilization, mean": "88.89%",
        "std": "15.71%",
        "min": "66.67%",
        "max": "100.00%",
        "sequences per row": "1.00",
        "dropped": "1",
        "truncated": "0",
        "split": "0",
    }
    plan = pack_lengths([len(ids) for ids in TOKENS], 3, "nf", overlong="drop")
    timed = {"seconds", "sequences_per_second"}
    expected = {k: v for k, v in plan.metrics._asdict().items() if k not in timed}
    assert {k: v for k, v in metrics.items() if k not in timed} == expected
    assert metrics["seconds"] > 0
    assert report["strategy"] == "nf"
    assert report["options"]["overlong"] == "drop"
    assert report["versions"]["datasets"] == datasets.__version__
    assert (out / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert "Packing" in captured.err  # the progress bar
    assert f'datasets.Dataset.from_file("{out / "dataset.arrow"}")' in captured.out


def test_without_matplotlib_there_is_no_png(tokens, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "available", lambda: False)
    out = tmp_path / "out"
    assert run(tokens, out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["dataset.arrow", "metrics.json"]
    assert f"written: {out / 'dataset.arrow'}, {out / 'metrics.json'}\n" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- bad input


def refused(capsys, *arguments, **options):
    assert run(*arguments, **options) == 2
    captured = capsys.readouterr()
    error = captured.err.strip().splitlines()[-1]
    assert error.startswith("tokenpack: error: ")
    assert captured.out == ""
    return error


def test_existing_files_are_not_overwritten(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    error = refused(capsys, "missing.jsonl", out)
    assert f"OUT must be a new or empty folder, got {out} with mine" in error
    assert (out / "mine").read_text() == "kept"
    assert "OUT: cannot create the folder" in refused(capsys, "missing.jsonl", out / "mine")


def test_a_run_that_fails_leaves_nothing(tokens, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack, "write_json", full)
    np.save(tmp_path / "lengths.npy", [1, 2])
    mine = tmp_path / "mine"
    mine.mkdir()
    for source in (tokens, tmp_path / "lengths.npy"):
        assert "No space left on device" in refused(capsys, source, mine / "new" / "out")
        assert list(mine.iterdir()) == []
        assert "No space left on device" in refused(capsys, source, mine)
        assert list(mine.iterdir()) == []


def test_bad_sequences_are_named(tmp_path, capsys):
    good = {"input_ids": [1, 2]}
    nine, ten = ({"input_ids": [1] * length} for length in (9, 10))
    for records, message in [
        ([good, {"input_ids": []}], "input_ids[1], of length 0, has no tokens; --drop-empty"),
        ([good, nine, ten], "input_ids[1], of length 9, has more tokens than --capacity 8"),
        ([good, nine, ten], "--overlong can truncate, split or drop (and 1 more)"),
        ([good, {"input_ids": None}], "input_ids[1] must be a list of integers, got null"),
        ([good] * 1003 + [{}], "starts at row 1,000: input_ids[3] must be a list of integers"),
        ([good, {"input_ids": [1, None]}], "input_ids[1][1] must be an integer, got null"),
        ([{"input_ids": [1.5]}], "input_ids must be a column of lists of integers, got list<"),
        ([{"input_ids": "text"}], "input_ids must be a column of lists of integers, got string"),
        ([{"input_ids": [2**31]}], "ids must fit into 32 bits, got 2147483648"),
        ([{"text": "words"}], "has no column input_ids; it has text (--column must"),
    ]:
        source = write_lines(tmp_path / "bad.jsonl", records)
        error = refused(capsys, source, tmp_path / "out")
        assert message in error
        assert "IN: " in error
    assert not (tmp_path / "out").exists()


def test_labels_must_be_as_long_as_tokens(tmp_path, capsys):
    records = [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1, 2], "labels": [1]}]
    source = write_lines(tmp_path / "bad.jsonl", records)
    error = refused(capsys, source, tmp_path / "out", "--labels", "labels")
    assert "labels[1] must be as long as input_ids[1], 2 tokens, got 1" in error


def test_bad_files_and_options(tokens, tokenizer, tmp_path, capsys):
    files = {"broken.npy": b"\x93NUMPY", "empty.npy": b"", "empty.jsonl": b"", "x.bin": b"x"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "shares.npy", [0.5, 1.0])
    np.save(tmp_path / "square.npy", [[1, 2], [3, 4]])
    np.save(tmp_path / "none.npy", np.empty(0, np.int64))
    np.save(tmp_path / "negative.npy", [1, -1, 2])
    np.save(tmp_path / "long.npy", [1, 9])
    np.save(tmp_path / "lengths.npy", [1, 2])
    write_lines(tmp_path / "numbers.jsonl", [{"text": 1}])
    write_lines(tmp_path / "null.jsonl", [{"text": "a"}, {"text": None}])
    text = ["--tokenizer", tokenizer]
    for name, options, message in [
        ("missing.jsonl", [], "IN must be an existing file"),
        ("missing.npy", [], "missing.npy: No such file"),
        ("*.parquet", [], "IN must match at least one file"),
        ("broken.npy", [], "IN must be one .npy array"),
        ("empty.npy", [], "IN must be one .npy array"),
        ("empty.jsonl", [], "IN must not be an empty file"),
        ("x.bin", [], "must end in one of"),
        ("shares.npy", [], "must be a one-dimensional array of integers, a length per sequence"),
        ("square.npy", [], "square.npy with int64 of shape (2, 2)"),
        ("none.npy", [], "with int64 of shape (0,)"),
        ("negative.npy", [], "lengths[1], of length -1, is negative"),
        ("long.npy", [], "lengths[1], of length 9, has more tokens than --capacity 8"),
        ("lengths.npy", text, "--tokenizer must not be set"),
        ("lengths.npy", ["--labels", "x"], "--labels must not be set"),
        ("lengths.npy", ["--columns", "labels"], "--columns must not be set"),
        ("tokens.jsonl", ["--strategy", "best"], "strategy must be auto or one of nf (next_fit)"),
        ("tokens.jsonl", ["--labels", "wanted"], "has no column wanted; it has input_ids"),
        ("tokens.jsonl", [*text, "--labels", "x"], "--labels must not be set with --tokenizer"),
        ("tokens.jsonl", ["--tokenizer", "nowhere.json"], "--tokenizer must be a file or folder"),
        ("tokens.jsonl", text, "has no column text; it has input_ids"),
        ("numbers.jsonl", text, "text must be a column of text, got int64"),
        ("null.jsonl", text, "text[1] must be text, got null"),
    ]:
        assert message in refused(capsys, tmp_path / name, tmp_path / "out", *options), name
    assert "capacity must be from 1" in refused(capsys, tokens, tmp_path / "out", capacity=2**31)


def test_a_missing_extra_is_named(tokens, tmp_path, capsys, monkeypatch):
    found = pack.importlib.util.find_spec
    monkeypatch.setattr(
        pack.importlib.util, "find_spec", lambda name: None if name == "datasets" else found(name)
    )
    error = refused(capsys, tokens, tmp_path / "out")
    assert error == "tokenpack: error: pack needs datasets: pip install 'tokenpack[data]'"


def test_ranks_pack_ranges_of_the_rows(tmp_path, capsys):
    import datasets

    path = tmp_path / "ids.jsonl"
    rows = [[at] * (at % 5 + 1) for at in range(1, 24)]
    path.write_text("".join(f'{{"input_ids": {row}}}\n' for row in rows))
    np.save(tmp_path / "lengths.npy", [len(row) for row in rows])
    sequences = 0
    parts = []
    for rank in range(3):
        options = ["--capacity", "6", "--rank", str(rank), "--world-size", "3"]
        assert main(["pack", str(path), str(tmp_path / "out"), *options]) == 0
        folder = tmp_path / f"out-0000{rank}-of-00003"
        parts.append(datasets.Dataset.from_file(str(folder / "dataset.arrow")))
        lengths = str(tmp_path / "lengths.npy")
        assert main(["pack", lengths, str(tmp_path / "plan"), *options]) == 0
        sequences += PackResult.load(tmp_path / f"plan-0000{rank}-of-00003/plan").num_sequences
    ids = [{token for row in part for token in row["input_ids"] if token} for part in parts]
    assert ids == [set(range(1, 8)), set(range(8, 16)), set(range(16, 24))]
    assert sequences == 23
    assert main(["merge-packed", str(tmp_path / "out")]) == 0
    joined = datasets.Dataset.from_file(str(tmp_path / "out/dataset.arrow"))
    assert joined.to_list() == datasets.concatenate_datasets(parts).to_list()
    assert joined.features == parts[0].features
    assert main(["merge-packed", str(tmp_path / "plan")]) == 0
    plan = PackResult.load(tmp_path / "plan/plan")
    assert plan.num_sequences == 23
    for name in ("out", "plan"):
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())["metrics"]
        expected = plan.metrics._asdict()
        for timed in ("seconds", "sequences_per_second"):
            del metrics[timed], expected[timed]
        assert metrics == pytest.approx(expected)
    options = ["--capacity", "6", "--rank", "1", "--world-size", "24"]
    assert main(["pack", str(path), str(tmp_path / "none"), *options[:3], "0", *options[4:]]) == 2
    assert "--world-size must be at most the number of rows" in capsys.readouterr().err


def test_parts_that_do_not_belong_together(tmp_path, capsys):
    lengths, out = tmp_path / "lengths.npy", tmp_path / "out"
    np.save(lengths, np.arange(1, 9))

    def merge_after(rank, capacity="8"):
        options = ["--capacity", capacity, "--rank", str(rank), "--world-size", "2"]
        folder = Path(f"{out}-0000{rank}-of-00002")
        shutil.rmtree(folder, ignore_errors=True)
        assert main(["pack", str(lengths), str(out), *options]) == 0
        capsys.readouterr()
        assert main(["merge-packed", str(out)]) == 2
        assert not out.exists() or not any(out.iterdir())
        return capsys.readouterr().err

    assert main(["merge-packed", str(out)]) == 2
    assert (
        "with the parts out-00000-of-00002 and so on beside it, got none" in capsys.readouterr().err
    )
    assert "an unfinished one of rank 1: run `tokenpack pack` with --rank 1" in merge_after(0)
    assert "was packed with capacity=9, and out-00000-of-00002 with 8" in merge_after(1, "9")
    Path(f"{out}-00000-of-00003").mkdir()
    assert "got parts of [2, 3] ranks" in merge_after(1)


def test_a_part_that_is_cut(tmp_path, capsys):
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 2]}\n' * 6)
    for rank in ("0", "1"):
        given = [str(tmp_path / "ids.jsonl"), str(tmp_path / "out"), "--capacity", "4"]
        assert main(["pack", *given, "--rank", rank, "--world-size", "2"]) == 0
    path = tmp_path / "out-00001-of-00002/dataset.arrow"
    content = path.read_bytes()
    for cut in (content[:-9], content[: len(content) // 2]):
        path.write_bytes(cut)
        assert main(["merge-packed", str(tmp_path / "out")]) == 2
        assert "dataset.arrow" in capsys.readouterr().err
