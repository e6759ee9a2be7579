"""CappedSeq2SeqCollator: truncation, padding, packing, lengths and errors."""

import pickle
import types

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader

from tokenpack import patch_model
from tokenpack.data import CappedSeq2SeqCollator, PackedPairs

from ..adapters.models import NLLB, T5

PAD, EOS, FIRST = 0, 1, 6  # the id of the first word


def make_tokenizer(words=80, sentinels=100, mark="", **options):
    """Make a tokenizer with T5's vocabulary layout: specials, words, descending sentinels."""
    names = ["<pad>", "</s>", "<unk>", "[R]", "[S]", "[X]", *(f"w{i}" for i in range(words))]
    names += [f"{mark}<extra_id_{i}>" for i in reversed(range(sentinels))]
    vocabulary = {name: at for at, name in enumerate(names)}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        **{"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", **options},
    )


SAMPLES = [
    {"input_ids": [6, 7, 8, 9, 10, EOS], "labels": [20, 21, EOS]},
    {"input_ids": [6, EOS], "labels": [20, 21, 22, 23, EOS]},
    {"input_ids": [6, 7, 8, 9, 10, 11], "labels": []},
]


def collate(samples=SAMPLES, **options):
    tokenizer = make_tokenizer(padding_side=options.pop("padding_side", "right"))
    return CappedSeq2SeqCollator(tokenizer, **{"pad_to_multiple_of": None, **options})(samples)


def lists(batch):
    return {name: v.tolist() if torch.is_tensor(v) else v for name, v in batch.items()}


# ---------------------------------------------------------------------------------------- batches


def test_padded():
    batch = collate()
    assert lists(batch) == {
        "input_ids": [[6, 7, 8, 9, 10, 1], [6, 1, 0, 0, 0, 0], [6, 7, 8, 9, 10, 11]],
        "attention_mask": [[1] * 6, [1, 1, 0, 0, 0, 0], [1] * 6],
        "labels": [[20, 21, 1, -100, -100], [20, 21, 22, 23, 1], [-100] * 5],
        "input_length": [6, 2, 6],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert type(batch) is dict


def test_left_padding_applies_only_to_sources():
    batch = lists(collate(padding_side="left"))
    assert batch["input_ids"][1] == [0, 0, 0, 0, 6, 1]
    assert batch["attention_mask"][1] == [0, 0, 0, 0, 1, 1]
    assert batch["labels"] == collate()["labels"].tolist()


def test_both_sides_are_padded_to_a_multiple():
    batch = collate(pad_to_multiple_of=4)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 8)
    assert batch["labels"].shape == (3, 8)
    assert CappedSeq2SeqCollator(make_tokenizer())(SAMPLES)["labels"].shape == (3, 8)


@pytest.mark.parametrize("name", ["input_length", "length", None])
def test_the_column_of_lengths(name):
    names = {"input_ids", "attention_mask", "labels"}
    assert collate(length_column_name=name).keys() == names | ({name} if name else set())
    capped = collate(length_column_name="length", max_encoder_len=4)
    assert capped["length"].tolist() == [4, 2, 4]


@pytest.mark.parametrize("packed", [False, True])
def test_without_labels(packed):
    batch = collate([{"input_ids": each["input_ids"]} for each in SAMPLES], packed=packed)
    assert "labels" not in batch
    assert ("cu_seqlens" in batch) == packed
    none = collate([{**each, "labels": None} for each in SAMPLES], packed=packed)
    assert lists(none) == lists(batch)


@pytest.mark.parametrize("limits", [(512, 256), (3, 2)])
def test_packed_and_padded_batches_are_equal(limits):
    options = {"max_encoder_len": limits[0], "max_decoder_len": limits[1]}
    packed, padded = collate(packed=True, **options), collate(**options)
    assert isinstance(packed, PackedPairs)
    assert "input_length" not in packed
    assert packed.lengths[:, 0].tolist() == padded.pop("input_length").tolist()
    assert lists(packed.padded(PAD)) == lists(padded)


@pytest.mark.parametrize("case", [T5, NLLB], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_and_padded_batches_give_the_same_loss(case, side):
    model = patch_model(case.build(torch.float64).eval(), strict=True)
    samples = [*SAMPLES, {"input_ids": [30], "labels": [31]}]
    with torch.no_grad():
        packed = model(**collate(samples, packed=True)).loss
        padded = model(**collate(samples, padding_side=side, length_column_name=None)).loss
    assert abs(packed - padded) <= 1e-9


# ----------------------------------------------------------------------------------------- limits


def test_truncated_sequences_keep_their_final_eos():
    tokenizer = make_tokenizer()
    collator = CappedSeq2SeqCollator(tokenizer, 4, 3, pad_to_multiple_of=None)
    batch = lists(collator(SAMPLES))
    assert batch["input_ids"] == [[6, 7, 8, 1], [6, 1, 0, 0], [6, 7, 8, 9]]
    assert batch["labels"] == [[20, 21, 1], [20, 21, 1], [-100] * 3]
    assert (collator.truncated_sources, collator.truncated_targets) == (2, 1)
    collator(SAMPLES)
    assert (collator.truncated_sources, collator.truncated_targets) == (4, 2)
    assert collate(max_encoder_len=1)["input_ids"].tolist() == [[1], [1], [6]]


def test_an_empty_target_does_not_take_an_eos_from_its_neighbors():
    labels = [[], [EOS, 20, 21, 22], [], [20, 21, 22, 23], []]
    batch = collate([{"input_ids": [6], "labels": each} for each in labels], max_decoder_len=3)
    assert batch["labels"].tolist() == [
        [-100] * 3,
        [EOS, 20, 21],
        [-100] * 3,
        [20, 21, 22],
        [-100] * 3,
    ]


def test_truncation_without_an_eos_token():
    tokenizer = types.SimpleNamespace(pad_token_id=0, eos_token_id=None, padding_side="right")
    batch = CappedSeq2SeqCollator(tokenizer, 4, None, pad_to_multiple_of=None)(SAMPLES)
    assert batch["input_ids"][0].tolist() == [6, 7, 8, 9]


def test_no_limit():
    collator = CappedSeq2SeqCollator(make_tokenizer(), None, None)
    batch = collator([{"input_ids": [6] * 600, "labels": [7] * 300}])
    assert batch["input_ids"].shape == (1, 600)
    assert batch["labels"].shape == (1, 304)
    assert collator.truncated_sources == collator.truncated_targets == 0


def test_the_input_is_not_modified():
    ids = np.array([6, 7, 8, 9, EOS])
    sample = {"input_ids": ids, "labels": ids}
    batch = collate([sample], max_encoder_len=3, max_decoder_len=3)
    assert batch["input_ids"].tolist() == [[6, 7, EOS]]
    one = collate([sample])
    one["input_ids"].fill_(9)
    packed = collate([sample], packed=True)
    packed.input_ids.fill_(9)
    packed.labels.fill_(9)
    assert ids.tolist() == [6, 7, 8, 9, EOS]


def test_overlong_error():
    with pytest.raises(
        ValueError, match=r"input_ids of samples\[0\] must be at most max_encoder_len = 5 .* got 6"
    ):
        collate(max_encoder_len=5, overlong="error")
    with pytest.raises(
        ValueError, match=r"labels of samples\[1\] must be at most max_decoder_len = 4 tok.* got 5"
    ):
        collate(max_decoder_len=4, overlong="error")
    assert collate(max_encoder_len=6, max_decoder_len=5, overlong="error")


@pytest.mark.parametrize("limits", [(4, 3), (None, 3), (4, None), (512, 256)], ids=str)
def test_lengths_are_exact(limits):
    collator = CappedSeq2SeqCollator(make_tokenizer(), *limits, packed=True)
    raw = np.array([[len(each["input_ids"]), len(each["labels"])] for each in SAMPLES])
    before = raw.copy()
    found = collator.lengths(raw)
    assert found.tolist() == collator(SAMPLES).lengths.tolist()
    sources = [{"input_ids": each["input_ids"]} for each in SAMPLES]
    assert collator.lengths(raw[:, 0]).tolist() == collator(sources).lengths.tolist()
    found += 1
    assert np.array_equal(raw, before)
    assert collator.lengths([]).shape == (0, 2)


def test_lengths_with_overlong_error_and_bad_lengths():
    strict = CappedSeq2SeqCollator(make_tokenizer(), 4, 3, overlong="error")
    assert strict.lengths([[9, 9]]).tolist() == [[9, 9]]
    with pytest.raises(ValueError, match=r"raw_lengths\[1, 1\] must be at least 0, got -1"):
        strict.lengths([[3, 0], [2, -1]])
    with pytest.raises(ValueError, match=r"raw_lengths\[1\] must be at least 1, got 0"):
        strict.lengths([3, 0])
    with pytest.raises(TypeError, match=r"raw_lengths must be integers, got float64"):
        strict.lengths([3.5])
    for wrong in ([[1, 2, 3]], [[[1, 2]]]):
        with pytest.raises(ValueError, match=r"raw_lengths must be \(n,\) or \(n, 2\), got shape"):
            strict.lengths(wrong)


# ---------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize(
    "hold",
    [
        lambda s: {k: torch.tensor(v, dtype=torch.int64) for k, v in s.items()},
        lambda s: {k: np.array(v, np.int32) for k, v in s.items()},
        lambda s: hf.BatchEncoding({**s, "text": "not a list"}),
        lambda s: {
            "input_ids": [99, *s["input_ids"], 99, 99],
            "attention_mask": [0] + [1] * len(s["input_ids"]) + [0, 0],
            "labels": [*s["labels"], -100, -100],
        },
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_samples_of_every_kind(hold, packed):
    options = {"packed": packed, "max_encoder_len": 5, "max_decoder_len": 4}
    assert lists(collate([hold(s) for s in SAMPLES], **options)) == lists(
        collate(SAMPLES, **options)
    )


def test_only_trailing_ignored_labels_are_removed():
    labels = [[-100, 20, -100, 21, -100], [-100] * 3, [22, -100], [23]]
    batch = collate([{"input_ids": [6], "labels": each} for each in labels], packed=True)
    assert batch.lengths[:, 1].tolist() == [4, 0, 1, 1]
    assert batch.labels.tolist() == [[-100, 20, -100, 21, 22, 23]]


def test_dataloader_workers_collate_with_counts_of_their_own():
    collator = CappedSeq2SeqCollator(make_tokenizer(), 4, 3)
    assert lists(pickle.loads(pickle.dumps(collator))(SAMPLES)) == lists(collator(SAMPLES))
    before = collator.truncated_sources
    loader = DataLoader(SAMPLES * 2, batch_size=3, collate_fn=collator, num_workers=1)
    assert [lists(each) for each in loader] == [lists(collator(SAMPLES))] * 2
    assert collator.truncated_sources == before + 2  # only from the comparison


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "samples, error, message",
    [
        ([], TypeError, "samples must be a list of at least one"),
        (SAMPLES[0], TypeError, "samples must be a list"),
        ([[1, 2]], TypeError, r"samples\[0\] must be a mapping with input_ids, got a list"),
        (
            [SAMPLES[0], {"text": 1}],
            ValueError,
            r"samples\[1\] must have input_ids, got only 'text'",
        ),
        ([SAMPLES[0], {"input_ids": [1]}], ValueError, r"samples\[1\] must have labels"),
        ([{"input_ids": []}], ValueError, r"input_ids of samples\[0\] must hold at least one"),
        (
            [{"input_ids": [1], "attention_mask": [0]}],
            ValueError,
            r"attention_mask of samples\[0\] must be 1 at one token or more",
        ),
        ([{"input_ids": [1.5]}], TypeError, r"input_ids of samples\[0\]\[0\] must be an integer"),
        ([{"input_ids": [1], "labels": 3}], TypeError, r"labels of samples\[0\] must be a list"),
    ],
)
def test_bad_samples_are_named(samples, error, message):
    with pytest.raises(error, match=message):
        collate(samples)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"max_encoder_len": 0}, ValueError, "max_encoder_len must be from 1"),
        ({"max_decoder_len": 2.5}, TypeError, "max_decoder_len must be an integer"),
        ({"pad_to_multiple_of": 0}, ValueError, "pad_to_multiple_of must be from 1"),
        ({"overlong": "drop"}, ValueError, "overlong must be 'truncate' or 'error', got 'drop'"),
        ({"padding_side": "up"}, ValueError, "padding_side must be 'left' or 'right', got 'up'"),
    ],
)
def test_bad_options_are_named(options, error, message):
    tokenizer = types.SimpleNamespace(
        pad_token_id=0, eos_token_id=1, padding_side=options.pop("padding_side", "right")
    )
    with pytest.raises(error, match=message):
        CappedSeq2SeqCollator(tokenizer, **options)


def test_a_tokenizer_without_a_pad_token():
    with pytest.raises(
        ValueError, match=r"tokenizer must have a pad_token_id.*set tokenizer\.pad_token"
    ):
        CappedSeq2SeqCollator(make_tokenizer(pad_token=None))
