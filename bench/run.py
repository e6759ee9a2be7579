"""Run the suites part by part into a folder, and continue where an earlier call stopped.

    python -m bench.run FOLDER [--seconds 480] [--only loss] [--lengths NAME_OR_FILE]

A part is one test function of a suite. ``FOLDER/raw/SUITE.FUNCTION.json`` holds its measurements in
pytest-benchmark's format, and ``SUITE.FUNCTION.outcome.json`` the benchmarks that were skipped or
failed. A part with measurements is not run again. The ceilings of the device, which predictions
need, are measured first (``FOLDER/ceilings.json``). At the end, `bench.report` writes a report of
all results so far.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

from tokenpack.commands.machine import describe_machine, versions
from tokenpack.cost import measure_ceilings, write_ceilings

from . import report
from .folder import commit, device, today
from .length_distributions import DEFAULT
from .results import parts

HERE = Path(__file__).parent
CEILINGS = "ceilings.json"
LONG_ON_A_CPU = ("compile.test_base", "profile.test_base", "training_step.test_base")
_PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "fast-axolotl", "accelerate")


def main(arguments: list[str] | None = None) -> int:
    """Run the missing parts. Returns 1 if a benchmark failed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.run")
    parser.add_argument("folder", type=Path, help="results folder, created if it does not exist")
    parser.add_argument("--seconds", type=float, help="start no new part after this time")
    parser.add_argument("--only", default="", help="run only parts whose names contain this")
    parser.add_argument("--lengths", default=DEFAULT, help="see bench/length_distributions.py")
    given = parser.parse_args(arguments)
    raw = given.folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    _write_environment(given)
    if not (given.folder / CEILINGS).exists():
        write_ceilings(measure_ceilings(), given.folder / CEILINGS)

    begin, failed, left = time.monotonic(), [], []
    for part in parts():
        if given.only not in part or (raw / f"{part}.json").exists():
            continue
        if not given.only and not torch.cuda.is_available() and part in LONG_ON_A_CPU:
            print(f"== {part}: takes minutes on a CPU, so run it with --only {part}", flush=True)
            continue
        if given.seconds is not None and time.monotonic() - begin > given.seconds:
            left.append(part)
            continue
        print(f"== {part}", flush=True)
        if not _run(part, raw, given):
            failed.append(part)
    report.write(given.folder)
    if left:
        print(f"not run, out of time: {', '.join(left)}; repeat the command to continue")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run(part: str, raw: Path, given: argparse.Namespace) -> bool:
    suite, _, function = part.partition(".")
    results, outcome = raw / f"{part}.json", raw / f"{part}.outcome.json"
    unfinished = results.with_suffix(".part")
    command = [
        *(sys.executable, "-m", "pytest", f"{HERE / f'test_{suite}.py'}::{function}"),
        *("-q", "--no-header", "--no-summary", "--benchmark-only"),
        *("-p", "no:cacheprovider", "-p", "no:hypothesispytest"),  # the latter takes a second
        *(f"--benchmark-json={unfinished}", f"--record-outcome={outcome}"),
        *("--benchmark-columns=median,iqr,rounds", "--benchmark-warmup=off"),
        f"--lengths={given.lengths}",
        f"--ceilings={raw.parent / CEILINGS}",
    ]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    begin = time.monotonic()
    code = subprocess.run(command, env=environment, cwd=HERE.parent, check=False).returncode
    if not outcome.exists():  # pytest crashed before it wrote the outcome
        return False
    record = json.loads(outcome.read_text(encoding="utf-8"))
    record["seconds"] = round(time.monotonic() - begin, 1)
    outcome.write_text(json.dumps(record, indent=1), encoding="utf-8")
    if code == 0 and unfinished.exists():
        unfinished.replace(results)
    return code == 0


def _write_environment(given: argparse.Namespace) -> None:
    """Record what the results depend on. A folder can only be continued with the same settings."""
    path = given.folder / "environment.json"
    settings = {"commit": commit(), "asked": {"lengths": given.lengths}}
    if path.exists():
        recorded = json.loads(path.read_text(encoding="utf-8"))
        before = {name: recorded.get(name) for name in settings}
        if before != settings:
            raise SystemExit(
                f"folder must have results of {settings}, got {given.folder} with {before}; choose "
                "another folder"
            )
        return
    environment = {
        "date": today(),
        "device": device(),
        "threads": torch.get_num_threads(),
        **settings,
        "machine": describe_machine(),
        "versions": {**versions(), **{peer: _version(peer) for peer in _PEERS}},
    }
    path.write_text(json.dumps(environment, indent=1) + "\n", encoding="utf-8")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
