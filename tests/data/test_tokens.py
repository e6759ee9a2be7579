"""Token lists to one array, and plans carried out on it: each against plain Python."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from tokenpack.data import row_layout
from tokenpack.data.row_layout import RowLayout
from tokenpack.data.tokens import Tokens, flatten_tokens, require_same_lengths
from tokenpack.packing import PackResult, pack_lengths

LISTS = [[1, 2, 3], [4], [5, 6, 7, 8], [9, 10]]


def arrow(values, kind=None):
    pa = pytest.importorskip("pyarrow")
    return pa.array(values, kind or pa.list_(pa.int32()))


def chunked(values):
    pa = pytest.importorskip("pyarrow")
    return pa.chunked_array([arrow(values[:1]), arrow(values[1:])])


def column(values):
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({"ids": values})["ids"]


def shuffled_column(values):
    datasets = pytest.importorskip("datasets")
    backwards = datasets.Dataset.from_dict({"ids": values[::-1]})
    return backwards.select(range(len(values))[::-1])["ids"]


def of_kind(name):
    pa = pytest.importorskip("pyarrow")
    return lambda values: arrow(values, getattr(pa, name)(pa.int64()))


HOLDERS = {
    "lists": list,
    "tuple of tuples": lambda values: tuple(map(tuple, values)),
    "arrays": lambda values: [np.array(v) for v in values],
    "int32 arrays": lambda values: [np.array(v, np.int32) for v in values],
    "array of arrays": lambda values: np.array([np.array(v) for v in values], object),
    "tensors": lambda values: [torch.tensor(v) for v in values],
    "int32 tensors": lambda values: [torch.tensor(v, dtype=torch.int32) for v in values],
    "mixed": lambda values: [values[0], np.array(values[1]), torch.tensor(values[2]), *values[3:]],
    "arrow": arrow,
    "sliced arrow": lambda values: arrow([[77], *values, [78, 79]]).slice(1, len(values)),
    "large arrow": lambda values: of_kind("large_list")(values),
    "arrow views": lambda values: of_kind("list_view")(values),
    "chunked arrow": chunked,
    "datasets": column,
    "shuffled datasets": shuffled_column,
    "tokens": flatten_tokens,
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_every_holder_gives_the_same_tokens(holder):
    tokens = flatten_tokens(HOLDERS[holder](LISTS))
    assert tokens.values.tolist() == [*range(1, 11)]
    assert tokens.values.dtype.kind in "iu"
    assert tokens.offsets.tolist() == [0, 3, 4, 8, 10]
    assert tokens.offsets.dtype == np.int64
    assert tokens.lengths.tolist() == [3, 1, 4, 2]


def test_arrow_tokens_are_not_copied():
    held = arrow([[0], *LISTS]).slice(1)
    tokens = flatten_tokens(held)
    assert np.shares_memory(tokens.values, held.values.to_numpy())


def test_fixed_size_arrow_lists():
    pa = pytest.importorskip("pyarrow")
    held = arrow([[0, 0], [1, 2], [3, 4]], pa.list_(pa.int64(), 2)).slice(1)
    assert flatten_tokens(held).values.tolist() == [1, 2, 3, 4]
    assert flatten_tokens(held).offsets.tolist() == [0, 2, 4]


def test_empty_sequences_only_where_they_are_welcome():
    for holder in (list, HOLDERS["arrays"], HOLDERS["tensors"], arrow):
        held = holder([[1], [], [2], []])
        tokens = flatten_tokens(held, empty=True)
        assert tokens.values.tolist() == [1, 2]
        assert tokens.values.dtype.kind == "i"
        assert tokens.offsets.tolist() == [0, 1, 1, 2, 2]
        with pytest.raises(ValueError, match=r"ids\[1\] must hold .* got none \(1 more"):
            flatten_tokens(held, "ids")
    assert len(flatten_tokens([[], []], empty=True).values) == 0


def test_booleans_only_where_they_are_welcome():
    pa = pytest.importorskip("pyarrow")
    array = np.array([True, False])
    for held in ([array], [torch.from_numpy(array)], arrow([[True, False]], pa.list_(pa.bool_()))):
        assert flatten_tokens(held, bools=True).values.tolist() == [1, 0]
        with pytest.raises(TypeError, match="integers"):
            flatten_tokens(held)


def test_unsigned_and_signed_make_no_floats():
    held = [np.array([1], np.uint64), np.array([-2], np.int64)]
    tokens = flatten_tokens(held)
    assert tokens.values.tolist() == [1, -2]
    assert tokens.values.dtype == np.int64


def test_lists_hold_what_64_bits_do():
    for lists in ([[3], [0, 2**63 - 1]], [[3], (-100, 2**63 - 1)], [[-(2**63)], [5]]):
        values = flatten_tokens(lists).values
        assert values.dtype == np.int64
        assert values.tolist() == [*lists[0], *lists[1]]


def test_large_ids_survive():
    big = 2**53 + 1  # not a float64
    for holder in (list, HOLDERS["arrays"], HOLDERS["tensors"]):
        assert flatten_tokens(holder([[big], [1]])).values.tolist() == [big, 1]


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([], ValueError, "ids must hold at least one sequence, got none"),
        ("text", TypeError, "ids must be a list of token lists.* got str"),
        ({"a": [1]}, TypeError, "got dict"),
        ((x for x in LISTS), TypeError, "got generator"),
        (7, TypeError, "got int"),
        ([1, 2, 3], TypeError, r"ids\[0\] must be a list, array or CPU tensor .* got int"),
        ([[1], None], TypeError, r"ids\[1\] .* got NoneType"),
        ([[1], "ab"], TypeError, r"ids\[1\] .* got str"),
        ([[1, 2], [3, 4.5]], TypeError, r"ids\[1\]\[1\] must be an integer .* got 4.5"),
        ([[1, 2], [3, float("nan")]], TypeError, r"ids\[1\]\[1\] must be an integer .* got nan"),
        ([[1], [2, [3]]], TypeError, r"ids\[1\]\[1\] must be an integer .* got \[3\]"),
        ([[1], [2, None]], TypeError, r"ids\[1\]\[1\] must be an integer .* got None"),
        ([[2**70]], TypeError, r"ids\[0\]\[0\] must be an integer of at most 64 bits"),
        ([[1], [2, 2**63]], TypeError, r"ids\[1\]\[1\] must be an integer of at most 64 bits"),
        ([np.ones(2, int), np.ones(2)], TypeError, r"ids\[1\] must be integers, got float64"),
        ([torch.ones(2)], TypeError, r"ids\[0\] must be integers, got torch.float32"),
        ([[1], np.ones(2)], TypeError, r"ids\[1\] must be integers, got float64"),
        ([[1], np.array([1]), [1.5]], TypeError, r"ids\[2\]\[0\] must be an integer"),
        ([np.ones((2, 2), int)], ValueError, r"ids\[0\] must be one-dimensional, got \(2, 2\)"),
        ([torch.tensor(3)], ValueError, r"ids\[0\] must be one-dimensional, got \(\)"),
        ([torch.ones(1, device="meta")], ValueError, r"ids\[0\] must be on the CPU, got meta"),
        ([[1], torch.ones(1, device="meta")], TypeError, r"ids\[1\] .* Tensor on meta"),
        (np.ones((2, 3), int), ValueError, r"ids .* 2-dimensional ndarray .* pass list\(ids\)"),
        (torch.ones(2, 3, dtype=int), ValueError, r"2-dimensional Tensor of shape \(2, 3\)"),
        (np.ones(3, int), ValueError, "got one 1-dimensional ndarray of shape"),
    ],
)
def test_bad_sequences_name_argument_and_index(bad, error, message):
    with pytest.raises(error, match=message):
        flatten_tokens(bad, "ids")


def test_bad_columns_name_argument_and_index():
    pa = pytest.importorskip("pyarrow")
    with pytest.raises(TypeError, match=r"ids\[1\] must be a list of integers, got null"):
        flatten_tokens(arrow([[1], None]), "ids")
    late = pa.chunked_array([arrow([[1, 2], [3]]), arrow([[4], [5, None]])])
    with pytest.raises(TypeError, match=r"ids\[3\]\[1\] must be an integer, got null"):
        flatten_tokens(late, "ids")
    with pytest.raises(TypeError, match="column of lists of integers, got list<item: double>"):
        flatten_tokens(arrow([[1.5]], pa.list_(pa.float64())), "ids")
    with pytest.raises(TypeError, match="column of lists of integers, got int64"):
        flatten_tokens(arrow([1], pa.int64()), "ids")
    with pytest.raises(TypeError, match="column of lists of integers, got list<item: list<"):
        flatten_tokens(arrow([[[1]]], pa.list_(pa.list_(pa.int64()))), "ids")


def test_lengths_that_differ_are_named():
    ids = flatten_tokens(LISTS)
    with pytest.raises(
        ValueError, match=r"labels\[2\] must be as long as ids\[2\], 4 tokens, got 1"
    ):
        require_same_lengths(
            ids, "ids", flatten_tokens([[1, 2, 3], [4], [5], [9, 10]], "l"), "labels"
        )
    with pytest.raises(ValueError, match="labels must hold as many sequences as ids, 4, got 1"):
        require_same_lengths(ids, "ids", flatten_tokens([[1]]), "labels")


def test_importing_it_imports_neither_torch_nor_arrow():
    """Only the module itself counts, not what the package imports."""
    code = (
        "import sys; import tokenpack.packing; before = set(sys.modules);"
        "import tokenpack.data.tokens; new = set(sys.modules) - before;"
        "assert not new & {'torch', 'pyarrow', 'datasets', 'transformers'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------- rows


def plain_rows(result, sequences, value_of, fill):
    """Rows in plain Python; ``value_of(sequence, at, begin, end)`` gives each token's value."""
    starts = np.zeros(len(result.items), int) if result.item_starts is None else result.item_starts
    rows = []
    for first, last in zip(result.offsets, result.offsets[1:]):
        row = []
        for item in range(first, last):
            begin = int(starts[item])
            end = begin + int(result.item_lengths[item])
            sequence = sequences[result.items[item]]
            row += [value_of(sequence, at, begin, end) for at in range(begin, end)]
        rows.append(row + [fill] * (result.capacity - len(row)))
    return rows


@pytest.fixture(params=["nf", "obfd", "split", "truncate", "drop", "slice", "wide", "narrow"])
def case(request, monkeypatch):
    """``(result, sequences, rows)``; small blocks, so that there are many."""
    monkeypatch.setattr(row_layout, "_BLOCK_SLOTS", 64)
    monkeypatch.setattr(row_layout, "_PADDED_SLOTS", 96)
    random = np.random.default_rng(5)
    longest, capacity = {"wide": (90, 300), "narrow": (1, 1)}.get(request.param, (20, 20))
    sequences = [random.integers(5, 1000, n).tolist() for n in random.integers(1, longest + 1, 80)]
    overlong = request.param if request.param in ("split", "truncate", "drop") else "error"
    strategy = request.param if request.param in ("nf", "obfd") else "auto"
    if overlong != "error":
        capacity = 9
    tokens = flatten_tokens(sequences)
    result = pack_lengths(tokens.lengths, capacity, strategy, overlong=overlong)
    if request.param != "slice":
        return result, sequences, RowLayout(result, tokens.offsets)
    part = slice(3, len(result) - 2)
    some = slice(result.offsets[3], result.offsets[len(result) - 2])
    sliced = PackResult(
        items=result.items[some],
        offsets=result.offsets[part.start : part.stop + 1] - result.offsets[part.start],
        item_lengths=result.item_lengths[some],
        capacity=capacity,
        strategy="obfd",
        num_sequences=80,
    )
    return sliced, sequences, RowLayout(result, tokens.offsets, first=part.start, last=part.stop)


def test_rows_hold_each_bin_side_by_side(case):
    result, sequences, rows = case
    values = flatten_tokens(sequences).values
    expected = plain_rows(result, sequences, lambda s, at, begin, end: s[at], 3)
    assert rows.tokens(values, 3).tolist() == expected
    assert rows.tokens(values, 3).dtype == np.int64
    small = rows.tokens(values.astype(np.uint16), 3, np.int32)
    assert small.dtype == np.int32
    assert small.tolist() == expected
    floats = rows.tokens(values / 8, np.nan)
    np.testing.assert_array_equal(floats * 8, np.where(np.isnan(floats), np.nan, expected))


def test_labels_ask_nothing_across_sequences(case):
    result, sequences, rows = case
    values = flatten_tokens(sequences).values
    assert rows.labels(values).tolist() == plain_rows(
        result, sequences, lambda s, at, begin, end: -100 if at == begin else s[at], -100
    )
    assert rows.labels_from(rows.tokens(values, 3)).tolist() == rows.labels(values).tolist()
    assert rows.shifted(rows.labels(values, -7), -7).tolist() == plain_rows(
        result, sequences, lambda s, at, begin, end: -7 if at == end - 1 else s[at + 1], -7
    )


def test_positions_mask_and_boundaries(case):
    result, sequences, rows = case
    positions = np.array(plain_rows(result, sequences, lambda s, at, begin, end: at - begin, -1))
    mask = (positions >= 0).astype(int)
    assert rows.attention_mask().tolist() == mask.tolist()
    padding = np.cumsum(1 - mask, axis=1) - 1
    assert rows.position_ids().tolist() == np.where(mask, positions, padding).tolist()
    assert rows.position_ids(np.int32).dtype == np.int32
    assert rows.fills.tolist() == mask.sum(axis=1).tolist()

    begins = np.argwhere(positions == 0)
    assert rows.starts.tolist() == (begins @ [result.capacity, 1]).tolist()
    assert (rows.ends - rows.starts).tolist() == result.item_lengths.tolist()
    assert rows.boundaries().tolist() == [
        [column, column + int(length)] for (_, column), length in zip(begins, result.item_lengths)
    ]
    assert rows.cu_seqlens.tolist() == [0, *np.cumsum(result.item_lengths.astype(int))]
    assert rows.cu_seqlens_padded.tolist() == [*rows.starts, mask.size]
    assert rows.row_bounds.tolist() == result.offsets.tolist()
    assert rows.sequences.tolist() == result.items.tolist()


def test_plans_for_other_sequences_are_refused():
    tokens = flatten_tokens(LISTS)
    result = pack_lengths(tokens.lengths, 5)
    with pytest.raises(ValueError, match="ids must hold the 4 sequences that were planned, got 1"):
        RowLayout(result, flatten_tokens([[1]]).offsets, "ids")
    other = flatten_tokens([[1, 2, 3], [4, 4], [5, 6, 7, 8], [9, 10]])
    with pytest.raises(
        ValueError, match=r"ids\[1\] must be of the planned length, 1 tokens, got 2"
    ):
        RowLayout(result, other.offsets, "ids")
    cut = pack_lengths(tokens.lengths, 3, overlong="split")
    RowLayout(cut, tokens.offsets)
    with pytest.raises(ValueError, match=r"ids\[2\] must be of the planned length, 4 tokens"):
        RowLayout(cut, flatten_tokens([[1, 2, 3], [4], [5, 6, 7], [9, 10]]).offsets, "ids")


def test_tokens_pass_through():
    tokens = Tokens(np.arange(3), np.array([0, 1, 3]))
    assert flatten_tokens(tokens) is tokens
