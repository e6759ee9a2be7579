"""A row of a dataset as a conversation, whatever its columns are called.

    messages                      role and content, or from and value
    conversations                 the same; human is user, gpt is assistant
    prompt, completion            texts, or lists of messages
    prompt, response              the same
    instruction, input, output    input may be empty or missing

A row is of the first schema whose columns it has. A column that is None counts as missing, and so
does an empty list of messages in a row that has another schema. The schema is detected for each
row, so a dataset may mix them. Other columns that are read are ``system`` (a text, put first),
``tools`` and ``documents`` (lists, or JSON) and ``chat_template_kwargs`` (a mapping).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

# Each schema with the columns that it needs. The order decides for rows with several.
SCHEMAS: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "conversations": (("conversations",),),
    "prompt_response": (("prompt", "completion"), ("prompt", "response")),
    "instruction": (("instruction", "output"),),
}
_ROLES = {"human": "user", "gpt": "assistant"}
_READ = ("system", "tools", "documents", "chat_template_kwargs")
_PAYLOADS = ("content", "tool_calls", "reasoning_content", "reasoning", "thinking")

_MAPPINGS = (dict, Mapping)  # dict first: whether a class is a Mapping takes longer to find out


class Conversation(NamedTuple):
    """One conversation.

    Attributes:
        messages: mappings for the chat template, with ``role``.
        weights: for each message, its weight in the loss, or None if the row does not say it.
        tools: for the template, or None.
        documents: for the template, or None.
        template_kwargs: more variables of the template.
    """

    messages: list[dict[str, Any]]
    weights: list[float | None]
    tools: list[Any] | None = None
    documents: list[Any] | None = None
    template_kwargs: Mapping[str, Any] = MappingProxyType({})

    def take(self, kept: Sequence[int]) -> Conversation:
        """The conversation of some of the messages."""
        return self._replace(
            messages=[self.messages[at] for at in kept], weights=[self.weights[at] for at in kept]
        )


def read_conversation(
    row: Any, where: str = "sample", schema: str | None = None, *, sparse: bool = False
) -> Conversation:
    """Read a row.

    Args:
        row: a mapping, or a list of messages.
        where: the name of the row, for error messages.
        schema: a name of `SCHEMAS`; by default it is detected.
        sparse: the row comes from Arrow, where all structs of a column have the same keys. Then
            values of None are missing keys, at any depth.

    Raises:
        TypeError: if the row is neither a mapping nor a list.
        ValueError: if the row has no known schema, or if a message lacks its role or its content.
    """
    if isinstance(row, (list, tuple)):
        row = {"messages": row}
    if not isinstance(row, _MAPPINGS):
        raise TypeError(
            f"{where} must be a mapping or a list of messages, got {type(row).__name__}"
        )
    columns = _columns_of(row, where, schema)
    messages, weights = _messages_of(row, columns, where)
    if sparse:
        messages = [
            message
            if all(isinstance(each, str) for each in message.values())
            # Values of None are gone from a message already, but not from what it holds.
            else _without_none(message)
            for message in messages
        ]
    more = {name: row[name] for name in _READ if row.get(name) is not None}
    if sparse:
        more = _without_none(more)
    if more.get("system"):
        messages.insert(0, {"role": "system", "content": more["system"]})
        weights.insert(0, None)
    if not messages:
        raise ValueError(f"{where} must have at least one message, got none")
    if not more:
        return Conversation(messages, weights)
    return Conversation(
        messages,
        weights,
        _parsed(more, "tools", list, where) or None,
        _parsed(more, "documents", list, where) or None,
        dict(_parsed(more, "chat_template_kwargs", Mapping, where) or {}),
    )


def _columns_of(row: Mapping[str, Any], where: str, schema: str | None) -> tuple[str, ...]:
    without_messages = None
    for name, choices in SCHEMAS.items():
        if schema not in (None, name):
            continue
        for columns in choices:
            values = [row.get(column) for column in columns]
            if any(value is None for value in values):
                continue
            if all(len(value) > 0 for value in values if isinstance(value, (list, tuple))):
                return columns
            without_messages = without_messages or columns
    if without_messages is not None:
        return without_messages
    wanted = SCHEMAS if schema is None else {schema: SCHEMAS[schema]}
    known = "; ".join(" and ".join(columns) for each in wanted.values() for columns in each)
    keys = ", ".join(str(key) for key, value in row.items() if value is not None)
    raise ValueError(f"{where} must have the columns {known}; got {keys or 'none'}")


def _messages_of(
    row: Mapping[str, Any], columns: tuple[str, ...], where: str
) -> tuple[list[dict[str, Any]], list[float | None]]:
    if columns[0] in ("messages", "conversations"):
        return _message_list(row[columns[0]], f"{where}: {columns[0]}")
    if columns[0] == "instruction":
        given = [_text(row, name, where) for name in ("instruction", "input", "output")]
        prompt = "\n\n".join(filter(None, given[:2]))
        messages = [_message("user", prompt), _message("assistant", given[2])]
        return messages, [None, None]
    messages, weights = _side(row, "prompt", "user", where)
    weights = [0.0] * len(weights)  # of several assistant turns, only the completion is learned
    answer, answer_weights = _side(row, columns[1], "assistant", where)
    return messages + answer, weights + answer_weights


def _side(
    row: Mapping[str, Any], column: str, role: str, where: str
) -> tuple[list[dict[str, Any]], list[float | None]]:
    if isinstance(row[column], str):
        return [_message(role, row[column])], [None]
    return _message_list(row[column], f"{where}: {column}")


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    text = row.get(column)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{where}: {column} must be a text, got {type(text).__name__}")
    return text


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _message_list(value: Any, where: str) -> tuple[list[dict[str, Any]], list[float | None]]:
    if isinstance(value, str):
        value = _json(value, where)
    if isinstance(value, Mapping) or not isinstance(value, (list, tuple)):
        raise ValueError(f"{where} must be a list of messages, got {type(value).__name__}")
    messages, weights = [], []
    for at, given in enumerate(value):
        message, weight = _read_message(given, f"{where}[{at}]")
        messages.append(message)
        weights.append(weight)
    return messages, weights


def _read_message(given: Any, where: str) -> tuple[dict[str, Any], float | None]:
    if not isinstance(given, _MAPPINGS):
        raise ValueError(f"{where} must be a mapping, got {type(given).__name__}")
    role, content = given.get("role"), given.get("content")
    if len(given) == 2 and isinstance(role, str) and isinstance(content, str):
        return _message(_ROLES.get(role, role), content), None  # most messages
    message = {key: value for key, value in given.items() if value is not None}
    if "role" not in message and "from" in message:
        message["role"] = message.pop("from")
    if "content" not in message and "value" in message:
        message["content"] = message.pop("value")
    role = message.get("role")
    has_payload = "content" in message or any(name in message for name in _PAYLOADS)
    if not isinstance(role, str) or not has_payload:
        raise ValueError(
            f"{where} must have role and content (or from and value), got "
            f"{', '.join(map(str, message)) or 'no keys'}"
        )
    if not isinstance(message.get("content", ""), (str, list, tuple)):
        raise ValueError(
            f"{where}: content must be a text or a list of parts, got "
            f"{type(message['content']).__name__}"
        )
    message["role"] = _ROLES.get(role, role)
    weight = _weight(message.pop("train", True), message.pop("weight", None), where)
    if "tool_calls" in message:
        message["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
        if not message["tool_calls"]:
            del message["tool_calls"]
    return message, weight


def _weight(train: Any, weight: Any, where: str) -> float | None:
    if not isinstance(train, bool):
        raise ValueError(f"{where}: train must be true or false, got {train!r}")
    if not train:
        return 0.0
    if weight is None:
        return None
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not number or not 0 <= weight < math.inf:
        raise ValueError(f"{where}: weight must be a number of 0 or more, got {weight!r}")
    return float(weight)


def _tool_call(call: Any) -> Any:
    """A tool call whose arguments are a mapping: templates write them as JSON."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _tool_call(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            return call
        if isinstance(parsed, dict):
            return {**call, "arguments": _Arguments(parsed, arguments)}
    return call


class _Arguments(dict[str, Any]):
    """Arguments that were a JSON text."""

    def __init__(self, parsed: dict[str, Any], text: str) -> None:
        super().__init__(parsed)
        self.text = text


def with_json_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the arguments of tool calls as JSON texts, as they were if they were."""

    def convert(call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": convert(call["function"])}
        arguments = call.get("arguments")
        if not isinstance(arguments, Mapping):
            return call
        text = getattr(arguments, "text", None) or json.dumps(arguments, ensure_ascii=False)
        return {**call, "arguments": text}

    return [
        {**message, "tool_calls": [convert(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _parsed(row: Mapping[str, Any], column: str, kind: type, where: str) -> Any:
    value = row.get(column)
    if value is None:
        return None
    if isinstance(value, str):
        value = _json(value, f"{where}: {column}")
    if not isinstance(value, kind):
        expected = "a list" if kind is list else "a mapping"
        raise ValueError(f"{where}: {column} must be {expected}, got {type(value).__name__}")
    return value


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"{where} must be JSON if it is a text, got {text!r:.60}: {error}"
        ) from None


def _without_none(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, _MAPPINGS):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(each) for each in value]
    return value
