"""CSV and TSV: a header, then rows. Quoted cells may hold line breaks.

Cells are parsed as text by pyarrow. The types of a column follow from its first block, and may grow
in later blocks only in ways that change no value (see `_NEXT_TYPES`).
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from .blocks import Block, make_block
from .files import BYTE_ORDER_MARK, DELIMITERS, DataFile
from .schema import Reading

_CSV_BLOCK_BYTES = 1 << 22  # larger than a block of lines, because types follow from the first
_LONGEST_CSV_ROW_BYTES = 1 << 26  # bounds what a quote that is never closed can swallow


def read_csv(file: DataFile, reading: Reading) -> Iterator[pa.Table]:
    """The rows of a CSV or TSV file."""
    delimiter = DELIMITERS[file.format]
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
            except _InvalidCell as invalid:
                line, *_ = next(islice(_csv_rows(block, delimiter), invalid.row, None))
                raise ValueError(f"{file.at(line)}: column '{name}' {invalid}") from None
        yield reading.fit(pa.table(typed), file.path)
    if not names:
        raise ValueError(f"{file.path}: no header, only blank lines")


def _csv_blocks(file: DataFile, delimiter: str) -> Iterator[Block]:
    """All rows in order, about 4 MiB at a time, no block entirely blank.

    pyarrow's own block reader loses rows and bytes where a quoted line break meets the edge of a
    block (apache/arrow#51368).
    """
    with file.open() as stream:
        line, pending = 1, b""
        while chunk := stream.read(_CSV_BLOCK_BYTES):
            # Remove the byte order mark first: a quote right after it would not open a cell.
            pending += chunk if line > 1 or pending else chunk.removeprefix(BYTE_ORDER_MARK)
            cut = _end_of_rows(pending, delimiter)
            if pending[:cut].strip(b"\r\n"):
                yield make_block([pending[:cut]], line, file)
                line += pending.count(b"\n", 0, cut)
                pending = pending[cut:]
            if len(pending) > _LONGEST_CSV_ROW_BYTES:
                raise ValueError(
                    f"{file.at(line)}: a quote that is never closed, or a row of more than "
                    f"{_LONGEST_CSV_ROW_BYTES} bytes"
                )
        if pending.strip(b"\r\n"):
            block = make_block([pending, b"\n"], line, file)
            cut = _end_of_rows(block.content, delimiter)
            if cut < len(block.content):
                line += block.content.count(b"\n", 0, cut)
                raise ValueError(f"{file.at(line)}: the file ends inside a quoted cell")
            yield block


def _quoted_cells(delimiter: str) -> re.Pattern[bytes]:
    """Matches quoted cells; the last one may lack its closing quote.

    A quote opens a cell only at the start of the cell. Elsewhere it is an ordinary character. The
    expression starts with the quote and looks back from there, so that ``re`` can search for that
    one character.
    """
    opening = rf'"(?<![^\r\n{delimiter}]")'
    return re.compile(rf'{opening}[^"]*(?:""[^"]*)*(?:"|\Z)'.encode())


def _end_of_rows(content: bytes, delimiter: str) -> int:
    """The offset at which the last complete row ends."""
    end = len(content)
    cells = [cell.span() for cell in _quoted_cells(delimiter).finditer(content)]
    for start, stop in reversed(cells):
        line_end = content.rfind(b"\n", stop, end)
        if line_end >= 0:
            return line_end + 1
        end = start
    return content.rfind(b"\n", 0, end) + 1


def _csv_rows(block: Block, delimiter: str) -> Iterator[tuple[int, int, int]]:
    """For each row its first line, its number of lines and its number of cells."""

    def mask(cell: re.Match[bytes]) -> bytes:
        return b'"' + b"\0" * cell[0].count(b"\n")

    line = block.first_line
    for row in _quoted_cells(delimiter).sub(mask, block.content).split(b"\n")[:-1]:
        lines = 1 + row.count(b"\0")
        if row not in (b"", b"\r"):
            yield line, lines, 1 + row.count(delimiter.encode())
        line += lines


def _csv_header(block: Block, file: DataFile, delimiter: str) -> tuple[list[str], Block]:
    """The names of the columns, and the block without the header."""
    line, lines, _ = next(_csv_rows(block, delimiter))
    blank = line - block.first_line
    parts = block.content.split(b"\n", blank + lines)
    header = io.StringIO(b"\n".join(parts[blank:-1]).decode(), newline="")
    names = next(csv.reader(header, delimiter=delimiter))
    other = "tsv" if file.format == "csv" else "csv"
    if len(names) == 1 and DELIMITERS[other] in names[0]:
        raise ValueError(f"{file.at(line)}: must be {file.format}, but the header is {other}")
    return names, Block(parts[-1], line + lines)


def _csv_texts(
    block: Block, names: list[str], columns: list[str] | None, file: DataFile, delimiter: str
) -> pa.Table:
    """The requested columns, each cell as text, empty cells as null."""
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


# The types that a column may have after a block, by its type before; the narrowest first.
_NEXT_TYPES = {
    pa.null(): [pa.int64(), pa.float64(), pa.bool_(), pa.string()],
    pa.int64(): [pa.int64(), pa.float64()],
    pa.float64(): [pa.float64()],
    pa.bool_(): [pa.bool_()],
    pa.string(): [pa.string()],
}


# Cells that must not be cast: pyarrow would read 0x1F as 31 and 1 as true, and round a long integer
# to a float.
_NOT_TO_CAST = {
    pa.int64(): "[xX]",
    pa.float64(): "[xX]|^[+-]?[0-9]{19,}$",
    pa.bool_(): "[01]",
}


class _InvalidCell(Exception):
    """A cell that the type of its column cannot hold."""

    def __init__(self, row: int, cell: str, before: pa.DataType):
        super().__init__(f"is {cell!r}, in the rows before it is {before}")
        self.row = row


def _typed(text: pa.ChunkedArray, before: pa.DataType) -> pa.ChunkedArray | pa.Array:
    """The cells in the narrowest type that holds all of them.

    Raises:
        _InvalidCell: for the first cell that no type allowed after ``before`` can hold.
    """
    if text.null_count == len(text):
        return pa.nulls(len(text))
    for type in _NEXT_TYPES[before]:
        typed = _cast(text, type)
        if typed is not None:
            return typed
    widest = _NEXT_TYPES[before][-1]
    row = next(row for row in range(len(text)) if _cast(text.slice(row, 1), widest) is None)
    raise _InvalidCell(row, text[row].as_py(), before)


def _cast(text: pa.ChunkedArray, type: pa.DataType) -> pa.ChunkedArray | None:
    """``text`` as another type, or None if a cell is not a valid value of that type."""
    if pa.types.is_string(type):
        return text
    trimmed = pc.utf8_trim_whitespace(text)
    if pc.any(pc.match_substring_regex(trimmed, _NOT_TO_CAST[type])).as_py():
        return None
    try:
        return pc.cast(trimmed, type)
    except pa.ArrowInvalid:
        return None
