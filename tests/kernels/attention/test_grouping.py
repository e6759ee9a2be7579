"""Grouping covers every token once, and wastes no more than the calls that it saves."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpack.kernels.attention.grouping import _SCORES_PER_CALL, _SCORES_PER_GROUP, plan_groups

CPU = torch.device("cpu")


def starts(lengths):
    return (0, *accumulate(lengths))


def plan(lengths_q, lengths_k=None, *, heads=4, one_offset=False):
    lengths_k = lengths_q if lengths_k is None else lengths_k
    return plan_groups(starts(lengths_q), starts(lengths_k), heads, one_offset, CPU).groups


def real_slots(span, where, real):
    """The rows of the stream that a group computes, one tensor per member."""
    if span is not None:
        return [torch.arange(*span)]
    if real is None:
        return list(where)
    return [row[mask] for row, mask in zip(where, real)]


def members(group):
    """``(rows, keys)`` of each sequence in the group."""
    rows = real_slots(group.span_q, group.rows, group.real_rows)
    keys = real_slots(group.span_k, group.keys, group.real_keys)
    return list(zip(rows, keys, strict=True))


def sizes(group):
    return [(rows.numel(), keys.numel()) for rows, keys in members(group)]


lengths_of_batches = st.lists(
    st.tuples(st.integers(0, 12) | st.integers(0, 400), st.integers(0, 12) | st.integers(0, 400)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=100)
@given(lengths_of_batches, st.sampled_from([1, 4, 16]), st.booleans())
def test_every_token_is_in_exactly_one_group(lengths, heads, one_offset):
    lengths_q, lengths_k = zip(*lengths)
    groups = plan(lengths_q, lengths_k, heads=heads, one_offset=one_offset)
    found = {}
    for rows, keys in (member for group in groups for member in members(group)):
        assert int(rows[0]) not in found
        found[int(rows[0])] = (rows.tolist(), keys.tolist())
    expected = {}
    for first_q, first_k, (rows, keys) in zip(starts(lengths_q), starts(lengths_k), lengths):
        if rows and keys:
            expected[first_q] = (
                list(range(first_q, first_q + rows)),
                list(range(first_k, first_k + keys)),
            )
    assert found == expected


@settings(max_examples=100)
@given(lengths_of_batches, st.sampled_from([1, 4, 16]), st.booleans())
def test_waste_is_bounded(lengths, heads, one_offset):
    for group in plan(*zip(*lengths), heads=heads, one_offset=one_offset):
        real = sizes(group)
        widths = max(rows for rows, _ in real), max(keys for _, keys in real)
        assert (group.width_q, group.width_k) == widths
        area = len(real) * group.width_q * group.width_k
        wasted = area - sum(rows * keys for rows, keys in real)
        assert heads * wasted <= _SCORES_PER_CALL * (len(real) - 1)
        assert len(real) == 1 or heads * area <= _SCORES_PER_GROUP
        if one_offset:
            assert len({keys - rows for rows, keys in real}) == 1


@settings(max_examples=60)
@given(lengths_of_batches)
def test_put_writes_back_what_take_read(lengths):
    lengths_q, lengths_k = zip(*lengths)
    rows, keys = torch.randn(sum(lengths_q), 2), torch.randn(sum(lengths_k), 2, 3)
    new_rows, new_keys = torch.zeros_like(rows), torch.zeros_like(keys)
    for group in plan(lengths_q, lengths_k):
        taken_rows, taken_keys = group.take_rows(rows), group.take_keys(keys)
        count = len(members(group))
        assert taken_rows.shape == (count, group.width_q, 2)
        assert taken_keys.shape == (count, group.width_k, 2, 3)
        # put_rows and put_keys must not write padding.
        for taken, real in ((taken_rows, group.real_rows), (taken_keys, group.real_keys)):
            if real is not None:
                taken[~real] = float("nan")
        group.put_rows(new_rows, taken_rows)
        group.put_keys(new_keys, taken_keys)
    both = torch.tensor([bool(q and k) for q, k in lengths])
    in_a_group = both.repeat_interleave(torch.tensor(lengths_q))
    assert new_rows.equal(rows * in_a_group[:, None])
    in_a_group = both.repeat_interleave(torch.tensor(lengths_k))
    assert new_keys.equal(keys * in_a_group[:, None, None])


def test_padding_repeats_a_row_of_its_own_sequence():
    (group,) = plan([3, 5, 4])
    assert group.rows.tolist() == [[3, 4, 5, 6, 7], [8, 9, 10, 11, 11], [0, 1, 2, 2, 2]]
    assert group.real_rows.sum(1).tolist() == [5, 4, 3]


def test_one_sequence_is_a_span_of_the_stream():
    (group,) = plan([0, 7], [4, 9])
    assert (group.span_q, group.span_k) == ((0, 7), (4, 13))
    assert group.rows is group.keys is group.real_rows is group.real_keys is None


def test_equal_lengths_share_a_call_without_padding():
    (group,) = plan([6] * 50, [8] * 50)
    assert group.rows.shape == (50, 6)
    assert group.keys.shape == (50, 8)
    assert group.real_rows is None
    assert group.real_keys is None


def test_equal_lengths_fill_one_group_after_the_other():
    groups = plan([256] * 20, heads=8)
    area = 8 * 256 * 256
    per_group = _SCORES_PER_GROUP // area
    assert [len(members(group)) for group in groups] == [per_group] * (20 // per_group)


def test_short_sequences_of_many_lengths_need_few_calls():
    groups = plan(list(range(1, 65)), heads=4)
    assert len(groups) <= 8


def test_long_sequences_of_different_lengths_are_not_grouped():
    groups = plan([1000, 2000, 3000], heads=8)
    assert [group.span_q for group in groups] == [(0, 1000), (1000, 3000), (3000, 6000)]


def test_different_offsets_share_a_call_only_where_distances_do_not_matter():
    lengths = ([5, 5], [5, 6])
    assert len(plan(*lengths, one_offset=False)) == 1
    assert len(plan(*lengths, one_offset=True)) == 2


@pytest.mark.parametrize("lengths", [([0, 0], [0, 0]), ([0, 0], [3, 2]), ([3, 2], [0, 0])])
def test_a_batch_without_scores_has_no_groups(lengths):
    assert plan(*lengths) == ()


@settings(max_examples=100)
@given(st.lists(st.integers(0, 12) | st.integers(0, 400), min_size=1, max_size=12))
def test_slots_index_the_concatenated_groups(lengths):
    groups, slots, *_ = plan_groups(starts(lengths), starts(lengths), 4, False, CPU)
    stream = torch.arange(sum(lengths))
    parts = [group.take_rows(stream).flatten() for group in groups]
    if not parts:
        return
    joined = torch.cat(parts)
    assert torch.equal(joined if slots is None else joined[slots], stream)
