"""Textual files in blocks of whole lines.

pyarrow parses JSON and CSV, but the blocks that it parses are cut here, at the end of a line or
row. A line that pyarrow rejects can then be located, and a file that ends too early is detected.

What a line is, for reading, counting, skipping and error messages alike:

    text, CSV   ends with LF, CRLF or CR, as for Python's ``open``
    JSON        ends with LF; a CR is white space, as in JSON itself
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .files import BYTE_ORDER_MARK, DataFile, count_line_ends

JSON_SPACE = b" \t\r"  # a line of nothing else is blank
_LINE_BLOCK_BYTES = 1 << 20
_LF, _QUOTE = ord("\n"), ord('"')
# pyarrow's JSON parser overflows the stack, and crashes the process, at some thousand levels.
MAX_JSON_DEPTH = 100
_NOT_OPENING = bytes(set(range(256)) - set(b"[{\n"))
_NOT_STRUCTURE = bytes(set(range(256)) - set(b'[]{}"'))
_STEP = np.zeros(256, np.int32)  # change of the nesting depth by a byte
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1


@dataclass(frozen=True)
class Block:
    """Whole lines, each with a line end, and the number of the first line."""

    content: bytes
    first_line: int

    @cached_property
    def line_feeds(self) -> int:
        """The number of LFs."""
        return self.content.count(b"\n")

    def json_lines(self) -> Iterator[tuple[int, bytes]]:
        """The lines that are not blank, with their numbers."""
        for number, line in enumerate(self.content.split(b"\n")[:-1], start=self.first_line):
            if line.strip(JSON_SPACE):
                yield number, line

    def count_json_lines(self) -> tuple[int, bool]:
        """The number of lines that are not blank, and whether each begins and ends with a brace."""
        ends_are_braces = self.content.startswith(b"{") and self.content.endswith(b"}\n")
        if ends_are_braces and self.content.count(b"}\n{") == self.line_feeds - 1:
            return self.line_feeds, True  # no blank line, and no white space at either end
        dense = np.frombuffer(self.content.translate(None, JSON_SPACE), np.uint8)
        ends = np.flatnonzero(dense == _LF)
        starts = np.concatenate([np.zeros(1, np.intp), ends[:-1] + 1])
        filled = starts < ends
        braces = dense[starts[filled]] == ord("{"), dense[ends[filled] - 1] == ord("}")
        return int(np.count_nonzero(filled)), bool(braces[0].all() and braces[1].all())

    def json_depth(self) -> int:
        """An upper bound of the number of brackets and braces that are open at once.

        It holds up to the first syntax error, where a parser stops, if no object spans lines.
        """
        marks = np.frombuffer(self.content.translate(None, _NOT_OPENING), np.uint8)
        in_line = np.diff(np.flatnonzero(marks == _LF), prepend=-1) - 1
        most = int(in_line.max())
        return most if most <= MAX_JSON_DEPTH else self._depth_outside_strings()

    def _depth_outside_strings(self) -> int:
        content = self.content
        if b"\\" in content:  # an escaped quote does not end a string
            content = content.replace(b"\\\\", b"").replace(b'\\"', b"")
        marks = np.frombuffer(content.translate(None, _NOT_STRUCTURE), np.uint8)
        in_string = np.logical_xor.accumulate(marks == _QUOTE)
        height = np.cumsum(np.where(in_string, 0, _STEP[marks]), dtype=np.int32)
        return int(height.max(initial=0))


def line_blocks(file: DataFile, *, cr_ends_line: bool) -> Iterator[Block]:
    """All lines in order, about 1 MiB at a time, checked to be UTF-8, each with LF at its end."""
    next_line = 1
    unfinished: list[bytes] = []
    for chunk in _line_chunks(file, cr_ends_line):
        cut = chunk.rfind(b"\n") + 1
        if cut:
            block = make_block([*unfinished, chunk[:cut]], next_line, file)
            yield block
            next_line += block.line_feeds
            unfinished = []
        unfinished.append(chunk[cut:])
    if any(unfinished):
        yield make_block([*unfinished, b"\n"], next_line, file)


def _line_chunks(file: DataFile, cr_ends_line: bool) -> Iterator[bytes]:
    held = b""  # a CR at the end of a chunk: it may be the first half of CRLF
    for chunk in chunks(file, _LINE_BLOCK_BYTES):
        if cr_ends_line and (held or b"\r" in chunk):
            chunk = held + chunk
            held = b"\r" if chunk.endswith(b"\r") else b""
            chunk = chunk.removesuffix(b"\r").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        yield chunk
    if held:
        yield b"\n"


def chunks(file: DataFile, size: int) -> Iterator[bytes]:
    """The decompressed bytes, ``size`` at a time, without a byte order mark at the start."""
    with file.open() as stream:
        mark = BYTE_ORDER_MARK
        while chunk := stream.read(size):
            yield chunk.removeprefix(mark)
            mark = b""


def make_block(
    parts: list[bytes], first_line: int, file: DataFile, *, cr_ends_line: bool = False
) -> Block:
    """A block of the joined ``parts``.

    Raises:
        ValueError: if they are not UTF-8; names the line.
    """
    content = b"".join(parts)
    try:
        content.decode()
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line = first_line + (count_line_ends(before) if cr_ends_line else before.count(b"\n"))
        raise ValueError(
            f"{file.at(line)}: not UTF-8 (byte 0x{content[error.start]:02x})"
        ) from None
    return Block(content, first_line)
