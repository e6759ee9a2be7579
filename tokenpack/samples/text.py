"""Texts to train on: the standard library's docstrings, or a file of one's own.

Docstrings are real text that every Python carries, of naturally unequal lengths (a median of some
200 characters, a few of several thousand), so nothing need be downloaded and no length is made up.

A file is

    .txt    texts separated by blank lines; where the file has no blank line, one text per line
    .jsonl  one JSON object per line, with "text", or with "source" and "target"

in UTF-8. What cannot be read is an error that names the file and the line; nothing is skipped.
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

# Tests hold few docstrings and files that are broken on purpose; the rest is not the library.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_END_OF_SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Text:
    """One text, with what it is to be turned into where the data says so."""

    source: str
    target: str | None = None


# ---------------------------------------------------------------------------- the standard library


def standard_library_texts(limit: int = 10_000) -> list[Text]:
    """The docstrings of Python's standard library, each once, in the order of its files.

    Those of a single line, nearly half, are left out: they are labels more than text.

    Args:
        limit: how many at most.

    Returns:
        Texts without a target. The same Python gives the same list.

    Raises:
        ValueError: if the library is here without its sources.
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
            "data: this Python carries no sources of its standard library; "
            "give a .txt or .jsonl file with --data"
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
        warnings.simplefilter("ignore")  # the library's own invalid escapes
        try:
            tree = ast.parse(path.read_bytes())  # bytes: the file's coding line is obeyed
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
        At least one text, none of them empty. Either all have a target or none has.

    Raises:
        ValueError: naming the file, the line where there is one, and what is expected, if the file
            is missing, empty, of another kind, not UTF-8, or holds a line that cannot be used.
    """
    path = Path(path)
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl}
    if path.suffix.lower() not in readers:
        raise ValueError(f"data: cannot read {path}: it must end in .txt or .jsonl")
    # Not splitlines(): that also breaks at U+2028 and its like, which JSON strings may hold.
    lines = _read_utf8(path).replace("\r\n", "\n").split("\n")
    if not any(line.strip() for line in lines):
        raise ValueError(f"data: {path} is empty")
    return readers[path.suffix.lower()](path, lines)


def _read_utf8(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"data: cannot read {path}: {error.strerror}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(
            f"data: {path}, line {line}: not UTF-8 (byte 0x{raw[error.start]:02x})"
        ) from None


def _read_txt(path: Path, lines: list[str]) -> list[Text]:
    lines = [line.rstrip() for line in lines]
    # A blank line at the end of a file separates nothing.
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
        if not line.strip():
            continue
        where = f"data: {path}, line {number}"
        text = _text_of_record(_parse_json(line, where), where)
        if texts and (text.target is None) != (texts[0].target is None):
            raise ValueError(
                f"{where}: lines with 'text' and lines with 'source' and 'target' "
                f"are mixed; a file takes one kind"
            )
        texts.append(text)
    return texts


def _parse_json(line: str, where: str) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: got a JSON {type(record).__name__}, expected an object")
    return record


def _text_of_record(record: dict, where: str) -> Text:
    keys = ("text",) if "text" in record else ("source", "target")
    if any(key not in record for key in keys):
        raise ValueError(
            f"{where}: expected 'text', or 'source' and 'target'; "
            f"got the keys {sorted(record) or 'none'}"
        )
    for key in keys:
        value = record[key]
        if not isinstance(value, str) or not value.strip():
            got = "an empty string" if isinstance(value, str) else type(value).__name__
            raise ValueError(f"{where}: '{key}' must be a string that is not empty, got {got}")
    return Text(record[keys[0]], record[keys[1]] if len(keys) == 2 else None)


# ------------------------------------------------------------------------------------------- pairs


def split_summary(text: str) -> tuple[str, str] | None:
    """Split a text into what follows its summary, and its summary.

    The summary is the first paragraph, else the first line, else the first sentence: whichever is
    the first to leave something after it. A docstring's first line is its summary (PEP 257).

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
