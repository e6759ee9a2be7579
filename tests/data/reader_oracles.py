"""What a file holds according to Python's own csv and json, to compare the readers with.

A `Content` holds the rows up to the first line that must be refused, and the lines that may be
named in the refusal.
"""

import csv
import io
import json
from dataclasses import dataclass, field

LARGEST_EXACT = 2**53
END = "end of file"
HUGE = 2**70  # stands for an integer with more digits than Python parses


@dataclass
class Content:
    """``rows`` come before the first line in ``bad``. ``loose``: a refusal is allowed anywhere."""

    rows: list = field(default_factory=list)
    bad: set = field(default_factory=set)
    loose: bool = False
    names: list | None = None
    cells: dict = field(default_factory=dict)  # of CSV: the cells of the row at each line
    first_bytes_are_json: bool = False


class Conflict(Exception):
    """Two kinds that no column can hold."""


def kind_of(value, depth=0):
    """The type of a JSON value, of which `merged` makes the type of a column."""
    if depth > 100:
        raise Conflict
    if isinstance(value, dict):
        return {name: kind_of(one, depth + 1) for name, one in value.items()}
    if isinstance(value, list):
        whole = None
        for one in value:
            whole = merged(whole, kind_of(one, depth + 1))
        return [whole]
    if type(value) is int:
        if not -(2**63) <= value < 2**63:
            raise Conflict
        return "large" if abs(value) > LARGEST_EXACT else "int"
    return {str: "str", type(None): None, bool: "bool", float: "float"}[type(value)]


def merged(one, other):
    """The type that holds both. ``mixed``: floats, and integers that floats cannot hold."""
    if one is None or other is None or one == other:
        return other if one is None else one
    if isinstance(one, dict) and isinstance(other, dict):
        return {name: merged(one.get(name), other.get(name)) for name in {**one, **other}}
    if isinstance(one, list) and isinstance(other, list):
        return [merged(one[0], other[0])]
    numbers = {str(one), str(other)}
    if not numbers <= {"int", "large", "float", "mixed"}:
        raise Conflict
    if numbers == {"int", "large"}:
        return "large"
    return "float" if numbers == {"int", "float"} else "mixed"


def has_mixed(kind):
    if isinstance(kind, dict):
        return any(map(has_mixed, kind.values()))
    return any(map(has_mixed, kind)) if isinstance(kind, list) else kind == "mixed"


def json_content(raw, columns):
    """The rows of JSON lines, or None if they are not UTF-8."""
    content = Content()
    kinds = {}
    lines = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip(b" \t\r"):
            continue
        long_digits = []

        def parse_int(digits, long_digits=long_digits):
            if len(digits) > 4000:
                long_digits.append(digits)
                return HUGE
            return int(digits)

        try:
            text = line.removeprefix(b"\xef\xbb\xbf").decode()
            row = json.loads(text, parse_int=parse_int)
            if not isinstance(row, dict):
                raise Conflict
            if columns is not None:
                row = {name: row[name] for name in columns if name in row}
            kinds = merged(kinds, kind_of(row))
            json.dumps(row, ensure_ascii=False).encode()  # no lone surrogates
        except (ValueError, RecursionError, Conflict):
            content.bad.add(number)
        else:
            content.loose |= bool(long_digits)
            if not content.bad:
                content.rows.append(row)
    content.loose |= has_mixed(kinds)
    # Objects without keys have no column, so a file cannot begin with a block of them.
    content.loose |= bool(content.rows) and not content.rows[0] and columns is None
    return content


def csv_content(raw, delimiter):
    """The rows of a CSV file as lists of cells."""
    text, bad = _decoded(raw)
    content = Content(bad=bad)
    content.first_bytes_are_json = text.lstrip().startswith('{"')
    # A last line of our own tells whether the text ends inside a quoted cell.
    lines = io.StringIO(f"{text}\n{END}", newline="")
    reader = csv.reader(lines, delimiter=delimiter)
    line = 1
    for cells in reader:
        if cells == [END]:
            return content
        if cells and cells[-1].endswith(f"\n{END}"):
            if bad:
                return content  # the undecodable bytes are in the quoted cell
            content.bad.add(line)
        elif cells and content.names is None:
            content.names = cells
        elif cells:
            content.cells[line] = cells
            if len(cells) != len(content.names):
                content.bad.add(line)
            elif not content.bad - bad:
                content.rows.append(cells)
        line = reader.line_num + 1
    return content


def text_content(raw):
    """The lines of a text, split as by ``open``."""
    text, bad = _decoded(raw)
    lines = io.StringIO(text, newline=None).read().split("\n")
    return Content(lines if lines[-1] else lines[:-1], bad)


def _decoded(raw):
    """The text up to the line of the first byte that is not text, and the number of that line."""
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    try:
        text, stop = raw.decode(), len(raw)
    except UnicodeDecodeError as error:
        text, stop = raw[: error.start].decode(), error.start
    if "\0" in text:
        stop = min(stop, raw.index(b"\0"))
    if stop == len(raw):
        return text, set()
    before = raw[:stop].decode()
    lines = io.StringIO(before, newline=None).read().split("\n")
    return before.removesuffix(lines[-1]), {len(lines)}


def same(got, want):
    """Whether a value is the one that was written, in a column that may have a wider type."""
    if isinstance(want, dict):
        return (
            isinstance(got, dict)
            and all(same(one, want.get(name)) for name, one in got.items())
            and all(want[name] is None for name in set(want) - set(got))
        )
    if isinstance(want, list):
        return isinstance(got, list) and len(got) == len(want) and all(map(same, got, want))
    if type(want) is int:
        return type(got) in (int, float) and got == want
    return type(got) is type(want) and (got == want or (got != got and want != want))


def fits(cell, type):
    """Whether a column of that type can hold the cell."""
    text = cell.strip()
    if type == "bool":
        return text.lower() in ("true", "false")
    if type == "integer" and not text.lstrip("+-").isdigit():
        return False
    try:
        if text.lstrip("+-").isdigit():
            return abs(int(text)) <= LARGEST_EXACT if type == "double" else abs(int(text)) < 2**63
        infinite = abs(float(text)) == float("inf") and any(map(str.isdigit, text))
    except ValueError:
        return False
    return not infinite


def same_cell(got, cell):
    """Whether a value is the cell that was written."""
    text = cell.strip()
    if isinstance(got, bool):
        return text.lower() == str(got).lower()
    if isinstance(got, int):
        return int(text) == got
    if isinstance(got, float):
        if text.lstrip("+-").isdigit():
            return int(text) == got
        want = float(text)
        finite = want == got and (abs(got) < float("inf") or not any(map(str.isdigit, text)))
        return finite or (want != want and got != got)
    return got == (cell or None)
