"""Read a results folder: the measurements of each contender, by group."""

from __future__ import annotations

import ast
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NOT_NOTES = ("suite", "by", "role", "device")
PAIRED = "of the baseline's speed, round by round"


@dataclass(frozen=True)
class Result:
    """Measurement of one contender in one group. Times in seconds.

    Attributes:
        by: name of the contender.
        role: ``contender``, ``baseline`` or ``limit``.
        median: median time over ``rounds``.
        spread: interquartile range / median.
        notes: other recorded values, by name.
    """

    suite: str
    group: str
    name: str
    by: str
    role: str
    parameters: dict[str, Any]
    median: float
    spread: float
    rounds: int
    notes: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """The contents of a results folder.

    Attributes:
        ceilings: of the device, if they were measured.
        skipped: ``(part, benchmark, reason)`` of skipped benchmarks.
        failed: the same of failed benchmarks.
        missing: parts without results.
    """

    folder: Path
    environment: dict[str, Any]
    ceilings: dict[str, Any] | None
    results: list[Result]
    skipped: list[tuple[str, str, str]]
    failed: list[tuple[str, str, str]]
    missing: list[str]

    def of(self, suite: str) -> list[Result]:
        """Results of one suite, in the order of the run."""
        return [result for result in self.results if result.suite == suite]


def parts() -> list[str]:
    """Names of all parts, ``SUITE.FUNCTION``, in the order of the files."""
    found = []
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found.append(f"{path.stem.removeprefix('test_')}.{node.name}")
    return found


def read(folder: Path) -> Run:
    """Read a folder that `bench.run` wrote.

    Raises:
        ValueError: if the folder is not a results folder.
    """
    if not (folder / "environment.json").exists():
        raise ValueError(f"folder must hold results, got {folder}, which has no environment.json")
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    results: list[Result] = []
    skipped, failed, missing = [], [], []
    for part in parts():
        figures, outcome = folder / f"raw/{part}.json", folder / f"raw/{part}.outcome.json"
        if not figures.exists():
            missing.append(part)
        else:
            results += _results(json.loads(figures.read_text(encoding="utf-8")))
        if outcome.exists():
            record = json.loads(outcome.read_text(encoding="utf-8"))
            skipped += [(part, name, reason) for name, reason in record["skipped"]]
            failed += [(part, name, "") for name in record["failed"]]
    path = folder / "ceilings.json"
    ceilings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return Run(folder, environment, ceilings, results, skipped, failed, missing)


def _results(document: dict[str, Any]) -> Iterator[Result]:
    for each in document["benchmarks"]:
        stats, notes = each["stats"], each["extra_info"]
        yield Result(
            suite=notes["suite"],
            group=each["group"] or each["name"],
            name=each["name"],
            by=notes["by"],
            role=notes["role"],
            parameters=each["params"] or {},
            median=stats["median"],
            spread=stats["iqr"] / stats["median"],
            rounds=stats["rounds"],
            notes={key: value for key, value in notes.items() if key not in _NOT_NOTES},
        )


def grouped(results: list[Result]) -> dict[str, list[Result]]:
    """Results by group, in the order of the run."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.group, []).append(result)
    return groups


def speed_up(result: Result, group: list[Result]) -> float | None:
    """Speed relative to the group's baseline; None if the group has no baseline.

    If both alternated round by round, this is the median of the ratios within rounds, otherwise the
    ratio of the medians.
    """
    if PAIRED in result.notes:
        return float(result.notes[PAIRED])
    baselines = [each.median for each in group if each.role == "baseline"]
    return statistics.median(baselines) / result.median if baselines else None
