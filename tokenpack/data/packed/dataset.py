"""A plan carried out into a `datasets.Dataset`: each bin a row of ``capacity`` slots.

Rows are made in blocks by the vectorised gathers of `tokens`, and go to Arrow as they are: no list
of Python integers exists at any time. Without a cache directory the dataset is in memory, which
then holds the tokens and the rows; with one it is a file, memory-mapped, and memory holds a block.
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

from ...checks import IGNORE_INDEX, at_least_one
from ...files import written_whole
from ...packing import Packer, PackResult
from ..row_layout import RowLayout
from ..tokens import Tokens, flatten_tokens, require_same_lengths

COLUMNS = ("input_ids", "attention_mask", "labels", "position_ids", "seq_lengths")
_BLOCK_TOKENS = 1 << 22  # of one column, in a block


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
        token_ids: the sequences: lists, NumPy arrays or tensors of integers, an Arrow column of
            lists, or a column of a `datasets.Dataset`, ``ds["input_ids"]``.
        capacity: slots of a row.
        strategy, seed, max_sequences, window, overlong, drop_empty: as for `pack_lengths`.
        padding_value, label_padding_value, labels, columns, cache_dir, num_proc, progress: as for
            `pack_dataset_from_result`.

    Returns:
        A dataset of one row per bin, as `pack_dataset_from_result` says.

    Raises:
        ImportError: if the ``data`` extra is missing.
        TypeError, ValueError: as `pack_lengths` and `pack_dataset_from_result`, for bad input.
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
        packer.pack(tokens.lengths),
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
    """Carry a plan out: a dataset of one row per bin.

    Args:
        result: the plan.
        token_ids: the sequences that it was made for, as in `pack_dataset`.
        padding_value: what stands in ``input_ids`` where there is no token.
        label_padding_value: what stands in ``labels`` where nothing is to be predicted.
        labels: labels of their own for the sequences, as long as those; by default the tokens.
        columns: which columns to make, of `COLUMNS`.
        cache_dir: a folder for the rows. They are written there, memory-mapped, and found again by
            the next call with the same plan, tokens and values. None keeps them in memory.
        num_proc: blocks of rows made at once. They are made by threads, which share the tokens:
            NumPy lets go of the interpreter's lock.
        progress: show a bar; by default as `datasets` is set.

    Returns:
        A dataset with, of these, the columns asked for:

        - ``input_ids`` list of int32 (int64 if the tokens need it), ``capacity`` long;
        - ``attention_mask`` list of int8: 1 at tokens, 0 at padding;
        - ``labels`` like ``input_ids``, for a loss that shifts, as Hugging Face models' does: the
          token itself, but ``label_padding_value`` at the first of every sequence, which would
          else be predicted from the sequence before it, and at padding;
        - ``position_ids`` list of int32, from 0 in every sequence and in the padding;
        - ``seq_lengths`` list of int32, tokens of each sequence in the row.

        An attention mask of ones and zeros does not tell sequences apart: give rows to a model by
        `collate_packed_rows`, which does (and to a `Trainer` with ``remove_unused_columns=False``).
        By hand, a model of transformers finds the boundaries by ``position_ids`` if it is given no
        mask and ``use_cache=False``, and only then.

    Raises:
        ImportError: if the ``data`` extra is missing.
        TypeError: if tokens or labels are no integers.
        ValueError: if they are not what was planned for, or a column is unknown.
    """
    make = _RowMaker(result, token_ids, labels, padding_value, label_padding_value, columns)
    if num_proc is not None:
        num_proc = at_least_one("num_proc", num_proc)
    if cache_dir is None:
        return _in_memory(make, num_proc or 1, progress)
    return _on_disk(make, Path(cache_dir), num_proc or 1, progress)


class _RowMaker:
    """Makes the rows of any bins of a plan, as an Arrow record batch."""

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
                f"columns must be some of {', '.join(COLUMNS)}, each once, got {list(columns)}"
            )
        self.result = result
        self.columns = tuple(columns)
        self.tokens = flatten_tokens(token_ids, empty=True)
        self.label_tokens = self.tokens
        if labels is not None:
            self.label_tokens = flatten_tokens(labels, "labels", empty=True)
            require_same_lengths(self.tokens, "token_ids", self.label_tokens, "labels")
        self.padding_value, self.label_padding_value = padding_value, label_padding_value
        self._dtypes = {
            "input_ids": _width(self.tokens, padding_value),
            "labels": _width(self.label_tokens, label_padding_value),
            "attention_mask": np.dtype(np.int8),
            "position_ids": np.dtype(np.int32),
            "seq_lengths": np.dtype(np.int32),
        }
        RowLayout(result, self.tokens.offsets)  # says whether the plan is of these tokens

    @property
    def features(self) -> datasets.Features:
        kinds = {name: datasets.Value(self._dtypes[name].name) for name in self.columns}
        return datasets.Features({name: datasets.List(kind) for name, kind in kinds.items()})

    def blocks(self) -> list[tuple[int, int]]:
        """First and last bin of each block."""
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
        """The same for the same rows."""
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


def _width(tokens: Tokens, padding: int) -> np.dtype[Any]:
    """int32, or int64 where a value is past it. Narrower integers are not looked at."""
    values = tokens.values
    narrow = values.dtype.itemsize < 4 or values.dtype == np.int32
    if isinstance(padding, bool) or not isinstance(padding, (int, np.integer)):
        raise TypeError(f"padding must be an integer, got {padding!r}")
    if not -(2**63) <= padding < 2**63:
        raise ValueError(f"padding must be of at most 64 bits, got {padding}")
    inside = narrow or not len(values) or (values.min() >= -(2**31) and values.max() < 2**31)
    return np.dtype(np.int32 if inside and -(2**31) <= padding < 2**31 else np.int64)


def _in_memory(make: _RowMaker, threads: int, progress: bool | None) -> datasets.Dataset:
    features = make.features
    batches = list(_made(make, threads, progress))
    table = pa.Table.from_batches(batches, schema=features.arrow_schema)
    # A fingerprint by content would copy the whole table to hash it.
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
    rows = _read(path)
    if rows is None:
        with (
            written_whole(path) as partial,
            ArrowWriter(path=str(partial), features=make.features) as writer,
        ):
            for batch in _made(make, threads, progress):
                writer.write_table(pa.Table.from_batches([batch]))
            writer.finalize()
        rows = datasets.Dataset.from_file(str(path))
    return rows


def _read(path: Path) -> datasets.Dataset | None:
    """The rows of an earlier call; None where there are none, or the file was damaged since."""
    try:
        return datasets.Dataset.from_file(str(path))
    except (pa.ArrowInvalid, OSError):
        return None


def _made(make: _RowMaker, threads: int, progress: bool | None) -> Iterator[pa.RecordBatch]:
    """The blocks in order, a few being made ahead."""
    blocks = make.blocks()
    # Rows, not blocks: a block is nothing that a user knows.
    shown = {} if progress is None else {"disable": not progress}
    bar = datasets.utils.tqdm(total=len(make.result), desc="Packing", unit=" rows", **shown)
    with bar, ThreadPoolExecutor(threads) as pool:
        ahead: deque[tuple[int, Future[pa.RecordBatch]]] = deque()
        for first, last in blocks:
            ahead.append((last - first, pool.submit(make, (first, last))))
            if len(ahead) > threads:
                count, future = ahead.popleft()
                yield future.result()
                bar.update(count)
        while ahead:
            count, future = ahead.popleft()
            yield future.result()
            bar.update(count)
