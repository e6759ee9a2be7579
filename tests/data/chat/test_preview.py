"""A preview shows the exact text and the labels of any batch, in each style."""

import html
import re

import pytest
import torch
from transformers import DataCollatorForSeq2Seq

from tokenpack.data import (
    CappedSeq2SeqCollator,
    Preview,
    T5SpanCorruptionCollatorFast,
    chat_dataset,
    pack_dataset,
    packed_collate_fn,
    preview,
)

from .helpers import assistant, encode, make_tokenizer, runs, system, user

CHAT = [
    *(
        system("Be brief: é 字 🙂."),
        user("Où?\r\n \x1b[31mred <b>&amp;</b>"),
        assistant("Là-bas 🙂"),
    ),
    *(user("And 2?"), assistant("Two lines\nof text.")),
]
STOP = {"generation_config": [4]}


@pytest.fixture
def tokenizer():
    return make_tokenizer("chatml")


@pytest.fixture
def rows(tokenizer):
    return chat_dataset([CHAT, CHAT[3:]], tokenizer, checks="ignore")


def learned(sequence):
    return [piece.text for piece in sequence.pieces if piece.learned]


@pytest.mark.parametrize("preset", ["chatml", "raw", "llama3"])
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_plain_is_the_rendered_text_byte_for_byte(preset, trim_offsets):
    tokenizer = make_tokenizer(preset, trim_offsets=trim_offsets)
    shown = preview(CHAT, tokenizer)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert shown.render("plain").encode() == text.encode()
    (sample,) = encode(tokenizer, CHAT)
    assert learned(shown.sequences[0]) == runs(tokenizer, sample.encoded)


def test_color_and_marks_change_nothing_but_the_marks(tokenizer):
    shown = preview(CHAT, tokenizer, **STOP)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    visible = text.replace("\r", "␍").replace("\x1b", "␛")
    without = re.sub(r"\x1b\[[\d;]*m", "", shown.render("color"))
    assert visible in without
    marked = shown.render("marks")
    assert "⟦Là-bas 🙂<|im_end|>⟧\n" in marked
    assert marked.replace("⟦", "").replace("⟧", "") == without
    assert str(shown) == marked
    assert "\x1b" not in marked
    assert "\x1b[1;32mLà-bas 🙂<|im_end|>\x1b[0m\n" in shown.render("color")
    with pytest.raises(ValueError, match="style must be one of color, marks, plain, got 'gray'"):
        shown.render("gray")


def test_html_holds_the_text_and_no_markup_of_it(tokenizer):
    page = preview(CHAT, tokenizer).html()
    (body,) = re.findall(r"</p>\n<pre>(.*?)</pre>\n<p", page, re.DOTALL)
    text = html.unescape(re.sub(r"</?span[^>]*>", "", body))
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text == rendered.replace("\r", "␍").replace("\x1b", "␛")
    assert "<b>" not in page
    assert '<span class="target">Là-bas 🙂&lt;|im_end|&gt;</span>' in page
    assert "http" not in page
    assert "<script" not in page


def test_problems_stand_out(tokenizer):
    shown = preview([CHAT[:1], CHAT], tokenizer, **STOP)
    colored = shown.render("color")
    assert colored.count("\x1b[1;31m") == 1
    assert "\x1b[1;31mchecks found no_target (no token is learned)\x1b[0m" in colored
    page = shown.html()
    assert page.count('<p class="problem">checks found') == 1
    assert page.count("<details>") == 1  # the first has no boundaries


def test_boundaries_and_shares(tokenizer):
    (sequence,) = preview(CHAT[3:], tokenizer, **STOP).sequences
    (sample,) = encode(tokenizer, CHAT[3:])
    ids = sample.encoded.ids.tolist()
    (first, last) = sample.encoded.spans[0].tolist()
    assert sequence.boundaries == [
        f"token {first}: {ids[first - 1]} '\\n' | {ids[first]} 'Two'  -> learned",
        f"token {last}: {ids[last - 1]} '<|im_end|>' | {ids[last]} '\\n'  -> context",
    ]
    assert (sequence.tokens, sequence.targets, sequence.dropped) == (len(ids), last - first, 0)
    assert sequence.shares.startswith(f"{len(ids)} tokens: {last - first} learned (")
    assert sequence.problems == []


def test_truncation_and_checks_are_shown(tokenizer):
    whole = len(encode(tokenizer, CHAT)[0].encoded.ids)
    (sequence,) = preview(CHAT, tokenizer, max_length=whole - 1, keep="last").sequences
    assert sequence.text == tokenizer.apply_chat_template([CHAT[0], *CHAT[3:]], tokenize=False)
    assert sequence.dropped == whole - sequence.tokens > 0
    assert "unstopped_terminator" in sequence.problems[0]
    options = {"truncation": "token", "max_length": 40}
    (first,) = preview(CHAT, tokenizer, **options).sequences
    (last,) = preview(CHAT, tokenizer, keep="last", **options).sequences
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text.startswith(first.text)
    assert text.endswith(last.text)
    assert (first.tokens, first.dropped) == (40, whole - 40)
    (nothing,) = preview([user("a")], tokenizer).sequences
    assert nothing.title == "row 0, not in the dataset"
    assert "no_target" in nothing.problems[0]


def test_several_rows(tokenizer):
    rows = [{"prompt": "a", "response": "b"}, {"messages": CHAT}]
    shown = preview(rows, tokenizer)
    assert isinstance(shown, Preview)
    assert [sequence.title for sequence in shown.sequences] == ["row 0", "row 1"]
    assert len(preview(rows, tokenizer, n=1).sequences) == 1


def expected_runs(rows, tokenizer):
    from types import SimpleNamespace

    return [runs(tokenizer, SimpleNamespace(labels=torch.tensor(row["labels"]))) for row in rows]


@pytest.mark.parametrize(
    "kind", ["row", "rows", "slice", "padded", "packed", "shifted", "stream", "dataset"]
)
def test_batches_of_causal_models(kind, rows, tokenizer):
    samples = [rows[0], rows[1]]
    kept = [{name: sample[name] for name in ("input_ids", "labels")} for sample in samples]
    if kind == "row":
        batch, samples = samples[0], samples[:1]
    elif kind == "rows":
        batch = samples
    elif kind == "slice":
        batch = rows[:2]
    elif kind == "padded":
        batch = DataCollatorForSeq2Seq(tokenizer)(kept)
    elif kind == "dataset":
        batch = pack_dataset(rows["input_ids"], 256, labels=rows["labels"], progress=False)[:1]
    else:
        options = {"labels_shifted": kind == "shifted", "stream": kind == "stream"}
        batch = packed_collate_fn(256, **options)(kept)
    shown = preview(batch, tokenizer)
    found = [learned(sequence) for sequence in shown.sequences]
    assert sorted(found) == sorted(expected_runs(samples, tokenizer))
    texts = [tokenizer.decode(sample["input_ids"]) for sample in samples]
    assert sorted(sequence.text for sequence in shown.sequences) == sorted(texts)
    has_padding = kind in ("padded", "packed", "shifted", "dataset")
    assert any("of them padding" in note for note in shown.notes) == has_padding


@pytest.mark.parametrize("packed", [False, True])
def test_pairs_and_span_corruption(packed, tokenizer):
    pairs = [{"input_ids": [20, 21, 22], "labels": [23, 2]}, {"input_ids": [24], "labels": [25, 2]}]
    collate = CappedSeq2SeqCollator(tokenizer, max_encoder_len=8, max_decoder_len=8, packed=packed)
    shown = preview(collate(pairs), tokenizer)
    for pair, sequence in zip(pairs, shown.sequences):
        assert sequence.text == tokenizer.decode(pair["input_ids"] + pair["labels"])
        assert "".join(learned(sequence)) == tokenizer.decode(pair["labels"])
    corrupt = T5SpanCorruptionCollatorFast(tokenizer, sentinel_ids=[5, 6, 7, 8], packed=packed)
    batch = corrupt([{"input_ids": list(range(20, 50))}])
    (sequence,) = preview(batch, tokenizer).sequences
    targets = batch["labels"][batch["labels"] != -100].tolist()
    assert sequence.targets == len(targets)
    assert "".join(learned(sequence)) == tokenizer.decode(targets)


def test_a_boundary_within_a_character(tokenizer):
    """Tokens of a byte-level tokenizer may end within a character. No character is lost."""
    ids = tokenizer("é🙂é", add_special_tokens=False)["input_ids"]
    for at in range(len(ids) + 1):
        labels = [-100] * at + ids[at:]
        (sequence,) = preview({"input_ids": ids, "labels": labels}, tokenizer).sequences
        assert sequence.text == "é🙂é"


def test_other_samples(tokenizer):
    with pytest.raises(TypeError, match="sample must be a conversation, a batch with input_ids"):
        preview("text", tokenizer)
    with pytest.raises(TypeError, match="options must be given for conversations only, got"):
        preview({"input_ids": [1]}, tokenizer, max_length=3)
    with pytest.raises(ValueError, match="row 0 must have the columns"):
        preview({"text": "x"}, tokenizer)
