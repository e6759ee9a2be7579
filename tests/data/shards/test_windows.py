"""Windows and packed documents: no token is lost as a target, and none is predicted from another
document."""

from collections import Counter

import numpy as np
import pytest

from tokenpack.data import TokenShards, collate_packed_rows, shard_windows
from tokenpack.data.shards.order import permute

from . import layouts


def stream_of(folder, count):
    """One document, ``0, ..., count - 1``."""
    return TokenShards(layouts.datatrove(folder / f"{count}.ds", [range(count)]))


def documents_of(folder, lengths, **options):
    """Tokens that are all different: document 1 has 100, 101, ..., document 2 has 200, ..."""
    documents = [np.arange(n) + 100 * (at + 1) for at, n in enumerate(lengths)]
    return TokenShards(layouts.datatrove(folder / "d.ds", documents, **options)), documents


def pairs(rows, labels_shifted):
    """(input, target) of every prediction, from the form that a loss reads."""
    found = []
    for row in rows:
        inputs, labels = row["input_ids"], row["labels"]
        targets = labels if labels_shifted else np.append(labels[1:], -100)
        found += [(int(i), int(t)) for i, t in zip(inputs, targets, strict=True) if t != -100]
    return found


@pytest.mark.parametrize(
    ("tokens", "windows"), [(2, 1), (128, 1), (129, 1), (130, 2), (257, 2), (258, 3), (385, 3)]
)
@pytest.mark.parametrize("labels_shifted", [False, True])
def test_no_token_is_lost_as_a_target(tmp_path, tokens, windows, labels_shifted):
    samples = shard_windows(
        stream_of(tmp_path, tokens), 128, shuffle=False, labels_shifted=labels_shifted
    )
    assert len(samples) == windows
    assert pairs(samples, labels_shifted) == [(at, at + 1) for at in range(tokens - 1)]
    assert {len(row["input_ids"]) for row in samples} == {128 if labels_shifted else 129}


@pytest.mark.parametrize("labels_shifted", [False, True])
@pytest.mark.parametrize("isolate", [False, True])
def test_documents_are_isolated_in_the_loss_and_in_attention(tmp_path, labels_shifted, isolate):
    lengths = [3, 1, 0, 9, 4, 1, 8]
    shards, documents = documents_of(tmp_path, lengths)
    samples = shard_windows(
        shards, 4, shuffle=False, isolate_documents=isolate, labels_shifted=labels_shifted
    )
    flat = np.concatenate(documents)
    expected = [(int(a), int(b)) for a, b in zip(flat, flat[1:])]
    if isolate:
        expected = [(a, b) for a, b in expected if a // 100 == b // 100]
    assert Counter(pairs(samples, labels_shifted)) == Counter(expected)
    for row in samples:
        edges = np.cumsum([0, *row["seq_lengths"]])
        for first, last in zip(edges, edges[1:]):
            one_document = len(set(row["input_ids"][first:last] // 100)) == 1
            assert one_document or not isolate
        assert isolate or len(edges) == 2
        assert edges[-1] <= len(row["input_ids"]) == 4 + (not labels_shifted)


def test_overlapping_windows(tmp_path):
    samples = shard_windows(stream_of(tmp_path, 12), 4, stride=3, shuffle=False)
    starts = [int(row["input_ids"][0]) for row in samples]
    assert starts == [0, 3, 6, 9]
    assert {target for _, target in pairs(samples, False)} == set(range(1, 12))


def test_the_mask_of_a_file_is_in_the_labels(tmp_path):
    shards, _ = documents_of(tmp_path, [4, 3], loss=[1, 0, 1, 1, 1, 1, 0])
    (row,) = shard_windows(shards, 8, padding_value=7)
    assert row["input_ids"].tolist() == [100, 101, 102, 103, 200, 201, 202, 7, 7]
    assert row["labels"].tolist() == [-100, -100, 102, 103, -100, 201, -100, -100, -100]
    assert row["seq_lengths"].tolist() == [4, 3]


def test_whole_documents_are_packed_without_a_cut(tmp_path):
    lengths = [3, 1, 0, 5, 4, 1, 2, 7]
    shards, documents = documents_of(tmp_path, lengths)
    with pytest.raises(ValueError, match="at most seq_len = 6 tokens, got one of 7"):
        shard_windows(shards, 6, strategy="bfd")
    samples = shard_windows(shards, 6, strategy="bfd", overlong="drop", epoch=3)
    found = []
    for row in samples:
        assert len(row["input_ids"]) == 6
        edges = np.cumsum([0, *row["seq_lengths"]])
        found += [row["input_ids"][a:b].tolist() for a, b in zip(edges, edges[1:])]
        assert (row["labels"][edges[:-1]] == -100).all()
    assert sorted(found) == sorted(each.tolist() for each in documents[:-1] if len(each))
    assert samples.plan.dropped.tolist() == [2, 7]  # the empty one, and the long one
    shifted = shard_windows(shards, 6, strategy="bfd", overlong="drop", labels_shifted=True)
    assert Counter(pairs(samples, False)) == Counter(pairs(shifted, True))
    train, validation = shard_windows(shards, 7, strategy="nf", split=0.5)
    ids = [set(row["input_ids"].tolist()) - {0} for part in (train, validation) for row in part]
    assert sorted(token for each in ids for token in each) == np.concatenate(documents).tolist()


def test_collated_windows_have_the_documents_as_cu_seqlens(tmp_path):
    shards, _ = documents_of(tmp_path, [3, 4, 2])
    batch = collate_packed_rows(list(shard_windows(shards, 4, shuffle=False)))
    assert batch.input_ids.shape == (2, 5)
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 8, 10]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]
    assert batch.labels.tolist() == [[-100, 101, 102, -100, 201], [-100, 202, 203, -100, 301]]


def test_a_split_is_at_the_end_of_a_document(tmp_path):
    shards, documents = documents_of(tmp_path, [30, 30, 30, 10])
    train, validation = shard_windows(shards, 8, split=0.8)
    assert {t // 100 for _, t in pairs(train, False)} == {1, 2, 3}
    assert [t for _, t in pairs(validation, False)] == documents[3][1:].tolist()
    with pytest.raises(ValueError, match="document of 2 tokens or more on each side"):
        shard_windows(stream_of(tmp_path, 100), 100, split=0.9, strategy="nf")
    raw = TokenShards(layouts.raw(tmp_path / "r.bin", range(100)), dtype="uint16")
    train, validation = shard_windows(raw, 8, split=0.9, isolate_documents=False)
    assert (train.bounds, validation.bounds) == ((0, 90), (90, 100))


@pytest.mark.parametrize(
    ("lengths", "cut"), [([100], 90), ([40, 60], 90), ([85, 15], 85), ([95, 5], 95), ([84, 16], 90)]
)
def test_few_documents_are_cut_where_the_split_says(tmp_path, lengths, cut):
    shards, _ = documents_of(tmp_path, lengths)
    train, validation = shard_windows(shards, 8, split=0.9)
    assert (train.bounds, validation.bounds) == ((0, cut), (cut, 100))


def test_arguments(tmp_path):
    shards = stream_of(tmp_path, 20)
    raw = TokenShards(layouts.raw(tmp_path / "r.bin", range(9)), dtype="uint16")
    for message, given, options in (
        ("isolate_documents must be False for files .*r.bin .raw.", raw, {}),
        ("stride must be at most seq_len = 4", shards, {"stride": 5}),
        ("stride must not be given with a strategy", shards, {"stride": 2, "strategy": "bfd"}),
        ("overlong must be error, truncate or drop", shards, {"strategy": "nf", "overlong": "cut"}),
        ("split must be between 0 and 1, got 1", shards, {"split": 1}),
        ("seed must be 0 or more", shards, {"seed": -1}),
        ("epoch must be 0 or more", shards, {"epoch": -1}),
        ("at least 2 tokens for a window, got 1", stream_of(tmp_path, 1), {}),
    ):
        with pytest.raises(ValueError, match=message):
            shard_windows(given, 4, **options)
    with pytest.raises(IndexError, match="index must be below 5"):
        shard_windows(shards, 4)[5]


@pytest.mark.parametrize("count", [*range(1, 40), 1000, 4097])
def test_the_order_is_a_permutation(count):
    assert sorted(permute(np.arange(count), count, 3, 1).tolist()) == list(range(count))


def test_the_order_is_random_and_differs_by_seed_and_epoch():
    count, bins = 30_000, 20
    numbers = np.arange(count)
    orders = [permute(numbers, count, *key) for key in [(0, 0), (0, 1), (1, 0)]]
    for order in orders:
        table, _, _ = np.histogram2d(numbers, order, bins)
        expected = count / bins**2
        # Chi-squared with 361 degrees of freedom: standard deviation 27.
        assert abs(((table - expected) ** 2 / expected).sum() - 361) < 6 * 27
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 6 / count**0.5
    for one, other in zip(orders, [*orders[1:], orders[0]]):
        assert abs(np.corrcoef(one, other)[0, 1]) < 6 / count**0.5
    small = [tuple(permute(np.arange(4), 4, seed, 0)) for seed in range(4800)]
    counts = np.array(list(Counter(small).values()))
    assert len(counts) == 24  # every order of four, about as often: 23 degrees of freedom
    assert ((counts - 200) ** 2 / 200).sum() < 23 + 6 * 46**0.5


def test_few_numbers_are_permuted_as_many():
    for count in (2, 10, 1000, 3 * 10**12 + 7, 2**62):
        numbers = np.random.default_rng(0).integers(0, count, 60)
        many = permute(numbers, count, 5, 2)
        few = [permute(numbers[at : at + 1], count, 5, 2)[0] for at in range(60)]
        assert many.tolist() == few
        assert many.max() < count
    assert permute(np.arange(6), 6, 0, 0).tolist() == [
        5,
        1,
        4,
        2,
        3,
        0,
    ]  # for ever: states depend on it
