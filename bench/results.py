"""What a results folder holds, read back: who was measured in which group, and how fast it was."""

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
    """One contender in one group. Times in seconds, medians over ``rounds``.

    Attributes:
        role: ``contender``, ``baseline`` or ``limit``.
        spread: the interquartile range over the median.
        notes: what else was noted, by what it is called.
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
    """A results folder.

    Attributes:
        ceilings: what the device could do at its best, if that was measured.
        skipped, failed: ``(part, benchmark, reason)``.
        missing: parts that were not run.
    """

    folder: Path
    environment: dict[str, Any]
    ceilings: dict[str, Any] | None
    results: list[Result]
    skipped: list[tuple[str, str, str]]
    failed: list[tuple[str, str, str]]
    missing: list[str]

    def of(self, suite: str) -> list[Result]:
        """Those of one suite, as they ran."""
        return [result for result in self.results if result.suite == suite]


def parts() -> list[str]:
    """``SUITE.FUNCTION`` of all benchmarks, in the order of the files."""
    found = []
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found.append(f"{path.stem.removeprefix('test_')}.{node.name}")
    return found


def read(folder: Path) -> Run:
    """Read a folder that `bench.run` wrote.

    Raises:
        ValueError: if it is none.
    """
    if not (folder / "environment.json").exists():
        raise ValueError(f"{folder} is no folder of results: it has no environment.json")
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
            told = json.loads(outcome.read_text(encoding="utf-8"))
            skipped += [(part, name, reason) for name, reason in told["skipped"]]
            failed += [(part, name, "") for name in told["failed"]]
    best = folder / "ceilings.json"
    ceilings = json.loads(best.read_text(encoding="utf-8")) if best.exists() else None
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
    """Results by group, groups and results as they ran."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.group, []).append(result)
    return groups


def speed_up(result: Result, group: list[Result]) -> float | None:
    """Times the speed of the group's baseline; None without one.

    Where both ran in turns, the median of the ratios within rounds; of medians otherwise.
    """
    if PAIRED in result.notes:
        return float(result.notes[PAIRED])
    baselines = [each.median for each in group if each.role == "baseline"]
    return statistics.median(baselines) / result.median if baselines else None
