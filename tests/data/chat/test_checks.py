"""Each check finds its problem, and nothing in rows without it."""

import pytest

from tokenpack.data import chat_dataset
from tokenpack.data.chat.checks import (
    CHECKS,
    ChatReport,
    act,
    count_padding,
    flag,
    names_of,
    read_actions,
)

from .helpers import assistant, encode, make_tokenizer, user

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% generation %}{{ m.content }}{% endgeneration %}END{% endfor %}"
).replace("END", "<|im_end|>\n")
ROW = [user("a"), assistant("b"), user("c"), assistant("d")]
PAIR = [user("aa"), assistant("bb")]
CALL = {"function": {"name": "weather", "arguments": {}}}

# For each check a template and a row that it finds, then the same without the problem.
FOUND = {
    "no_target": (PLAIN, [user("a")], PLAIN, ROW),
    "no_terminator": (PLAIN.replace("<|im_end|>", ""), ROW, PLAIN, ROW),
    "unstopped_terminator": (PLAIN.replace("<|im_end|>", "<|eot_id|>"), ROW, PLAIN, ROW),
    "double_bos": ("<s><s>" + PLAIN, ROW, "<s>" + PLAIN, ROW),
    "missing_content": (PLAIN.replace("{{ m.content }}", "{{ m.content[:1] }}"), PAIR, PLAIN, PAIR),
    "missing_reasoning": (
        *(PLAIN, [user("a"), assistant("b", reasoning_content="why")]),
        PLAIN.replace("{{ m.content }}", "{{ m.reasoning_content }}{{ m.content }}"),
        [user("a"), assistant("b", reasoning_content="why")],
    ),
    "missing_tools": (
        *(PLAIN, {"messages": ROW, "tools": [CALL]}),
        *("{{ tools | tojson }}" + PLAIN, {"messages": ROW, "tools": [CALL]}),
    ),
    "merged_boundary": (
        *(PLAIN.replace("}}\n{% gen", "}}: T{% gen"), [user("a"), assistant("wo lines")]),
        *(PLAIN, [user("a"), assistant("wo lines")]),
    ),
}
STOP = 4
OPTIONS = {"generation_config": [STOP]}


@pytest.mark.parametrize("name", FOUND)
def test_a_check_finds_its_problem_alone(name):
    template, row, other_template, other_row = FOUND[name]
    tokenizer = make_tokenizer(template)
    assert tokenizer.convert_ids_to_tokens(STOP) == "<|im_end|>"
    (sample,) = encode(tokenizer, row, **OPTIONS)
    assert names_of(sample.flags) == [name]
    tokenizer.chat_template = other_template
    (sample,) = encode(tokenizer, other_row, **OPTIONS)
    assert names_of(sample.flags) == []


def test_a_dropped_tool_call_is_missing_content():
    row = [user("a"), assistant("b", tool_calls=[CALL])]
    (sample,) = encode(make_tokenizer(PLAIN), row, **OPTIONS)
    assert names_of(sample.flags) == ["missing_content"]


def test_a_dropped_call_of_a_listed_tool_is_missing_content():
    row = {"messages": [user("a"), assistant("b", tool_calls=[CALL])], "tools": [CALL]}
    (sample,) = encode(make_tokenizer("{{ tools | tojson }}" + PLAIN), row, **OPTIONS)
    assert names_of(sample.flags) == ["missing_content"]


def test_lost_targets():
    (sample,) = encode(make_tokenizer(PLAIN), ROW, max_length=3, truncation="token", **OPTIONS)
    assert names_of(sample.flags) == ["lost_target"]


def test_terminators_that_are_not_learned_need_no_stop():
    (sample,) = encode(make_tokenizer(PLAIN), ROW, train_on_terminator=False)
    assert names_of(sample.flags) == []


def test_a_token_that_generation_stops_at_ends_a_turn_even_if_the_next_turn_writes_it():
    """As in GLM, where the next role's token ends an answer."""
    special = {"user": "<｜User｜>", "assistant": "<｜Assistant｜>"}
    template = "{% for m in messages %}{{ names[m.role] }}\n{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<｜Assistant｜>\n{% endif %}"
    tokenizer = make_tokenizer(template)
    stop = tokenizer.convert_tokens_to_ids("<｜User｜>")
    options = {"template_kwargs": {"names": special}, "generation_config": [stop]}
    (sample,) = encode(tokenizer, ROW, **options)
    text = sample.encoded.rendering.text
    spans = [text[span.begin : span.end] for span in sample.encoded.rendering.spans]
    assert spans == ["b<｜User｜>", "d"]
    assert names_of(sample.flags) == ["no_terminator"]  # the last answer


def test_padding():
    report = ChatReport(samples=2, tokens=100)
    count_padding(report, 200)
    assert report.problems["padding"] == 0
    count_padding(report, 201)
    assert report.problems["padding"] == 2


def test_padding_is_counted_and_said_only_if_it_is_named(recwarn):
    row = [{"prompt": "a", "response": "b"}]
    tokenizer = make_tokenizer("chatml")
    options = {"max_length": 1000, "generation_config": [STOP]}
    for checks in ("warn", "error", {"no_target": "error"}):
        report = chat_dataset(row, tokenizer, checks=checks, **options).chat_report
        assert report.problems["padding"] == 1
        assert "padding: 1 times in 1 rows: rows padded to max_length" in str(report)
    assert not recwarn
    with pytest.warns(UserWarning, match="padding: 1 times"):
        chat_dataset(row, tokenizer, checks={"padding": "warn"}, **options)
    with pytest.raises(ValueError, match="got padding: 1 times"):
        chat_dataset(row, tokenizer, checks={"padding": "error"}, **options)


def test_actions():
    report = ChatReport(rows=1)
    report.add_flags(flag("double_bos", "missing_tools"), 7)
    assert report.first_rows == {"double_bos": 7, "missing_tools": 7}
    with pytest.warns(UserWarning, match="1 times in 1 rows, first in row 7") as found:
        act(report, read_actions("warn"))
    assert len(found) == 2
    act(report, read_actions("ignore"))
    act(report, read_actions("warn"), known=CHECKS)
    with pytest.raises(ValueError, match=r"checks of chat data, got double_bos: .* twice; wr"):
        act(report, read_actions({"double_bos": "error"}))
    assert names_of(flag(*CHECKS)) == list(CHECKS)
