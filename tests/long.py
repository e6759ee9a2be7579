"""Cases that CI leaves out, because others check the same code: `make test-long` runs them."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def long_unless(chosen: Collection[tuple[Any, ...]], cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """The cases as parameters, of which all but the chosen ones are marked ``long``.

    Args:
        chosen: the cases that CI runs. Of options that are independent, every pair of values is in
            one of them.
        cases: all of them.
    """
    found = list(cases)
    assert set(chosen) <= set(found), "a case that CI runs is no case"
    return [pytest.param(*case, marks=[] if case in chosen else pytest.mark.long) for case in found]
