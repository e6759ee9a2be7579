"""The tables of functions and inputs in docs/inputs.md: ``python -m tests.data.input_table``.

With ``--write``, write them to the page. The tests fail if the page shows other tables.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from .inputs import GROUPS, WITHOUT_VALUES, Group, Make

PAGE = Path(__file__).parents[2] / "docs/inputs.md"
TAKEN = "yes"


def cell(group: Group, kind: str, function: str) -> str:
    """What a function does with all inputs of a kind: ``yes``, or the class of its error.

    Raises:
        AssertionError: if a result is not that of a list, an error does not name the argument, or
            the inputs of the kind differ.
    """
    found = {
        _outcome(*group.arguments[function], make, group.values) for make in group.inputs[kind]
    }
    assert len(found) == 1, found
    return found.pop()


def _outcome(names: tuple[str, ...], call: Make, make: Make, values: list[Any]) -> str:
    try:
        result = call(make(values))
    except (TypeError, ValueError) as error:
        if not any(name in str(error).split(" must ")[0] for name in names):
            raise AssertionError(f"names none of {', '.join(names)}") from error
        return type(error).__name__
    assert result == call(values)
    return TAKEN


def row(group: Group, kind: str) -> str:
    """One line of the table."""
    return f"| {kind} | " + " | ".join(cell(group, kind, each) for each in group.arguments) + " |"


def header(group: Group) -> str:
    """The first two lines of the table."""
    names = " | ".join(f"`{name}`" for name in group.arguments)
    return f"| | {names} |\n|" + " --- |" * (len(group.arguments) + 1)


def others() -> str:
    """The table of the public names that take no values."""
    lines = (f"| `{name}` | {taken} |" for name, taken in WITHOUT_VALUES.items())
    return "\n".join(["| | takes |", "| --- | --- |", *lines])


def on_page(name: str) -> str:
    """The table of a group, or of the other names, on the page."""
    found = re.search(marked(name, "(.*?)"), PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found, f"{PAGE} has no table {name}"
    return found[1]


def marked(name: str, table: str) -> str:
    """A table between the marks of the page."""
    return f"<!-- begin {name} -->\n{table}\n<!-- end {name} -->"


def main() -> None:
    """Print the tables, or write them to the page."""
    tables = {
        name: "\n".join([header(group), *(row(group, kind) for kind in group.inputs)])
        for name, group in GROUPS.items()
    }
    for name, table in {**tables, "others": others()}.items():
        print(f"\n{table}")
        if "--write" in sys.argv:
            text = PAGE.read_text(encoding="utf-8")
            PAGE.write_text(text.replace(marked(name, on_page(name)), marked(name, f"\n{table}\n")))


if __name__ == "__main__":
    main()
