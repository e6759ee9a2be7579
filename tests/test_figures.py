"""The figures in README.md and docs/ match the benchmark runs that they name."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Without PYTHONSAFEPATH the root is on sys.path, so that bench/ can be imported.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


@pytest.fixture(scope="module")
def rewritten():
    """The text that `python -m bench.quote` would write, by page name."""
    script = (
        "import json, bench.quote as q;"
        "print(json.dumps({p.name: q.update(p.read_text(encoding='utf-8')) for p in q.PAGES}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_figures_are_those_of_the_run(page, rewritten):
    assert page.read_text(encoding="utf-8") == rewritten[page.name], (
        "figures differ from the run; update them with python -m bench.quote"
    )


def test_the_readme_quotes_runs_with_device_versions_and_date():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- figures: (\w+) (\S+) -->(.*?)<!-- end -->", text, re.DOTALL)
    assert {kind for kind, _, _ in blocks} == {"steps", "losses", "trainer"}
    for _, run, block in blocks:
        environment = json.loads((ROOT / f"bench/results/{run}/environment.json").read_text())
        assert f"Measured on {environment['date']}" in block
        assert f"torch {environment['versions']['torch']}" in block
        assert block.count("|") > 10


def test_a_changed_figure_is_seen():
    """The check fails if one digit of a block is changed."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    script = (
        "import sys, bench.quote as q; t = sys.stdin.read(); sys.exit(0 if q.update(t) == t else 3)"
    )

    def changed(text):
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=ENVIRONMENT, input=text, text=True
        )
        return done.returncode

    assert changed(text) == 0
    row = re.search(r"\| base T5 \| [^\n]*\d", text)
    digit = "1" if row.group()[-1] != "1" else "2"
    assert changed(text[: row.end() - 1] + digit + text[row.end() :]) == 3
