"""Packed pairs give the loss and gradients of the padded pairs, for a batch and for parts of it."""

import copy
import pickle

import numpy as np
import pytest
import torch

from tokenpack import packing_stats, patch_model
from tokenpack.data import PackedPairs, pack_pairs_to_tensors
from tokenpack.data.packed.base import pad_rows
from tokenpack.data.tokens import flatten_tokens

from ..adapters.models import EOS, NLLB, PAD, T5, VOCABULARY, gradient_distance

SOURCES = [[5, 6, 1], [7, 1], [8, 9, 10, 1], [11]]
TARGETS = [[20, 1], [], [21, -100, 1], [22]]


def random_pairs(seed=0):
    rng = np.random.default_rng(seed)
    sources = [rng.integers(3, VOCABULARY, n).tolist() for n in (7, 1, 12, 4, 9)]
    targets = [rng.integers(3, VOCABULARY, n).tolist() for n in (3, 6, 0, 1, 5)]
    sources[2][4] = PAD  # a real token
    targets[4][2] = -100
    targets[1][-1] = EOS
    return sources, targets


@pytest.fixture
def batch():
    return pack_pairs_to_tensors(SOURCES, TARGETS)


def lists(batch):
    return {name: v.tolist() if torch.is_tensor(v) else v for name, v in batch.items()}


# ------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("case", [T5, NLLB], ids=str)
@pytest.mark.parametrize("chosen", [None, [4, 0], [3, 2, 1, 3]], ids=str)
def test_loss_and_gradients_are_those_of_the_padded_batch(case, chosen):
    packed = pack_pairs_to_tensors(*random_pairs())
    if chosen is not None:
        packed = packed.select(chosen)
    model, reference = case.build(torch.float64), case.build(torch.float64)
    patch_model(model, strict=True)
    loss = model(**packed).loss
    expected = reference(**packed.padded(PAD)).loss
    assert abs(loss - expected) <= 1e-6
    loss.backward()
    expected.backward()
    assert gradient_distance(model, reference) <= 1e-6
    stats = packing_stats(model)
    assert stats.packed_calls == 1
    assert stats.packed_tokens == int(packed.lengths.sum())


def test_micro_batches_add_up_to_the_batch():
    packed, model = pack_pairs_to_tensors(*random_pairs()), T5.build(torch.float64)
    reference = copy.deepcopy(model)
    patch_model(model, strict=True)
    items = int((packed.labels != -100).sum())
    for chosen in ([2, 1], [4, 0, 3]):
        model(**packed.select(chosen), num_items_in_batch=items).loss.backward()
    reference(**packed.padded(PAD)).loss.backward()
    assert gradient_distance(model, reference) <= 1e-6


# ------------------------------------------------------------------------------- fields and methods


def test_fields(batch):
    assert lists(batch) == {
        "input_ids": [[5, 6, 1, 7, 1, 8, 9, 10, 1, 11]],
        "cu_seqlens": [0, 3, 5, 9, 10],
        "max_seqlen": 4,
        "labels": [[20, 1, 21, -100, 1, 22]],
        "decoder_cu_seqlens": [0, 2, 2, 5, 6],
        "decoder_max_seqlen": 3,
    }
    assert {batch[name].dtype for name in ("input_ids", "labels")} == {torch.int64}
    assert {batch[f"{side}cu_seqlens"].dtype for side in ("", "decoder_")} == {torch.int32}
    assert batch.lengths.tolist() == [[3, 2], [2, 0], [4, 3], [1, 1]]
    assert batch.lengths.dtype == torch.int64


@pytest.mark.parametrize(
    "hold",
    [
        lambda s: [np.array(each, np.int32) for each in s],
        lambda s: [torch.tensor(each, dtype=torch.int64) for each in s],
        lambda s: flatten_tokens(s, empty=True),
    ],
)
def test_sequences_of_every_kind(batch, hold):
    assert lists(pack_pairs_to_tensors(hold(SOURCES), hold(TARGETS))) == lists(batch)


def test_the_batch_does_not_share_memory_with_its_input():
    given = flatten_tokens([[1, 2, 3]])  # flatten_tokens does not copy Tokens
    made = pack_pairs_to_tensors(given, given)
    made.input_ids.fill_(9)
    made.labels.fill_(8)
    assert given.values.tolist() == [1, 2, 3]


def test_a_batch_without_targets():
    batch = pack_pairs_to_tensors(SOURCES)
    assert batch.keys() == {"input_ids", "cu_seqlens", "max_seqlen"}
    assert batch.lengths[:, 1].tolist() == [0] * 4
    assert batch.select([2]).input_ids.tolist() == [[8, 9, 10, 1]]
    assert batch.padded(0).keys() == {"input_ids", "attention_mask"}


def test_select_equals_packing_only_those_pairs(batch):
    for chosen in ([2, 0], [1], [0, 1, 2, 3], [3, 3, 1]):
        expected = pack_pairs_to_tensors([SOURCES[i] for i in chosen], [TARGETS[i] for i in chosen])
        for given in (chosen, np.array(chosen), torch.tensor(chosen), tuple(chosen)):
            assert lists(batch.select(given)) == lists(expected)
    batch["decoder_input_ids"] = batch.labels + 100
    assert batch.select([2, 0]).decoder_input_ids.tolist() == [[121, 0, 101, 120, 101]]


def test_padded(batch):
    assert lists(batch.padded(0)) == {
        "input_ids": [[5, 6, 1, 0], [7, 1, 0, 0], [8, 9, 10, 1], [11, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]],
        "labels": [[20, 1, -100], [-100] * 3, [21, -100, 1], [22, -100, -100]],
    }
    padded = batch.padded(7, pad_to_multiple_of=8)
    assert [padded[name].shape[1] for name in ("input_ids", "attention_mask", "labels")] == [8] * 3
    assert padded["input_ids"][0].tolist() == [5, 6, 1, 7, 7, 7, 7, 7]
    assert {value.dtype for value in padded.values()} == {torch.int64}
    batch.decoder_input_ids = batch.labels.clone()
    assert batch.padded(7)["decoder_input_ids"][0].tolist() == [20, 1, 7]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("multiple", [None, 1, 3])
def test_pad_rows_gives_the_same_rows_on_a_device_as_on_the_cpu(left, multiple, monkeypatch):
    """The device path runs on the CPU here, because is_cpu is patched to be False."""
    lengths = torch.tensor([3, 0, 5])
    rows, mask = pad_rows(torch.arange(8), lengths, -1, multiple, left)
    full = {None: 5, 1: 5, 3: 6}[multiple]
    expected = [[0, 1, 2], [], [3, 4, 5, 6, 7]]
    for row, row_mask, tokens in zip(rows.tolist(), mask.tolist(), expected):
        padding = [-1] * (full - len(tokens))
        assert row == (padding + tokens if left else tokens + padding)
        assert row_mask == [token != -1 for token in row]
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    assert pad_rows(torch.arange(8), lengths, -1, multiple, left)[0].equal(rows)


def test_boundaries_stay_on_the_cpu(batch, monkeypatch):
    moved = batch.to("meta", non_blocking=True)
    assert isinstance(moved, PackedPairs)
    assert moved.input_ids.is_meta
    assert moved.labels.is_meta
    assert moved.cu_seqlens.is_cpu
    assert moved.decoder_cu_seqlens.is_cpu
    assert moved.lengths.equal(batch.lengths)
    assert moved.select([2, 0]).input_ids.shape == (1, 7)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.to("meta"))
    pinned = batch.pin_memory()
    assert isinstance(pinned, PackedPairs)
    assert pinned.input_ids.is_meta
    assert pinned.decoder_cu_seqlens.is_cpu


def test_setting_an_attribute_sets_the_field(batch):
    batch.labels = batch.labels + 1
    assert batch["labels"][0, 0] == 21
    batch.decoder_input_ids = batch.labels
    assert batch["decoder_input_ids"] is batch.labels
    batch.note = 3
    assert "note" not in batch
    with pytest.raises(AttributeError, match="PackedPairs has no 'logits'; its fields are input_i"):
        _ = batch.logits


def test_batches_can_be_copied_and_pickled(batch):
    for other in (pickle.loads(pickle.dumps(batch)), copy.copy(batch), copy.deepcopy(batch)):
        assert isinstance(other, PackedPairs)
        assert lists(other) == lists(batch)
    assert lists(PackedPairs(dict(batch))) == lists(batch)


# ------------------------------------------------------------------------------------------ errors


def test_a_batch_cut_by_rows_is_refused(batch):
    by_rows = {name: v[:1] if torch.is_tensor(v) else v for name, v in batch.items()}
    with pytest.raises(ValueError, match=r"input_ids must be \(1, 0\).*cannot be cut by rows"):
        PackedPairs(by_rows)
    with pytest.raises(ValueError, match=r"labels must be \(1, 6\), because decoder_cu_seqlens"):
        PackedPairs({**batch, "labels": batch.labels[:, :-1]})
    twice = {name: torch.cat([v, v]) if v.dim() == 2 else v for name, v in batch.items()
             if torch.is_tensor(v)}  # fmt: skip
    with pytest.raises(ValueError, match="input_ids must be"):
        PackedPairs(twice)
    other = pack_pairs_to_tensors(SOURCES[:2], TARGETS[:2])
    with pytest.raises(ValueError, match="both sides must have the same number of sequences"):
        PackedPairs(
            {**batch, **{k: v for k, v in other.items() if "decoder" in k or k == "labels"}}
        )


@pytest.mark.parametrize(
    "sources, targets, error, message",
    [
        ([[1], []], None, ValueError, r"sources\[1\] must hold at least one token"),
        ([[1.5]], None, TypeError, r"sources\[0\]\[0\] must be an integer"),
        ([[1]], [["a"]], TypeError, r"targets\[0\]\[0\] must be an integer"),
        ([[1]], [[1], [2]], ValueError, "targets must have one sequence per source, 1, got 2"),
        ([], None, ValueError, "sources must hold at least one sequence"),
    ],
)
def test_bad_sequences_are_named(sources, targets, error, message):
    with pytest.raises(error, match=message):
        pack_pairs_to_tensors(sources, targets)


@pytest.mark.parametrize(
    "chosen, error, message",
    [
        ([], ValueError, "sequences must contain at least one sequence"),
        ([0, 4], IndexError, r"sequences\[1\] must be from 0 to 3.*got 4"),
        ([-1], IndexError, r"sequences\[0\] must be from 0 to 3.*got -1"),
        ([0.0], TypeError, "sequences must be integers, got float64"),
        ([True, False, True, False], TypeError, "sequences must be"),
        (2, TypeError, "sequences must be"),
    ],
)
def test_bad_indices_are_named(batch, chosen, error, message):
    with pytest.raises(error, match=message):
        batch.select(chosen)


def test_bad_padding_options_are_named(batch):
    with pytest.raises(TypeError, match="pad_token_id must be an integer, got None"):
        batch.padded(None)
    with pytest.raises(ValueError, match="pad_to_multiple_of must be from 1"):
        batch.padded(0, 0)
