"""One column of values, however the caller holds it.

    column_of(values, name, expected)  ->  an Arrow array, a NumPy array, a tensor or a sequence

Arrow arrays, polars series, pandas series with Arrow data and whatever else offers the Arrow
PyCapsule protocol become Arrow arrays. A datasets column becomes its Arrow data if indexing it
gives the same values, and otherwise the values that indexing it gives. All else that holds values
in order is returned as it is, or as a list.

Nothing here imports torch, pyarrow, datasets, pandas or polars before the caller has imported them:
their objects are recognized by their attributes.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Formats of `datasets` in which integers have the values of the Arrow data.
_SAME_VALUES = (None, "python", "arrow", "numpy", "torch", "pandas", "polars")


def column_of(values: Any, name: str, expected: str) -> Any:
    """Return ``values`` as a `pyarrow.Array` or `ChunkedArray`, an array, a tensor or a sequence.

    Args:
        values: the values, in order.
        name: the argument's name, for error messages.
        expected: what the argument must be, for error messages.

    Raises:
        ImportError: if the values are Arrow data of another library and pyarrow is missing.
        TypeError: if ``values`` is a table, a mapping, a set, a text, or has no length; if it is a
            masked array with masked values; or if it is a datasets column that no row has.
    """
    if isinstance(values, (list, tuple)):
        return values
    if isinstance(values, np.ndarray):
        return without_mask(values, name)
    if (names := table_columns(values)) is not None:
        raise TypeError(
            f"{name} must be one column, got {type(values).__name__} with the columns "
            f"{', '.join(map(str, names)) or '(none)'}; pass one of them, as in table['input_ids']"
        )
    if isinstance(values, (str, bytes, Set)) or not hasattr(values, "__len__"):
        note = "; pass list(...) to read it first" if hasattr(values, "__iter__") else ""
        note = "" if isinstance(values, (str, bytes, Set)) else note
        raise TypeError(f"{name} must be {expected}, got {type(values).__name__}{note}")
    if hasattr(values, "source") and hasattr(values, "column_name"):
        return _from_datasets(values, name)
    if getattr(values, "is_nested", False):
        return list(values.unbind())
    if holds_arrow(values):
        return as_arrow(values, name)
    if hasattr(values, "iloc"):  # a pandas series: its index does not count
        return without_mask(values.to_numpy(), name)
    return values if hasattr(values, "ndim") or hasattr(values, "__getitem__") else list(values)


def table_columns(values: Any) -> list[Any] | None:
    """Return the column names of a table, a data frame, a dataset or a mapping, or None."""
    if isinstance(values, Mapping):
        return list(values)
    for attribute in ("column_names", "columns"):
        names = getattr(values, attribute, None)
        if names is not None and not callable(names):
            return list(names)
    return None


def holds_arrow(values: Any) -> bool:
    """Whether ``values`` is an Arrow array, or a series whose data is best read as one.

    A pandas series of NumPy data is not: `pandas` would convert each of its objects.
    """
    if isinstance(getattr(values, "dtype", None), np.dtype):
        return False
    offers = ("__arrow_c_stream__", "__arrow_c_array__", "__arrow_array__")
    return any(hasattr(each, offer) for each in (values, _array_in(values)) for offer in offers)


def as_arrow(values: Any, name: str) -> Any:
    """Return ``values``, for which `holds_arrow` is True, as a `pyarrow.Array` or `ChunkedArray`.

    Dictionaries are decoded, and extension types become their storage.
    """
    try:
        import pyarrow as pa
        import pyarrow.compute
    except ImportError as error:
        raise ImportError(
            f"{name} is a {type(values).__module__}.{type(values).__name__}, and reading it needs "
            "pyarrow: pip install 'tokenpack[data]'"
        ) from error
    if not isinstance(values, (pa.Array, pa.ChunkedArray)):
        read = pa.chunked_array if hasattr(values, "__arrow_c_stream__") else pa.array
        values = read(values)
    if isinstance(values.type, pa.BaseExtensionType):
        values = values.cast(values.type.storage_type)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if pa.types.is_run_end_encoded(values.type):
        values = pyarrow.compute.run_end_decode(values)
    return values


def is_arrow(column: Any) -> bool:
    """Whether a column from `column_of` is an Arrow array."""
    return hasattr(column, "null_count")


def arrow_to_numpy(column: Any, name: str) -> NDArray[Any]:
    """Return a flat Arrow array as a NumPy array.

    Raises:
        TypeError: if a value is null.
    """
    if column.null_count:
        at = int(np.flatnonzero(column.is_null())[0])
        raise TypeError(
            f"{name} must be integers, got a column with {column.null_count} nulls, the first at "
            f"{name}[{at}]"
        )
    if hasattr(column, "chunks"):
        return column.to_numpy()
    return column.to_numpy(zero_copy_only=False)


def has_values_of_its_table(dataset: Any, column: str) -> bool:
    """Whether indexing a `datasets.Dataset` gives the values of its Arrow table in a column.

    Not so under a transform, and not surely under a format with options, such as a dtype.
    """
    form = getattr(dataset, "format", None)
    if not isinstance(form, Mapping):
        return False
    given = form.get("output_all_columns") or column in (form.get("columns") or ())
    return bool(given) and form.get("type") in _SAME_VALUES and not form.get("format_kwargs")


def _from_datasets(column: Any, name: str) -> Any:
    """The values of a `datasets` column, from Arrow if indexing gives the same."""
    source, column_name = column.source, column.column_name
    if hasattr(source, "with_format") and has_values_of_its_table(source, column_name):
        return source.with_format("arrow")[column_name][:]
    try:
        return list(column)
    except KeyError as error:
        raise TypeError(
            f"{name} must be a column that the dataset's format or transform gives, got "
            f"{column_name!r}, and reading a row raises KeyError({error})"
        ) from error


def _array_in(values: Any) -> Any:
    """The array in a pandas series, in which older versions of pandas keep the Arrow protocol."""
    return getattr(values, "array", None) if hasattr(values, "iloc") else None


def without_mask(values: NDArray[Any], name: str) -> NDArray[Any]:
    """Return a plain array. Raises a TypeError if a value is masked."""
    if np.ma.is_masked(values):
        at = int(np.flatnonzero(np.ma.getmaskarray(values))[0])
        raise TypeError(f"{name} must have no masked values, got one at index {at}")
    return np.asarray(values)
