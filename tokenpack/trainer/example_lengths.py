"""The number of tokens of every example of a dataset, found in the cheapest way.

    source[i] = dataset[i][length column], or ones in its attention_mask, or len(input_ids)
    target[i] = len(labels) without trailing -100, or 0 without labels

A plan needs the lengths of all examples before the first step. A length column contains them. For a
`datasets.Dataset` without one, they are the differences of the offsets that Arrow stores with a
column of lists, so no tokens are read. (The values of masks, and of labels that end with -100, are
read.) If a dataset makes its items on demand, each item is made once, and the result is cached.
"""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import IGNORE_INDEX
from ..files import written_whole
from ..segments import offsets_of

logger = logging.getLogger(__name__)

KINDS = ("seq2seq", "causal")
_MASK = "attention_mask"
_TARGET_LENGTHS = ("labels_length", "label_length")
_BLOCK = 1000  # items per call of __getitems__

# By id, because many datasets compare by content or are not hashable. An entry is removed with its
# dataset.
_cached: dict[int, tuple[weakref.ref[Any], dict[tuple[Any, ...], NDArray[np.int64]]]] = {}


def dataset_lengths(
    dataset: Any,
    length_column_name: str = "input_length",
    *,
    source_column: str = "input_ids",
    target_column: str = "labels",
    kind: str = "seq2seq",
    collator: Any = None,
    show_progress: bool | None = None,
    cache: bool = True,
) -> NDArray[np.int64]:
    """Return the number of tokens of each example.

    The source length is, in this order: the column ``length_column_name``; the number of ones in
    ``attention_mask``, which excludes padding; the length of ``source_column``. The target length
    is the length of ``target_column`` without trailing -100, or a column ``labels_length`` or
    ``label_length`` of integers, or 0.

    A `datasets.Dataset` is read by column, also after ``select``, ``shuffle`` or
    ``train_test_split``. Other datasets, and a `datasets.Dataset` with a transform, are read item
    by item.

    Args:
        dataset: a map-style dataset: it has a length, and its items are mappings of lists, arrays
            or tensors.
        length_column_name: a column, or key of items, that contains the tokens of the source, or of
            the whole example if there is no target.
        source_column: token ids of the encoder, or of a causal model.
        target_column: token ids of the decoder.
        kind: "seq2seq", or "causal" if an example is a single sequence.
        collator: the collator. If it changes lengths, it must have a method
            ``lengths(raw_lengths (n, 2)) -> (n, 2)``. Other collators have no effect.
        show_progress: whether to show the progress of a pass over items. By default, this follows
            the verbosity of transformers.
        cache: cache lengths that require a pass over values or items: in memory while the dataset
            exists, and next to the files of a `datasets.Dataset`, by its fingerprint.

    Returns:
        ``(n, 2)`` int64, source and target tokens. ``(n,)`` if ``kind`` is "causal".

    Raises:
        TypeError: if the dataset has no length, an item is not a mapping, or a column does not
            contain lists of integers.
        ValueError: if the dataset has neither the length column nor the source column, a sequence
            is not one-dimensional, or ``kind`` is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    columns = _Columns(length_column_name, source_column, target_column if kind == KINDS[0] else "")
    count = _length_of(dataset)
    found = _from_cache(dataset, columns.key, count) if cache else None
    if found is None:
        found = _measure(dataset, columns, count, show_progress, cache)
    if (offers := getattr(collator, "lengths", None)) is not None:
        found = _from_collator(offers(found), count)
    return found.sum(1) if kind == "causal" else found.copy()


class _Columns:
    """The names of the columns. ``target`` is empty for causal models."""

    def __init__(self, length: str, source: str, target: str) -> None:
        self.length, self.source, self.target = length, source, target

    @property
    def key(self) -> tuple[str, ...]:
        return (self.length, self.source, self.target)

    def missing(self, found: Any) -> ValueError:
        return ValueError(
            f"dataset must have a column {self.length!r} of lengths (length_column_name) or "
            f"{self.source!r} of token ids (source_column), got {', '.join(found) or 'none'}"
        )


def _length_of(dataset: Any) -> int:
    try:
        return len(dataset)
    except TypeError:
        raise TypeError(
            "dataset must have a length, to plan batches of all its examples, got "
            f"{type(dataset).__name__}, which has no length"
        ) from None


def _measure(
    dataset: Any, columns: _Columns, count: int, show_progress: bool | None, cache: bool
) -> NDArray[np.int64]:
    """``(n, 2)`` int64, from the cache, by column, or by item."""
    names = _arrow_columns(dataset)
    if names is not None and columns.length not in names and columns.source not in names:
        raise columns.missing(names)
    cheap = names is not None and (columns.length in names or _MASK not in names)
    path = None if cheap or not cache else _cache_file(dataset, columns)
    found = None if path is None else _load(path, count)
    if found is None:
        if names is not None:
            found = _by_column(dataset, columns, names)
        else:
            found = _by_item(dataset, columns, count, show_progress)
        if path is not None:
            _save(path, found)
    if cache and not cheap:
        _to_cache(dataset, columns.key, found)
    return found


def _from_collator(offered: Any, count: int) -> NDArray[np.int64]:
    lengths = np.asarray(offered)
    if lengths.shape != (count, 2) or lengths.dtype.kind not in "iu":
        raise ValueError(
            f"collator.lengths must return ({count}, 2) integers, source and target of each "
            f"example, got {lengths.dtype} of shape {lengths.shape}"
        )
    return lengths.astype(np.int64)


# --------------------------------------------------------------------------------------- by column


def _arrow_columns(dataset: Any) -> list[str] | None:
    """The columns of a `datasets.Dataset` whose items are its rows. None for other datasets."""
    if not (hasattr(dataset, "with_format") and hasattr(dataset, "data")):
        return None
    form = getattr(dataset, "format", None)
    if not isinstance(form, Mapping):
        return list(dataset.column_names)
    if form.get("type") == "custom":
        return None  # a transform may make items with other columns
    if form.get("output_all_columns"):
        return list(dataset.column_names)
    return list(form.get("columns") or dataset.column_names)  # those that items have


def _by_column(dataset: Any, columns: _Columns, names: list[str]) -> NDArray[np.int64]:
    if columns.length in names:
        source = _numbers(dataset, columns.length)
    elif _MASK in names:
        source = _count_rows(dataset, _MASK, _ones)
    else:
        source = _count_rows(dataset, columns.source, None)
    target = np.zeros_like(source)
    if columns.target:
        given = [name for name in _TARGET_LENGTHS if name in names]
        if columns.target in names:
            target = _count_rows(dataset, columns.target, _without_trailing)
        elif given:
            target = _numbers(dataset, given[0])
    return np.stack([source, target], axis=1)


def _numbers(dataset: Any, name: str) -> NDArray[np.int64]:
    column = dataset.data.column(name)
    if column.null_count:
        raise TypeError(f"{name} must be integers, got a column with {column.null_count} nulls")
    values = column.to_numpy()
    if values.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got a column of {column.type}")
    return _rows_of(dataset, values.astype(np.int64))


def _count_rows(dataset: Any, name: str, count: Any) -> NDArray[np.int64]:
    """The length of each row of a column of lists, or ``count(values, offsets)`` if it is given.

    This counts the whole table first and then takes the rows that the dataset selects, because
    taking integers is cheaper than taking lists.
    """
    import pyarrow.compute

    column = dataset.data.column(name)
    kind = getattr(column.type, "value_type", None)
    if kind is None or not (pyarrow.types.is_integer(kind) or pyarrow.types.is_boolean(kind)):
        raise TypeError(f"{name} must be a column of lists of integers, got {column.type}")
    if column.null_count and (null := _rows_of(dataset, np.asarray(column.is_null()))).any():
        raise TypeError(f"{name}[{null.argmax()}] must be a list of integers, got null")
    parts = []
    for chunk in column.chunks:
        lengths = np.asarray(pyarrow.compute.list_value_length(chunk).fill_null(0), np.int64)
        if count is not None:
            values = chunk.flatten().to_numpy(zero_copy_only=False)
            lengths = count(values, offsets_of(lengths))
        parts.append(lengths)
    return _rows_of(dataset, np.concatenate(parts) if parts else np.empty(0, np.int64))


def _rows_of(dataset: Any, values: NDArray[Any]) -> NDArray[Any]:
    """The values of the rows that the dataset selects from its table, in its order."""
    indices = getattr(dataset, "_indices", None)
    return values if indices is None else values[indices.column(0).to_numpy()]


def _ones(values: NDArray[Any], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """``(n,)`` int64, the number of values other than 0 in each row."""
    zeros = np.flatnonzero(values == 0)
    return np.diff(offsets) - np.diff(np.searchsorted(zeros, offsets))


def _without_trailing(values: NDArray[Any], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """``(n,)`` int64, the length of each row without trailing -100."""
    lengths = np.diff(offsets)
    ends = offsets[1:][lengths > 0]
    if not (values[ends - 1] == IGNORE_INDEX).any():
        return lengths
    kept = np.flatnonzero(values != IGNORE_INDEX)
    kept_ends = np.concatenate(([0], kept + 1))[np.searchsorted(kept, offsets[1:])]
    return np.maximum(kept_ends - offsets[:-1], 0)


# ----------------------------------------------------------------------------------------- by item


def _by_item(
    dataset: Any, columns: _Columns, count: int, show_progress: bool | None
) -> NDArray[np.int64]:
    from tqdm.auto import tqdm

    lengths = np.zeros((count, 2), np.int64)
    shown = _shows_progress() if show_progress is None else show_progress
    items = tqdm(_items(dataset, count), "Measuring examples", count, disable=not shown)
    for at, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise TypeError(f"dataset[{at}] must be a mapping, got {type(item).__name__}")
        lengths[at] = _source_of(item, at, columns), _target_of(item, at, columns)
    return lengths


def _shows_progress() -> bool:
    from transformers.utils import logging as transformers_logging

    quiet = transformers_logging.get_verbosity() > transformers_logging.WARNING
    return not quiet and transformers_logging.is_progress_bar_enabled()


def _items(dataset: Any, count: int) -> Iterator[Any]:
    several = getattr(dataset, "__getitems__", None)
    if several is None:
        yield from (dataset[at] for at in range(count))
        return
    for first in range(0, count, _BLOCK):
        yield from several(list(range(first, min(first + _BLOCK, count))))


def _source_of(item: Mapping[str, Any], at: int, columns: _Columns) -> int:
    if columns.length in item:
        return _number(item[columns.length], f"dataset[{at}][{columns.length!r}]")
    if columns.source not in item:
        raise columns.missing(item)
    if item.get(_MASK) is not None:
        return int(np.count_nonzero(_row(item[_MASK], f"dataset[{at}][{_MASK!r}]")))
    return len(_row(item[columns.source], f"dataset[{at}][{columns.source!r}]"))


def _target_of(item: Mapping[str, Any], at: int, columns: _Columns) -> int:
    if not columns.target:
        return 0
    if item.get(columns.target) is not None:
        labels = _row(item[columns.target], f"dataset[{at}][{columns.target!r}]")
        return int(_without_trailing(labels, np.array([0, len(labels)]))[0])
    for name in _TARGET_LENGTHS:
        if name in item:
            return _number(item[name], f"dataset[{at}][{name!r}]")
    return 0


def _row(tokens: Any, name: str) -> NDArray[Any]:
    """The tokens of one example as a NumPy array."""
    array = np.asarray(tokens.cpu() if hasattr(tokens, "cpu") else tokens)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one row of tokens, got shape {array.shape}")
    if array.size and array.dtype.kind not in "iub":
        raise TypeError(f"{name} must be integers, got {array.dtype}")
    return array


def _number(value: Any, name: str) -> int:
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be an integer, got {value!r:.80}")
    return int(array.reshape(()))


# ------------------------------------------------------------------------------------------- cache


def _state(dataset: Any, key: tuple[Any, ...]) -> tuple[Any, ...]:
    """``key`` and the fingerprint, because a format is set in place."""
    return (*key, getattr(dataset, "_fingerprint", None))


def _from_cache(dataset: Any, key: tuple[Any, ...], count: int) -> NDArray[np.int64] | None:
    _, entries = _cached.get(id(dataset), (None, {}))
    found = entries.get(_state(dataset, key))
    return found if found is not None and len(found) == count else None


def _to_cache(dataset: Any, key: tuple[Any, ...], lengths: NDArray[np.int64]) -> None:
    identity = id(dataset)
    if identity not in _cached:
        try:
            reference = weakref.ref(dataset, lambda _: _cached.pop(identity, None))
        except TypeError:  # for example a list, which has no weak references
            return
        _cached[identity] = reference, {}
    _cached[identity][1][_state(dataset, key)] = lengths


def _cache_file(dataset: Any, columns: _Columns) -> Path | None:
    """The cache file next to the files of a `datasets.Dataset`. None if it has no files."""
    files = getattr(dataset, "cache_files", None)
    fingerprint = getattr(dataset, "_fingerprint", None)
    if not files or not fingerprint:
        return None
    name = hashlib.sha256(repr((fingerprint, *columns.key)).encode()).hexdigest()[:16]
    return Path(files[0]["filename"]).parent / f"tokenpack-lengths-{name}.npy"


def _load(path: Path, count: int) -> NDArray[np.int64] | None:
    try:
        lengths = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):  # missing or incomplete
        return None
    valid = lengths.shape == (count, 2) and lengths.dtype == np.int64
    return lengths if valid else None


def _save(path: Path, lengths: NDArray[np.int64]) -> None:
    """Write the cache file. Other ranks may read or write it at the same time."""
    try:
        with written_whole(path) as partial, partial.open("wb") as file:
            np.save(file, lengths)
    except OSError as error:
        logger.info("cannot cache lengths in %s: %s", path, error)
