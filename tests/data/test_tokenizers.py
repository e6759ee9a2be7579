"""Trained and byte tokenizers: ids, roles, saving, every text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from tokenpack.data import ChatTemplate, byte_tokenizer, chat_dataset, train_tokenizer
from tokenpack.data.chat.templates import PRESETS
from tokenpack.data.tokenizers import _characters_of_bytes

TEXTS = ["Hello, the world of packing is a row of tokens.", "Two lines of English text."] * 4
CHAT = [{"role": "user", "content": "Où?"}, {"role": "assistant", "content": "字 🙂"}]
IDS = {
    **{"[UNK]": 0, "[PAD]": 1, "[BOS]": 2, "[EOS]": 3, "[SEP]": 4, "[MASK]": 5, "[CLS]": 6},
    **{"<|im_start|>": 7, "<|im_end|>": 8, "<|start_header_id|>": 9, "<|end_header_id|>": 10},
    **{"<|eot_id|>": 11, "<start_of_turn>": 12, "<end_of_turn>": 13, "<|tool_call|>": 14},
    **{"<|tool_result|>": 15, "<|doc_start|>": 16, "<|doc_end|>": 17, "<|code_start|>": 18},
    **{"<|code_end|>": 19, "<|system|>": 20},
}


@pytest.fixture(scope="module", params=["trained", "bytes"])
def tokenizer(request):
    return train_tokenizer(TEXTS, 400) if request.param == "trained" else byte_tokenizer()


@pytest.mark.parametrize("vocab_size", [277, 400])
def test_ids_of_special_tokens_are_fixed(vocab_size):
    tokenizer = train_tokenizer(TEXTS, vocab_size)
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in IDS} == IDS
    assert len(tokenizer) <= vocab_size
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2, 3)
    assert tokenizer.unk_token_id == 0


def test_training_merges_pairs_that_repeat():
    assert len(train_tokenizer(TEXTS, 400)) > len(train_tokenizer(TEXTS, 277)) == 277
    assert len(train_tokenizer(["ab"], 400)) == 277
    assert len(train_tokenizer(["ab"], 400, min_frequency=1)) == 278


def test_ids_of_bytes_are_the_bytes():
    tokenizer = byte_tokenizer()
    text = "Hello world\n\t\0 é 字 🙂"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer("Hello world")["input_ids"][:3] == [72, 101, 108]
    assert len(tokenizer) == 256 + len(IDS)
    assert tokenizer.convert_tokens_to_ids("[UNK]") == 256
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (257, 259)
    assert set(_characters_of_bytes()) == set(pre_tokenizers.ByteLevel.alphabet())


@given(text=st.text())
@settings(max_examples=100)
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    if not any(token in text for token in IDS):
        assert tokenizer.decode(ids) == text


def test_it_is_saved_and_loaded_as_any_tokenizer(tokenizer, tmp_path):
    ChatTemplate("chatml").set_on(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nHello é 字 🙂<|im_end|>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.apply_chat_template(CHAT) == tokenizer.apply_chat_template(CHAT)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_works(preset, tokenizer):
    dataset = chat_dataset([CHAT], tokenizer, template=preset, checks="ignore")
    learned = [label for label in dataset[0]["labels"] if label != -100]
    assert tokenizer.decode(learned).strip().startswith("字 🙂")


def test_template_and_special_tokens_of_ones_own():
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    options = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = train_tokenizer(
        iter(TEXTS), 300, special_tokens=special, chat_template="chatml", **options
    )
    assert tokenizer.convert_tokens_to_ids(special) == [0, 1, 2, 3, 4]
    assert tokenizer.special_tokens_map == options
    assert tokenizer.chat_template == ChatTemplate("chatml").jinja
    with pytest.raises(ValueError, match=r"one that splits <\|start_header_id\|>, "):
        byte_tokenizer(special_tokens=special, chat_template="llama3", **options)


def test_wrong_arguments():
    with pytest.raises(
        ValueError, match="vocab_size must be at least 277, for 256 bytes and 21 sp"
    ):
        train_tokenizer(TEXTS, 276)
    with pytest.raises(
        TypeError, match=r"texts must be an iterable of texts, got one text; pass \["
    ):
        train_tokenizer("text", 300)
    with pytest.raises(ValueError, match="pad_token must be one of special_tokens, got '<pad>'"):
        byte_tokenizer(pad_token="<pad>")
    with pytest.raises(
        ValueError, match=r"special_tokens must name each token once, got \['a', 'a"
    ):
        byte_tokenizer(special_tokens=["a", "a"])
    with pytest.raises(ValueError, match='special_tokens must be "chat" or a list of tokens, got'):
        byte_tokenizer(special_tokens="chats")
