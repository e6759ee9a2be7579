"""The table of `make compile`, and a fingerprint of the code that it was made from.

The whole table takes minutes to make, so CI compiles a part of the rows. The part must equal the
committed table, and the fingerprint shows that the rest of the table is of the same code: if a
kernel or a case has changed, the table must be made again.
"""

import ast
import collections
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from .predicted import Prediction
from .tile_counts import MODEL, LoopCount

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "bench/results/compile.md"
CASES = [Path(__file__).with_name(name) for name in ("compile_cases.py", "yardstick.py")]


class Row(NamedTuple):
    """One kernel in one configuration for one target. None where a target does not report it."""

    kernel: str
    case: str
    target: str
    registers: int | None
    stack: int | None
    spills: int | None
    shared: int
    wide_loads: int | None
    matrix_units: int | None

    def line(self) -> str:
        """The row in Markdown."""
        return f"| {' | '.join('-' if value is None else str(value) for value in self)} |"


def fingerprint() -> str:
    """A hash of kernels, launchers and cases. Comments and docstrings do not count."""
    digest = hashlib.sha256()
    for path in [*sorted((ROOT / "kernels").rglob("*.py")), *CASES]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = None  # a docstring
        digest.update(f"{path.name}\n{_written(tree)}\n".encode())
    return digest.hexdigest()[:16]


def _written(node: object) -> str:
    """`ast.dump` without empty fields, of which each version of Python has others."""
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if value not in (None, []))
        inner = ", ".join(f"{name}={_written(value)}" for name, value in fields)
        return f"{type(node).__name__}({inner})"
    return f"[{', '.join(map(_written, node))}]" if isinstance(node, list) else repr(node)


def write(
    path: Path,
    rows: list[Row],
    counts: list[LoopCount],
    predictions: list[Prediction],
    triton: str,
) -> None:
    """Write the tables of all rows, of all loops of attention, and of whole calls with a bias."""

    def table(fields: tuple[str, ...], lines: list[str]) -> str:
        return "\n".join([f"| {' | '.join(fields)} |", f"|{' --- |' * len(fields)}", *lines])

    path.write_text(
        f"# What the kernels compile to\n\nTriton {triton}, no GPU needed. Code {fingerprint()}. "
        "`make compile` writes this.\n\n"
        f"{table(Row._fields, [row.line() for row in rows])}\n\n"
        "## What attention issues for one tile\n\n"
        "Counted from the machine code of each loop (tests/kernels/tile_counts.py). The last two\n"
        "columns are ceilings of a model, in TFLOP/s of an A100, H100 or B200, not measurements.\n"
        f"Model {MODEL}.\n\n"
        f"{table(LoopCount._fields, [count.line() for count in counts])}\n\n"
        "## Attention with T5's bias compared with attention without\n\n"
        "Predicted for bf16 on sm_90, for one sequence and head, from the tiles of all loops and\n"
        "the serial ceilings above (tests/kernels/predicted.py). Ratios are clocks with the bias,\n"
        "and in the backward with its gradient, over clocks without.\n\n"
        f"{table(Prediction._fields, [prediction.line() for prediction in predictions])}\n",
        encoding="utf-8",
    )


def read(path: Path = COMMITTED) -> tuple[str, str, set[str]]:
    """Triton's version, the fingerprint, and the lines of the rows."""
    text = path.read_text(encoding="utf-8")
    head = re.search(r"^Triton (\S+), no GPU needed\. Code (\w+)\.", text, re.MULTILINE)
    if head is None:
        raise ValueError(f"path must be a table of make compile, got {path}")
    return head[1], head[2], {line for line in text.splitlines() if line.startswith("| _")}


class Loop(NamedTuple):
    """What a loop of attention is called, whatever the order of loops of other kinds."""

    kernel: str
    case: str
    target: str
    kind: str
    number: int  # among the loops of its kind


def ceilings(counts: list[LoopCount]) -> dict[Loop, int]:
    """The serial ceiling of each loop."""
    found: dict[Loop, int] = {}
    numbers: collections.Counter[tuple[str, ...]] = collections.Counter()
    for row in sorted(counts, key=lambda row: row.loop):
        name = row.kernel, row.case, row.target, row.kind
        found[Loop(*name, numbers[name])] = row.serial
        numbers[name] += 1
    return found


def read_ceilings(path: Path = COMMITTED) -> dict[Loop, int]:
    """The serial ceilings of a table. Empty if it was made with another model of the ceilings."""
    if f"\nModel {MODEL}.\n" not in path.read_text(encoding="utf-8"):
        return {}
    return ceilings(read_counts(path))


def read_counts(path: Path = COMMITTED) -> list[LoopCount]:
    """The loops of attention."""
    types = LoopCount.__annotations__.values()
    rows = (line.strip("| ").split(" | ") for line in sorted(read(path)[2]))
    loops = (row for row in rows if len(row) == len(types))
    return [LoopCount(*(of(cell) for of, cell in zip(types, row, strict=True))) for row in loops]


def read_predictions(path: Path = COMMITTED) -> list[dict[str, str]]:
    """The predicted calls with a bias."""
    text = path.read_text(encoding="utf-8").split("## Attention with T5's bias")[1]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [dict(zip(Prediction._fields, row, strict=True)) for row in rows[2:]]
