"""The ``tokenpack`` command: parses the arguments and runs a module of ``tokenpack.commands``.

Each command is a module there with a function ``run(arguments) -> exit code``. It is imported only
when it runs, so that ``--help`` does not import torch. Exit codes: 0 success, 1 a check failed,
2 bad input or an output folder that cannot be written, 128 + n ended by signal n.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .commands import condense_options, help_texts, model_options, shard_options
from .commands.arguments import (
    add_command,
    add_ranks,
    add_seed,
    add_template,
    add_tokenizer,
    positive,
    positive_number,
    token,
)
from .commands.interrupts import Interrupted, signals_raise

_COLUMNS = ("input_ids", "attention_mask", "labels", "position_ids", "seq_lengths")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: command line without the program's name; by default that of this process.

    Returns:
        The exit code: 0 success, 1 a check failed, 2 bad input, 128 + n if signal n (SIGTERM or
        Ctrl-C) ended the command. Bad input and signals are reported in one line on stderr.
    """
    parsed = build_parser().parse_args(arguments)
    try:
        with signals_raise():
            name = parsed.command.replace("-", "_")
            command = importlib.import_module(f".commands.{name}", __package__)
            return command.run(parsed)
    except Interrupted as interrupt:
        print(f"\ntokenpack: ended by {interrupt.name}", file=sys.stderr)
        return 128 + interrupt.number
    except (ValueError, TypeError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"tokenpack: error: {message}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="tokenpack",
        description=help_texts.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tokenpack {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    model_options.add_check(commands)
    condense_options.add_condense(commands)
    _add_demo(commands)
    _add_doctor(commands)
    model_options.add_generate(commands)
    _add_inspect(commands)
    model_options.add_inspect_model(commands)
    _add_merge_packed(commands)
    _add_pack(commands)
    _add_preview(commands)
    shard_options.add_shards(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> None:
    demo = add_command(
        commands,
        "demo",
        "train padded and patched models side by side",
        help_texts.DEMO,
        help_texts.DEMO_EPILOG,
    )
    demo.add_argument(
        "--model",
        choices=("t5", "nllb", "llama", "all"),
        default="all",
        help="model to train (default: all)",
    )
    demo.add_argument(
        "--steps",
        type=positive,
        default=20,
        metavar="N",
        help="optimizer steps of each model, one batch per step (default: 20)",
    )
    demo.add_argument(
        "--data", type=Path, metavar="FILE", help=".txt or .jsonl (default: Python's docstrings)"
    )
    _add_out(demo, "demo")
    add_seed(demo, "of the weights, the masked spans and the order of the texts")
    demo.add_argument(
        "--size",
        choices=("auto", "tiny", "small", "large"),
        default="auto",
        help="size of models and batches; auto: large on a CUDA device, small on a CPU",
    )
    demo.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: cuda if available (default)",
    )


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    summary = "what is installed here, and which attention backends can run"
    add_command(commands, "doctor", summary, help_texts.DOCTOR, help_texts.DOCTOR_EPILOG)


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    summary = "how much of your data is padding"
    inspect = add_command(
        commands, "inspect", summary, help_texts.INSPECT, help_texts.INSPECT_EPILOG
    )
    inspect.add_argument("--data", type=Path, required=True, metavar="FILE", help=".txt or .jsonl")
    add_tokenizer(inspect, required=True)
    inspect.add_argument(
        "--shape",
        metavar="NAME",
        help="model whose operations to count (default: depends on the kind of data)",
    )
    inspect.add_argument(
        "--model-config",
        metavar="NAME_OR_PATH",
        help="instead of --shape: a config.json, its folder, or a name on the Hugging Face hub",
    )
    _add_prediction(inspect)
    inspect.add_argument(
        "--max-length",
        type=positive,
        metavar="N",
        help="cut each text, or each side of a pair, to N tokens, as training would (default: no "
        "cut)",
    )
    inspect.add_argument(
        "--capacity",
        type=positive,
        metavar="N",
        help="tokens of a packed row; for an encoder-decoder, of each side (default: the smallest "
        "power of two, 512 or more, that holds the longest text or side)",
    )
    _add_out(inspect, "inspect")
    add_seed(inspect, "of the shuffling")


def _add_prediction(inspect: argparse.ArgumentParser) -> None:
    inspect.add_argument(
        "--gpus",
        type=positive,
        metavar="N",
        help="predict step time, memory and token budget on N devices",
    )
    inspect.add_argument(
        "--ceilings",
        type=Path,
        metavar="FILE",
        help="with --gpus: the peak rates of a device (default: measure this machine)",
    )
    inspect.add_argument(
        "--link",
        type=positive_number,
        metavar="GB/S",
        default=25.0,
        help="with --gpus: gigabytes per second between ranks, in each direction (default: 25, "
        "which is 200 Gbit/s per device)",
    )


def _add_pack(commands: argparse._SubParsersAction) -> None:
    summary = "pack sequences into full rows"
    pack = add_command(commands, "pack", summary, help_texts.PACK, help_texts.PACK_EPILOG)
    pack.add_argument("input", metavar="IN", help="files to pack, see below")
    pack.add_argument("out", type=Path, metavar="OUT", help="folder for the output")
    reading = pack.add_argument_group("reading")
    _add_reading(reading)
    add_ranks(reading)
    _add_planning(pack.add_argument_group("planning"))
    _add_rows(pack.add_argument_group("rows"))


def _add_merge_packed(commands: argparse._SubParsersAction) -> None:
    summary = "join the parts that several machines packed"
    texts = help_texts.MERGE_PACKED, help_texts.MERGE_PACKED_EPILOG
    merge = add_command(commands, "merge-packed", summary, *texts)
    merge.add_argument("out", type=Path, metavar="OUT", help="the OUT of `tokenpack pack`")


def _add_reading(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--column",
        default="input_ids",
        metavar="NAME",
        help="column of token lists (default: input_ids)",
    )
    group.add_argument(
        "--labels",
        metavar="NAME",
        help="column of label lists, as long as the token lists (default: the tokens)",
    )
    add_tokenizer(group, required=False)
    group.add_argument(
        "--text-column",
        default="text",
        metavar="NAME",
        help="column that --tokenizer reads (default: text)",
    )


def _add_planning(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--capacity", type=positive, required=True, metavar="N", help="tokens of a row"
    )
    group.add_argument("--strategy", default="auto", metavar="S", help="see below")
    add_seed(group, "of the shuffling of ffs")
    group.add_argument(
        "--overlong",
        choices=("error", "truncate", "split", "drop"),
        default="error",
        help="how to handle sequences over capacity; the table counts them (default: error)",
    )
    group.add_argument(
        "--drop-empty",
        action="store_true",
        help="drop sequences without tokens; without this option they are an error",
    )
    group.add_argument(
        "--max-sequences", type=positive, metavar="N", help="at most N sequences in a row"
    )
    group.add_argument(
        "--window",
        type=positive,
        metavar="N",
        help="only sequences of the same window of N share a row; keeps a shuffle or a curriculum",
    )


def _add_rows(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--padding-value",
        type=token,
        default=0,
        metavar="V",
        help="value of input_ids at padding (default: 0)",
    )
    group.add_argument(
        "--label-padding-value",
        type=token,
        default=-100,
        metavar="V",
        help="value of labels at positions without a target (default: -100)",
    )
    group.add_argument(
        "--columns",
        nargs="+",
        choices=_COLUMNS,
        metavar="NAME",
        help="columns to write (default: all below)",
    )
    group.add_argument(
        "--num-proc",
        type=positive,
        default=1,
        metavar="N",
        help="threads that make rows (default: 1)",
    )


def _add_preview(commands: argparse._SubParsersAction) -> None:
    summary = "show what is learned of your conversations"
    preview = add_command(
        commands, "preview", summary, help_texts.PREVIEW, help_texts.PREVIEW_EPILOG
    )
    preview.add_argument(
        "--data", required=True, metavar="FILE", help="conversations, see below; or a hub name"
    )
    add_tokenizer(preview, required=True)
    add_template(preview)
    preview.add_argument(
        "--n", type=positive, default=3, metavar="N", help="texts to show (default: 3)"
    )
    preview.add_argument(
        "--style",
        choices=("auto", "color", "marks", "plain"),
        default="auto",
        help="auto: color on a terminal, else marks; plain: the texts alone, byte for byte",
    )
    preview.add_argument("--html", type=Path, metavar="OUT", help="also write an HTML page")
    preview.add_argument(
        "--loss-on",
        default="all",
        metavar="WHICH",
        help="all, last, or roles separated by commas (default: all)",
    )
    preview.add_argument("--max-length", type=positive, metavar="N", help="tokens of a text")
    preview.add_argument(
        "--truncation",
        choices=("turn", "token", "drop", "error"),
        default="turn",
        help="of longer conversations (default: turn)",
    )
    preview.add_argument(
        "--keep",
        choices=("first", "last"),
        default="first",
        help="which turns or tokens to keep (default: first)",
    )


# An option that several commands have.


def _add_out(parser: argparse.ArgumentParser, command: str) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(f"tokenpack-{command}"),
        metavar="DIR",
        help=f"folder for {command}.png and {command}.json (default: tokenpack-{command})",
    )
