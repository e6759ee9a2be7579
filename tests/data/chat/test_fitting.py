"""Conversations that are too long: whole turns, cut tokens, dropped rows, errors."""

import pytest

from tokenpack.data.chat.checks import names_of

from . import families
from .helpers import assistant, encode, make_tokenizer, runs, system, user

CHAT = [system("s")]
for letter in "abcd":
    CHAT += [user(f"{letter}?" * 3), assistant(letter * 5)]


def length_of(tokenizer, messages):
    return len(encode(tokenizer, messages)[0].encoded.ids)


def text_of(sample):
    return sample.encoded.rendering.text


@pytest.mark.parametrize("loss_on", ["all", ["assistant", "user"]])
@pytest.mark.parametrize("keep", ["first", "last"])
def test_turns_keep_as_many_whole_pairs_as_fit(keep, loss_on):
    tokenizer = make_tokenizer("chatml")
    shorter = [CHAT[:1] + chosen(CHAT[1:], count, keep) for count in range(1, 5)]
    lengths = [length_of(tokenizer, messages) for messages in shorter]
    seen = set()
    for limit in sorted({length + step for length in lengths for step in (-1, 0, 1)}):
        (sample,) = encode(tokenizer, CHAT, max_length=limit, keep=keep, loss_on=loss_on)
        fitting = [messages for messages, length in zip(shorter, lengths) if length <= limit]
        if not fitting:
            assert not sample.kept
            assert names_of(sample.flags) == ["lost_target"]
            continue
        kept = fitting[-1]
        (expected,) = encode(tokenizer, kept, loss_on=loss_on)
        assert text_of(sample) == text_of(expected)
        assert sample.encoded.labels.tolist() == expected.encoded.labels.tolist()
        assert len(sample.encoded.ids) <= limit
        assert sample.cut_messages == len(CHAT) - len(kept)
        seen.add(len(kept))
    assert seen == {3, 5, 7, 9}


def chosen(messages, pairs, keep):
    return messages[: 2 * pairs] if keep == "first" else messages[-2 * pairs :]


@pytest.mark.parametrize("keep", ["first", "last"])
def test_a_pair_that_does_not_fit_alone_is_left_out(keep):
    tokenizer = make_tokenizer("chatml")
    row = [system("s"), user("a"), assistant("b"), user("c" * 90), assistant("d")]
    row += [user("e"), assistant("f")]
    (sample,) = encode(tokenizer, row, max_length=60, keep=keep)
    assert runs(tokenizer, sample.encoded) == ["b<|im_end|>", "f<|im_end|>"]
    assert text_of(sample) == text_of(encode(tokenizer, row[:3] + row[5:])[0])
    assert sample.cut_messages == 2


def test_a_pair_has_the_tools_that_its_answer_calls():
    tokenizer = make_tokenizer(families.LLAMA31)
    call = {"function": {"name": "f", "arguments": {}}}
    first = [user("a"), assistant(tool_calls=[call]), {"role": "tool", "content": "x"}]
    first += [assistant("b")]
    row = [*first, user("c"), assistant("d")]
    limit = length_of(tokenizer, row) - 1
    (sample,) = encode(tokenizer, row, max_length=limit)
    assert text_of(sample) == text_of(encode(tokenizer, first)[0])
    (sample,) = encode(tokenizer, row, max_length=limit, keep="last")
    assert text_of(sample) == text_of(encode(tokenizer, row[4:])[0])


def test_each_part_of_a_split_conversation_keeps_its_own_answer():
    tokenizer = make_tokenizer(families.QWEN3)
    row = [user("a"), assistant("b", reasoning_content="x")]
    row += [user("c"), assistant("d", reasoning_content="y")]
    limit = length_of(tokenizer, row[2:])
    found = encode(tokenizer, row, max_length=limit, keep="last")
    assert [runs(tokenizer, sample.encoded) for sample in found] == [
        ["<think>\nx\n</think>\n\nb<|im_end|>"],
        ["<think>\ny\n</think>\n\nd<|im_end|>"],
    ]
    first, second = encode(tokenizer, row, max_length=limit, keep="first")
    assert runs(tokenizer, first.encoded) == ["<think>\nx\n</think>\n\nb<|im_end|>"]
    assert (second.kept, names_of(second.flags)) == (False, ["lost_target"])


def test_the_last_answer_is_not_replaced_by_an_earlier_one():
    tokenizer = make_tokenizer("chatml")
    limit = length_of(tokenizer, CHAT) - 1
    (sample,) = encode(tokenizer, CHAT, max_length=limit, loss_on="last")
    assert (sample.kept, names_of(sample.flags)) == (False, ["lost_target"])
    (sample,) = encode(tokenizer, CHAT, max_length=limit, loss_on="last", keep="last")
    assert runs(tokenizer, sample.encoded) == ["ddddd<|im_end|>"]


def test_tokens_are_cut_and_nothing_is_added():
    tokenizer = make_tokenizer("chatml")
    row = [user("a"), assistant("Two lines of English text"), user("c"), assistant("d")]
    (whole,) = encode(tokenizer, row)
    ids, labels = whole.encoded.ids.tolist(), whole.encoded.labels.tolist()
    first, _ = whole.encoded.spans[0]
    for limit in range(1, len(ids)):
        for keep, part in (("first", slice(limit)), ("last", slice(-limit, None))):
            options = {"max_length": limit, "truncation": "token", "keep": keep}
            (sample,) = encode(tokenizer, row, **options)
            assert sample.encoded.ids.tolist() == ids[part]
            assert sample.encoded.labels.tolist() == labels[part]
            assert sample.cut_tokens == len(ids) - limit
            learned = [label for label in labels[part] if label != -100]
            assert sample.kept == bool(learned)
            assert ("lost_target" in names_of(sample.flags)) == (not learned)
            for begin, end in sample.encoded.spans.tolist():
                assert all(label != -100 for label in sample.encoded.labels[begin:end])
            if keep == "first":
                assert sample.kept == (limit > first)


def test_drop_and_error():
    tokenizer = make_tokenizer("chatml")
    limit = length_of(tokenizer, CHAT) - 1
    (sample,) = encode(tokenizer, CHAT, max_length=limit, truncation="drop")
    assert (sample.kept, sample.flags) == (False, 0)
    message = rf"row 0 must have at most max_length = {limit} tokens, got {limit + 1}; choose trunc"
    with pytest.raises(ValueError, match=message):
        encode(tokenizer, CHAT, max_length=limit, truncation="error")
    (sample,) = encode(tokenizer, CHAT, max_length=limit + 1, truncation="error")
    assert sample.kept
