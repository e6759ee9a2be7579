"""Segments of flat arrays and stable sorts, compared with plain Python."""

import numpy as np
import pytest

from tokenpack.segments import (
    group_by_bin,
    length_histogram,
    longest_first,
    offsets_of,
    random_permutation,
    ranges,
    segment_sum,
    stable_argsort,
)


@pytest.mark.parametrize("lengths", [[], [0], [3, 0, 2]])
def test_offsets(lengths):
    offsets = offsets_of(lengths)
    assert offsets.dtype == np.int64
    assert offsets.tolist() == [sum(lengths[:n]) for n in range(len(lengths) + 1)]


def test_offsets_of_narrow_integers_do_not_overflow():
    assert offsets_of(np.full(3, 200, np.uint8)).tolist() == [0, 200, 400, 600]


@pytest.mark.parametrize("arange", [None, np.arange(20)])
def test_ranges(arange):
    starts, counts = np.array([5, 0, 9, 2]), np.array([2, 0, 1, 3])
    assert ranges(starts, counts, arange).tolist() == [5, 6, 9, 2, 3, 4]
    assert ranges(starts[:0], counts[:0], arange).tolist() == []


def test_sums_of_segments():
    values = np.array([200, 100, 7, 1], np.uint8)
    assert segment_sum(values, np.array([0, 2, 3, 4]), np.int64).tolist() == [300, 7, 1]
    assert segment_sum(values[:0], np.array([0]), np.int64).tolist() == []


@pytest.mark.parametrize("end", [10, 1 << 16, (1 << 16) + 1, 1 << 33])
def test_sort_is_stable(end):
    rng = np.random.default_rng(0)
    keys = rng.choice(rng.integers(0, end, 50), 500)
    assert stable_argsort(keys, end).tolist() == keys.argsort(kind="stable").tolist()


@pytest.mark.parametrize("longest", [9, 70_000])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_longest_first_keeps_the_order_of_equal_lengths(longest, dtype):
    lengths = np.random.default_rng(0).integers(1, longest + 1, 300).astype(dtype)
    want = sorted(range(300), key=lambda i: -lengths[i])
    assert longest_first(lengths).tolist() == want


@pytest.mark.parametrize("longest", [9, 1 << 30])
def test_histogram_of_lengths(longest):
    lengths = np.random.default_rng(0).integers(1, longest + 1, 300)
    sizes, counts = length_histogram(lengths)
    assert [sizes.tolist(), counts.tolist()] == [
        each.tolist() for each in np.unique(lengths, return_counts=True)
    ]


@pytest.mark.parametrize("order", [None, np.array([4, 3, 2, 1, 0])])
def test_items_of_each_bin(order):
    bin_of = np.array([1, 0, 1, 3, 0])
    items, offsets = group_by_bin(bin_of, 4, order)
    entries = [[1, 4], [0, 2], [], [3]]
    want = entries if order is None else [[4 - entry for entry in bin_] for bin_ in entries]
    bounds = zip(offsets, offsets[1:])
    assert [items[start:end].tolist() for start, end in bounds] == want


def test_a_permutation_is_the_same_in_every_numpy_version():
    assert random_permutation(8, 0).tolist() == PERMUTATION
    assert sorted(random_permutation(1000, 5).tolist()) == list(range(1000))


PERMUTATION = [3, 2, 1, 6, 0, 7, 4, 5]
