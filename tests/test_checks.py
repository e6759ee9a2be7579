"""Argument checks: the value as an int, or an error that names the argument."""

import numpy as np
import pytest
import torch

from tokenpack.checks import as_integer, at_least_one, check_seed, optional_at_least_one


@pytest.mark.parametrize("value", [1, 2**31 - 1, np.int64(7), np.uint8(7)])
def test_at_least_one_returns_an_int(value):
    checked = at_least_one("size", value)
    assert type(checked) is int
    assert checked == value == optional_at_least_one("size", value)


@pytest.mark.parametrize(
    "value, error", [(0, ValueError), (2**31, ValueError), (True, TypeError), (1.0, TypeError)]
)
def test_at_least_one_names_the_argument(value, error):
    with pytest.raises(error, match=r"^size must be .* got "):
        at_least_one("size", value)


def test_an_optional_number_may_be_none():
    assert optional_at_least_one("size", None) is None


@pytest.mark.parametrize("value", [0, np.int32(3), 2**70])
def test_seeds(value):
    assert check_seed(value) == value
    assert type(check_seed(value)) is int


@pytest.mark.parametrize("value, error", [(-1, ValueError), (True, TypeError), ("1", TypeError)])
def test_bad_seeds(value, error):
    with pytest.raises(error, match=r"^seed must be "):
        check_seed(value)


@pytest.mark.parametrize("value", [-(2**63), 2**63 - 1, np.uint8(3), torch.tensor(3)])
def test_as_integer_accepts_every_type_of_integer(value):
    assert type(as_integer("id", value)) is int


@pytest.mark.parametrize(
    "value, error", [(2**63, ValueError), (-(2**63) - 1, ValueError), (False, TypeError)]
)
def test_as_integer_names_the_argument(value, error):
    with pytest.raises(error, match=r"^id must be an integer"):
        as_integer("id", value)
