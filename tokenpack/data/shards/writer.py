"""Write token shards: whole or not at all, and on from where a killed run stopped.

Everything is written into the folder ``NAME.unfinished`` first:

    tokens, lengths, mask    they only grow
    state.json               how much of them is valid, and which input comes next

`ShardWriter.checkpoint` flushes the three to the disk and then replaces ``state.json``. A run that
finds the folder cuts the three files to the lengths in the state and goes on from there. So the
result is the same bytes, whenever a run was killed. At the end, ``state.json`` lists the files to
rename, and a run that is killed between two renames leaves the rest to the next.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ...files import locked_folder, written_whole
from . import datatrove, megatron
from .file import as_token_dtype, bytes_of

FORMATS = ("megatron", "datatrove")


class ShardWriter:
    """Writes documents as Megatron's or datatrove's files.

    Use it as a context manager. When the block ends, the files get their names. If it raises, they
    do not, and what is written stays for the next run if the writer can resume.

    Args:
        out: the name of the files: ``out.bin`` and ``out.idx``, or ``out.ds`` and ``out.ds.index``.
            These suffixes may be part of ``out``.
        format: ``"megatron"`` or ``"datatrove"``.
        dtype: of the tokens.
        mask: write ``out.ds.loss`` too.
        tokenizer: its name, for datatrove's metadata.
        key: what the result depends on, as JSON. A writer with a key resumes, and refuses to go on
            with what a run with another key left. Without a key, it starts again. Entries whose
            names begin with an underscore are not written next to the tokens.
        resume: False starts again even with a key.
        overwrite: replace files that exist.

    Attributes:
        position: what `checkpoint` last saved; empty at the start.
        tokens, documents: how many are written.

    Raises:
        ValueError: if an argument is wrong, files of the name exist, another run writes them, or
            the folder cannot be created.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        format: str,
        dtype: Any,
        *,
        mask: bool = False,
        tokenizer: str = "unknown",
        key: Mapping[str, Any] | None = None,
        resume: bool = True,
        overwrite: bool = False,
    ) -> None:
        self.format, self.dtype = format, as_token_dtype("dtype", dtype)
        self.out = output_name(out, format)
        if format == "megatron":
            megatron.code_of_dtype(self.dtype)
        else:
            datatrove.check_dtype(self.dtype)
        if mask and format != "datatrove":
            raise ValueError(f"format must be datatrove to store a mask of the loss, got {format}")
        self._tokenizer, self._key = tokenizer, None if key is None else json.loads(json.dumps(key))
        self._has_mask, self._overwrite = mask, overwrite
        self._resumes = resume and key is not None
        self._folder = self.out.with_name(self.out.name + ".unfinished")
        self._limits = np.iinfo(self.dtype)
        self._files: dict[str, Any] = {}
        self.position: dict[str, Any] = {}
        self.tokens, self.documents, self._crc, self._open = 0, 0, 0, 0
        self._kept = False

    def __enter__(self) -> ShardWriter:
        with ExitStack() as stack:
            _make(self._folder)
            stack.enter_context(locked_folder(self._folder, "out"))
            state = self._read_state()
            if not (state and "renames" in state):
                self._check_new()
                self._open_files(state or {}, stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        done = False
        try:
            if kind is None:
                self._finish()
                done = True
        finally:
            self._stack.close()
            if not done and not self._kept:  # nothing that the next run could use
                shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def is_finished(self) -> bool:
        """Whether an earlier run has written everything, so that only names are missing."""
        return not self._files

    @property
    def path(self) -> Path:
        """The file of tokens, when the writer has finished."""
        return self.out.with_name(self.out.name + (".bin" if self.format == "megatron" else ".ds"))

    def write(self, tokens: NDArray[Any], targets: NDArray[np.bool_] | None = None) -> None:
        """Append tokens to the document that is open. A document may be written in many parts.

        Args:
            tokens: ``(n,)`` integers.
            targets: ``(n,)``, which of them are targets of the loss; all, if there is a mask and
                this is None.

        Raises:
            ValueError: if a token does not fit into the dtype.
            OSError: naming the file, if it cannot be written.
        """
        if len(tokens):
            low, high = int(tokens.min()), int(tokens.max())
            if low < max(self._limits.min, 0) or high > self._limits.max:
                raise ValueError(
                    f"tokens must be from 0 to {self._limits.max} for {self.dtype}, got "
                    f"{low if low < 0 else high}"
                )
        content = bytes_of(np.asarray(tokens).astype(self.dtype, copy=False))
        self._crc = zlib.crc32(content, self._crc)
        self._append("tokens", content)
        if self._has_mask:
            mask = np.ones(len(tokens), "u1") if targets is None else targets.astype("u1")
            self._append("mask", bytes_of(mask))
        self.tokens += len(tokens)
        self._open += len(tokens)

    def end_document(self) -> None:
        """End the document that is open. It may be empty."""
        self.end_documents(np.array([self._open], np.int64))

    def end_documents(self, lengths: NDArray[np.int64]) -> None:
        """End documents that follow each other and hold all tokens since the last end.

        Raises:
            ValueError: if their lengths do not sum to the number of these tokens.
        """
        if int(lengths.sum()) != self._open:
            raise ValueError(
                f"lengths must sum to {self._open:,}, the tokens since the last end, got "
                f"{int(lengths.sum()):,}"
            )
        self._append("lengths", bytes_of(lengths.astype("<i8")))
        self.documents, self._open = self.documents + len(lengths), 0

    def checkpoint(self, position: Mapping[str, Any]) -> None:
        """Make everything so far survive a kill.

        Args:
            position: what the next run needs to go on, as JSON. It finds it as `position`.

        Raises:
            ValueError: if a document is open.
        """
        if self._open:
            raise ValueError(f"no document may be open at a checkpoint, got {self._open:,} tokens")
        for file in self._files.values():
            with _named(file.name):
                os.fsync(file.fileno())
        self.position = dict(position)
        self._write_state({})
        self._kept = self._resumes and self.documents > 0

    # ------------------------------------------------------------------------------------- details

    def _append(self, part: str, content: Any) -> None:
        # Without a buffer, so that a full disk is an error here and not when the file is closed.
        if not len(content):
            return
        rest = memoryview(content).cast("B")
        with _named(self._files[part].name):
            while len(rest):
                rest = rest[self._files[part].write(rest) :]

    def _check_new(self) -> None:
        found = [path for _, path in self._renames() if path.exists()]
        if found and not self._overwrite:
            if not any(self._folder.iterdir()):
                self._folder.rmdir()
            raise ValueError(f"out must be a new name, but {found[0]} exists; remove it first")

    def _read_state(self) -> dict[str, Any] | None:
        path = self._folder / "state.json"
        if not path.exists():
            return None
        state = json.loads(path.read_text(encoding="utf-8"))
        if not self._resumes or self._key is None or state["key"] is None:
            return None
        if state["key"] != self._key:
            names = {*self._key, *state["key"]}
            differs = [n for n in names if self._key.get(n) != state["key"].get(n)]
            raise ValueError(
                f"out must not be unfinished by a run with other options or inputs, but "
                f"{self._folder} differs in {', '.join(sorted(differs))}; remove that folder to "
                "start again"
            )
        self.position = state["position"]
        self.tokens, self.documents = state["tokens"], state["documents"]
        self._crc, self._kept = state["crc32"], True
        return state

    def _open_files(self, state: Mapping[str, Any], stack: ExitStack) -> None:
        sizes = {
            "tokens": self.tokens * self.dtype.itemsize,
            "lengths": self.documents * 8,
            "mask": self.tokens,
        }
        if not self._has_mask:
            del sizes["mask"]
        for part, size in sizes.items():
            path = self._folder / part
            mode = "r+b" if state and path.exists() else "wb"
            file = stack.enter_context(_opened(path, mode))
            if os.fstat(file.fileno()).st_size < size:
                raise ValueError(
                    f"{path} must have {size:,} bytes to go on with it, got "
                    f"{os.fstat(file.fileno()).st_size:,}; remove {self._folder} to start again"
                )
            file.truncate(size)
            file.seek(size)
            self._files[part] = file

    def _write_state(self, more: Mapping[str, Any]) -> None:
        state = {
            "key": self._key,
            "tokens": self.tokens,
            "documents": self.documents,
            "crc32": self._crc,
            "position": self.position,
            **more,
        }
        path = self._folder / "state.json"
        with _named(str(path)), written_whole(path) as partial:
            partial.write_text(json.dumps(state), encoding="utf-8")

    def _finish(self) -> None:
        if self._files:
            if self._open:
                self.end_document()
            for file in self._files.values():
                with _named(file.name):
                    os.fsync(file.fileno())
            lengths = np.fromfile(self._folder / "lengths", "<i8")
            for name, write in self._index_writers(lengths).items():
                path = self._folder / name
                with _named(str(path)), path.open("wb") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
            self._write_state({"renames": True})
            self._kept = self._resumes
        for name, path in self._renames():
            if (self._folder / name).exists():
                with _named(str(path)):
                    (self._folder / name).replace(path)
        # The state goes last: without it, the next run would take what is left for a new start.
        for path in self._folder.iterdir():
            if path.name != "state.json":
                path.unlink()
        (self._folder / "state.json").unlink()
        self._folder.rmdir()

    def _index_writers(self, lengths: NDArray[np.int64]) -> dict[str, Callable[[BinaryIO], object]]:
        about = json.dumps(self.about, indent=1, sort_keys=True) + "\n"
        writers: dict[str, Callable[[BinaryIO], object]] = {
            "about": lambda file: file.write(about.encode())
        }
        if self.format == "megatron":
            writers["index"] = lambda file: megatron.write_index(file, self.dtype, lengths)
            return writers
        writers["index"] = lambda file: datatrove.write_index(file, lengths)
        writers["metadata"] = lambda file: datatrove.write_metadata(
            file, self._tokenizer, self.dtype.itemsize, self.tokens
        )
        return writers

    @property
    def about(self) -> dict[str, Any]:
        """What the file ``.tokenpack.json`` next to the tokens says."""
        return {
            "format": self.format,
            "dtype": self.dtype.name,
            "tokens": self.tokens,
            "documents": self.documents,
            "crc32": self._crc,
            "tokenizer": self._tokenizer,
            "position": self.position,
            "key": {k: v for k, v in (self._key or {}).items() if not k.startswith("_")},
        }

    def _renames(self) -> list[tuple[str, Path]]:
        """Files of the folder and their final names, the tokens last."""
        suffixes = {"index": ".idx", "tokens": ".bin"}
        if self.format == "datatrove":
            suffixes = {
                **{"index": ".ds.index", "metadata": ".ds.metadata"},
                **({"mask": ".ds.loss"} if self._has_mask else {}),
                "tokens": ".ds",
            }
        suffixes = {"about": about_name(Path("")).name, **suffixes}
        return [(part, self.out.with_name(self.out.name + s)) for part, s in suffixes.items()]


def about_name(name: Path) -> Path:
    """The file that says how shards of tokenpack were written; ``name`` has no suffix."""
    return name.with_name(name.name + ".tokenpack.json") if name.name else Path(".tokenpack.json")


def output_name(out: str | os.PathLike[str], format: str) -> Path:
    """``out`` without the suffixes that the format adds.

    Raises:
        ValueError: if there is no such format, or ``out`` has the suffix of the other one.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    path = Path(out)
    own, other = (
        ((".bin", ".idx"), (".ds",)) if format == "megatron" else ((".ds",), (".bin", ".idx"))
    )
    if path.suffix in other:
        raise ValueError(f"out must not end in {path.suffix} for {format}, got {path}")
    path = path.with_suffix("") if path.suffix in own else path
    if not path.name:
        raise ValueError(f"out must be the name of a file, got {os.fspath(out)!r}")
    return path


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: cannot create the folder {folder}: {error.strerror}") from None


def _opened(path: Path, mode: str) -> Any:
    try:
        return path.open(mode, buffering=0)
    except OSError as error:
        raise ValueError(f"out: cannot write {path}: {error.strerror}") from None


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Add the path to an error of writing, which has none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
