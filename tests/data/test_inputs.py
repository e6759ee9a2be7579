"""Every kind of array, column and table, given to every public function that takes values."""

import inspect
import re

import pytest

pytest.importorskip("datasets")
pytest.importorskip("pandas")

from tokenpack import data, packing

from .input_table import TAKEN, header, on_page, others, row
from .inputs import GROUPS, TABLES, TOKENS, WITHOUT_VALUES

FUNCTIONS = [(group, each) for group in GROUPS.values() for each in group.arguments]
# Functions that take what the others in their table refuse.
EXCEPTIONS = {
    ("tokens", "column of a datasets.IterableDataset"),
    ("tokens", "datasets.Dataset"),
    ("fields", "mapping"),  # a sample
}


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("name, kind", [(n, kind) for n, g in GROUPS.items() for kind in g.inputs])
def test_functions_do_what_the_page_says(name, kind):
    assert row(GROUPS[name], kind) in on_page(name).split("\n")


@pytest.mark.parametrize("name", GROUPS)
def test_the_page_has_all_cells_and_functions_agree(name):
    first, second, *lines = on_page(name).strip().split("\n")
    assert f"{first}\n{second}" == header(GROUPS[name])
    assert [cells_of(line)[0] for line in lines] == list(GROUPS[name].inputs)
    for line in lines:
        kind, *cells = cells_of(line)
        assert len(cells) == len(GROUPS[name].arguments)
        assert set(cells) <= {TAKEN, "TypeError", "ValueError"}
        assert len(set(cells)) == 1 or (name, kind) in EXCEPTIONS, line


def test_every_public_name_is_on_the_page():
    shown = {re.split("[.,]", each)[0] for _, each in FUNCTIONS}
    assert shown | set(WITHOUT_VALUES) == {*packing.__all__, *data.__all__}
    assert on_page("others").strip() == others()


def docstring(name):
    owner, *method = name.split(".")
    found = getattr(packing if owner in packing.__all__ else data, owner)
    return inspect.getdoc(getattr(found, method[0]) if method else found)


def states_its_inputs(name):
    """Whether a docstring names the inputs, or a function whose docstring does."""
    text = " ".join(docstring(name).split())
    words = ("list", "NumPy", "memory map", "torch", "Arrow", "datasets", "pandas", "polars")
    others = re.findall(r"(?:as in|as for|see) `([\w.]+)`", text)
    return all(word in text for word in words) or any(map(states_its_inputs, others))


@pytest.mark.parametrize("name", sorted({each.split(",")[0] for _, each in FUNCTIONS}))
def test_docstrings_state_the_inputs(name):
    assert states_its_inputs(name)


@pytest.mark.parametrize("kind", TABLES)
def test_tables_are_refused_with_what_to_pass(kind):
    with pytest.raises(TypeError, match=r"must be one column, got .*; pass one of them|pass list"):
        data.pack_dataset(TABLES[kind][0](TOKENS), 4)
