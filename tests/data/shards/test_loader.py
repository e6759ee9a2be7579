"""The same samples in the same order for any ranks and workers; blends with exact counts."""

from collections import Counter
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
from torch.utils.data import DataLoader

from tokenpack.data import ShardLoader, TokenShards, blend_shards, shard_windows

from . import layouts


def samples_of(folder, windows, first=0, **options):
    """Windows of 4 tokens that begin with ``first, first + 4, ...``."""
    folder.mkdir(exist_ok=True)
    tokens = np.arange(4 * windows + 1) + first
    shards = TokenShards(layouts.datatrove(folder / f"{first}.ds", [tokens]))
    return shard_windows(shards, 4, **options)


def first_tokens(batch):
    return batch.input_ids[:, 0].tolist()


def in_order(samples, epoch=0):
    count = len(samples)
    return [int(samples.sample(epoch * count + at)["input_ids"][0]) for at in range(count)]


@pytest.mark.filterwarnings("ignore:the last batch")
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_together_have_each_sample_once_in_order(tmp_path, world_size):
    samples = samples_of(tmp_path, 29, seed=4)
    ranks = [
        [first_tokens(batch) for batch in ShardLoader(samples, 2, rank=r, world_size=world_size)]
        for r in range(world_size)
    ]
    joined = []
    for step in range(max(map(len, ranks))):
        shares = [rank[step] for rank in ranks if step < len(rank)]
        for place in range(2):
            joined += [share[place] for share in shares if place < len(share)]
    assert joined == in_order(samples)
    assert sorted(joined) == list(range(0, 116, 4))
    assert joined != sorted(joined)


def test_workers_change_nothing_and_a_state_resumes_with_other_ranks(tmp_path):
    samples = samples_of(tmp_path, 21, seed=2)
    one = ShardLoader(samples, 2)
    expected = [first_tokens(batch) for _ in range(2) for batch in one]
    flat = [token for batch in expected for token in batch]
    assert flat == in_order(samples) + in_order(samples, epoch=1)
    assert in_order(samples) != in_order(samples, epoch=1)
    many = ShardLoader(samples, 2, num_workers=2, persistent_workers=True)
    found, states = [], []
    for _ in range(2):
        for batch in many:
            found.append(first_tokens(batch))
            states.append(many.state_dict())
    assert found == expected
    for stop in (1, 5, 11, 12, 21):
        resumed = ShardLoader(samples, 1)
        resumed.load_state_dict(states[stop - 1])
        rest = [
            token for _ in range(2 - resumed.epoch) for b in resumed for token in first_tokens(b)
        ]
        assert rest == [token for batch in expected[stop:] for token in batch]
    assert states[0]["sample"] == 2


def test_a_state_of_other_samples_is_refused(tmp_path):
    loader = ShardLoader(samples_of(tmp_path, 9, seed=2))
    state = ShardLoader(samples_of(tmp_path, 9, seed=3)).state_dict()
    with pytest.raises(ValueError, match="seed=2, got seed=3"):
        loader.load_state_dict(state)
    with pytest.raises(ValueError, match="state must have 'sample'"):
        loader.load_state_dict({})


def test_the_last_batch(tmp_path):
    samples = samples_of(tmp_path, 9)
    with pytest.warns(UserWarning, match="1 samples for 2 ranks"):
        uneven = [list(ShardLoader(samples, 2, rank=r, world_size=2)) for r in range(2)]
    assert [len(each) for each in uneven] == [3, 2]
    even = [ShardLoader(samples, 2, rank=r, world_size=2, drop_last=True) for r in range(2)]
    assert [len(list(each)) for each in even] == [2, 2] == [len(each) for each in uneven[1:]] * 2
    assert [each.position for each in even] == [9, 9]
    loader = even[0]
    list(islice(loader, 2))
    assert loader.position == 18  # nothing is left of the epoch


def test_a_range_of_samples_is_skipped(tmp_path):
    samples = samples_of(tmp_path, 20)
    loader = ShardLoader(samples, 3, skip=[(2, 4), (3, 9), (18, 23)])
    assert (len(loader), len(ShardLoader(samples, skip=[(2, 4), (3, 9), (18, 23)]))) == (4, 11)
    found = [token for batch in loader for token in first_tokens(batch)]
    order = in_order(samples)
    assert found == order[:2] + order[9:18]
    assert len(loader) == 6  # of the next epoch, from sample 23
    found = [token for batch in loader for token in first_tokens(batch)]
    assert found == in_order(samples, epoch=1)[3:]
    with pytest.raises(ValueError, match="skip must be ranges"):
        ShardLoader(samples, skip=[(4, 2)])


def test_a_loader_is_no_dataset_of_a_trainer(tmp_path):
    loader = ShardLoader(samples_of(tmp_path, 3), 2)
    with pytest.raises(TypeError, match=r"must be datasets, got a ShardLoader.*attribute samples"):
        next(iter(DataLoader(loader)))


def test_shifted_labels_are_an_attribute(tmp_path):
    (batch,) = ShardLoader(samples_of(tmp_path, 3, labels_shifted=True, shuffle=False), 4)
    assert batch.input_ids.tolist() == np.arange(12).reshape(3, 4).tolist()
    assert batch.labels.tolist() == (np.arange(12).reshape(3, 4) + 1).tolist()
    assert "labels" not in batch


def test_a_blend_has_exact_counts_that_are_spread_evenly(tmp_path):
    sources = {
        name: samples_of(tmp_path, windows, first)
        for name, windows, first in (("a", 40, 0), ("b", 7, 10_000), ("c", 3, 20_000))
    }
    weights = {"a": 0.6, "b": 0.3, "c": 0.1}
    blend = blend_shards(sources, weights, num_samples=50)
    assert blend.counts == {"a": 30, "b": 15, "c": 5}
    for epoch in range(2):
        origins = [blend.origin(epoch * 50 + at) for at in range(50)]
        counts = np.array([30, 15, 5])
        times = [
            (Fraction(2 * k + 1, int(2 * c)), j, k) for j, c in enumerate(counts) for k in range(c)
        ]
        assert origins == [(j, k + epoch * int(counts[j])) for _, j, k in sorted(times)]
        for n in range(51):
            so_far = np.bincount([source for source, _ in origins[:n]], minlength=3)
            assert abs(so_far - counts * n / 50).max() <= 1.5
    found = Counter(
        token // 10_000 for batch in ShardLoader(blend, 4) for token in first_tokens(batch)
    )
    assert found == {0: 30, 1: 15, 2: 5}
    # b has 7 windows: it is read twice and one more, each time in another order.
    b = [int(blend.sample(at)["input_ids"][0]) for at in range(50) if blend.origin(at)[0] == 1]
    assert sorted(b[:7]) == sorted(b[7:14]) == list(range(10_000, 10_028, 4))
    assert b[:7] != b[7:14]


def test_a_blend_repeats_nothing_by_default(tmp_path):
    sources = [samples_of(tmp_path, 40), samples_of(tmp_path, 9, 10_000)]
    blend = blend_shards(sources, [3, 1])
    assert blend.counts == {"0": 27, "1": 9}
    assert sum(blend_shards(sources, [0.7, 0.3], num_samples=101).counts.values()) == 101
    for message, weights in (
        ("weights must be 2 numbers, got 1", [1]),
        ("positive numbers, got 0 for source 1", [1, 0]),
        ("positive numbers, got inf", [1, float("inf")]),
    ):
        with pytest.raises(ValueError, match=message):
            blend_shards(sources, weights)
    with pytest.raises(ValueError, match="weights must name a, b, got a"):
        blend_shards(dict(zip("ab", sources)), {"a": 1})
    with pytest.raises(ValueError, match="same slots"):
        blend_shards([*sources, samples_of(tmp_path, 5, 7, labels_shifted=True)], [1, 1, 1])
    with pytest.raises(TypeError, match="sources must be what shard_windows returned"):
        blend_shards([3], [1])
