"""All strategies on the same lengths: the numbers in the table, and what was cut or dropped."""

import numpy as np
import pytest

from tokenpack.commands.strategies import (
    compare_strategies,
    default_capacity,
    format_comparison,
    format_pairs,
    plan_pairs,
)
from tokenpack.packing import Packer, pack_lengths

LENGTHS = np.random.default_rng(0).integers(1, 100, 300)


@pytest.mark.parametrize(
    "longest, capacity", [(1, 512), (512, 512), (513, 1024), (1024, 1024), (100_000, 131_072)]
)
def test_the_default_capacity_holds_the_longest(longest, capacity):
    assert default_capacity(np.array([1, longest, 1])) == capacity


def test_each_strategy_is_compared_by_its_own_plan():
    found = compare_strategies(LENGTHS, 128, seed=3)
    assert list(found.metrics) == list(Packer.strategies())
    for name, metrics in found.metrics.items():
        expected = pack_lengths(LENGTHS, 128, name, seed=3)
        assert metrics.num_bins == expected.num_bins
        assert metrics.utilization_std == expected.metrics.utilization_std
    assert found.auto == pack_lengths(LENGTHS, 128).strategy
    assert found.metrics["nf"].num_bins > found.metrics["obfd"].num_bins


def test_the_table_says_what_was_cut_and_dropped():
    found = compare_strategies(np.array([10, 0, 4, 4, 30]), 8, seed=0)
    text = format_comparison(found)
    assert "Cut to the capacity of 8: 2 of 5 texts; dropped because they have no tokens: 1." in text
    assert "without any padding, 3 would hold all tokens" in text
    rows = [line.split() for line in text.splitlines()[2:13]]
    assert [row[0] for row in rows] == list(Packer.strategies())
    assert rows[0][1:5] == ["next_fit", "3", "100.00%", "0.00%"]


def test_the_table_reports_that_no_text_was_cut():
    text = format_comparison(compare_strategies(np.array([3, 3, 2]), 8, seed=0))
    assert "None of 3 texts is over the capacity of 8." in text
    assert "dropped" not in text


def test_pairs_have_a_row_per_side():
    plan = plan_pairs(np.array([600, 400, 0]), np.array([100, 100, 5]), None)
    assert (plan.capacity, plan.target_capacity) == (1024, 512)
    lines = [line.split() for line in format_pairs(plan).splitlines()]
    assert lines[2] == ["source", "1", "1,024", "97.66%", "2.34%"]
    assert lines[3] == ["target", "1", "512", "39.06%", "60.94%"]
    text = format_pairs(plan_pairs(np.array([9, 4]), np.array([2, 3]), 8))
    assert "Cut to a capacity: 1 of 2 pairs." in text
