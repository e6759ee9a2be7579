"""Every kind of array, column and table, given to every function that takes tokens or lengths."""

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from tokenpack.data import pack_dataset, pack_stream, packed_collate_fn
from tokenpack.data.tokens import flatten_tokens
from tokenpack.packing import Packer, StreamPacker, pack_lengths

TOKENS = [[5, 6, 7], [8], [9, 10]]
LENGTHS = [3, 1, 2]


def dataset(column):
    return datasets.Dataset.from_dict({"x": column})


def column_of(given, **formatted):
    return dataset(given).with_format(**formatted)["x"]


def transformed(given):
    """A column that a transform makes of other values."""
    return dataset([0, 1, 2]).with_transform(lambda batch: {"x": [given[i] for i in batch["x"]]})[
        "x"
    ]


def series(given, index):
    return pd.Series(given, index=index)


class Polars:
    """A series of another Arrow library: it offers its data as a stream."""

    def __init__(self, given):
        self._array = pa.chunked_array([given])

    def __arrow_c_stream__(self, requested_schema=None):
        return self._array.__arrow_c_stream__(requested_schema)

    def null_count(self):
        return 0

    def __len__(self):
        return len(self._array)

    def __getitem__(self, at):
        return self._array[at].as_py()


OF_BOTH = {
    "list": lambda x: x,
    "tuple": tuple,
    "Arrow": pa.array,
    "Arrow, chunked": lambda x: pa.chunked_array([x[:1], x[1:]]),
    "datasets": lambda x: column_of(x),
    "datasets, numpy": lambda x: column_of(x, type="numpy"),
    "datasets, torch": lambda x: column_of(x, type="torch"),
    "datasets, arrow": lambda x: column_of(x, type="arrow"),
    "datasets, pandas": lambda x: column_of(x, type="pandas"),
    "datasets, numpy of int16": lambda x: column_of(x, type="numpy", dtype="int16"),
    "datasets, transform": transformed,
    "pandas": lambda x: series(x, [0, 1, 2]),
    "pandas, other index": lambda x: series(x, [2, 7, 0]),
    "pandas, text index": lambda x: series(x, ["c", "a", "b"]),
    "pandas, Arrow": lambda x: pd.Series(pd.array(x, dtype=pd.ArrowDtype(pa.array(x).type))),
    "polars": Polars,
}
INTEGERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", ">i4", ">u8"]
TOKEN_INPUTS = {
    **OF_BOTH,
    **{f"NumPy, {t}": lambda x, t=t: [np.array(row, t) for row in x] for t in INTEGERS},
    **{
        f"torch, {t}": lambda x, t=t: [torch.tensor(row, dtype=getattr(torch, t)) for row in x]
        for t in INTEGERS[:8]
    },
    "torch, mixed": lambda x: [
        torch.tensor(row, dtype=t) for row, t in zip(x, (torch.uint16, torch.int32, torch.int64))
    ],
    "NumPy, mixed": lambda x: [np.array(row, t) for row, t in zip(x, ("uint64", "int8", ">i2"))],
    "Arrow, large_list": lambda x: pa.array(x, pa.large_list(pa.int32())),
}
LENGTH_INPUTS = {
    **OF_BOTH,
    **{f"NumPy, {t}": lambda x, t=t: np.array(x, t) for t in INTEGERS},
    **{
        f"torch, {t}": lambda x, t=t: torch.tensor(x, dtype=getattr(torch, t)) for t in INTEGERS[:8]
    },
}
TABLES = {
    "Dataset": lambda: dataset(TOKENS),
    "pa.Table": lambda: pa.table({"x": TOKENS}),
    "DataFrame": lambda: pd.DataFrame({"x": TOKENS}),
}


def rows_of(rows):
    return [sorted(np.asarray(row["input_ids"]).tolist()) for row in rows]


TAKE_TOKENS = {
    "flatten_tokens": lambda x: (
        flatten_tokens(x).values.tolist(),
        flatten_tokens(x).offsets.tolist(),
    ),
    "pack_dataset": lambda x: rows_of(pack_dataset(x, 4, progress=False)),
    "pack_stream": lambda x: rows_of(pack_stream(x, 4)),
    "packed_collate_fn": lambda x: packed_collate_fn(4)(list(x)).input_ids.tolist(),
}
TAKE_LENGTHS = {
    "pack_lengths": lambda x: [each.tolist() for each in pack_lengths(x, 4).bins],
    "Packer.pack": lambda x: [each.tolist() for each in Packer(4).pack(x).bins],
    "StreamPacker.extend": lambda x: _stream_bins(x),
}


def _stream_bins(lengths):
    packer = StreamPacker(4)
    return [each.items.tolist() for each in packer.extend(lengths) + packer.finish()]


@pytest.mark.parametrize("function", TAKE_TOKENS)
@pytest.mark.parametrize("kind", TOKEN_INPUTS)
def test_tokens(kind, function):
    assert TAKE_TOKENS[function](TOKEN_INPUTS[kind](TOKENS)) == TAKE_TOKENS[function](TOKENS)


@pytest.mark.parametrize("function", TAKE_LENGTHS)
@pytest.mark.parametrize("kind", LENGTH_INPUTS)
def test_lengths(kind, function):
    assert TAKE_LENGTHS[function](LENGTH_INPUTS[kind](LENGTHS)) == TAKE_LENGTHS[function](LENGTHS)


@pytest.mark.parametrize("kind", TABLES)
def test_tables_are_refused_with_what_to_pass(kind):
    with pytest.raises(TypeError, match=r"must be one column, got .*; pass one of them"):
        pack_dataset(TABLES[kind](), 4)
    if kind != "Dataset":  # its items are samples, if its column is called input_ids
        with pytest.raises(TypeError, match="iterable"):
            pack_stream(TABLES[kind](), 4)


def test_a_column_of_an_iterable_dataset_is_refused():
    with pytest.raises(TypeError, match="pass list"):
        pack_dataset(dataset(TOKENS).to_iterable_dataset()["x"], 4)
