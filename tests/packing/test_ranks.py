"""Each bin goes to one rank, and the bins of a step cost alike."""

import numpy as np
import pytest

from tokenpack.packing import balance_ranks, bin_costs, pack_lengths


@pytest.fixture(scope="module")
def plan():
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1.2, 20_000), 1, 4096).astype(int)
    return pack_lengths(lengths, 4096)


def test_costs_count_tokens_and_attention():
    plan = pack_lengths([3, 4, 5], 8, "nf")
    assert bin_costs(plan, hidden_size=1).tolist() == pytest.approx([7 + 25 / 6, 5 + 25 / 6])


@pytest.mark.parametrize("window", [None, 10])
@pytest.mark.parametrize("num_ranks", [1, 2, 7, 8])
def test_each_bin_goes_to_one_rank(plan, num_ranks, window):
    steps = balance_ranks(plan, num_ranks, window=window)
    assert steps.shape[1] == num_ranks
    assert sorted(steps[steps >= 0].tolist()) == list(range(len(plan)))
    assert (steps[:-1] >= 0).all()
    last = steps[-1]
    assert sorted(last >= 0, reverse=True) == list(last >= 0)


def test_a_step_costs_its_ranks_alike(plan):
    costs = bin_costs(plan)
    at_random = np.random.default_rng(0).permutation(len(plan) // 8 * 8).reshape(-1, 8)
    balanced = balance_ranks(plan, 8)[:-1]

    def waste(steps):
        """Share of the total time that ranks spend waiting."""
        return 1 - costs[steps].mean() / costs[steps].max(1).mean()

    assert waste(balanced) <= 0.005
    assert waste(balanced) <= waste(at_random) / 10
    totals = costs[balanced].sum(0)
    assert totals.max() / totals.min() <= 1.001


def test_windows_keep_the_order_of_the_plan(plan):
    steps = balance_ranks(plan, 4, window=5)
    for number in range(0, len(steps), 5):
        part = steps[number : number + 5]
        assert sorted(part[part >= 0].tolist()) == list(
            range(number * 4, min(number * 4 + 20, len(plan)))
        )


def test_the_seed_determines_the_result(plan):
    first, again, other = (balance_ranks(plan, 4, seed=seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert not (first == other).all()


def test_bad_numbers(plan):
    with pytest.raises(ValueError, match="num_ranks must be from 1"):
        balance_ranks(plan, 0)
    with pytest.raises(ValueError, match="window must be from 1"):
        balance_ranks(plan, 2, window=0)
    with pytest.raises(TypeError, match="hidden_size must be an integer"):
        bin_costs(plan, 1.5)
