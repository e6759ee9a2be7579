"""The byte-level BPE decodes every text, and reserves its special tokens."""

import pytest

from tokenpack.samples.tokenizer import PAD, SENTINELS, SPECIAL_TOKENS, train_tokenizer

TEXTS = ["the cat sat on the mat\n\n  the end", "naïve café 猫 🙂", "\t\r\n\x00"]


def test_every_text_is_decoded_also_one_not_trained_on():
    tokenizer = train_tokenizer(TEXTS, 400)
    for text in [*TEXTS, "Здравствуй 🦙\x7f"]:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_special_tokens_come_first_and_in_order():
    tokenizer = train_tokenizer(TEXTS, 400)
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(105))
    assert tokenizer.get_vocab_size() <= 400


def test_the_name_of_a_special_token_in_a_text_is_text():
    tokenizer = train_tokenizer(TEXTS, 400)
    ids = tokenizer.encode(f"a{PAD}b{SENTINELS[0]}").ids
    assert min(ids) >= len(SPECIAL_TOKENS)
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"a{PAD}b{SENTINELS[0]}"


def test_a_vocabulary_that_is_too_small_is_an_error():
    with pytest.raises(ValueError, match=r"vocab_size must be at least 361, .*got 360"):
        train_tokenizer(TEXTS, 360)
