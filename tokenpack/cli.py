"""The ``tokenpack`` command: reads the arguments and hands them to one of ``tokenpack.commands``.

Each command is a module there with a function ``run(arguments) -> exit code``, imported only when
it is asked for, so that ``--help`` need not wait for torch. Exit codes: 0 done, 1 a check of the
demo failed, 2 bad input or no place to write to.
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
  tokenpack pack      your sequences side by side in full rows, as a dataset to train on
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
faster a model of a named shape would train without it, by floating-point operations counted. Then
plan packed rows of the same texts, and show how full each strategy fills them.
"""

_INSPECT_EPILOG = """\
FILE is read as by `tokenpack demo --data`: .txt (texts separated by blank lines, or one per line),
or .jsonl ("text", or "source" and "target"). Random batches are drawn from the shuffled data,
sorted ones from the data in order of length: little padding, at the price of batches that are all
short or all long.

the first table:
  padding     share of the batches' slots that hold no token
  linear      operations padded / packed, of the linear layers alone: 1 / (1 - padding) where all
              tokens cost the same
  speed-up    the same with attention, whose share grows with the square of the length

the second, of rows as `tokenpack pack` makes them:
  rows        rows of --capacity tokens that hold all texts; a longer text is cut, and counted
  efficiency  share of their slots that hold a token; padding is the rest
  seconds     time to plan once. All strategies run, which for a million texts takes 5 to 20 s:
              less than to tokenize them
For an encoder-decoder, pairs are planned for rows with a capacity of each side (pack_pairs).

the third, with --gpus: what `tokenpack.cost` predicts of training with AdamW on so many devices,
from operations and bytes counted and what a device can do at its best. That is measured on this
machine's, in some seconds, unless --ceilings names a file with another's (ceilings.json of --out,
or of a benchmark's results). Times are those of a device at its best; the ratios are what to
believe.
  rows        of a random batch
  seconds     of its step, padded and packed
  GiB         weights, optimizer and what the step keeps, of the largest such batch
Of many ranks: DDP and FSDP over links of --link gigabytes a second, nothing hidden behind the
backward. Balance is the mean rank's work over the busiest one's, in batches as the trainer plans
them, a token budget to each rank.

shapes: for "text" data, llama-1b (default), llama-8b
        for "source" and "target", t5-base (default), t5-small, t5-large, nllb-600m, and the llamas

examples:
  tokenpack inspect --data my.jsonl --tokenizer google-t5/t5-base
  tokenpack inspect --data my.txt --tokenizer checkpoints/run1 --shape llama-8b --max-length 2048
  tokenpack inspect --data my.txt --tokenizer tokenizer.json --capacity 4096 --out inspected
  tokenpack inspect --data my.jsonl --tokenizer my --model-config my/config.json --gpus 8
"""

_PACK = """\
Put the sequences of IN side by side into rows of --capacity tokens, so that little of a row is
padding. Write the rows as a dataset, and print how full they are.
"""

_PACK_EPILOG = """\
IN is a file, a folder or a glob (in quotes) of
  .parquet .arrow .feather .jsonl .csv .tsv .txt    the textual ones also as .gz and .zst
with a column of token lists, or with --tokenizer a column of text (.txt: a text per line); or
  .npy                                              lengths alone: integers, one per sequence

OUT is a new or an empty folder, and receives
  dataset.arrow   one row per bin; datasets.Dataset.from_file("OUT/dataset.arrow") reads it as it
                  lies on disk
  metrics.json    the metrics, the options, and the versions of what ran
  plan.png        lengths and fills, where matplotlib is installed
Lengths alone make no rows. They are planned in shards, in bounded memory, and OUT receives instead
  plan            tokenpack.packing.PackResult.load("OUT/plan") says which sequences share a bin

the columns of a row:
  input_ids       --capacity ids
  attention_mask  1 at tokens, 0 at padding: it does not tell sequences apart
  labels          unshifted, for a loss that shifts; -100 at padding and at each sequence's first
  position_ids    from 0 in every sequence
  seq_lengths     tokens of each sequence in the row
tokenpack.data.collate_packed_rows makes batches of them that keep sequences apart.

strategies:
  auto   obfdp or obfd, by how often lengths repeat and how full rows get (default)
  nf     next fit: one open bin; order is kept
  ff     first fit: as they come, the first bin with room
  bf     best fit: as they come, the fullest bin with room
  wf     worst fit: as they come, the emptiest open bin
  ffd    first-fit decreasing: ff from the longest on
  bfd    best-fit decreasing: bf from the longest on
  ffs    first-fit shuffle: ff in random order, by --seed
  mffd   modified first-fit decreasing: ffd that pairs long ones with care first
  obfd   optimized best-fit decreasing: bfd over a histogram of lengths
  obfdp  parallel best-fit decreasing: bfd for all bins at once, in rounds
  hk     harmonic: as they come, like lengths together
`tokenpack inspect` compares them on your texts.

examples:
  tokenpack pack tokenized.parquet packed --capacity 4096
  tokenpack pack 'shards/*.jsonl.zst' packed --capacity 2048 --labels labels --overlong truncate
  tokenpack pack my.jsonl packed --capacity 2048 --tokenizer google-t5/t5-base --overlong split
  tokenpack pack my.parquet packed --capacity 2048 --columns input_ids labels position_ids
  tokenpack pack lengths.npy planned --capacity 8192 --window 100000

exit code: 0; 2 for bad input, and then nothing is left in OUT.
"""

_COLUMNS = ("input_ids", "attention_mask", "labels", "position_ids", "seq_lengths")


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
    except (ValueError, TypeError, OSError) as error:
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
    _add_pack(commands)
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
    _add_out(demo, "demo")
    _add_seed(demo, "of the weights, the masked spans and the order of the texts")
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
    _add_tokenizer(inspect, required=True)
    inspect.add_argument(
        "--shape", metavar="NAME", help="whose operations to count (default: by the kind of data)"
    )
    inspect.add_argument(
        "--model-config",
        metavar="NAME_OR_PATH",
        help="a config.json, its folder or a name on the hub, instead of --shape",
    )
    inspect.add_argument(
        "--gpus",
        type=_positive,
        metavar="N",
        help="predict step time, memory and token budget on so many devices",
    )
    inspect.add_argument(
        "--ceilings",
        type=Path,
        metavar="FILE",
        help="with --gpus: what a device can do (default: this machine's, measured)",
    )
    inspect.add_argument(
        "--link",
        type=_positive_number,
        metavar="GB/S",
        default=25.0,
        help="with --gpus: gigabytes a second between ranks, each way (default: 25, which is 200 "
        "Gbit/s a device)",
    )
    inspect.add_argument(
        "--max-length",
        type=_positive,
        metavar="N",
        help="tokens to cut a side to, as training would (default: nothing is cut)",
    )
    inspect.add_argument(
        "--capacity",
        type=_positive,
        metavar="N",
        help="tokens of a packed row, in an encoder-decoder of either side (default: the smallest "
        "power of two that holds the longest text, or side, and 512 at least)",
    )
    _add_out(inspect, "inspect")
    _add_seed(inspect, "of the shuffling")


def _add_pack(commands: argparse._SubParsersAction) -> None:
    pack = _add_command(
        commands, "pack", "put sequences side by side into full rows", _PACK, _PACK_EPILOG
    )
    pack.add_argument("input", metavar="IN", help="what to pack: files, see below")
    pack.add_argument("out", type=Path, metavar="OUT", help="folder for what is written")

    reading = pack.add_argument_group("reading")
    reading.add_argument(
        "--column",
        default="input_ids",
        metavar="NAME",
        help="column of token lists (default: input_ids)",
    )
    reading.add_argument(
        "--labels",
        metavar="NAME",
        help="column of label lists as long as the tokens' (default: the tokens)",
    )
    _add_tokenizer(reading, required=False)
    reading.add_argument(
        "--text-column",
        default="text",
        metavar="NAME",
        help="column that --tokenizer reads (default: text)",
    )

    planning = pack.add_argument_group("planning")
    planning.add_argument(
        "--capacity", type=_positive, required=True, metavar="N", help="tokens of a row"
    )
    planning.add_argument("--strategy", default="auto", metavar="S", help="see below")
    _add_seed(planning, "of the shuffling of ffs")
    planning.add_argument(
        "--overlong",
        choices=("error", "truncate", "split", "drop"),
        default="error",
        help="what to do with a sequence over capacity; the table counts them (default: error)",
    )
    planning.add_argument(
        "--drop-empty",
        action="store_true",
        help="leave out sequences without tokens, which are an error otherwise",
    )
    planning.add_argument(
        "--max-sequences", type=_positive, metavar="N", help="at most so many in a row"
    )
    planning.add_argument(
        "--window",
        type=_positive,
        metavar="N",
        help="only sequences within so many share a row: a shuffle or a curriculum survives",
    )

    rows = pack.add_argument_group("rows")
    rows.add_argument(
        "--padding-value",
        type=_token,
        default=0,
        metavar="V",
        help="in input_ids, where there is no token (default: 0)",
    )
    rows.add_argument(
        "--label-padding-value",
        type=_token,
        default=-100,
        metavar="V",
        help="in labels, where nothing is to be predicted (default: -100)",
    )
    rows.add_argument(
        "--columns",
        nargs="+",
        choices=_COLUMNS,
        metavar="NAME",
        help="the columns to write (default: all below)",
    )
    rows.add_argument(
        "--num-proc",
        type=_positive,
        default=1,
        metavar="N",
        help="threads that make rows (default: 1)",
    )


# Options that several commands have.


def _add_out(parser: argparse.ArgumentParser, command: str) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(f"tokenpack-{command}"),
        metavar="DIR",
        help=f"folder for {command}.png and {command}.json (default: tokenpack-{command})",
    )


def _add_seed(parser: argparse._ActionsContainer, of_what: str) -> None:
    parser.add_argument(
        "--seed", type=_not_negative, default=0, metavar="S", help=f"{of_what} (default: 0)"
    )


def _add_tokenizer(parser: argparse._ActionsContainer, required: bool) -> None:
    parser.add_argument(
        "--tokenizer",
        required=required,
        metavar="NAME_OR_PATH",
        help="a tokenizer.json, a folder that holds a tokenizer, or a name on the Hugging Face hub",
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


def _positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, takes a number above 0")
    return number


def _not_negative(text: str) -> int:
    return _integer(text, least=0)


def _integer(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"got {text!r}, takes an integer of {least} or more")
    return int(text)


def _token(text: str) -> int:
    if not text.removeprefix("-").isdecimal() or not -(2**31) <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"got {text!r}, takes an integer of 32 bits")
    return int(text)
