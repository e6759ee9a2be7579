"""Files that were once misread, refused or slow to read, one test for each kind."""

import subprocess
import sys

import pytest

pa = pytest.importorskip("pyarrow")

import pyarrow.parquet  # noqa: E402

from tokenpack.data.reader import streaming_dataset_reader  # noqa: E402
from tokenpack.data.readers import blocks  # noqa: E402
from tokenpack.data.readers import csv as csv_reader  # noqa: E402


def columns(path, *args, **options):
    """The columns of all rows."""
    whole = {}
    for batch in streaming_dataset_reader(path, *args, **options):
        for name, values in batch.items():
            whole.setdefault(name, []).extend(values)
    return whole


# ---------------------------------------------------------------------------------- what a row is


@pytest.mark.parametrize(
    "text, a",
    [
        ("a,b\r1,2\r3,4\n5,6\n", [1, 3, 5]),
        ("a,b\n1,2\r3,4\n5,6\n", [1, 3, 5]),
        ("a,b\r1,2\r3,4\r", [1, 3]),
        ("\ra,b\r\r1,2", [1]),
        ('a,b\r"1\r2",3\r4,5\n', ["1\r2", "4"]),
    ],
)
def test_cr_ends_a_row_of_csv(write, text, a):
    path = write("a.csv", text)
    assert columns(path)["a"] == a
    assert columns(path, skip_rows=len(a) - 1)["a"] == a[-1:]


def test_cr_ends_a_line_of_text(write):
    assert columns(write("a.txt", "a\rb\r\nc\n\rd"))["text"] == ["a", "b", "c", "", "d"]


@pytest.mark.parametrize("blank", ["\x0c", "\x0b", "\u2028", "\x85", "\u00a0"])
@pytest.mark.parametrize("name", ["a.csv", "a.txt"])
def test_white_space_is_a_row_where_reading_resumes(write, monkeypatch, name, blank):
    monkeypatch.setattr(blocks, "_LINE_BLOCK_BYTES", 4)
    monkeypatch.setattr(csv_reader, "_CSV_BLOCK_BYTES", 4)
    path = write(name, f"text\nfirst\n{blank}\nlast\n")
    rows = columns(path)["text"]
    assert rows[-2:] == [blank, "last"]
    for skip in range(len(rows)):
        assert columns(path, skip_rows=skip)["text"] == rows[skip:]


def test_white_space_that_json_does_not_know_is_no_blank_line(write):
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not JSON"):
        columns(write("a.jsonl", '{"a": 1}\n\x0c\n{"a": 2}\n'), skip_rows=1)


def test_objects_that_are_not_one_per_line(write):
    with pytest.raises(ValueError, match="line 1: not JSON"):
        columns(write("a.jsonl", '{"a": 1} {"a": 2}\n{"a":\n3}\n'))


# ----------------------------------------------------------------------------- valid files refused


@pytest.mark.parametrize(
    "text, rows",
    [
        ('{"a": [null, 1]}\n{"a": [5, 6]}\n', {"a": [[None, 1], [5, 6]]}),
        ('{"a": [null, null]}\n{"a": [1]}\n', {"a": [[None, None], [1]]}),
        ('{"m": {"a": [null, 1]}}\n', {"m": [{"a": [None, 1]}]}),
    ],
)
def test_lists_that_begin_with_null(write, text, rows):
    assert columns(write("a.jsonl", text)) == rows


def test_lists_that_are_null_in_the_first_block(write, monkeypatch):
    monkeypatch.setattr(blocks, "_LINE_BLOCK_BYTES", 16)
    text = '{"a": [null]}\n' * 4 + '{"a": [7]}\n{"a": null}\n'
    assert columns(write("a.jsonl", text)) == {"a": [[None]] * 4 + [[7], None]}


def test_lists_of_null_in_objects_whose_keys_are_not_all_known(write, monkeypatch):
    monkeypatch.setattr(blocks, "_LINE_BLOCK_BYTES", 4)
    path = write("a.jsonl", '{"a": [{}]}\n{"a": [{"z": [null, null]}]}\n')
    assert columns(path) == {"a": [[{"z": None}], [{"z": [None, None]}]]}


def test_zstd_with_a_leading_skippable_frame(write):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(b"one\n")
    skippable = b"\x50\x2a\x4d\x18\x03\0\0\0abc"
    path = write("a.txt.zst", skippable + sink.getvalue().to_pybytes())
    assert columns(path) == {"text": ["one"]}


# ------------------------------------------------------------------------------------------ numbers


def test_csv_does_not_round_integers_among_decimals(write):
    large = "9007199254740993"
    assert columns(write("a.csv", f"a\n{large}\n0.5\n")) == {"a": [large, "0.5"]}
    assert columns(write("b.csv", f"a\n{large}\n")) == {"a": [int(large)]}
    assert columns(write("c.csv", "a\n1e400\n")) == {"a": ["1e400"]}


def test_csv_refuses_a_large_integer_in_a_column_of_decimals(write, monkeypatch):
    monkeypatch.setattr(csv_reader, "_CSV_BLOCK_BYTES", 8)
    with pytest.raises(ValueError, match=r"line 4: column 'a' is '9007199254740993', .* double"):
        columns(write("a.csv", "a\n0.5\n1.5\n9007199254740993\n"))


def test_a_wrong_cell_of_csv_is_found_in_few_casts(write, monkeypatch):
    casts = []

    def counted(text, type, cast=csv_reader._cast):
        casts.append(len(text))
        return cast(text, type)

    monkeypatch.setattr(csv_reader, "_cast", counted)
    monkeypatch.setattr(csv_reader, "_CSV_BLOCK_BYTES", 60_000)
    with pytest.raises(ValueError, match=r"line 50001: column 'a' is 'x', .* int64"):
        columns(write("a.csv", "a\n" + "1\n" * 49_999 + "x\n"))
    assert len(casts) < 100


# ------------------------------------------------------------------- errors that name file and line


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"a": "\\ud83d"}', "surrogate"),
        ('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested"),
        ('{"a": ' + "9" * 5000 + "}", "too many digits"),
        ("null", "must be a JSON object"),
    ],
)
def test_json_that_cannot_be_read(write, line, message):
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: .*{message}"):
        columns(write("a.jsonl", f'{{"b": 1}}\n{line}\n'))


def test_brackets_in_strings_do_not_hide_a_depth_that_would_crash(write):
    path = write(
        "a.jsonl", '{"s": "' + "]" * 200_000 + '", "a": ' + "[" * 150_000 + "]" * 150_000 + "}"
    )
    code = (
        "import sys; from tokenpack.data.reader import streaming_dataset_reader as read\n"
        "try: list(read(sys.argv[1]))\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 0  # not SIGSEGV
    assert "a.jsonl, line 1: JSON nested too deep" in done.stdout


def test_the_fields_of_objects_keep_their_order(write):
    names = [f"name{number}" for number in range(8)]
    objects = ", ".join(f'{{"{name}": "2020-01-01"}}' for name in names)
    (table,) = streaming_dataset_reader(write("a.jsonl", f'{{"m": [{objects}]}}\n'), output="arrow")
    kind = table.schema.field("m").type.value_type
    assert [kind.field(index).name for index in range(kind.num_fields)] == names


@pytest.mark.parametrize("value", [2**60, -(2**60)])
def test_a_time_that_python_cannot_hold(tmp_path, value):
    table = pa.table({"a": pa.array([value], pa.timestamp("us")), "b": [1]})
    path = tmp_path / "a.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(table, path)
    with pytest.raises(ValueError, match=r"a\.parquet.*: column 'a' has a date .*output='arrow'"):
        columns(path)
    (read,) = streaming_dataset_reader(path, output="arrow")
    assert read.equals(table)


def test_rows_that_pyarrow_loses_are_an_error(tmp_path):
    """pyarrow 26 writes this file whole and reads none of its rows."""
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pa.table({"a": pa.array([[]], pa.list_(pa.bool_()))}),
        *(path, 1),
        data_page_version="2.0",
        data_page_size=8,
        write_batch_size=2,
    )
    if pyarrow.parquet.read_table(path).num_rows:
        assert columns(path) == {"a": [[]]}
    else:
        with pytest.raises(ValueError, match="row group 0 must have 1 rows, pyarrow reads 0"):
            columns(path)


BIG = 2**53 + 1
TYPES_THAT_LOSE_VALUES = {
    "an integer and a float": (pa.array([BIG]), pa.array([0.5])),
    "in a list": (pa.array([[BIG]]), pa.array([[0.5]])),
    "in an object in a list": (pa.array([[{"x": BIG}]]), pa.array([[{"y": 1, "x": 0.5}]])),
    "in a map": (
        pa.array([[("k", BIG)]], pa.map_(pa.string(), pa.int64())),
        pa.array([[("k", 0.5)]], pa.map_(pa.string(), pa.float64())),
    ),
    "unsigned": (pa.array([2**63], pa.uint64()), pa.array([1])),
    "a late time": (pa.array([10**13], pa.timestamp("ms")), pa.array([1], pa.timestamp("ns"))),
    "a duration": (pa.array([10**12], pa.duration("s")), pa.array([1], pa.duration("ns"))),
}


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("case", TYPES_THAT_LOSE_VALUES)
def test_whether_a_type_can_hold_the_rows_before_does_not_depend_on_batches(
    tmp_path, case, batch_size
):
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path, column in zip(paths, TYPES_THAT_LOSE_VALUES[case]):
        pyarrow.parquet.write_table(pa.table({"n": column, "m": [1]}), path)
    with pytest.raises(
        ValueError, match=r"b\.parquet: the types of column 'n' differ: .*(not in range|out of)"
    ):
        columns(paths, batch_size)
    with pytest.raises(
        ValueError, match=r"a\.parquet: the types of column 'n' differ: .*(not in range|out of)"
    ):
        columns(paths[::-1], batch_size)
    assert columns(paths, batch_size, columns=["m"]) == {"m": [1, 1]}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 9])
@pytest.mark.parametrize(
    "name, content",
    [
        ("a.csv", f"n\n0\n0\n0\n{BIG}\n0.0\n"),
        ("a.jsonl", '{"n": 0}\n' * 4 + f'{{"n": {BIG}}}\n{{"n": 0.0}}'),
    ],
)
def test_an_integer_past_2_53_before_a_float(write, monkeypatch, name, content, batch_size):
    monkeypatch.setattr(csv_reader, "_CSV_BLOCK_BYTES", 4)
    monkeypatch.setattr(blocks, "_LINE_BLOCK_BYTES", 4)
    path = write(name, content)
    for skip_rows in range(4):
        with pytest.raises(ValueError, match=rf"{name}, line 6: the types of column 'n' differ"):
            columns(path, batch_size, skip_rows=skip_rows)
