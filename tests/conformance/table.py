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


def write_packs(packs: Mapping[tuple[str, str], Cell]) -> None:
    """Record the variants that pack in all modes, once for all cells with the same variants."""
    groups: dict[str, list[str]] = {}
    for (name, entry), cell in packs.items():
        variants = sorted(variant for variant, kind in cell.kinds.items() if kind == PACKS)
        if variants:
            groups.setdefault(", ".join(variants), []).append(f"    {name} {entry}")
    blocks = (f"{variants}\n" + "\n".join(cells) for variants, cells in groups.items())
    PACKS_FILE.write_text("\n".join(blocks) + "\n")


def recorded_packs() -> dict[tuple[str, str], set[str]]:
    """The variants of ``packs.txt``, by class and entry."""
    recorded: dict[tuple[str, str], set[str]] = {}
    variants: set[str] = set()
    for line in PACKS_FILE.read_text().splitlines():
        if line.startswith(" "):
            name, entry = line.split()
            recorded[name, entry] = variants
        else:
            variants = set(line.split(", "))
    return recorded


def main() -> None:
    """Print the table."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    recorded: dict[tuple[str, str], Cell] = {}
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    print("| class | " + " | ".join(ENTRIES) + " |\n|" + " --- |" * (len(ENTRIES) + 1))
    for case in CASES:
        if not case.available:
            print(f"| {case} |" + " refused by this version of transformers |" * len(ENTRIES))
            continue
        cells = {entry: run_cell(case, entry) for entry in case.parts()}
        print(table_row(case, cells))
        recorded.update({(str(case), entry): cell for entry, cell in cells.items()})
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
        write_packs(recorded)


if __name__ == "__main__":
    main()
