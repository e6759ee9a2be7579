"""Lines of text, and lines of JSON objects.

pyarrow parses a block of JSON. If pyarrow rejects the block, or would read something other than
what is written (dates in strings, large integers), ``json`` parses that block again: slowly, line
by line, and exactly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from .blocks import JSON_SPACE, MAX_JSON_DEPTH, Block, line_blocks
from .files import BYTE_ORDER_MARK, DataFile, one_line, shorten
from .schema import Reading, leaves, raise_missing, unify


def read_text(file: DataFile, reading: Reading) -> Iterator[pa.Table]:
    """The lines of a text file, one row each."""
    reading.declare(file, [reading.text_column])
    for block in line_blocks(file, cr_ends_line=True):
        if reading.skips(block.line_feeds):
            continue
        text = pa.array([block.content[:-1]], pa.large_string())
        lines = pc.split_pattern(text, "\n").flatten().cast(pa.string())
        yield reading.fit(pa.table({reading.text_column: lines}), file.at(block.first_line))


def read_jsonl(file: DataFile, reading: Reading) -> Iterator[pa.Table]:
    """The objects of a file of JSON lines, one row each."""
    for block in line_blocks(file, cr_ends_line=False):
        rows, whole = block.count_json_lines()
        if reading.skips(rows):
            continue
        # pyarrow crashes if the first line is null.
        table = _parse_fast(block, rows, reading) if whole else None
        if table is None:
            table = _parse_exactly(block, file, reading)
        table = reading.fit(table, file.at(block.first_line))
        if not reading.confirmed:
            _confirm_columns(reading)
            reading.confirmed = True
        yield table


def _parse_fast(block: Block, rows: int, reading: Reading) -> pa.Table | None:
    """Parse with pyarrow. None if that fails or would change what is written."""
    if block.json_depth() > MAX_JSON_DEPTH:
        return None
    known = [one for one in reading.schema if not _contains(one.type, pa.types.is_null)]
    # Keys that are not requested need no parsing. But if pyarrow ignores unexpected keys, it also
    # drops keys within objects.
    complete = reading.columns is not None and len(known) == len(reading.columns)
    nested = any(_contains(one.type, pa.types.is_struct) for one in known)
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
    # pyarrow ignores line ends. But each line begins and ends with a brace: if there are as many
    # rows as lines, each line is one object.
    if table.num_rows != rows or not table.num_columns or not _is_valid(table, known):
        return None
    return table if _is_exact(table) and reading.accepts(table.schema) else None


def _is_valid(table: pa.Table, known: list[pa.Field]) -> bool:
    """Whether the columns whose type pyarrow inferred, at least in part, have valid offsets.

    Lists that begin with null may get wrong ones (apache/arrow#51305). Lists of a known type do
    not.
    """
    types = {one.name: one.type for one in known}
    try:
        for name, column in zip(table.column_names, table.columns):
            if column.type != types.get(name):
                column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _contains(type: pa.DataType, predicate: Callable[[pa.DataType], bool]) -> bool:
    inner = [type.field(index).type for index in range(type.num_fields)]
    return predicate(type) or any(_contains(one, predicate) for one in inner)


def _is_exact(table: pa.Table) -> bool:
    """Whether no string became a date, and no integer a float too large to be exact."""
    if any(_contains(one.type, pa.types.is_temporal) for one in table.schema):
        return False
    floats = (
        leaf
        for name, column in zip(table.column_names, table.columns)
        for chunk in column.chunks
        for _, leaf in leaves(chunk, (name,))
        if pa.types.is_floating(leaf.type)
    )
    return not any(pc.any(pc.greater_equal(pc.abs(leaf), 2.0**53)).as_py() for leaf in floats)


def _parse_exactly(block: Block, file: DataFile, reading: Reading) -> pa.Table:
    """Parse line by line, which locates the first line with an error."""
    records: list[tuple[int, dict[str, Any]]] = []
    seen: set[pa.Schema] = set()
    for number, line in block.json_lines():
        record = _parse_line(line, file.at(number))
        if reading.columns is not None:
            record = {name: record[name] for name in reading.columns if name in record}
        schema = _schema_of(record, file.at(number))
        if schema not in seen:
            reading.widen(schema, file.at(number))
            seen.add(schema)
        records.append((number, record))
    if not reading.schema.names:
        raise ValueError(
            f"{file.at(block.first_line)}: must be JSON objects with keys, got none; name columns "
            "to read them as rows of None"
        )
    try:
        return pa.Table.from_pylist([record for _, record in records], schema=reading.schema)
    except (pa.ArrowException, UnicodeError, OverflowError):
        _raise_first_invalid(records, file, reading.schema)


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.removeprefix(BYTE_ORDER_MARK).decode())
    except json.JSONDecodeError as error:
        why = f"{error.msg}, column {error.colno}"
        if error.pos >= len(error.doc.rstrip()):
            why += "; an object must be on one line: jq -c ."
        if b"\r" in line.strip(JSON_SPACE):
            why += "; a line must end with LF or CRLF, not with CR alone"
        raise ValueError(f"{where}: not JSON ({why})") from None
    except RecursionError:
        raise ValueError(f"{where}: JSON nested too deeply") from None
    except ValueError:  # Python's limit, 4300 digits by default
        raise ValueError(f"{where}: an integer has too many digits") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: must be a JSON object, got a JSON {type(record).__name__}")
    return record


def _raise_first_invalid(
    records: list[tuple[int, dict[str, Any]]], file: DataFile, schema: pa.Schema
) -> NoReturn:
    """Locate a lone surrogate in a string, or an integer that its float column cannot hold."""
    for number, record in records:
        try:
            pa.Table.from_pylist([record], schema=schema)
        except (pa.ArrowException, UnicodeError, OverflowError) as error:
            raise ValueError(f"{file.at(number)}: {one_line(error)}") from None
    raise ValueError(f"{file.at(records[0][0])} and after: too much for one Arrow table")


def _schema_of(record: dict[str, Any], where: str) -> pa.Schema:
    try:
        return pa.schema([(name, _type_of(value)) for name, value in record.items()])
    except (pa.ArrowException, OverflowError, UnicodeError) as error:
        raise ValueError(f"{where}: {one_line(error)}") from None


def _type_of(value: Any, levels: int = MAX_JSON_DEPTH) -> pa.DataType:
    """The Arrow type of a JSON value. pyarrow's own inference would mix booleans and numbers."""
    if not levels:
        raise OverflowError(f"nested deeper than {MAX_JSON_DEPTH} levels")
    if isinstance(value, dict):
        return pa.struct([(name, _type_of(one, levels - 1)) for name, one in value.items()])
    if isinstance(value, list):
        if set(map(type, value)) == {int}:
            value = [min(value), max(value)]  # the range decides the type; lists of ids are long
        items = dict.fromkeys(_type_of(one, levels - 1) for one in value)
        schemas = [pa.schema([("item", type)]) for type in items or {pa.null()}]
        return pa.list_(unify(schemas).field(0).type)
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise OverflowError(f"the integer {shorten(str(value))} needs more than 64 bits")
    scalars = {type(None): pa.null(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    return scalars.get(type(value), pa.string())


def _confirm_columns(reading: Reading) -> None:
    """Look ahead for requested columns that the first block does not have.

    A key can appear late. But a key that never appears must not become batch after batch of None.
    Only such a column causes this pass over the lines, which ends as soon as all are found.
    """
    missing = {one.name for one in reading.schema if pa.types.is_null(one.type)}
    missing &= set(reading.columns or ())
    present: dict[str, None] = {}
    for file in reading.files if missing else ():
        for block in line_blocks(file, cr_ends_line=False):
            for number, line in block.json_lines():
                present.update(dict.fromkeys(_parse_line(line, file.at(number))))
            missing -= set(present)
            if not missing:
                return
    if missing:
        absent = [name for name in reading.columns or () if name in missing]
        raise_missing(absent, list(present), ", ".join(file.path for file in reading.files))
