"""Texts to train on: the docstrings of the standard library, or a user's file.

Docstrings are real text that comes with Python, so nothing is downloaded. Their lengths vary
naturally: the median is about 200 characters, and a few have several thousand.

A file is UTF-8 in one of two formats:

    .txt    texts separated by blank lines; one text per line if the file has no blank line
    .jsonl  one JSON object per line, with "text", or with "source" and "target"

A line that cannot be read raises an error that names the file and the line. No line is skipped.
`require_texts` checks the texts of a dataset.
"""

from __future__ import annotations

import ast
import json
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Tests have few docstrings and some invalid files. The others are not the standard library.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can escape one; UTF-8 cannot hold it
_END_OF_SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Text:
    """One text, and its target if the data has one."""

    source: str
    target: str | None = None


# ---------------------------------------------------------------------------- the standard library


def standard_library_texts(limit: int = 10_000) -> list[Text]:
    """Return the distinct docstrings of Python's standard library, in the order of its files.

    Docstrings of a single line, nearly half of all, are left out: they are more labels than text.

    Args:
        limit: the largest number of texts.

    Returns:
        Texts without a target. The list is the same for the same Python version.

    Raises:
        ValueError: if the standard library is installed without its sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    docstrings: dict[str, None] = {}
    for path in _python_files(root):
        for docstring in _docstrings(path):
            docstrings[docstring] = None
            if len(docstrings) == limit:
                return [Text(docstring) for docstring in docstrings]
    if not docstrings:
        raise ValueError(
            "data must be a .txt or .jsonl file, got none, and this Python has no sources of its "
            "standard library; pass a file with --data"
        )
    return [Text(docstring) for docstring in docstrings]


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        for name in sorted(files):
            if name.endswith(".py"):
                yield Path(folder, name)


def _docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escape sequences in the library
        try:
            tree = ast.parse(path.read_bytes())  # bytes, so that ast obeys the coding line
        except (SyntaxError, ValueError):
            return  # a template, not a module
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED):
            docstring = (ast.get_docstring(node) or "").strip()
            if "\n" in docstring:
                yield docstring


# ------------------------------------------------------------------------------------------- files


def read_texts(path: str | Path) -> list[Text]:
    """Read the texts of a .txt or .jsonl file.

    Returns:
        At least one text, and no empty text. Either all texts have a target or none has.

    Raises:
        ValueError: if the file is missing, empty, of another type, not UTF-8, or has an invalid
            line. The message names the file, the line and the expected content.
    """
    path = Path(path)
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl}
    if path.suffix.lower() not in readers:
        raise ValueError(f"data must end in .txt or .jsonl, got {path}")
    # Not splitlines(): it also splits at U+2028 and similar, which JSON strings may contain.
    content = _read_utf8(path).replace("\r\n", "\n")
    if path.suffix.lower() == ".txt":
        content = content.replace("\r", "\n")
    lines = content.split("\n")
    if not any(line.strip() for line in lines):
        raise ValueError(f"data must contain at least one text, got {path}, which is empty")
    return readers[path.suffix.lower()](path, lines)


def _read_utf8(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"data must be a readable file, got {path}: {error.strerror}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(
            f"data must be UTF-8, got byte 0x{raw[error.start]:02x} in {path}, line {line}"
        ) from None


def _read_txt(path: Path, lines: list[str]) -> list[Text]:
    lines = [line.rstrip() for line in lines]
    # Blank lines at the end of the file do not separate texts.
    while not lines[-1]:
        lines.pop()
    if all(lines):
        return [Text(line.strip()) for line in lines]
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if line:
            paragraphs[-1].append(line)
        elif paragraphs[-1]:
            paragraphs.append([])
    return [Text("\n".join(paragraph).strip()) for paragraph in paragraphs]


def _read_jsonl(path: Path, lines: list[str]) -> list[Text]:
    texts: list[Text] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip(" \t\r"):
            continue
        where = f"{path}, line {number}"
        text = _text_of_record(_parse_json(line, where), where)
        if texts and (text.target is None) != (texts[0].target is None):
            raise ValueError(
                "data must have 'text' in all lines, or 'source' and 'target' in all lines, "
                f"got both in {where}"
            )
        texts.append(text)
    return texts


def _parse_json(line: str, where: str) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"data must be JSON lines, got {error.msg} in {where}, column {error.colno}"
        ) from None
    except RecursionError:
        raise ValueError(f"data must be JSON lines, got too deep a nesting in {where}") from None
    except ValueError:  # Python's limit, 4300 digits by default
        raise ValueError(
            f"data must be JSON lines, got an integer with too many digits in {where}"
        ) from None
    if not isinstance(record, dict):
        raise ValueError(
            f"data must have a JSON object per line, got a {type(record).__name__} in {where}"
        )
    return record


def _text_of_record(record: dict, where: str) -> Text:
    keys = ("text",) if "text" in record else ("source", "target")
    if any(key not in record for key in keys):
        raise ValueError(
            "data must have the keys 'text', or 'source' and 'target', got "
            f"{sorted(record) or 'none'} in {where}"
        )
    for key in keys:
        value = record[key]
        if not isinstance(value, str) or not value.strip():
            got = "an empty string" if isinstance(value, str) else type(value).__name__
            raise ValueError(f"'{key}' must be a non-empty string, got {got} in {where}")
        surrogate = _SURROGATE.search(value)
        if surrogate:
            raise ValueError(
                f"'{key}' must be Unicode text, got half of a surrogate pair, "
                f"{surrogate[0]!a}, in {where}"
            )
    return Text(record[keys[0]], record[keys[1]] if len(keys) == 2 else None)


def require_texts(rows: Any, column: str) -> None:
    """Check, for a script, that a column of a `datasets.Dataset` holds a text in every row.

    Raises:
        SystemExit: if there is no such column, or it holds something else. Its one line names the
            column and the first row without a text.
    """
    if column not in rows.column_names:
        names = ", ".join(rows.column_names)
        raise SystemExit(f"dataset must have a column {column!r} of texts, got {names}")
    values = rows.with_format("arrow")[column][:]
    kind = str(values.type)
    if kind not in ("string", "large_string", "null"):
        raise SystemExit(f"column {column!r} must hold texts, got {kind}")
    if values.null_count:
        row = values.is_null().index(True).as_py()
        raise SystemExit(
            f"column {column!r} must hold a text in every row, got null in row {row} "
            f"(counting from 0; {values.null_count} in all)"
        )


# ------------------------------------------------------------------------------------------- pairs


def split_summary(text: str) -> tuple[str, str] | None:
    """Split a text into its body and its summary.

    The summary is the first paragraph. If the text has one paragraph, it is the first line, and if
    the text has one line, the first sentence. A docstring starts with its summary (PEP 257).

    Returns:
        ``(body, summary)``, or ``None`` for a text of one sentence.
    """
    for separator in (re.compile(r"\n\s*\n"), re.compile(r"\n"), _END_OF_SENTENCE):
        summary, _, body = _partition(text.strip(), separator)
        if summary and body:
            return body, summary
    return None


def _partition(text: str, separator: re.Pattern[str]) -> tuple[str, str, str]:
    match = separator.search(text)
    if match is None:
        return text, "", ""
    return text[: match.start()].strip(), match.group(), text[match.end() :].strip()
