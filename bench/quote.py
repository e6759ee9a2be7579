"""Write the measurements in README.md and docs/ from committed runs.

    <!-- figures: KIND RUN -->  generated text  <!-- end -->

`python -m bench.quote` rewrites all such blocks from ``bench/results/RUN``, which is a folder of
`bench.run` or the file of `bench.published_models`. A test fails if a block differs from its run.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .report import Table, markdown_table, prediction_lines, predictions_table
from .results import Result, Run, read

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_BLOCK = re.compile(r"(<!-- figures: (\w+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def update(text: str) -> str:
    """Rewrite the blocks of ``text``.

    Raises:
        ValueError: if a block names a kind or a run that does not exist.
    """

    def write(block: re.Match[str]) -> str:
        begin, kind, name, end = block.groups()
        if kind not in KINDS:
            raise ValueError(f"figures must be of a kind in {', '.join(KINDS)}, got {kind!r}")
        figures = KINDS[kind](ROOT / "bench/results" / name)
        return f"{begin}\n{figures}\n{end}"

    return _BLOCK.sub(write, text)


def _of_run(write: Callable[[Run], str]) -> Callable[[Path], str]:
    """What ``write`` makes of a results folder, and where its figures are from."""

    def write_with_origin(folder: Path) -> str:
        run = read(folder)
        return (
            f"{write(run)}\n\n{_origin(run.environment)} Values are medians; "
            f"`bench/results/{folder.name}/report.md` has their spread and number of rounds."
        )

    return write_with_origin


def _origin(environment: dict[str, Any]) -> str:
    device, versions = environment["device"], environment["versions"]
    if device == "cpu":
        machine = environment["machine"]
        device = f"{machine['physical_cores']} cores ({machine['cpu']})"
    return (
        f"Measured on {environment['date']}: {device}, {environment['threads']} threads, torch "
        f"{versions['torch']}, transformers {versions['transformers']}."
    )


def _published(file: Path) -> str:
    run = json.loads(file.read_text(encoding="utf-8"))
    table: Table = [["model", "check", "result", "padding", "speed-up", "ideal speed-up"]]
    for each in run["findings"]:
        speeds = [each["speed_up"], each["ideal"]]
        cells = ["" if speed is None else f"{speed:.2f}" for speed in speeds]
        table.append(
            [each["model"], each["check"], each["result"], f"{each['padding']:.0%}", *cells]
        )
    peers = " and ".join(f"{name} {run['versions'][name]}" for name in ("peft", "trl"))
    return f"{markdown_table(table)}\n\n{_origin(run)[:-1]}, {peers}."


def _steps(run: Run) -> str:
    header = ["model", "padding", "speed-up", "ideal speed-up", "speed-up / ideal"]
    table: Table = [[*header, "peak MiB, padded : packed"]]
    for size in ("base", "small"):
        for name in ("T5", "NLLB", "Llama"):
            found = _by(run, "training_step", f"training step, {size} {name},")
            packed, padded = found["packed"].notes, found["padded, SDPA"].notes
            peak = "peak memory, MiB"
            table.append(
                [
                    f"{size} {name}",
                    f"{packed['padding share']:.1%}",
                    f"{packed['forward and backward, round by round']:.2f}",
                    f"{packed['ideal, forward and backward']:.2f}",
                    f"{packed['of the ideal']:.2f}",
                    f"{padded[peak]:,} : {packed[peak]:,}",
                ]
            )
    return markdown_table(table)


def _losses(run: Run) -> str:
    groups = {
        each.parameters["classes"]: each.group
        for each in run.of("loss")
        if "extra memory, MiB" in each.notes
    }
    few, many = min(groups), max(groups)
    shape = groups[few].removeprefix("head and loss, ").replace(f"{few} classes", "classes")
    table: Table = [[shape, *(f"{each:,}: {cost}" for each in (few, many) for cost in _COSTS)]]
    for by, name in (
        ("tokenpack", "`packed_linear_cross_entropy`"),
        ("logits", "logits, then `F.cross_entropy`"),
        ("F.linear_cross_entropy", "`F.linear_cross_entropy`, default chunks"),
    ):
        results = [_by(run, "loss", groups[classes]).get(by) for classes in (few, many)]
        table.append([name, *(cell for each in results for cell in _loss_cells(each))])
    return markdown_table(table)


_COSTS = ("memory", "time")


def _loss_cells(each: Result | None) -> tuple[str, str]:
    if each is None:
        return "not run", "not run"
    return f"{each.notes['extra memory, MiB']:,.0f} MiB", f"{1e3 * each.median:,.0f} ms"


def _trainer(run: Run) -> str:
    table: Table = [["one epoch", "relative time", "peak MiB of a step"]]
    for group in dict.fromkeys(each.group for each in run.of("trainer")):
        found = _by(run, "trainer", group)
        ours = found["token budget"]
        table.append(
            [
                f"{group.split()[3].rstrip(',').upper()}, `HierarchicalTokenTrainer`",
                "1",
                str(ours.notes["peak MiB of a step"]),
            ]
        )
        table += [
            [
                f"`Seq2SeqTrainer`, {by}",
                f"{each.median / ours.median:.2f}",
                f"{each.notes['peak MiB of a step']:,}",
            ]
            for by, each in found.items()
            if by != "token budget"
        ]
    return markdown_table(table)


def _profile(run: Run) -> str:
    profiles = [
        each
        for size in ("base", "small")
        for each in run.of("profile")
        if each.by == "packed" and f", {size} " in each.group
    ]
    names = [name for name in profiles[0].notes if name.endswith(", %")]
    header = ["% of a patched step", *(_short(each) for each in profiles)]
    rows = [
        [name.removesuffix(", %"), *(f"{each.notes[name]:.1f}" for each in profiles)]
        for name in names
    ]
    return markdown_table([header, *rows])


def _short(each: Result) -> str:
    return each.group.split(", ")[1]


def _packing(run: Run) -> str:
    plans = [each for each in run.of("packing") if each.name.startswith("test_plan[")]
    counts = sorted({each.parameters["count"] for each in plans})
    plan_table: Table = [["lengths", "floor", "`auto` / floor", "`auto`"]]
    for count in counts:
        floor, auto = (
            {each.group: each.median for each in plans if _is_plan(each, count, by)}
            for by in ("floor", "auto")
        )
        multiples = [auto[group] / floor[group] for group in floor]
        plan_table.append(
            [
                f"{count:,}",
                f"{_range(floor.values(), 1e3)} ms",
                _range(multiples),
                f"{_range(auto.values(), 1e3)} ms",
            ]
        )
    peer_table: Table = [["100,000 sequences", "time", "relative time", "slots filled"]]
    planned = _by(run, "packing", "plan 100,000 log-normal lengths, lengths alone")
    rows = _by(run, "packing", "100,000 log-normal sequences to packed rows")
    for task, found, ours in (
        ("planned", planned, "tokenpack auto"),
        ("packed into rows in memory", rows, "tokenpack"),
    ):
        for by, each in found.items():
            filled = each.notes.get("slots with a token of the data, %")
            peer_table.append(
                [
                    f"{task}: {by}",
                    f"{1e3 * each.median:,.1f} ms",
                    f"{each.median / found[ours].median:.3g}",
                    "" if filled is None else f"{filled:.2f}%",
                ]
            )
    linear = [_by(run, "packing", f"linear planners, {count:,} ") for count in counts]
    sequence_table: Table = [["ns per sequence", *(f"{count:,} sequences" for count in counts)]]
    sequence_table += [
        [by, *(str(found[by].notes["ns per sequence"]) for found in linear)] for by in linear[0]
    ]
    return "\n\n".join(markdown_table(each) for each in (plan_table, peer_table, sequence_table))


def _is_plan(each: Result, count: int, by: str) -> bool:
    return each.parameters["count"] == count and each.by == by


def _range(values: Iterable[float], scale: float = 1.0) -> str:
    """Minimum and maximum, to two digits."""
    found = [scale * value for value in values]
    ends = (min(found), max(found))
    return " - ".join(f"{end:.0f}" if end >= 10 else f"{end:#.2g}" for end in ends)


def _by(run: Run, suite: str, group: str) -> dict[str, Result]:
    found = {each.by: each for each in run.of(suite) if each.group.startswith(group)}
    if not found:
        raise ValueError(f"run must have results of {group!r}, got {run.folder} without them")
    return found


def _predictions(run: Run) -> str:
    facts = "\n".join(f"- {line}" for line in prediction_lines(run))
    return f"{facts}\n\n{markdown_table(predictions_table(run))}"


# Each takes the path of a run.
KINDS: dict[str, Callable[[Path], str]] = {
    "steps": _of_run(_steps),
    "losses": _of_run(_losses),
    "trainer": _of_run(_trainer),
    "packing": _of_run(_packing),
    "profile": _of_run(_profile),
    "predictions": _of_run(_predictions),
    "published": _published,
}


def main() -> int:
    """Rewrite the blocks of all pages."""
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = update(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
