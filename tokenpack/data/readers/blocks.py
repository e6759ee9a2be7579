"""Textual files in blocks of whole lines.

pyarrow parses JSON and CSV, but the blocks that it parses are cut here, at the end of a line or
row. A line that pyarrow rejects can then be located, and a file that ends too early is detected.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .files import BYTE_ORDER_MARK, DataFile

_LINE_BLOCK_BYTES = 1 << 20
_NOT_STRUCTURE = bytes(set(range(256)) - set(b"[]{}\n"))
_STEP = np.zeros(256, np.int64)  # change of the nesting depth by a byte
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1


@dataclass(frozen=True)
class Block:
    """Whole lines, each with a line feed at its end, and the number of the first line."""

    content: bytes
    first_line: int

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """The lines with their numbers."""
        return enumerate(self.content.split(b"\n")[:-1], start=self.first_line)

    def filled_lines(self) -> int:
        """The number of lines that are not blank."""
        is_end = np.frombuffer(self.content.translate(None, b" \t\r"), np.uint8) == ord("\n")
        return int(np.count_nonzero(is_end[1:] & ~is_end[:-1]))

    def depth(self) -> int:
        """The largest number of brackets and braces that are open at once within a line."""
        marks = np.frombuffer(self.content.translate(None, _NOT_STRUCTURE), np.uint8)
        height = np.cumsum(_STEP[marks])
        starts = np.flatnonzero(marks == ord("\n"))[:-1]
        starts = np.concatenate([np.zeros(1, np.intp), starts])
        return int((np.maximum.reduceat(height, starts) - height[starts]).max()) + 1


def line_blocks(file: DataFile) -> Iterator[Block]:
    """All lines in order, about 1 MiB at a time, checked to be UTF-8."""
    with file.open() as stream:
        next_line = 1
        unfinished: list[bytes] = []
        while chunk := stream.read(_LINE_BLOCK_BYTES):
            cut = chunk.rfind(b"\n") + 1
            if cut:
                block = make_block([*unfinished, chunk[:cut]], next_line, file)
                yield block
                next_line += block.content.count(b"\n")
                unfinished = []
            unfinished.append(chunk[cut:])
        if any(unfinished):
            yield make_block([*unfinished, b"\n"], next_line, file)


def make_block(parts: list[bytes], first_line: int, file: DataFile) -> Block:
    """A block of the joined ``parts``.

    Raises:
        ValueError: if they are not UTF-8; names the line.
    """
    content = b"".join(parts)
    if first_line == 1:
        content = content.removeprefix(BYTE_ORDER_MARK)
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise ValueError(
            f"{file.at(line)}: not UTF-8 (byte 0x{content[error.start]:02x})"
        ) from None
    return Block(content, first_line)
