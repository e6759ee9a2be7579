"""Plans of pairs are valid and need few bins."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpack.packing import PackResult, PairPackResult, bin_costs, merge_results, pack_pairs


def check(plan, source, target, limit=None):
    source, target = np.asarray(source), np.asarray(target)
    assert sorted(plan.items.tolist()) == list(range(len(source)))
    assert plan.item_lengths.tolist() == source[plan.items].tolist()
    assert plan.item_target_lengths.tolist() == target[plan.items].tolist()
    assert (np.diff(plan.offsets) > 0).all()
    assert plan.bin_tokens.max() <= plan.capacity
    assert plan.bin_target_tokens.max() <= plan.target_capacity
    if limit:
        assert np.diff(plan.offsets).max() <= limit


@settings(max_examples=300)
@given(
    pairs=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9)), min_size=1, max_size=120),
    limit=st.none() | st.integers(1, 9),
)
def test_plans_are_valid(pairs, limit):
    source, target = zip(*pairs)
    check(pack_pairs(source, target, 60, 9, max_sequences=limit), source, target, limit)


def first_fit_decreasing(source, target, source_capacity, target_capacity):
    """The textbook algorithm, sorted by the fuller side."""
    key = np.maximum(source / source_capacity, target / target_capacity)
    rooms = []
    for i in np.argsort(-key, kind="stable"):
        for room in rooms:
            if room[0] >= source[i] and room[1] >= target[i]:
                break
        else:
            room = [source_capacity, target_capacity]
            rooms.append(room)
        room[0] -= source[i]
        room[1] -= target[i]
    return len(rooms)


@pytest.mark.parametrize(
    "kind, slack",
    [("translations", 1.01), ("independent", 1.0), ("uniform", 1.0), ("wide", 1.0), ("odd", 1.0)],
)
def test_as_few_bins_as_first_fit_decreasing(kind, slack):
    rng = np.random.default_rng(0)
    source = np.clip(rng.lognormal(3.3, 0.7, 2000), 1, 256).astype(int)
    target = {
        "translations": lambda: np.clip(source * rng.lognormal(0.1, 0.25, 2000), 1, 256),
        "independent": lambda: np.clip(rng.lognormal(3.3, 0.7, 2000), 1, 256),
        "uniform": lambda: rng.integers(1, 257, 2000),
        "wide": lambda: rng.integers(1, 513, 2000),
        "odd": lambda: np.resize([300, 30], 2000),
    }[kind]().astype(int)
    if kind in ("uniform", "wide"):
        source = rng.integers(1, target.max() + 1, 2000)
    elif kind == "odd":
        source = np.resize([30, 300], 2000)
    plan = pack_pairs(source, target, 512, 512)
    check(plan, source, target)
    assert plan.num_bins <= slack * first_fit_decreasing(source, target, 512, 512)
    assert plan.target_efficiency == pytest.approx(target.sum() / plan.num_bins / 512)


def test_large_capacities_do_not_overflow():
    source = np.full(40, 2**30)
    check(pack_pairs(source, source, 2**31 - 1, 2**31 - 1), source, source)


@pytest.mark.parametrize("overlong", ["truncate", "drop"])
def test_pairs_with_either_side_over_capacity(overlong):
    plan = pack_pairs([9, 2, 3, 0], [1, 8, 2, 2], 6, 5, overlong=overlong, drop_empty=True)
    lengths = dict(zip(plan.items.tolist(), zip(plan.item_lengths, plan.item_target_lengths)))
    if overlong == "drop":
        assert lengths == {2: (3, 2)}
        assert plan.dropped.tolist() == [0, 1, 3]
    else:
        assert lengths == {0: (6, 1), 1: (2, 5), 2: (3, 2)}
        assert (plan.dropped.tolist(), plan.truncated.tolist()) == ([3], [0, 1])


def test_a_plan_of_pairs_comes_back_with_its_targets(tmp_path):
    plan = pack_pairs([3, 4, 5], [1, 2, 1], 8, 4)
    plan.save(tmp_path / "plan")
    back = PairPackResult.load(tmp_path / "plan")
    assert back == plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert back.bin_target_tokens.tolist() == plan.bin_target_tokens.tolist()
    assert repr(plan).startswith("PairPackResult(")
    assert plan != pack_pairs([3, 4, 5], [1, 1, 1], 8, 4)
    with pytest.raises(
        ValueError, match=r"a PackResult, got a PairPackResult in .*use PairPackResult\.load"
    ):
        PackResult.load(tmp_path / "plan")
    with pytest.raises(TypeError, match="of type PackResult, got PairPackResult"):
        merge_results([plan, plan])
    # 12 source and 4 target tokens in the linear layers, and query-key pairs in attention.
    source, target = plan.item_lengths.astype(int), plan.item_target_lengths.astype(int)
    pairs = (source**2 + target**2 + source * target).sum() / 6
    assert bin_costs(plan, 1).sum() == pytest.approx(12 + 4 + pairs)


def test_narrow_integers():
    source = np.array([3, 5], np.uint8)
    check(pack_pairs(source, source, 512, 512), source, source)
    assert pack_pairs(source, source, 4, 300, overlong="truncate").truncated.tolist() == [1]


def test_error_messages():
    with pytest.raises(ValueError, match="the same size, got 2 and 1"):
        pack_pairs([1, 2], [1], 8, 8)
    with pytest.raises(ValueError, match=r"target_lengths must be at most capacity = 4.*\[1\] = 5"):
        pack_pairs([1, 2], [1, 5], 8, 4)
    with pytest.raises(
        ValueError, match=r"source_lengths must be 1 or more, got source_lengths\[0\] = 0"
    ):
        pack_pairs([0, 2], [1, 5], 8, 8)
    with pytest.raises(ValueError, match="target_capacity must be from 1"):
        pack_pairs([1], [1], 8, 0)
    with pytest.raises(ValueError, match='for pairs, got "split"'):
        pack_pairs([1], [1], 8, 8, overlong="split")
    with pytest.raises(ValueError, match="a pair that is not dropped, got 1 pairs"):
        pack_pairs([9], [1], 8, 8, overlong="drop")
    with pytest.raises(ValueError, match="a pair that is not dropped, got 2 pairs"):
        pack_pairs([9, 1], [1, 9], 8, 8, overlong="drop")
