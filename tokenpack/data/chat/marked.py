"""Texts whose learned parts are colored, marked, or neither.

    color    context in cyan, targets in green and bold, problems in red
    marks    targets between ⟦ and ⟧
    plain    the text alone, byte for byte
    HTML     a page of its own, without scripts and other files

Only the plain text may hold control characters, which could change the terminal. The others show
them as pictures, such as ␛.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

STYLES = ("color", "marks", "plain")
_CONTEXT, _TARGET, _RESET = "\x1b[36m", "\x1b[1;32m", "\x1b[0m"
_TITLE, _PROBLEM = "\x1b[1m", "\x1b[1;31m"
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>tokenpack preview</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em;
  background: #fff; color: #222; }}
pre {{ font: 13px/1.5 ui-monospace, monospace; padding: 1em; background: #f5f5f5;
  border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; }}
.context {{ color: #0b6477; }}
.target {{ color: #0a5c1e; background: #c9f0d2; font-weight: 600; }}
.problem {{ color: #a40000; }}
h2 {{ font-size: 1.1em; margin: 2em 0 0.3em; }}
p {{ margin: 0.2em 0; }}
@media (prefers-color-scheme: dark) {{
  body {{ background: #16181c; color: #ddd; }}
  pre {{ background: #22252b; }}
  .context {{ color: #7cc7d8; }}
  .target {{ color: #b6f2c4; background: #17492a; }}
  .problem {{ color: #ff8a8a; }}
}}
</style>
</head>
<body>
<p><span class="context">context</span> <span class="target">learned</span></p>
{body}
</body>
</html>
"""


class Piece(NamedTuple):
    """A part of a text, and whether it is learned."""

    text: str
    learned: bool


@dataclass(frozen=True)
class MarkedSequence:
    """One sequence of a preview.

    Attributes:
        title: what it is.
        pieces: its text in parts.
        tokens: number of tokens.
        targets: number of learned tokens.
        dropped: number of tokens that truncation left out.
        boundaries: the tokens at each change between context and targets.
        problems: what the checks found.
    """

    title: str
    pieces: Sequence[Piece]
    tokens: int
    targets: int
    dropped: int = 0
    boundaries: Sequence[str] = ()
    problems: Sequence[str] = ()

    @property
    def text(self) -> str:
        """The text, byte for byte."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def shares(self) -> str:
        """The number of tokens, and the shares of targets, context and dropped tokens."""
        total = max(self.tokens + self.dropped, 1)
        parts = {
            "learned": self.targets,
            "context": self.tokens - self.targets,
            "dropped": self.dropped,
        }
        shares = [f"{count:,} {name} ({count / total:.1%})" for name, count in parts.items()]
        return f"{total:,} tokens: {', '.join(shares)}"


@dataclass(frozen=True)
class Preview:
    """Sequences with their learned parts marked; see `preview`.

    ``print(preview)`` shows them with marks.

    Attributes:
        sequences: one for each sequence; its ``text`` is the exact text.
        notes: on all of them.
    """

    sequences: Sequence[MarkedSequence]
    notes: Sequence[str] = field(default=())

    @property
    def problems(self) -> list[str]:
        """What the checks found in any of the sequences."""
        return [problem for sequence in self.sequences for problem in sequence.problems]

    def __str__(self) -> str:
        return self.render("marks")

    def render(self, style: str = "color") -> str:
        """The preview for a terminal.

        Args:
            style: ``"color"``, ``"marks"``, or ``"plain"`` for the texts alone, one after another.

        Raises:
            ValueError: for another style.
        """
        if style not in STYLES:
            raise ValueError(f"style must be one of {', '.join(STYLES)}, got {style!r}")
        if style == "plain":
            return "".join(sequence.text for sequence in self.sequences)
        parts = [_terminal(sequence, style) for sequence in self.sequences]
        return "\n\n".join([*parts, *(["\n".join(self.notes)] if self.notes else [])])

    def html(self) -> str:
        """The preview as an HTML page."""
        notes = "\n".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        body = "\n".join([*map(_section, self.sequences), notes])
        return _PAGE.format(body=body)


def _terminal(sequence: MarkedSequence, style: str) -> str:
    mark = _colored if style == "color" else _marked
    text = "".join(map(mark, sequence.pieces))
    title, found = f"── {sequence.title}", f"checks found {_found(sequence)}"
    if style == "color":
        title = f"{_TITLE}{title}{_RESET}"
        found = f"{_PROBLEM}{found}{_RESET}" if sequence.problems else found
    boundaries = [f"   {boundary.translate(_PICTURES)}" for boundary in sequence.boundaries]
    return "\n".join([title, f"   {sequence.shares}", text, *boundaries, f"   {found}"])


def _found(sequence: MarkedSequence) -> str:
    return "; ".join(sequence.problems) or "nothing"


def _colored(piece: Piece) -> str:
    color = _TARGET if piece.learned else _CONTEXT
    # A color for each line: pagers and logs reset it at the end of one.
    lines = piece.text.translate(_PICTURES).split("\n")
    return "\n".join(f"{color}{line}{_RESET}" if line else "" for line in lines)


def _marked(piece: Piece) -> str:
    text = piece.text.translate(_PICTURES)
    return f"⟦{text}⟧" if piece.learned else text


def _section(sequence: MarkedSequence) -> str:
    # The spans also keep a browser from dropping a line break at the beginning of <pre>.
    text = "".join(
        f'<span class="{"target" if piece.learned else "context"}">'
        f"{html.escape(piece.text.translate(_PICTURES))}</span>"
        for piece in sequence.pieces
    )
    boundaries = html.escape("\n".join(sequence.boundaries).translate(_PICTURES))
    summary = "<summary>token ids at the boundaries</summary>"
    details = f"\n<details>{summary}\n<pre>{boundaries}</pre></details>" if boundaries else ""
    kind = ' class="problem"' if sequence.problems else ""
    return (
        f"<h2>{html.escape(sequence.title)}</h2>\n<p>{html.escape(sequence.shares)}</p>\n"
        f"<pre>{text}</pre>\n<p{kind}>checks found {html.escape(_found(sequence))}</p>{details}"
    )
