"""Rows of every schema become the same conversation; others are errors that name the row."""

import pytest

from tokenpack.data.chat.schemas import read_conversation

from .helpers import assistant, encode, make_tokenizer, system, user

PAIR = [user("q"), assistant("a")]
FROM_VALUE = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
SAME = {
    "messages": {"messages": PAIR},
    "a list of messages": PAIR,
    "from and value": {
        "messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    },
    "conversations": {
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    },
    "roles in conversations": {"conversations": PAIR},
    "prompt and response": {"prompt": "q", "response": "a"},
    "prompt and completion": {"prompt": "q", "completion": "a"},
    "lists": {"prompt": PAIR[:1], "completion": PAIR[1:]},
    "instruction": {"instruction": "q", "input": "", "output": "a"},
    "no input": {"instruction": "q", "output": "a"},
    "missing columns": {"messages": None, "prompt": "q", "response": "a", "completion": None},
    "no messages, but a pair": {"messages": [], "prompt": "q", "response": "a"},
    "no messages of the prompt": {"prompt": [], "response": "a", "conversations": PAIR},
    "two without": {"messages": [], "conversations": [], "instruction": "q", "output": "a"},
    "JSON": {
        "messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'
    },
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_conversation(name):
    assert read_conversation(SAME[name]).messages == PAIR


def test_schemas_are_mixed_freely():
    samples = encode(make_tokenizer("chatml"), *SAME.values())
    assert len({sample.encoded.labels.tobytes() for sample in samples}) == 1


def test_input_follows_the_instruction():
    row = {"instruction": "Translate.", "input": "ja", "output": "yes"}
    assert read_conversation(row).messages == [user("Translate.\n\nja"), assistant("yes")]


def test_system_tools_and_variables():
    row = {
        "system": "s",
        "messages": PAIR,
        "tools": '[{"name": "f"}]',
        "documents": [{"title": "t", "text": "x"}],
        "chat_template_kwargs": {"enable_thinking": False},
        "id": 7,
    }
    conversation = read_conversation(row)
    assert conversation.messages == [system("s"), *PAIR]
    assert conversation.tools == [{"name": "f"}]
    assert conversation.documents == [{"title": "t", "text": "x"}]
    assert conversation.template_kwargs == {"enable_thinking": False}


def test_answers_in_a_prompt_are_context():
    row = {"prompt": [*PAIR, user("r")], "completion": [assistant("b")]}
    assert read_conversation(row).weights == [0, 0, 0, None]


def test_flags_and_weights_are_no_part_of_the_message():
    row = [user("q"), assistant("a", train=False), user("q"), assistant("a", weight=0.5)]
    conversation = read_conversation(row)
    assert conversation.messages == PAIR * 2
    assert conversation.weights == [None, 0, None, 0.5]


def test_fields_pass_through():
    parts = [{"type": "text", "text": "q"}, {"type": "image"}]
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}
    row = [user(parts, name="x"), assistant(tool_calls=[call], reasoning_content="r")]
    first, second = read_conversation(row).messages
    assert first == {"role": "user", "content": parts, "name": "x"}
    assert second["reasoning_content"] == "r"
    # Templates write arguments as JSON, so a text would be quoted twice.
    assert second["tool_calls"] == [{"id": "1", "function": {"name": "f", "arguments": {"a": 1}}}]
    unparsed = {"function": {"name": "f", "arguments": "no JSON"}}
    assert read_conversation([assistant(tool_calls=[unparsed])]).messages[0]["tool_calls"] == [
        unparsed
    ]


def test_keys_that_arrow_added_are_removed():
    call = {"function": {"name": "f", "arguments": {"a": 1, "b": None}}}
    message = {"role": "assistant", "content": None, "tool_calls": [call], "name": None}
    row = {"messages": [message], "tools": None, "prompt": None}
    assert read_conversation(row, sparse=True).messages == [
        assistant(tool_calls=[{"function": {"name": "f", "arguments": {"a": 1}}}])
    ]
    assert read_conversation(row).messages == [assistant(tool_calls=[call])]


WRONG = {
    "keys": ({"text": "x", "id": 1}, "row 3 must have the columns messages; .*; got text, id"),
    "no keys": ({}, "row 3 must have the columns .*; got none"),
    "output missing": ({"instruction": "x"}, "got instruction"),
    "no messages": ({"messages": []}, "row 3 must have at least one message, got none"),
    "no messages or answer": (
        {"messages": [], "prompt": "q"},
        "row 3 must have at least one message, got none",
    ),
    "text": ({"messages": "hello"}, "row 3: messages must be JSON if it is a text, got 'hello'"),
    "one message": ({"messages": user("x")}, "messages must be a list of messages, got dict"),
    "no mapping": ({"messages": ["x"]}, r"row 3: messages\[0\] must be a mapping, got str"),
    "no role": ({"messages": [{"content": "x"}]}, r"messages\[0\] must have role .* got content"),
    "no content": ({"messages": [user(None)]}, r"messages\[0\] must have role .* got role"),
    "a number": ({"messages": [user(3)]}, "content must be a text or a list of parts, got int"),
    "train": ({"messages": [user("x", train=0)]}, "train must be true or false, got 0"),
    "weight": (
        {"messages": [user("x", weight=-1)]},
        "weight must be a number of 0 or more, got -1",
    ),
    "output": ({"instruction": "x", "output": 3}, "row 3: output must be a text, got int"),
    "tools": ({"messages": PAIR, "tools": "{}"}, "row 3: tools must be a list, got dict"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_row(name):
    row, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        read_conversation(row, "row 3")


def test_other_types():
    with pytest.raises(TypeError, match="row 3 must be a mapping or a list of messages, got str"):
        read_conversation("x", "row 3")
    with pytest.raises(ValueError, match="row 3 must have the columns instruction and output; got"):
        read_conversation({"prompt": "q", "response": "a"}, "row 3", "instruction")
