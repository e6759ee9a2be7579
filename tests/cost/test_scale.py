"""Several ranks: a ring checked by hand, and the busiest rank."""

import numpy as np
import pytest

from tokenpack.cost import ModelCost, exchange_bytes, rank_efficiency


@pytest.mark.parametrize("ranks", [1, 2, 8, 1024])
def test_a_ring_sends_each_part_once_or_twice(ranks):
    sent = exchange_bytes(1_000_000, ranks)
    # A rank sends one part in each of ranks - 1 rounds, both to reduce and to gather.
    part = 4_000_000 / ranks
    assert sent.data_parallel == pytest.approx(2 * (ranks - 1) * part, abs=1)
    assert sent.fully_sharded == pytest.approx(3 * (ranks - 1) * part, abs=1)
    assert exchange_bytes(1_000_000, ranks, element_size=2).data_parallel == pytest.approx(
        sent.data_parallel / 2, abs=1
    )


def test_the_busiest_rank_decides():
    # Per example: 1 * source + 2 * target, and a multiply-add for each pair across.
    cost = ModelCost(1, 2, 0, 0, 1)
    lengths = np.array([[1, 1], [2, 0], [0, 3], [10, 10]])
    work = [1 + 2 + 1, 2, 6, 10 + 20 + 100]
    even = rank_efficiency([np.array([0, 0, 1])], [np.array([0, 1, 2])], lengths, cost, 2)
    assert even.tolist() == [1.0]
    alone = rank_efficiency([np.array([1])], [np.array([3])], lengths, cost, 4)
    assert alone.tolist() == [0.25]
    assert work[3] == 130


def test_pairs_count_in_a_decoder():
    cost = ModelCost(0, 1, 0, 1, 0)
    lengths = np.array([[3], [12]])
    found = rank_efficiency([np.array([0, 1])], [np.array([0, 1])], lengths, cost, 2)
    assert found[0] == pytest.approx((12 + 156) / 2 / 156)
