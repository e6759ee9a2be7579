"""Which files a path names, which format each has, and whether its first bytes agree."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .compression import COMPRESSIONS, compression_of, open_compressed

SUFFIXES = {
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
DELIMITERS = {"csv": ",", "tsv": "\t"}
_BINARY = {"parquet", "arrow"}

# Files that datasets.save_to_disk and the Hub put next to the data.
_METADATA_NAMES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}

_MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class DataFile:
    """One file to read."""

    path: str
    format: str
    compression: str | None

    @property
    def declares_types(self) -> bool:
        """Whether the types of the columns are in the file, and so the same for all its rows."""
        return self.format in ("parquet", "arrow")

    def at(self, line: int) -> str:
        """The file and line, for error messages."""
        return f"{self.path}, line {line}"

    def open(self) -> BinaryIO:
        """Open the file for reading bytes, decompressed."""
        if self.compression is None:
            return open(self.path, "rb")
        return open_compressed(self.path, self.compression)


def count_line_ends(content: bytes) -> int:
    """The number of LF, CRLF and CR."""
    ends = content.count(b"\n")
    if b"\r" in content:
        ends += content.count(b"\r") - content.count(b"\r\n")
    return ends


def shorten(text: str, limit: int = 60) -> str:
    """The beginning of ``text``, for error messages."""
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


def listed(names: Sequence[str]) -> str:
    """Names of columns on one line, for error messages."""
    return ", ".join(name if name.isprintable() else repr(name)[1:-1] for name in names)


def one_line(error: Exception) -> str:
    """A message of pyarrow, which may have many lines and quote the file, for error messages."""
    return shorten(" ".join(str(error).split()), 300)


def resolve_files(path: Any, format: str | None) -> list[DataFile]:
    """The files that ``path`` names, all of one format; see `streaming_dataset_reader`."""
    if isinstance(path, (str, os.PathLike)):
        paths = _expand(os.fspath(path), format)
    elif isinstance(path, Sequence) and not isinstance(path, (bytes, bytearray)):
        if not all(isinstance(one, (str, os.PathLike)) for one in path):
            raise TypeError(f"path must be a path or a list of paths, got {path!r}")
        paths = [os.fspath(one) for one in path]
    else:
        raise TypeError(f"path must be a path or a list of paths, got {path!r}")
    if not paths:
        raise ValueError("path must name at least one file, got an empty list")
    files = [_describe(one, format) for one in paths]
    formats = {file.format for file in files}
    if len(formats) > 1:
        raise ValueError(
            f"path must name files of one format, got {', '.join(sorted(formats))} in {path}; "
            "list the files, or select one format with format="
        )
    return files


def _expand(path: str, format: str | None) -> list[str]:
    if os.path.isdir(path):
        return _files_in_folder(path, format)
    if glob.has_magic(path) and not os.path.exists(path):
        found = sorted(one for one in glob.glob(path, recursive=True) if os.path.isfile(one))
        if not found:
            raise FileNotFoundError(f"path must match at least one file, got {path}")
        return found
    return [path]


def _files_in_folder(folder: str, format: str | None) -> list[str]:
    """The folder's files with a known suffix, or with a suffix of ``format``."""
    found = []
    for entry in sorted(Path(folder).iterdir()):
        hidden = entry.name.startswith((".", "_")) or entry.name in _METADATA_NAMES
        by_suffix = _by_suffix(entry.name)[0]
        if hidden or not entry.is_file() or by_suffix is None:
            continue
        if format in (None, by_suffix):
            found.append(str(entry))
    if not found:
        known = " ".join(s for s, f in SUFFIXES.items() if format in (None, f))
        raise FileNotFoundError(
            f"path must be a folder with a file that ends in {known}, got {folder}"
        )
    return found


def _by_suffix(name: str) -> tuple[str | None, str | None]:
    """``(format, compression)`` according to the file's name; None if unknown."""
    stem, suffix = os.path.splitext(name.lower())
    compression = COMPRESSIONS.get(suffix)
    if compression is not None:
        suffix = os.path.splitext(stem)[1]
    return SUFFIXES.get(suffix), compression


def _describe(path: str, format: str | None) -> DataFile:
    if not os.path.exists(path):
        raise FileNotFoundError(f"path must be an existing file, got {path}")
    if not os.path.isfile(path):
        raise ValueError(f"path must be a regular file, got {path}")
    if os.path.getsize(path) == 0:
        raise ValueError(f"path must not be an empty file, got {path}")
    by_suffix, compression = _by_suffix(path)
    if format is None and by_suffix is None:
        raise ValueError(
            f"path must end in one of {' '.join(SUFFIXES)}, got {path}; pass format= for a file "
            "with another name"
        )
    chosen = format or by_suffix or ""
    if chosen in _BINARY and compression:
        raise ValueError(
            f"path must not be {chosen} within {compression}, got {path}; decompress it first"
        )
    return DataFile(path, chosen, compression)


def check_content(file: DataFile) -> None:
    """Raise ValueError if the file's first bytes belong to another format."""
    with open(file.path, "rb") as raw:
        head = raw.read(8)
    found = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
    found = found or compression_of(head)
    expected = file.compression or (file.format if file.format in _BINARY else None)
    if found != expected:
        raise ValueError(
            f"{file.path}: must be {expected or file.format}, but its first bytes are those of "
            f"{found or 'another format'}"
        )
    if file.format not in _BINARY:
        _check_textual_content(file)


def _check_textual_content(file: DataFile) -> None:
    with file.open() as stream:
        head = stream.read(4096).removeprefix(BYTE_ORDER_MARK)
    if b"\0" in head:
        before = head[: head.index(0)]
        line = 1 + (before.count(b"\n") if file.format == "jsonl" else count_line_ends(before))
        raise ValueError(f"{file.at(line)}: not text (a NUL byte)")
    if file.format in DELIMITERS and head.lstrip().startswith(b'{"'):
        raise ValueError(f"{file.at(1)}: must be {file.format}, but it is JSON")
    # A JSON array can be one line as long as the file. Reject it before that line is read.
    start = head.lstrip().removeprefix(BYTE_ORDER_MARK)  # as any line may begin with one
    if file.format == "jsonl" and start and not start.startswith(b"{"):
        line = head[: -len(start)].count(b"\n") + 1
        shown = start.split(b"\n")[0][:40].decode(errors="replace")
        hint = "; write an array with one object per line: jq -c '.[]'" if shown[0] == "[" else ""
        raise ValueError(f"{file.at(line)}: must be a JSON object, got {shown}{hint}")
