"""Where rows of chat data come from: a list, files, a `datasets` object, or a name on the hub.

The rows of a list and of JSON files pass through `datasets` as JSON, one text per row. As Arrow
structs they would all get the same keys, so that rows of several schemas, or tools with different
arguments, would come back with other values than they had.
"""

from __future__ import annotations

import codecs
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, cast

import numpy as np

try:
    import datasets
    from datasets.formatting.formatting import LazyBatch
except ImportError as error:
    raise ImportError("chat_dataset needs datasets: pip install 'tokenpack[data]'") from error

from ..readers.files import DataFile, resolve_files

JSON_COLUMN = "tokenpack_json_row"  # the only column of rows that are JSON
_ROWS = 50  # that become Python objects together
_BUILDERS = {"parquet": "parquet", "arrow": "arrow"}


def open_source(source: Any, split: str, streaming: bool) -> tuple[Any, str | None]:
    """Open a source of rows.

    Args:
        source: see `chat_dataset`.
        split: of a name on the hub.
        streaming: open files and names as an iterable dataset.

    Returns:
        The dataset, and the column that holds each row as JSON, or None.

    Raises:
        TypeError, ValueError, FileNotFoundError: if there is no such source.
    """
    if isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        custom = getattr(source, "format", {"type": None})["type"] == "custom"
        plain = custom or isinstance(source, datasets.IterableDataset)
        return (source if plain else source.with_format(None)), None
    if isinstance(source, (str, os.PathLike)) or _are_paths(source):
        return _open_named(source, split, streaming)
    if isinstance(source, Mapping):
        raise TypeError(
            f"source must be rows or one split, got a {type(source).__name__} of "
            f"{', '.join(map(str, source))}; pass one of them"
        )
    if not isinstance(source, Sequence) or isinstance(source, bytes):
        raise TypeError(
            "source must be a list of rows, a path or a list of paths, a datasets object, or a "
            f"name on the hub, got {type(source).__name__}"
        )
    if not source:
        raise ValueError("source must hold at least one row, got none")
    texts = [_as_json(row, number) for number, row in enumerate(source)]
    dataset = datasets.Dataset.from_dict({JSON_COLUMN: texts})
    return (dataset.to_iterable_dataset() if streaming else dataset), JSON_COLUMN


def rows_of(
    batch: Mapping[str, Sequence[Any]], json_column: str | None, numbers: Iterable[int]
) -> Iterator[Any]:
    """The rows of a batch of columns; None for an empty line of a JSON file.

    Args:
        batch: the columns. Those of `datasets` become Python objects some rows at a time, while
            rows before them are encoded.
        json_column: the one that holds each row as JSON, or None.
        numbers: of the rows, for error messages.
    """
    numbers = iter(numbers)
    for part in _parts_of(batch):
        if json_column is None:
            yield from (dict(zip(part, values)) for values in zip(*part.values()))
        else:
            yield from map(_parse, part[json_column], numbers)


def _parts_of(batch: Mapping[str, Sequence[Any]]) -> Iterator[Mapping[str, Sequence[Any]]]:
    if not isinstance(batch, LazyBatch):
        yield batch
        return
    for at in range(0, batch.pa_table.num_rows, _ROWS):
        yield LazyBatch(batch.pa_table.slice(at, _ROWS), batch.formatter)


def first_rows(dataset: Any, json_column: str | None, count: int) -> Iterator[Any]:
    """The first rows of a dataset, or fewer if it has fewer; see `rows_of`."""
    for at, row in enumerate(islice(iter(dataset), count)):
        yield row if json_column is None else _parse(row[json_column], at)


def columns_of(dataset: Any) -> list[str]:
    """The column names of a dataset. A stream that does not know them is read to its first row."""
    names = dataset.column_names
    return list(next(iter(dataset), {}) if names is None else names)


def _are_paths(source: Any) -> bool:
    is_list = isinstance(source, (list, tuple)) and len(source) > 0
    return is_list and all(isinstance(each, (str, os.PathLike)) for each in source)


def _open_named(source: Any, split: str, streaming: bool) -> tuple[Any, str | None]:
    names_hub = isinstance(source, str) and _is_hub_name(source)
    if names_hub:
        return datasets.load_dataset(source, split=split, streaming=streaming), None
    files = resolve_files(source, None)
    kind = files[0].format
    if kind == "jsonl":
        return _open_json(files, streaming), JSON_COLUMN
    if kind not in _BUILDERS:
        raise ValueError(
            f"source must be .json, .jsonl, .parquet or .arrow files, got {files[0].path}"
        )
    return _load(_BUILDERS[kind], files, streaming), None


def _is_hub_name(name: str) -> bool:
    """Whether a text can only be a name on the hub: it names no path and has no known suffix."""
    if os.path.exists(name) or any(char in name for char in "*?[\\") or name.count("/") > 1:
        return False
    suffixes = (".json", ".jsonl", ".ndjson", ".parquet", ".pq", ".arrow", ".gz", ".zst")
    return not name.startswith(("/", ".", "~")) and not name.lower().endswith(suffixes)


def _load(builder: str, files: list[DataFile], streaming: bool) -> Any:
    paths = [os.path.abspath(file.path) for file in files]
    try:
        return datasets.load_dataset(builder, data_files=paths, split="train", streaming=streaming)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, UnicodeDecodeError):
            raise _not_utf8(", ".join(file.path for file in files), error.__cause__) from None
        raise


def _not_utf8(path: str, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{path} must be text in UTF-8: {error}")


def _open_json(files: list[DataFile], streaming: bool) -> Any:
    if any(are_values := [_is_one_value(file) for file in files]):
        read = [_read_value if is_value else _read_lines for is_value in are_values]
        rows = [row for read_file, file in zip(read, files) for row in read_file(file)]
        texts = [_as_json(row, number) for number, row in enumerate(rows)]
        dataset = datasets.Dataset.from_dict({JSON_COLUMN: texts})
        return dataset.to_iterable_dataset() if streaming else dataset
    lines = _load("text", files, streaming)
    return lines.rename_column("text", JSON_COLUMN)


def _is_one_value(file: DataFile) -> bool:
    """Whether a file is one JSON array of rows, or one row over several lines. Each of its lines
    may also be an array: a conversation."""
    with file.open() as content:
        head = content.read(1 << 12)
        try:  # a character may be cut off at the end
            codecs.getincrementaldecoder("utf-8-sig")().decode(head)
        except UnicodeDecodeError as error:
            raise _not_utf8(file.path, error) from None
        begin = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        if begin not in (b"[", b"{"):
            return False
    lines = (line for line in _lines_of(file) if line.removeprefix(codecs.BOM_UTF8).strip())
    first, second = (_value_of(next(lines, b"")) for _ in range(2))
    if begin == b"{":  # a line behind one that is cut off is JSON, but none within an object
        return first is second is _NO_JSON
    return first is _NO_JSON or (second is _NO_LINE and not _are_messages(first))


def _lines_of(file: DataFile) -> Iterator[bytes]:
    with file.open() as content:  # Arrow's has no lines
        yield from io.BufferedReader(cast(io.RawIOBase, content))


_NO_LINE, _NO_JSON = object(), object()


def _value_of(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig")) if line else _NO_LINE
    except ValueError:
        return _NO_JSON


def _are_messages(rows: list[Any]) -> bool:
    return bool(rows) and all(
        isinstance(row, dict) and ("role" in row or "from" in row) for row in rows
    )


def _read_lines(file: DataFile) -> list[Any]:
    lines = enumerate(_lines_of(file))
    rows = [_parse(line.decode("utf-8-sig"), number) for number, line in lines]
    return [row for row in rows if row is not None]


def _read_value(file: DataFile) -> list[Any]:
    """The rows of a file that is one JSON value."""
    with file.open() as content:
        text = bytes(content.read()).decode("utf-8-sig")
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"{file.path} must have one JSON object per line, or be one JSON array of rows or one "
            f"row: {error}"
        ) from None
    is_row = isinstance(value, dict) or (isinstance(value, list) and _are_messages(value))
    if not is_row and not isinstance(value, list):
        raise ValueError(f"{file.path} must be a JSON array of rows, got {text!r:.80}")
    return [value] if is_row else value


def _parse(text: str, number: int) -> Any:
    if not text.strip("\ufeff \t\r\n"):
        return None
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except ValueError as error:
        raise ValueError(
            f"source must have one JSON object per line, got {text!r:.80} in row {number}: {error}"
        ) from None


def _as_json(row: Any, number: int) -> str:
    try:
        return json.dumps(row, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise TypeError(f"row {number} must hold values of JSON: {error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"got a {type(value).__name__}")
