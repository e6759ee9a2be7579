"""Each rank gets an even share of the batches that all ranks plan, in each epoch."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tokenpack.packing import pack_lengths
from tokenpack.trainer.sampler import TokenBudgetBatchSampler
from tokenpack.trainer.shares import share_evenly


def lognormal(count, mean=150, longest=768, seed=0):
    lengths = np.random.default_rng(seed).lognormal(np.log(mean) - 0.5, 1.0, count)
    return np.clip(lengths.astype(np.int64), 1, longest)


def pairs(count, seed=0):
    source = lognormal(count, seed=seed)
    target = source * np.random.default_rng(seed).normal(1, 0.2, count)
    return np.stack([source, np.clip(target.astype(np.int64), 0, 768)], axis=1)


def ranks(lengths, max_tokens, num_ranks, epoch=0, **options):
    """The batches of one sampler per rank, as in separate processes."""
    samplers = [
        TokenBudgetBatchSampler(lengths, max_tokens, num_ranks=num_ranks, rank=rank, **options)
        for rank in range(num_ranks)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return samplers


@st.composite
def cases(draw):
    max_tokens = draw(st.integers(1, 2000))
    shape = st.integers(1, max_tokens) | st.integers(1, max(1, max_tokens // 20))
    lengths = np.array(draw(st.lists(shape, min_size=1, max_size=120)))
    if draw(st.booleans()):
        part = np.array(
            draw(st.lists(st.floats(0, 1), min_size=len(lengths), max_size=len(lengths)))
        )
        target = (lengths * part).astype(np.int64)
        lengths = np.stack([lengths - target, target], axis=1)
    return lengths, max_tokens


@settings(max_examples=200)
@given(
    case=cases(),
    num_ranks=st.integers(1, 6),
    epoch=st.integers(0, 5),
    shuffle=st.booleans(),
    padded=st.booleans(),
)
def test_every_example_once_in_equally_many_batches_on_every_rank(
    case, num_ranks, epoch, shuffle, padded
):
    lengths, max_tokens = case
    tokens = lengths.reshape(len(lengths), -1).sum(1)
    options = {"shuffle": shuffle, "padded": padded, "seed": 3}
    if padded:
        options["max_tokens_per_group"] = max_tokens
    samplers = ranks(lengths, max_tokens, num_ranks, epoch, **options)
    count = len(samplers[0])
    for other in range(3):  # number of batches in each epoch
        assert len(samplers[0].plan(other)[1]) == count + 1
    shares = [list(sampler) for sampler in samplers]
    assert [len(share) for share in shares] == [count] * num_ranks
    seen = []
    for batch in zip(*shares):
        assert all(type(index) is int for share in batch for index in share)
        real = [index for share in batch for index in share if index >= 0]
        assert tokens[real].sum() <= max_tokens
        fillers = [share for share in batch if min(share) < 0]
        if len(real) >= num_ranks:
            assert not fillers
        else:
            assert len(fillers) == num_ranks - len(real)
            for (filler,) in fillers:
                assert -1 - filler in real
                assert tokens[-1 - filler] == tokens[real].min()
        seen += real
    assert sorted(seen) == list(range(len(lengths)))
    if not shuffle:
        items, _ = samplers[0].plan()
        assert items.tolist() == list(range(len(lengths)))


@pytest.mark.parametrize("max_tokens, lengths", [(8192, lognormal(20_000, longest=8192)),
                                                 (2048, lognormal(20_000)),
                                                 (8192, pairs(20_000))])  # fmt: skip
def test_batches_are_full(max_tokens, lengths):
    sampler = TokenBudgetBatchSampler(lengths, max_tokens)
    assert sampler.fill >= 0.98
    assert sampler.fill == pytest.approx(lengths.sum() / (len(sampler) * max_tokens))


def test_batches_do_not_depend_on_ranks():
    lengths = lognormal(3_000)
    plans = [sampler.plan() for n in (1, 4) for sampler in ranks(lengths, 4096, n, seed=5)]
    for items, offsets in plans[1:]:
        assert (items == plans[0][0]).all()
        assert (offsets == plans[0][1]).all()


def test_epochs_and_seeds_change_the_batches_reproducibly():
    lengths = lognormal(3_000)
    sampler = TokenBudgetBatchSampler(lengths, 4096, seed=1)
    first = list(sampler)
    assert list(sampler) == first  # until another epoch is set
    sampler.set_epoch(1)
    second = list(sampler)
    assert not {frozenset(batch) for batch in first} & {frozenset(batch) for batch in second}
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(TokenBudgetBatchSampler(lengths, 4096, seed=1)) == first
    other = list(TokenBudgetBatchSampler(lengths, 4096, seed=2))
    assert not {frozenset(batch) for batch in first} & {frozenset(batch) for batch in other}
    assert len(first) == len(second) == len(other) == len(sampler)


def test_an_epoch_is_planned_once(monkeypatch):
    from tokenpack.trainer import sampler as module

    calls = []
    find_plan = module.find_plan
    monkeypatch.setattr(
        module, "find_plan", lambda *args: calls.append(args[3]) or find_plan(*args)
    )
    sampler = TokenBudgetBatchSampler(lognormal(500), 4096, seed=7)
    assert not calls  # the constructor does not plan
    for _ in range(2):
        len(sampler), list(sampler), sampler.fill, sampler.describe()
    assert calls == [(7, 0)]
    sampler.set_epoch(2)
    list(sampler)
    assert calls == [(7, 0), (7, 2)]


def test_without_shuffle_batches_are_those_of_next_fit():
    lengths = lognormal(500)
    sampler = TokenBudgetBatchSampler(lengths, 2048, shuffle=False)
    plain = pack_lengths(lengths, 2048, "nf")
    assert len(sampler) == plain.num_bins
    assert [sorted(batch) for batch in sampler] == [members.tolist() for members in plain]
    first = list(sampler)
    sampler.set_epoch(3)
    assert list(sampler) == first


# ------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("lengths", [lognormal(20_000), pairs(20_000)], ids=["one", "two"])
def test_ranks_get_equally_many_tokens(num_ranks, lengths):
    sampler = TokenBudgetBatchSampler(lengths, 3000 * num_ranks, num_ranks=num_ranks)
    tokens = lengths.reshape(len(lengths), -1).sum(1)
    items, offsets = sampler.plan()
    tried = 0
    for first, last in zip(offsets[:-1], offsets[1:]):
        batch = items[first:last]
        if len(batch) >= 8 * num_ranks:
            shares = [tokens[sampler.share(batch, rank)].sum() for rank in range(num_ranks)]
            assert max(shares) <= 1.02 * np.mean(shares)
            assert min(shares) >= 0.98 * np.mean(shares)
            tried += 1
    assert tried > 20


def test_swaps_narrow_the_gap_that_longest_first_leaves():
    tokens = np.array([8, 7, 6, 5, 4])  # 17 and 13 without swaps: 8 + 5 + 4 and 7 + 6
    rank_of = share_evenly(tokens, tokens.astype(float), 2)
    assert sorted(np.bincount(rank_of, tokens).tolist()) == [15, 15]
    tokens = np.array([6, 4, 10, 9, 5])  # another swap would only reverse the gap
    rank_of = share_evenly(tokens, tokens.astype(float), 2)
    assert sorted(np.bincount(rank_of, tokens).tolist()) == [16, 18]


def test_among_ranks_with_equal_tokens_the_cheaper_one_gets_the_next():
    tokens = np.array([1000, 1001, 30, 30])
    rank_of = share_evenly(tokens, np.array([3000.0, 1000.0, 50.0, 50.0]), 2)
    assert rank_of[2] == rank_of[1]
    # The cost of long sequences exceeds their tokens: with hidden size 1, most of it is attention.
    long = TokenBudgetBatchSampler([[100, 0], [50, 50]], 400, hidden_size=1)
    one, two = long._costs(np.arange(2))
    assert one == 100 + 100**2 / 6
    assert two == 100 + 3 * 50**2 / 6


def test_a_share_keeps_the_order_of_its_batch():
    sampler = TokenBudgetBatchSampler(lognormal(500), 8192, num_ranks=2)
    items, offsets = sampler.plan()
    batch = items[: offsets[1]].tolist()
    for rank in range(2):
        share = sampler.share(batch, rank)
        assert [index for index in batch if index in share] == share


def test_a_filler_is_the_shortest_of_the_batch():
    sampler = TokenBudgetBatchSampler([5, 3, 9], 20, num_ranks=5, shuffle=False)
    shares = [sampler.share([0, 1, 2], rank) for rank in range(5)]
    assert sorted(shares) == [[-2], [-2], [0], [1], [2]]


# ------------------------------------------------------------------------------------------- padded


def slots(lengths, items):
    sides = lengths.reshape(len(lengths), -1)[items]
    return len(items) * sides.max(0).sum()


def groups_of(sampler, items):
    numbers = sampler._planned.group_of[items]
    return [items[numbers == number] for number in dict.fromkeys(numbers.tolist())]


def padded(lengths, max_tokens=16_384, group=2048, **options):
    return TokenBudgetBatchSampler(
        lengths, max_tokens, padded=True, max_tokens_per_group=group, **options
    )


@pytest.mark.parametrize("lengths", [lognormal(5_000), pairs(5_000)], ids=["one", "two"])
def test_padded_batches_are_filled_by_the_slots_of_their_groups(lengths):
    sampler = padded(lengths)
    composed = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        items, offsets = sampler.plan()
        assert len(offsets) - 1 == len(sampler)
        total = 0
        for first, last in zip(offsets[:-1], offsets[1:]):
            groups = groups_of(sampler, items[first:last])
            used = [slots(lengths, group) for group in groups]
            assert max(used) <= 2048
            assert sum(used) <= 16_384
            total += sum(used)
            composed.append({frozenset(group.tolist()) for group in groups if len(group) > 4})
        assert sampler.fill == pytest.approx(total / (len(sampler) * 16_384))
        assert sampler.fill >= 0.93
        assert lengths.sum() >= 0.85 * total
    half = len(composed) // 2
    one, other = set().union(*composed[:half]), set().union(*composed[half:])
    assert len(one & other) <= 0.02 * len(one)  # the groups change with the epoch too


def test_groups_without_jitter_are_the_fallback(monkeypatch):
    from tokenpack.trainer import sampler as module

    assert module._JITTERS[-1] == 0.0  # the jitter of count_batches
    monkeypatch.setattr(module, "_JITTERS", (2.0, 0.0))
    seeds = []
    find_plan = module.find_plan
    monkeypatch.setattr(module, "find_plan", lambda *args: seeds.append(1) or find_plan(*args))
    lengths = pairs(2_000)
    sampler = padded(lengths)
    items, offsets = sampler.plan()
    assert len(seeds) == 2
    assert len(offsets) - 1 == len(sampler)
    assert sorted(items.tolist()) == list(range(2_000))


def test_padded_shares_are_whole_groups_if_there_are_many():
    lengths = pairs(5_000)
    sampler = padded(lengths, 65_536, 6000, num_ranks=2)
    items, offsets = sampler.plan()
    for first, last in zip(offsets[:-1], offsets[1:]):
        batch = items[first:last]
        rank_of = sampler.ranks_of(batch)
        numbers = sampler._planned.group_of[batch]
        for number in set(numbers.tolist()):
            assert len(set(rank_of[numbers == number].tolist())) == 1
        loads = [
            sum(slots(lengths, group) for group in groups_of(sampler, batch[rank_of == rank]))
            for rank in range(2)
        ]
        assert max(loads) <= 1.1 * np.mean(loads)


def test_padded_groups_are_split_if_there_are_few():
    lengths = np.full(64, 100)
    sampler = padded(lengths, 6400, 3200, num_ranks=4)
    (batch,) = [items for items in [sampler.plan()[0]]]
    shares = [sampler.share(batch, rank) for rank in range(4)]
    assert [len(share) for share in shares] == [16] * 4


def test_padded_without_shuffle_keeps_the_order():
    lengths = pairs(300)
    sampler = padded(lengths, shuffle=False)
    assert [index for batch in sampler for index in batch] == list(range(300))


# ----------------------------------------------------------------------------------- integration


def test_a_data_loader_accepts_it_and_it_has_no_batch_size():
    sampler = TokenBudgetBatchSampler(lognormal(300), 2048, num_ranks=2)
    assert not hasattr(sampler, "batch_size")
    loader = DataLoader(list(range(300)), batch_sampler=sampler, collate_fn=list)
    assert len(loader) == len(sampler)
    assert list(loader) == list(sampler)


def test_pickling_drops_the_plan_and_changes_nothing_else():
    sampler = TokenBudgetBatchSampler(pairs(2_000), 4096, num_ranks=2, rank=1, seed=4)
    sampler.set_epoch(3)
    planned = list(sampler)
    assert sampler._planned is not None
    again = pickle.loads(pickle.dumps(sampler))
    assert again._planned is None
    assert sampler._planned is not None
    assert list(again) == planned


def test_the_description_shows_batches_and_ranks():
    sampler = TokenBudgetBatchSampler([60, 30, 50, 40], 100, num_ranks=2, shuffle=False)
    assert sampler.describe() == DESCRIBED
    assert len(sampler.describe(1).splitlines()) == 3
    assert "rank" not in TokenBudgetBatchSampler([60], 100).describe()
    assert "slots" in padded(lognormal(50), num_ranks=2).describe()


DESCRIBED = """\
epoch 0: 4 examples in 2 batches of at most 100 tokens, 90.0% used
batch  examples  tokens   used  shortest  median  longest  tokens per rank
    0         2      90  90.0%        30      45       60            60 30
    1         2      90  90.0%        40      45       50            50 40"""


@pytest.mark.parametrize(
    "lengths, options, error, message",
    [
        ([3, 0], {}, ValueError, r"1 or more, source plus target, got lengths\[1\] = 0$"),
        ([[3, 1], [0, 0]], {}, ValueError, r"got lengths\[1\] = 0 \+ 0"),
        ([3, 11, 12], {}, ValueError, r"at most max_tokens = 10, .* lengths\[1\] = 11 and 1 more"),
        ([[3, 1], [6, 5]], {}, ValueError, r"at most max_tokens = 10, .* lengths\[1\] = 6 \+ 5"),
        ([3, -1], {}, ValueError, r"not be negative, got lengths\[1\] = -1"),
        ([2**40], {}, ValueError, r"at most max_tokens = 10"),
        ([[2**62, 2**62]], {}, ValueError, r"at most max_tokens = 10"),
        ([], {}, ValueError, "at least one"),
        (np.ones((2, 3), int), {}, ValueError, r"got shape \(2, 3\)"),
        ([1.5, 2], {}, TypeError, "lengths must be integers, got float64"),
        ([[1.5, 2]], {}, TypeError, "lengths must be integers, got float64"),
        ([1], {"num_ranks": 0}, ValueError, "num_ranks must be from 1"),
        ([1], {"num_ranks": 2, "rank": 2}, ValueError, r"rank must be from 0 to .* 1, got 2"),
        ([1], {"rank": True}, TypeError, "rank must be an integer, got True"),
        ([1], {"seed": -1}, ValueError, "seed must be 0 or more"),
        ([1], {"hidden_size": 0}, ValueError, "hidden_size must be from 1"),
        ([1], {"max_tokens_per_group": 5}, ValueError, "must be None unless padded=True, got 5"),
        ([1], {"padded": True, "max_tokens_per_group": 11}, ValueError, "at most max_tokens = 10"),
        ([8], {"padded": True, "max_tokens_per_group": 7}, ValueError,
         r"at most max_tokens_per_group = 7, .* got lengths\[0\] = 8"),
        ([8], {"padded": True, "num_ranks": 2}, ValueError, "max_tokens_per_group = 5"),
    ],
)  # fmt: skip
def test_invalid_arguments(lengths, options, error, message):
    with pytest.raises(error, match=message):
        TokenBudgetBatchSampler(lengths, 10, **options)


def test_invalid_epochs_and_ranks():
    sampler = TokenBudgetBatchSampler([1], 10)
    with pytest.raises(ValueError, match="epoch must be 0 or more, got -1"):
        sampler.set_epoch(-1)
    with pytest.raises(TypeError, match="epoch must be an integer, got None"):
        sampler.set_epoch(None)
    with pytest.raises(ValueError, match="rank must be from 0"):
        sampler.share([0], 1)
