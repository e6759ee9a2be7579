"""CSV and TSV: a header, then rows. Quoted cells may hold line breaks.

A row ends with LF, CRLF or CR outside of a quoted cell. A line of no character at all is blank and
is not a row. Python's ``csv`` and pyarrow have the same rules.

Cells are parsed as text by pyarrow. The types of a column follow from its first block, and may grow
in later blocks only in ways that change no value (see `_NEXT_TYPES`).
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray

from .blocks import Block, chunks, make_block
from .files import (
    BYTE_ORDER_MARK,
    DELIMITERS,
    DataFile,
    count_line_ends,
    listed,
    one_line,
    shorten,
)
from .schema import LARGEST_EXACT, Reading

_CSV_BLOCK_BYTES = 1 << 22  # larger than a block of lines, because types follow from the first
_LONGEST_CSV_ROW_BYTES = 1 << 26  # bounds what a quote that is never closed can swallow
_FIRST_CELLS = 100
_ROW_END = re.compile(rb"\r\n|\r|\n")
_LF, _CR = ord("\n"), ord("\r")


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
                lines, _ = _csv_rows(block, delimiter)
                raise ValueError(
                    f"{file.at(lines[invalid.row])}: column '{listed([name])}' {invalid}"
                ) from None
        yield reading.fit(pa.table(typed), file.at(block.first_line))
    if not names:
        raise ValueError(f"{file.path}: no header, only blank lines")


def _csv_blocks(file: DataFile, delimiter: str) -> Iterator[Block]:
    """All rows in order, about 4 MiB at a time, no block entirely blank.

    pyarrow's own block reader loses rows and bytes where a quoted line break meets the edge of a
    block (apache/arrow#51368).
    """
    line, pending = 1, b""
    for chunk in chunks(file, _CSV_BLOCK_BYTES):
        pending += chunk
        cut = _end_of_rows(pending, delimiter)
        content, pending = pending[:cut], pending[cut:]
        if content.strip(b"\r\n"):
            yield make_block([content], line, file, cr_ends_line=True)
        line += count_line_ends(content)
        if len(pending) > _LONGEST_CSV_ROW_BYTES:
            raise ValueError(
                f"{file.at(line)}: a quote that is never closed, or a row of more than "
                f"{_LONGEST_CSV_ROW_BYTES} bytes"
            )
    if pending.strip(b"\r\n"):
        block = make_block([pending, b"\n"], line, file, cr_ends_line=True)
        cut = _end_of_rows(block.content, delimiter)
        if cut < len(block.content):
            line += count_line_ends(block.content[:cut])
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
    # A CR at the end may be the first half of CRLF.
    end = len(content) - content.endswith(b"\r")
    cells = [cell.span() for cell in _quoted_cells(delimiter).finditer(content)]
    for start, stop in reversed(cells):
        row_end = max(content.rfind(b"\n", stop, end), content.rfind(b"\r", stop, end))
        if row_end >= 0:
            return row_end + 1
        end = start
    return max(content.rfind(b"\n", 0, end), content.rfind(b"\r", 0, end)) + 1


def _end_of_first_row(content: bytes, start: int, delimiter: str) -> int:
    """The offset at which the row that begins at ``start`` ends."""
    for cell in _quoted_cells(delimiter).finditer(content, start):
        found = _ROW_END.search(content, start, cell.start())
        if found:
            return found.end()
        start = cell.end()
    found = _ROW_END.search(content, start)
    return found.end() if found else len(content)


def _csv_rows(block: Block, delimiter: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first line and the number of cells of each row."""
    masking = bytes.maketrans(f"\r\n{delimiter}".encode(), b"___")
    masked = _quoted_cells(delimiter).sub(
        lambda cell: cell[0].translate(masking), block.content
    )  # as long as the block, so that offsets stay valid
    ends = _line_ends(masked)
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])
    begins_with_cr = np.frombuffer(masked, np.uint8)[starts] == _CR
    filled = (ends > starts) & ~((ends == starts + 1) & begins_with_cr)
    starts, ends = starts[filled], ends[filled]
    lines = block.first_line + np.searchsorted(_line_ends(block.content), starts)
    delimiters = np.flatnonzero(np.frombuffer(masked, np.uint8) == ord(delimiter))
    cells = 1 + np.searchsorted(delimiters, ends) - np.searchsorted(delimiters, starts)
    return lines, cells


def _line_ends(content: bytes) -> NDArray[np.int64]:
    """The offset of the last byte of each LF, CRLF and CR. ``content`` ends with one of them."""
    marks = np.frombuffer(content, np.uint8)
    is_end = marks == _LF
    lone_cr = marks == _CR
    lone_cr[:-1] &= ~is_end[1:]
    return np.flatnonzero(is_end | lone_cr)


def _csv_header(block: Block, file: DataFile, delimiter: str) -> tuple[list[str], Block]:
    """The names of the columns, and the block without the header."""
    content = block.content
    start = len(content) - len(content.lstrip(b"\r\n"))
    end = _end_of_first_row(content, start, delimiter)
    line = block.first_line + count_line_ends(content[:start])
    header = io.StringIO(content[start:end].decode(), newline="")
    try:
        names = next(csv.reader(header, delimiter=delimiter))
    except csv.Error as error:
        raise ValueError(f"{file.at(line)}: not a header: {error}") from None
    other = "tsv" if file.format == "csv" else "csv"
    if len(names) == 1 and DELIMITERS[other] in names[0]:
        raise ValueError(f"{file.at(line)}: must be {file.format}, but the header is {other}")
    return names, Block(content[end:], line + count_line_ends(content[start:end]))


def _csv_texts(
    block: Block, names: list[str], columns: list[str] | None, file: DataFile, delimiter: str
) -> pa.Table:
    """The requested columns, each cell as text, empty cells as null."""
    content = block.content
    if content.startswith(BYTE_ORDER_MARK):  # within a file it is a character, but not to pyarrow
        content = b"\n" + content
    try:
        return pa.csv.read_csv(
            pa.BufferReader(content),
            pa.csv.ReadOptions(use_threads=False, block_size=len(content) + 1, column_names=names),
            pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            pa.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()),
                include_columns=columns,
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
    except pa.ArrowException as error:
        lines, cells = _csv_rows(block, delimiter)
        wrong = np.flatnonzero(cells != len(names))
        if len(wrong):
            raise ValueError(
                f"{file.at(lines[wrong[0]])}: {cells[wrong[0]]} cells, the header has {len(names)}"
            ) from None
        raise ValueError(f"{file.at(block.first_line)} and after: {one_line(error)}") from None


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


class _InvalidCell(Exception):
    """A cell that the type of its column cannot hold."""

    def __init__(self, row: int, cell: str, before: pa.DataType):
        super().__init__(f"is {shorten(repr(cell))}, in the rows before it is {before}")
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
    # Up to this row, at least one type holds all cells.
    row, type = max(
        ((_first_invalid(text, type), type) for type in _NEXT_TYPES[before]),
        key=lambda found: found[0],
    )
    raise _InvalidCell(row, text[row].as_py(), type)


def _first_invalid(text: pa.ChunkedArray, type: pa.DataType) -> int:
    """The first row that `_cast` rejects. Bisects: all steps together read ``text`` about once."""
    low, high = 0, len(text)
    while high - low > 1:
        middle = (low + high) // 2
        if _cast(text.slice(low, middle - low), type) is None:
            high = middle
        else:
            low = middle
    return low


def _cast(text: pa.ChunkedArray, type: pa.DataType) -> pa.ChunkedArray | None:
    """``text`` as another type, or None if a cell is not a valid value of that type."""
    if pa.types.is_string(type):
        return text
    # A cast of a column of words is slow to fail, so a few cells come first.
    if len(text) > _FIRST_CELLS and _cast(text.slice(0, _FIRST_CELLS), type) is None:
        return None
    trimmed = pc.utf8_trim_whitespace(text)
    try:
        typed = pc.cast(trimmed, type)
    except pa.ArrowInvalid:
        return None
    return None if _IS_OTHER[type](trimmed, typed) else typed


def _has_hexadecimal(text: pa.ChunkedArray, integers: pa.ChunkedArray) -> bool:
    """pyarrow reads 0x1F as 31."""
    data = [chunk.buffers()[2] for chunk in text.chunks if len(chunk)]
    return any(mark in one.to_pybytes() for one in data if one is not None for mark in b"xX")


def _has_inexact(text: pa.ChunkedArray, floats: pa.ChunkedArray) -> bool:
    """A float cannot tell apart the integers past 2^53, and 1e400 becomes infinite.

    Other cells with a point or an exponent are decimal fractions, which floats round.
    """
    large = pc.greater_equal(pc.abs(floats), float(LARGEST_EXACT))
    if not pc.any(large).as_py():
        return False
    cells = text.filter(large)
    infinite = pc.and_(pc.is_inf(floats.filter(large)), pc.match_substring_regex(cells, "[0-9]"))
    if pc.any(infinite).as_py():
        return True
    integers = cells.filter(pc.match_substring_regex(cells, "^[+-]?[0-9]+$"))
    return any(_is_past_exact(cell.as_py()) for cell in integers)


def _is_past_exact(integer: str) -> bool:
    digits = integer.lstrip("+-0")
    return len(digits) > len(str(LARGEST_EXACT)) or int(digits) > LARGEST_EXACT


def _has_digit(text: pa.ChunkedArray, flags: pa.ChunkedArray) -> bool:
    """pyarrow reads 1 as true."""
    return bool(pc.any(pc.is_in(text, pa.array(["0", "1"]))).as_py())


# Whether a cell, as read by pyarrow, is something other than what is written.
_IS_OTHER = {
    pa.int64(): _has_hexadecimal,
    pa.float64(): _has_inexact,
    pa.bool_(): _has_digit,
}
