"""Read a dataset's files batch by batch, with little more than one batch in memory.

    parquet  .parquet .pq              one row group at a time, only the requested columns
    arrow    .arrow .feather .ipc      IPC files and IPC streams, both as ``datasets`` writes them;
                                       memory-mapped, one record batch at a time
    jsonl    .jsonl .ndjson .json      one JSON object per line
    csv      .csv                      a header, then rows; quoted cells may hold line breaks
    tsv      .tsv                      the same with tabs
    text     .txt                      one row per line

The last four may be compressed, as .gz, .bz2, .xz or .zst. The modules of `tokenpack.data.readers`
read one kind of format each and yield tables; this module checks the arguments and cuts batches.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

try:
    import pyarrow as pa
except ImportError as error:
    raise ImportError(
        "streaming_dataset_reader needs pyarrow: pip install 'tokenpack[data]'"
    ) from error

from .readers.arrow import read_arrow, read_parquet
from .readers.csv import read_csv
from .readers.files import SUFFIXES, DataFile, check_content, one_line, resolve_files
from .readers.lines import read_jsonl, read_text
from .readers.schema import Reading, join

_OUTPUTS = ("python", "arrow")
_READERS: dict[str, Callable[[DataFile, Reading], Iterator[pa.Table]]] = {
    "parquet": read_parquet,
    "arrow": read_arrow,
    "jsonl": read_jsonl,
    "csv": read_csv,
    "tsv": read_csv,
    "text": read_text,
}


def streaming_dataset_reader(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    batch_size: int = 1000,
    columns: Sequence[str] | None = None,
    *,
    format: str | None = None,
    output: str = "python",
    drop_last: bool = False,
    skip_rows: int = 0,
    text_column: str = "text",
) -> Iterator[Any]:
    """Yield the rows of one or more files as batches of columns.

    The call checks the arguments. The first ``next`` opens the first file; files are read one after
    the other, and a batch may span files. Memory holds one batch and one row group (only the
    requested columns), record batch or block (1 MiB of lines, 4 MiB of CSV; longer if a single line
    is longer; a CSV row may have up to 64 MiB).

    Args:
        path: a file, a folder, a glob (``**`` includes subfolders) or a list of files. A folder
            stands for the files directly in it that have a known suffix. Folders and globs are read
            in sorted order, a list in the given order.
        batch_size: rows per batch, at least 1. The last batch may have fewer.
        columns: the columns to read, in this order; None reads all.
        format: ``"parquet"``, ``"arrow"``, ``"jsonl"``, ``"csv"``, ``"tsv"`` or ``"text"``, for
            files whose suffix does not say it. In a folder it selects the files of that format.
        output: ``"python"`` yields a dict from column name to list, ``"arrow"`` a
            ``pyarrow.Table`` of one or more chunks.
        drop_last: drop a last batch that is not full.
        skip_rows: rows to skip at the start, to resume. Row groups within the skipped rows are not
            read, and lines are not parsed. If the columns or number types of a textual file change
            along the way, the resumed rows have only the columns that appear from there on; pass
            ``columns`` to get all.
        text_column: the column for lines of text. Every line is a row, empty lines included;
            ``\\n``, ``\\r\\n`` or ``\\r`` at its end is removed.

    Returns:
        An iterator. Missing values are None: a key that a JSON line does not have (batches before
        the first line with that key lack the column, unless ``columns`` names it), and an empty
        cell of CSV. A CSV column holds integers, floats or booleans if all cells of its first block
        do, and text otherwise; an integer past 2^53 is never read as a float. JSON strings stay
        text, even if they look like dates. Blank lines are skipped: in CSV, lines of no character;
        in JSON, lines of spaces and tabs. CSV rows end with ``\\n``, ``\\r\\n`` or ``\\r``.

    Raises:
        TypeError, ValueError: at the call, naming the argument.
        FileNotFoundError: at the call, if a file is missing, or if nothing matches a glob or
            folder.
        ValueError: at the call, for an empty file. While reading, naming the file and the line (for
            textual formats): for a file that is truncated, damaged, of another format or not UTF-8;
            for a line that is not a JSON object; for a row with too few or too many cells; for a
            missing column; for columns or types that do not agree with earlier rows; and if the
            files have no rows, or fewer than ``skip_rows``.
    """
    batch_size = _checked_integer("batch_size", batch_size, least=1)
    skip_rows = _checked_integer("skip_rows", skip_rows, least=0)
    _check_choice("output", output, _OUTPUTS)
    if format is not None:
        _check_choice("format", format, sorted(set(SUFFIXES.values())))
    if not isinstance(text_column, str) or not text_column:
        raise TypeError(f"text_column must be a column name, got {text_column!r}")
    names = _checked_columns(columns)
    reading = Reading(resolve_files(path, format), names, text_column, skip_rows)
    return _batches(reading, batch_size, drop_last, output)


def _checked_integer(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if operator.index(value) < least:
        raise ValueError(f"{name} must be {least} or more, got {value}")
    return operator.index(value)


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _checked_columns(columns: Sequence[str] | None) -> list[str] | None:
    if columns is None:
        return None
    names = list(columns) if isinstance(columns, Iterable) else None
    if isinstance(columns, str) or not names or not all(isinstance(one, str) for one in names):
        raise TypeError(f"columns must be a list of column names, got {columns!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"columns must name each column once, got {names}")
    return names


def _batches(
    reading: Reading, batch_size: int, drop_last: bool, output: str
) -> Iterator[dict[str, list[Any]] | pa.Table]:
    for table in _regroup(reading, batch_size, drop_last):
        yield table if output == "arrow" else _as_lists(table, reading)


def _as_lists(table: pa.Table, reading: Reading) -> dict[str, list[Any]]:
    """The columns as lists of Python objects, which hold fewer times than Arrow does."""
    lists = {}
    for name, column in zip(table.column_names, table.columns):
        try:
            lists[name] = column.to_pylist()
        except OverflowError as error:
            raise ValueError(
                f"{reading.where}: column {name!r} has a date or a duration that Python's datetime "
                "cannot hold, which ends with the year 9999: pass output='arrow', or correct it"
            ) from error
    return lists


def _regroup(reading: Reading, size: int, drop_last: bool) -> Iterator[pa.Table]:
    """The rows in tables of ``size`` rows."""
    pending: list[pa.Table] = []
    rows = 0
    for table in _tables(reading):
        pending.append(table)
        rows += table.num_rows
        if rows < size:
            continue
        whole = _joined(pending, reading.where)
        for start in range(0, rows - size + 1, size):
            yield whole.slice(start, size)
        rows %= size
        pending = [whole.slice(whole.num_rows - rows)] if rows else []
        del whole, table  # so that no batch stays alive here after the caller has released it
    if rows and not drop_last:
        yield _joined(pending, reading.where)


def _joined(tables: list[pa.Table], where: str) -> pa.Table:
    return tables[0] if len(tables) == 1 else join(tables, where)


def _tables(reading: Reading) -> Iterator[pa.Table]:
    """The rows of all files after the skipped ones, in tables of any size."""
    skip_rows = reading.to_skip
    for file in reading.files:
        try:
            check_content(file)
            for table in _READERS[file.format](file, reading):
                kept = reading.trim(table)
                if kept.num_rows:
                    yield kept
        except (pa.ArrowException, OSError, UnicodeError) as error:
            if isinstance(error, OSError) and error.errno:  # from the system; it names the file
                raise
            raise ValueError(
                f"{file.path}: truncated, damaged or not {file.format}: {one_line(error)}"
            ) from error
    if not reading.rows:
        files = ", ".join(file.path for file in reading.files)
        raise ValueError(f"path must contain rows, got no rows in {files}")
    if reading.to_skip:
        raise ValueError(
            f"skip_rows must be at most {reading.rows}, the rows of all files, got {skip_rows}"
        )
