"""Span corruption: the distribution and layout of the original code, determined by the text."""

import itertools
import math
import pickle
import random
import types
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tokenpack.data import Denoiser, PackedPairs, T5SpanCorruptionCollatorFast
from tokenpack.data.collators.random_parts import random_part_starts
from tokenpack.segments import offsets_of

from .test_seq2seq import EOS, FIRST, PAD, make_tokenizer

WORDS = 80
TOKENIZER = make_tokenizer(WORDS)
SENTINELS = [TOKENIZER.convert_tokens_to_ids(f"<extra_id_{i}>") for i in range(100)]
R, S, X = 3, 4, 5
UL2 = [
    Denoiser(prefix="[R]"),
    Denoiser(0.25, None, weight=2.0, prefix=S),
    Denoiser(0.5, 3.0, prefix=(X, X)),
]


def make_texts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(FIRST, FIRST + WORDS, length) for length in lengths]


def samples(texts):
    return [{"input_ids": text} for text in texts]


def collator(*args, packed=True, **options):
    return T5SpanCorruptionCollatorFast(TOKENIZER, *args, packed=packed, **options)


def pairs(batch):
    """``(source, target)`` of each pair, as arrays."""
    sources = batch.input_ids[0].numpy(), batch.cu_seqlens.tolist()
    targets = batch.labels[0].numpy(), batch.decoder_cu_seqlens.tolist()
    sides = [[ids[a:b] for a, b in zip(ends, ends[1:])] for ids, ends in (sources, targets)]
    return list(zip(*sides))


def lists(batch):
    return {name: v.tolist() if torch.is_tensor(v) else v for name, v in batch.items()}


def by_sentinels(ids):
    """Split ids at their sentinels, which must be in order."""
    assert ids[-1] == EOS
    at = np.flatnonzero(ids >= FIRST + WORDS)
    assert ids[at].tolist() == SENTINELS[: len(at)]
    return [part[1:] if i else part for i, part in enumerate(np.split(ids[:-1], at))]


def recover(source, target):
    """Rebuild ``(text, mask)`` from a pair; the mask is True at noise."""
    kept, noise = by_sentinels(source), by_sentinels(target)
    assert not len(noise[0])  # a target begins with a sentinel
    if len(kept) == 1:  # a text of one token
        assert len(noise) == 2
        assert not len(noise[1])
        return kept[0], np.zeros(len(kept[0]), bool)
    assert len(kept) == len(noise)
    assert not len(kept[-1])  # a source ends with one
    parts = [part for pair in zip(kept[:-1], noise[1:]) for part in pair]
    is_noise = np.repeat(np.arange(len(parts)) % 2 == 1, list(map(len, parts)))
    return np.concatenate(parts), is_noise


def original(ids, masked):
    """Replace each masked run with the next sentinel, as T5's code does for both sides."""
    out, sentinels, before = [], iter(SENTINELS), False
    for token, mask in zip(ids, masked):
        if not mask:
            out.append(int(token))
        elif not before:
            out.append(next(sentinels))
        before = mask
    return [*out, EOS]


def original_counts(length, density, mean):
    """Compute noise tokens and spans as in T5's code, with our bound on the spans."""
    noise = min(max(round(length * density), 1), length - 1)
    return noise, min(max(round(noise / mean), 1), length - noise)


# ------------------------------------------------------------------------------------- the texts


@pytest.mark.parametrize("density, mean", [(0.15, 3.0), (0.5, 3.0), (0.15, 8.0)])
def test_ten_thousand_texts_have_the_given_density_and_spans_and_can_be_recovered(density, mean):
    texts = make_texts(np.random.default_rng(1).integers(64, 513, 10_000))
    found = pairs(collator(density, mean)(samples(texts)))
    tokens = noise = spans = 0
    for text, (source, target) in zip(texts, found):
        whole, is_noise = recover(source, target)
        assert np.array_equal(whole, text)
        tokens += len(text)
        noise += is_noise.sum()
        spans += int((target >= FIRST + WORDS).sum())
        assert (is_noise.sum(), len(by_sentinels(target)) - 1) == original_counts(
            len(text), density, mean
        )
    # The tolerance covers rounding: at most one noise token and half a span per text.
    assert noise / tokens == pytest.approx(density, rel=0.01)
    assert noise / spans == pytest.approx(mean, rel=0.01)


def test_both_sides_equal_the_original_code_for_the_same_mask():
    texts = make_texts([*range(1, 60), 511, 512])
    for text, (source, target) in zip(texts, pairs(collator()(samples(texts)))):
        _, is_noise = recover(source, target)
        assert source.tolist() == original(text, is_noise)
        assert target.tolist() == original(text, ~is_noise)


def test_the_shortest_texts():
    a, b = FIRST, FIRST + 1
    zero = SENTINELS[0]
    found = pairs(collator()(samples([[a], [a, b], [a, b, a], [a, EOS]])))
    found = [(source.tolist(), target.tolist()) for source, target in found]
    assert found == [
        ([a, EOS], [zero, EOS]),
        ([a, zero, EOS], [zero, b, EOS]),
        ([a, b, zero, EOS], [zero, a, EOS]),
        ([a, EOS], [zero, EOS]),
    ]


@settings(max_examples=200)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=8),
    st.floats(0.01, 0.99),
    st.floats(1.0, 9.0),
    st.integers(-(2**63), 2**63 - 1),
)
def test_texts_of_any_length_can_be_recovered(lengths, density, mean, seed):
    texts = make_texts(lengths)
    collate = collator(density, mean, seed=seed)
    batch = collate(samples(texts))
    assert batch.lengths.tolist() == collate.lengths(lengths, with_eos=False).tolist()
    for text, (source, target) in zip(texts, pairs(batch)):
        whole, is_noise = recover(source, target)
        assert np.array_equal(whole, text)
        if len(text) > 1:
            assert not is_noise[0]
            noise, spans = original_counts(len(text), density, mean)
            assert is_noise.sum() == noise
            assert len(target) == noise + spans + 1


# -------------------------------------------------------------------------- the distribution


def random_compositions(keys, totals, parts):
    """Return the parts of all totals, one total after another."""
    return np.diff(random_part_starts(keys, totals, parts), append=totals.sum())


def chi_square(counts, expected):
    return sum((count - expected) ** 2 / expected for count in counts)


@pytest.mark.parametrize("mean, spans", [(2.0, 3), (1.5, 4), (6.0, 1), (1.0, 6)])
def test_every_mask_of_the_original_code_is_equally_likely(mean, spans):
    """With 12 tokens and 6 noise tokens, noise and kept tokens each have C(5, spans - 1) splits."""
    texts = make_texts([12] * 20_000)
    masks = Counter()
    for source, target in pairs(collator(0.5, mean)(samples(texts))):
        _, is_noise = recover(source, target)
        runs = [(bool(key), len(list(run))) for key, run in itertools.groupby(is_noise)]
        assert [key for key, _ in runs] == [False, True] * spans
        masks[tuple(is_noise.tolist())] += 1
    ways = math.comb(5, spans - 1) ** 2
    assert len(masks) == ways
    # Chi-square with df = ways - 1 has mean df and variance 2 df. Allow five standard deviations.
    limit = ways - 1 + 5 * math.sqrt(2 * ways)
    assert chi_square(masks.values(), 20_000 / ways) <= limit


def test_compositions_of_many_totals_at_once():
    rng = np.random.default_rng(0)
    totals = rng.integers(1, 200, 500)
    parts = np.array([rng.integers(1, total + 1) for total in totals])
    keys = rng.integers(0, 2**63, 500).astype(np.uint64)
    lengths = random_compositions(keys, totals, parts)
    assert lengths.min() >= 1
    offsets = offsets_of(parts)
    assert np.array_equal(np.add.reduceat(lengths, offsets[:-1]), totals)
    for at in (0, 17, 499):  # each total gives the same parts separately
        separate = random_compositions(keys[at : at + 1], totals[at : at + 1], parts[at : at + 1])
        assert np.array_equal(separate, lengths[offsets[at] : offsets[at + 1]])


@pytest.mark.parametrize(
    "total, parts", [(8, 1), (8, 2), (8, 3), (8, 4), (8, 5), (8, 7), (8, 8), (11, 6)]
)
def test_compositions_are_equally_likely(total, parts):
    count = 20_000
    keys = np.arange(count, dtype=np.uint64)
    found = random_compositions(keys, np.full(count, total), np.full(count, parts))
    rows = found.reshape(count, parts)
    ways = math.comb(total - 1, parts - 1)
    counts = Counter(map(tuple, rows.tolist()))
    assert len(counts) == ways
    assert chi_square(counts.values(), count / ways) <= ways - 1 + 5 * math.sqrt(2 * ways)


# ----------------------------------------------------------- what the corruption depends on


LENGTHS = (40, 1, 7, 300, 2, 64, 40, 3)


@pytest.mark.parametrize("denoisers", [None, UL2], ids=["T5", "UL2"])
def test_a_text_is_corrupted_the_same_in_any_batch(denoisers):
    texts = make_texts(LENGTHS)
    collate = collator(denoisers=denoisers)
    together = pairs(collate(samples(texts)))
    for order in ([5], [7, 0, 3], [*range(8)][::-1], [2, 2]):
        for at, found in zip(order, pairs(collate(samples([texts[at] for at in order])))):
            assert all(map(np.array_equal, found, together[at]))


@pytest.mark.parametrize(
    "hold",
    [
        lambda text: text.tolist(),
        lambda text: torch.from_numpy(text),
        lambda text: text.astype(np.int32),
        lambda text: text.astype(np.uint8),
        lambda text: [*text.tolist(), EOS],
    ],
)
def test_a_text_is_corrupted_the_same_in_any_form(hold):
    texts = make_texts(LENGTHS)
    expected = lists(collator(denoisers=UL2)(samples(texts)))
    assert lists(collator(denoisers=UL2)(samples(map(hold, texts)))) == expected
    some = [hold(text) if at % 3 else text for at, text in enumerate(texts)]
    assert lists(collator(denoisers=UL2)(samples(some))) == expected


def masks(collate, texts):
    return [recover(*pair)[1].tolist() for pair in pairs(collate(samples(texts)))]


def test_epochs_and_seeds_differ_and_repeat():
    texts = make_texts([64] * 50)
    collate = collator()
    first = masks(collate, texts)
    assert masks(collate, texts) == first
    seen = {tuple(map(tuple, first))}
    for epoch in (1, 2, -1):
        collate.set_epoch(epoch)
        found = masks(collate, texts)
        assert sum(a == b for a, b in zip(found, first)) <= 1
        seen.add(tuple(map(tuple, found)))
        again = collator(seed=epoch)
        seen.add(tuple(map(tuple, masks(again, texts))))
    assert len(seen) == 7
    collate.set_epoch(0)
    assert masks(collate, texts) == first


def test_similar_texts_are_corrupted_differently():
    """One token more or less, one token changed, two exchanged, zeros at either end."""
    text = make_texts([64])[0]
    one, swapped = text.copy(), text.copy()
    one[-1] += 1
    swapped[[3, 40]] = swapped[[40, 3]] if text[3] != text[40] else swapped[[40, 3]] + [0, 1]
    others = [one, swapped, text[:-1], np.append(text, 0), np.append(0, text)]
    first, *found = masks(collator(), [text, *others])
    for mask in found:
        # An equal mask is very unlikely: there are several hundred thousand.
        assert mask[:60] != first[:60]


def test_the_corruption_of_a_seed_and_an_epoch_is_fixed():
    """A resumed run sees the same data, also on another machine and in another version."""
    collate = collator(0.5, 2.0, seed=3)
    collate.set_epoch(2)
    text = np.arange(FIRST, FIRST + 40)
    noise = [mask.nonzero()[0] + FIRST for mask in map(np.array, masks(collate, [text, text[:12]]))]
    assert noise[0].tolist() == [
        *(7, 8, 9, 10, 11, 14, 16, 18, 22, 23, 26, 30, 31, 32, 35, 37, 38, 43, 44, 45)
    ]
    assert noise[1].tolist() == [9, 12, 13, 15, 16, 17]


def test_global_random_generators_are_not_used():
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    collator(denoisers=UL2)(samples(make_texts(LENGTHS)))
    assert torch.get_rng_state().equal(states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_corrupt_like_the_main_process_and_follow_its_epoch(context):
    rows = samples(make_texts(LENGTHS * 2))
    plain = types.SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS, padding_side="right")
    denoisers = [Denoiser(prefix=R), Denoiser(0.25, None), Denoiser(0.5)]
    collate = T5SpanCorruptionCollatorFast(plain, denoisers=denoisers, sentinel_ids=SENTINELS)
    loader = DataLoader(
        rows,
        batch_size=4,
        collate_fn=collate,
        num_workers=2,
        persistent_workers=True,
        multiprocessing_context=context,
    )
    seen = []
    for epoch in range(3):
        collate.set_epoch(epoch)
        found = [lists(batch) for batch in loader]
        assert found == [lists(collate(rows[at : at + 4])) for at in range(0, 16, 4)]
        seen.append(found)
    assert seen[0] != seen[1] != seen[2]


def test_a_pickle_has_its_own_shared_epoch():
    collate = collator()
    collate.set_epoch(3)
    texts = make_texts([64] * 4)
    other = pickle.loads(pickle.dumps(collate))
    assert masks(other, texts) == masks(collate, texts)
    assert other._epoch.is_shared()
    other.set_epoch(4)
    assert masks(other, texts) != masks(collate, texts)


# --------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("denoisers", [None, UL2], ids=["T5", "UL2"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_packed_and_padded_batches_are_equal(denoisers, side):
    rows = samples(make_texts(LENGTHS))
    packed = collator(denoisers=denoisers)(rows)
    tokenizer = make_tokenizer(WORDS, padding_side=side)
    padded = T5SpanCorruptionCollatorFast(tokenizer, denoisers=denoisers)(rows)
    assert isinstance(packed, PackedPairs)
    assert type(padded) is dict
    assert padded.pop("input_length").tolist() == packed.lengths[:, 0].tolist()
    expected = packed.padded(PAD, 8)
    if side == "right":
        assert lists(padded) == lists(expected)
        return
    assert padded["labels"].equal(expected["labels"])
    for row, mask, (source, _) in zip(padded["input_ids"], padded["attention_mask"], pairs(packed)):
        assert row[mask.bool()].tolist() == source.tolist()
        assert mask.tolist() == sorted(mask.tolist())


def test_names_and_multiples():
    rows = samples(make_texts([20, 9]))
    batch = collator(packed=False, pad_to_multiple_of=5, length_column_name="length")(rows)
    assert batch["input_ids"].shape == (2, 20)  # 17 kept, 1 sentinel, EOS
    assert batch["labels"].shape == (2, 5)
    assert batch["length"].tolist() == [19, 10]
    assert "input_length" not in collator(packed=False, length_column_name=None)(rows)


def test_the_input_is_not_modified():
    text = np.append(make_texts([40])[0], EOS)
    before = text.copy()
    for options in ({}, {"denoisers": UL2}, {"max_encoder_len": 10}):
        batch = collator(**options)(samples([text]))
        batch.input_ids.fill_(0)
        batch.labels.fill_(0)
    assert np.array_equal(text, before)


def test_samples_with_masks_or_labels():
    texts = make_texts([30, 12])
    expected = lists(collator()(samples(texts)))
    rows = [
        {
            "input_ids": [*text, EOS, PAD],
            "attention_mask": [1] * len(text) + [1, 0],
            "other": "column",
        }
        for text in texts
    ]
    assert lists(collator()(rows)) == expected
    assert lists(collator()([{"input_ids": t, "labels": t} for t in texts])) == expected
    with pytest.raises(ValueError, match="labels of samples must be absent or equal to input_ids"):
        collator()([{"input_ids": text, "labels": text[1:]} for text in texts])
    with pytest.raises(ValueError, match="labels of samples must be absent or equal to input_ids"):
        collator()([{"input_ids": text, "labels": text[::-1]} for text in texts])
    moved = [{"input_ids": [7, 8], "labels": [7]}, {"input_ids": [9], "labels": [8, 9]}]
    with pytest.raises(ValueError, match="labels of samples must be absent or equal to input_ids"):
        collator()(moved)


# ---------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize("density, mean", [(0.15, 3.0), (0.5, 3.0), (0.15, 1.0), (0.9, 4.0)])
@pytest.mark.parametrize("limits", [(None, None), (64, None), (None, 20), (40, 30)], ids=str)
def test_lengths_are_exact_and_texts_are_truncated_as_little_as_possible(density, mean, limits):
    texts = make_texts([*range(1, 340)])
    options = {"sentinel_ids": range(1000, 1300)}
    collate = collator(
        density, mean, max_encoder_len=limits[0], max_decoder_len=limits[1], **options
    )
    batch = collate(samples(texts))
    lengths = batch.lengths.numpy()
    assert np.array_equal(collate.lengths(range(1, 340), with_eos=False), lengths)
    free = collator(density, mean, **options).lengths(np.arange(1, 340), with_eos=False)
    source, target = (limit or 10**9 for limit in limits)
    fits = (free[:, 0] <= source) & (free[:, 1] <= target)
    assert fits[1]
    if limits == (None, None):
        assert fits.all()
    else:
        assert not fits.all()
    assert np.array_equal(lengths[fits], free[fits])
    longest = int(fits.nonzero()[0].max())  # all shorter texts fit, no longer one does
    assert fits[: longest + 1].all()
    assert (lengths[longest:] == free[longest]).all()
    assert collate.truncated_sources == int((~fits).sum())


@pytest.mark.parametrize("denoisers", [None, UL2], ids=["T5", "UL2"])
def test_lengths_of_ids_with_an_eos_and_of_pairs(denoisers):
    collate = collator(denoisers=denoisers)
    texts = make_texts(range(1, 100))
    raw = np.array([len(text) + 1 for text in texts])  # with EOS
    expected = collate.lengths(raw - 1, with_eos=False)
    assert np.array_equal(collate.lengths(raw), expected)
    assert np.array_equal(collate.lengths(np.stack([raw, raw % 7], axis=1)), expected)
    assert (collate.lengths(raw, with_eos=False) >= expected).all()
    found = collate(samples([np.append(text, EOS) for text in texts])).lengths.numpy()
    assert (found <= expected).all()
    if denoisers is None:
        assert np.array_equal(found, expected)
    # A length of 1 means a text without EOS, because EOS without a text raises an error.
    assert collate.lengths([1]).tolist() == collate.lengths([1], with_eos=False).tolist()


def test_a_truncated_text_keeps_its_beginning():
    text = make_texts([100])[0]
    collate = collator(max_encoder_len=40)
    whole, _ = recover(*pairs(collate(samples([np.append(text, EOS)])))[0])
    assert np.array_equal(whole, text[: len(whole)])
    assert 40 <= len(whole) < 50
    assert collate.truncated_sources == 1


def test_lengths_of_a_mixture_are_bounds():
    lengths = np.random.default_rng(0).integers(1, 200, 2000)
    collate = collator(denoisers=UL2, max_encoder_len=100)
    found = collate(samples(make_texts(lengths))).lengths.numpy()
    bounds = collate.lengths(lengths, with_eos=False)
    assert (found <= bounds).all()
    assert (found == bounds).any(axis=0).all()
    separate = [collator(denoisers=[d], max_encoder_len=100).lengths(lengths, False) for d in UL2]
    assert np.array_equal(bounds, np.max(separate, axis=0))
    assert collate.lengths([]).shape == (0, 2)


# --------------------------------------------------------------------------------------- mixtures


def test_a_sequential_denoiser_splits_the_text_in_two():
    texts = make_texts([1, 2, 3, 40, 41])
    collate = collator(denoisers=[Denoiser(0.25, None)])
    batch = collate(samples(texts))
    assert batch.lengths.tolist() == collate.lengths([1, 2, 3, 40, 41], with_eos=False).tolist()
    for text, (source, target), cut in zip(texts, pairs(batch), (0, 1, 1, 10, 10)):
        assert target.tolist() == [*text[len(text) - cut :], EOS]
        assert source.tolist() == [*text[: len(text) - cut], EOS]


def test_a_mixture_draws_by_weight_and_adds_the_prefix():
    texts = make_texts(np.random.default_rng(3).integers(1, 80, 8000))
    batch = collator(denoisers=UL2)(samples(texts))
    drawn = Counter()
    collators = [collator(denoisers=[each]) for each in UL2]
    expected = [each.lengths(list(map(len, texts)), with_eos=False) for each in collators]
    for at, (text, (source, target)) in enumerate(zip(texts, pairs(batch))):
        front = int(source[0])
        drawn[front] += 1
        which = (R, S, X).index(front)
        assert [len(source), len(target)] == expected[which][at].tolist()
        body = source[2:] if front == X else source[1:]
        assert (source[:2] == X).all() == (front == X)
        if front == S:
            assert np.array_equal(np.concatenate([body[:-1], target[:-1]]), text)
        else:
            assert np.array_equal(recover(body, target)[0], text)
    counts = [drawn[front] for front in (R, S, X)]
    # Two degrees of freedom: the value exceeds 20 with probability 1 / 20,000.
    assert sum((c - e) ** 2 / e for c, e in zip(counts, (2000, 4000, 2000))) < 20


def test_one_denoiser_equals_the_two_numbers():
    rows = samples(make_texts(LENGTHS))
    assert lists(collator(denoisers=[Denoiser(0.3, 2.0)])(rows)) == lists(collator(0.3, 2.0)(rows))


def test_prefixes_of_several_tokens_and_of_a_string_outside_the_vocabulary():
    class Splitting(types.SimpleNamespace):
        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            return [8, 9] if text == "in two" else [2]

    tokenizer = Splitting(
        pad_token_id=0, eos_token_id=1, padding_side="right", unk_token_id=2, get_vocab=dict
    )

    def front(prefix):
        collate = T5SpanCorruptionCollatorFast(
            tokenizer, denoisers=[Denoiser(prefix=prefix)], sentinel_ids=[99], packed=True
        )
        return collate([{"input_ids": [20]}]).input_ids[0].tolist()

    assert front("in two") == [8, 9, 20, 1]
    assert front([7, 6, 5]) == [7, 6, 5, 20, 1]
    assert front(7) == [7, 20, 1]
    assert front(None) == [20, 1]
    with pytest.raises(ValueError, match="prefix must have no unknown tokens, got 'unknown'"):
        front("unknown")


# -------------------------------------------------------------------------------------- sentinels


@pytest.mark.parametrize("mark", ["", "▁"])
def test_sentinels_descend_from_the_end_of_the_vocabulary(mark):
    tokenizer = make_tokenizer(WORDS, mark=mark)
    collate = T5SpanCorruptionCollatorFast(tokenizer, 0.5, 1.0, packed=True)
    source, target = pairs(collate(samples(make_texts([8]))))[0]
    last = len(tokenizer) - 1
    for side in (source, target):
        assert side[side >= FIRST + WORDS].tolist() == [last, last - 1, last - 2, last - 3]


def test_custom_sentinels():
    collate = collator(0.5, 1.0, sentinel_ids=[900, 950, 901])
    source, target = pairs(collate(samples(make_texts([6]))))[0]
    assert source[source >= 900].tolist() == target[target >= 900].tolist() == [900, 950, 901]


def test_sentinels_may_exceed_the_dtype_of_the_text():
    text = make_texts([40])[0]
    packed, wide = [
        collator(sentinel_ids=range(70_000, 70_100))(samples([text.astype(dtype)]))
        for dtype in (np.uint8, np.int64)
    ]
    assert lists(packed) == lists(wide)
    assert packed.labels[0, 0] == 70_000


def test_more_spans_than_sentinels():
    tokenizer = make_tokenizer(WORDS, sentinels=4)
    texts = samples(make_texts([30, 200]))
    with pytest.raises(
        ValueError,
        match=r"input_ids of samples\[1\] must have at most 4 spans, .* got 200 tokens and 10 "
        r"spans with Denoiser\(.*; max_encoder_len=(\d+) truncates",
    ) as caught:
        T5SpanCorruptionCollatorFast(tokenizer)(texts)
    limit = int(str(caught.value).split("max_encoder_len=")[1].split()[0])
    batch = T5SpanCorruptionCollatorFast(tokenizer, max_encoder_len=limit, packed=True)(texts)
    assert len(by_marks(batch, len(tokenizer) - 4)) == 4
    with pytest.raises(ValueError, match="at most 4 spans"):
        T5SpanCorruptionCollatorFast(tokenizer, max_encoder_len=limit + 1)(texts)


def by_marks(batch, first):
    target = pairs(batch)[1][1]
    return target[target >= first]


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"noise_density": 0.0}, ValueError, "noise_density must be above 0 and below 1, got 0.0"),
        ({"noise_density": 1.0}, ValueError, "noise_density must be above 0 and below 1"),
        ({"noise_density": float("nan")}, ValueError, "noise_density must be"),
        ({"mean_noise_span_length": 0.5}, ValueError, "must be None or at least 1, got 0.5"),
        ({"mean_noise_span_length": float("inf")}, ValueError, "must be None or at least 1"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
        ({"max_encoder_len": 0}, ValueError, "max_encoder_len must be from 1"),
        ({"max_encoder_len": 2}, ValueError, "must leave room for a text of two tokens, got 2 and"),
        ({"max_decoder_len": 2}, ValueError, "must leave room .* got None and 2"),
        ({"pad_to_multiple_of": 0}, ValueError, "pad_to_multiple_of must be from 1"),
        ({"denoisers": []}, ValueError, "denoisers must hold at least one Denoiser"),
        (
            {"denoisers": UL2, "noise_density": 0.5},
            ValueError,
            "must be set in each Denoiser .* got 0.5 and 3.0",
        ),
        ({"sentinel_ids": []}, ValueError, "sentinel_ids must hold at least one id"),
        ({"sentinel_ids": [1, "a"]}, TypeError, r"sentinel_ids\[1\] must be an integer, got 'a'"),
        ({"denoisers": [Denoiser(prefix=1.5)]}, TypeError, "prefix must be an integer, got 1.5"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        collator(**options)


def test_a_tokenizer_must_have_eos_and_sentinels():
    with pytest.raises(ValueError, match="tokenizer must have a eos_token_id"):
        T5SpanCorruptionCollatorFast(make_tokenizer(eos_token=None))
    with pytest.raises(
        ValueError, match=r"tokenizer must have sentinels <extra_id_0>.*sentinel_ids"
    ):
        T5SpanCorruptionCollatorFast(make_tokenizer(sentinels=0))
    with pytest.raises(ValueError, match="weight must be above 0"):
        Denoiser(weight=0)


@pytest.mark.parametrize(
    "rows, error, message",
    [
        ([{"input_ids": [7]}, {"input_ids": [EOS]}], ValueError, r"samples\[1\] must hold a token"),
        ([{"input_ids": []}], ValueError, r"input_ids of samples\[0\] must hold at least one"),
        ([[7, 8]], TypeError, r"samples\[0\] must be a mapping"),
    ],
)
def test_bad_samples_are_named(rows, error, message):
    with pytest.raises(error, match=message):
        collator()(rows)


def test_bad_lengths_and_epochs_are_named():
    with pytest.raises(ValueError, match=r"raw_lengths\[1\] must be at least 1, got 0"):
        collator().lengths([3, 0])
    with pytest.raises(TypeError, match="raw_lengths must be"):
        collator().lengths([3.5])
    with pytest.raises(TypeError, match=r"epoch must be an integer, got 0.5"):
        collator().set_epoch(0.5)
