"""The site builds without warnings, its links resolve, and its statements match the code.

Links to other hosts are not fetched. They only have to be well-formed.
"""

import ast
import functools
import html.parser
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from .test_bench_report import benchmark, make_folder
from .test_readme import README

ROOT = README.parent
DOCS = ROOT / "docs"
API = (
    "tokenpack",
    "tokenpack.attention",
    "tokenpack.kernels",
    "tokenpack.kernels.attention",
    "tokenpack.packing",
    "tokenpack.data",
    "tokenpack.cost",
    "tokenpack.metrics",
    "tokenpack.trainer",
    "tokenpack.models.decoder",
    "tokenpack.models.condenser",
)


# Fixed here, so that the variables of a surrounding `make` have no effect.
ENVIRONMENT = {
    "NO_MKDOCS_2_WARNING": "1",
    "PYTHONSAFEPATH": "1",
    "RESULTS": str(ROOT / "bench/results"),
}


class Page(html.parser.HTMLParser):
    """The links, loaded resources and anchors of one page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        target = given.get("href") or given.get("src")
        if target is not None:
            (self.links if tag == "a" else self.loaded).append(target)


@functools.cache
def parsed(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def build(out: Path, config: Path = ROOT / "mkdocs.yml", **environment: str):
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config, "-d", out],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
    )


MEASURED = "cpu-2000-01-01"  # a run of the tests, next to the committed ones


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """The committed results, and a run whose figures are known."""
    folder = tmp_path_factory.mktemp("results")
    shutil.copytree(ROOT / "bench/results", folder, dirs_exist_ok=True)
    run = make_folder(folder / MEASURED)
    planned = benchmark("tokenpack", "contender", 0.004)
    planned["extra_info"]["suite"] = "packing"
    planned["params"] = {"shape": "lognormal", "capacity": 2048, "count": 10_000}
    (run / "raw/packing.test_plan.json").write_text(json.dumps({"benchmarks": [planned]}))
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory, results) -> Path:
    """The site, built once: that takes ten seconds."""
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name, reason=f"{name} is not installed (pip install '.[docs]')")
    out = tmp_path_factory.mktemp("site")
    before = sorted(results.rglob("*"))
    done = build(out, RESULTS=str(results))
    assert done.returncode == 0, done.stderr
    assert sorted(results.rglob("*")) == before  # a build changes no committed file
    return out


def broken(site: Path) -> list[str]:
    """Broken links and missing resources of the site, each with its page and the reason."""
    wrong = []
    for path in sorted(site.rglob("*.html")):
        page = parsed(path)
        for target in page.links + page.loaded:
            reason = why_wrong(target, path, site, loaded=target not in page.links)
            if reason is not None:
                wrong.append(f"{path.relative_to(site)}: {target}: {reason}")
    return wrong


def why_wrong(target: str, path: Path, site: Path, loaded: bool) -> str | None:
    parts = urlsplit(target)
    if parts.scheme == "data":
        return None
    if parts.scheme or parts.netloc:
        if loaded:
            return "loaded from another host"
        well_formed = parts.scheme == "https" and re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc)
        return None if well_formed and not re.search(r"\s", target) else "no https address"
    if path.name == "404.html":
        return None  # served from any depth, so its links are relative to the root
    there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    there = there / "index.html" if there.is_dir() else there
    if not there.is_relative_to(site.resolve()) and there != path:
        return "outside of the site"
    if not there.exists():
        return "no such file"
    known = there.suffix == ".html" and parts.fragment not in ("", "__top")
    if known and unquote(parts.fragment) not in parsed(there).anchors:
        return "no such anchor"
    return None


def test_every_link_of_the_site_leads_somewhere(site):
    assert len(list(site.rglob("*.html"))) > 15
    assert sum(len(parsed(path).links) for path in site.rglob("*.html")) > 500
    assert not broken(site)


def test_a_broken_link_would_be_found(site, tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="b.html">gone</a> <a href="a.html#gone">gone</a> <a href="#here" id="here">me</a>'
        '<a href="https://example.org/x">well-formed</a> <a href="http://example.org">not https</a>'
        '<script src="https://example.org/x.js"></script>'
    )
    assert [each.split(": ", 1)[1] for each in broken(tmp_path)] == [
        "b.html: no such file",
        "a.html#gone: no such anchor",
        "http://example.org: no https address",
        "https://example.org/x.js: loaded from another host",
    ]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_from_the_repository_into_itself(site, name):
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme == "https", link
            continue
        if not parts.path:
            assert parts.fragment in headings(text), link
            continue
        there = ROOT / parts.path
        assert there.exists(), link
        if parts.fragment:
            page = site / there.relative_to(DOCS).with_suffix(".html")
            assert parts.fragment in parsed(page).anchors, link


def headings(text: str) -> set[str]:
    """Anchors that GitHub gives the headings of a Markdown page."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


def test_a_page_in_the_repository_links_to_what_is_there():
    """Pages are also read in the repository, where links to tables point to their files."""
    for path in DOCS.rglob("*.md"):
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s#]+)[^)\s]*\)", text):
            assert urlsplit(link).scheme or (path.parent / link).exists(), f"{path.name}: {link}"


@pytest.mark.parametrize("module", API)
def test_the_api_has_every_public_name(site, module):
    names = {f"{module}.{name}" for name in importlib.import_module(module).__all__}
    anchors = set().union(*(parsed(path).anchors for path in (site / "api").glob("*.html")))
    assert not names - anchors


def test_benchmarks_are_those_of_committed_runs(site):
    folders = [path.parent.name for path in (ROOT / "bench/results").glob("*/environment.json")]
    text = (site / "benchmarks.html").read_text(encoding="utf-8")
    assert "No run is committed yet" not in text
    for name in folders:
        assert (site / f"benchmarks/{name}.html").exists()


def test_a_run_is_shown_as_it_was_measured(site):
    text = (site / "benchmarks.html").read_text(encoding="utf-8")
    shown = text.partition(f'<h3 id="{MEASURED}"')[2]  # the oldest run, and so the last
    assert shown
    assert ">3.90</td>" in shown
    assert "No GPU was used" in shown
    every = (site / f"benchmarks/{MEASURED}.html").read_text(encoding="utf-8")
    assert ">500 ms</td>" in every
    if importlib.util.find_spec("matplotlib"):
        assert (site / f"benchmarks/{MEASURED}/packing.png").exists()


def test_a_link_to_nowhere_fails_the_build(site, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# Here\n\n[gone](nowhere.md) and [gone](index.md#nowhere)\n")
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    config = re.sub(r"(?ms)^(nav|hooks|plugins|exclude_docs|not_in_nav):.*?(?=^\S|\Z)", "", config)
    (tmp_path / "mkdocs.yml").write_text(config)
    done = build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert done.returncode != 0
    assert "nowhere.md" in done.stderr
    assert "#nowhere" in done.stderr


# ------------------------------------------------------------------------------ examples and quotes


@pytest.mark.parametrize(
    "name",
    ["index", "getting-started", "chat", "shards", "decoder", "exactness", "kernels", "migrating"],
)
def test_examples_run(name, tmp_path, monkeypatch):
    """Runs all Python blocks of a page in order, in one scope."""
    for needed in ("accelerate", "datasets"):
        pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    scope = {}
    for block in blocks:
        exec(compile(block, f"docs/{name}.md", "exec"), scope)


def test_messages_are_those_of_the_code():
    """Each message in the first column of the tables of troubleshooting.md is in the code."""
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 50
    strings = "\n".join(strings_of(path) for path in sources())
    missing = [
        message
        for message in messages
        if not all(piece.strip() in strings for piece in message.split("…"))
    ]
    assert not missing


def sources():
    return [path for part in ("tokenpack", "kernels") for path in (ROOT / part).rglob("*.py")]


def strings_of(path: Path) -> str:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    constants = (n for n in nodes if isinstance(n, ast.Constant) and id(n) not in docstrings)
    return "\n".join(n.value for n in constants if isinstance(n.value, str))
