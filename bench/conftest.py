"""Options of the suites, and what each result is, so that reports know what to hold against what.

A suite's module may name its ``BASELINES``, what a user would otherwise run, and its ``LIMITS``,
what nothing can be faster than: values of the parameter ``by``, which names the contender.
"""

import json
from pathlib import Path

import pytest
import torch

from . import common
from .length_distributions import DEFAULT, PRESETS


def pytest_addoption(parser):
    """What the suites may be run on."""
    group = parser.getgroup("tokenpack benchmarks")
    group.addoption(
        "--lengths",
        default=DEFAULT,
        help=f"of the batches: {', '.join(PRESETS)}, or a file with one or two integers a line",
    )
    group.addoption(
        "--ceilings",
        type=Path,
        help="of the device, a JSON file of tokenpack.cost's; by default they are measured",
    )
    group.addoption(
        "--record-outcome",
        type=Path,
        help="a JSON file for who passed, who was skipped and why, and who failed",
    )


def pytest_configure(config):
    """Suites make their batches while they are imported."""
    common.chosen.lengths = config.getoption("--lengths")
    common.chosen.ceilings = config.getoption("--ceilings")
    try:
        common.chosen.check()
    except (ValueError, OSError) as error:
        raise pytest.UsageError(str(error)) from None
    if path := config.getoption("--record-outcome"):
        config.pluginmanager.register(Outcome(path))


class Outcome:
    """Writes who passed, was skipped or failed."""

    def __init__(self, path):
        self.path = path
        self.told = {"passed": 0, "skipped": [], "failed": []}

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.rpartition("::")[2]
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            self.told["skipped"].append([name, reason.removeprefix("Skipped: ")])
        elif report.failed:
            self.told["failed"].append(name)
        elif report.when == "call":
            self.told["passed"] += 1

    def pytest_sessionfinish(self):
        self.path.write_text(json.dumps(self.told, indent=1), encoding="utf-8")


_MANY_ROUNDS = 200  # of which the JSON keeps what describes them


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Results may be published: without the machine's name, and without a line per round."""
    output_json["machine_info"] = {
        key: output_json["machine_info"].get(key) for key in ("system", "machine", "python_version")
    }
    output_json["commit_info"] = {
        key: output_json["commit_info"].get(key) for key in ("id", "time", "dirty")
    }
    for each in output_json["benchmarks"]:
        if each["stats"]["rounds"] > _MANY_ROUNDS:
            each["stats"]["data"] = []


@pytest.fixture(autouse=True)
def named(benchmark, request):
    """Say in the result who was measured, and what it is to be held against."""
    module = request.module
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    notes = benchmark.extra_info
    notes["suite"] = module.__name__.rpartition("test_")[2]
    notes["by"] = by = parameters.get("by", "tokenpack")
    notes["role"] = (
        "baseline"
        if by in getattr(module, "BASELINES", ())
        else "limit"
        if by in getattr(module, "LIMITS", ())
        else "contender"
    )
    notes["device"] = common.DEVICE_NAME


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A contender that does not fit is no failure of the suite; the report says so."""
    try:
        return (yield)
    except torch.OutOfMemoryError:
        pytest.skip("does not fit into the device's memory")
    finally:
        if common.ON_GPU:
            torch.cuda.empty_cache()
