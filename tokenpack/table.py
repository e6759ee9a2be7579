"""Text tables with aligned columns."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format rows under headers; the first column is left-aligned, the others are right-aligned.

    A header may have several lines. Headers are aligned at the bottom.
    """
    split = [header.split("\n") for header in headers]
    height = max(map(len, split))
    heads = [[""] * (height - len(lines)) + lines for lines in split]
    widths = [
        max(map(len, [*lines, *(row[column] for row in rows)]))
        for column, lines in enumerate(heads)
    ]
    head_rows = [[lines[line] for lines in heads] for line in range(height)]
    ruler = ["-" * width for width in widths]
    return "\n".join(_format_row(row, widths) for row in [*head_rows, ruler, *rows])


def _format_row(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.ljust(width) if column == 0 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths))
    )
    return "  ".join([first, *others]).rstrip()
