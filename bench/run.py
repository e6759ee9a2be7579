"""Run the suites one part after another into a folder, and go on where an earlier call stopped.

    python -m bench.run FOLDER [--seconds 480] [--only loss] [--lengths NAME_OR_FILE]

A part is one test function of a suite. What it measured lies in ``FOLDER/raw/SUITE.FUNCTION.json``
(pytest-benchmark's), who was skipped and why beside it (``.outcome.json``); a part whose files are
there is not run again. What the device can do at the best is measured first
(``FOLDER/ceilings.json``), for the predictions. `bench.report` is called at the end, on what there
is by then.
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
LONG_ON_A_CPU = ("profile.test_base", "training_step.test_base")
_PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "fast-axolotl", "accelerate")


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing. Returns 1 if a benchmark failed, 0 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m bench.run")
    parser.add_argument("folder", type=Path, help="of the results, made if missing")
    parser.add_argument("--seconds", type=float, help="begin no part after this long")
    parser.add_argument("--only", default="", help="parts whose names have this in them")
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
            print(f"== {part}: takes minutes on a CPU; --only {part} runs it", flush=True)
            continue
        if given.seconds is not None and time.monotonic() - begin > given.seconds:
            left.append(part)
            continue
        print(f"== {part}", flush=True)
        if not _run(part, raw, given):
            failed.append(part)
    report.write(given.folder)
    if left:
        print(f"not run yet, for want of time: {', '.join(left)}; the same command goes on")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run(part: str, raw: Path, given: argparse.Namespace) -> bool:
    suite, _, function = part.partition(".")
    figures, outcome = raw / f"{part}.json", raw / f"{part}.outcome.json"
    unfinished = figures.with_suffix(".part")
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
    if not outcome.exists():  # died before it could say anything
        return False
    told = json.loads(outcome.read_text(encoding="utf-8"))
    told["seconds"] = round(time.monotonic() - begin, 1)
    outcome.write_text(json.dumps(told, indent=1), encoding="utf-8")
    if code == 0 and unfinished.exists():
        unfinished.replace(figures)
    return code == 0


def _write_environment(given: argparse.Namespace) -> None:
    """What the figures depend on. Of a folder that is gone on with, what it was begun with."""
    path = given.folder / "environment.json"
    asked = {"lengths": given.lengths}
    here = {"commit": commit(), "asked": asked}
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        begun = {name: before.get(name) for name in here}
        if begun != here:
            raise SystemExit(
                f"{given.folder} was begun with {begun}, this is {here}: name another folder"
            )
        return
    environment = {
        "date": today(),
        "device": device(),
        "threads": torch.get_num_threads(),
        **here,
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
