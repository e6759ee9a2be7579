"""Examples of the three families, and random padded batches of them."""

from itertools import chain

import numpy as np
import pytest

from tokenpack.samples.examples import (
    Example,
    causal_examples,
    pad_batch,
    pair_examples,
    random_batches,
    span_corruption_examples,
)
from tokenpack.samples.text import Text
from tokenpack.samples.tokenizer import BOS, EOS, SENTINELS, train_tokenizer

SENTENCE = "A body of several words follows here."


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([SENTENCE], 400)


def put_back(corrupted, target, sentinels):
    """Undo span corruption: each sentinel of the input becomes its span of the target."""
    spans, current = {}, None
    for token in target:
        if token in sentinels:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return [t for token in corrupted for t in spans.get(token, [token])]


@pytest.mark.parametrize("length", [1, 2, 3, 10, 19, 20, 100, 1900])
def test_span_corruption_loses_nothing(tokenizer, length):
    # The tokenizer has not seen digits, so each is a token.
    text = "".join(map(str, np.random.default_rng(length).integers(0, 10, length)))
    (example,) = span_corruption_examples([Text(text)], tokenizer, 2000, 2000, seed=0).examples
    sentinels = [tokenizer.token_to_id(token) for token in SENTINELS]
    (*corrupted, end), (*target, target_end) = example.input_ids, example.labels
    assert end == target_end == tokenizer.token_to_id(EOS)
    assert put_back(corrupted, target, sentinels) == tokenizer.encode(text).ids
    used = [token for token in corrupted if token in sentinels]
    assert used == sentinels[: len(used)]
    masked = length - (len(corrupted) - len(used))
    assert masked == min(max(round(0.15 * length), 1), length - 1)
    # Three tokens to a span on average, and no sentinel after the last span.
    assert len(used) == (max(1, round(masked / 3)) if masked else 0)
    assert [token for token in target if token in sentinels] == (used or sentinels[:1])
    assert target[-1] not in sentinels or not masked


def test_span_corruption_depends_on_the_seed_alone(tokenizer):
    texts = [Text(SENTENCE * 4)]
    first, again, other = (
        span_corruption_examples(texts, tokenizer, 400, 400, seed) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_t5_with_targets_masks_nothing(tokenizer):
    end = tokenizer.token_to_id(EOS)
    (example,) = span_corruption_examples(
        [Text("body", "words")], tokenizer, 99, 99, seed=0
    ).examples
    assert example.input_ids == [*tokenizer.encode("body").ids, end]
    assert example.labels == [*tokenizer.encode("words").ids, end]


def test_t5_text_is_cut_before_it_is_masked_and_counted(tokenizer):
    texts = [Text(SENTENCE * 10), Text("body")]
    made = span_corruption_examples(texts, tokenizer, 30, 5, seed=0)
    assert made.cut_inputs == 1
    assert made.cut_labels == 1
    long = made.examples[0]
    assert len(long.input_ids) <= 30
    assert len(long.labels) == 5  # of 6: a sentinel, 4 masked tokens and the end
    # 29 tokens of the text and the end. One sentinel replaces 4 tokens.
    sentinels = [tokenizer.token_to_id(token) for token in SENTINELS]
    assert sum(token in sentinels for token in long.input_ids) == 1
    assert len(long.input_ids) == 29 - 4 + 1 + 1


def test_llama_examples(tokenizer):
    begin, end = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    ids = tokenizer.encode(SENTENCE).ids
    exact = len(ids) + 2
    made = causal_examples([Text(SENTENCE), Text("body")], tokenizer, exact)
    assert made.cut_inputs == 0
    assert made.examples[0] == Example([begin, *ids, end])
    cut = causal_examples([Text(SENTENCE), Text("body")], tokenizer, exact - 1)
    assert cut.cut_inputs == 1
    assert cut.examples[0].input_ids == [begin, *ids[:-1], end]
    joined = causal_examples([Text("body", "words")], tokenizer, 99).examples[0]
    assert tokenizer.decode(joined.input_ids) == "body\nwords"


def test_nllb_examples(tokenizer):
    texts = [Text("words.\n\nA body."), Text("words")]
    made = pair_examples(texts, tokenizer, 99, 4)
    code, end = tokenizer.token_to_id("__body__"), tokenizer.token_to_id(EOS)
    assert made.unusable == 1
    (example,) = made.examples
    assert example.input_ids == [code, *tokenizer.encode("A body.").ids, end]
    assert example.labels[0] == tokenizer.token_to_id("__summary__")
    assert len(example.labels) == 4
    assert made.cut_labels == 1
    assert made.cut_inputs == 0


def test_a_batch_is_padded_on_the_right():
    batch = pad_batch([Example([5, 6, 7], [8]), Example([9], [10, 11])], pad=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[8, -100], [10, 11]]
    causal = pad_batch([Example([5, 6]), Example([0])], pad=0)
    assert causal["labels"].tolist() == [[5, 6], [0, -100]]


def test_batches_are_random_and_cover_an_epoch(tokenizer):
    examples = [Example([i]) for i in range(10, 22)]
    batches = random_batches(examples, tokenizer, 4, steps=6, seed=3)
    again = random_batches(examples, tokenizer, 4, steps=6, seed=3)
    drawn = [[int(row) for row in batch["input_ids"]] for batch in batches]
    assert drawn == [[int(row) for row in batch["input_ids"]] for batch in again]
    first, second = [*chain(*drawn[:3])], [*chain(*drawn[3:])]
    assert sorted(first) == sorted(second) == list(range(10, 22))
    assert first != sorted(first)
    assert first != second


def test_fewer_examples_than_rows_in_a_batch(tokenizer):
    (batch, _) = random_batches([Example([7]), Example([8])], tokenizer, 16, steps=2, seed=0)
    assert sorted(batch["input_ids"].flatten().tolist()) == [7, 8]
    with pytest.raises(ValueError, match="at least one example, got none"):
        random_batches([], tokenizer, 16, steps=2, seed=0)
