"""Random samples, valid and not, compared with collators written as Python loops.

Every outcome is the batch of the loops, or one line that names the field and the sample.

    FUZZ_CASES=100000 pytest tests/data/test_collator_fuzz.py    a third of them per collator
"""

import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenpack.data import (
    CappedSeq2SeqCollator,
    T5SpanCorruptionCollatorFast,
    packed_collate_fn,
)

pa = pytest.importorskip("pyarrow")
pd = pytest.importorskip("pandas")

EOS, PAD, IGNORED = 1, 0, -100
SENTINELS = [99, 98, 97, 96, 95]
fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_CASES", "150")) // 3,
    database=None,
    derandomize="FUZZ_CASES" not in os.environ,  # the same cases in every run of CI
    suppress_health_check=list(HealthCheck),
)

# ---------------------------------------------------------------------------------------- samples

INTEGER_TYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
FORMS = [
    *(list, tuple, pa.array, lambda x: pd.Series(x, index=range(len(x))[::-1])),
    *(lambda x, kind=kind: np.array(x, kind) for kind in (*INTEGER_TYPES, ">i4", ">u8")),
    *(lambda x, kind=kind: torch.tensor(x, dtype=getattr(torch, kind)) for kind in INTEGER_TYPES),
    lambda x: np.repeat(np.array(x, np.int64), 2)[::2],
    lambda x: np.ma.masked_array(np.array(x, np.int64)),
]
NO_INTEGERS = [
    *(lambda x: [*x, 0.5], lambda x: np.array([*x, 1.0]), lambda x: [True, *x]),
    *(lambda x: torch.tensor([*x, 1.0]), lambda x: [*x, None], lambda x: [*x, "1"]),
    *(lambda x: [*x, 2**64], lambda x: [*x, [1]], lambda x: "12", lambda x: None, lambda x: 7),
    *(lambda x: {1, 2}, lambda x: pa.array([*x, None], pa.int64()), lambda x: np.array([[1, 2]])),
    *(lambda x: np.ma.masked_array([*x, 1], [True] * (len(x) + 1)), lambda x: np.array(5)),
    *(lambda x: np.array([*x, 1], bool), lambda x: np.array([2**63], np.uint64)),
]
token = st.one_of(
    *[st.integers(2, 50)] * 4, st.just(EOS), st.sampled_from([IGNORED, PAD, 2**31, 2**62])
)
sequences = st.lists(token, max_size=7)


def in_some_form(draw, values):
    """The values as a list, array, tensor, series or column that can hold them."""
    form = draw(st.sampled_from(FORMS))
    try:
        made = form(values)
    except (OverflowError, RuntimeError, ValueError, TypeError):  # not in this integer type
        return values
    return made if list(map(int, made)) == values else values


@st.composite
def batches(draw, fields):
    """``(samples, rows)``: what a collator gets, and lists of integers or None for each field.

    None in place of the rows means that the samples must be refused.
    """
    names = ["input_ids", *(name for name in fields if draw(st.booleans()))]
    rows, samples, valid = [], [], True
    faulty = draw(st.integers(0, 3)) == 0
    for _ in range(draw(st.integers(1, 5))):
        row = {"input_ids": draw(sequences)}
        length = len(row["input_ids"])
        if "labels" in names:
            row["labels"] = draw(st.lists(token, min_size=length, max_size=length))
        if "attention_mask" in names:
            row["attention_mask"] = draw(
                st.lists(st.sampled_from([1, 1, 1, 0]), min_size=length, max_size=length)
            )
        sample = {name: in_some_form(draw, values) for name, values in row.items()}
        if faulty and draw(st.booleans()):
            spoil(draw, sample, row)
            valid = False
        if draw(st.booleans()):
            sample["text"] = "other columns do not matter"
        rows.append(row)
        samples.append(sample)
    return samples, rows if valid else None


def spoil(draw, sample, row):
    """Put something that is not a list of integers into a field of a sample."""
    name = draw(st.sampled_from(list(row)))
    values = [value for value in row[name] if abs(value) < 50]  # that fit into every type
    sample[name] = draw(st.sampled_from(NO_INTEGERS))(values)


def outcome(collate, samples):
    """The batch, or None for a refusal: one line of moderate length that names the samples."""
    try:
        return collate(samples)
    except (TypeError, ValueError) as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 500
        assert re.search(r"samples|input_ids|labels|attention_mask", message), message
        return None


def unmasked(row, name):
    mask = row.get("attention_mask", [1] * len(row["input_ids"]))
    return [value for value, real in zip(row[name], mask) if real]


# ---------------------------------------------------------------------------- packed_collate_fn


def pieces_by_loop(rows, capacity, overlong):
    """``(ids, labels)`` of each packed sequence, or None if the samples must be refused."""
    pieces = []
    for row in rows:
        ids = unmasked(row, "input_ids")
        labels = unmasked(row, "labels") if "labels" in row else ids
        if not ids or (overlong == "error" and len(ids) > capacity):
            return None
        if overlong == "drop" and len(ids) > capacity:
            continue
        end = len(ids) if overlong == "split" else min(len(ids), capacity)
        for at in range(0, end, capacity):
            first, last = at, min(at + capacity, end)
            pieces.append((ids[first:last], [IGNORED, *labels[first + 1 : last]]))
    return pieces or None


@fuzz
@given(st.data(), batches(["labels", "attention_mask"]))
def test_packed_collate_fn(data, batch):
    samples, rows = batch
    if set(samples[0]) == {"input_ids"} and data.draw(st.booleans()):
        samples = [sample["input_ids"] for sample in samples]
    capacity = data.draw(st.integers(1, 8))
    overlong = data.draw(st.sampled_from(["error", "truncate", "split", "drop"]))
    options = {"stream": data.draw(st.booleans()), "labels_shifted": data.draw(st.booleans())}
    strategy = data.draw(st.sampled_from(["nf", "auto"]))
    got = outcome(packed_collate_fn(capacity, strategy, overlong=overlong, **options), samples)
    want = rows and pieces_by_loop(rows, capacity, overlong)
    assert (got is None) == (want is None)
    if want is None:
        return
    labels = got.labels
    if options["labels_shifted"]:
        want = [(ids, [*labels_[1:], IGNORED]) for ids, labels_ in want]
    mask = got.attention_mask.bool()
    cuts = got.cu_seqlens.diff().tolist()
    parts = [values[mask].split(cuts) for values in (got.input_ids, labels, got.position_ids)]
    found = [tuple(part.tolist() for part in each) for each in zip(*parts)]
    assert sorted(each[:2] for each in found) == sorted(want)
    assert all(positions == list(range(len(ids))) for ids, _, positions in found)
    assert (got.input_ids[~mask] == 0).all()
    assert (labels[~mask] == IGNORED).all()
    assert options["stream"] or got.input_ids.shape[1] == capacity


# -------------------------------------------------------------------------- CappedSeq2SeqCollator


def limited(values, limit):
    """The first tokens, and EOS if it was the last."""
    if limit is None or len(values) <= limit:
        return values
    return [*values[: limit - 1], EOS] if values[-1] == EOS else values[:limit]


def pairs_by_loop(rows, limits, overlong):
    """``(source, target)`` of each pair, or None if the samples must be refused."""
    pairs = []
    for row in rows:
        source, target = unmasked(row, "input_ids"), list(row.get("labels", []))
        while target and target[-1] == IGNORED:
            target.pop()
        too_long = any(
            limit is not None and len(values) > limit
            for values, limit in zip((source, target), limits)
        )
        if not source or (overlong == "error" and too_long):
            return None
        pairs.append(tuple(map(limited, (source, target), limits)))
    return pairs


def pairs_of(batch, side):
    """Sources and targets of a batch. Checks its padding."""
    if "cu_seqlens" in batch:
        batch = batch.padded(PAD)
        side = "right"
    mask = batch["attention_mask"].bool()
    in_order = mask.flip(1) if side == "left" else mask
    assert (in_order.long().diff(dim=1) <= 0).all()
    assert (batch["input_ids"][~mask] == PAD).all()
    sources = [ids[real].tolist() for ids, real in zip(batch["input_ids"], mask)]
    targets = [row.tolist() for row in batch["labels"]] if "labels" in batch else [[]] * len(mask)
    return list(zip(sources, targets))


@fuzz
@given(st.data(), batches(["labels", "attention_mask"]))
def test_capped_seq2seq_collator(data, batch):
    samples, rows = batch
    limits = [data.draw(st.none() | st.integers(1, 8)) for _ in range(2)]
    overlong = data.draw(st.sampled_from(["truncate", "truncate", "error"]))
    packed, side = data.draw(st.booleans()), data.draw(st.sampled_from(["left", "right"]))
    multiple = data.draw(st.sampled_from([None, 4]))
    tokenizer = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS, padding_side=side)
    collate = CappedSeq2SeqCollator(tokenizer, *limits, multiple, packed=packed, overlong=overlong)
    got = outcome(collate, samples)
    want = rows and pairs_by_loop(rows, limits, overlong)
    assert (got is None) == (want is None)
    if want is None:
        return
    pairs = pairs_of(got, side)
    longest = max(len(target) for _, target in pairs)
    assert pairs == [
        (source, target + [IGNORED] * (longest - len(target))) for source, target in want
    ]
    if packed:
        assert np.diff(got["cu_seqlens"]).tolist() == [len(source) for source, _ in want]
    else:
        assert got["input_length"].tolist() == [len(source) for source, _ in want]
        assert multiple is None or got["input_ids"].shape[1] % multiple == 0


# -------------------------------------------------------------------- T5SpanCorruptionCollatorFast


def restored(source, target):
    """The text: the spans of the target put back at the sentinels of the source."""
    *target, last = target
    assert last == EOS
    if len(source) == 2:  # a text of one token has no noise
        assert target == SENTINELS[:1]
        return source[:1]
    spans = {}
    for value in target:
        if value in SENTINELS:
            sentinel = value
            assert sentinel not in spans
            spans[sentinel] = []
        else:
            spans[sentinel].append(value)
    assert all(spans.values())
    assert [value for value in source if value in SENTINELS] == list(spans)
    assert list(spans) == SENTINELS[: len(spans)]
    *source, last = source
    assert last == EOS
    return [part for value in source for part in spans.get(value, [value])]


@fuzz
@given(st.data(), batches(["attention_mask"]), st.integers(0, 2**31))
def test_span_corruption(data, batch, seed):
    samples, rows = batch
    packed = data.draw(st.booleans())
    tokenizer = SimpleNamespace(
        **{"pad_token_id": PAD, "eos_token_id": EOS, "padding_side": "right"},
        get_vocab=lambda: {f"<extra_id_{at}>": each for at, each in enumerate(SENTINELS)},
    )
    collate = T5SpanCorruptionCollatorFast(
        *(tokenizer, data.draw(st.sampled_from([0.15, 0.5])), data.draw(st.sampled_from([1, 3]))),
        pad_to_multiple_of=None,
        seed=seed,
        packed=packed,
    )
    texts = rows and [unmasked(row, "input_ids") for row in rows]
    if texts is not None:
        texts = [text[:-1] if text and text[-1] == EOS else text for text in texts]
    got = outcome(collate, samples)
    assert (got is None) == (texts is None or not all(texts))
    if got is None:
        return
    again = collate(samples)
    assert all(
        torch.equal(torch.as_tensor(got[name]), torch.as_tensor(again[name])) for name in got
    )
    fields = got.padded(PAD) if packed else got
    mask = fields["attention_mask"].bool()
    for ids, real, labels, text in zip(fields["input_ids"], mask, fields["labels"], texts):
        valid = int((labels != IGNORED).nonzero().max()) + 1
        assert restored(ids[real].tolist(), labels[:valid].tolist()) == text
