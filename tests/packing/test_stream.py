"""Streams: each sequence once, bounded memory, linear time, and resumable at any point."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpack.packing import Packer, StreamPacker, pack_lengths
from tokenpack.packing import stream as stream_module

NAMES = [name for name in [*Packer.strategies(), "auto"] if name != "ffs"]


def run(packer, lengths):
    bins = []
    for length in lengths:
        bins += packer.add(length)
    return bins + packer.finish()


def as_lists(bins):
    return [tuple(array.tolist() for array in one) for one in bins]


def check(bins, lengths, capacity):
    assert sorted(i for one in bins for i in one.items.tolist()) == list(range(len(lengths)))
    for one in bins:
        assert one.lengths.tolist() == [lengths[i] for i in one.items]
        assert 0 < one.lengths.sum() <= capacity


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 50), max_size=300),
    lookahead=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 300), max_size=5),
)
def test_chunks_give_the_same_bins_as_single_sequences(name, lengths, lookahead, cuts):
    one_by_one = run(StreamPacker(50, name, lookahead), lengths)
    check(one_by_one, lengths, 50)
    packer = StreamPacker(50, name, lookahead)
    in_chunks = []
    bounds = [0, *sorted(min(cut, len(lengths)) for cut in cuts), len(lengths)]
    for start, end in zip(bounds, bounds[1:]):
        in_chunks += packer.extend(lengths[start:end])
    in_chunks += packer.finish()
    assert as_lists(in_chunks) == as_lists(one_by_one)
    assert packer.num_sequences == len(lengths)
    assert packer.num_held == 0


@pytest.mark.parametrize("name", ["nf", "hk"])
@pytest.mark.parametrize("limit", [None, 3])
def test_next_fit_and_harmonic_give_the_bins_of_one_plan(name, limit):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, 5000).tolist()
    bins = run(StreamPacker(100, name, 64, max_sequences=limit), lengths)
    plan = pack_lengths(lengths, 100, name, max_sequences=limit)
    assert sorted(one.items.tolist() for one in bins) == sorted(m.tolist() for m in plan)


def test_bins_are_emitted_as_soon_as_they_are_final():
    packer = StreamPacker(10, "nf", lookahead=1)
    assert packer.add(6) == []
    (first,) = packer.add(7)
    assert first.items.tolist() == [0]
    assert packer.add(3) == []  # full, but next fit closes a bin only when a sequence does not fit
    (second,) = packer.extend([1])
    assert second.items.tolist() == [1, 2]


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_bounded_and_bins_are_full(name):
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(5, 1, 60_000), 1, 2048).astype(int)
    packer = StreamPacker(2048, name, lookahead=2000)
    most, bins = 0, []
    for start in range(0, len(lengths), 500):
        bins += packer.extend(lengths[start : start + 500])
        most = max(most, packer.num_held)
    bins += packer.finish()
    assert most <= 4000
    if name in ("auto", "obfd", "bfd", "ffd", "obfdp", "mffd"):
        assert len(bins) <= 1.01 * lengths.sum() / 2048


@pytest.mark.parametrize("name", NAMES)
def test_work_is_linear(name, monkeypatch):
    """Each sequence is planned a bounded number of times on average."""
    planned = 0

    class Counting(Packer):
        def pack(self, lengths):
            nonlocal planned
            planned += len(lengths)
            return super().pack(lengths)

    monkeypatch.setattr(stream_module, "Packer", Counting)
    rng = np.random.default_rng(2)
    for lengths in (rng.integers(1, 30, 20_000), np.tile([1] * 99 + [100], 200)):
        planned = 0
        packer = StreamPacker(100, name, lookahead=256)
        packer.extend(lengths)
        packer.finish()
        assert planned <= 9 * len(lengths)


@pytest.mark.parametrize("name", ["nf", "obfd", "hk"])
def test_a_stream_resumes_from_its_state(name):
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 60, 700).tolist()
    whole = as_lists(run(StreamPacker(100, name, 50), lengths))
    for stop in (0, 1, 49, 50, 51, 333, 700):
        first = StreamPacker(100, name, 50)
        bins = []
        for length in lengths[:stop]:
            bins += first.add(length)
        second = StreamPacker(100, name, 50)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert as_lists(bins + run(second, lengths[stop:])) == whole
        assert second.num_sequences == 700


@pytest.mark.parametrize("overlong", ["truncate", "split", "drop"])
def test_overlong_and_empty_sequences(overlong):
    packer = StreamPacker(10, "nf", overlong=overlong, drop_empty=True)
    bins = packer.extend([25, 0, 4]) + packer.add(11) + packer.finish()
    parts = sorted(
        (int(i), int(start), int(length)) for one in bins for i, length, start in zip(*one)
    )
    assert (
        parts
        == {
            "truncate": [(0, 0, 10), (2, 0, 4), (3, 0, 10)],
            "split": [(0, 0, 10), (0, 10, 10), (0, 20, 5), (2, 0, 4), (3, 0, 10), (3, 10, 1)],
            "drop": [(2, 0, 4)],
        }[overlong]
    )
    counts = (packer.num_sequences, packer.dropped, packer.truncated, packer.split)
    assert (
        counts == {"truncate": (4, 1, 2, 0), "split": (4, 1, 0, 2), "drop": (4, 3, 0, 0)}[overlong]
    )
    assert packer.extend([0]) == []  # all of the chunk is dropped


def test_a_chunk_with_invalid_lengths_adds_nothing():
    packer = StreamPacker(10)
    packer.add(3)
    for bad, error in (([4, 0], ValueError), ([4, 11], ValueError), ([1.5], TypeError)):
        with pytest.raises(error, match="lengths must be"):
            packer.extend(bad)
    with pytest.raises(TypeError, match="integers"):
        packer.add(2.5)
    assert (packer.num_sequences, packer.num_held) == (1, 1)
    assert [one.items.tolist() for one in packer.finish()] == [[0]]
    with pytest.raises(ValueError, match="must not shuffle"):
        StreamPacker(10, "ffs")
    with pytest.raises(ValueError, match="lookahead must be from 1"):
        StreamPacker(10, lookahead=0)
    with pytest.raises(ValueError, match="overlong must be one of"):
        StreamPacker(10, overlong="cut")


def test_the_number_of_sequences_is_up_to_date_after_each_add():
    packer = StreamPacker(8, lookahead=100, overlong="split", drop_empty=True)
    for count, length in enumerate([3, 2, 20, 0, 1], 1):
        packer.add(length)
        assert packer.num_sequences == count
        again = StreamPacker(8, lookahead=100, overlong="split", drop_empty=True)
        again.load_state_dict(json.loads(json.dumps(packer.state_dict())))
        assert again.num_sequences == count
    bins = [bin_.items.tolist() for bin_ in (*packer.finish(), *again.finish())]
    assert sorted(item for items in bins for item in set(items)) == [0, 0, 1, 1, *[2] * 6, 4, 4]
    assert packer.num_sequences == 5
