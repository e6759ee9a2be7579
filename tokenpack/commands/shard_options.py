"""The options of ``tokenpack shards``. Imports nothing that is slow, so that ``--help`` is fast."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import help_texts
from .arguments import (
    add_command,
    add_ranks,
    add_template,
    add_tokenizer,
    not_negative,
    positive,
)

_FORMATS = ("megatron", "datatrove")


def add_shards(commands: argparse._SubParsersAction) -> None:
    """Add the command and its actions."""
    summary = "write, inspect, merge and convert token shards"
    shards = add_command(commands, "shards", summary, help_texts.SHARDS, help_texts.SHARDS_EPILOG)
    actions = shards.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_write(actions)
    _add_info(actions)
    _add_merge(actions)
    _add_convert(actions)


def _add_write(actions: argparse._SubParsersAction) -> None:
    summary = "tokenize files and write them as token shards; goes on after a kill"
    write = add_command(
        actions, "write", summary, help_texts.SHARDS_WRITE, help_texts.SHARDS_WRITE_EPILOG
    )
    write.add_argument("input", nargs="+", metavar="IN", help="files to read, see below")
    _add_out(write)
    add_tokenizer(write, required=False)
    _add_format(write, required=False)
    _add_dtype(write, "--dtype", "of the tokens (default: as the format's own tools choose)")
    write.add_argument(
        "--column",
        metavar="NAME",
        help="column of texts (default: text); without --tokenizer, of token ids (input_ids)",
    )
    write.add_argument("--bos", action="store_true", help="put the BOS before each text")
    write.add_argument(
        "--no-eos", dest="eos", action="store_false", help="do not put the EOS behind each text"
    )
    write.add_argument("--chat", action="store_true", help="IN holds conversations, see below")
    add_template(write, "with --chat: ")
    write.add_argument(
        "--max-length", type=positive, metavar="N", help="with --chat: tokens of a conversation"
    )
    write.add_argument(
        "--num-proc",
        type=positive,
        default=1,
        metavar="N",
        help="threads that tokenize (default: 1)",
    )
    add_ranks(write)


def _add_info(actions: argparse._SubParsersAction) -> None:
    summary = "formats, tokens and documents of token shards"
    info = add_command(actions, "info", summary, help_texts.SHARDS_INFO, "")
    info.add_argument("input", nargs="+", metavar="FILE", help="files, folders or globs")
    _add_dtype(info, "--dtype", "of files that do not state it")
    info.add_argument(
        "--verify",
        action="store_true",
        help="also read all tokens: smallest and largest id, and the checksum of tokenpack's files",
    )


def _add_merge(actions: argparse._SubParsersAction) -> None:
    summary = "join token shards and verify the result"
    merge = add_command(actions, "merge", summary, help_texts.SHARDS_MERGE, "")
    merge.add_argument("input", nargs="+", metavar="IN", help="files, folders or globs")
    _add_out(merge)
    _add_format(merge, required=None)


def _add_convert(actions: argparse._SubParsersAction) -> None:
    summary = "write token shards in another format"
    convert = add_command(actions, "convert", summary, help_texts.SHARDS_CONVERT, "")
    convert.add_argument("input", nargs="+", metavar="IN", help="files, folders or globs")
    _add_out(convert)
    _add_format(convert, required=True)
    _add_dtype(convert, "--dtype", "of the new tokens (default: that of the old ones)")
    _add_dtype(convert, "--source-dtype", "of files that do not state it")
    for which, what in (("bos", "begins"), ("eos", "ends")):
        convert.add_argument(
            f"--{which}-token-id",
            type=not_negative,
            metavar="ID",
            help=f"the token that {what} each document, for files without an index",
        )
    convert.add_argument(
        "--one-document",
        action="store_true",
        help="write files without an index as one document",
    )


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="name of the new files; a suffix may be left out"
    )


def _add_format(parser: argparse.ArgumentParser, required: bool | None) -> None:
    """``required`` is None if the default is the format of the files that are read."""
    default = "that of IN" if required is None else "megatron"
    parser.add_argument(
        "--format",
        choices=_FORMATS,
        required=bool(required),
        default="megatron" if required is False else None,
        help="of the new files" + ("" if required else f" (default: {default})"),
    )


def _add_dtype(parser: argparse.ArgumentParser, option: str, help_text: str) -> None:
    parser.add_argument(option, metavar="DTYPE", help=f"{help_text}: uint16, uint32, int32 ...")
