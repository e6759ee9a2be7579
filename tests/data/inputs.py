"""Every kind of input, and every public function that takes it.

A group is a kind of argument: lengths, token sequences, one sequence of a sample, and so on. Its
inputs all hold the same values. A function either takes an input, and then its result is that of a
list, or refuses it with an error that names the argument.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from tokenpack.data import (
    CappedSeq2SeqCollator,
    T5SpanCorruptionCollatorFast,
    collate_packed_rows,
    concatenate_and_pack,
    pack_dataset,
    pack_dataset_from_result,
    pack_pairs_to_tensors,
    pack_result_to_tensors,
    pack_sequences,
    pack_stream,
    packed_collate_fn,
    save_binary,
)
from tokenpack.packing import Packer, StreamPacker, pack_lengths, pack_pairs, pack_shards

INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
BYTE_ORDERS = ("<i2", ">i4", "<u8", ">u8")
FORMATS = ("numpy", "torch", "arrow", "pandas")
TOKENIZER = SimpleNamespace(
    pad_token_id=0, eos_token_id=1, padding_side="right", get_vocab=lambda: {"<extra_id_0>": 99}
)


class Polars:
    """What a polars series offers: its values one by one, and as an Arrow stream."""

    def __init__(self, given: list[Any]) -> None:
        self._array = pa.chunked_array([given])

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self._array.__arrow_c_stream__(requested_schema)

    def null_count(self) -> int:
        return self._array.null_count

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, at: int) -> Any:
        return self._array[at].as_py()


def series_of_polars(given: list[Any]) -> Any:
    """A series, of a stand-in where polars is not installed."""
    try:
        import polars
    except ImportError:
        return Polars(given)
    return polars.Series(given)


def dataset(given: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"input_ids": given})


def transformed(given: list[Any]) -> Any:
    """A column that a transform makes of other values."""
    numbers = dataset(list(range(len(given))))
    return numbers.with_transform(
        lambda batch: {"input_ids": [given[at] for at in batch["input_ids"]]}
    )["input_ids"]


def selected(given: list[Any]) -> Any:
    return dataset(given[::-1]).select(range(len(given))[::-1])["input_ids"]


def memory_map(values: np.ndarray) -> np.ndarray:
    file = Path(tempfile.mkdtemp()) / "values.npy"
    np.save(file, values)
    return np.load(file, mmap_mode="r")


def arrow_series(given: list[Any]) -> pd.Series:
    return pd.Series(pd.array(given, dtype=pd.ArrowDtype(pa.array(given).type)))


def half_masked(given: list[int]) -> np.ma.MaskedArray:
    return np.ma.masked_array(given, [at == 0 for at in range(len(given))])


Make = Callable[[Any], Any]
Inputs = dict[str, list[Make]]  # by kind


def in_format(form: str, **options: Any) -> Make:
    return lambda x: dataset(x).with_format(form, **options)["input_ids"]


def lists_of(kinds: Inputs, *beginnings: str) -> Inputs:
    """Lists of the inputs whose kinds begin so."""
    return {
        f"list of {kind}": [lambda x, make=make: list(map(make, x)) for make in makes]
        for kind, makes in kinds.items()
        if kind.startswith(beginnings)
    }


# Of a column of values: integers, or lists of integers.
COLUMNS: Inputs = {
    "Arrow, chunked": [lambda x: pa.chunked_array([x[:1], x[1:]])],
    "Arrow, sliced": [lambda x: pa.array([*x, *x])[len(x) :]],
    "datasets column": [lambda x: dataset(x)["input_ids"]],
    **{f"datasets column, {form}": [in_format(form)] for form in FORMATS},
    "datasets column, numpy of int16": [in_format("numpy", dtype="int16")],
    "datasets column, selected rows": [selected],
    "datasets column, of a transform": [transformed],
    "pandas series, any index": [
        pd.Series,
        lambda x: pd.Series(x, index=range(len(x))[::-1]),
        lambda x: pd.Series(x, index=list("cabd")[: len(x)]),
    ],
    "pandas series, ArrowDtype": [arrow_series],
    "polars series": [series_of_polars],
}
TABLES: Inputs = {
    "datasets.Dataset": [dataset],
    "pa.Table": [lambda x: pa.table({"input_ids": x})],
    "pandas data frame": [lambda x: pd.DataFrame({"input_ids": x})],
    "column of a datasets.IterableDataset": [
        lambda x: dataset(x).to_iterable_dataset()["input_ids"]
    ],
}
NO_COLUMNS: Inputs = {
    "generator": [lambda x: (each for each in x)],
    "set": [lambda x: {1, 2}],
    "mapping": [lambda x: {"first": 1}],
    "text": [lambda x: "123"],
}

# Of one sequence of integers.
FLAT: Inputs = {
    "list": [list],
    "tuple": [tuple],
    "NumPy, int8 to uint64": [lambda x, kind=kind: np.array(x, kind) for kind in INTEGERS],
    "NumPy, any byte order": [lambda x, kind=kind: np.array(x, kind) for kind in BYTE_ORDERS],
    "NumPy, every second value": [lambda x: np.repeat(x, 2)[::2]],
    "NumPy, memory map": [lambda x: memory_map(np.array(x))],
    "NumPy, masked array without masked values": [np.ma.masked_array],
    "torch, int8 to uint64": [
        lambda x, kind=kind: torch.tensor(x, dtype=getattr(torch, kind)) for kind in INTEGERS
    ],
    "Arrow, int8 to uint64": [lambda x, kind=kind: pa.array(x, kind) for kind in INTEGERS],
    "Arrow, dictionary": [lambda x: pa.array(x).dictionary_encode()],
    "pandas series, Int64": [lambda x: pd.Series(x, dtype="Int64")],
    **COLUMNS,
    "masked values": [half_masked],
    "nulls": [lambda x: pa.array([None, *x[1:]], pa.int64())],
    "floats": [
        lambda x: [each + 0.5 for each in x],
        lambda x: np.array(x, float),
        lambda x: torch.tensor(x, dtype=torch.float32),
    ],
    "booleans": [
        lambda x: list(map(bool, x)),
        lambda x: np.array(x, bool),
        lambda x: torch.tensor(x, dtype=torch.bool),
        lambda x: pa.array(map(bool, x)),
    ],
    "texts": [lambda x: list(map(str, x))],
    "integers past 64 bits": [lambda x: [2**64 for _ in x]],
    "NumPy, integers past 63 bits": [lambda x: np.array([2**63 for _ in x], np.uint64)],
    "NumPy, three dimensions": [lambda x: np.ones((2, 2, 2), int)],
    **TABLES,
    **NO_COLUMNS,
}

# Of sequences of integers.
NESTED: Inputs = {
    "list of lists": [list],
    "tuple of tuples": [lambda x: tuple(map(tuple, x))],
    **lists_of(FLAT, "NumPy", "torch", "Arrow", "pandas series", "polars"),
    "list of mixed integer types": [
        lambda x: [np.array(each, kind) for each, kind in zip(x, ("uint64", "int8", ">i2"))],
        lambda x: [
            torch.tensor(each, dtype=kind)
            for each, kind in zip(x, (torch.uint16, torch.int32, torch.int64))
        ],
        lambda x: [x[0], np.array(x[1]), torch.tensor(x[2])],
    ],
    "NumPy, array of objects": [lambda x: np.array([*x, None], object)[:-1]],
    "Arrow, list": [pa.array],
    "Arrow, large_list": [lambda x: pa.array(x, pa.large_list(pa.uint16()))],
    "Arrow, list_view": [lambda x: pa.array(x, pa.list_view(pa.int32()))],
    **COLUMNS,
    "list with masked values": [lambda x: [*x[1:], half_masked(x[0])]],
    "null for a sequence": [lambda x: [*x[1:], None], lambda x: pa.array([*x[1:], None])],
    "nulls in a sequence": [lambda x: pa.array([*x[1:], [None]])],
    **lists_of(FLAT, "floats", "booleans", "texts", "integers past"),
    "list of integers": [lambda x: x[0]],
    "two dimensions, NumPy or torch": [
        lambda x: np.ones((2, 3), int),
        lambda x: torch.ones(2, 3, dtype=torch.int64),
    ],
    **TABLES,
    **NO_COLUMNS,
}


def of_plan(plan: Any) -> list[list[int]]:
    return [plan.items.tolist(), plan.offsets.tolist(), plan.item_lengths.tolist()]


def of_rows(rows: Any) -> list[list[int]]:
    return [np.asarray(row[name]).tolist() for row in rows for name in ("input_ids", "labels")]


def of_batch(batch: Any) -> list[list[int]]:
    return [np.asarray(value).tolist() for value in batch.values()]


def shards(lengths: Any) -> list[list[int]]:
    return of_plan(pack_shards(lengths, Packer(4), tempfile.mkdtemp(), shard_size=2))


def stream_bins(lengths: Any) -> list[list[int]]:
    packer = StreamPacker(4)
    return [each.items.tolist() for each in packer.extend(lengths) + packer.finish()]


def collated(collate: Callable[[list[Any]], Any], make_sample: Make) -> Make:
    """Collate two samples that hold the input."""
    return lambda x: of_batch(collate([make_sample(x), make_sample(x)]))


class Argument(NamedTuple):
    """An argument of a function.

    Attributes:
        names: what an error may call it.
        call: calls the function; the result can be compared.
    """

    names: tuple[str, ...]
    call: Make


class Group(NamedTuple):
    """Arguments that take the same inputs.

    Attributes:
        title: what the argument is.
        values: the values of every input, as a list.
        inputs: what makes inputs of the values, by kind.
        arguments: the arguments, by the function and, if it has several, the argument.
    """

    title: str
    values: list[Any]
    inputs: Inputs
    arguments: dict[str, Argument]


LENGTHS, TOKENS = [3, 1, 2], [[5, 6, 7], [8], [9, 10]]
PLAN = pack_lengths(LENGTHS, 4)
BATCH = pack_result_to_tensors(PLAN, TOKENS)
PAIRS = pack_pairs_to_tensors(TOKENS, TOKENS)
ROW = {"input_ids": [5, 6, 7], "seq_lengths": [2, 1]}
packs = packed_collate_fn(4)
capped = CappedSeq2SeqCollator(TOKENIZER)
spans = T5SpanCorruptionCollatorFast(TOKENIZER)


def saved(ids):
    """The ids in a file that `save_binary` wrote."""
    with tempfile.TemporaryDirectory() as folder:
        save_binary(ids, f"{folder}/ids.npy")
        return np.load(f"{folder}/ids.npy").tolist()


GROUPS = {
    "lengths": Group(
        "Lengths of sequences",
        LENGTHS,
        FLAT,
        {
            "pack_lengths": Argument(("lengths",), lambda x: of_plan(pack_lengths(x, 4))),
            "Packer.pack": Argument(("lengths",), lambda x: of_plan(Packer(4).pack(x))),
            "Packer.pack_some": Argument(("lengths",), lambda x: of_plan(Packer(4).pack_some(x))),
            "Packer.pack_flat": Argument(
                ("lengths",), lambda x: [each.tolist() for each in Packer(4).pack_flat(x)]
            ),
            "Packer.drops": Argument(
                ("lengths",), lambda x: Packer(2, overlong="drop").drops(x).tolist()
            ),
            "StreamPacker.extend": Argument(("lengths",), stream_bins),
            "pack_pairs, sources": Argument(
                ("source_lengths",), lambda x: of_plan(pack_pairs(x, LENGTHS, 4, 4))
            ),
            "pack_pairs, targets": Argument(
                ("target_lengths",), lambda x: of_plan(pack_pairs(LENGTHS, x, 4, 4))
            ),
            "pack_shards": Argument(("lengths",), shards),
            "CappedSeq2SeqCollator.lengths": Argument(
                ("raw_lengths",), lambda x: capped.lengths(x).tolist()
            ),
            "T5SpanCorruptionCollatorFast.lengths": Argument(
                ("raw_lengths",), lambda x: spans.lengths(x).tolist()
            ),
        },
    ),
    "tokens": Group(
        "Sequences of tokens",
        TOKENS,
        NESTED,
        {
            "pack_dataset, token_ids": Argument(
                ("token_ids",), lambda x: of_rows(pack_dataset(x, 4, progress=False))
            ),
            "pack_dataset, labels": Argument(
                ("labels",), lambda x: of_rows(pack_dataset(TOKENS, 4, labels=x, progress=False))
            ),
            "pack_dataset_from_result, token_ids": Argument(
                ("token_ids",), lambda x: of_rows(pack_dataset_from_result(PLAN, x, progress=False))
            ),
            "pack_dataset_from_result, labels": Argument(
                ("labels",),
                lambda x: of_rows(pack_dataset_from_result(PLAN, TOKENS, labels=x, progress=False)),
            ),
            "pack_result_to_tensors, token_ids": Argument(
                ("token_ids",), lambda x: of_batch(pack_result_to_tensors(PLAN, x))
            ),
            "pack_result_to_tensors, labels": Argument(
                ("labels",), lambda x: of_batch(pack_result_to_tensors(PLAN, TOKENS, x))
            ),
            "pack_pairs_to_tensors, sources": Argument(
                ("sources",), lambda x: of_batch(pack_pairs_to_tensors(x))
            ),
            "pack_pairs_to_tensors, targets": Argument(
                ("targets",), lambda x: of_batch(pack_pairs_to_tensors(TOKENS, x))
            ),
            "pack_sequences": Argument(("sequences",), lambda x: pack_sequences(x, 4).tolist()),
            "concatenate_and_pack, input_sequences": Argument(
                ("input_sequences",),
                lambda x: [e.tolist() for e in concatenate_and_pack(x, TOKENS, TOKENS, 4, 0)],
            ),
            "concatenate_and_pack, label_sequences": Argument(
                ("label_sequences",),
                lambda x: [e.tolist() for e in concatenate_and_pack(TOKENS, x, TOKENS, 4, 0)],
            ),
            "pack_stream": Argument(("iterable", "samples"), lambda x: of_rows(pack_stream(x, 4))),
        },
    ),
    "masks": Group(
        "Masks of sequences",
        [[1, 1, 0], [1], [0, 1]],
        NESTED,
        {
            "concatenate_and_pack, attention_masks": Argument(
                ("attention_masks",),
                lambda x: [e.tolist() for e in concatenate_and_pack(TOKENS, TOKENS, x, 4, 0)],
            ),
        },
    ),
    "fields": Group(
        "One sequence: a sample, a field of a sample or of a packed row",
        [5, 6, 7],
        FLAT,
        {
            "packed_collate_fn": Argument(("samples",), collated(packs, lambda x: x)),
            "packed_collate_fn, input_ids": Argument(
                ("input_ids",), collated(packs, lambda x: {"input_ids": x})
            ),
            "packed_collate_fn, labels": Argument(
                ("labels",), collated(packs, lambda x: {"input_ids": [5, 6, 7], "labels": x})
            ),
            "CappedSeq2SeqCollator, input_ids": Argument(
                ("input_ids",), collated(capped, lambda x: {"input_ids": x, "labels": [5, 1]})
            ),
            "CappedSeq2SeqCollator, labels": Argument(
                ("labels",), collated(capped, lambda x: {"input_ids": [5, 1], "labels": x})
            ),
            "T5SpanCorruptionCollatorFast, input_ids": Argument(
                ("input_ids",), collated(spans, lambda x: {"input_ids": x})
            ),
            "T5SpanCorruptionCollatorFast, labels": Argument(
                ("labels",), collated(spans, lambda x: {"input_ids": [5, 6, 7], "labels": x})
            ),
            "collate_packed_rows, input_ids": Argument(
                ("input_ids",), collated(collate_packed_rows, lambda x: {**ROW, "input_ids": x})
            ),
            "collate_packed_rows, labels": Argument(
                ("labels",), collated(collate_packed_rows, lambda x: {**ROW, "labels": x})
            ),
            "collate_packed_rows, seq_lengths": Argument(
                ("seq_lengths",),
                collated(collate_packed_rows, lambda x: {"input_ids": [9] * 20, "seq_lengths": x}),
            ),
            "save_binary": Argument(("ids",), saved),
        },
    ),
    "mask": Group(
        "The mask of one sample",
        [1, 0, 1],
        FLAT,
        {
            f"{name}, attention_mask": Argument(
                ("attention_mask",),
                collated(collate, lambda x: {"input_ids": [5, 6, 7], "attention_mask": x}),
            )
            for name, collate in {
                "packed_collate_fn": packs,
                "CappedSeq2SeqCollator": capped,
                "T5SpanCorruptionCollatorFast": spans,
            }.items()
        },
    ),
    "numbers": Group(
        "Numbers of sequences",
        [2, 0, 1],
        FLAT,
        {
            "PackedBatch.select": Argument(("sequences",), lambda x: of_batch(BATCH.select(x))),
            "PackedPairs.select": Argument(("sequences",), lambda x: of_batch(PAIRS.select(x))),
        },
    ),
}

# The other public names, and what they take.
WITHOUT_VALUES = {
    "BlendedSamples": "`blend_shards` makes it",
    "ChatReport": "counts; `chat_dataset` makes it",
    "ChatTemplate": "the name of a format",
    "DataConfig": "options of loaders",
    "Denoiser": "numbers and a prefix",
    "PackMetrics": "the figures of a plan; `PackResult.metrics` makes it",
    "PackResult": "the arrays of a plan; planners make it",
    "PackedStream": "`pack_stream` makes it",
    "PackedStreamLoader": "a stream",
    "PairPackResult": "the arrays of a plan; `pack_pairs` makes it",
    "Preview": "texts and marks; `preview` makes it",
    "SFTDataConfig": "options of chats",
    "ShardLoader": "what `shard_windows` made",
    "ShardSamples": "`shard_windows` makes it",
    "ShardStep": "options: [token shards](shards.md)",
    "ShardWriter": "NumPy arrays of documents: [token shards](shards.md)",
    "StreamBin": "the arrays of a bin; `StreamPacker` makes it",
    "TokenShards": "paths of [token shards](shards.md)",
    "balance_ranks": "a plan",
    "bin_costs": "a plan",
    "blend_shards": "what `shard_windows` made",
    "byte_tokenizer": "options",
    "chat_dataset": "conversations: [chats](chat.md)",
    "convert_shards": "paths of token shards",
    "from_binary": "the path of a file of ids",
    "from_files": "paths of files of text",
    "from_hf": "the name of a dataset of texts, or the dataset",
    "from_npy_split": "paths of files of ids",
    "from_sft_files": "paths of files of conversations",
    "from_sft_hf": "the name of a dataset of conversations",
    "from_sft_json": "the path of a file of conversations",
    "from_sft_strings": "conversations as texts",
    "merge_results": "plans",
    "merge_saved": "folders of plans",
    "merge_shards": "paths of token shards",
    "preview": "a conversation, or a batch of tokenpack: [chats](chat.md)",
    "shard_windows": "`TokenShards`, or their paths",
    "streaming_dataset_reader": "paths of files",
    "train_tokenizer": "texts",
    "write_shards": "paths of files of texts, ids or conversations",
}
