"""Plans of token batches: full, level, mixed, different in each epoch, equally many."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpack.packing import pack_lengths
from tokenpack.trainer import batches, deal
from tokenpack.trainer.batches import (
    count_batches,
    cut_groups,
    find_plan,
    group_similar,
    plan_batches,
)


def lognormal(count, mean=150, longest=8192, seed=0):
    lengths = np.random.default_rng(seed).lognormal(np.log(mean) - 0.5, 1.0, count)
    return np.clip(lengths.astype(np.int64), 1, longest)


def check(plan, lengths, max_tokens, count):
    """Check that the plan is valid. Returns the tokens of each batch."""
    items, offsets = plan
    lengths = np.asarray(lengths)
    assert items.dtype == offsets.dtype == np.int64
    assert sorted(items.tolist()) == list(range(len(lengths)))
    assert len(offsets) == count + 1
    assert offsets[0] == 0
    assert offsets[-1] == len(lengths)
    assert (np.diff(offsets) > 0).all()
    fill = np.add.reduceat(lengths[items], offsets[:-1])
    assert fill.max() <= max_tokens
    return fill


def batch_of(plan):
    items, offsets = plan
    found = np.empty(len(items), np.int64)
    found[items] = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return found


def sets(plan):
    items, offsets = plan
    return {frozenset(items[a:b].tolist()) for a, b in zip(offsets[:-1], offsets[1:])}


@st.composite
def cases(draw):
    capacity = draw(st.integers(1, 3000))
    shape = st.integers(1, capacity) | st.integers(1, max(1, capacity // 20)) | st.just(capacity)
    shape |= st.integers(1 + capacity // 2, max(1 + capacity // 2, int(0.51 * capacity)))
    lengths = draw(st.lists(shape.map(lambda x: min(x, capacity)), min_size=1, max_size=200))
    return lengths * draw(st.sampled_from([1, 1, 3])), capacity


@settings(max_examples=300)
@given(case=cases(), seeds=st.lists(st.integers(0, 10**6), min_size=2, max_size=2))
def test_any_lengths_in_any_order_with_any_seed(case, seeds):
    lengths, capacity = case
    count = count_batches(lengths, capacity)
    best = pack_lengths(lengths, capacity, "bfd").num_bins
    assert count <= max(best, int(best * 1.02))
    reordered = np.random.default_rng(seeds[0]).permutation(lengths)
    assert count_batches(reordered, capacity) == count
    for each in (lengths, reordered):
        check(plan_batches(each, capacity, count, seeds), each, capacity, count)


# Lengths that are hard for a random deal: few fit in a batch, or no two fit together.
HARD = {
    "one": lambda rng: np.array([77]),
    "full": lambda rng: np.full(50, 1024),
    "equal": lambda rng: np.full(1000, 100),
    "just over half": lambda rng: np.where(rng.random(2000) < 0.5, 515, rng.integers(1, 510, 2000)),
    "all over half": lambda rng: rng.integers(513, 600, 500),
    "two sizes": lambda rng: np.where(rng.random(3000) < 0.5, 15, 300),
    "thirds": lambda rng: rng.integers(330, 342, 1500),
    "uniform": lambda rng: rng.integers(1, 1025, 3000),
    "quarters": lambda rng: rng.integers(1, 385, 3000),
    "ones": lambda rng: np.ones(30_000, np.int64),
}


@pytest.mark.parametrize("name", HARD)
def test_lengths_that_are_hard_to_pack(name):
    lengths = HARD[name](np.random.default_rng(1))
    count = count_batches(lengths, 1024)
    best = pack_lengths(lengths, 1024, "bfd").num_bins
    assert count <= max(best, int(best * 1.02))
    first = plan_batches(lengths, 1024, count, 0)
    check(first, lengths, 1024, count)
    if name not in ("one", "full", "all over half"):  # these have only one plan
        assert len(sets(first) & sets(plan_batches(lengths, 1024, count, 1))) <= 0.1 * count


@pytest.mark.parametrize("max_tokens, longest", [(8192, 8192), (2048, 768), (2048, 2048)])
@pytest.mark.parametrize("count", [5_000, 50_000])
def test_lognormal_lengths_fill_batches_evenly(max_tokens, longest, count):
    lengths = lognormal(count, longest=longest)
    number = count_batches(lengths, max_tokens)
    for seed in range(3):
        fill = check(plan_batches(lengths, max_tokens, number, seed), lengths, max_tokens, number)
        assert fill.mean() >= 0.98 * max_tokens
        assert fill.min() >= 0.97 * max_tokens  # the last batch is not smaller


def test_a_full_plan_is_random_without_a_fallback(monkeypatch):
    """For these lengths, batches are full without the strict deals."""
    lengths = lognormal(20_000, longest=768)
    count = count_batches(lengths, 2048)
    monkeypatch.setattr(batches, "_deal_strictly", lambda *_: pytest.fail("not dealt freely"))
    for seed in range(20):
        plan_batches(lengths, 2048, count, seed)


def test_lengths_are_mixed_within_batches():
    lengths = lognormal(20_000)
    count = count_batches(lengths, 8192)
    items, offsets = plan_batches(lengths, 8192, count, 0)
    overall = lengths.std()
    within = [lengths[items[a:b]].std() for a, b in zip(offsets[:-1], offsets[1:])]
    assert np.median(within) >= 0.8 * overall
    position = np.arange(len(items)) - np.repeat(offsets[:-1], np.diff(offsets))
    # Examples are not sorted by length, neither within a batch nor from batch to batch.
    assert abs(np.corrcoef(position, lengths[items])[0, 1]) < 0.05
    assert (
        abs(np.corrcoef(np.arange(count), np.add.reduceat(lengths[items], offsets[:-1]))[0, 1])
        < 0.2
    )


@pytest.mark.parametrize("longest", [300, 2048])
def test_any_two_examples_that_fit_can_share_a_batch(longest):
    lengths = lognormal(120, longest=longest)
    count = count_batches(lengths, 2048)
    met = np.zeros((120, 120))
    for seed in range(400):
        found = batch_of(plan_batches(lengths, 2048, count, [seed, 1]))
        met += found[:, None] == found
    fits = lengths[:, None] + lengths <= 2048
    np.fill_diagonal(fits, False)
    assert (met[fits] > 0).mean() >= 0.99
    # About as often as in a uniformly random assignment, also for long examples.
    share = met[fits].reshape(-1) * count / 400
    assert np.quantile(share, 0.1) > 0.5
    assert np.quantile(share, 0.9) < 1.6


def test_seeds_and_epochs_change_the_batches_reproducibly():
    lengths = lognormal(3_000)
    count = count_batches(lengths, 4096)
    plans = {key: plan_batches(lengths, 4096, count, key) for key in [(0, 0), (0, 1), (1, 0)]}
    for key, plan in plans.items():
        again = plan_batches(lengths, 4096, count, key)
        assert (plan[0] == again[0]).all()
        assert (plan[1] == again[1]).all()
    composed = [sets(plan) for plan in plans.values()]
    assert not composed[0] & composed[1]
    assert not composed[0] & composed[2]


def test_swaps_mix_a_plan_without_freedom():
    """The pieces of full bins fill the fewest batches exactly, so only best fit succeeds."""
    rng = np.random.default_rng(2)
    lengths = np.concatenate([np.diff([0, *np.sort(rng.choice(np.arange(1, 1000), 2, False)), 1000])
                              for _ in range(600)])  # fmt: skip
    count = count_batches(lengths, 1000)
    first, second = (plan_batches(lengths, 1000, count, seed) for seed in (0, 1))
    check(first, lengths, 1000, count)
    assert len(sets(first) & sets(second)) <= 0.2 * count


def test_the_number_of_batches_depends_only_on_lengths():
    rng = np.random.default_rng(3)
    for seed in range(6):  # lengths for which deals often fail
        lengths = np.random.default_rng(seed).integers(1, 769, 2000)
        counts = {count_batches(rng.permutation(lengths), 2048) for _ in range(6)}
        assert len(counts) == 1


def test_the_deal_of_count_batches_is_the_fallback(monkeypatch):
    monkeypatch.setattr(batches, "_deal_freely", lambda *_: None)
    for seed in (2, 3, 5):
        lengths = np.random.default_rng(seed).integers(1, 769, 2000)
        count = count_batches(lengths, 2048)
        assert count > pack_lengths(lengths, 2048).num_bins  # so best fit does not give this number
        for order in range(3):
            reordered = np.random.default_rng(order).permutation(lengths)
            check(plan_batches(reordered, 2048, count, order), reordered, 2048, count)


def test_more_batches_than_needed_are_all_used():
    rng = np.random.default_rng(4)
    found = 0
    for seed in range(2000):
        count = int(rng.integers(3, 30))
        lengths = np.where(rng.random(count) < 0.5, 1, rng.integers(1, 60, count))
        number = int(rng.integers(count // 2, count + 1))
        plan = find_plan(lengths, 60, number, seed)
        if plan is not None:
            check(plan, lengths, 60, number)
            found += 1
    assert found > 1000


def test_batches_of_many_short_examples_need_few_rounds():
    lengths = np.random.default_rng(0).integers(1, 30, 200_000)
    count = count_batches(lengths, 1_000_000)
    rounds = []
    put = deal._Deal._put

    def counted(*args):
        rounds.append(1)
        return put(*args)

    deal._Deal._put = counted
    try:
        fill = check(plan_batches(lengths, 1_000_000, count, 0), lengths, 1_000_000, count)
    finally:
        deal._Deal._put = put
    assert len(rounds) < 1000
    assert fill.min() >= 0.99 * fill.max()


def test_plans_do_not_change_between_versions():
    """A plan is the same on every machine and in every version: these plans were recorded once."""
    lengths = (np.arange(60) * 37) % 97 + 1
    count = count_batches(lengths, 500)
    items, offsets = plan_batches(lengths, 500, count, [5, 2])
    assert count == 6
    assert items[: offsets[1]].tolist() == FIRST


FIRST = [35, 37, 27, 20, 15, 1, 12, 52, 36, 53]


@pytest.mark.parametrize(
    "lengths, message",
    [
        ([3, 0, 2], r"lengths must be 1 or more, got lengths\[1\] = 0"),
        ([3, 11, 2], r"lengths must be at most max_tokens = 10, got lengths\[1\] = 11"),
        ([-3, 1], r"lengths must not be negative, got lengths\[0\] = -3"),
        ([], "at least one sequence"),
    ],
)
def test_lengths_that_cannot_be_planned(lengths, message):
    with pytest.raises(ValueError, match=message):
        count_batches(lengths, 10)
    with pytest.raises(ValueError, match=message):
        plan_batches(lengths, 10, 1)


def test_invalid_numbers():
    with pytest.raises(
        ValueError, match=r"num_batches must be the result of count_batches .* got 1"
    ):
        plan_batches([5, 6], 10, 1)
    with pytest.raises(
        ValueError, match=r"num_batches must be the result of count_batches .* got 3"
    ):
        plan_batches([5, 6], 10, 3)
    assert find_plan([5, 6], 10, 1) is None
    with pytest.raises(TypeError, match=r"seed must be an integer, got 1\.5"):
        plan_batches([5, 6], 10, 2, 1.5)
    with pytest.raises(ValueError, match="max_tokens must be from 1"):
        count_batches([5, 6], 0)


# ------------------------------------------------------------------------------------------ groups


def slots_of(lengths, items, offsets):
    sides = lengths.reshape(len(lengths), -1)[items]
    return np.diff(offsets) * np.maximum.reduceat(sides, offsets[:-1]).sum(1)


def pairs(count, seed=0):
    source = lognormal(count, longest=700, seed=seed)
    target = source * np.random.default_rng(seed).normal(1, 0.2, count)
    return np.stack([source, np.clip(target.astype(np.int64), 0, 700)], axis=1)


@settings(max_examples=200)
@given(
    rows=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 40)), min_size=1, max_size=150),
    max_slots=st.integers(100, 900),
    one_sided=st.booleans(),
    jitter=st.sampled_from([0.0, 0.1]),
)
def test_groups_hold_each_example_once_within_max_slots(rows, max_slots, one_sided, jitter):
    lengths = np.array(rows)[:, 0] if one_sided else np.array(rows)
    items, offsets = group_similar(lengths, max_slots, seed=1, jitter=jitter)
    assert sorted(items.tolist()) == list(range(len(rows)))
    assert (np.diff(offsets) > 0).all()
    assert slots_of(lengths, items, offsets).max() <= max_slots


def test_groups_are_cut_as_late_as_possible():
    lengths = pairs(500)
    offsets = cut_groups(lengths, 3000)
    for first, last in zip(offsets[:-2], offsets[1:-1]):
        longest = lengths[first : last + 1].max(0)
        assert (last + 1 - first) * longest.sum() > 3000
    assert cut_groups(np.ones(1000, np.int64), 300).tolist() == [0, 300, 600, 900, 1000]


@pytest.mark.parametrize("jitter, least", [(0.0, 0.95), (0.05, 0.93)])
def test_groups_waste_little(jitter, least):
    rng = np.random.default_rng(0)
    alike = pairs(20_000)
    for lengths in (alike, np.stack([alike[:, 0], rng.permutation(alike[:, 1])], axis=1)):
        items, offsets = group_similar(lengths, 4096, seed=3, jitter=jitter)
        assert lengths.sum() >= least * slots_of(lengths, items, offsets).sum()


def test_groups_without_jitter_have_the_same_slots_in_any_order():
    few_lengths = np.random.default_rng(1).integers(1, 30, (2_000, 2))
    for lengths in (pairs(2_000), few_lengths):
        plain = slots_of(lengths, *group_similar(lengths, 2048))
        order = np.random.default_rng(0).permutation(len(lengths))
        again = slots_of(lengths[order], *group_similar(lengths[order], 2048, seed=9))
        assert plain.tolist() == again.tolist()
    lengths = pairs(2_000)
    first, second = (sets(group_similar(lengths, 4096, seed=s, jitter=0.05)) for s in (1, 2))
    assert len(first & second) <= 0.02 * len(first)
