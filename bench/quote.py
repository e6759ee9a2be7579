"""Figures in README.md and docs/, written from committed runs and never by hand.

    <!-- figures: KIND RUN -->  what this file writes  <!-- end -->

`python -m bench.quote` writes them anew, from ``bench/results/RUN``; a test fails where they
differ.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from .report import Table, markdown_table, prediction_lines, predictions_table
from .results import Result, Run, read

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_BLOCK = re.compile(r"(<!-- figures: (\w+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def update(text: str) -> str:
    """``text`` with its blocks written anew.

    Raises:
        ValueError: if a block names no kind or no run that there is.
    """

    def write(block: re.Match[str]) -> str:
        begin, kind, folder, end = block.groups()
        if kind not in KINDS:
            raise ValueError(f"figures of {kind!r}: takes one of {', '.join(KINDS)}")
        run = read(ROOT / "bench/results" / folder)
        return f"{begin}\n{KINDS[kind](run)}\n\n{_origin(run)}\n{end}"

    return _BLOCK.sub(write, text)


def _origin(run: Run) -> str:
    environment = run.environment
    device, versions = environment["device"], environment["versions"]
    if device == "cpu":
        machine = environment["machine"]
        device = f"{machine['physical_cores']} cores ({machine['cpu']})"
    return (
        f"Measured on {environment['date']}: {device}, {environment['threads']} threads, torch "
        f"{versions['torch']}, transformers {versions['transformers']}; medians, whose spread and "
        f"rounds are in `bench/results/{run.folder.name}/report.md`."
    )


def _steps(run: Run) -> str:
    table: Table = [
        ["model", "padding", "times as fast", "ideal", "of the ideal", "peak MiB, padded : packed"]
    ]
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
    what = groups[few].removeprefix("head and loss, ").replace(f"{few} classes", "classes")
    table: Table = [[what, *(f"{each:,}: {cost}" for each in (few, many) for cost in _COSTS)]]
    for by, name in (
        ("tokenpack", "`packed_linear_cross_entropy`"),
        ("logits", "logits, then `F.cross_entropy`"),
        ("F.linear_cross_entropy", "`F.linear_cross_entropy`, its default chunks"),
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
    table: Table = [["one epoch", "times as long", "peak MiB of a step"]]
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
    head = ["% of a patched step", *(_short(each) for each in profiles)]
    rows = [
        [name.removesuffix(", %"), *(f"{each.notes[name]:.1f}" for each in profiles)]
        for name in names
    ]
    return markdown_table([head, *rows])


def _short(each: Result) -> str:
    return each.group.split(", ")[1]


def _by(run: Run, suite: str, group: str) -> dict[str, Result]:
    found = {each.by: each for each in run.of(suite) if each.group.startswith(group)}
    if not found:
        raise ValueError(f"{run.folder} has nothing of {group!r}")
    return found


def _predictions(run: Run) -> str:
    facts = "\n".join(f"- {line}" for line in prediction_lines(run))
    return f"{facts}\n\n{markdown_table(predictions_table(run))}"


KINDS: dict[str, Callable[[Run], str]] = {
    "steps": _steps,
    "losses": _losses,
    "trainer": _trainer,
    "profile": _profile,
    "predictions": _predictions,
}


def main() -> int:
    """Write all pages anew."""
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = update(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
