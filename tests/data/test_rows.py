"""Sequences are packed unchanged into the rows of plain tensors."""

import numpy as np
import pytest
import torch

from tokenpack.data import concatenate_and_pack, pack_sequences

FOUR = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11, 12]]
ROWS = [[1, 2, 3, 4, 5, 0, 0, 0], [6, 7, 8, 9, 10, 11, 12, 0]]


@pytest.mark.parametrize(
    "hold",
    [
        list,
        lambda s: tuple(map(tuple, s)),
        lambda s: [torch.tensor(each) for each in s],
        lambda s: [torch.tensor(each, dtype=torch.int32) for each in s],
        lambda s: [np.array(each, np.uint16) for each in s],
    ],
)
def test_rows_are_in_order_and_int64(hold):
    packed = pack_sequences(hold(FOUR), max_length=8, pad_token_id=0)
    assert packed.dtype == torch.int64
    assert packed.tolist() == ROWS


def test_boundaries_locate_the_sequences():
    packed, boundaries = pack_sequences(FOUR, 8, return_boundaries=True)
    assert packed.tolist() == ROWS
    assert [each.tolist() for each in boundaries] == [[[0, 3], [3, 5]], [[0, 4], [4, 7]]]
    assert {each.dtype for each in boundaries} == {torch.int64}
    for strategy in ("obfd", "obfdp", "ff", "auto"):
        packed, boundaries = pack_sequences(FOUR, 9, -1, return_boundaries=True, strategy=strategy)
        found = [
            row[begin:end].tolist()
            for row, pairs in zip(packed, boundaries, strict=True)
            for begin, end in pairs
        ]
        assert sorted(found) == FOUR
        assert (packed == -1).sum() == packed.numel() - 12


def test_padding_has_the_given_value():
    assert pack_sequences([[1]], 3, pad_token_id=7).tolist() == [[1, 7, 7]]
    assert pack_sequences([[1]], 3, -100).tolist() == [[1, -100, -100]]


def test_overlong_sequences():
    with pytest.raises(
        ValueError, match=r"sequences\[2\] must be at most max_length = 3 tokens, got 4; pass overl"
    ):
        pack_sequences(FOUR, 3)
    assert pack_sequences(FOUR, 3, overlong="truncate")[2].tolist() == [6, 7, 8]
    assert pack_sequences(FOUR, 3, overlong="drop").tolist() == [[1, 2, 3], [4, 5, 0], [10, 11, 12]]
    packed, boundaries = pack_sequences(FOUR, 3, overlong="split", return_boundaries=True)
    assert packed.tolist() == [[1, 2, 3], [4, 5, 0], [6, 7, 8], [9, 0, 0], [10, 11, 12]]
    assert [each.tolist() for each in boundaries] == [
        [[0, 3]], [[0, 2]], [[0, 3]], [[0, 1]], [[0, 3]]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1], []], 8), ValueError, r"sequences\[1\] must hold at least one token"),
        (([], 8), ValueError, "sequences must hold at least one sequence"),
        (([[1.5]], 8), TypeError, r"sequences\[0\]\[0\] must be an integer"),
        ((FOUR, 0), ValueError, "max_length must be from 1"),
        ((FOUR, 8.0), TypeError, "max_length must be an integer, got 8.0"),
        ((FOUR, 8, None), TypeError, "pad_token_id must be an integer, got None"),
        ((FOUR, 8, 0.5), TypeError, "pad_token_id must be an integer, got 0.5"),
        ((FOUR, 8, 2**63), ValueError, "pad_token_id must be an integer of at most 64 bits"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        pack_sequences(*arguments)


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="strategy must be auto or one of nf"):
        pack_sequences(FOUR, 8, strategy="best")
    with pytest.raises(ValueError, match="overlong must be one of"):
        pack_sequences(FOUR, 8, overlong="cut")


# ---------------------------------------------------------------------- ids, labels and masks

IDS = [[1, 2, 3], [4, 5, 6, 7]]
LABELS = [[-100, 2, 3], [-100, -100, 6, 7]]
MASKS = [[1, 1, 1], [1, 1, 0, 1]]


@pytest.mark.parametrize("hold", [list, lambda s: [torch.tensor(each) for each in s]])
def test_three_tensors_in_order(hold):
    ids, labels, masks = concatenate_and_pack(
        hold(IDS), hold(LABELS), hold(MASKS), max_length=8, pad_token_id=9
    )
    assert ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 9]]
    assert labels.tolist() == [[-100, 2, 3, -100, -100, 6, 7, -100]]
    assert masks.tolist() == [[1, 1, 1, 1, 1, 0, 1, 0]]
    assert {each.dtype for each in (ids, labels, masks)} == {torch.int64}


def test_ids_labels_and_masks_share_a_layout():
    ids, labels, masks = concatenate_and_pack(IDS, LABELS, MASKS, 5, 0, label_pad_id=-1)
    assert ids.tolist() == [[1, 2, 3, 0, 0], [4, 5, 6, 7, 0]]
    assert labels.tolist() == [[-100, 2, 3, -1, -1], [-100, -100, 6, 7, -1]]
    assert masks.tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 1, 0]]


def test_masks_may_be_booleans():
    masks = [np.array(each, bool) for each in MASKS]
    assert concatenate_and_pack(IDS, LABELS, masks, 8, 0)[2].tolist() == [[1, 1, 1, 1, 1, 0, 1, 0]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"label_sequences": [[1, 2, 3], [1, 2]]},
            ValueError,
            r"label_sequences\[1\] must be as long as input_sequences\[1\], 4 tokens, got 2",
        ),
        (
            {"attention_masks": [[1], [1] * 4]},
            ValueError,
            r"attention_masks\[0\] must be as long as input_sequences\[0\], 3 tokens, got 1",
        ),
        (
            {"attention_masks": [[], [1] * 4]},
            ValueError,
            r"attention_masks\[0\] must be as long as input_sequences\[0\], 3 tokens, got 0",
        ),
        (
            {"label_sequences": [[1, 2, 3]]},
            ValueError,
            "label_sequences must hold as many sequences as input_sequences, 2, got 1",
        ),
        ({"input_sequences": [[], []]}, ValueError, r"input_sequences\[0\] must hold"),
        ({"label_sequences": None}, TypeError, "label_sequences .* got NoneType"),
        ({"max_length": 3}, ValueError, r"input_sequences\[1\] must be at most max_length = 3"),
        ({"label_pad_id": "x"}, TypeError, "label_pad_id must be an integer, got 'x'"),
        ({"pad_token_id": None}, TypeError, "pad_token_id must be an integer, got None"),
    ],
)
def test_bad_ids_labels_and_masks_are_named(change, error, message):
    given = {
        "input_sequences": IDS,
        "label_sequences": LABELS,
        "attention_masks": MASKS,
        "max_length": 8,
        "pad_token_id": 0,
    }
    with pytest.raises(error, match=message):
        concatenate_and_pack(**{**given, **change})
