"""Training and validation loaders in one call, with the names that users of transformer-toolkit
know. Each function is `shard_windows` with a `ShardLoader` for each part.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...checks import as_integer, at_least_one, check_seed, optional_at_least_one
from ...files import NpyWriter, written_whole
from ...packing.lengths import as_integers
from .columns import ArrayColumn, DocumentEnds, EndsInArray
from .encode import Documents, TextEncoder
from .file import ShardFile, as_token_dtype, bytes_of
from .loader import ShardLoader
from .shards import TokenShards
from .windows import ShardWindows, shard_windows

_BATCH = 64  # texts that are tokenized at once
_CHECKED = 1 << 16  # tokens of a raw file that are looked at

Loaders = tuple[ShardLoader, ShardLoader]
PathLike = str | os.PathLike[str]


@dataclass
class DataConfig:
    """How `from_binary` and its siblings make training and validation data.

    Attributes:
        seq_len: inputs of a window.
        batch_size: windows of a batch.
        split: the share of the tokens that is for training, between 0 and 1.
        stride: tokens from a window to the next, at most ``seq_len``, which is the default.
        shuffle: shuffle the training windows, in an order that depends on ``seed`` and the epoch.
        num_workers, pin_memory: of the loaders.
        seed: of the order.
        isolate_documents: keep the documents of a window apart; None does where their ends are
            known.
        debug: print the first windows with their targets marked.
        debug_n: how many.
    """

    seq_len: int = 128
    batch_size: int = 32
    split: float = 0.9
    stride: int | None = None
    shuffle: bool = True
    num_workers: int = 0
    pin_memory: bool = False
    seed: int = 0
    isolate_documents: bool | None = None
    debug: bool = False
    debug_n: int = 3

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size", "debug_n"):
            at_least_one(name, getattr(self, name))
        optional_at_least_one("stride", self.stride)
        check_seed(self.seed)
        if not 0 < self.split < 1:
            raise ValueError(f"split must be between 0 and 1, got {self.split}")


def save_binary(ids: Any, path: PathLike, dtype: Any = "uint16") -> None:
    """Write token ids to a file: a true ``.npy`` if the path ends so, else raw without a header.

    Args:
        ids: integers in any form, as in `pack_lengths`.
        path: the file. It is written whole or not at all.
        dtype: of the ids in the file.

    Raises:
        TypeError: if the ids are not integers.
        ValueError: if there are no ids, or one does not fit into the dtype.
    """
    target, form = Path(path), as_token_dtype("dtype", dtype)
    values = as_integers(ids, "ids")
    if values.ndim != 1 or not len(values):
        raise ValueError(f"ids must be one-dimensional, at least one, got shape {values.shape}")
    limits = np.iinfo(form)
    if not limits.min <= values.min() <= values.max() <= limits.max:
        bad = values.max() if values.max() > limits.max else values.min()
        raise ValueError(
            f"ids must be from {limits.min} to {limits.max} for {form}, got {bad}; pass another "
            "dtype, such as 'uint32'"
        )
    with written_whole(target) as partial:
        if target.suffix == ".npy":
            writer = NpyWriter(partial, form)
            writer.append(values)
            writer.close()
        else:
            partial.write_bytes(bytes_of(values.astype(form)))


def from_binary(
    path: PathLike,
    cfg: DataConfig,
    *,
    train_path: PathLike | None = None,
    val_path: PathLike | None = None,
    tokenizer: Any = None,
    dtype: Any = None,
) -> Loaders:
    """Loaders of a file of token ids in any format of `TokenShards`.

    Args:
        path: the file.
        cfg: the options.
        train_path, val_path: also write the two parts there, as `save_binary` does.
        tokenizer: of transformers, for ``cfg.debug``.
        dtype: of a raw file. By default uint16, as `save_binary` writes it; a file that looks like
            32-bit ids is an error then.

    Returns:
        ``(train, validation)``. Batches are `PackedBatch`, for ``model(**batch)``.

    Raises:
        TypeError, ValueError: as `TokenShards` and `shard_windows`.
    """
    shards = TokenShards(path, dtype="uint16" if dtype is None else dtype)
    if dtype is None:
        _require_16_bits(shards)
    return _loaders(shards, cfg, (train_path, val_path), tokenizer)


def from_npy_split(
    train_path: PathLike,
    val_path: PathLike,
    cfg: DataConfig,
    *,
    tokenizer: Any = None,
    dtype: Any = None,
) -> Loaders:
    """Loaders of two files, one for training and one for validation; see `from_binary`."""
    parts = []
    for path in (train_path, val_path):
        shards = TokenShards(path, dtype="uint16" if dtype is None else dtype)
        if dtype is None:
            _require_16_bits(shards)
        parts.append(shards)
    samples = [
        _windows(shards, cfg, shuffle=cfg.shuffle and at == 0) for at, shards in enumerate(parts)
    ]
    return _finish(samples[0], samples[1], cfg, tokenizer)


def from_files(
    paths: Sequence[PathLike] | PathLike,
    tokenizer: Any,
    cfg: DataConfig,
    *,
    train_path: PathLike | None = None,
    val_path: PathLike | None = None,
    bos_id: int | None = None,
    eos_id: int | None = None,
) -> Loaders:
    """Loaders of text files. Each file is a document. The tokens are kept in memory.

    Args:
        paths: UTF-8 files.
        tokenizer: of transformers.
        cfg: the options.
        train_path, val_path: also write the two parts there, as `save_binary` does.
        bos_id, eos_id: tokens to put before and behind each document.

    Returns:
        ``(train, validation)``; see `from_binary`.

    Raises:
        TypeError, ValueError: as `shard_windows`.
    """
    names = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    texts = (Path(name).read_text(encoding="utf-8") for name in names)
    shards = _shards_of(texts, tokenizer, bos_id, eos_id)
    return _loaders(shards, cfg, (train_path, val_path), tokenizer)


def from_hf(
    dataset_name: Any,
    tokenizer: Any,
    cfg: DataConfig,
    *,
    text_col: str = "text",
    split: str = "train",
    train_path: PathLike | None = None,
    val_path: PathLike | None = None,
    bos_id: int | None = None,
    eos_id: int | None = None,
) -> Loaders:
    """Loaders of a dataset on the hub. Each row is a document. The tokens are kept in memory.

    For more tokens than memory holds, use `write_shards`; for a stream, `pack_stream`.

    Args:
        dataset_name: its name, or a `datasets.Dataset`.
        tokenizer, cfg, train_path, val_path, bos_id, eos_id: as for `from_files`.
        text_col: the column of texts.
        split: the split that is divided.

    Returns:
        ``(train, validation)``; see `from_binary`.

    Raises:
        ImportError: if the ``data`` extra is not installed.
        TypeError, ValueError: as `shard_windows`.
    """
    import datasets

    dataset = dataset_name
    if isinstance(dataset_name, str):
        dataset = datasets.load_dataset(dataset_name, split=split)
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            "dataset_name must be a name on the hub or a datasets.Dataset, got "
            f"{type(dataset).__name__}; for a stream, use pack_stream"
        )
    if text_col not in dataset.column_names:
        raise ValueError(
            f"text_col must be one of {', '.join(dataset.column_names)}, got {text_col!r}"
        )
    texts = (row[text_col] for row in dataset.select_columns([text_col]))
    return _loaders(
        _shards_of(texts, tokenizer, bos_id, eos_id), cfg, (train_path, val_path), tokenizer
    )


def shards_in_memory(tokens: NDArray[Any], lengths: NDArray[np.int64]) -> TokenShards:
    """`TokenShards` of documents that follow each other in an array."""
    ends = DocumentEnds(len(lengths), EndsInArray(np.cumsum(lengths)))
    return TokenShards.of_files([ShardFile(Path("memory"), "memory", ArrayColumn(tokens), ends)])


def _shards_of(texts: Iterable[Any], tokenizer: Any, bos: Any, eos: Any) -> TokenShards:
    encoder = TextEncoder(tokenizer, bos, eos)
    parts: list[Documents] = []
    batch: list[str] = []
    first = 0
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            parts.append(_narrow(encoder(batch, first)))
            first, batch = first + len(batch), []
    parts.append(_narrow(encoder(batch, first)))
    return shards_in_memory(
        np.concatenate([each.tokens for each in parts]),
        np.concatenate([each.lengths for each in parts]),
    )


def _narrow(documents: Documents) -> Documents:
    return documents._replace(tokens=documents.tokens.astype(np.int32))


def _windows(shards: TokenShards, cfg: DataConfig, **options: Any) -> Any:
    isolate = shards.has_boundaries if cfg.isolate_documents is None else cfg.isolate_documents
    return shard_windows(
        shards, cfg.seq_len, stride=cfg.stride, isolate_documents=isolate, seed=cfg.seed, **options
    )


def _loaders(
    shards: TokenShards, cfg: DataConfig, paths: tuple[Any, Any], tokenizer: Any
) -> Loaders:
    train, validation = _windows(shards, cfg, split=cfg.split, shuffle=cfg.shuffle)
    for part, path in zip((train, validation), paths):
        if path is not None:
            save_binary(shards.tokens(*part.bounds), path, _file_dtype(shards))
    return _finish(train, validation, cfg, tokenizer)


def _file_dtype(shards: TokenShards) -> np.dtype[Any]:
    """That of the file; for tokens in memory, the smallest that holds them."""
    if shards.files[0].format != "memory":
        return shards.dtype
    largest = int(shards.tokens(0, shards.num_tokens).max(initial=0))
    return np.dtype("<u2") if largest < 1 << 16 else np.dtype("<u4")


def _finish(
    train: ShardWindows, validation: ShardWindows, cfg: DataConfig, tokenizer: Any
) -> Loaders:
    if cfg.debug:
        if tokenizer is None:
            raise ValueError("tokenizer must be given with cfg.debug, which prints text")
        from ..chat.preview import preview

        rows = [train[at] for at in range(min(as_integer("debug_n", cfg.debug_n), len(train)))]
        shown = preview(rows, tokenizer, n=cfg.debug_n)
        print(shown.render("color" if sys.stdout.isatty() else "marks"))
    options: dict[str, Any] = {"num_workers": cfg.num_workers, "pin_memory": cfg.pin_memory}
    return (
        ShardLoader(train, cfg.batch_size, **options),
        ShardLoader(validation, cfg.batch_size, **options),
    )


def _require_16_bits(shards: TokenShards) -> None:
    """Raise if the halves of a raw file alternate as those of 32-bit ids do."""
    for file in shards.files:
        if file.format != "raw" or file.num_tokens < 4:
            continue
        start = file.tokens.array[: min(file.num_tokens, _CHECKED) // 2 * 2]
        if not start[1::2].any() and start[::2].any():
            raise ValueError(
                f"dtype must be given for {file.path}: every second 16-bit id is 0, as in a file "
                "of 32-bit ids; pass dtype='uint32' or dtype='uint16'"
            )
