"""``tokenpack merge-packed``: join the parts that several machines packed, after checking them.

Each of N machines writes ``OUT-RANK-of-N`` (``tokenpack pack --world-size N``). The parts hold
consecutive ranges of the rows of one input, so the joined rows are those of the parts in order.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.shards.parts import part_name
from ..files import written_whole
from ..packing import PackMetrics, merge_saved
from ..packing.result import common_strategy
from . import machine
from .interrupts import uninterrupted
from .output import new_folder, write_json
from .pack import check_empty, empty, format_metrics

if TYPE_CHECKING:
    import pyarrow as pa

# These may differ between the parts of one input.
_OF_A_RANK = frozenset({"rank", "out", "num_proc"})


def run(arguments: argparse.Namespace) -> int:
    """Write OUT and print the table. Returns 0; bad input raises, and leaves OUT as it was."""
    out: Path = arguments.out
    parts = _find_parts(out)
    reports = [_read_report(part, rank) for rank, part in enumerate(parts)]
    _require_one_input(parts, reports)
    with new_folder(out, "OUT"):
        check_empty(out)
        try:
            to_load = _join(parts, [report["metrics"]["num_bins"] for report in reports], out)
            metrics = merged_metrics([PackMetrics(**report["metrics"]) for report in reports])
            options = {**reports[0]["options"], "rank": 0, "world_size": 1, "out": str(out)}
            report = {
                "versions": machine.versions(),
                "options": options,
                "strategy": common_strategy({report["strategy"] for report in reports}),
                "parts": [str(part) for part in parts],
                "metrics": metrics._asdict(),
            }
            write_json(out / "metrics.json", report)
        except BaseException:
            with uninterrupted():
                empty(out)
            raise
    print(f"{len(parts)} parts of {options['input']}\n")
    print(format_metrics(metrics))
    print(f"\nto load it: {to_load}")
    return 0


def _find_parts(out: Path) -> list[Path]:
    """The folders of all parts of OUT, in order.

    Raises:
        ValueError: if there are none, one is missing, or OUT was packed with two numbers of ranks.
    """
    sizes = {
        int(match[1])
        for path in out.parent.glob(f"{out.name}-*-of-*")
        if (match := re.fullmatch(r"-\d{5,}-of-(\d{5,})", path.name[len(out.name) :]))
    }
    if len(sizes) != 1:
        found = f"parts of {sorted(sizes)} ranks" if sizes else "none"
        raise ValueError(
            f"OUT must be the OUT of `tokenpack pack --world-size N`, with the parts "
            f"{part_name(out, 0, 2).name} and so on beside it, got {found}"
        )
    (size,) = sizes
    parts = [part_name(out, rank, size) for rank in range(size)]
    missing = [rank for rank, part in enumerate(parts) if not (part / "metrics.json").is_file()]
    if missing:
        raise ValueError(
            f"OUT must have all {size} parts, got none or an unfinished one of rank {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + f": run `tokenpack pack` with --rank {missing[0]} again"
        )
    return parts


def _read_report(part: Path, rank: int) -> dict[str, Any]:
    path = part / "metrics.json"
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        metrics = PackMetrics(**report["metrics"])
        given = report["options"]["rank"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: is not a report of `tokenpack pack`: {error}") from None
    if given != rank or metrics.num_bins < 0:
        raise ValueError(f"{path}: is the report of rank {given}, in the folder of rank {rank}")
    return report


def _require_one_input(parts: list[Path], reports: list[dict[str, Any]]) -> None:
    """Raise if a part was packed with other options than the first."""
    first = reports[0]["options"]
    for part, report in zip(parts, reports):
        options = report["options"]
        for name in sorted((first.keys() | options.keys()) - _OF_A_RANK):
            if first.get(name) != options.get(name):
                raise ValueError(
                    f"{part}: was packed with {name}={options.get(name)!r}, and "
                    f"{parts[0].name} with {first.get(name)!r}: pack one of them again"
                )


def _join(parts: list[Path], rows: list[int], out: Path) -> str:
    """Write the joined rows, or the joined plan. Returns how to load them."""
    if (parts[0] / "plan").is_dir():
        merge_saved([part / "plan" for part in parts], out / "plan")
        return f'tokenpack.packing.PackResult.load("{out / "plan"}")'
    _join_rows([part / "dataset.arrow" for part in parts], rows, out / "dataset.arrow")
    return f'datasets.Dataset.from_file("{out / "dataset.arrow"}")'


def _join_rows(files: list[Path], rows: list[int], path: Path) -> None:
    import pyarrow as pa
    from tqdm import tqdm

    bar = tqdm(total=sum(rows), desc="joining", unit=" rows", unit_scale=True)
    with bar, written_whole(path) as partial, partial.open("wb") as sink:
        with pa.memory_map(str(files[0])) as source:
            schema = pa.ipc.open_stream(source).schema
        with pa.ipc.new_stream(sink, schema) as writer:
            for file, expected in zip(files, rows):
                count = 0
                for batch in _record_batches(file, schema):
                    writer.write_batch(batch)
                    count += batch.num_rows
                    bar.update(batch.num_rows)
                if count != expected:
                    raise ValueError(f"{file}: must have {expected} rows, got {count}")


def _record_batches(file: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(file)) as source:
            stream = pa.ipc.open_stream(source)
            if not stream.schema.equals(schema):
                raise ValueError(f"{file}: must have the columns of the first part")
            yield from stream
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: truncated or damaged: {error}") from None


def merged_metrics(parts: list[PackMetrics]) -> PackMetrics:
    """The metrics of all bins of several plans. ``seconds`` is the sum of the planning times."""
    weights = np.array([each.num_bins for each in parts], np.float64)
    means = np.array([each.utilization_mean for each in parts])
    deviations = np.array([each.utilization_std for each in parts])
    bins = int(weights.sum())
    mean = float(means @ weights) / bins
    spread = float((deviations**2 + (means - mean) ** 2) @ weights) / bins
    summed: Mapping[str, Any] = {
        name: sum(getattr(each, name) for each in parts)
        for name in (*("num_sequences", "tokens", "padding"), *("dropped", "truncated", "split"))
    }
    seconds = sum(each.seconds for each in parts)
    return PackMetrics(
        **summed,
        num_bins=bins,
        efficiency=summed["tokens"] / (summed["tokens"] + summed["padding"]),
        utilization_mean=mean,
        utilization_std=spread**0.5,
        utilization_min=min(each.utilization_min for each in parts),
        utilization_max=max(each.utilization_max for each in parts),
        sequences_per_bin=float(
            np.array([each.sequences_per_bin for each in parts]) @ weights / bins
        ),
        seconds=seconds,
        sequences_per_second=summed["num_sequences"] / seconds if seconds else 0.0,
    )
