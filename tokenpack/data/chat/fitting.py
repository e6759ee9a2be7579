"""Conversations that are too long: shortened by whole turns, cut, dropped, or an error.

    turn    keeps the system message and as many whole pairs as fit
    token   cuts the tokens, in the middle of an answer if need be
    drop    drops the conversation
    error   raises an error

A pair is what the user says and what follows until the user speaks again, with tool calls and their
results. After a cut by turns the conversation is rendered again, so that it is what the template
writes for these messages. Nothing is added at a cut: an answer that is cut has no terminator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .encoding import Encoded, Encoder
from .rendering import Renderer
from .schemas import Conversation

TRUNCATIONS = ("turn", "token", "drop", "error")
KEEPS = ("first", "last")


class Fitted(NamedTuple):
    """A text that fits.

    Attributes:
        encoded: the tokens.
        cut_messages: messages that were left out.
        cut_tokens: tokens that were cut off.
    """

    encoded: Encoded
    cut_messages: int = 0
    cut_tokens: int = 0


class Truncation:
    """Makes conversations fit into ``max_length`` tokens.

    Args:
        renderer, encoder: of the conversations.
        max_length: tokens, or None for any number.
        how: one of `TRUNCATIONS`.
        keep: which pairs or tokens are kept, the ``"first"`` or the ``"last"``.
    """

    def __init__(
        self, renderer: Renderer, encoder: Encoder, max_length: int | None, how: str, keep: str
    ) -> None:
        self._renderer, self._encoder = renderer, encoder
        self._limit, self._how, self._keep = max_length, how, keep

    def fit(self, encoded: Encoded, where: str) -> list[Fitted]:
        """The text, or what is kept of it; an empty list if it is dropped.

        Raises:
            ValueError: if it is too long and that is an error.
        """
        limit = self._limit
        if limit is None or len(encoded.ids) <= limit:
            return [Fitted(encoded)]
        if self._how == "error":
            raise ValueError(
                f"{where} must have at most max_length = {limit} tokens, got {len(encoded.ids)}; "
                'choose truncation="turn", "token" or "drop"'
            )
        if self._how == "drop":
            return []
        if self._how == "token":
            kept = slice(None, limit) if self._keep == "first" else slice(-limit, None)
            return [Fitted(encoded.cut(kept), cut_tokens=len(encoded.ids) - limit)]
        return self._by_turns(encoded, limit)

    def _by_turns(self, encoded: Encoded, limit: int) -> list[Fitted]:
        conversation = encoded.rendering.conversation
        head, pairs = split_pairs(conversation)

        def text_of(kept: list[list[int]]) -> str:
            return self._renderer.text(conversation.take(flat(head, kept)))

        alone = self._encoder.lengths([text_of([pair]) for pair in pairs])
        pairs = [pair for pair, length in zip(pairs, alone) if length <= limit]

        def fits(count: int) -> bool:
            kept = pairs[:count] if self._keep == "first" else pairs[len(pairs) - count :]
            return self._encoder.lengths([text_of(kept)])[0] <= limit

        count = largest(fits, len(pairs))
        if not count:
            return []
        pairs = pairs[:count] if self._keep == "first" else pairs[len(pairs) - count :]
        kept = flat(head, pairs)
        learned = encoded.rendering.learned
        still = {new: learned[old] for new, old in enumerate(kept) if old in learned}
        found = self._encoder.encode(self._renderer.render(conversation.take(kept), still))
        cut = len(conversation.messages) - len(kept)
        return [Fitted(each, cut_messages=cut) for each in found if len(each.ids) <= limit]


def split_pairs(conversation: Conversation) -> tuple[list[int], list[list[int]]]:
    """The leading system messages, and the pairs, as positions of messages."""
    roles = [message["role"] for message in conversation.messages]
    begin = 0
    while begin < len(roles) and roles[begin] in ("system", "developer"):
        begin += 1
    pairs: list[list[int]] = []
    for at in range(begin, len(roles)):
        begins = roles[at] == "user" and roles[at - 1 : at] != ["user"]
        if begins or not pairs:
            pairs.append([])
        pairs[-1].append(at)
    return list(range(begin)), pairs


def flat(head: list[int], pairs: list[list[int]]) -> list[int]:
    """The messages of a head and its pairs, in order."""
    return head + [at for pair in pairs for at in pair]


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest count from 1 to ``most`` that fits, if each smaller one does; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
