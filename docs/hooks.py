"""MkDocs hooks: lay out the sources as installed, and add benchmark results to the site.

- mkdocstrings finds `kernels/` as `tokenpack.kernels`, its name after installation.
- ``<!-- runs -->`` in `docs/benchmarks.md` is replaced by a section for each results folder with an
  ``environment.json``: summary, plots and ratios. A separate page per run has all tables.
- ``<!-- families of the README -->`` is replaced by the table of families in README.md.
- The tables `errors.md`, `compile.md` and `decoder_examples.md` of `bench/results/` become pages of
  the site. Links to these files are rewritten to the pages.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
RUNS = "<!-- runs -->"
FAMILIES = "<!-- families of the README -->"
TABLES = ("errors.md", "compile.md", "decoder_examples.md")

_scratch: list[tempfile.TemporaryDirectory[str]] = []
_runs = ""


@event_priority(100)  # before mkdocstrings reads `paths`
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Give mkdocstrings a folder of symlinks that lays out the sources as installed."""
    package = _new_scratch() / "tokenpack"
    package.mkdir()
    for path in (ROOT / "tokenpack").iterdir():
        (package / path.name).symlink_to(path)
    (package / "kernels").symlink_to(ROOT / "kernels")
    handlers = config.plugins["mkdocstrings"].config["handlers"]
    handlers["python"]["paths"] = [str(package.parent)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and plots of the benchmark results."""
    global _runs
    results = ROOT / config.extra["results"]
    for name in TABLES:
        if (ROOT / "bench/results" / name).exists():
            text = (ROOT / "bench/results" / name).read_text(encoding="utf-8")
            files.append(File.generated(config, f"benchmarks/{name}", content=text))
    # Newest first: a folder's name ends in its date.
    folders = [path.parent for path in results.glob("*/environment.json")]
    folders.sort(key=lambda folder: (folder.name[-10:], folder.name), reverse=True)
    sections = [_add_run(folder, files, config) for folder in folders]
    _runs = "\n\n".join(sections) or "No run is committed yet, so there are no figures here."
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in runs and families, and point links to the tables at their pages."""
    for name in TABLES:
        markdown = markdown.replace(f"](../bench/results/{name}", f"](benchmarks/{name}")
    if FAMILIES in markdown:
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        table = readme.partition("<!-- families -->")[2].partition("<!-- end -->")[0]
        markdown = markdown.replace(FAMILIES, table)
    return markdown.replace(RUNS, _runs)


def on_post_build(**_: Any) -> None:
    """Remove the temporary symlinks and plots; the site has its own copies."""
    while _scratch:
        _scratch.pop().cleanup()


def _new_scratch() -> Path:
    _scratch.append(tempfile.TemporaryDirectory(prefix="tokenpack-docs-"))
    return Path(_scratch[-1].name)


def _add_run(folder: Path, files: Files, config: MkDocsConfig) -> str:
    """Add a run's page and plots to the site. Returns its section of `benchmarks.md`."""
    plots, report, results = _bench()
    run = dataclasses.replace(results.read(folder), folder=_new_scratch())  # for its plots
    pictures = plots.draw(run)
    for picture in (each for drawn in pictures.values() for each in drawn):
        uri = f"benchmarks/{folder.name}/{picture.path.name}"
        files.append(File.generated(config, uri, content=picture.path.read_bytes()))
    every = report.markdown(run, pictures).replace("# Benchmarks of tokenpack", f"# {folder.name}")
    every = re.sub(r"(?m)^(!\[.*\]\()", rf"\1{folder.name}/", every)
    files.append(File.generated(config, f"benchmarks/{folder.name}.md", content=every))
    return _section(folder.name, run, pictures, report)


def _section(name: str, run: Any, pictures: dict[str, Any], report: Any) -> str:
    blocks = [f"### {name}", "\n".join(f"- {line}" for line in report.summary(run))]
    for suite, title in report.SUITES.items():
        if not (members := run.of(suite)):
            continue
        blocks.append(f"#### {title} {{ #{name}-{suite} }}")
        blocks += [
            f"![{each.title}](benchmarks/{name}/{each.path.name})"
            for each in pictures.get(suite, [])
        ]
        if len(ratios := report.ratio_table(members)) > 1:
            blocks.append(report.markdown_table(ratios))
    blocks.append(f"[All tables of this run](benchmarks/{name}.md)")
    return "\n\n".join(blocks)


def _bench() -> tuple[Any, Any, Any]:
    """Import modules from `bench/`, which is not installed."""
    # The root is on sys.path only during this import. If it stayed there, transformers would import
    # kernels/ in place of the Hugging Face package of that name.
    path = list(sys.path)
    sys.path.insert(0, str(ROOT))
    try:
        from bench import plots, report, results
    finally:
        sys.path[:] = path
    return plots, report, results
