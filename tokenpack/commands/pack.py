"""``tokenpack pack``: pack files of token lists, texts or lengths into rows, and report how full.

    read    all tokens into one flat int32 array that grows in place: 4 bytes per token
    plan    which sequences share a row (tokenpack.packing)
    write   rows, block by block, into an Arrow file

Tokens are read as Arrow batches and stay in NumPy. Only a tokenizer returns lists of Python
integers, for one batch at a time. Lengths without tokens, in a memory-mapped ``.npy`` file, are
planned shard by shard.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..data.shards.parts import check_ranks, part_name, part_of
from ..data.tokens import Tokens, flatten_tokens, plan_of, require_same_lengths
from ..packing import Packer, PackMetrics, PackResult, pack_shards
from ..segments import offsets_of
from ..table import format_table
from . import figures, machine
from .interrupts import uninterrupted
from .output import new_folder, write_json

if TYPE_CHECKING:
    import pyarrow as pa

_INT32 = np.iinfo(np.int32)
_LENGTHS_AT_ONCE = 1 << 20


def run(arguments: argparse.Namespace) -> int:
    """Write OUT and print the table. Returns 0; bad input raises, and leaves OUT as it was."""
    packer = Packer(
        arguments.capacity,
        arguments.strategy,
        arguments.seed,
        max_sequences=arguments.max_sequences,
        window=arguments.window,
        overlong=arguments.overlong,
        drop_empty=arguments.drop_empty,
    )
    ranks = check_ranks(arguments.rank, arguments.world_size)
    if arguments.world_size > 1:
        arguments.out = part_name(arguments.out, *ranks)
    only_lengths = Path(arguments.input).suffix == ".npy"
    _check_options(arguments, only_lengths)
    _check_packages("tqdm", *(() if only_lengths else ("datasets", "pyarrow")))
    with new_folder(arguments.out, "OUT"):
        _remove_unfinished(arguments.out)
        check_empty(arguments.out)
        try:
            plan, to_load = (_plan_lengths if only_lengths else _pack_rows)(arguments, packer)
            written = _write_report(arguments, plan)
        except BaseException:
            with uninterrupted():
                empty(arguments.out)
            raise
    # Shards and windows may use different strategies.
    by = "several strategies" if plan.strategy == "several" else plan.strategy
    print(f"{arguments.input} at {plan.capacity:,} tokens per row, by {by}\n")
    print(format_metrics(plan.metrics))
    print(f"\nto load it: {to_load}")
    print("written: " + ", ".join(map(str, written)))
    return 0


def _check_options(arguments: argparse.Namespace, only_lengths: bool) -> None:
    for option in ("tokenizer", "labels", "columns"):
        if only_lengths and getattr(arguments, option):
            raise ValueError(f"--{option} must not be set: {arguments.input} has no tokens")
    if arguments.tokenizer and arguments.labels:
        raise ValueError("--labels must not be set with --tokenizer, whose tokens are the labels")


def _check_packages(*names: str) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"pack needs {name}: pip install 'tokenpack[data]'")


def check_empty(folder: Path) -> None:
    """Raise ValueError if a file is in OUT."""
    found = next(folder.iterdir(), None)
    if found is not None:
        raise ValueError(f"OUT must be a new or empty folder, got {folder} with {found.name}")


def _remove_unfinished(folder: Path) -> None:
    """Remove what a run left that was killed: rows half written, and a plan without `plan.json`."""
    for path in folder.glob("packed-*.arrow.*.partial"):
        path.unlink()
    plan = folder / "plan"
    if plan.is_dir() and {path.suffix for path in plan.iterdir()} <= {".npy"}:
        shutil.rmtree(plan)


def empty(folder: Path) -> None:
    """Remove all files. The folder was empty before this run."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


# ------------------------------------------------------------------------- lengths without tokens


def _plan_lengths(arguments: argparse.Namespace, packer: Packer) -> tuple[PackResult, str]:
    from tqdm import tqdm

    lengths = _map_lengths(arguments.input)
    first, stop = part_of(len(lengths), arguments.rank, arguments.world_size)
    _require_rows(first, stop, arguments.rank, arguments.world_size)
    lengths = lengths[first:stop]
    _check_lengths(lengths, "lengths", arguments)
    folder = arguments.out / "plan"
    with tqdm(total=len(lengths), desc="planning", unit=" lengths", unit_scale=True) as bar:
        plan = pack_shards(_ProgressArray(lengths, bar.update), packer, folder)
        bar.update(len(lengths) - bar.n)
    return plan, f'tokenpack.packing.PackResult.load("{folder}")'


def _map_lengths(path: str) -> NDArray[np.integer]:
    try:
        lengths = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"IN must be one .npy array, got {path}: {why}") from None
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or not len(lengths):
        raise ValueError(
            f"IN must be a one-dimensional array of integers, a length per sequence, got {path} "
            f"with {lengths.dtype} of shape {lengths.shape}"
        )
    return lengths


class _ProgressArray:
    """An array that reports how many of its values were read."""

    def __init__(self, values: NDArray[Any], on_read: Callable[[int], object]) -> None:
        self._values, self._on_read, self._read = values, on_read, 0

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, part: slice) -> NDArray[Any]:
        # The planner reads a shard after it has planned the previous one.
        start, _, _ = part.indices(len(self))
        self._on_read(start - self._read)
        self._read = start
        return self._values[part]


# ------------------------------------------------------------------------------------ rows of files


def _pack_rows(arguments: argparse.Namespace, packer: Packer) -> tuple[PackResult, str]:
    from ..data.packed.dataset import COLUMNS, pack_dataset_from_result

    names = [arguments.column]
    make: Callable[[pa.ChunkedArray, str], Tokens] = _token_lists
    if arguments.tokenizer:
        from .tokenizer import load_tokenizer  # imports transformers, which is slow

        names, make = [arguments.text_column], _encoded_by(load_tokenizer(arguments.tokenizer))
    elif arguments.labels:
        names.append(arguments.labels)
    ranks = (arguments.rank, arguments.world_size)
    tokens, *labels = _read(arguments.input, names, make, ranks)
    _check_lengths(tokens.lengths, names[0], arguments)
    for each in labels:
        require_same_lengths(tokens, names[0], each, names[1])
    plan = plan_of(packer, tokens, names[0])
    rows = pack_dataset_from_result(
        plan,
        tokens,
        arguments.padding_value,
        arguments.label_padding_value,
        labels=labels[0] if labels else None,
        columns=arguments.columns or COLUMNS,
        cache_dir=arguments.out,
        num_proc=arguments.num_proc,
        progress=True,
    )
    (file,) = rows.cache_files
    path = arguments.out / "dataset.arrow"
    Path(file["filename"]).rename(path)
    return plan, f'datasets.Dataset.from_file("{path}")'


def _read(
    path: str,
    names: list[str],
    make: Callable[[pa.ChunkedArray, str], Tokens],
    ranks: tuple[int, int] = (0, 1),
) -> list[Tokens]:
    """Read the sequences of each column, in the rows of this rank."""
    from tqdm import tqdm

    first, stop = _rows_of_rank(path, names, *ranks)
    columns = [_GrowingTokens() for _ in names]
    rows = first
    with tqdm(desc="reading", unit=" rows", unit_scale=True) as bar:
        for whole in _batches(path, names, first):
            table = whole if stop is None else whole.slice(0, stop - rows)
            for name, column in zip(names, columns):
                try:
                    column.append(make(table.column(name), name))
                except (TypeError, ValueError) as error:
                    where = f"in the batch that starts at row {rows:,}: " if rows else ""
                    raise ValueError(f"IN: {path}: {where}{error}") from None
            rows += table.num_rows
            bar.update(table.num_rows)
            if rows == stop:
                break
    return [column.tokens() for column in columns]


def _rows_of_rank(
    path: str, names: list[str], rank: int, world_size: int
) -> tuple[int, int | None]:
    """The first row, and the one after the last. One rank reads to the end, without counting."""
    if world_size == 1:
        return 0, None
    total = sum(table.num_rows for table in _batches(path, names))
    first, stop = part_of(total, rank, world_size)
    _require_rows(first, stop, rank, world_size)
    return first, stop


def _require_rows(first: int, stop: int, rank: int, world_size: int) -> None:
    if first == stop:
        raise ValueError(
            f"--world-size must be at most the number of rows, got {world_size}, which leaves rank "
            f"{rank} no row"
        )


def _batches(path: str, names: list[str], skip_rows: int = 0) -> Iterator[pa.Table]:
    from ..data.reader import streaming_dataset_reader

    try:
        yield from streaming_dataset_reader(
            path, columns=names, output="arrow", skip_rows=skip_rows
        )
    except (ValueError, OSError) as error:
        # Name the command's argument in place of the reader's.
        why = str(error).removeprefix("columns must be in every file, but ")
        why = f"IN{why[4:]}" if why.startswith("path must") else f"IN: {why}"
        if "no column" in why:
            why += " (--column must hold token lists; for text, use --tokenizer and --text-column)"
        raise ValueError(why) from None


def _token_lists(column: pa.ChunkedArray, name: str) -> Tokens:
    return flatten_tokens(column, name, empty=True)


def _encoded_by(
    encode: Callable[[list[str]], list[list[int]]],
) -> Callable[[pa.ChunkedArray, str], Tokens]:
    def make(column: pa.ChunkedArray, name: str) -> Tokens:
        import pyarrow as pa

        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            raise TypeError(f"{name} must be a column of text, got {column.type}")
        if column.null_count:
            index = np.flatnonzero(column.is_null())[0]
            raise TypeError(f"{name}[{index}] must be text, got null")
        return flatten_tokens(encode(column.to_pylist()), name, empty=True)

    return make


class _GrowingTokens:
    """Appends sequences to one int32 array.

    The array grows in place: for a large array the system remaps pages instead of copying bytes, so
    no token is in memory twice. Batches that are kept and joined at the end would be in memory
    twice, and as wide as in their file.
    """

    def __init__(self) -> None:
        self._values = array("i")
        self._lengths: list[NDArray[np.int64]] = []

    def append(self, tokens: Tokens) -> None:
        values = tokens.values
        if len(values) and (values.min() < _INT32.min or values.max() > _INT32.max):
            raise ValueError(f"ids must fit into 32 bits, got {values[abs(values).argmax()]}")
        narrow = np.ascontiguousarray(values, dtype=np.int32)
        self._values.frombytes(narrow.view(np.uint8).data)
        self._lengths.append(tokens.lengths)

    def tokens(self) -> Tokens:
        values = np.frombuffer(self._values, np.int32) if self._values else np.empty(0, np.int32)
        return Tokens(values, offsets_of(np.concatenate(self._lengths)))


# ------------------------------------------------------------------------------ checks and report


def _check_lengths(lengths: NDArray[Any], name: str, arguments: argparse.Namespace) -> None:
    """Check the lengths of all shards at once, with errors that name this command's options."""
    capacity = arguments.capacity
    _refuse(lengths, lambda block: block < 0, name, "is negative")
    if not arguments.drop_empty:
        _refuse(
            *(lengths, lambda block: block == 0, name),
            "has no tokens; --drop-empty drops such sequences",
        )
    if arguments.overlong == "error":
        _refuse(
            *(lengths, lambda block: block > capacity, name),
            f"has more tokens than --capacity {capacity}; --overlong can truncate, split or drop",
        )


def _refuse(
    lengths: NDArray[Any],
    is_bad: Callable[[NDArray[Any]], NDArray[np.bool_]],
    name: str,
    reason: str,
) -> None:
    """Raise if a length is bad; name the first, and count the others."""
    first, count = 0, 0
    for start in range(0, len(lengths), _LENGTHS_AT_ONCE):
        found = np.flatnonzero(is_bad(lengths[start : start + _LENGTHS_AT_ONCE]))
        if len(found) and not count:
            first = start + int(found[0])
        count += len(found)
    if count:
        more = f" (and {count - 1:,} more)" if count > 1 else ""
        raise ValueError(f"IN: {name}[{first}], of length {lengths[first]}, {reason}{more}")


def format_metrics(metrics: PackMetrics) -> str:
    """The table."""
    counts = {
        "sequences": metrics.num_sequences,
        "rows": metrics.num_bins,
        "tokens": metrics.tokens,
        "dropped": metrics.dropped,
        "truncated": metrics.truncated,
        "split": metrics.split,
    }
    shares = {
        "padding": 1 - metrics.efficiency,
        "efficiency": metrics.efficiency,
        "utilization, mean": metrics.utilization_mean,
        "std": metrics.utilization_std,
        "min": metrics.utilization_min,
        "max": metrics.utilization_max,
    }
    cells = {name: f"{count:,}" for name, count in counts.items()}
    cells |= {name: f"{share:.2%}" for name, share in shares.items()}
    cells |= {
        "sequences per row": f"{metrics.sequences_per_bin:,.2f}",
        "seconds to plan": f"{metrics.seconds:,.3f}",
        "sequences per second": f"{metrics.sequences_per_second:,.0f}",
    }
    order = ["sequences", "rows", "tokens", *shares, "sequences per row", "dropped", "truncated"]
    order += ["split", "seconds to plan", "sequences per second"]
    return format_table(["", "packed"], [[name, cells[name]] for name in order])


def _write_report(arguments: argparse.Namespace, plan: PackResult) -> list[Path]:
    """Write the JSON and the PNG to OUT. Returns the paths of all files in it."""
    options = {name: value for name, value in vars(arguments).items() if name != "command"}
    report = {
        "versions": machine.versions(),
        "options": {**options, "out": str(arguments.out)},
        "strategy": plan.strategy,
        "metrics": plan.metrics._asdict(),
    }
    write_json(arguments.out / "metrics.json", report)
    if figures.available():
        plan.plot(arguments.out / "plan.png")
    return sorted(arguments.out.iterdir())
