"""Packing into a `datasets.Dataset`: each bin of a plan becomes a row of ``capacity`` slots.

Rows are made in blocks with vectorized gathers, and the arrays go to Arrow directly, without lists
of Python integers. Without a cache directory, memory holds the tokens and all rows. With one, the
dataset is a memory-mapped file, and memory holds only a few blocks of rows at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    import datasets
    import pyarrow as pa
    from datasets.arrow_writer import ArrowWriter
    from datasets.fingerprint import Hasher, generate_random_fingerprint
    from datasets.table import InMemoryTable
except ImportError as error:
    raise ImportError(
        "pack_dataset needs datasets and pyarrow: pip install 'tokenpack[data]'"
    ) from error

from ...checks import IGNORE_INDEX, as_integer, at_least_one
from ...files import written_whole
from ...packing import Packer, PackResult
from ..row_layout import RowLayout
from ..tokens import Tokens, flatten_tokens, plan_of, require_same_lengths

COLUMNS = ("input_ids", "attention_mask", "labels", "position_ids", "seq_lengths")
_BLOCK_TOKENS = 1 << 22  # slots per block and column


def pack_dataset(
    token_ids: Any,
    capacity: int,
    strategy: str = "auto",
    seed: int | None = None,
    padding_value: int = 0,
    label_padding_value: int = IGNORE_INDEX,
    *,
    labels: Any = None,
    max_sequences: int | None = None,
    window: int | None = None,
    overlong: str = "error",
    drop_empty: bool = False,
    columns: Sequence[str] = COLUMNS,
    cache_dir: str | PathLike[str] | None = None,
    num_proc: int | None = None,
    progress: bool | None = None,
) -> datasets.Dataset:
    """Pack token sequences into the rows of a dataset.

    Args:
        token_ids: the sequences: a list of lists, tuples, NumPy arrays or memory maps of any
            integer type and byte order, torch CPU tensors of any integer type, or series. Or one
            column of lists: an Arrow array (list, large list or list view, also chunked), a column
            of `datasets` in any format or with a transform, as ``ds["input_ids"]``, a pandas or
            polars series (docs/inputs.md).
        capacity: slots per row.
        strategy, seed, max_sequences, window, overlong, drop_empty: as for `pack_lengths`.
        padding_value, label_padding_value, labels, columns, cache_dir, num_proc, progress: as for
            `pack_dataset_from_result`.

    Returns:
        A dataset with one row per bin; see `pack_dataset_from_result`.

    Raises:
        ImportError: if the ``data`` extra is not installed.
        TypeError, ValueError: as in `pack_lengths` and `pack_dataset_from_result`.
    """
    packer = Packer(
        capacity,
        strategy,
        seed,
        max_sequences=max_sequences,
        window=window,
        overlong=overlong,
        drop_empty=drop_empty,
    )
    tokens = flatten_tokens(token_ids, empty=drop_empty)
    return pack_dataset_from_result(
        plan_of(packer, tokens, "token_ids"),
        tokens,
        padding_value,
        label_padding_value,
        labels=labels,
        columns=columns,
        cache_dir=cache_dir,
        num_proc=num_proc,
        progress=progress,
    )


def pack_dataset_from_result(
    result: PackResult,
    token_ids: Any,
    padding_value: int = 0,
    label_padding_value: int = IGNORE_INDEX,
    *,
    labels: Any = None,
    columns: Sequence[str] = COLUMNS,
    cache_dir: str | PathLike[str] | None = None,
    num_proc: int | None = None,
    progress: bool | None = None,
) -> datasets.Dataset:
    """Build the dataset that a plan describes: one row per bin.

    Args:
        result: the plan.
        token_ids: the sequences of the plan, as in `pack_dataset`.
        padding_value: the value of ``input_ids`` at padding.
        label_padding_value: the value of ``labels`` where the loss ignores them.
        labels: labels of the same lengths as the sequences, in any form too. By default, the
            tokens.
        columns: the columns to make, from `COLUMNS`.
        cache_dir: a folder for the rows. The rows are written to a file and memory-mapped, and the
            next call with the same plan, tokens and values reuses the file. By default, the rows
            stay in memory.
        num_proc: how many blocks of rows to make in parallel. Threads make them and share the
            tokens, because NumPy releases the GIL.
        progress: whether to show a progress bar. By default, the setting of `datasets` decides.

    Returns:
        A dataset with the requested columns:

        - ``input_ids``: list of int32 (int64 if a token needs it), ``capacity`` long.
        - ``attention_mask``: list of int8, 1 at tokens and 0 at padding.
        - ``labels``: like ``input_ids``, for a loss that shifts the labels, as in Hugging Face
          models. The label of a token is the token itself. It is ``label_padding_value`` at padding
          and at the first token of every sequence, because that token would be predicted from the
          previous sequence.
        - ``position_ids``: list of int32, from 0 in every sequence and in the padding.
        - ``seq_lengths``: list of int32, the number of tokens of each sequence in the row.

        An attention mask of ones and zeros does not separate the sequences of a row. Use
        `collate_packed_rows` to make batches from rows (with a `Trainer`, also set
        ``remove_unused_columns=False``). If you make batches yourself, a transformers model derives
        the boundaries from ``position_ids`` only if it gets no mask and ``use_cache=False``.

    Raises:
        ImportError: if the ``data`` extra is not installed.
        TypeError: if tokens or labels are not integers.
        ValueError: if tokens or labels do not match the plan, or a column is unknown.
    """
    make = _RowMaker(result, token_ids, labels, padding_value, label_padding_value, columns)
    if num_proc is not None:
        num_proc = at_least_one("num_proc", num_proc)
    if cache_dir is None:
        return _in_memory(make, num_proc or 1, progress)
    return _on_disk(make, Path(cache_dir), num_proc or 1, progress)


class _RowMaker:
    """Makes the rows of a block of bins, as an Arrow record batch."""

    def __init__(
        self,
        result: PackResult,
        token_ids: Any,
        labels: Any,
        padding_value: int,
        label_padding_value: int,
        columns: Sequence[str],
    ) -> None:
        unknown = [name for name in columns if name not in COLUMNS]
        if unknown or not columns or len(set(columns)) < len(columns):
            raise ValueError(
                f"columns must be one or more of {', '.join(COLUMNS)}, each once, "
                f"got {list(columns)}"
            )
        self.result = result
        self.columns = tuple(columns)
        self.tokens = flatten_tokens(token_ids, empty=True)
        self.label_tokens = self.tokens
        if labels is not None:
            self.label_tokens = flatten_tokens(labels, "labels", empty=True)
            require_same_lengths(self.tokens, "token_ids", self.label_tokens, "labels")
        self.padding_value = as_integer("padding_value", padding_value)
        self.label_padding_value = as_integer("label_padding_value", label_padding_value)
        self._dtypes = {
            "input_ids": _token_dtype(self.tokens, self.padding_value),
            "labels": _token_dtype(self.label_tokens, self.label_padding_value),
            "attention_mask": np.dtype(np.int8),
            "position_ids": np.dtype(np.int32),
            "seq_lengths": np.dtype(np.int32),
        }
        RowLayout(result, self.tokens.offsets)  # raises if the plan does not match the tokens

    @property
    def features(self) -> datasets.Features:
        kinds = {name: datasets.Value(self._dtypes[name].name) for name in self.columns}
        return datasets.Features({name: datasets.List(kind) for name, kind in kinds.items()})

    def blocks(self) -> list[tuple[int, int]]:
        """Return the first and last bin (exclusive) of each block."""
        rows = max(1, _BLOCK_TOKENS // self.result.capacity)
        total = len(self.result)
        return [(first, min(first + rows, total)) for first in range(0, total, rows)]

    def __call__(self, block: tuple[int, int]) -> pa.RecordBatch:
        first, last = block
        rows = RowLayout(self.result, self.tokens.offsets, first=first, last=last)
        arrays = [self._column(rows, name) for name in self.columns]
        return pa.RecordBatch.from_arrays(arrays, schema=self.features.arrow_schema)

    def _column(self, rows: RowLayout, name: str) -> pa.ListArray:
        dtype = self._dtypes[name]
        if name == "seq_lengths":
            bounds = rows.row_bounds.astype(np.int32)
            return pa.ListArray.from_arrays(bounds, rows.lengths.astype(dtype))
        make: dict[str, Callable[[], NDArray[Any]]] = {
            "input_ids": lambda: rows.tokens(self.tokens.values, self.padding_value, dtype),
            "labels": lambda: rows.labels(
                self.label_tokens.values, self.label_padding_value, dtype
            ),
            "position_ids": lambda: rows.position_ids(dtype),
            "attention_mask": lambda: rows.attention_mask(dtype),
        }
        bounds = np.arange(rows.num_rows + 1, dtype=np.int32) * rows.capacity
        return pa.ListArray.from_arrays(bounds, make[name]().reshape(-1))

    def fingerprint(self) -> str:
        """Return a hash of everything that determines the rows."""
        result = self.result
        arrays = [result.items, result.offsets, result.item_lengths]
        arrays += [] if result.item_starts is None else [result.item_starts]
        arrays += [self.tokens.values, self.tokens.offsets]
        arrays += [] if self.label_tokens is self.tokens else [self.label_tokens.values]
        settings = [
            *(self.columns, self.padding_value, self.label_padding_value, result.capacity),
            *((array.dtype.str, array.shape) for array in arrays),
        ]
        hasher = Hasher()
        hasher.update(settings)
        for array in arrays:
            hasher.m.update(np.ascontiguousarray(array).view(np.uint8).data)
        return hasher.hexdigest()


def _token_dtype(tokens: Tokens, padding: int) -> np.dtype[Any]:
    """Return int32, or int64 if a token or the padding value does not fit into int32."""
    values = tokens.values
    # Dtypes that fit into int32 need no scan of the values.
    fits = np.can_cast(values.dtype, np.int32) or not len(values)
    fits = fits or (values.min() >= -(2**31) and values.max() < 2**31)
    return np.dtype(np.int32 if fits and -(2**31) <= padding < 2**31 else np.int64)


def _in_memory(make: _RowMaker, threads: int, progress: bool | None) -> datasets.Dataset:
    features = make.features
    batches = list(_make_blocks(make, threads, progress))
    table = pa.Table.from_batches(batches, schema=features.arrow_schema)
    # A random fingerprint, because hashing the content would copy the whole table.
    return datasets.Dataset(
        InMemoryTable(table),
        info=datasets.DatasetInfo(features=features),
        fingerprint=generate_random_fingerprint(),
    )


def _on_disk(
    make: _RowMaker, folder: Path, threads: int, progress: bool | None
) -> datasets.Dataset:
    folder.mkdir(parents=True, exist_ok=True)
    fingerprint = make.fingerprint()
    path = folder / f"packed-{fingerprint}.arrow"
    rows = _read(path, make)
    if rows is None:
        # Opened here: ArrowWriter would open a temporary file that only its owner may read.
        with (
            written_whole(path) as partial,
            partial.open("wb") as file,
            ArrowWriter(stream=file, features=make.features) as writer,
        ):
            for batch in _make_blocks(make, threads, progress):
                writer.write_table(pa.Table.from_batches([batch]))
            writer.finalize()
        rows = datasets.Dataset.from_file(str(path))
    return rows


def _read(path: Path, make: _RowMaker) -> datasets.Dataset | None:
    """Return the rows of an earlier call, or None if there is no file or it is damaged."""
    try:
        rows = datasets.Dataset.from_file(str(path))
    except (pa.ArrowInvalid, OSError):
        return None
    # pyarrow accepts a file that was cut between two record batches.
    whole = len(rows) == len(make.result) and rows.features == make.features
    return rows if whole else None


def _make_blocks(make: _RowMaker, threads: int, progress: bool | None) -> Iterator[pa.RecordBatch]:
    """Yield the blocks in order. Up to ``threads`` further blocks are made ahead."""
    options = {} if progress is None else {"disable": not progress}
    bar = datasets.utils.tqdm(total=len(make.result), desc="Packing", unit=" rows", **options)
    with bar, ThreadPoolExecutor(threads) as pool:
        ahead: deque[tuple[int, Future[pa.RecordBatch]]] = deque()
        for first, last in make.blocks():
            ahead.append((last - first, pool.submit(make, (first, last))))
            if len(ahead) > threads:
                count, future = ahead.popleft()
                yield future.result()
                bar.update(count)
        while ahead:
            count, future = ahead.popleft()
            yield future.result()
            bar.update(count)
