"""The state of one reading: the rows to skip, and a schema that grows with the rows.

Textual formats declare no schema, and a later row can show that a type inferred from earlier rows
was too narrow. So the schema grows: null becomes any type, an integer becomes a float, an object
gets more keys. Types that no schema can hold together are an error that names the place, and so is
a type that cannot hold a value of the rows before. Both errors depend on the rows alone, not on the
batches in which they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import pyarrow as pa
import pyarrow.compute as pc

from .files import DataFile, listed, one_line, shorten

LARGEST_EXACT = 2**53  # a float holds every integer up to here, and not the next one


@dataclass
class Reading:
    """What to read, and the progress so far.

    Attributes:
        files: all files, of one format.
        columns: the columns to read, None for all.
        text_column: the column for lines of text.
        to_skip: rows that are still to be skipped.
        schema: the schema of the rows so far.
        rows: number of rows so far, skipped rows included.
        where: the file, and for textual formats the line, of the latest rows.
        confirmed: whether each of ``columns`` is known to exist. Only JSON needs this, because its
            files do not declare their columns.
        bounds: by the path of a leaf column, such as ``("a", "item")`` for the items of a list
            column, the least and the largest value so far, as an array of the leaf's type. Only
            leaves that a wider type may not hold: integers and times.
    """

    files: list[DataFile]
    columns: list[str] | None
    text_column: str
    to_skip: int
    schema: pa.Schema = field(default_factory=lambda: pa.schema([]))
    rows: int = 0
    where: str = ""
    confirmed: bool = False
    bounds: dict[tuple[str, ...], pa.Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # The requested columns, in the requested order, before any row has shown their types.
        self.schema = pa.schema([(name, pa.null()) for name in self.columns or ()])

    def skips(self, rows: int) -> bool:
        """Skip the next ``rows`` rows if all of them are to be skipped; return whether they are."""
        if rows > self.to_skip:
            return False
        self.to_skip -= rows
        self.rows += rows
        return True

    def trim(self, table: pa.Table) -> pa.Table:
        """Count the rows of ``table`` and cut off those that are to be skipped."""
        cut = min(self.to_skip, table.num_rows)
        self.to_skip -= cut
        self.rows += table.num_rows
        return table.slice(cut)

    def declare(self, file: DataFile, names: list[str]) -> None:
        """Check the columns of a file that declares them.

        Raises:
            ValueError: if the file has no columns, a repeated or missing column, or other columns
                than the files before.
        """
        if not names:
            raise ValueError(f"{file.path}: has no columns")
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"{file.path}: has more than one column {listed(repeated)}")
        missing = [name for name in self.columns or () if name not in names]
        if missing:
            raise_missing(missing, names, file.path)
        before = self.schema.names
        if self.columns is None and before and set(names) != set(before):
            raise ValueError(
                f"{file.path}: has the columns {listed(names)}; "
                f"the files before have {listed(before)}"
            )

    def accepts(self, schema: pa.Schema) -> bool:
        """Whether one schema can hold the types of the rows so far and those of ``schema``."""
        try:
            unify([self.schema, schema])
        except pa.ArrowException:
            return False
        return True

    def widen(self, schema: pa.Schema, where: str) -> None:
        """Extend the schema so that it holds the types of ``schema`` too.

        Raises:
            ValueError: if no schema can, or if it could not hold the values so far; names
                ``where`` and the column.
        """
        try:
            self.schema = unify([self.schema, schema])
        except pa.ArrowException:
            _raise_conflict(self.schema, schema, where)
        for path, bounds in self.bounds.items():
            try:
                # Casts of integers and times fail by range, so the bounds stand for all values.
                self.bounds[path] = bounds.cast(_type_at(path, self.schema))
            except pa.ArrowInvalid as error:
                _raise_differ(path[0], where, error)

    def fit(self, table: pa.Table, where: str) -> pa.Table:
        """Return ``table`` in the schema, which is widened if necessary."""
        self.where = where
        table = table.replace_schema_metadata(None)
        if not table.schema.equals(self.schema):
            self.widen(table.schema, where)
            table = join([self.schema.empty_table(), table], where).combine_chunks()
        if len(self.files) > 1 or not self.files[0].declares_types:
            self._note_bounds(table)
        return table

    def _note_bounds(self, table: pa.Table) -> None:
        for name, column in zip(table.column_names, table.columns):
            for chunk in column.chunks:
                for path, leaf in leaves(chunk, (name,)):
                    if _has_bounds(leaf.type):
                        before = self.bounds.get(path, pa.array([], leaf.type))
                        self.bounds[path] = _bounds(pa.concat_arrays([before, _bounds(leaf)]))


def leaves(array: pa.Array, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], pa.Array]]:
    """The arrays of scalars within nested columns, each with its path."""
    type = array.type
    if pa.types.is_struct(type):
        for index, child in enumerate(array.flatten()):
            yield from leaves(child, (*path, type.field(index).name))
    elif pa.types.is_map(type):
        yield from leaves(array.keys, (*path, "entries", "key"))
        yield from leaves(array.items, (*path, "entries", "value"))
    elif type.num_fields and hasattr(array, "flatten"):  # any other kind of list
        yield from leaves(array.flatten(), (*path, "item"))
    else:
        yield path, array


def _type_at(path: tuple[str, ...], schema: pa.Schema) -> pa.DataType:
    """The type of the leaf at a path of `leaves`."""
    type = schema.field(path[0]).type
    for name in path[1:]:
        type = type.field(name if pa.types.is_struct(type) else 0).type
    return type


def _has_bounds(type: pa.DataType) -> bool:
    is_time = pa.types.is_temporal(type) and not pa.types.is_interval(type)
    return is_time or pa.types.is_integer(type)


def _bounds(leaf: pa.Array) -> pa.Array:
    """The least and the largest value of ``leaf``; no values if all are null."""
    type = leaf.type
    if pa.types.is_temporal(type):  # Python's times are less precise, and end with the year 9999
        leaf = leaf.view(pa.int32() if type.bit_width == 32 else pa.int64())
    found = pc.min_max(leaf).as_py()
    return pa.array([one for one in found.values() if one is not None], leaf.type).view(type)


def join(tables: Sequence[pa.Table], where: str) -> pa.Table:
    """The rows of all ``tables`` in one schema that holds the types of all.

    Raises:
        ValueError: for an integer that the common type cannot hold, such as one past 2^53 among
            floats; names ``where`` and the column.
    """
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowInvalid:
        for name in tables[-1].column_names:
            columns = [table.select([name]) for table in tables if name in table.column_names]
            try:
                pa.concat_tables(columns, promote_options="permissive")
            except pa.ArrowInvalid as error:
                _raise_differ(name, where, error)
        raise


def _raise_differ(name: str, where: str, error: pa.ArrowInvalid) -> NoReturn:
    raise ValueError(
        f"{where}: the types of column '{listed([name])}' differ: {one_line(error)}"
    ) from None


def unify(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """The narrowest schema that holds the types of all ``schemas``.

    Raises:
        pa.ArrowException: if there is none, or values would become others.
    """
    whole = pa.unify_schemas(schemas, promote_options="permissive")
    for schema in schemas:
        for one in schema:
            if _changes_values(one.type, whole.field(one.name).type):
                raise pa.ArrowTypeError(f"{one.type} cannot become {whole.field(one.name).type}")
    return whole


def _changes_values(before: pa.DataType, after: pa.DataType) -> bool:
    """Whether pyarrow's cast rounds decimals, or turns text into bytes."""
    if pa.types.is_struct(before):
        return any(
            _changes_values(one.type, after.field(one.name).type)
            for one in (before.field(index) for index in range(before.num_fields))
        )
    if before.num_fields and before.num_fields == after.num_fields:
        return any(
            _changes_values(before.field(index).type, after.field(index).type)
            for index in range(before.num_fields)
        )
    was_text = pa.types.is_string(before) or pa.types.is_large_string(before)
    is_bytes = pa.types.is_binary(after) or pa.types.is_large_binary(after)
    rounded = pa.types.is_decimal(before) and pa.types.is_floating(after)
    return rounded or (was_text and is_bytes)


def raise_missing(missing: Sequence[str], present: Sequence[str], where: str) -> NoReturn:
    """Raise the error for requested columns that do not exist."""
    raise ValueError(
        f"columns must be in every file, but {where} has no column {listed(missing)}; "
        f"it has {listed(present)}"
    )


def _raise_conflict(before: pa.Schema, schema: pa.Schema, where: str) -> NoReturn:
    for new in schema:
        index = before.get_field_index(new.name)
        try:
            if index >= 0:
                unify([pa.schema([before.field(index)]), pa.schema([new])])
        except pa.ArrowException:
            raise ValueError(
                f"{where}: column '{listed([new.name])}' is {shorten(str(new.type), 150)}, "
                f"in the rows before it is {shorten(str(before.field(index).type), 150)}"
            ) from None
    raise ValueError(f"{where}: its columns do not agree with the rows before")
