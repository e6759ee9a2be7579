"""Options that several commands have, and the types of their values."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def add_seed(parser: argparse._ActionsContainer, of_what: str) -> None:
    """Add ``--seed``; ``of_what`` completes its help."""
    parser.add_argument(
        "--seed", type=not_negative, default=0, metavar="S", help=f"seed {of_what} (default: 0)"
    )


def add_tokenizer(parser: argparse._ActionsContainer, required: bool) -> None:
    """Add ``--tokenizer``."""
    parser.add_argument(
        "--tokenizer",
        required=required,
        metavar="NAME_OR_PATH",
        help="a tokenizer.json, a folder that holds a tokenizer, or a name on the Hugging Face hub",
    )


def add_template(parser: argparse._ActionsContainer, when: str = "") -> None:
    """Add ``--template``, which `template_of` reads; ``when`` begins its help."""
    parser.add_argument(
        "--template",
        metavar="NAME_OR_FILE",
        help=f"{when}chatml, llama3, gemma, alpaca, raw, or a .jinja file (default: the "
        "tokenizer's)",
    )


def add_ranks(parser: argparse._ActionsContainer) -> None:
    """Add ``--rank`` and ``--world-size``."""
    parser.add_argument(
        "--rank", type=not_negative, default=0, metavar="R", help="write only part R of the rows"
    )
    parser.add_argument(
        "--world-size", type=positive, default=1, metavar="N", help="number of parts (default: 1)"
    )


def add_command(
    commands: argparse._SubParsersAction, name: str, summary: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    """Add a command with its help texts."""
    return commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def positive(text: str) -> int:
    """An integer of 1 or more."""
    return integer(text, least=1)


def positive_number(text: str) -> float:
    """A finite number above 0."""
    return _number(text, lambda number: 0 < number < float("inf"), "above 0")


def temperature(text: str) -> float:
    """A finite number of 0 or more."""
    return _number(text, lambda number: 0 <= number < float("inf"), "of 0 or more")


def probability(text: str) -> float:
    """A number above 0 and up to 1."""
    return _number(text, lambda number: 0 < number <= 1, "above 0 and at most 1")


def _number(text: str, fits: Callable[[float], bool], what: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not fits(number):
        raise argparse.ArgumentTypeError(f"must be a number {what}, got {text!r}")
    return number


def not_negative(text: str) -> int:
    """An integer of 0 or more."""
    return integer(text, least=0)


def integer(text: str, least: int) -> int:
    """An integer of ``least`` or more."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be an integer of {least} or more, got {text!r}")
    return int(text)


def token(text: str) -> int:
    """An id of a token, 32 bits."""
    if not text.removeprefix("-").isdecimal() or not -(2**31) <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"must be a 32-bit integer, got {text!r}")
    return int(text)


def template_of(value: str | None) -> str | None:
    """The chat template of ``--template``: the text of a .jinja file, or a name as it is."""
    if value is not None and value.endswith(".jinja"):
        return Path(value).read_text(encoding="utf-8")
    return value
