"""Problems of chat data by name: found in each row, counted over all, warned about or raised.

Each is a mistake that leaves the loss curve looking healthy.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from .fitting import Fitted
from .rendering import function_name, reasoning_of, texts_of

# Names of the checks, and what each one means. The position of a name is its bit in a row's flags.
CHECKS = {
    "no_target": "no token is learned; these rows are dropped",
    "lost_target": "truncation leaves no learned token; these rows are dropped",
    "no_terminator": (
        "a learned turn does not end in a special token, so the model does not learn to stop; end "
        "the assistant's turn with one in the chat template"
    ),
    "unstopped_terminator": (
        "generation does not stop at the token that ends a learned turn; add its id to "
        "eos_token_id of the model's generation_config, and pass generation_config="
    ),
    "double_bos": "the text begins with BOS twice; write it in the template only",
    "missing_content": "the chat template leaves out the content or the tool calls of a message",
    "missing_reasoning": "the chat template leaves out the reasoning of a learned message",
    "missing_tools": "the chat template leaves out a tool of the row",
    "merged_boundary": (
        "the tokenizer joins the end of a header and the beginning of an answer in one token, "
        "which is not learned; let answers begin without white space"
    ),
    "padding": (
        "rows padded to max_length would hold over 3 times as much padding as content; pack them "
        "(pack_dataset, packed_collate_fn), or pad to the longest row of a batch"
    ),
}
ACTIONS = ("warn", "error", "ignore")
# Only counted, unless `checks` names it: the data has no padding before a collator adds some.
_QUIET = {"padding": "ignore"}
_BITS = {name: 1 << at for at, name in enumerate(CHECKS)}


@dataclass
class ChatReport:
    """What `chat_dataset` did with the rows of its source, as counts.

    Attributes:
        rows: rows read.
        samples: rows of the dataset. A conversation may be split into several.
        dropped: rows, or parts of rows, that are not in the dataset.
        cut_messages: messages that truncation by turns left out.
        cut_tokens: tokens that truncation by tokens cut off.
        tokens: tokens of the dataset.
        targets: tokens of the dataset that are learned.
        problems: for each check, in how many rows or parts of rows it found a problem.
        first_rows: for each check that found one, the first row.
    """

    rows: int = 0
    samples: int = 0
    dropped: int = 0
    cut_messages: int = 0
    cut_tokens: int = 0
    tokens: int = 0
    targets: int = 0
    problems: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CHECKS, 0))
    first_rows: dict[str, int] = field(default_factory=dict)

    def add_flags(self, flags: int, row: int) -> None:
        """Count the problems of a row."""
        for name in names_of(flags):
            self.problems[name] += 1
            self.first_rows.setdefault(name, row)

    def __str__(self) -> str:
        share = self.targets / max(self.tokens, 1)
        lines = [
            f"{self.rows:,} rows -> {self.samples:,} samples, {self.dropped:,} dropped, "
            f"{self.tokens:,} tokens, {share:.1%} of them learned"
        ]
        if self.cut_messages or self.cut_tokens:
            lines += [f"cut: {self.cut_messages:,} messages, {self.cut_tokens:,} tokens"]
        lines += [self.describe(name) for name, count in self.problems.items() if count]
        return "\n".join(lines)

    def describe(self, name: str) -> str:
        """One problem: its count, the first row that has it, and what it means."""
        first = f", first in row {self.first_rows[name]}" if name in self.first_rows else ""
        found = f"{self.problems[name]:,} times in {self.rows:,} rows"
        return f"{name}: {found}{first}: {CHECKS[name]}"


def read_actions(checks: str | Mapping[str, str]) -> dict[str, str]:
    """The action for each check.

    Args:
        checks: one action for all, or actions by name; checks without a name warn. ``padding`` is
            ignored unless it is named.

    Raises:
        ValueError: if there is no such check or action.
    """
    named = dict.fromkeys(CHECKS, checks) | _QUIET if isinstance(checks, str) else checks
    given = _QUIET | dict(named)
    if unknown := [name for name in given if name not in CHECKS]:
        raise ValueError(f"checks must name {', '.join(CHECKS)}, got {', '.join(unknown)}")
    if wrong := [action for action in given.values() if action not in ACTIONS]:
        raise ValueError(f"checks must be {', '.join(ACTIONS)}, got {wrong[0]!r}")
    return {name: given.get(name, "warn") for name in CHECKS}


def act(report: ChatReport, actions: Mapping[str, str], known: Collection[str] = ()) -> None:
    """Warn about the problems in a report, or raise them.

    Args:
        report: the counts.
        actions: from `read_actions`.
        known: checks that need no second warning.

    Raises:
        ValueError: for problems whose action is ``"error"``.
    """
    found = [name for name, count in report.problems.items() if count]
    if errors := [report.describe(name) for name in found if actions[name] == "error"]:
        raise ValueError("rows must pass the checks of chat data, got " + "; ".join(errors))
    for name in found:
        if actions[name] == "warn" and name not in known:
            warnings.warn(f"chat data: {report.describe(name)}", stacklevel=_callers_level())


def _callers_level() -> int:
    """The ``stacklevel`` of the first caller outside this package, for a warning of `act`."""
    package = __name__.rpartition(".")[0]
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(package):
        frame, level = frame.f_back, level + 1
    return level


def names_of(flags: int) -> list[str]:
    """The checks whose bits are set."""
    return [name for name, bit in _BITS.items() if flags & bit]


def flag(*names: str) -> int:
    """The bits of some checks."""
    return sum(_BITS[name] for name in names)


def count_padding(report: ChatReport, width: int) -> None:
    """Count rows of which most would be padding, if each one is padded to ``width`` tokens."""
    too_wide = report.samples * width > 4 * report.tokens
    report.problems["padding"] = report.samples if too_wide else 0


class RowChecks:
    """Finds the problems of single rows.

    Args:
        bos_token_id: of the tokenizer.
        stop_ids: tokens that generation stops at; None if they are not known.
        on_terminator: whether terminators are learned.
        id_of: the id of a special token.
    """

    def __init__(
        self,
        bos_token_id: int | None,
        stop_ids: Collection[int] | None,
        on_terminator: bool,
        id_of: Callable[[str], int],
    ) -> None:
        self._bos, self._stop_ids, self._on_terminator = bos_token_id, stop_ids, on_terminator
        self._id_of = id_of

    def find(self, fitted: Fitted) -> int:
        """The flags of a row that is kept."""
        encoded = fitted.encoded
        rendering = encoded.rendering
        found = self._terminators(fitted)
        if self._bos is not None and encoded.ids[:2].tolist() == [self._bos] * 2:
            found |= flag("double_bos")
        if encoded.merged:
            found |= flag("merged_boundary")
        conversation, text = rendering.conversation, rendering.text
        for at, message in enumerate(conversation.messages):
            content = message.get("content")
            if len(message) == 2 and isinstance(content, str) and "think>" not in content:
                if not _written(content, text):  # all that there is to write, in most messages
                    found |= flag("missing_content")
                continue
            if not all(_written(each, text) for each in _contents(message)):
                found |= flag("missing_content")
            if at in rendering.learned and not all(
                _written(each, text) for each in _reasonings(message)
            ):
                found |= flag("missing_reasoning")
        for span in rendering.spans:  # a list of tools may name the functions too
            calls = conversation.messages[span.message].get("tool_calls")
            if not calls or span.message < 0:
                continue
            inside = text[span.begin : span.end]
            if not all(function_name(call) in inside for call in calls):
                found |= flag("missing_content")
        if not all(name in text for name in map(function_name, conversation.tools or ())):
            found |= flag("missing_tools")
        return found

    def _terminators(self, fitted: Fitted) -> int:
        spans = fitted.encoded.rendering.spans
        if not self._on_terminator:
            return 0
        found = 0
        for terminator in {span.terminator for span in spans}:
            if terminator is None:
                found |= flag("no_terminator")
            elif self._stop_ids is not None and self._id_of(terminator) not in self._stop_ids:
                found |= flag("unstopped_terminator")
        return found


def _written(part: str, text: str) -> bool:
    part = part.strip()
    return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text


def _contents(message: dict[str, Any]) -> list[str]:
    """What the template must write of a message: its texts and the functions it calls."""
    texts = [text.rpartition("</think>")[2] for text in texts_of(message)]
    return texts + [function_name(call) for call in message.get("tool_calls", ())]


def _reasonings(message: dict[str, Any]) -> list[str]:
    inside = [text.rpartition("</think>")[0] for text in texts_of(message)]
    inside = [text.rpartition("<think>")[2] for text in inside]
    return [text for text in (*inside, reasoning_of(message)) if isinstance(text, str)]
