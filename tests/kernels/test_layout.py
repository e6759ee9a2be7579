"""What each builder describes, that they agree with one another, and what none of them takes."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpack.kernels import (
    PackedLayout,
    layout_from_cu_seqlens,
    layout_from_lengths,
    layout_from_mask,
    layout_from_position_ids,
    repad,
)
from tokenpack.kernels._triton import INTERPRETED

EXAMPLES = 15 if INTERPRETED else 60  # an interpreted launch takes as long as many others

MASK_DTYPES = [torch.bool, torch.int32, torch.int64, torch.uint8, torch.float32, torch.bfloat16]

# More slots than one launch counts, and so many rows that each program takes several. The case of
# many rows in one launch takes a minute in the interpreter: test_layout_ops.py has a small one.
LARGE = [(3, 70_000), (2100, 130)] + [(2100, 3)] * (not INTERPRETED)

# A hole, left padding, right padding, only padding, no padding.
MASK = [
    [1, 0, 1, 1, 0],
    [0, 0, 0, 1, 1],
    [1, 1, 1, 0, 0],
    [0, 0, 0, 0, 0],
    [1, 1, 1, 1, 1],
]


@st.composite
def masks(draw):
    """A ``(rows, columns)`` mask. Each row is of one kind, so that all kinds occur together."""
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 9))

    def row():
        length = draw(st.integers(0, columns))
        kind = draw(st.sampled_from(["left", "right", "holes"]))
        if kind == "holes":
            return draw(st.lists(st.sampled_from([0, 1]), min_size=columns, max_size=columns))
        padding, real = [0] * (columns - length), [1] * length
        return padding + real if kind == "left" else real + padding

    return [row() for _ in range(rows)]


def describe(mask):
    """The layout that ``mask`` must have, counted slot by slot."""
    cu_seqlens, indices, position_ids = [0], [], []
    for row, slots in enumerate(mask):
        columns = [column for column, real in enumerate(slots) if real]
        cu_seqlens.append(cu_seqlens[-1] + len(columns))
        indices += [row * len(slots) + column for column in columns]
        position_ids += range(len(columns))
    return cu_seqlens, indices, position_ids


def assert_same_boundaries(one: PackedLayout, other: PackedLayout):
    assert one.cu_seqlens.equal(other.cu_seqlens)
    assert one.position_ids.equal(other.position_ids)
    assert one.total_tokens == other.total_tokens
    assert one.max_seqlen == other.max_seqlen


def assert_same(one: PackedLayout, other: PackedLayout):
    assert_same_boundaries(one, other)
    assert one.indices.equal(other.indices)
    assert one.padded_shape == other.padded_shape


# --------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
def test_mask_of_any_dtype(dtype):
    layout = layout_from_mask(torch.tensor(MASK).to(dtype))
    assert layout.cu_seqlens.tolist() == [0, 3, 5, 8, 8, 13]
    assert layout.indices.tolist() == [0, 2, 3, 8, 9, 10, 11, 12, 20, 21, 22, 23, 24]
    assert layout.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 2, 3, 4]
    assert layout.columns.tolist() == [0, 2, 3, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4]
    assert layout.lengths.tolist() == [3, 2, 3, 0, 5]
    assert layout.padded_shape == (5, 5)
    assert (layout.total_tokens, layout.max_seqlen, layout.num_seqs) == (13, 5, 5)


@settings(max_examples=EXAMPLES)
@given(masks(), st.sampled_from(MASK_DTYPES))
def test_mask_counted_slot_by_slot(mask, dtype):
    layout = layout_from_mask(torch.tensor(mask).to(dtype))
    cu_seqlens, indices, position_ids = describe(mask)
    assert layout.cu_seqlens.tolist() == cu_seqlens
    assert layout.indices.tolist() == indices
    assert layout.position_ids.tolist() == position_ids
    assert layout.total_tokens == len(indices)
    assert layout.max_seqlen == max(map(sum, mask))
    assert layout.padded_shape == (len(mask), len(mask[0]))


@settings(max_examples=EXAMPLES)
@given(masks())
def test_all_builders_agree_on_the_boundaries(mask):
    from_mask = layout_from_mask(torch.tensor(mask))
    lengths = torch.tensor(list(map(sum, mask)))
    from_lengths = layout_from_lengths(lengths)
    assert_same_boundaries(from_lengths, from_mask)
    assert_same(layout_from_lengths(lengths.tolist()), from_lengths)
    assert_same(layout_from_cu_seqlens(from_mask.cu_seqlens, from_mask.total_tokens), from_lengths)
    if from_mask.total_tokens:
        # Position ids cannot express sequences without tokens.
        from_positions = layout_from_position_ids(from_mask.position_ids)
        assert_same(from_positions, layout_from_lengths(lengths[lengths > 0]))


@settings(max_examples=EXAMPLES)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_lengths_give_the_layout_of_their_right_padded_mask(lengths):
    right_padded = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    layout = layout_from_lengths(lengths)
    assert layout.padded_shape == (len(lengths), max(lengths))
    if max(lengths):
        assert_same(layout, layout_from_mask(right_padded))
    else:
        assert layout.indices.numel() == layout.total_tokens == 0


def test_columns_equal_positions_only_without_left_padding():
    layout = layout_from_mask(torch.tensor(MASK))
    by_row = zip(
        layout.columns.split(layout.lengths.tolist()),
        layout.position_ids.split(layout.lengths.tolist()),
    )
    agree = [columns.equal(positions) for columns, positions in by_row]
    assert agree == [False, False, True, True, True]


def test_rows_of_position_ids_are_read_one_after_the_other():
    rows = torch.tensor([[0, 1, 2, 0], [0, 0, 1, 2]])
    layout = layout_from_position_ids(rows)
    assert layout.cu_seqlens.tolist() == [0, 3, 4, 5, 8]
    assert_same(layout, layout_from_position_ids(rows.flatten()))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64], ids=str)
def test_integers_of_any_width(dtype):
    expected = layout_from_lengths([2, 0, 3])
    assert_same(layout_from_lengths(torch.tensor([2, 0, 3], dtype=dtype)), expected)
    assert_same(layout_from_cu_seqlens(torch.tensor([0, 2, 2, 5], dtype=dtype)), expected)
    positions = layout_from_position_ids(torch.tensor([0, 1, 0, 1, 2], dtype=dtype))
    assert_same(positions, layout_from_lengths([2, 3]))


def test_lengths_may_come_from_numpy():
    assert_same(layout_from_lengths(np.array([2, 0, 3])), layout_from_lengths([2, 0, 3]))


def test_every_tensor_is_int32_and_the_counts_are_plain_integers():
    for layout in (
        layout_from_mask(torch.tensor(MASK, dtype=torch.float32)),
        layout_from_lengths(torch.tensor([2, 0, 3])),
        layout_from_cu_seqlens([0, 2, 2, 5]),
        layout_from_position_ids(torch.tensor([0, 1, 0])),
    ):
        tensors = (layout.cu_seqlens, layout.indices, layout.position_ids, layout.lengths)
        assert {tensor.dtype for tensor in (*tensors, layout.columns)} == {torch.int32}
        counts = (layout.total_tokens, layout.max_seqlen, layout.num_seqs, *layout.padded_shape)
        assert {type(count) for count in counts} == {int}


def test_a_batch_of_padding_alone():
    layout = layout_from_mask(torch.zeros(2, 3))
    assert layout.cu_seqlens.tolist() == [0, 0, 0]
    assert (layout.total_tokens, layout.max_seqlen, layout.padded_shape) == (0, 0, (2, 3))
    assert layout.columns.numel() == 0


def test_layouts_are_frozen_and_move_as_one():
    layout = layout_from_lengths([2, 3])
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.total_tokens = 4
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert {moved.cu_seqlens.device.type, moved.indices.device.type} == {"meta"}
    assert moved.device == moved.position_ids.device == torch.device("meta")
    assert (moved.total_tokens, moved.padded_shape) == (5, (2, 3))


def test_lengths_and_cu_seqlens_move_to_the_given_device():
    assert layout_from_lengths([2, 3], device="meta").device.type == "meta"
    assert layout_from_cu_seqlens([0, 2], device="meta").device.type == "meta"


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "mask, shown",
    [
        (torch.tensor([[0, 1, 2]]), "got 2"),
        (torch.tensor([[1, -1]]), "got -1"),
        (torch.tensor([[0.0, 0.5]]), "got 0.5"),
        (torch.tensor([[0.0, float("-inf")]]), "got -inf"),  # an additive mask
        (torch.tensor([[1.0, float("nan")]]), "got nan"),
        (torch.ones(3), r"got shape \(3,\)"),
        (torch.ones(1, 1, 3, 3), r"got shape \(1, 1, 3, 3\)"),
        (torch.ones(0, 3), r"got shape \(0, 3\)"),
        (torch.ones(3, 0), r"got shape \(3, 0\)"),
        (
            torch.ones(1, device="meta").expand(2**16, 2**15),
            "must be less than 2.*31, got 2147483648 slots",
        ),
    ],
)
def test_bad_mask_value_or_shape(mask, shown):
    with pytest.raises(ValueError, match=shown) as error:
        layout_from_mask(mask)
    assert "mask" in str(error.value) or "slots" in str(error.value)


@pytest.mark.parametrize("mask", [[[1, 0]], torch.ones(1, 2, dtype=torch.complex64)], ids=type)
def test_bad_mask_type(mask):
    with pytest.raises(TypeError, match="attention_mask must be"):
        layout_from_mask(mask)


@pytest.mark.parametrize(
    "lengths, shown",
    [
        ([], "at least one length"),
        (torch.zeros(0, dtype=torch.int64), "at least one length"),
        ([3, -2, 1], "got -2 at index 1"),
        ([[3, 2]], r"one-dimensional, got shape \(1, 2\)"),
        (torch.tensor(3), r"one-dimensional, got shape \(\)"),
        ([2**30, 2**30, 1], "less than 2.*31, got 2147483649"),
    ],
)
def test_bad_lengths(lengths, shown):
    with pytest.raises(ValueError, match=shown):
        layout_from_lengths(lengths)


@pytest.mark.parametrize(
    "lengths", [[1.0, 2.0], torch.tensor([1.5]), [True, False], torch.ones(2, dtype=torch.bool)]
)
def test_lengths_that_are_not_integers(lengths):
    with pytest.raises(TypeError, match="lengths must be integers"):
        layout_from_lengths(lengths)


@pytest.mark.parametrize(
    "cu_seqlens, total_tokens, shown",
    [
        ([0, 3, 2, 5], None, "must not decrease, got 3 then 2 at index 2"),
        ([1, 3], None, "must start at 0, got 1"),
        ([-1, 3], None, "must start at 0, got -1"),
        ([0, 3], 4, "end at total_tokens = 4, got 3"),
        ([0, 5], 4, "end at total_tokens = 4, got 5"),
        ([0], None, r"must be \(num_seqs \+ 1,\), got 1 value"),
        ([], None, r"must be \(num_seqs \+ 1,\), got 0 value"),
        ([[0, 3]], None, "one-dimensional"),
        ([0, 2**31], None, "below 2.*31, got 2147483648"),
    ],
)
def test_bad_cu_seqlens(cu_seqlens, total_tokens, shown):
    with pytest.raises(ValueError, match=shown):
        layout_from_cu_seqlens(cu_seqlens, total_tokens)


def test_cu_seqlens_that_are_not_integers():
    with pytest.raises(TypeError, match=r"cu_seqlens must be integers, got torch\.float32"):
        layout_from_cu_seqlens(torch.tensor([0.0, 2.0]))


@pytest.mark.skipif(INTERPRETED, reason="many sequences take minutes in the interpreter")
def test_one_long_sequence_among_many_has_no_padded_form():
    """70,000 x 32,768 slots are more than int32 counts, but attention needs none of them."""
    lengths = [32_768] + [1] * 69_999
    layout = layout_from_lengths(lengths)
    assert layout.cu_seqlens[-1] == layout.total_tokens == layout.position_ids.numel() == 102_767
    assert (layout.max_seqlen, layout.num_seqs) == (32_768, 70_000)
    again = layout_from_position_ids(layout.position_ids)
    assert again.cu_seqlens.equal(layout.cu_seqlens)
    for one in (layout, again):
        with pytest.raises(ValueError, match=r"layout must have .*, got 70000 rows of 32768"):
            repad(torch.zeros(102_767), one)
        with pytest.raises(ValueError, match="padded form"):
            _ = one.columns


@pytest.mark.parametrize(
    "position_ids, shown",
    [
        (torch.tensor([0, 2, 4]), "got 0 then 2 at index 1"),  # strided
        (torch.tensor([0, 1, 1]), "got 1 then 1 at index 2"),
        (torch.tensor([0, 1, 2, 1]), "got 2 then 1 at index 3"),
        (torch.tensor([0, -1]), "got 0 then -1 at index 1"),
        (torch.tensor([1, 2]), "start at 0"),
        (torch.tensor([[0, 1], [2, 3]]), "start at 0 in every row"),
        (torch.tensor([[0, 1], [1, 2]]), "start at 0 in every row"),
        (torch.zeros(0, dtype=torch.int64), r"not empty, got shape \(0,\)"),
        (torch.zeros(2, 0, dtype=torch.int64), r"not empty, got shape \(2, 0\)"),
        (torch.tensor(0), r"got shape \(\)"),
        (torch.zeros(1, 1, 2, dtype=torch.int64), r"got shape \(1, 1, 2\)"),
    ],
)
def test_bad_position_ids(position_ids, shown):
    with pytest.raises(ValueError, match=shown):
        layout_from_position_ids(position_ids)


@pytest.mark.parametrize("position_ids", [[0, 1], torch.tensor([0.0, 1.0])], ids=type)
def test_position_ids_of_the_wrong_type(position_ids):
    with pytest.raises(TypeError, match=r"position_ids must be"):
        layout_from_position_ids(position_ids)


@pytest.mark.parametrize("builder", [layout_from_lengths, layout_from_cu_seqlens])
@pytest.mark.parametrize("value", [None, "12", ["a"]])
def test_values_that_are_not_arrays(builder, value):
    with pytest.raises(TypeError, match="must be integers"):
        builder(value)


# -------------------------------------------------------------- known totals; registration


def test_known_totals_give_the_same_layout():
    mask = torch.tensor(MASK)
    known, found = layout_from_mask(mask, total_tokens=13), layout_from_mask(mask)
    assert known.indices.equal(found.indices)
    assert known.position_ids.equal(found.position_ids)
    assert known.cu_seqlens.equal(found.cu_seqlens)
    assert known.max_seqlen == mask.shape[1]  # an upper bound: nothing was copied
    lengths = torch.tensor([3, 0, 5])
    assert_same(
        layout_from_lengths(lengths, total_tokens=8, max_seqlen=5), layout_from_lengths(lengths)
    )
    cu_seqlens = torch.tensor([0, 3, 3, 8])
    assert_same(
        layout_from_cu_seqlens(cu_seqlens, 8, max_seqlen=5), layout_from_cu_seqlens(cu_seqlens)
    )


def test_wrong_totals_are_named():
    lengths = torch.tensor([3, 0, 5])
    with pytest.raises(ValueError, match=r"lengths must sum to total_tokens = 9, got 8"):
        layout_from_lengths(lengths, total_tokens=9)
    with pytest.raises(ValueError, match=r"max_seqlen must be the longest length, 5, got 4"):
        layout_from_lengths(lengths, total_tokens=8, max_seqlen=4)
    for total in (-1, 26):
        with pytest.raises(ValueError, match=f"total_tokens must be from 0 to .* got {total}"):
            layout_from_mask(torch.tensor(MASK), total_tokens=total)


@pytest.mark.parametrize("total", [11, 15])
def test_a_wrong_total_never_points_outside(total):
    mask = torch.tensor(MASK)
    if not INTERPRETED:
        with pytest.raises(
            ValueError, match=f"must be the number of ones in attention_mask, 13, got {total}"
        ):
            layout_from_mask(mask, total_tokens=total)
        return
    indices = layout_from_mask(mask, total_tokens=total).indices  # a GPU does not check values
    assert indices.numel() == total
    assert indices[:11].equal(layout_from_mask(mask).indices[:11])
    assert not indices[13:].any()


@pytest.mark.parametrize("rows, columns", LARGE)
def test_large_batches(rows, columns):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) < 0.5
    layout = layout_from_mask(mask)
    assert layout.indices.equal(mask.flatten().nonzero().squeeze(1).int())
    assert layout.lengths.equal(mask.sum(1, dtype=torch.int32))
    assert layout.position_ids.equal((mask.cumsum(1, dtype=torch.int32) - 1)[mask])


def test_long_streams():
    lengths = [1, 70_000, 3, 2000]
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    assert_same(layout_from_position_ids(position_ids), layout_from_lengths(lengths))


@pytest.mark.parametrize("total_tokens", [None, 13])
def test_registered_correctly_for_compile(total_tokens):
    """Without a known total, the memory behind ``indices`` is not initialized."""
    checks = ("test_schema", "test_faketensor")
    ops = torch.ops.tokenpack
    mask = torch.tensor(MASK)
    torch.library.opcheck(ops.mask_layout, (mask, total_tokens), test_utils=checks)
    lengths = torch.tensor([3, 0, 10])
    longest = None if total_tokens is None else 10
    arguments = (lengths, False, total_tokens, longest)
    torch.library.opcheck(ops.boundary_layout, arguments, test_utils=checks)
    positions = torch.tensor([0, 1, 2, 0, 1])
    torch.library.opcheck(ops.position_layout, (positions,), test_utils=checks)
