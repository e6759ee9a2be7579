"""`TokenShards`: files of tokens as one sequence of documents, memory-mapped.

The tokens of all files form one stream. Positions in it, and the documents' ends, are Python
integers or int64. Only the pages that are read are in memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...checks import as_integer
from ...segments import offsets_of
from .columns import Column, DocumentEnds
from .file import ShardFile, as_token_dtype, check_mask, ends_by_token, whole_column
from .formats import open_shard, resolve_paths


class TokenShards(Sequence[Any]):
    """Documents of token ids in files of Megatron, datatrove, llm.c, OLMo or NumPy.

    ``shards[i]`` is document i, a read-only ``(length,)`` array of the file's dtype. It is a view
    of the file, unless the document is in two files. The object can be pickled, and a worker maps
    the files again.

    A file's end is the end of a document, except between files that store no ends: there, a
    document may go on in the next file, as llm.c writes it.

    Args:
        paths: a file, a folder, a glob or a list of them, also mixed. For Megatron, ``.bin``,
            ``.idx`` or their common prefix. A folder stands for the files directly in it that end
            in ``.bin``, ``.ds`` or ``.npy``. Folders and globs are read in sorted order.
        dtype: of files that do not state it: raw ``.bin``, and headerless ``.npy`` of OLMo without
            its ``.csv.gz``. Files that state a dtype are read with theirs.
        bos_token_id, eos_token_id: the first or the last token of every document, for files that
            store no ends. At most one of them. The files are searched for it once, when they are
            opened.
        label_masks: for each file, a file with one byte per token, 1 where the token is a target of
            the loss. datatrove's ``.ds.loss`` is found without this argument.

    Attributes:
        files: the files, in order.
        num_tokens: number of tokens.
        has_mask: whether a file has a mask of the loss.
        dtype: of all files together.

    Raises:
        TypeError: if an argument has the wrong type.
        FileNotFoundError: if a file does not exist.
        ValueError: if a file is damaged, cut short, or of an unknown dtype.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        dtype: Any = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        label_masks: Sequence[str | os.PathLike[str]] | None = None,
    ) -> None:
        given = None if dtype is None else as_token_dtype("dtype", dtype)
        if bos_token_id is not None and eos_token_id is not None:
            raise ValueError("bos_token_id and eos_token_id must not be given together")
        files = [open_shard(path, given) for path in resolve_paths(paths)]
        _add_masks(files, label_masks)
        for file in files:
            if file.ends is None and bos_token_id is not None:
                file.ends = _found(file, as_integer("bos_token_id", bos_token_id), True)
            elif file.ends is None and eos_token_id is not None:
                file.ends = _found(file, as_integer("eos_token_id", eos_token_id), False)
        self._set_files(files, bos_token_id)

    @classmethod
    def of_files(cls, files: Sequence[ShardFile]) -> TokenShards:
        """The shards of files that are open already."""
        shards = cls.__new__(cls)
        shards._set_files(list(files), None)
        return shards

    def _set_files(self, files: list[ShardFile], bos_token_id: int | None) -> None:
        self.files = files
        self.has_mask = any(file.mask is not None for file in self.files)
        self.num_tokens = sum(file.num_tokens for file in self.files)
        self.dtype = np.result_type(*(file.tokens.dtype for file in self.files))
        self._bases = offsets_of([file.num_tokens for file in self.files])
        self._closed = [self._ends_here(at, bos_token_id) for at in range(len(self.files))]
        counts = [
            (0 if file.ends is None else len(file.ends)) + closed
            for file, closed in zip(self.files, self._closed)
        ]
        self._counts = offsets_of(counts)

    @property
    def has_boundaries(self) -> bool:
        """Whether the ends of documents are known in every file."""
        return all(file.ends is not None for file in self.files)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """``(len(self),)`` int64, the tokens of each document. Reads the whole index."""
        return np.diff(self.ends, prepend=0)

    @property
    def ends(self) -> NDArray[np.int64]:
        """``(len(self),)`` int64, the position after each document. Reads the whole index."""
        parts = []
        for at, file in enumerate(self.files):
            if file.ends is not None:
                parts.append(file.ends.read(0, len(file.ends)) + self._bases[at])
            parts.append(self._bases[at + 1 : at + 1 + self._closed[at]])
        return np.concatenate(parts)

    def __len__(self) -> int:
        return int(self._counts[-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        at = as_integer("index", index)
        if not -len(self) <= at < len(self):
            raise IndexError(f"document {at} must be below {len(self)}, the number of documents")
        at %= len(self)
        return self.tokens(self._end(at - 1), self._end(at))

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """``(stop - start,)``, the tokens from position ``start`` to ``stop``.

        It is a view of the file if the tokens are in one file, else a copy.

        Raises:
            IndexError: if the positions are not in order and within the shards.
        """
        if len(self.files) == 1 and 0 <= start <= stop <= self.num_tokens:
            return self.files[0].tokens.array[start:stop]
        parts = [file.tokens.array[first:last] for file, first, last in self._parts(start, stop)]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def targets(self, start: int, stop: int) -> NDArray[np.bool_] | None:
        """``(stop - start,)``, which tokens are targets by the files' masks.

        None if no file has a mask.

        Raises:
            IndexError: as `tokens`.
        """
        if not self.has_mask:
            return None
        parts = [
            np.ones(last - first, np.bool_)
            if file.mask is None
            else file.mask.array[first:last] != 0
            for file, first, last in self._parts(start, stop)
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.bool_)

    def ends_between(self, start: int, stop: int) -> NDArray[np.int64]:
        """The positions where a document ends, ``start < end < stop``, each once, in order."""
        found = []
        for at in self._files_of(start, stop):
            base, file = int(self._bases[at]), self.files[at]
            if file.ends is not None:
                found.append(file.ends.between(max(start - base, -1), stop - base) + base)
            if self._closed[at]:
                found.append(self._bases[at + 1 : at + 2])
        if not found:
            return np.empty(0, np.int64)
        ends = found[0] if len(found) == 1 else np.concatenate(found)
        ends = ends[(ends > start) & (ends < stop)]
        if len(ends) > 1:
            new = np.empty(len(ends), np.bool_)
            new[0], new[1:] = True, ends[1:] != ends[:-1]
            ends = ends[new]  # a document may be empty
        return ends

    def _parts(self, start: int, stop: int) -> list[tuple[ShardFile, int, int]]:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(
                f"start and stop must be in order, from 0 to {self.num_tokens:,}, got {start} and "
                f"{stop}"
            )
        parts = []
        for at in self._files_of(start, stop):
            base, end = int(self._bases[at]), int(self._bases[at + 1])
            parts.append((self.files[at], max(start, base) - base, min(stop, end) - base))
        return parts

    def _files_of(self, start: int, stop: int) -> range:
        """The files with tokens from ``start`` to ``stop``."""
        if start >= stop:
            return range(0)
        if len(self.files) == 1:
            return range(1)
        first = int(self._bases.searchsorted(start, side="right")) - 1
        last = int(self._bases.searchsorted(stop, side="left"))
        return range(first, last)

    def _end(self, document: int) -> int:
        """The position after a document."""
        if document < 0:
            return 0
        at = int(self._counts.searchsorted(document, side="right")) - 1
        within = document - int(self._counts[at])
        ends = self.files[at].ends
        if ends is None or within == len(ends):
            return int(self._bases[at + 1])
        return int(self._bases[at]) + ends[within]

    def _ends_here(self, at: int, bos_token_id: int | None) -> bool:
        """Whether a document ends with file ``at`` though the file's own ends do not say so."""
        file = self.files[at]
        ends = file.ends
        if not file.num_tokens or (ends and ends[len(ends) - 1] == file.num_tokens):
            return False
        following = next((each for each in self.files[at + 1 :] if each.num_tokens), None)
        if following is None or _is_indexed(following) or _is_indexed(file):
            return True
        return bos_token_id is not None and following.tokens.array[0] == bos_token_id


def _is_indexed(file: ShardFile) -> bool:
    return file.ends is not None and file.format in ("megatron", "datatrove", "olmo", "memory")


def _found(file: ShardFile, token_id: int, begins: bool) -> DocumentEnds:
    return ends_by_token(file.tokens, token_id, begins)


def _add_masks(files: list[ShardFile], paths: Any) -> None:
    if paths is None:
        return
    if not isinstance(paths, Sequence) or isinstance(paths, str) or len(paths) != len(files):
        raise ValueError(
            f"label_masks must be a list with a file for each of the {len(files)} files of tokens, "
            f"got {paths!r:.80}"
        )
    for file, path in zip(files, paths):
        mask: Column = whole_column(Path(path), "u1")
        file.mask = check_mask(mask, file.num_tokens)
