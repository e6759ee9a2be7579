"""Read a dataset's files batch by batch, holding no more than a batch and what a file is read in.

    parquet  .parquet .pq              a row group at a time, the columns asked for alone
    arrow    .arrow .feather .ipc      IPC files and IPC streams, as ``datasets`` writes both;
                                       memory-mapped, a record batch at a time
    jsonl    .jsonl .ndjson .json      one JSON object per line
    csv      .csv                      a header, then rows; quoted cells may hold line breaks
    tsv      .tsv                      the same with tabs
    text     .txt                      one row per line

The last four also as .gz and .zst. A textual format has no schema to go by, and a later row may
show that an earlier guess at a type was too narrow. So the schema grows while reading: null becomes
any type, an integer a float, an object gets more keys. What no type can hold, text after numbers
say, is an error that names the line.

pyarrow parses JSON and CSV, but in blocks that are cut here, at the end of a line or row: then a
line that it refuses can be found, and where a file breaks off is seen. JSON that it refuses, or
reads as something else than is written (dates, large integers), is read a second time, that block
alone, by ``json``: slowly, line by line and exactly.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv
    import pyarrow.ipc
    import pyarrow.json
    import pyarrow.parquet
except ImportError as error:
    raise ImportError(
        "streaming_dataset_reader needs pyarrow: pip install 'tokenpack[data]'"
    ) from error

_LINE_BLOCK_BYTES = 1 << 20
_CSV_BLOCK_BYTES = 1 << 22  # more than of lines: types are guessed from the first
_LONGEST_CSV_ROW_BYTES = 1 << 26  # else a quote never closed would take in the whole file
_PARQUET_BUFFER_BYTES = 1 << 20
_PARQUET_BATCH_ROWS = 4096

_SUFFIXES = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_DELIMITERS = {"csv": ",", "tsv": "\t"}
_BINARY = {"parquet", "arrow"}
_OUTPUTS = ("python", "arrow")

# What datasets.save_to_disk and the Hub put beside the data.
_METADATA_NAMES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}

_MAGIC = {
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\xff\xff\xff\xff": "arrow",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_END_OF_ARROW_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


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

    Arguments are checked here; files are opened by the first ``next``, one after the other. Batches
    run across files. In memory are a batch and one row group (of the columns asked for), record
    batch or block (1 MiB of lines, 4 MiB of CSV; a longer line whole, a row of CSV up to 64 MiB).

    Args:
        path: a file, a folder, a glob (``**`` goes through subfolders) or a list of files. A folder
            gives the files directly in it whose suffix is known. Folders and globs are read in
            sorted order, a list in its own.
        batch_size: rows of every batch but the last, 1 or more.
        columns: which to read, in this order; ``None`` reads all.
        format: ``"parquet"``, ``"arrow"``, ``"jsonl"``, ``"csv"``, ``"tsv"`` or ``"text"``, for
            files whose suffix does not say it. Of a folder it picks the files whose suffix does.
        output: ``"python"`` yields a dict from column to list, ``"arrow"`` a ``pyarrow.Table`` of
            one or more chunks.
        drop_last: leave out a last batch that is not full.
        skip_rows: rows to leave out at the start, to resume. Row groups that end before are never
            read, lines never parsed. Where a textual file's columns or number types change along
            the way, rows are as an uninterrupted run has them only in the columns that it shows
            from there on: name them with ``columns``.
        text_column: the column that lines of text go into. Every line is a row, empty ones too;
            ``\\n`` or ``\\r\\n`` at its end is removed.

    Returns:
        An iterator. What a row does not have is ``None``: a key absent from a JSON line (batches
        before the first line with that key lack the column, unless ``columns`` names it), an empty
        cell of CSV. CSV cells are integers, floats or booleans where all of a column's first block
        are, else text. JSON strings stay text also where they look like dates. Blank lines of JSON
        and CSV are passed over.

    Raises:
        TypeError, ValueError: at the call, naming the argument.
        FileNotFoundError: at the call, if a file is missing or a glob or folder has none.
        ValueError: at the call, for an empty file. While reading, naming the file, and the line
            where it has lines: for a file that is truncated, damaged, of another format or not
            UTF-8, for a line that is no JSON object, a row with too few or too many cells, a column
            that is not there, columns or types that do not agree with the rows before, and where
            all files together have no row, or fewer than ``skip_rows``.
    """
    batch_size = _checked_integer("batch_size", batch_size, least=1)
    skip_rows = _checked_integer("skip_rows", skip_rows, least=0)
    _check_choice("output", output, _OUTPUTS)
    if format is not None:
        _check_choice("format", format, sorted(set(_SUFFIXES.values())))
    if not isinstance(text_column, str) or not text_column:
        raise TypeError(f"text_column: got {text_column!r}, takes a name")
    names = _checked_columns(columns)
    files = _resolve(path, format)
    reading = _Reading(files, names, text_column, skip_rows)
    return _batches(reading, batch_size, drop_last, output)


# ------------------------------------------------------------------------------------- arguments


def _checked_integer(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: got {value!r}, takes an integer")
    if operator.index(value) < least:
        raise ValueError(f"{name}: got {value}, takes {least} or more")
    return operator.index(value)


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, takes one of {', '.join(choices)}")


def _checked_columns(columns: Sequence[str] | None) -> list[str] | None:
    if columns is None:
        return None
    names = list(columns) if isinstance(columns, Iterable) else None
    if isinstance(columns, str) or not names or not all(isinstance(one, str) for one in names):
        raise TypeError(f"columns: got {columns!r}, takes a list of names")
    if len(set(names)) < len(names):
        raise ValueError(f"columns: got {names}, takes each name once")
    return names


@dataclass(frozen=True)
class _File:
    path: str
    format: str
    compression: str | None

    def at(self, line: int) -> str:
        return f"{self.path}, line {line}"


def _resolve(path: Any, format: str | None) -> list[_File]:
    if isinstance(path, (str, os.PathLike)):
        paths = _expand(os.fspath(path), format)
    elif isinstance(path, Sequence) and not isinstance(path, (bytes, bytearray)):
        if not all(isinstance(one, (str, os.PathLike)) for one in path):
            raise TypeError(f"path: got {path!r}, takes a path or a list of paths")
        paths = [os.fspath(one) for one in path]
    else:
        raise TypeError(f"path: got {path!r}, takes a path or a list of paths")
    if not paths:
        raise ValueError("path: got an empty list, takes one file or more")
    files = [_describe(one, format) for one in paths]
    formats = {file.format for file in files}
    if len(formats) > 1:
        raise ValueError(
            f"path: {path} mixes the formats {', '.join(sorted(formats))}; "
            f"name the files, or one format with format="
        )
    return files


def _expand(path: str, format: str | None) -> list[str]:
    if os.path.isdir(path):
        return _files_in_folder(path, format)
    if glob.has_magic(path) and not os.path.exists(path):
        found = sorted(one for one in glob.glob(path, recursive=True) if os.path.isfile(one))
        if not found:
            raise FileNotFoundError(f"path: no file matches {path}")
        return found
    return [path]


def _files_in_folder(folder: str, format: str | None) -> list[str]:
    """Files whose suffix is known, or says ``format``."""
    found = []
    for entry in sorted(Path(folder).iterdir()):
        hidden = entry.name.startswith((".", "_")) or entry.name in _METADATA_NAMES
        suffix_says = _by_suffix(entry.name)[0]
        if hidden or not entry.is_file() or suffix_says is None:
            continue
        if format in (None, suffix_says):
            found.append(str(entry))
    if not found:
        known = " ".join(s for s, f in _SUFFIXES.items() if format in (None, f))
        raise FileNotFoundError(f"path: the folder {folder} has no file that ends in {known}")
    return found


def _by_suffix(name: str) -> tuple[str | None, str | None]:
    """``(format, compression)`` that a file's name says, each ``None`` where it does not."""
    stem, suffix = os.path.splitext(name.lower())
    compression = _COMPRESSIONS.get(suffix)
    if compression is not None:
        suffix = os.path.splitext(stem)[1]
    return _SUFFIXES.get(suffix), compression


def _describe(path: str, format: str | None) -> _File:
    if not os.path.exists(path):
        raise FileNotFoundError(f"path: there is no file {path}")
    if not os.path.isfile(path):
        raise ValueError(f"path: {path} is no file")
    if os.path.getsize(path) == 0:
        raise ValueError(f"path: {path} is empty")
    suffix_says, compression = _by_suffix(path)
    if format is None and suffix_says is None:
        raise ValueError(
            f"path: the name of {path} does not say its format; it takes one of "
            f"{' '.join(_SUFFIXES)}, or format="
        )
    chosen = format or suffix_says or ""
    if chosen in _BINARY and compression:
        raise ValueError(f"path: {path}: {chosen} is not read through {compression}")
    return _File(path, chosen, compression)


# --------------------------------------------------------------------------------------- batches


@dataclass
class _Reading:
    """What is asked for, and how far the reading has come.

    Attributes:
        files: all of them, of one format.
        columns: to read, ``None`` for all.
        text_column: where lines of text go.
        to_skip: rows still to leave out.
        schema: of the rows so far; it only ever grows.
        rows: how many rows there were, with those left out.
        confirmed: whether each of ``columns`` is known to be in a file that does not declare them.
    """

    files: list[_File]
    columns: list[str] | None
    text_column: str
    to_skip: int
    schema: pa.Schema = field(default_factory=lambda: pa.schema([]))
    rows: int = 0
    confirmed: bool = False

    def __post_init__(self) -> None:
        # Columns that no row has shown yet, in the order asked for.
        self.schema = pa.schema([(name, pa.null()) for name in self.columns or ()])

    def passes_over(self, rows: int) -> bool:
        """Whether the next ``rows`` rows all lie before the first that is wanted."""
        if rows > self.to_skip:
            return False
        self.to_skip -= rows
        self.rows += rows
        return True

    def trim(self, table: pa.Table) -> pa.Table:
        """Count the rows of ``table`` and cut those off that are not wanted."""
        cut = min(self.to_skip, table.num_rows)
        self.to_skip -= cut
        self.rows += table.num_rows
        return table.slice(cut)

    def declare(self, file: _File, names: list[str]) -> None:
        """Check the columns of a file that says which it has."""
        if not names:
            raise ValueError(f"{file.path}: has no columns")
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"{file.path}: has more than one column {', '.join(repeated)}")
        missing = [name for name in self.columns or () if name not in names]
        if missing:
            _raise_missing(missing, names, file.path)
        before = self.schema.names
        if self.columns is None and before and set(names) != set(before):
            raise ValueError(
                f"{file.path}: has the columns {', '.join(names)}; "
                f"the files before have {', '.join(before)}"
            )

    def takes(self, schema: pa.Schema) -> bool:
        """Whether some schema holds the types of the rows so far and those of ``schema``."""
        try:
            _unify([self.schema, schema])
        except pa.ArrowException:
            return False
        return True

    def widen(self, schema: pa.Schema, where: str) -> None:
        """Let the schema hold the types of ``schema`` too."""
        try:
            self.schema = _unify([self.schema, schema])
        except pa.ArrowException:
            _raise_conflict(self.schema, schema, where)

    def fit(self, table: pa.Table, where: str) -> pa.Table:
        """Bring ``table`` into the schema, which grows where it must."""
        table = table.replace_schema_metadata(None)
        if table.schema.equals(self.schema):
            return table
        self.widen(table.schema, where)
        return pa.concat_tables(
            [self.schema.empty_table(), table], promote_options="permissive"
        ).combine_chunks()


def _unify(schemas: Sequence[pa.Schema]) -> pa.Schema:
    return pa.unify_schemas(schemas, promote_options="permissive")


def _raise_missing(missing: Sequence[str], present: Sequence[str], where: str) -> NoReturn:
    raise ValueError(
        f"columns: {where} has no column {', '.join(missing)}; it has {', '.join(present)}"
    )


def _raise_conflict(before: pa.Schema, schema: pa.Schema, where: str) -> NoReturn:
    for new in schema:
        index = before.get_field_index(new.name)
        try:
            if index >= 0:
                _unify([pa.schema([before.field(index)]), pa.schema([new])])
        except pa.ArrowException:
            raise ValueError(
                f"{where}: column '{new.name}' is {new.type}, "
                f"in the rows before it is {before.field(index).type}"
            ) from None
    raise ValueError(f"{where}: its columns do not agree with the rows before")


def _batches(
    reading: _Reading, batch_size: int, drop_last: bool, output: str
) -> Iterator[dict[str, list[Any]] | pa.Table]:
    for table in _regroup(_tables(reading), batch_size, drop_last):
        yield table if output == "arrow" else table.to_pydict()


def _regroup(tables: Iterator[pa.Table], size: int, drop_last: bool) -> Iterator[pa.Table]:
    pending: list[pa.Table] = []
    rows = 0
    for table in tables:
        pending.append(table)
        rows += table.num_rows
        if rows < size:
            continue
        whole = _joined(pending)
        for start in range(0, rows - size + 1, size):
            yield whole.slice(start, size)
        rows %= size
        pending = [whole.slice(whole.num_rows - rows)] if rows else []
        del whole, table  # a caller that holds no batch should leave none alive here
    if rows and not drop_last:
        yield _joined(pending)


def _joined(tables: list[pa.Table]) -> pa.Table:
    if len(tables) == 1:
        return tables[0]
    return pa.concat_tables(tables, promote_options="permissive")


def _tables(reading: _Reading) -> Iterator[pa.Table]:
    """The wanted rows of all files, in tables as large as they come."""
    asked = reading.to_skip
    for file in reading.files:
        try:
            _check_content(file)
            for table in _READERS[file.format](file, reading):
                kept = reading.trim(table)
                if kept.num_rows:
                    yield kept
        except (pa.ArrowException, OSError, UnicodeError) as error:
            if isinstance(error, OSError) and error.errno:  # the system's, which names the file
                raise
            raise ValueError(
                f"{file.path}: truncated, damaged or no {file.format}: {error}"
            ) from error
    if not reading.rows:
        raise ValueError(f"path: {', '.join(file.path for file in reading.files)}: no rows")
    if reading.to_skip:
        raise ValueError(f"skip_rows: got {asked}, the files have {reading.rows} rows")


def _check_content(file: _File) -> None:
    """Refuse a file whose first bytes belong to another format than is to be read."""
    with open(file.path, "rb") as raw:
        head = raw.read(8)
    found = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
    expected = file.compression or (file.format if file.format in _BINARY else None)
    if found != expected:
        raise ValueError(
            f"{file.path}: to be read as {expected or file.format}, "
            f"but by its first bytes it is {found or 'not that'}"
        )
    if file.format not in _BINARY:
        _check_textual_content(file)


def _check_textual_content(file: _File) -> None:
    with _open(file) as stream:
        head = stream.read(4096).removeprefix(_BYTE_ORDER_MARK)
    if b"\0" in head:
        raise ValueError(f"{file.at(head[: head.index(0)].count(10) + 1)}: a NUL byte, not text")
    if file.format in _DELIMITERS and head.lstrip().startswith(b'{"'):
        raise ValueError(f"{file.at(1)}: to be read as {file.format}, but it is JSON")
    # A JSON array may be one line as long as the file: refused here, before it is read.
    start = head.lstrip()
    if file.format == "jsonl" and start and not start.startswith(b"{"):
        line = head[: -len(start)].count(b"\n") + 1
        shown = start.split(b"\n")[0][:40].decode(errors="replace")
        raise ValueError(f"{file.at(line)}: takes a JSON object, got {shown}")


# ------------------------------------------------------------------------- parquet and Arrow IPC


def _read_parquet(file: _File, reading: _Reading) -> Iterator[pa.Table]:
    # Some writers make one row group of a file. Read through a buffer, and not fetched ahead, it
    # need not be in memory as a whole.
    with pa.parquet.ParquetFile(
        file.path, pre_buffer=False, buffer_size=_PARQUET_BUFFER_BYTES
    ) as source:
        reading.declare(file, source.schema_arrow.names)
        reading.fit(_selected(source.schema_arrow.empty_table(), reading), file.path)
        for group in range(source.num_row_groups):
            if reading.passes_over(source.metadata.row_group(group).num_rows):
                continue
            for batch in source.iter_batches(
                _PARQUET_BATCH_ROWS, row_groups=[group], columns=reading.columns
            ):
                yield reading.fit(_checked_table(batch, reading), file.path)


def _read_arrow(file: _File, reading: _Reading) -> Iterator[pa.Table]:
    with pa.memory_map(file.path) as source:
        is_stream = not source.read(6).startswith(b"ARROW1")
        if is_stream:
            _check_end_of_stream(source, file)
        names = _open_ipc(source, is_stream, None).schema.names
        reading.declare(file, names)
        wanted = None if reading.columns is None else [names.index(n) for n in reading.columns]
        reader = _open_ipc(source, is_stream, wanted)
        reading.fit(_selected(reader.schema.empty_table(), reading), file.path)
        for batch in (
            reader if is_stream else map(reader.get_batch, range(reader.num_record_batches))
        ):
            # Mapped: to pass over a batch touches little more than its description.
            if not reading.passes_over(batch.num_rows):
                yield reading.fit(_checked_table(batch, reading), file.path)


def _check_end_of_stream(source: pa.MemoryMappedFile, file: _File) -> None:
    """Refuse a stream without its end mark: a reader takes one cut between batches for whole."""
    source.seek(max(source.size() - len(_END_OF_ARROW_STREAM), 0))
    if source.read() != _END_OF_ARROW_STREAM:
        raise ValueError(f"{file.path}: truncated: an Arrow stream without its end mark")


def _open_ipc(source: pa.MemoryMappedFile, is_stream: bool, fields: list[int] | None) -> Any:
    source.seek(0)
    options = pa.ipc.IpcReadOptions(**({} if fields is None else {"included_fields": fields}))
    opener = pa.ipc.open_stream if is_stream else pa.ipc.open_file
    return opener(source, options=options)


def _checked_table(batch: pa.RecordBatch, reading: _Reading) -> pa.Table:
    # A damaged file may hold offsets that point anywhere, and converting them would read there.
    batch.validate(full=True)
    return _selected(pa.Table.from_batches([batch]), reading)


def _selected(table: pa.Table, reading: _Reading) -> pa.Table:
    return table if reading.columns is None else table.select(reading.columns)


# ----------------------------------------------------------------------------------------- lines

# pyarrow's JSON parser runs out of stack, and takes the process with it, some thousand levels deep.
_DEEPEST = 100
_NO_MARK = bytes(set(range(256)) - set(b"[]{}\n"))
_STEP = np.zeros(256, np.int64)
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1


@dataclass(frozen=True)
class _Block:
    """Whole lines, each ended by a line feed, and the number of the first."""

    content: bytes
    first_line: int

    def lines(self) -> Iterator[tuple[int, bytes]]:
        return enumerate(self.content.split(b"\n")[:-1], start=self.first_line)

    def filled_lines(self) -> int:
        """How many lines are not blank."""
        is_end = np.frombuffer(self.content.translate(None, b" \t\r"), np.uint8) == ord("\n")
        return int(np.count_nonzero(is_end[1:] & ~is_end[:-1]))

    def depth(self) -> int:
        """How many brackets and braces are open at once within a line, at most."""
        marks = np.frombuffer(self.content.translate(None, _NO_MARK), np.uint8)
        height = np.cumsum(_STEP[marks])
        starts = np.flatnonzero(marks == ord("\n"))[:-1]
        starts = np.concatenate([np.zeros(1, np.intp), starts])
        return int((np.maximum.reduceat(height, starts) - height[starts]).max()) + 1


def _open(file: _File) -> BinaryIO:
    if file.compression is None:
        return open(file.path, "rb")
    return pa.CompressedInputStream(pa.OSFile(file.path), file.compression)


def _line_blocks(file: _File) -> Iterator[_Block]:
    """All lines in order, about a mebibyte at a time, found to be UTF-8."""
    with _open(file) as stream:
        next_line = 1
        unended: list[bytes] = []
        while chunk := stream.read(_LINE_BLOCK_BYTES):
            cut = chunk.rfind(b"\n") + 1
            if cut:
                block = _block([*unended, chunk[:cut]], next_line, file)
                yield block
                next_line += block.content.count(b"\n")
                unended = []
            unended.append(chunk[cut:])
        if any(unended):
            yield _block([*unended, b"\n"], next_line, file)


def _block(parts: list[bytes], first_line: int, file: _File) -> _Block:
    content = b"".join(parts)
    if first_line == 1:
        content = content.removeprefix(_BYTE_ORDER_MARK)
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise ValueError(
            f"{file.at(line)}: not UTF-8 (byte 0x{content[error.start]:02x})"
        ) from None
    return _Block(content, first_line)


def _read_text(file: _File, reading: _Reading) -> Iterator[pa.Table]:
    reading.declare(file, [reading.text_column])
    for block in _line_blocks(file):
        if reading.passes_over(block.content.count(b"\n")):
            continue
        text = pa.array([block.content.replace(b"\r\n", b"\n")[:-1]], pa.large_string())
        lines = pc.split_pattern(text, "\n").flatten().cast(pa.string())
        yield reading.fit(pa.table({reading.text_column: lines}), file.path)


# ----------------------------------------------------------------------------------------- jsonl


def _read_jsonl(file: _File, reading: _Reading) -> Iterator[pa.Table]:
    for block in _line_blocks(file):
        rows = block.filled_lines()
        if reading.passes_over(rows):
            continue
        table = _parse_fast(block, rows, reading)
        if table is None:
            table = _parse_exactly(block, file, reading)
        table = reading.fit(table, file.at(block.first_line))
        if not reading.confirmed:
            _confirm_columns(reading)
            reading.confirmed = True
        yield table


def _parse_fast(block: _Block, rows: int, reading: _Reading) -> pa.Table | None:
    """Parse with pyarrow; ``None`` where that fails, or would change what is written."""
    if block.depth() > _DEEPEST:
        return None
    known = [one for one in reading.schema if not _holds(one.type, pa.types.is_null)]
    # Keys not asked for need no parsing, but pyarrow would then drop keys within objects as well.
    complete = reading.columns is not None and len(known) == len(reading.columns)
    nested = any(_holds(one.type, pa.types.is_struct) for one in known)
    try:
        table = pa.json.read_json(
            pa.BufferReader(block.content),
            pa.json.ReadOptions(use_threads=False, block_size=len(block.content) + 1),
            pa.json.ParseOptions(
                explicit_schema=pa.schema(known),
                unexpected_field_behavior="ignore" if complete and not nested else "infer",
            ),
        )
    except pa.ArrowException:
        return None
    if reading.columns is not None:
        table = table.select([name for name in reading.columns if name in table.column_names])
    # pyarrow minds no line ends: two objects may lie on one line, or one on two.
    as_many = table.num_rows == rows and table.num_columns > 0
    return table if as_many and _is_as_written(table) and reading.takes(table.schema) else None


def _holds(type: pa.DataType, predicate: Callable[[pa.DataType], bool]) -> bool:
    inner = [type.field(index).type for index in range(type.num_fields)]
    return predicate(type) or any(_holds(one, predicate) for one in inner)


def _is_as_written(table: pa.Table) -> bool:
    """Whether no text became a date, and no integer a float that cannot tell it from the next."""
    if any(_holds(one.type, pa.types.is_temporal) for one in table.schema):
        return False
    leaves = (leaf for column in table.columns for part in column.chunks for leaf in _leaves(part))
    floats = (leaf for leaf in leaves if pa.types.is_floating(leaf.type))
    return not any(pc.any(pc.greater_equal(pc.abs(leaf), 2.0**53)).as_py() for leaf in floats)


def _leaves(array: pa.Array) -> Iterator[pa.Array]:
    if pa.types.is_list(array.type):
        yield from _leaves(array.flatten())
    elif pa.types.is_struct(array.type):
        for child in array.flatten():
            yield from _leaves(child)
    else:
        yield array


def _parse_exactly(block: _Block, file: _File, reading: _Reading) -> pa.Table:
    """Parse line by line, so that the first line that cannot be used is known."""
    records: list[tuple[int, dict[str, Any]]] = []
    seen: set[pa.Schema] = set()
    for number, line in block.lines():
        if not line.strip():
            continue
        record = _parse_line(line, file.at(number))
        if reading.columns is not None:
            record = {name: record[name] for name in reading.columns if name in record}
        schema = _schema_of(record, file.at(number))
        if schema not in seen:
            reading.widen(schema, file.at(number))
            seen.add(schema)
        records.append((number, record))
    if not reading.schema.names:
        raise ValueError(f"{file.at(block.first_line)}: takes JSON objects with keys, got none")
    try:
        return pa.Table.from_pylist([record for _, record in records], schema=reading.schema)
    except (pa.ArrowException, UnicodeError, OverflowError):
        _raise_first_unfit(records, file, reading.schema)


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError(f"{where}: JSON nested too deep") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: takes a JSON object, got a JSON {type(record).__name__}")
    return record


def _raise_first_unfit(
    records: list[tuple[int, dict[str, Any]]], file: _File, schema: pa.Schema
) -> NoReturn:
    """A lone surrogate in a string, or an integer too large for the float that its column is."""
    for number, record in records:
        try:
            pa.Table.from_pylist([record], schema=schema)
        except (pa.ArrowException, UnicodeError, OverflowError) as error:
            raise ValueError(f"{file.at(number)}: {error}") from None
    raise ValueError(f"{file.at(records[0][0])} and after: too much for one Arrow table")


def _schema_of(record: dict[str, Any], where: str) -> pa.Schema:
    try:
        return pa.schema([(name, _type_of(value)) for name, value in record.items()])
    except (pa.ArrowException, OverflowError, UnicodeError) as error:
        raise ValueError(f"{where}: {error}") from None


def _type_of(value: Any, levels: int = _DEEPEST) -> pa.DataType:
    """The Arrow type of a JSON value. pyarrow's own guess would let a boolean be a number."""
    if not levels:
        raise OverflowError(f"nested deeper than {_DEEPEST} levels")
    if isinstance(value, dict):
        return pa.struct([(name, _type_of(one, levels - 1)) for name, one in value.items()])
    if isinstance(value, list):
        if set(map(type, value)) == {int}:
            value = [min(value), max(value)]  # token ids: two tell as much as all
        items = {_type_of(one, levels - 1) for one in value}
        schemas = [pa.schema([("item", type)]) for type in items or {pa.null()}]
        return pa.list_(_unify(schemas).field(0).type)
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise OverflowError(f"the integer {value} takes more than 64 bits")
    scalars = {type(None): pa.null(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    return scalars.get(type(value), pa.string())


def _confirm_columns(reading: _Reading) -> None:
    """Look ahead for columns that the first block does not show.

    A key may well appear late, but one that never does must not become batch after batch of
    ``None``. Only such a column costs this pass over the lines, and it ends where all are found.
    """
    missing = {one.name for one in reading.schema if pa.types.is_null(one.type)}
    missing &= set(reading.columns or ())
    present: dict[str, None] = {}
    for file in reading.files if missing else ():
        for block in _line_blocks(file):
            for number, line in block.lines():
                if line.strip():
                    present.update(dict.fromkeys(_parse_line(line, file.at(number))))
            missing -= set(present)
            if not missing:
                return
    if missing:
        absent = [name for name in reading.columns or () if name in missing]
        _raise_missing(absent, list(present), ", ".join(file.path for file in reading.files))


# ------------------------------------------------------------------------------------------- csv


def _read_csv(file: _File, reading: _Reading) -> Iterator[pa.Table]:
    delimiter = _DELIMITERS[file.format]
    names: list[str] = []
    for block in _csv_blocks(file, delimiter):
        if not names:
            names, block = _csv_header(block, file, delimiter)
            reading.declare(file, names)
        if not block.content.strip(b"\r\n"):
            continue
        texts = _csv_texts(block, names, reading.columns, file, delimiter)
        typed = {}
        for name in texts.column_names:
            try:
                typed[name] = _typed(texts.column(name), _type_in(reading.schema, name))
            except _UnfitCell as unfit:
                line, *_ = next(islice(_csv_rows(block, delimiter), unfit.row, None))
                raise ValueError(f"{file.at(line)}: column '{name}' {unfit}") from None
        yield reading.fit(pa.table(typed), file.path)
    if not names:
        raise ValueError(f"{file.path}: no header, only blank lines")


def _csv_blocks(file: _File, delimiter: str) -> Iterator[_Block]:
    """All rows in order, about 4 MiB at a time, none of them blank as a whole.

    pyarrow's own way of cutting CSV loses rows and bytes where quoted line breaks meet the edge of
    a block (apache/arrow#51368).
    """
    with _open(file) as stream:
        line, pending = 1, b""
        while chunk := stream.read(_CSV_BLOCK_BYTES):
            # Off before rows are looked for: behind it the first quote would open no cell.
            pending += chunk if line > 1 or pending else chunk.removeprefix(_BYTE_ORDER_MARK)
            cut = _end_of_rows(pending, delimiter)
            if pending[:cut].strip(b"\r\n"):
                yield _block([pending[:cut]], line, file)
                line += pending.count(b"\n", 0, cut)
                pending = pending[cut:]
            if len(pending) > _LONGEST_CSV_ROW_BYTES:
                raise ValueError(
                    f"{file.at(line)}: a quote that is never closed, or a row of more than "
                    f"{_LONGEST_CSV_ROW_BYTES} bytes"
                )
        if pending.strip(b"\r\n"):
            block = _block([pending, b"\n"], line, file)
            cut = _end_of_rows(block.content, delimiter)
            if cut < len(block.content):
                line += block.content.count(b"\n", 0, cut)
                raise ValueError(f"{file.at(line)}: the file ends inside a quoted cell")
            yield block


def _quoted_cells(delimiter: str) -> re.Pattern[bytes]:
    """Quoted cells; the last may lack its closing quote.

    A quote opens a cell only where a cell begins: elsewhere it is a character like others. The
    expression begins with the quote, and looks back from behind it, so that ``re`` can search for
    that one character.
    """
    opening = rf'"(?<![^\r\n{delimiter}]")'
    return re.compile(rf'{opening}[^"]*(?:""[^"]*)*(?:"|\Z)'.encode())


def _end_of_rows(content: bytes, delimiter: str) -> int:
    """Where the last row that is whole ends."""
    end = len(content)
    cells = [cell.span() for cell in _quoted_cells(delimiter).finditer(content)]
    for start, stop in reversed(cells):
        line_end = content.rfind(b"\n", stop, end)
        if line_end >= 0:
            return line_end + 1
        end = start
    return content.rfind(b"\n", 0, end) + 1


def _csv_rows(block: _Block, delimiter: str) -> Iterator[tuple[int, int, int]]:
    """The first line of every row, how many lines it takes and how many cells it has."""

    def mask(cell: re.Match[bytes]) -> bytes:
        return b'"' + b"\0" * cell[0].count(b"\n")

    line = block.first_line
    for row in _quoted_cells(delimiter).sub(mask, block.content).split(b"\n")[:-1]:
        lines = 1 + row.count(b"\0")
        if row not in (b"", b"\r"):
            yield line, lines, 1 + row.count(delimiter.encode())
        line += lines


def _csv_header(block: _Block, file: _File, delimiter: str) -> tuple[list[str], _Block]:
    """The columns' names, and what is left of the block."""
    line, lines, _ = next(_csv_rows(block, delimiter))
    blank = line - block.first_line
    parts = block.content.split(b"\n", blank + lines)
    header = io.StringIO(b"\n".join(parts[blank:-1]).decode(), newline="")
    names = next(csv.reader(header, delimiter=delimiter))
    other = "tsv" if file.format == "csv" else "csv"
    if len(names) == 1 and _DELIMITERS[other] in names[0]:
        raise ValueError(
            f"{file.at(line)}: to be read as {file.format}, but its header is that of a {other}"
        )
    return names, _Block(parts[-1], line + lines)


def _csv_texts(
    block: _Block, names: list[str], columns: list[str] | None, file: _File, delimiter: str
) -> pa.Table:
    """The columns wanted, each cell as text and empty ones null."""
    try:
        return pa.csv.read_csv(
            pa.BufferReader(block.content),
            pa.csv.ReadOptions(
                use_threads=False, block_size=len(block.content) + 1, column_names=names
            ),
            pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            pa.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()),
                include_columns=columns,
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
    except pa.ArrowException as error:
        for line, _, cells in _csv_rows(block, delimiter):
            if cells != len(names):
                raise ValueError(
                    f"{file.at(line)}: {cells} cells, the header has {len(names)}"
                ) from None
        raise ValueError(f"{file.at(block.first_line)} and after: {error}") from None


def _type_in(schema: pa.Schema, name: str) -> pa.DataType:
    index = schema.get_field_index(name)
    return pa.null() if index < 0 else schema.field(index).type


# What a column that has held a type so far may hold from here on, the narrowest first.
_NEXT_TYPES = {
    pa.null(): [pa.int64(), pa.float64(), pa.bool_(), pa.string()],
    pa.int64(): [pa.int64(), pa.float64()],
    pa.float64(): [pa.float64()],
    pa.bool_(): [pa.bool_()],
    pa.string(): [pa.string()],
}


# Left to itself pyarrow reads 0x1F as 31 and 1 as true, and rounds a long integer to a float.
_NOT_TO_CAST = {
    pa.int64(): "[xX]",
    pa.float64(): "[xX]|^[+-]?[0-9]{19,}$",
    pa.bool_(): "[01]",
}


class _UnfitCell(Exception):
    """A cell that its column's type cannot hold."""

    def __init__(self, row: int, cell: str, before: pa.DataType):
        super().__init__(f"is {cell!r}, in the rows before it is {before}")
        self.row = row


def _typed(text: pa.ChunkedArray, before: pa.DataType) -> pa.ChunkedArray | pa.Array:
    """Cells as what they all say, or raise :class:`_UnfitCell` for the first that cannot be."""
    if text.null_count == len(text):
        return pa.nulls(len(text))
    for type in _NEXT_TYPES[before]:
        typed = _cast(text, type)
        if typed is not None:
            return typed
    widest = _NEXT_TYPES[before][-1]
    row = next(row for row in range(len(text)) if _cast(text.slice(row, 1), widest) is None)
    raise _UnfitCell(row, text[row].as_py(), before)


def _cast(text: pa.ChunkedArray, type: pa.DataType) -> pa.ChunkedArray | None:
    """``text`` as another type, or ``None`` where that is not what it says."""
    if pa.types.is_string(type):
        return text
    trimmed = pc.utf8_trim_whitespace(text)
    if pc.any(pc.match_substring_regex(trimmed, _NOT_TO_CAST[type])).as_py():
        return None
    try:
        return pc.cast(trimmed, type)
    except pa.ArrowInvalid:
        return None


_READERS: dict[str, Callable[[_File, _Reading], Iterator[pa.Table]]] = {
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "tsv": _read_csv,
    "text": _read_text,
}
