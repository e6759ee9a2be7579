"""What each class does at each entry, in Markdown: ``python -m tests.conformance.table``.

With ``--write``, record in ``packs.txt`` which variants pack. The tests fail if one of them stops.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers.utils import logging

from .compare import FALLS_BACK, PACKS, REFUSED, Cell, run_cell
from .families import CASES, NOT_BUILT, Case

ENTRIES = ("top", "base", "encoder", "decoder")
PACKS_FILE = Path(__file__).with_name("packs.txt")


def cell_text(cell: Cell | None) -> str:
    """The number of variants of each kind."""
    if cell is None:
        return "no such part"
    counts = Counter(cell.kinds.values())
    parts = [f"{kind} {counts[kind]}" for kind in (PACKS, FALLS_BACK, REFUSED) if counts[kind]]
    if cell.failures:
        parts.append(f"**differs {len(cell.failures)}**")
    return ", ".join(parts)


def table_row(case: Case, cells: Mapping[str, Cell]) -> str:
    """One line of the table."""
    return f"| {case} | " + " | ".join(cell_text(cells.get(entry)) for entry in ENTRIES) + " |"


def packs_lines(case: Case, cells: Mapping[str, Cell]) -> list[str]:
    """The lines of ``packs.txt``: class, entry, and the variants that pack in all modes."""
    lines = []
    for entry, cell in cells.items():
        packs = [variant for variant, kind in cell.kinds.items() if kind == PACKS]
        if packs:
            lines.append(f"{case} | {entry} | {', '.join(sorted(packs))}")
    return lines


def recorded_packs() -> dict[tuple[str, str], set[str]]:
    """The variants of ``packs.txt``, by class and entry."""
    recorded = {}
    for line in PACKS_FILE.read_text().splitlines():
        name, entry, variants = line.split(" | ")
        recorded[name, entry] = set(variants.split(", "))
    return recorded


def main() -> None:
    """Print the table."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    lines: list[str] = []
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    print("| class | " + " | ".join(ENTRIES) + " |\n|" + " --- |" * (len(ENTRIES) + 1))
    for case in CASES:
        if not case.available:
            print(f"| {case} |" + " refused by this version of transformers |" * len(ENTRIES))
            continue
        cells = {entry: run_cell(case, entry) for entry in case.parts()}
        print(table_row(case, cells))
        lines += packs_lines(case, cells)
        for cell in cells.values():
            counts.update(cell.kinds.values())
            counts["differs"] += len(cell.failures)
            counts["cells"] += 1
            reasons.update(cell.reasons)
    for name, reason in NOT_BUILT.items():
        print(f"| {name} |" + f" not built: {reason} |" * len(ENTRIES))
    print("\n" + ", ".join(f"{name} {count}" for name, count in counts.items()) + "\n")
    for reason, count in reasons.most_common():
        print(f"- {count}: {reason}")
    if "--write" in sys.argv:
        PACKS_FILE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
