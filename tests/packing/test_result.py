"""Plans as objects: metrics, comparison, saving and merging."""

import json
import pickle

import numpy as np
import pytest

from tokenpack.packing import Packer, PackResult, merge_results, pack_lengths

LENGTHS = [5, 3, 8, 2, 7, 1]


@pytest.fixture
def plan():
    return pack_lengths(LENGTHS, 10, "ffd")


def test_a_plan_is_a_sequence_of_bins(plan):
    assert [members.tolist() for members in plan] == [[2, 3], [4, 1], [0, 5]]
    assert len(plan) == plan.num_bins == 3
    assert plan[-1].tolist() == [0, 5]
    assert [members.tolist() for members in plan[:2]] == [[2, 3], [4, 1]]
    assert [members.tolist() for members in plan.bins] == [members.tolist() for members in plan]
    with pytest.raises(IndexError):
        plan[3]
    items, offsets = Packer(10, "ffd").pack_flat(LENGTHS)
    assert items.tolist() == plan.items.tolist() == [2, 3, 4, 1, 0, 5]
    assert offsets.tolist() == plan.offsets.tolist() == [0, 2, 4, 6]
    assert items.dtype == offsets.dtype == np.int64


def test_metrics(plan):
    m = plan.metrics
    assert (m.num_sequences, m.num_bins, m.tokens, m.padding) == (6, 3, 26, 4)
    assert plan.efficiency == m.efficiency == m.utilization_mean == pytest.approx(26 / 30)
    assert (m.utilization_min, m.utilization_max) == (0.6, 1.0)
    assert m.utilization_std == pytest.approx(np.std([1.0, 1.0, 0.6]))
    assert m.sequences_per_bin == 2
    assert m.seconds > 0
    assert m.sequences_per_second == pytest.approx(6 / m.seconds)
    assert "efficiency=0.8667" in repr(plan)


@pytest.mark.parametrize("overlong", ["truncate", "split", "drop"])
def test_overlong_and_empty_sequences(overlong):
    plan = pack_lengths([25, 0, 4, 10, 11], 10, "nf", overlong=overlong, drop_empty=True)
    parts = {
        (int(i), int(start)): int(length)
        for i, start, length in zip(
            plan.items,
            np.zeros(len(plan.items)) if plan.item_starts is None else plan.item_starts,
            plan.item_lengths,
        )
    }
    want = {
        "truncate": {(0, 0): 10, (2, 0): 4, (3, 0): 10, (4, 0): 10},
        "split": {
            (0, 0): 10,
            (0, 10): 10,
            (0, 20): 5,
            (2, 0): 4,
            (3, 0): 10,
            (4, 0): 10,
            (4, 10): 1,
        },
        "drop": {(2, 0): 4, (3, 0): 10},
    }[overlong]
    assert parts == want
    lists = (plan.dropped.tolist(), plan.truncated.tolist(), plan.split.tolist())
    assert (
        lists
        == {
            "truncate": ([1], [0, 4], []),
            "split": ([1], [], [0, 4]),
            "drop": ([0, 1, 4], [], []),
        }[overlong]
    )
    m = plan.metrics
    assert (m.dropped, m.truncated, m.split) == tuple(map(len, lists))
    assert plan.num_sequences == m.num_sequences == 5


def test_only_strategies_that_shuffle_record_the_seed():
    assert pack_lengths(LENGTHS, 10, "ffs", seed=3).seed == 3
    assert pack_lengths(LENGTHS, 10, "ffs").seed == 0
    assert pack_lengths(LENGTHS, 10, "ffd", seed=3).seed is None
    assert pack_lengths(LENGTHS, 10, "ffs", seed=3) == pack_lengths(LENGTHS, 10, "ffs", seed=3)
    many = [1, 2, 3, 4] * 50
    assert pack_lengths(many, 10, "ffs", seed=3) != pack_lengths(many, 10, "ffs", seed=4)


def test_equality_ignores_planning_time(plan):
    assert plan == pack_lengths(LENGTHS, 10, "ffd")
    assert plan != pack_lengths(LENGTHS, 11, "ffd")
    assert plan != pack_lengths(LENGTHS, 10, "nf")
    assert plan != "plan"
    with pytest.raises(TypeError):
        hash(plan)


def test_a_plan_pickles(plan):
    assert pickle.loads(pickle.dumps(plan)) == plan


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("overlong", ["split", "drop"])
def test_a_saved_plan_comes_back(tmp_path, mmap, overlong):
    plan = pack_lengths([25, 4, 10, 11], 10, "ffs", seed=2, overlong=overlong)
    plan.save(tmp_path / "plan")
    back = PackResult.load(tmp_path / "plan", mmap=mmap)
    assert back == plan
    assert (back.strategy, back.seed, back.seconds) == ("ffs", 2, plan.seconds)
    assert isinstance(back.items, np.memmap) == mmap
    with pytest.raises(FileExistsError, match="must not contain a plan"):
        plan.save(tmp_path / "plan")


def test_damaged_plans(tmp_path, plan):
    with pytest.raises(FileNotFoundError, match=r"plan\.json"):
        PackResult.load(tmp_path)
    plan.save(tmp_path)
    whole = (tmp_path / "items.npy").read_bytes()
    (tmp_path / "items.npy").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"got an invalid .*items\.npy"):
        PackResult.load(tmp_path)
    (tmp_path / "items.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"items\.npy"):
        PackResult.load(tmp_path)
    np.save(tmp_path / "items.npy", np.arange(3))
    with pytest.raises(ValueError, match="arrays of inconsistent sizes"):
        PackResult.load(tmp_path)
    facts = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(facts | {"format": 99}))
    with pytest.raises(ValueError, match="of format 1, got format 99"):
        PackResult.load(tmp_path)
    for damage in ({"capacities": 3}, {"arrays": ["offsets"]}):
        (tmp_path / "plan.json").write_text(json.dumps(facts | damage))
        with pytest.raises(ValueError, match="a complete plan"):
            PackResult.load(tmp_path)
    (tmp_path / "plan.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"got an invalid .*plan\.json"):
        PackResult.load(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"got an invalid .*plan\.json"):
        PackResult.load(tmp_path)


def test_plans_of_shards_merge_into_one_plan():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, 1000)
    shards = np.array_split(lengths, 3)
    plans = [pack_lengths(shard, 30, "obfd", overlong="split") for shard in shards]
    merged = merge_results(plans)
    assert merged.num_bins == sum(plan.num_bins for plan in plans)
    assert merged.num_sequences == 1000
    whole = pack_lengths(lengths, 30, "obfd", overlong="split")
    assert merged.metrics.tokens == whole.metrics.tokens == lengths.sum()
    assert merged.split.tolist() == whole.split.tolist()
    # The bins of the shards, with sequences renumbered.
    first = 0
    bins = iter(merged)
    for shard, plan in zip(shards, plans):
        for members in plan:
            assert next(bins).tolist() == (members + first).tolist()
        first += len(shard)
    mixed = merge_results([plans[0], pack_lengths(shards[1], 30, "nf", overlong="drop")])
    assert mixed.strategy == "several"
    assert mixed.item_starts.shape == mixed.items.shape


def test_plans_that_cannot_be_merged(plan):
    with pytest.raises(ValueError, match="at least one plan"):
        merge_results([])
    with pytest.raises(ValueError, match=r"one capacity, got \[10, 11\]"):
        merge_results([plan, pack_lengths(LENGTHS, 11)])


def test_plot(tmp_path, plan):
    pytest.importorskip("matplotlib")
    figure = plan.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000
    assert len(figure.axes) == 2
