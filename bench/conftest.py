"""Options of the suites, and the role of each result, so that reports compare the right results.

The parameter ``by`` of a benchmark names the contender. The module of a suite may list, as values
of ``by``, its ``BASELINES``, which a user would run without tokenpack, and its ``LIMITS``, which no
contender can beat.
"""

import json
from pathlib import Path

import pytest
import torch

from . import common
from .length_distributions import DEFAULT, PRESETS


def pytest_addoption(parser):
    """Add the options of the suites."""
    group = parser.getgroup("tokenpack benchmarks")
    group.addoption(
        "--lengths",
        default=DEFAULT,
        help=f"of the batches: {', '.join(PRESETS)}, or a file with one or two integers per line",
    )
    group.addoption(
        "--ceilings",
        type=Path,
        help="JSON file with the device's ceilings, from tokenpack.cost (default: measure them)",
    )
    group.addoption(
        "--record-outcome",
        type=Path,
        help="JSON file for the benchmarks that passed, were skipped, with the reason, or failed",
    )


def pytest_configure(config):
    """Set the options before the suites are imported, because some make their batches then."""
    common.options.lengths = config.getoption("--lengths")
    common.options.ceilings = config.getoption("--ceilings")
    try:
        common.options.check()
    except (ValueError, OSError) as error:
        raise pytest.UsageError(str(error)) from None
    if path := config.getoption("--record-outcome"):
        config.pluginmanager.register(Outcome(path))


class Outcome:
    """Records which benchmarks passed, were skipped or failed."""

    def __init__(self, path):
        self.path = path
        self.record = {"passed": 0, "skipped": [], "failed": []}

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.rpartition("::")[2]
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            self.record["skipped"].append([name, reason.removeprefix("Skipped: ")])
        elif report.failed:
            self.record["failed"].append(name)
        elif report.when == "call":
            self.record["passed"] += 1

    def pytest_sessionfinish(self):
        self.path.write_text(json.dumps(self.record, indent=1), encoding="utf-8")


_MANY_ROUNDS = 200  # above this number, the JSON keeps only statistics


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Remove the name of the machine and long lists of rounds, so that results can be published."""
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
    """Record the contender and its role in the result."""
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
    """Skip a contender that runs out of memory. The report lists it."""
    try:
        return (yield)
    except torch.OutOfMemoryError:
        pytest.skip("does not fit into the device's memory")
    finally:
        if common.ON_GPU:
            torch.cuda.empty_cache()
