"""A conversation as text, with the character spans that a model would sample.

The text is what the tokenizer's chat template writes. The spans come from

    1. the template's ``{% generation %}`` markers, if it has them;
    2. else the texts of the conversation's beginnings. Message i begins after the text of the
       messages before it with the generation prompt, and ends with the text of the messages up to
       it. This needs a template that writes a beginning the same when more messages follow;
    3. else the beginnings themselves, one for each learned message, as the model sees them when it
       answers. Qwen3 and DeepSeek-R1 leave out the reasoning of earlier answers, so their
       conversations of several turns with reasoning are split.

No span is found by searching for the text of a message, so a message may hold anything.

A span holds content, reasoning, tool calls and the token that ends the turn. It holds neither the
header nor an empty block for reasoning that the template adds, such as Qwen3's. Probes find these:
the same conversation with another content, and with a reasoning, of the message.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from .schemas import Conversation
from .writing import RenderError, Writer, Written

_PROBE = "\ue000\ue001\ue000"  # private use: no template writes it
_REASONING_PROBE = "\ue002\ue001\ue002"
_EMPTY_BLOCK = re.compile(r"\s*(?:<(\w+)>\s*</\1>|\[(\w+)\]\s*\[/\2\])\s*")
_REASONING = ("reasoning_content", "reasoning", "thinking")


class Span(NamedTuple):
    """Characters ``begin`` to ``end`` (exclusive) of a text, which are learned.

    Attributes:
        begin: the first character.
        end: the end, behind the terminator if that is learned.
        message: the message that the span belongs to; -1 if it could be any answer.
        weight: of the span in the loss.
        terminator: the special token that ends the turn, or None.
    """

    begin: int
    end: int
    message: int
    weight: float
    terminator: str | None


class Rendering(NamedTuple):
    """The text of a conversation.

    Attributes:
        conversation: the messages.
        learned: the learned messages, each with its weight in the loss.
        text: what the template writes.
        spans: the learned spans of the text, in order.
    """

    conversation: Conversation
    learned: dict[int, float]
    text: str
    spans: list[Span]


class _UnstableError(RenderError):
    """The template writes a beginning of the conversation differently when more follows."""


class Renderer:
    """Renders conversations with the chat template of a tokenizer.

    Args:
        tokenizer: with a ``chat_template``.
        loss_on: ``"all"`` answers, the ``"last"`` one, or the roles whose messages are learned.
        train_on_terminator: learn the token that ends a turn.
        stop_tokens: special tokens that end a generation.
        template_kwargs: more variables of the template.
    """

    def __init__(
        self,
        tokenizer: Any,
        loss_on: str | Collection[str] = "all",
        train_on_terminator: bool = True,
        stop_tokens: Sequence[str] = (),
        template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self._writer = Writer(tokenizer, template_kwargs or {})
        self._loss_on = loss_on if isinstance(loss_on, str) else frozenset(loss_on)
        self._on_terminator = train_on_terminator
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        # The longest first, because one may end in another.
        self._special = tuple(sorted(special | set(stop_tokens), key=len, reverse=True))
        # The leftmost match is the longest.
        self._last_special = re.compile(f"(?:{'|'.join(map(re.escape, self._special))})\\Z")
        self._longest = max(map(len, self._special), default=0)
        self._stops = tuple(stop_tokens)
        self._prompt, self._header, self._lead, self._has_prompt = "", "", "", True
        self._probe_template()

    # ------------------------------------------------------------------------------------ learned

    def learned(self, conversation: Conversation) -> dict[int, float]:
        """The messages that are learned, each with its weight in the loss."""
        roles = [message["role"] for message in conversation.messages]
        if isinstance(self._loss_on, str):
            chosen = [at for at, role in enumerate(roles) if role == "assistant"]
            chosen = chosen[-1:] if self._loss_on == "last" else chosen
        else:
            chosen = [at for at, role in enumerate(roles) if role in self._loss_on]
        weights = {at: conversation.weights[at] for at in chosen}
        return {at: 1.0 if given is None else given for at, given in weights.items() if given != 0}

    def render(
        self,
        conversation: Conversation,
        learned: dict[int, float] | None = None,
        written: Written | None = None,
    ) -> list[Rendering]:
        """Render a conversation; into several texts if the template is not stable.

        Args:
            conversation: to render.
            learned: the learned messages with their weights; by default `learned`.
            written: what the template writes, if `write_all` gave it.

        Raises:
            RenderError: if the template raises an error, or if the spans cannot be found.
        """
        learned = self.learned(conversation) if learned is None else learned
        if written is None:
            written = self._writer.write(conversation, conversation.messages, marked=True)
        text = written.text
        if not learned:
            return [Rendering(conversation, {}, text, [])]
        answers_only = all(conversation.messages[at]["role"] == "assistant" for at in learned)
        if answers_only and self._writer.marks(conversation):
            marked = self._by_markers(conversation, learned, written)
            if marked is not None:
                return [marked]
        try:
            spans = [self._locate(conversation, at, text, learned[at]) for at in sorted(learned)]
            return [Rendering(conversation, learned, text, _filled(spans))]
        except _UnstableError:
            return self._beginnings(conversation, learned)

    def write_all(self, conversations: Sequence[Conversation]) -> list[Written | None]:
        """What the template writes for each, or None where `render` must write it by itself."""
        return self._writer.write_all(conversations)

    # ------------------------------------------------------------------------------------ markers

    def _by_markers(
        self, conversation: Conversation, learned: dict[int, float], written: Written
    ) -> Rendering | None:
        """The spans of the template's markers, or None if they leave out an answer or a call, or if
        they are not one for each answer and it matters which is which."""
        messages = conversation.messages
        text = written.text
        found = [(begin, end) for begin, end in written.marked if end > begin]
        answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        if len(found) < len(answers):
            return None
        calls = [call for at in answers for call in messages[at].get("tool_calls", ())]
        if calls:
            inside = "".join(text[begin:end] for begin, end in found)
            if any(function_name(call) not in inside for call in calls):
                return None
        paired = len(found) == len(answers) and all(
            _holds(text[begin:end], messages[at]) for (begin, end), at in zip(found, answers)
        )
        if not paired:
            if len(learned) < len(answers) or len(set(learned.values())) > 1:
                return None
            weight = next(iter(learned.values()))
            own = any(_writes(messages[at], self._lead) for at in answers)
            spans = [self._marked(text, *each, -1, weight, own) for each in found]
            return Rendering(conversation, learned, text, _filled(spans))
        spans = [
            self._marked(text, *each, at, learned[at], _writes(messages[at], self._lead))
            for each, at in zip(found, answers)
            if at in learned
        ]
        return Rendering(conversation, learned, text, _filled(spans))

    def _marked(
        self, text: str, begin: int, end: int, message: int, weight: float, own: bool
    ) -> Span:
        """The span of a marker, which may begin before the end of the generation prompt."""
        if text.startswith(self._header, begin):
            begin += len(self._header)
        return self._span(text, begin, end, message, weight, "" if own else self._lead)

    # ----------------------------------------------------------------------------------- prefixes

    def _locate(self, conversation: Conversation, at: int, text: str, weight: float) -> Span:
        """The span of message ``at`` in the text of its conversation."""
        messages = conversation.messages
        message = messages[at]
        is_answer = message["role"] == "assistant"
        before = ""
        with_prompt = is_answer and self._has_prompt
        if at > 0:
            before = self._beginning(conversation, messages[:at], prompt=with_prompt)
        probed = self._beginning(conversation, [*messages[:at], _probe_of(message)])
        content = probed.rfind(_PROBE)
        if content < 0:
            raise _UnstableError(
                f"the chat template does not write the content of message {at} ({message['role']})"
            )
        begin = _common(before, probed[:content])
        if begin < len(before):
            # The prompt opens what the template leaves out of an answer, as DeepSeek-R1's does.
            bare = self._beginning(conversation, messages[:at])
            if not (with_prompt and begin >= len(bare)):
                raise _UnstableError(_differs(at, message["role"]))
        if not text.startswith(probed[:begin]):
            raise _UnstableError(_differs(at, message["role"]))
        lead = probed[begin:content]
        if self._prompt and lead.startswith(self._prompt):  # a header that the prompt left out here
            begin, lead = begin + len(self._prompt), lead[len(self._prompt) :]
        if not with_prompt or at == 0:  # then the lead is the header
            header = lead[: _common(lead, text[begin:])]
            begin, lead = begin + len(header.rstrip(" ")), ""
        elif _writes(message, lead) or not self._is_added(conversation, at, begin, lead):
            lead = ""
        end = len(text)
        if at + 1 < len(messages):
            through = self._beginning(conversation, messages[: at + 1])
            if not text.startswith(through):
                raise _UnstableError(_differs(at, message["role"]))
            end = len(through)
        closer = probed[content + len(_PROBE) :]
        if closer and text.endswith(closer, begin, end):
            end += len(self._learned_of(closer)) - len(closer)
        return self._span(text, begin, end, at, weight, lead)

    def _is_added(self, conversation: Conversation, at: int, begin: int, lead: str) -> bool:
        """Whether the text between header and content is a block for reasoning without reasoning.

        Other texts there are sampled, such as the name of a channel.
        """
        if not lead.strip() or _EMPTY_BLOCK.fullmatch(lead):
            return bool(lead.strip())
        messages = conversation.messages
        probe = {**_probe_of(messages[at]), "reasoning_content": _REASONING_PROBE}
        try:
            text, _ = self._writer.write(conversation, [*messages[:at], probe])
        except RenderError:
            return False
        block = text[begin : text.rfind(_PROBE)]
        without = block.replace(_REASONING_PROBE, "")
        return without != block and without.split() == lead.split()

    def _learned_of(self, closer: str) -> str:
        """What is sampled of the text behind an answer: up to the white space behind the first
        special tokens. Without a special token it is all."""
        end = len(closer) - len(closer.lstrip())
        begin = end
        while token := next((t for t in self._special if closer.startswith(t, end)), None):
            end += len(token)
        return closer[:end] if end > begin else closer

    def _beginning(
        self, conversation: Conversation, messages: list[dict[str, Any]], prompt: bool = False
    ) -> str:
        try:
            return self._writer.write(conversation, messages, prompt=prompt)[0]
        except RenderError as error:
            raise _UnstableError(
                f"the chat template cannot write the first {len(messages)} messages alone, which "
                f"is needed to find the answers: {error}"
            ) from None

    def _beginnings(self, conversation: Conversation, learned: dict[int, float]) -> list[Rendering]:
        """One text for each learned message, which is the last of its text."""
        found = []
        for at, weight in sorted(learned.items()):
            part = conversation.take(range(at + 1))
            text = self.text(part)
            spans = _filled([self._locate(part, at, text, weight)])
            found.append(Rendering(part, {at: weight}, text, spans))
        return found

    # --------------------------------------------------------------------------------------- spans

    def _span(
        self, text: str, begin: int, end: int, message: int, weight: float, lead: str
    ) -> Span:
        """The span without what the template adds, and with the token that ends the turn."""
        if lead.strip() and text.startswith(lead, begin):
            begin = min(begin + len(lead.rstrip(" ")), end)
        written = text[begin:end].rstrip()
        terminator = None
        if written.endswith(self._special):
            found = self._last_special.search(written, max(len(written) - self._longest, 0))
            terminator = found[0] if found else None
            end = begin + len(written)
        else:
            terminator = next((each for each in self._stops if text.startswith(each, end)), None)
            end += len(terminator or "")
        if terminator is not None and not self._on_terminator:
            end -= len(terminator)
        return Span(begin, max(begin, end), message, weight, terminator)

    def _probe_template(self) -> None:
        """Learn what the template writes around an answer by itself."""
        user = {"role": "user", "content": "a"}
        asked = Conversation([user, {"role": "assistant", "content": _PROBE}], [None, None])
        try:
            text, found = self._writer.write(asked, asked.messages, marked=True)
            plain, _ = self._writer.write(asked, [user])
            prompt, _ = self._writer.write(asked, [user], prompt=True)
        except RenderError:  # a template for other conversations
            return
        self._has_prompt, self._prompt = prompt != plain, prompt.removeprefix(plain)
        content = text.rfind(_PROBE)
        if content < 0:
            return
        if found and found[-1][0] <= content:
            begin = found[-1][0]
            header = max(_common(prompt, text) - begin, 0)
            self._header = text[begin : begin + header]
            lead = text[begin + header : content]
            self._lead = lead if self._is_added(asked, 1, begin + header, lead) else ""
        rest = text[content + len(_PROBE) :].lstrip()
        follows = next((each for each in self._special if rest.startswith(each)), None)
        if follows is not None and follows not in self._stops:
            self._stops = (*self._stops, follows)

    # ---------------------------------------------------------------------------------- rendering

    def text(self, conversation: Conversation) -> str:
        """What the template writes.

        Raises:
            RenderError: if it raises an error.
        """
        return self._writer.write(conversation, conversation.messages)[0]


def texts_of(message: dict[str, Any]) -> list[str]:
    """The texts in the content of a message."""
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    texts = (part if isinstance(part, str) else part.get("text") for part in content or ())
    return [text for text in texts if isinstance(text, str)]


def _probe_of(message: dict[str, Any]) -> dict[str, Any]:
    """A message of the same role and kind, whose content is the probe."""
    in_parts = isinstance(message.get("content"), (list, tuple))
    content = [{"type": "text", "text": _PROBE}] if in_parts else _PROBE
    return {"role": message["role"], "content": content}


def _filled(spans: list[Span]) -> list[Span]:
    return [span for span in spans if span.end > span.begin]


def _holds(text: str, message: dict[str, Any]) -> bool:
    return all(each.strip() in text for each in texts_of(message))


def function_name(call: Any) -> str:
    """The name of a called function, or of a tool."""
    if not isinstance(call, Mapping):
        return getattr(call, "__name__", "")
    inner = call.get("function", call)
    return str(inner.get("name", "")) if isinstance(inner, Mapping) else ""


def reasoning_of(message: dict[str, Any]) -> str | None:
    """The reasoning of a message in a field of its own, or None."""
    return next((message[name] for name in _REASONING if message.get(name)), None)


def _common(one: str, other: str) -> int:
    """The number of characters that two texts begin with in common."""
    if other.startswith(one):
        return len(one)
    pairs = enumerate(zip(one, other))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _writes(message: dict[str, Any], lead: str) -> bool:
    """Whether the message itself has what the template would add."""
    if not lead:
        return True
    words = lead.split()
    return not words or any(words[0] in text for text in texts_of(message))


def _differs(at: int, role: str) -> str:
    return (
        f"the chat template writes the messages up to {at} ({role}) differently when more follow, "
        "and has no {% generation %} markers; add the markers around what an answer holds, or "
        "train on the last answer only"
    )
