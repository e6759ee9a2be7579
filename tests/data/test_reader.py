"""Every format read back as it was written, in bounded memory, and every way a file can be bad."""

import bz2
import csv
import gzip
import json
import lzma
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pa = pytest.importorskip("pyarrow")

import pyarrow.feather  # noqa: E402
import pyarrow.json  # noqa: E402
import pyarrow.parquet  # noqa: E402

from tokenpack.data.reader import streaming_dataset_reader  # noqa: E402
from tokenpack.data.readers import blocks  # noqa: E402
from tokenpack.data.readers import csv as csv_reader  # noqa: E402

ROWS = [
    {"id": number, "name": f"n{number}", "input_ids": list(range(number % 4))}
    for number in range(25)
]
FLAT_ROWS = [{"id": row["id"], "name": row["name"]} for row in ROWS]
COLUMNS = ["id", "name", "input_ids"]
TEXTUAL = [".jsonl", ".csv", ".tsv", ".txt"]


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESSORS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def to_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def to_csv(rows, delimiter=","):
    lines = [list(rows[0]), *(row.values() for row in rows)]
    return "".join(delimiter.join(map(str, line)) + "\n" for line in lines).encode()


def to_bytes(suffix, rows):
    """A small file of ``rows`` (of text: their ``name``) with several groups or batches."""
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, sink, row_group_size=7)
    elif suffix == ".arrow":
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    elif suffix == ".stream.arrow":
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    elif suffix == ".txt":
        return "".join(row["name"] + "\n" for row in rows).encode()
    else:
        delimiter = {".csv": ",", ".tsv": "\t"}.get(suffix)
        return to_jsonl(rows) if delimiter is None else to_csv(rows, delimiter)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few lines, so that small files have many."""
    monkeypatch.setattr(blocks, "_LINE_BLOCK_BYTES", 64)
    monkeypatch.setattr(csv_reader, "_CSV_BLOCK_BYTES", 64)


def read(path, batch_size=1000, columns=None, **options):
    return list(streaming_dataset_reader(path, batch_size, columns, **options))


def rows_of(batches):
    return [
        dict(zip(batch, values))
        for batch in batches
        for values in zip(*batch.values(), strict=True)
    ]


def read_rows(path, batch_size=1000, columns=None, **options):
    return rows_of(read(path, batch_size, columns, **options))


# ------------------------------------------------------------------------- every format, read back

LISTS = [".parquet", ".arrow", ".stream.arrow", ".jsonl"]


@pytest.mark.parametrize("suffix", LISTS)
@pytest.mark.parametrize("batch_size", [1, 6, 7, 8, 25, 100])
@pytest.mark.usefixtures("small_blocks")
def test_batches_are_of_the_size_asked_for_and_hold_every_row(write, suffix, batch_size):
    batches = read(write("a" + suffix, to_bytes(suffix, ROWS)), batch_size)
    full, rest = divmod(25, batch_size)
    assert [len(batch["id"]) for batch in batches] == [batch_size] * full + [rest] * (rest > 0)
    assert rows_of(batches) == ROWS
    assert list(batches[0]) == COLUMNS


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("batch_size", [1, 7, 25, 100])
@pytest.mark.usefixtures("small_blocks")
def test_csv_and_tsv(write, suffix, batch_size):
    batches = read(write("a" + suffix, to_bytes(suffix, FLAT_ROWS)), batch_size)
    assert [len(batch["id"]) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert rows_of(batches) == FLAT_ROWS


@pytest.mark.parametrize("suffix", TEXTUAL)
@pytest.mark.parametrize("ending, compress", COMPRESSORS.items())
@pytest.mark.usefixtures("small_blocks")
def test_compressed(write, suffix, ending, compress):
    plain = write("a" + suffix, to_bytes(suffix, FLAT_ROWS))
    packed = write("b" + suffix + ending, compress(to_bytes(suffix, FLAT_ROWS)))
    assert read(packed, 4) == read(plain, 4)
    assert len(read_rows(packed)) == 25


@pytest.mark.parametrize("ending, compress", COMPRESSORS.items())
def test_compressed_streams_that_follow_one_another(write, ending, compress):
    path = write(f"a.txt{ending}", compress(b"one\n") + compress(b"") + compress(b"two\n"))
    assert read(path) == [{"text": ["one", "two"]}]


def test_padding_of_xz(write):
    padded = lzma.compress(b"one\n") + bytes(4) + lzma.compress(b"two\n") + bytes(70_000)
    assert read(write("a.txt.xz", padded)) == [{"text": ["one", "two"]}]


@pytest.mark.parametrize("ending, compress", COMPRESSORS.items())
def test_bytes_after_a_compressed_stream_are_an_error(write, ending, compress):
    # Python's bz2 and lzma would end there without an error, and lose a damaged second stream.
    second = bytes([0x41, *compress(b"two\n")[1:]])
    with pytest.raises(ValueError, match=rf"a\.txt\{ending}: truncated, damaged or not text"):
        read(write(f"a.txt{ending}", compress(b"one\n") + second))


def test_a_text_may_begin_like_bzip2(write):
    assert read(write("a.txt", "BZh91 is a name\n")) == [{"text": ["BZh91 is a name"]}]


def test_datasets_writes_what_this_reads(tmp_path):
    datasets = pytest.importorskip("datasets")
    written = datasets.Dataset.from_list(ROWS)
    written.save_to_disk(tmp_path / "saved", num_shards=3)
    written.to_parquet(tmp_path / "a.parquet")
    written.to_json(tmp_path / "a.jsonl")
    assert read_rows(tmp_path / "saved", 4) == ROWS
    assert read_rows(tmp_path / "a.parquet", 4) == ROWS
    assert read_rows(tmp_path / "a.jsonl", 4) == ROWS


@pytest.mark.parametrize(
    "content, lines",
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\n\n\ntwo", ["one", "", "", "two"]),
        (b"\none\n\n", ["", "one", ""]),
        (b"one\r\ntwo \r\n\r\n", ["one", "two ", ""]),
        (b"\xef\xbb\xbfone\n", ["one"]),
        ("a\u2028b\x0bc\n\u00e9\n".encode(), ["a\u2028b\x0bc", "é"]),
        (b"x" * 200 + b"\ny\n", ["x" * 200, "y"]),
    ],
)
@pytest.mark.usefixtures("small_blocks")
def test_a_line_of_text_is_a_row(write, content, lines):
    assert read(write("a.txt", content)) == [{"text": lines}]
    assert read(write("a.txt", content), text_column="line") == [{"line": lines}]


@pytest.mark.usefixtures("small_blocks")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {"n": st.integers(-(2**63), 2**63 - 1), "text": st.text(st.characters(codec="utf-8"))},
            optional={
                "ids": st.lists(st.integers(0, 10**6)) | st.none(),
                "flag": st.booleans(),
                "score": st.floats(-1e9, 1e9) | st.integers(-5, 5),
                "when": st.sampled_from(["2020-01-01", "2020-01-01 00:00:00", "soon"]),
            },
        ),
        min_size=1,
        max_size=20,
    ),
    batch_size=st.integers(1, 7),
)
def test_jsonl_is_what_json_reads(write, rows, batch_size):
    """Blocks of a line or two: columns and types change between blocks again and again."""
    columns = sorted({name for row in rows for name in row})
    expected = [{name: row.get(name) for name in columns} for row in rows]
    path = write("a.jsonl", to_jsonl(rows))
    assert read_rows(path, batch_size, columns) == expected
    for got, row in zip(read_rows(path, batch_size), expected, strict=True):
        assert got == {name: row[name] for name in got}
        assert all(row[name] is None for name in set(row) - set(got))


@pytest.mark.usefixtures("small_blocks")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    rows=st.lists(
        st.tuples(
            st.integers(-(2**63), 2**63 - 1),
            # Text that is not a number, and fits into a block.
            st.lists(st.sampled_from([*'ab ,"\n\té', "\r\n"]), max_size=12).map(
                lambda parts: "x" + "".join(parts)
            ),
        ),
        min_size=1,
        max_size=20,
    ),
    suffix=st.sampled_from(["csv", "tsv"]),
)
def test_csv_is_what_was_written(write, tmp_path, rows, suffix):
    path = tmp_path / f"a.{suffix}"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter={"csv": ",", "tsv": "\t"}[suffix])
        writer.writerows([("n", "text"), *rows])
    assert [tuple(row.values()) for row in read_rows(path, 3)] == rows


# ------------------------------------------------------------------------------------ the options


@pytest.mark.parametrize("suffix", [*LISTS, ".csv"])
@pytest.mark.usefixtures("small_blocks")
def test_columns_come_in_the_order_asked_for(write, suffix):
    rows = FLAT_ROWS if suffix == ".csv" else ROWS
    path = write("a" + suffix, to_bytes(suffix, rows))
    assert read_rows(path, 4, ["name"]) == [{"name": row["name"]} for row in rows]
    swapped = read_rows(path, 4, ("name", "id"))
    assert swapped == [{"name": row["name"], "id": row["id"]} for row in rows]
    assert list(swapped[0]) == ["name", "id"]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".stream.arrow", *TEXTUAL])
@pytest.mark.parametrize("skip", [0, 1, 6, 7, 8, 14, 24, 25])
@pytest.mark.usefixtures("small_blocks")
def test_skipping_resumes_at_a_row_across_files(write, tmp_path, suffix, skip):
    write("a" + suffix, to_bytes(suffix, FLAT_ROWS[:13]))
    write("b" + suffix, to_bytes(suffix, FLAT_ROWS[13:]))
    everything = read_rows(tmp_path, 4)
    assert len(everything) == 25
    assert read_rows(tmp_path, 4, skip_rows=skip) == everything[skip:]


def test_skipping_more_than_there_is_is_an_error(write):
    path = write("a.jsonl", to_jsonl(ROWS))
    with pytest.raises(ValueError, match=r"skip_rows must be at most 25, .* got 26"):
        read(path, skip_rows=26)


def test_skipped_row_groups_are_not_read(write):
    """Group 0 is overwritten, so reading it fails."""
    path = write("a.parquet", to_bytes(".parquet", ROWS))
    end = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    content = bytearray(path.read_bytes())
    content[4:end] = b"\xff" * (end - 4)
    path.write_bytes(content)
    assert read_rows(path, skip_rows=7) == ROWS[7:]
    with pytest.raises(ValueError, match=r"a\.parquet"):
        read(path, skip_rows=6)


def test_columns_not_asked_for_are_not_read(write):
    """The column input_ids is overwritten in every row group."""
    path = write("a.parquet", to_bytes(".parquet", ROWS))
    metadata = pyarrow.parquet.ParquetFile(path).metadata
    content = bytearray(path.read_bytes())
    for group in range(metadata.num_row_groups):
        column = metadata.row_group(group).column(2)
        start = column.dictionary_page_offset or column.data_page_offset
        content[start : start + column.total_compressed_size] = (
            b"\xff" * column.total_compressed_size
        )
    path.write_bytes(content)
    assert read_rows(path, columns=["id", "name"]) == FLAT_ROWS
    with pytest.raises(ValueError, match=r"a\.parquet"):
        read(path)


def test_drop_last(write):
    path = write("a.jsonl", to_jsonl(ROWS))
    assert [len(batch["id"]) for batch in read(path, 10, drop_last=True)] == [10, 10]
    assert [len(batch["id"]) for batch in read(path, 5, drop_last=True)] == [5] * 5
    assert read(path, 26, drop_last=True) == []


@pytest.mark.parametrize("suffix", LISTS)
@pytest.mark.usefixtures("small_blocks")
def test_arrow_output_is_tables_of_the_same_rows(write, suffix):
    tables = read(write("a" + suffix, to_bytes(suffix, ROWS)), 10, output="arrow")
    assert [type(table) for table in tables] == [pa.Table] * 3
    assert [table.num_rows for table in tables] == [10, 10, 5]
    assert pa.concat_tables(tables).to_pylist() == ROWS
    assert tables[0].schema.field("input_ids").type == pa.list_(pa.int64())


# ---------------------------------------------------------------------------------- which files


def test_folders_and_globs_are_sorted_and_lists_are_not(write, tmp_path):
    for number, name in enumerate(["c.jsonl", "a.jsonl", "b.ndjson"]):
        write(name, to_jsonl([{"n": number}]))
    for name in ["README.md", "_SUCCESS", ".hidden.jsonl", "dataset_info.json"]:
        write(name, "not data")
    (tmp_path / "inner.jsonl").mkdir()
    write("inner.jsonl/d.jsonl", to_jsonl([{"n": 3}]))
    assert read(tmp_path) == [{"n": [1, 2, 0]}]
    assert read(str(tmp_path / "*.jsonl"), format="jsonl", skip_rows=0) != []
    assert read(str(tmp_path / "[ac].jsonl")) == [{"n": [1, 0]}]
    assert read(str(tmp_path / "**" / "[cd].jsonl")) == [{"n": [0, 3]}]
    assert read([tmp_path / "c.jsonl", str(tmp_path / "a.jsonl")]) == [{"n": [0, 1]}]


def test_the_order_of_a_glob_is_not_left_to_the_file_system(write, tmp_path, monkeypatch):
    paths = [str(write(name, name)) for name in ["b.txt", "a.txt"]]
    monkeypatch.setattr("glob.glob", lambda pattern, recursive: paths)
    assert read(tmp_path / "*.txt") == [{"text": ["a.txt", "b.txt"]}]


def test_a_name_may_look_like_a_glob(write):
    assert read(write("a[0].txt", "one\n")) == [{"text": ["one"]}]


def test_format_overrides_the_suffix(write, tmp_path):
    assert read(write("a.log", "one\n"), format="text") == [{"text": ["one"]}]
    assert read(write("a.csv", '{"a": 1}\n'), format="text") == [{"text": ['{"a": 1}']}]
    write("b.txt", "two\n")
    assert read(tmp_path, format="text") == [{"text": ["two"]}]
    with pytest.raises(ValueError, match=r"files of one format, got csv, text .*format="):
        streaming_dataset_reader(tmp_path)


# ---------------------------------------------------------------------------- laziness and memory


def test_nothing_is_opened_before_the_first_next(write, monkeypatch):
    paths = [write(f"{name}.jsonl", to_jsonl(ROWS)) for name in "ab"]
    opened = []
    original = open
    monkeypatch.setattr(
        "builtins.open",
        lambda path, *rest, **options: (
            opened.append(os.path.basename(str(path))) or original(path, *rest, **options)
        ),
    )
    batches = streaming_dataset_reader(paths, 10)
    assert opened == []
    next(batches)
    assert set(opened) == {"a.jsonl"}
    list(batches)
    assert set(opened) == {"a.jsonl", "b.jsonl"}


def test_lines_are_read_block_by_block(write, monkeypatch):
    """What lies after the first block may be anything until it is its turn."""
    monkeypatch.setattr(blocks, "_LINE_BLOCK_BYTES", 1000)
    batches = streaming_dataset_reader(write("a.jsonl", to_jsonl(ROWS * 10) + b"no JSON\n"), 10)
    assert next(batches)["id"] == list(range(10))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 251: not JSON"):
        list(batches)


PEAK = """
import json, resource, sys
from tokenpack.data.reader import streaming_dataset_reader
path, output, columns = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
next(streaming_dataset_reader(sys.argv[4], 10, columns, output=output))  # imports, thread pools
before = peak()
rows = 0
for batch in streaming_dataset_reader(path, 1000, columns, output=output):
    rows += len(batch["text"])
print(rows, peak() - before)
"""


def write_large(path, rows):
    """Lines of a kilobyte; in parquet, all in one row group."""
    table = pa.table({"text": [f"{number:01000d}" for number in range(1000)]})
    first = table.column("text").to_pylist()
    if path.suffix == ".parquet":
        table = pa.concat_tables([table] * (rows // 1000))
        pyarrow.parquet.write_table(
            table, path, row_group_size=rows, compression="none", use_dictionary=False
        )
        return
    lines = {
        ".txt": first,
        ".jsonl": [json.dumps({"text": line}) for line in first],
        ".csv": [f"a{line}" for line in first],
    }[path.suffix]
    with open(path, "w") as file:
        file.write("text\n" if path.suffix == ".csv" else "")
        for _ in range(rows // 1000):
            file.write("\n".join(lines) + "\n")


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize("suffix", [".parquet", ".txt", ".jsonl", ".csv"])
def test_memory_is_bounded(tmp_path, suffix):
    """A file of 200 MB grows the process by less than half of that. (10 to 60 MB were seen.)"""
    large, small = tmp_path / f"large{suffix}", tmp_path / f"small{suffix}"
    write_large(large, 200_000)
    write_large(small, 1000)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(large), "arrow", "null", str(small)],
        capture_output=True,
        text=True,
        check=True,
    )
    rows, grown = map(int, done.stdout.split())
    assert rows == 200_000
    assert grown < 100e6


# --------------------------------------------------------------------------- schemas that change


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("gap", [1, 50])
def test_a_key_may_appear_late(write, gap):
    rows = [{"a": 1}] * gap + [{"a": 2, "b": [1, 2]}]
    path = write("a.jsonl", to_jsonl(rows))
    assert read(path, columns=["b"]) == [{"b": [None] * gap + [[1, 2]]}]
    assert read(path) == [{"a": [1] * gap + [2], "b": [None] * gap + [[1, 2]]}]
    assert list(read(path, 1)[0]) == (["a", "b"] if gap == 1 else ["a"])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "early, late",
    [
        (None, [1, 2]),
        ([], [1, 2]),
        ([[]], [[1], []]),
        (1, 2.5),
        (None, {"x": 1}),
        ({"x": 1}, {"y": "z"}),
        ({"x": []}, {"x": [1]}),
        ("2020-01-01", "text"),
        ("text", "2020-01-01"),
        ([{"x": None}], [{"x": 1}]),
    ],
)
def test_a_type_may_widen_between_blocks(write, early, late):
    rows = [{"a": early}] * 50 + [{"a": late}] * 50
    path = write("a.jsonl", to_jsonl(rows))
    got = [row["a"] for row in read_rows(path, 7)]
    assert [row["a"] for row in read_rows(path, 7, ["a"])] == got
    for written, found in zip([row["a"] for row in rows], got, strict=True):
        if isinstance(written, dict):
            found = {name: found[name] for name in written}  # keys of other rows are None
        assert found == written
    assert type(got[0]) is type(early)


@pytest.mark.parametrize("block_bytes", [64, 1000])
@pytest.mark.parametrize("skip_rows", [0, 90])
@pytest.mark.parametrize(
    "before, after, types",
    [
        (1, "x", "string.*int64"),
        ("x", 1, "int64.*string"),
        (True, 1, "int64.*bool"),
        (1, True, "bool.*int64"),
        ([], "x", "string.*list"),
        ([1], ["x"], "string.*int64"),
        ({"x": 1}, [1], "list.*struct"),
    ],
)
def test_a_type_conflict_names_the_line(
    write, monkeypatch, before, after, types, skip_rows, block_bytes
):
    monkeypatch.setattr(blocks, "_LINE_BLOCK_BYTES", block_bytes)
    rows = [{"n": 0, "a": before}] * 100 + [{"n": 0, "a": after}] * 10
    path = write("a.jsonl", to_jsonl(rows))
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 101: column 'a' is .*{types}"):
        read(path, 3, skip_rows=skip_rows)
    assert read_rows(path, 3, ["n"]) == [{"n": 0}] * 110


def test_a_type_conflict_within_a_block_that_begins_with_nulls(write, monkeypatch):
    """Such a block agrees with itself, and not with those before."""
    monkeypatch.setattr(blocks, "_LINE_BLOCK_BYTES", 100)
    rows = [{"a": []}] * 10 + [{"a": None}] * 10 + [{"a": "x"}] * 10
    with pytest.raises(ValueError, match=r"a\.jsonl, line 21: column 'a' is string"):
        read(write("a.jsonl", to_jsonl(rows)))


def test_a_conflict_between_files_names_the_file(write, tmp_path):
    write("a.jsonl", to_jsonl([{"a": 1}]))
    write("b.jsonl", to_jsonl([{"a": 1}, {"a": "x"}]))
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2: column 'a' is string"):
        read(tmp_path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".stream.arrow", ".csv"])
def test_files_must_have_the_same_columns(write, tmp_path, suffix):
    write("a" + suffix, to_bytes(suffix, [{"a": 1, "b": 2}]))
    second = write("b" + suffix, to_bytes(suffix, [{"b": 4, "a": 3}]))
    assert read(tmp_path) == [{"a": [1, 3], "b": [2, 4]}]
    second.write_bytes(to_bytes(suffix, [{"a": 1, "c": 2}]))
    with pytest.raises(ValueError, match=r"b\S*: has the columns a, c; the files before have a, b"):
        read(tmp_path)
    assert read(tmp_path, columns=["a"]) == [{"a": [1, 1]}]
    second.write_bytes(to_bytes(suffix, [{"a": "text", "b": 2}]))
    with pytest.raises(ValueError, match=r"b\S*(, line 2)?: column 'a' is .*before it is int64"):
        read(tmp_path)
    second.write_bytes(to_bytes(suffix, [{"a": 1.5, "b": 2}]))
    assert read(tmp_path) == [{"a": [1, 1.5], "b": [2, 2]}]


@pytest.mark.usefixtures("small_blocks")
def test_cells_of_csv(write):
    def column(*cells):
        lines = "".join(f"{cell},0\n" for cell in cells)
        return read_rows(write("a.csv", "a,b\n" + lines), columns=["a"], output="python")

    def values(*cells):
        return [row["a"] for row in column(*cells)]

    assert values("1", "", " 2") == [1, None, 2]
    assert values(*[""] * 99, "3") == [None] * 99 + [3]
    assert values(*["1"] * 99, "1.5") == [1] * 99 + [1.5]
    assert values("true", "False") == [True, False]
    assert values("1", "x", "") == ["1", "x", None]
    assert values("0x1F", "0x20") == ["0x1F", "0x20"]
    assert values("9" * 19) == ["9" * 19]
    assert values("2020-01-01", "NA") == ["2020-01-01", "NA"]
    assert values('"a ""quoted"",\r\ncell"', "z") == ['a "quoted",\r\ncell', "z"]
    with pytest.raises(ValueError, match=r"a\.csv, line 103: column 'a' is 'x', .* is int64"):
        values(*["1"] * 100, "\nx")
    with pytest.raises(ValueError, match=r"a\.csv, line 101: column 'a' is '1', .* is bool"):
        values(*["true"] * 99, "1")


@pytest.mark.parametrize("value", [2**53 + 1, 2**63 - 1, -(2**63)])
def test_integers_of_json_are_exact_or_an_error(write, value):
    assert read(write("a.jsonl", to_jsonl([{"a": value}]))) == [{"a": [value]}]
    mixed = write("b.jsonl", to_jsonl([{"a": 0.5}, {"a": [value][0] | 1}]))
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2: .*exactly"):
        read(mixed)


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"batch_size": 0}, ValueError, "batch_size must be 1 or more, got 0"),
        ({"batch_size": -1}, ValueError, "batch_size must be 1 or more, got -1"),
        ({"batch_size": 2.0}, TypeError, r"batch_size must be an integer, got 2\.0"),
        ({"batch_size": True}, TypeError, "batch_size must be an integer, got True"),
        ({"skip_rows": -1}, ValueError, "skip_rows must be 0 or more, got -1"),
        ({"columns": "a"}, TypeError, "columns must be a list of column names, got 'a'"),
        ({"columns": [1]}, TypeError, "columns must be a list of column names, got"),
        ({"columns": 1}, TypeError, "columns must be a list of column names, got 1"),
        ({"columns": []}, TypeError, "columns must be a list of column names, got"),
        ({"columns": ["a", "a"]}, ValueError, "columns must name each column once, got"),
        (
            {"format": "xml"},
            ValueError,
            "format must be one of arrow, csv, .* got 'xml'",
        ),
        ({"output": "numpy"}, ValueError, "output must be one of python, arrow, got 'numpy'"),
        ({"text_column": ""}, TypeError, "text_column must be a column name, got ''"),
        ({"path": 3}, TypeError, "path must be a path or a list of paths, got 3"),
        ({"path": [3]}, TypeError, r"path must be a path or a list of paths, got \[3\]"),
        ({"path": []}, ValueError, "path must name at least one file, got an empty list"),
        (
            {"path": "missing.jsonl"},
            FileNotFoundError,
            r"must be an existing file, got missing\.jsonl",
        ),
        (
            {"path": ["missing.csv"]},
            FileNotFoundError,
            r"must be an existing file, got missing\.csv",
        ),
        (
            {"path": "missing-*.jsonl"},
            FileNotFoundError,
            "must match at least one file, got .*missing",
        ),
    ],
)
def test_bad_arguments_are_errors_at_the_call(write, options, error, message):
    path = write("a.jsonl", to_jsonl([{"a": 1}]))
    with pytest.raises(error, match=message):
        streaming_dataset_reader(**{"path": path, **options})


def test_bad_paths_are_errors_at_the_call(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder with a file that ends in \.parquet"):
        streaming_dataset_reader(tmp_path)
    for suffix in [".parquet", ".arrow", *TEXTUAL]:
        with pytest.raises(ValueError, match=rf"must not be an empty file, got \S*empty\{suffix}"):
            streaming_dataset_reader(write("empty" + suffix, b""))
    with pytest.raises(
        ValueError, match=r"must end in one of \.parquet .*, got \S*a\.xml; .*format="
    ):
        streaming_dataset_reader(write("a.xml", "<a/>"))
    with pytest.raises(ValueError, match=r"must not be parquet within gzip, got \S*a\.parquet\.gz"):
        streaming_dataset_reader(write("a.parquet.gz", gzip.compress(b"PAR1")))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".stream.arrow", *TEXTUAL])
@pytest.mark.parametrize("named", [".parquet", ".arrow", ".jsonl", ".csv", ".txt", ".txt.gz"])
def test_content_of_another_format_than_the_name_says(write, suffix, named):
    fits = named in suffix or (named == ".txt" and suffix in TEXTUAL)
    if fits:
        return
    path = write("a" + named, to_bytes(suffix, FLAT_ROWS))
    if (suffix, named) == (".txt", ".csv"):  # lines without a comma are a CSV of one column
        return
    with pytest.raises(ValueError, match=rf"a\{named}"):
        read(path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".stream.arrow"])
def test_a_truncated_binary_file_is_an_error_wherever_it_ends(write, suffix):
    content = to_bytes(suffix, ROWS)
    for end in range(1, len(content)):
        path = write("a" + suffix, content[:end])
        with pytest.raises(ValueError, match=rf"a\{suffix}: "):
            read(path)


@pytest.mark.parametrize("suffix", TEXTUAL)
@pytest.mark.parametrize("ending, compress", COMPRESSORS.items())
def test_a_truncated_compressed_file_is_an_error_wherever_it_ends(write, suffix, ending, compress):
    content = compress(to_bytes(suffix, FLAT_ROWS))
    for end in range(1, len(content)):
        path = write("a" + suffix + ending, content[:end])
        with pytest.raises(ValueError, match=rf"a\{suffix}\{ending}"):
            read(path)


def test_a_truncated_line_is_an_error(write):
    content = to_jsonl(ROWS)
    last = content[:-1].rfind(b"\n") + 1
    for end in range(last + 1, len(content) - 1):
        with pytest.raises(ValueError, match=r"a\.jsonl, line 25: not JSON"):
            read(write("a.jsonl", content[:end]))
    for content in [b"a,b\n1,2\n3", b'a,b\n1,2\n3,"4', b'a,b\n1,2\n"3', b'a,b\n1,2\n3,"4\n5,6\n']:
        with pytest.raises(ValueError, match=r"a\.csv, line 3: (1 cells|the file ends inside)"):
            read(write("a.csv", content))


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"a": 1', "not JSON"),
        (b'{"a": }', "not JSON .*column 7"),
        (b"[1, 2]", "must be a JSON object, got a JSON list"),
        (b"3", "must be a JSON object, got a JSON int"),
        (b'{"a": 1} {"a": 2}', "not JSON"),
        (b'{"a":\n1}', "not JSON .*an object must be on one line: jq -c"),
        (b'{"b": "\xff"}', "not UTF-8 .byte 0xff"),
        (b'{"b": "\\ud800"}', "surrogate"),
        (b'{"b": 123456789012345678901234567890}', "more than 64 bits"),
        (b'{"b": ' + b"[" * 150 + b"]" * 150 + b"}", "nested deeper than 100"),
        (b'{"b": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
    ],
)
@pytest.mark.usefixtures("small_blocks")
def test_a_bad_line_of_json_is_named(write, line, message):
    content = b'{"a": 1}\n\n' * 25 + line + b'\n{"a": 1}\n'
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 51: .*{message}"):
        read(write("a.jsonl", content))


@pytest.mark.parametrize("start", [b"[", b"\n\n[", b"a,b\n", b'\xef\xbb\xbf["x"'])
def test_a_json_array_is_refused_before_it_is_read(write, start):
    line = start.count(b"\n", 0, 2) + 1
    hint = ".*one object per line: jq" if b"[" in start else ""
    with pytest.raises(ValueError, match=rf"a\.json, line {line}: must be a JSON object{hint}"):
        read(write("a.json", start))


@pytest.mark.parametrize(
    "line, message",
    [
        (b"1", "line 103: 1 cells, the header has 2"),
        (b"1,2,3", "line 103: 3 cells, the header has 2"),
        (b"1,\xff", "line 103: not UTF-8"),
        (b'1,"' + b"x\n" * 100, "line 103: the file ends inside a quoted cell"),
    ],
)
@pytest.mark.parametrize("block_bytes", [64, 1 << 20])
def test_a_bad_row_of_csv_is_named(write, monkeypatch, line, message, block_bytes):
    monkeypatch.setattr(csv_reader, "_CSV_BLOCK_BYTES", block_bytes)
    # A quoted line break: lines and rows do not count alike.
    content = b'a,b\n1,"2\n3"\n' + b"1,2\n" * 99 + line + b"\n" + b"1,2\n" * 9
    with pytest.raises(ValueError, match=rf"a\.csv, {message}"):
        read(write("a.csv", content), 2)


def test_a_quote_that_is_never_closed_does_not_take_in_the_file(write, monkeypatch):
    monkeypatch.setattr(csv_reader, "_CSV_BLOCK_BYTES", 64)
    monkeypatch.setattr(csv_reader, "_LONGEST_CSV_ROW_BYTES", 1000)
    path = write("a.csv", b'a,b\n1,2\n1,"2\n' + b"1,2\n" * 10_000)
    with pytest.raises(ValueError, match=r"a\.csv, line 3: a quote that is never closed, or"):
        read(path)


def test_a_quote_within_a_cell_is_a_character(write, monkeypatch):
    monkeypatch.setattr(csv_reader, "_CSV_BLOCK_BYTES", 8)
    path = write("a.csv", 'a,b\n5" disk,"x\ny"\n"q"r"s,t\n' * 3)
    lines = [('5" disk', "x\ny"), ('qr"s', "t"), ("a", "b")]
    assert [tuple(row.values()) for row in read_rows(path)] == (lines * 3)[:-1]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "a,a\n1,2\n", "more than one column a"),
        ("a.csv", "a\tb\n1\t2\n", "line 1: .*but the header is tsv"),
        ("a.tsv", "a,b\n1,2\n", "line 1: .*but the header is csv"),
        ("a.csv", "\n\n", "no header"),
        ("a.csv", "a,b\n", "no rows"),
        ("a.csv", 'a,"b\n1,2\n', "line 1: the file ends inside a quoted cell"),
        ("a.jsonl", "\n \n", "no rows"),
        ("a.jsonl", "{}\n{}\n", "line 1: must be JSON objects with keys"),
        ("a.txt", b"one\ntwo\n\xff\n", "line 3: not UTF-8"),
        ("a.txt", "one\ntwo\n".encode("utf-16-le"), r"line 1: not text \(a NUL byte\)"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), "no rows"),
    ],
)
def test_unusable_files(write, name, content, message):
    with pytest.raises(ValueError, match=rf"(?s)(?=.*{name}).*{message}"):
        read(write(name, content))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".stream.arrow"])
def test_a_file_without_rows_counts_only_when_all_are(write, suffix, tmp_path):
    schema = pa.Table.from_pylist(ROWS).schema
    sink = pa.BufferOutputStream()
    if suffix == ".parquet":
        pyarrow.parquet.write_table(schema.empty_table(), sink)
    else:
        new = pa.ipc.new_file if suffix == ".arrow" else pa.ipc.new_stream
        new(sink, schema).close()
    write("a" + suffix, sink.getvalue().to_pybytes())
    with pytest.raises(ValueError, match="no rows"):
        read(tmp_path)
    write("b" + suffix, to_bytes(suffix, ROWS))
    assert read_rows(tmp_path) == ROWS


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".stream.arrow", *TEXTUAL])
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("skip_rows", [0, 20])
def test_a_column_that_is_not_there(write, suffix, skip_rows):
    path = write("a" + suffix, to_bytes(suffix, FLAT_ROWS))
    there = "text" if suffix == ".txt" else "id, name"
    with pytest.raises(
        ValueError, match=rf"columns must be .* \S*a\{suffix} has no column x; it has {there}"
    ):
        read(path, columns=["x"], skip_rows=skip_rows)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".stream.arrow"])
def test_damage_is_an_error_or_other_rows_but_no_abort(write, suffix, tmp_path):
    """Bytes are overwritten one by one in a child process, which must not crash."""
    path = write("whole" + suffix, to_bytes(suffix, ROWS))
    program = """
import sys
from tokenpack.data.reader import streaming_dataset_reader
content = open(sys.argv[1], "rb").read()
outcomes = {}
for place in range(0, len(content), 7):
    for value in (0, 127, 255):
        damaged = bytearray(content)
        damaged[place] = value
        open(sys.argv[2], "wb").write(damaged)
        try:
            list(streaming_dataset_reader(sys.argv[2]))
            outcomes["read"] = outcomes.get("read", 0) + 1
        except ValueError as error:
            assert sys.argv[2] in str(error), error
            outcomes["error"] = outcomes.get("error", 0) + 1
print(outcomes["read"] > 0 and outcomes["error"] > 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(path), str(tmp_path / ("damaged" + suffix))],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_pyarrow_is_not_needed_until_the_reader_is():
    program = """
import sys
sys.modules["pyarrow"] = None
import tokenpack.data
try:
    import tokenpack.data.reader
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "pip install 'tokenpack[data]'" in done.stdout
