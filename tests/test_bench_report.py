"""The benchmarks' report: its contents, that the page is self-contained, and comparisons."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def benchmark(by, role, median, spread=0.02, **notes):
    return {
        "name": f"test_small[T5-{by}]",
        "group": "training step, small T5",
        "params": {"name": "T5", "by": by},
        "stats": {"median": median, "iqr": median * spread, "rounds": 5, "data": []},
        "extra_info": {"suite": "training_step", "by": by, "role": role, "device": "cpu", **notes},
    }


def make_folder(folder, ours=0.5, device="cpu"):
    (folder / "raw").mkdir(parents=True)
    environment = {
        "date": "2026-11-22",
        "device": device,
        "threads": 2,
        "asked": {"lengths": "instruction mix"},
        "machine": {"cpu": "a processor", "physical_cores": 2, "memory_gib": 8.0},
        "versions": {"torch": "2.13.0", "trl": "not installed"},
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    figures = [
        benchmark("padded, SDPA", "baseline", 2.0),
        benchmark("padded, eager", "contender", 2.5),
        benchmark(
            "packed",
            "contender",
            ours,
            **{"of the baseline's speed, round by round": 3.9, "padding share": 0.7},
        ),
    ]
    part = folder / "raw/training_step.test_small"
    part.with_name(part.name + ".json").write_text(json.dumps({"benchmarks": figures}))
    skipped = [["test_x[liger]", "Liger <Kernel> needs a GPU"]]
    outcome = {"passed": 3, "failed": [], "skipped": skipped}
    part.with_name(part.name + ".outcome.json").write_text(json.dumps(outcome))
    return folder


def report(*arguments, code=0):
    return run_module("bench.report", *arguments, code=code)


def run_module(module, *arguments, code=0):
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = make_folder(tmp_path_factory.mktemp("results") / "run")
    report(made)
    return made


def test_ratios_come_from_rounds_that_alternated_and_from_medians_otherwise(folder):
    text = (folder / "report.md").read_text()
    assert "| training step, small T5 | 1.00 | 0.80 | 3.90 |" in text
    assert re.search(r"\| packed \| 3\.90 \| 500 ms \| 2% \| 5 \|", text)
    assert "| padded, SDPA (baseline) | 1.00 | 2 s |" in text
    assert "mean" not in text.lower()


def test_it_lists_missing_results(folder):
    text = (folder / "report.md").read_text()
    assert "No GPU was used" in text
    assert "Not installed: trl" in text
    assert "Skipped: training_step.test_small, 1: Liger <Kernel> needs a GPU" in text
    assert "Not run: trainer.test_training" in text


def test_the_page_is_self_contained(folder):
    page = (folder / "report.html").read_text()
    assert "Liger &lt;Kernel&gt;" in page
    assert not re.search(r"(src|href)\s*=\s*['\"](?!data:)", page)
    assert "url(" not in page


def test_a_comparison_puts_changes_beyond_the_spread_first(folder, tmp_path):
    other = make_folder(tmp_path / "other", ours=0.4)
    lines = report("--compare", folder, other).splitlines()
    assert "packed" in lines[2]
    assert "1.25" in lines[2]
    assert "faster" in lines[2]
    assert not any("faster" in line or "slower" in line for line in lines[3:])


def test_a_folder_without_results_is_refused(tmp_path):
    assert "has no environment.json" in report(tmp_path, code=2)


def test_a_folder_of_another_commit_is_skipped(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench.folder import folder_in

    def folder():
        return folder_in(tmp_path)

    def started_by(commit):
        started = folder()
        started.mkdir(exist_ok=True)
        (started / "environment.json").write_text(json.dumps({"commit": commit}))

    first = folder()
    assert first.parent == tmp_path
    assert run_module("bench.folder", tmp_path).strip() == str(first)
    started_by("another")
    second = folder()
    assert second == first.with_name(first.name + "-2")
    started_by("yet another")
    assert folder() == first.with_name(first.name + "-3")
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    started_by(head.stdout.strip() or None)  # None outside of a checkout
    assert folder() == first.with_name(first.name + "-3")


def test_a_run_of_other_lengths_or_another_commit_is_not_continued(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "run")
    monkeypatch.syspath_prepend(ROOT)
    from bench import run  # in this process, where all that it imports is there already

    with pytest.raises(SystemExit, match="choose another folder"):
        run.main([str(folder), "--only", "nothing"])
