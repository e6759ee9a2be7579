"""Conversations as the text that a chat template writes, by transformers' own renderer.

Conversations of a batch are written in one call: what does not depend on the conversation, such as
the template's variables, is then prepared once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from .schemas import Conversation, with_json_arguments

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ERRORS = (jinja2.TemplateError, TypeError, KeyError, AttributeError)


class Written(NamedTuple):
    """A text, and where the template's ``{% generation %}`` markers are.

    Attributes:
        text: what the template writes.
        marked: first and last (exclusive) character of each marker, if they were asked for.
    """

    text: str
    marked: list[tuple[int, int]]


class RenderError(ValueError):
    """The template cannot write a conversation, or its spans cannot be found."""


class Writer:
    """Writes conversations with the chat template of a tokenizer.

    Args:
        tokenizer: with a ``chat_template``.
        template_kwargs: more variables of the template.
    """

    def __init__(self, tokenizer: Any, template_kwargs: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._variables = {**tokenizer.special_tokens_map, **template_kwargs}

    def marks(self, conversation: Conversation) -> bool:
        """Whether the template of a conversation has ``{% generation %}`` markers."""
        return _has_markers(self._template(conversation))

    def write(
        self,
        conversation: Conversation,
        messages: list[dict[str, Any]],
        *,
        prompt: bool = False,
        marked: bool = False,
    ) -> Written:
        """Write some messages of a conversation.

        Args:
            conversation: gives the tools, the documents and variables.
            messages: to write.
            prompt: write the generation prompt behind them.
            marked: find the markers, if the template has them.

        Raises:
            RenderError: if the template raises an error.
        """
        try:
            try:
                return self._write(conversation, [messages], prompt, marked)[0]
            except TypeError:  # DeepSeek-V3 joins the arguments of a call as a text
                given = with_json_arguments(messages)
                return self._write(conversation, [given], prompt, marked)[0]
        except _ERRORS as error:
            raise RenderError(f"the chat template cannot write the conversation: {error}") from None

    def write_all(self, conversations: Sequence[Conversation]) -> list[Written | None]:
        """Write conversations in one call, with their markers.

        Returns:
            None for those that need a call of their own: with tools, documents or variables, and
            for all if the template raises an error for one.
        """
        alone: list[Written | None] = [None] * len(conversations)
        plain = [at for at, each in enumerate(conversations) if _is_plain(each)]
        if not plain:
            return alone
        chosen = [conversations[at] for at in plain]
        try:
            found = self._write(chosen[0], [each.messages for each in chosen], False, True)
        except _ERRORS:
            return alone
        written = dict(zip(plain, found))
        return [written.get(at) for at in range(len(conversations))]

    def _write(
        self,
        conversation: Conversation,
        messages: list[list[dict[str, Any]]],
        prompt: bool,
        marked: bool,
    ) -> list[Written]:
        template = self._template(conversation)
        marked = marked and _has_markers(template)
        texts, spans = render_jinja_template(
            messages,
            tools=conversation.tools,
            documents=conversation.documents,
            chat_template=template,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=prompt,
            **{**self._variables, **conversation.template_kwargs},
        )
        return list(map(Written, texts, spans if marked else [[] for _ in texts]))

    def _template(self, conversation: Conversation) -> str:
        return self._tokenizer.get_chat_template(None, conversation.tools)


def _is_plain(conversation: Conversation) -> bool:
    given = conversation.tools, conversation.documents, conversation.template_kwargs
    return not any(given)


@lru_cache
def _has_markers(template: str) -> bool:
    return _MARKER.search(template) is not None
