"""Write a report of a results folder: ``report.md``, plots, and a self-contained ``report.html``.

    python -m bench.report FOLDER               writes the report into the folder
    python -m bench.report --compare A B        prints the speed of B relative to A

Ratios come first, then medians, their spread and the number of rounds. There are no means.
"""

from __future__ import annotations

import argparse
import base64
import html
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from . import plots
from .results import PAIRED, Result, Run, grouped, read, speed_up

SUITES = {
    "training_step": "Training steps",
    "profile": "Where a step's time goes",
    "trainer": "Training end to end",
    "attention": "Attention",
    "loss": "Losses",
    "padding": "Layouts, unpad and repad",
    "packing": "Planning",
    "span_corruption": "Span corruption",
    "chat": "Chats",
}

Table = list[list[str]]  # the first row is the header


def write(folder: Path) -> None:
    """Write the report of the results in ``folder``."""
    results = read(folder)
    pictures = plots.draw(results)
    (folder / "report.md").write_text(markdown(results, pictures), encoding="utf-8")
    (folder / "report.html").write_text(_html(results, pictures), encoding="utf-8")
    print(f"wrote {folder / 'report.md'} and report.html")


# ------------------------------------------------------------------------------------------ tables


def summary(results: Run) -> list[str]:
    """What the results depend on, one line each."""
    environment = results.environment
    machine, versions = environment["machine"], environment["versions"]
    installed = [f"{name} {v}" for name, v in versions.items() if v != "not installed"]
    absent = [name for name, version in versions.items() if version == "not installed"]
    lines = [
        f"Device: {environment['device']}",
        f"Machine: {machine['cpu']}, {machine['physical_cores']} cores, "
        f"{environment['threads']} threads, {machine['memory_gib']} GiB",
        f"Date: {environment['date']}, commit {environment.get('commit') or 'unknown'}",
        f"Lengths: {environment['asked']['lengths']}",
        f"Versions: {', '.join(installed)}",
        f"Not installed: {', '.join(absent) or 'nothing'}",
    ]
    if environment["device"] == "cpu":
        lines.append("No GPU was used. These results do not apply to GPUs.")
    return lines


def ratio_table(results: Sequence[Result]) -> Table:
    """One row per group: the speed of each contender relative to the baseline."""
    groups = grouped(list(results))
    contenders = list(
        dict.fromkeys(
            each.by
            for members in groups.values()
            if 1 < len(members) == len({each.by for each in members})
            for each in members
        )
    )
    header = ["speed relative to the baseline", *contenders]
    rows = []
    for group, members in groups.items():
        ratios = {each.by: speed_up(each, members) for each in members}
        # A group with several results of one contender has only its own table, by parameters.
        if any(ratio is not None for ratio in ratios.values()) and 1 < len(members) == len(ratios):
            rows.append(
                [group, *("" if not ratios.get(by) else f"{ratios[by]:.2f}" for by in contenders)]
            )
    return [header, *rows]


def detail_table(members: Sequence[Result]) -> Table:
    """All results of one group."""
    names = list(dict.fromkeys(key for each in members for key in each.notes if key != PAIRED))
    labels = _labels(members)
    rows = [["", "x baseline", "median", "spread", "rounds", *names]]
    for each, label in sorted(zip(members, labels), key=lambda pair: pair[0].median):
        ratio = speed_up(each, list(members))
        role = "" if each.role == "contender" else f" ({each.role})"
        rows.append(
            [
                f"{label}{role}",
                "" if ratio is None else f"{ratio:.2f}",
                _seconds(each.median),
                f"{each.spread:.0%}",
                str(each.rounds),
                *(_value(each.notes.get(name)) for name in names),
            ]
        )
    return rows


def _labels(members: Sequence[Result]) -> list[str]:
    """Labels that distinguish a group's results: contenders, or parameters if they repeat."""
    if len({each.by for each in members}) == len(members):
        return [each.by for each in members]
    return [each.name.partition("[")[2].rstrip("]") or each.name for each in members]


def _seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def _value(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _gaps(results: Run) -> list[str]:
    """Benchmarks that were skipped, with the reason, that failed, or that did not run."""
    reasons: dict[tuple[str, str], int] = {}
    for part, _, reason in results.skipped:
        reasons[part, reason] = reasons.get((part, reason), 0) + 1
    lines = [f"Skipped: {part}, {count}: {why}" for (part, why), count in reasons.items()]
    lines += [f"FAILED: {part}, {name}" for part, name, _ in results.failed]
    return lines + [f"Not run: {part}" for part in results.missing]


def predictions_table(results: Run) -> Table:
    """The predictions of the cost model for the patched steps, compared with the measurements."""
    rows = [
        [
            f"{each.group}{preset}",
            f"{each.notes['padding share']:.0%}",
            f"{each.notes[PAIRED]:.2f}",
            f"{each.notes['ratio predicted']:.2f}",
            f"{each.notes[_RATIO_ERROR] - 1:+.0%}",
            f"{each.notes['seconds predicted / measured'] - 1:+.0%}",
            f"{each.notes['memory predicted / measured'] - 1:+.0%}",
        ]
        for each in results.of("training_step")
        if _RATIO_ERROR in each.notes
        for preset in [f", {each.notes['preset']}" if "preset" in each.notes else ""]
    ]
    header = ["patched step", "padding", "speed-up", "predicted", "error", "error of seconds"]
    return [[*header, "error of memory"], *rows]


_RATIO_ERROR = "ratio predicted / measured"
_PREDICTIONS = "Predictions of the cost model"


def prediction_lines(results: Run) -> list[str]:
    """The errors of the predicted ratios, and the device's ceilings; empty without predictions."""
    errors = [
        abs(each.notes[_RATIO_ERROR] - 1)
        for each in results.of("training_step")
        if _RATIO_ERROR in each.notes
    ]
    if not errors:
        return []
    lines = [
        f"Error of the predicted step-time ratios: {statistics.median(errors):.0%} in the median, "
        f"{max(errors):.0%} at most, over {len(errors)} steps."
    ]
    if ceilings := results.ceilings:
        lines.append(
            f"Ceilings of the device: {ceilings['products'] / 1e12:.3g} TFLOP/s in products, "
            f"{ceilings['attention'] / 1e12:.3g} TFLOP/s in attention, "
            f"{ceilings['bytes'] / 1e9:.3g} GB/s, {ceilings['call'] * 1e6:.2g} us per call."
        )
    return lines


# -------------------------------------------------------------------------------------- documents


def markdown(results: Run, pictures: dict[str, list[plots.Picture]]) -> str:
    """The report as Markdown."""
    blocks = ["# Benchmarks of tokenpack", "\n".join(f"- {line}" for line in summary(results))]
    for suite, title in SUITES.items():
        members = results.of(suite)
        if not members:
            continue
        blocks.append(f"## {title}")
        blocks += [f"![{each.title}]({each.path.name})" for each in pictures.get(suite, [])]
        ratios = ratio_table(members)
        if len(ratios) > 1:
            blocks.append(markdown_table(ratios))
        for group, own in grouped(members).items():
            blocks += [f"### {group}", markdown_table(detail_table(own))]
    if lines := prediction_lines(results):
        facts = "\n".join(f"- {line}" for line in lines)
        blocks += [f"## {_PREDICTIONS}", facts, markdown_table(predictions_table(results))]
    if gaps := _gaps(results):
        blocks += ["## Missing results", "\n".join(f"- {line}" for line in gaps)]
    return "\n\n".join(blocks) + "\n"


def markdown_table(table: Table) -> str:
    """A Markdown table; the first row is the header."""
    header, *rows = table
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_STYLE = """
:root { --ink: #1d2730; --soft: #66727d; --line: #e3e7ea; --ours: #2a6f97; --back: #fbfbfa; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
       max-width: 74rem; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin-bottom: .3rem; }
h2 { margin-top: 3rem; border-bottom: 2px solid var(--ours); padding-bottom: .2rem; }
ul.facts { color: var(--soft); padding-left: 1.1rem; }
img { max-width: 100%; display: block; margin: 1.2rem 0; }
table { border-collapse: collapse; margin: .8rem 0 1.4rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th { font-weight: 600; color: var(--soft); font-size: .85em; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; }
details { margin: .4rem 0; }
summary { cursor: pointer; color: var(--ours); }
td.up { font-weight: 650; color: var(--ours); }
"""


def _html(results: Run, pictures: dict[str, list[plots.Picture]]) -> str:
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>Benchmarks of tokenpack</title><style>{_STYLE}</style></head><body>",
        "<h1>Benchmarks of tokenpack</h1>",
        _list(summary(results)),
    ]
    for suite, title in SUITES.items():
        members = results.of(suite)
        if not members:
            continue
        parts.append(f"<h2>{html.escape(title)}</h2>")
        for each in pictures.get(suite, []):
            data = base64.b64encode(each.path.read_bytes()).decode()
            parts.append(
                f"<img alt='{html.escape(each.title)}' src='data:image/png;base64,{data}'>"
            )
        ratios = ratio_table(members)
        if len(ratios) > 1:
            parts.append(_html_table(ratios))
        for group, own in grouped(members).items():
            table = _html_table(detail_table(own))
            parts.append(f"<details><summary>{html.escape(group)}</summary>{table}</details>")
    if lines := prediction_lines(results):
        parts += [f"<h2>{_PREDICTIONS}</h2>", _list(lines), _html_table(predictions_table(results))]
    if gaps := _gaps(results):
        parts += ["<h2>Missing results</h2>", _list(gaps)]
    return "\n".join([*parts, "</body></html>\n"])


def _list(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<ul class='facts'>{items}</ul>"


def _html_table(table: Table) -> str:
    header, *rows = table
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in header) + "</tr>"]
    for row in rows:
        cells = [f"<td>{html.escape(row[0])}</td>"]
        for cell in row[1:]:
            up = cell.replace(".", "", 1).isdigit() and "." in cell and float(cell) >= 1.05
            mark = " class='up'" if up and header[0] else ""
            cells.append(f"<td{mark}>{html.escape(cell)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<div class='wide'><table>{''.join(lines)}</table></div>"


# ---------------------------------------------------------------------------------------- compare


def compare(first: Run, second: Run) -> Table:
    """Speed of ``second`` relative to ``first`` in common benchmarks; the largest changes first."""
    before = {(each.group, each.name): each for each in first.results}
    rows = []
    for each in second.results:
        old = before.get((each.group, each.name))
        if old is not None:
            ratio = old.median / each.median
            noise = max(old.spread, each.spread)
            verdict = "" if abs(ratio - 1) <= noise else "faster" if ratio > 1 else "slower"
            rows.append((abs(ratio - 1), [each.name, each.group, f"{ratio:.2f}", verdict]))
    rows.sort(key=lambda row: -row[0])
    header = ["benchmark", "group", "relative speed", "beyond the spread"]
    return [header, *(row for _, row in rows)]


def main(arguments: list[str] | None = None) -> int:
    """Write a report, or print a comparison."""
    parser = argparse.ArgumentParser(prog="python -m bench.report")
    parser.add_argument("folder", type=Path, nargs="?", help="results folder")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"))
    given = parser.parse_args(arguments)
    try:
        if given.compare:
            runs = [read(folder) for folder in given.compare]
            print(markdown_table(compare(*runs)))
        elif given.folder:
            write(given.folder)
        else:
            parser.error("give a results folder, or --compare A B")
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
