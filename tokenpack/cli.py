"""The ``tokenpack`` command: reads the arguments and hands them to one of ``tokenpack.commands``.

Each command is a module there with a function ``run(arguments) -> exit code``, imported only when
it is asked for, so that ``--help`` need not wait for torch. Exit codes: 0 done, 1 a check of the
demo failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__

_DESCRIPTION = """\
Padding-free training of Hugging Face models: the same numbers, from the real tokens alone.

  tokenpack demo      train T5, NLLB and Llama padded and patched, side by side, and compare
  tokenpack doctor    what is installed here, and which attention backends can run
  tokenpack inspect   how much of your data's batches is padding, and what removing it would give
"""

_DEMO = """\
Train each model twice on the same batches from the same weights: padded, with transformers' own
SDPA attention, and patched by tokenpack. Print what both did, and write a PNG and a JSON.

The models are built from configs, with random weights, sized for this machine: fp32 on a CPU,
larger and under bf16 autocast on a CUDA device. Nothing is downloaded. Dropout and layer drop are
0: the two runs would draw different random numbers, and their losses could not be compared.
"""

_DEMO_EPILOG = """\
data:
  By default the docstrings of Python's standard library of more than one line, whose lengths are
  naturally unequal:
    t5     span corruption: some spans of a docstring are masked, and predicted
    nllb   the docstring after its summary -> the summary
    llama  the docstring, each token predicted from those before it
  --data FILE takes instead, in UTF-8,
    FILE.txt    texts separated by blank lines; without any blank line, one text per line
    FILE.jsonl  one object per line, with "text", or with "source" and "target"
  With "source" and "target", t5 and nllb learn source -> target, llama the two joined.
  What is longer than a model takes is cut to that, and how many were cut is printed.

the table:
  padding     share of the batches' slots that hold no token
  tokens/s    real tokens per second of forward and backward
  ratio       time padded / packed of a step's forward and backward: the median over the steps
  ideal       the same ratio of the floating-point operations counted
  of ideal    the one by the other, step by step: the median
  loss diff   the largest |padded - patched| / padded over all steps
  peak        memory that one forward and backward takes beyond the weights, MiB

examples:
  tokenpack demo                                 three models, under 4 minutes on two CPU cores
  tokenpack demo --model t5 --steps 50
  tokenpack demo --data my.jsonl --out runs/my
  tokenpack demo --size tiny --steps 2           seconds: does it run here? (its times mean nothing)

exit code: 0; 1 if the losses differ or a step was not packed; 2 for bad input.
"""

_INSPECT = """\
Tokenize a file and show how long its texts are, how much of a batch would be padding, and how much
faster a model of a named shape would train without it, by floating-point operations counted.
"""

_INSPECT_EPILOG = """\
FILE is read as by `tokenpack demo --data`: .txt (texts separated by blank lines, or one per line),
or .jsonl ("text", or "source" and "target"). Random batches are drawn from the shuffled data,
sorted ones from the data in order of length: little padding, at the price of batches that are all
short or all long.

the table:
  padding     share of the batches' slots that hold no token
  linear      operations padded / packed, of the linear layers alone: 1 / (1 - padding) where all
              tokens cost the same
  speed-up    the same with attention, whose share grows with the square of the length

shapes: for "text" data, llama-1b (default), llama-8b
        for "source" and "target", t5-base (default), t5-small, t5-large, nllb-600m, and the llamas

examples:
  tokenpack inspect --data my.jsonl --tokenizer google-t5/t5-base
  tokenpack inspect --data my.txt --tokenizer checkpoints/run1 --shape llama-8b --max-length 2048
  tokenpack inspect --data my.txt --tokenizer tokenizer.json --out inspected
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; by default those of this process.

    Returns:
        The exit code: 0 done, 1 a check failed, 2 bad input (said in one line on stderr).
    """
    parsed = build_parser().parse_args(arguments)
    command = importlib.import_module(f".commands.{parsed.command}", __package__)
    try:
        return command.run(parsed)
    except (ValueError, TypeError) as error:
        message = " ".join(str(error).split())
        print(f"tokenpack: error: {message}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="tokenpack",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tokenpack {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_doctor(commands)
    _add_inspect(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> None:
    demo = _add_command(
        commands, "demo", "train padded and patched models side by side", _DEMO, _DEMO_EPILOG
    )
    demo.add_argument(
        "--model",
        choices=("t5", "nllb", "llama", "all"),
        default="all",
        help="which model to train (default: all)",
    )
    demo.add_argument(
        "--steps",
        type=_positive,
        default=20,
        metavar="N",
        help="optimizer steps of each model, one batch each (default: 20)",
    )
    demo.add_argument(
        "--data", type=Path, metavar="FILE", help=".txt or .jsonl (default: Python's docstrings)"
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("tokenpack-demo"),
        metavar="DIR",
        help="folder for demo.png and demo.json (default: tokenpack-demo)",
    )
    demo.add_argument(
        "--seed",
        type=_not_negative,
        default=0,
        metavar="S",
        help="of the weights, the masked spans and the order of the texts (default: 0)",
    )
    demo.add_argument(
        "--size",
        choices=("auto", "tiny", "small", "large"),
        default="auto",
        help="of models and batches; auto: large on a CUDA device, small elsewhere",
    )
    demo.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: cuda where there is one (default)",
    )


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    _add_command(
        commands,
        "doctor",
        "what is installed here and which attention backends can run",
        "Print the versions of what tokenpack runs on, the devices, and for each device which\n"
        "attention backends can run on it and why the others cannot. Paste it into a bug report.",
        "example:\n  tokenpack doctor",
    )


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    inspect = _add_command(
        commands, "inspect", "how much of your data is padding", _INSPECT, _INSPECT_EPILOG
    )
    inspect.add_argument("--data", type=Path, required=True, metavar="FILE", help=".txt or .jsonl")
    inspect.add_argument(
        "--tokenizer",
        required=True,
        metavar="NAME_OR_PATH",
        help="a tokenizer.json, a folder that holds a tokenizer, or a name on the Hugging Face hub",
    )
    inspect.add_argument(
        "--shape", metavar="NAME", help="whose operations to count (default: by the kind of data)"
    )
    inspect.add_argument(
        "--max-length",
        type=_positive,
        metavar="N",
        help="tokens to cut a side to, as training would (default: nothing is cut)",
    )
    inspect.add_argument(
        "--out",
        type=Path,
        default=Path("tokenpack-inspect"),
        metavar="DIR",
        help="folder for inspect.png and inspect.json (default: tokenpack-inspect)",
    )
    inspect.add_argument(
        "--seed", type=_not_negative, default=0, metavar="S", help="of the shuffling (default: 0)"
    )


def _add_command(
    commands: argparse._SubParsersAction, name: str, summary: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _positive(text: str) -> int:
    return _integer(text, least=1)


def _not_negative(text: str) -> int:
    return _integer(text, least=0)


def _integer(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"got {text!r}, takes an integer of {least} or more")
    return int(text)
