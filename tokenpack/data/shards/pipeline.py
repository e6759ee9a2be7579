"""A step of a datatrove pipeline, so that its local, Slurm and Ray executors do this work.

A task writes one part, which has its final name only when it is whole. datatrove starts a task that
was killed again and skips those that are complete, so the parts are the same in the end.
`merge_shards` joins them, and fails if one is missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ...checks import optional_at_least_one
from ...files import locked_folder
from ...packing import Packer
from ...segments import offsets_of
from ..tokens import Tokens
from .encode import ChatEncoder, Documents, TextEncoder, check_chat_options
from .parts import part_name
from .write import dtype_for
from .writer import ShardWriter, output_name

try:
    from datatrove.pipeline.base import PipelineStep
except ImportError:

    class PipelineStep:  # type: ignore[no-redef]
        """Stands for datatrove's class where it is not installed, so that this file imports."""

        def __new__(cls, *arguments: Any, **options: Any) -> Any:
            """Raise ImportError."""
            raise ImportError("ShardStep needs datatrove: pip install 'tokenpack[datatrove]'")


_ROWS = 64  # documents that are tokenized at once


class ShardStep(PipelineStep):
    """Tokenizes the documents of a task, and writes them as token shards or as packed rows.

    Put it at the end of a pipeline:

        LocalPipelineExecutor([JsonlReader("data"), ShardStep("out/corpus", "my/tokenizer")],
                              tasks=8, workers=2).run()
        merge_shards("out/corpus-*", "corpus")

    Args:
        out: the name of the parts; task 3 of 8 writes ``out-00003-of-00008``.
        tokenizer: a folder or a name on the hub, or a tokenizer of transformers.
        format: ``"megatron"`` or ``"datatrove"``.
        dtype, bos, eos: as for `write_shards`.
        chat: the metadata of a document are a conversation, as a row of `chat_dataset`.
        template, max_length: with ``chat``, as for `write_shards`.
        capacity: instead of shards, write packed rows of this many slots, as `pack_dataset` makes
            them, to ``out-00003-of-00008.arrow``. ``format`` and ``dtype`` do not matter then.
        strategy, overlong: with ``capacity``, as for `pack_dataset`.

    Raises:
        ValueError: if an argument is wrong.
    """

    name = "🧮 Token shards"
    type = "💽 - WRITER"

    def __init__(
        self,
        out: str,
        tokenizer: Any,
        *,
        format: str = "megatron",
        dtype: Any = None,
        bos: bool = False,
        eos: bool = True,
        chat: bool = False,
        template: Any = None,
        max_length: int | None = None,
        capacity: int | None = None,
        strategy: str = "auto",
        overlong: str = "error",
    ) -> None:
        super().__init__()
        if chat and capacity is None and format != "datatrove":
            raise ValueError(f"format must be 'datatrove' with chat, got {format!r}")
        check_chat_options(chat, None, bos, template, max_length)
        self.out, self.format, self.dtype = output_name(out, format), format, dtype
        self._tokenizer, self._special, self._chat = tokenizer, (bos, eos), chat
        self._rendering = (template, optional_at_least_one("max_length", max_length))
        self._packer = None
        if capacity is not None:
            self._packer = Packer(capacity, strategy, overlong=overlong)

    def run(self, data: Iterable[Any] | None, rank: int = 0, world_size: int = 1) -> None:
        """Write the documents of one task.

        Args:
            data: the documents.
            rank, world_size: the task, and the number of tasks.
        """
        tokenizer = self._tokenizer
        if isinstance(tokenizer, (str, Path)):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        encoder: Any = (
            ChatEncoder(tokenizer, *self._rendering, sparse=True)
            if self._chat
            else TextEncoder(tokenizer, *self._special)
        )
        name = part_name(self.out, rank, world_size)
        encoded = self._encoded(iter(data or ()), encoder)
        if self._packer is None:
            self._write(encoded, name, encoder, tokenizer, (rank, world_size))
        else:
            self._pack(encoded, name, self._packer)

    def _encoded(self, documents: Iterator[Any], encoder: Any) -> Iterator[Documents]:
        first = 0
        while batch := list(islice(documents, _ROWS)):
            rows = [each.metadata if self._chat else each.text for each in batch]
            with self.track_time(unit="batch"):
                found = encoder(rows, first)
            self.stat_update("tokens", value=len(found.tokens))
            self.stat_update("documents", value=len(found.lengths))
            if found.skipped:
                self.stat_update("documents without tokens", value=found.skipped)
            first += len(batch)
            yield found

    def _write(
        self,
        encoded: Iterator[Documents],
        name: Path,
        encoder: Any,
        tokenizer: Any,
        ranks: tuple[int, int],
    ) -> None:
        dtype = dtype_for(self.format, encoder.vocab_size) if self.dtype is None else self.dtype
        key = {
            **{"encoder": encoder.identity, "format": self.format, "dtype": np.dtype(dtype).name},
            **{"rank": ranks[0], "world_size": ranks[1]},
        }
        with ShardWriter(
            name,
            self.format,
            dtype,
            mask=encoder.has_targets,
            tokenizer=getattr(tokenizer, "name_or_path", "") or "unknown",
            key=key,
            resume=False,
            overwrite=True,
        ) as writer:
            for found in encoded:
                writer.write(found.tokens, found.targets)
                writer.end_documents(found.lengths)

    def _pack(self, encoded: Iterator[Documents], name: Path, packer: Packer) -> None:
        from ..packed.dataset import pack_dataset_from_result

        parts = list(encoded)
        if not parts:
            return
        tokens = np.concatenate([each.tokens.astype(np.int32) for each in parts])
        lengths = np.concatenate([each.lengths for each in parts])
        labels = None
        if parts[0].targets is not None:
            targets = np.concatenate([each.targets for each in parts if each.targets is not None])
            labels = Tokens(np.where(targets, tokens, np.int32(-100)), offsets_of(lengths))
        folder = name.with_name(name.name + ".unfinished")
        folder.mkdir(parents=True, exist_ok=True)
        with locked_folder(folder, "out"):
            for path in folder.iterdir():
                path.unlink()
            rows = pack_dataset_from_result(
                packer.pack(lengths),
                Tokens(tokens, offsets_of(lengths)),
                labels=labels,
                cache_dir=folder,
            )
            self.stat_update("rows", value=len(rows))
            (file,) = rows.cache_files
            Path(file["filename"]).replace(name.with_name(name.name + ".arrow"))
            shutil.rmtree(folder)
