"""Corpora to token shards: read, tokenize, write, in one pass that survives a kill.

    read        batches of rows, by `streaming_dataset_reader`, or conversations by `datasets`
    tokenize    in threads (`tokenizers` releases the interpreter's lock), a few batches ahead
    write       in the order of the rows, with a checkpoint every few seconds

The rows of rank r of N are the r-th of N ranges of equal size. So the parts of all ranks, one after
the other, are what one run would have written.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ...checks import at_least_one
from ..chat.sources import open_source, rows_of
from ..readers.files import resolve_files
from ..tokens import flatten_tokens
from . import datatrove, megatron
from .encode import ChatEncoder, Documents, IdsEncoder, TextEncoder, check_chat_options
from .file import as_token_dtype
from .parts import check_ranks, part_name, part_of
from .writer import ShardWriter, output_name

_CHECKPOINT_SECONDS = 2.0
_ROWS = 64  # of a batch, at most
_CHARACTERS = 1 << 18  # of a batch of several texts, at most
_COUNTED = 1 << 14  # rows that are counted at once

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class WriteReport(NamedTuple):
    """What `write_shards` wrote.

    Attributes:
        path: a path for `TokenShards`.
        tokens, documents: how many.
        skipped: rows that gave no document, because they have no tokens or were dropped.
        seconds: of this run.
        new_tokens: tokens that this run wrote; fewer than ``tokens`` if it resumed.
    """

    path: Path
    tokens: int
    documents: int
    skipped: int
    seconds: float
    new_tokens: int


def write_shards(
    paths: Paths,
    out: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    format: str = "megatron",
    dtype: Any = None,
    column: str | None = None,
    bos: bool = False,
    eos: bool = True,
    chat: bool = False,
    template: Any = None,
    max_length: int | None = None,
    num_proc: int = 1,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
) -> WriteReport:
    """Write a corpus as token shards. Run the same call again to go on after a kill.

    Args:
        paths: files to read, as for `streaming_dataset_reader`. Each row is a document; a line of a
            ``.txt`` file is a row.
        out: the name of the files, with or without a suffix. With several ranks, the part's number
            is added: ``out-00000-of-00004``.
        tokenizer: of transformers; None if the rows hold token ids.
        format: ``"megatron"`` or ``"datatrove"``.
        dtype: of the tokens. By default the one that the format's own tools choose for the
            tokenizer's vocabulary. It must be given for token ids.
        column: of texts (default ``"text"``), or of token ids (default ``"input_ids"``).
        bos, eos: add the tokenizer's BOS before each text, or its EOS behind it.
        chat: the rows are conversations, as for `chat_dataset`. They are rendered with the chat
            template, and the tokens of the assistant are the targets of the loss. Needs the format
            datatrove, which stores them.
        template: for ``chat``, as for `chat_dataset`.
        max_length: for ``chat``, tokens of a document; longer ones lose whole turns.
        num_proc: threads that tokenize.
        rank, world_size: write only this rank's part of the rows. `merge_shards` joins the parts.
        progress: show a progress bar with tokens per second.

    Returns:
        What was written.

    Raises:
        TypeError: if an argument has the wrong type, or a row is no text.
        ValueError: if an argument is wrong, a file cannot be read, files of the name exist, or an
            unfinished run had other options or inputs.
        OSError: if the disk is full, for example; the next run goes on.
    """
    ranks = check_ranks(rank, world_size)
    at_least_one("num_proc", num_proc)
    check_chat_options(chat, column, bos, template, max_length)
    if bos and tokenizer is None:
        raise ValueError("bos must not be given for token ids, which are written as they are")
    name = output_name(out, format)
    if world_size > 1:
        name = part_name(name, *ranks)
    source: _Source
    if chat:
        _check_chat(tokenizer, format, num_proc)
        source = _Conversations(paths)
        encoder: Any = ChatEncoder(tokenizer, template, max_length, source.sparse)
    else:
        column = column or ("text" if tokenizer is not None else "input_ids")
        source = _Rows(paths, column, is_text=tokenizer is not None)
        encoder = IdsEncoder(_vocabulary_of(dtype)) if tokenizer is None else None
        encoder = encoder or TextEncoder(tokenizer, bos, eos)
    if dtype is None:
        dtype = dtype_for(format, encoder.vocab_size)
    key = {
        **{"inputs": source.inputs, "column": column, "encoder": encoder.identity},
        **{"format": format, "dtype": np.dtype(dtype).name},
        **{"rank": rank, "world_size": world_size, "_files": source.files},
    }
    writer = ShardWriter(
        name,
        format,
        dtype,
        mask=encoder.has_targets,
        tokenizer=getattr(tokenizer, "name_or_path", "") or "unknown",
        key=key,
    )
    return _run(source, encoder, writer, ranks, num_proc, progress)


def _check_chat(tokenizer: Any, format: str, num_proc: int) -> None:
    if tokenizer is None:
        raise ValueError("tokenizer must be given with chat, got None")
    if format != "datatrove":
        raise ValueError(
            "format must be 'datatrove' with chat, because it stores what is learned, got "
            f"{format!r}"
        )
    if num_proc > 1:
        raise ValueError(
            f"num_proc must be 1 with chat, which tokenizes on all cores, got {num_proc}"
        )


def dtype_for(format: str, vocab_size: int) -> np.dtype[Any]:
    """The dtype that the format's own tools choose for a vocabulary."""
    choose = megatron.dtype_for if format == "megatron" else datatrove.dtype_for
    return choose(vocab_size)


class _Source(Protocol):
    """Rows to read.

    Attributes:
        inputs: name and size of each file.
        files: path and time of change of each file.
    """

    inputs: list[Any]
    files: list[Any]

    def count(self) -> int:
        """Number of rows."""

    def batches(self, first: int, stop: int | None) -> Iterator[tuple[int, int, Any]]:
        """The rows from ``first`` to ``stop``: first row of a batch, the one after it, the rows."""


class _Rows:
    """A column of texts or of token ids, in files of any format that `tokenpack.data` reads."""

    def __init__(self, paths: Paths, column: str, is_text: bool) -> None:
        single = isinstance(paths, (str, os.PathLike))
        self._path: Any = paths if single or len(paths) > 1 else paths[0]  # type: ignore[arg-type,index]
        self._column, self._is_text = column, is_text
        names = [file.path for file in resolve_files(self._path, None)]
        self.inputs, self.files = _identities(names)

    def count(self) -> int:
        """See `_Source`."""
        return sum(table.num_rows for table in self._read(_COUNTED, 0))

    def batches(self, first: int, stop: int | None) -> Iterator[tuple[int, int, Any]]:
        """See `_Source`."""
        at = first
        if stop is not None and at >= stop:
            return
        for table in self._read(_ROWS, first):
            rows = table if stop is None else table.slice(0, max(stop - at, 0))
            if not rows.num_rows:
                return
            values = rows.column(self._column)
            end = at + rows.num_rows
            if self._is_text:
                yield from _split(values.to_pylist(), at)
            else:
                yield at, end, flatten_tokens(values, self._column, empty=True)
            at = end

    def _read(self, batch_size: int, skip: int) -> Iterator[Any]:
        from ..reader import streaming_dataset_reader

        options: dict[str, Any] = {"columns": [self._column], "output": "arrow"}
        yield from streaming_dataset_reader(self._path, batch_size, skip_rows=skip, **options)


def _split(texts: list[Any], first: int) -> Iterator[tuple[int, int, Any]]:
    """Batches of texts of about the same size, so that threads share them and checkpoints come."""
    begin, size = 0, 0
    for at, text in enumerate(texts):
        length = len(text) if isinstance(text, str) else 0
        if at > begin and size + length > _CHARACTERS:
            yield first + begin, first + at, texts[begin:at]
            begin, size = at, 0
        size += length
    yield first + begin, first + len(texts), texts[begin:]


class _Conversations:
    """Rows of chat data."""

    def __init__(self, paths: Paths) -> None:
        single = isinstance(paths, (str, os.PathLike))
        given = [paths] if single else list(paths)  # type: ignore[arg-type]
        names = [os.fspath(each) for each in given]  # type: ignore[arg-type]
        self.inputs, self.files = _identities([each for each in names if os.path.isfile(each)])
        source = names[0] if len(names) == 1 else names
        self._dataset, self._json = open_source(source, "train", streaming=False)
        self.sparse = self._json is None

    def count(self) -> int:
        """See `_Source`."""
        return len(self._dataset)

    def batches(self, first: int, stop: int | None) -> Iterator[tuple[int, int, Any]]:
        """See `_Source`."""
        end = len(self._dataset) if stop is None else stop
        for at in range(first, end, _ROWS):
            last = min(at + _ROWS, end)
            yield at, last, list(rows_of(self._dataset[at:last], self._json, range(at, last)))


def _run(
    source: _Source,
    encoder: Any,
    writer: ShardWriter,
    ranks: tuple[int, int],
    num_proc: int,
    progress: bool,
) -> WriteReport:
    from tqdm import tqdm

    begin = time.perf_counter()
    with writer, _one_thread_per_call():
        before = writer.tokens
        if not writer.is_finished:
            if "rows" not in writer.position:
                first, stop = _range_of(source, *ranks)
                writer.checkpoint({"first": first, "rows": first, "stop": stop, "skipped": 0})
            bar = tqdm(
                **{"desc": "tokenizing", "unit": " tokens", "unit_scale": True},
                **{"initial": before, "disable": not progress},
            )
            with bar, ThreadPoolExecutor(num_proc) as pool:
                _write_all(source, encoder, writer, pool, 2 * num_proc, bar)
        position = writer.position
    return WriteReport(
        *(writer.path, writer.tokens, writer.documents, position["skipped"]),
        *(time.perf_counter() - begin, writer.tokens - before),
    )


def _write_all(
    source: _Source, encoder: Any, writer: ShardWriter, pool: Any, ahead: int, bar: Any
) -> None:
    position = dict(writer.position)
    last = time.monotonic()
    waiting: deque[tuple[int, Future[Documents]]] = deque()

    def write_next() -> None:
        nonlocal last
        end, future = waiting.popleft()
        documents = future.result()
        writer.write(documents.tokens, documents.targets)
        writer.end_documents(documents.lengths)
        position["rows"], position["skipped"] = end, position["skipped"] + documents.skipped
        bar.update(len(documents.tokens))
        if time.monotonic() - last >= _CHECKPOINT_SECONDS:
            writer.checkpoint(position)
            last = time.monotonic()

    try:
        for first, end, rows in source.batches(position["rows"], position["stop"]):
            waiting.append((end, pool.submit(encoder, rows, first)))
            if len(waiting) > ahead:
                write_next()
        while waiting:
            write_next()
    except BaseException:
        for _, future in waiting:
            future.cancel()
        raise
    writer.checkpoint({**position, "stop": position["rows"]})


def _range_of(source: _Source, rank: int, world_size: int) -> tuple[int, int | None]:
    """The rows of a rank. One rank reads to the end, without counting."""
    if world_size == 1:
        return 0, None
    return part_of(source.count(), rank, world_size)


def _vocabulary_of(dtype: Any) -> int:
    if dtype is None:
        raise ValueError("dtype must be given for token ids, such as 'uint16'; or pass a tokenizer")
    return int(np.iinfo(as_token_dtype("dtype", dtype)).max)


def _identities(paths: Sequence[str]) -> tuple[list[Any], list[Any]]:
    stats = [(path, os.stat(path)) for path in paths]
    return (
        [[os.path.basename(path), stat.st_size] for path, stat in stats],
        [[os.path.abspath(path), stat.st_mtime_ns] for path, stat in stats],
    )


@contextmanager
def _one_thread_per_call() -> Iterator[None]:
    """Keep `tokenizers` from starting threads of its own, so that ``num_proc`` decides."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
