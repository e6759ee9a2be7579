"""The options of ``tokenpack condense``. Imports nothing slow, so that ``--help`` is fast."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import help_texts
from .arguments import add_command, add_seed, not_negative, positive, positive_number


def add_condense(commands: argparse._SubParsersAction) -> None:
    """Add the command and its actions."""
    summary = "train, evaluate and run a condenser of long contexts"
    condense = add_command(
        commands, "condense", summary, help_texts.CONDENSE, help_texts.CONDENSE_EPILOG
    )
    actions = condense.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_train(actions)
    _add_eval(actions)
    _add_run(actions)


def _add_train(actions: argparse._SubParsersAction) -> None:
    summary = "train a condenser for a frozen decoder"
    train = add_command(
        actions, "train", summary, help_texts.CONDENSE_TRAIN, help_texts.CONDENSE_TRAIN_EPILOG
    )
    train.add_argument(
        "--decoder", required=True, metavar="NAME_OR_PATH", help="the decoder, which stays as it is"
    )
    train.add_argument(
        "--condenser",
        metavar="NAME_OR_PATH",
        help="the model that gets LoRA and reads the contexts (default: that of --decoder)",
    )
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    _add_data(train, "train")
    _add_shape(train.add_argument_group("condenser"))
    _add_training(train.add_argument_group("training"))


def _add_data(parser: argparse.ArgumentParser, action: str) -> None:
    parser.add_argument("--data", required=True, metavar="FILES", help="documents, see below")
    if action == "train":
        parser.add_argument(
            "--held-out",
            type=positive_number,
            default=0.05,
            metavar="SHARE",
            help="share of the contents to evaluate on (default: 0.05)",
        )
        parser.add_argument("--eval-data", metavar="FILES", help="documents to evaluate on instead")
    group = parser.add_argument_group("documents")
    group.add_argument(
        "--context-tokens",
        type=positive,
        metavar="N",
        help="cut texts into windows with contexts of N tokens; longest context of a triple "
        "(default: no limit)",
    )
    group.add_argument(
        "--continuation-tokens",
        type=positive,
        default=64,
        metavar="N",
        help="tokens of a text to learn after a context (default: 64)",
    )
    group.add_argument(
        "--prompt-tokens",
        type=not_negative,
        default=0,
        metavar="N",
        help="tokens of a text that the decoder reads in front of them (default: 0)",
    )


def _add_shape(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--carrier", choices=("slots", "mean_pool"), default="slots", help="default: slots"
    )
    numbers = group.add_mutually_exclusive_group()
    numbers.add_argument(
        "--ratios",
        type=positive,
        nargs="+",
        metavar="R",
        help="tokens per vector; several are drawn in training, the first is the default "
        "(default: 4)",
    )
    numbers.add_argument(
        "--num-condense-tokens", type=positive, metavar="K", help="K vectors for each segment"
    )
    group.add_argument("--segment-length", type=positive, metavar="N", help="longest segment")
    group.add_argument(
        "--slot-positions", choices=("end", "spread", "span_starts"), default="end", help="of slots"
    )
    group.add_argument(
        "--last-layers",
        type=positive,
        default=1,
        metavar="N",
        help="layers whose hidden states are concatenated (default: 1)",
    )
    group.add_argument(
        "--projection", choices=("linear", "mlp", "none"), default="linear", help="default: linear"
    )
    group.add_argument(
        "--lora-rank", type=positive, default=16, metavar="R", help="of LoRA (default: 16)"
    )
    for name, default in (
        ("completion", 1.0),
        ("continuation", 1.0),
        ("reconstruction", 0.0),
        ("distillation", 0.0),
    ):
        group.add_argument(
            f"--{name}-weight",
            type=_weight,
            default=default,
            metavar="W",
            help=f"weight of the objective (default: {default:g})",
        )


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--epochs", type=positive_number, default=1.0, metavar="N", help="default: 1"
    )
    group.add_argument("--steps", type=positive, metavar="N", help="optimizer steps, not epochs")
    group.add_argument(
        "--tokens-per-batch",
        type=positive,
        default=16_384,
        metavar="N",
        help="of both streams, for an optimizer step (default: 16384)",
    )
    group.add_argument(
        "--tokens-per-microbatch",
        type=positive,
        default=8_192,
        metavar="N",
        help="of both streams, for a forward and backward (default: 8192)",
    )
    group.add_argument(
        "--lr", type=positive_number, default=1e-4, metavar="LR", help="of LoRA (default: 1e-4)"
    )
    group.add_argument(
        "--slots-lr", type=positive_number, metavar="LR", help="of slots and flags (default: --lr)"
    )
    group.add_argument(
        "--projection-lr", type=positive_number, metavar="LR", help="of the projection, likewise"
    )
    group.add_argument(
        "--eval-steps", type=positive, metavar="N", help="steps between evaluations (default: 5 %%)"
    )
    group.add_argument("--bf16", action="store_true", help="compute in bfloat16 (autocast)")
    group.add_argument(
        "--report-to",
        nargs="+",
        default=["none"],
        metavar="NAME",
        help="of transformers: wandb, tensorboard ... (default: none)",
    )
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    group.add_argument("--push-to-hub", metavar="NAME", help="upload the result to this repository")
    add_seed(group, "of new weights, the order of the documents and the ratios")


def _add_eval(actions: argparse._SubParsersAction) -> None:
    summary = "compare condensed vectors with controls on held-out documents"
    evaluate = add_command(
        actions, "eval", summary, help_texts.CONDENSE_EVAL, help_texts.CONDENSE_EVAL_EPILOG
    )
    _add_model(evaluate)
    evaluate.add_argument(
        "--out",
        type=Path,
        default=Path("tokenpack-condense"),
        metavar="DIR",
        help="folder for condense.png and condense.json (default: tokenpack-condense)",
    )
    _add_data(evaluate, "eval")
    evaluate.add_argument(
        "--ratios", type=positive, nargs="+", metavar="R", help="default: those of the condenser"
    )
    evaluate.add_argument(
        "--documents", type=positive, metavar="N", help="the first N documents (default: all)"
    )
    add_seed(evaluate, "of the untrained condenser")


def _add_run(actions: argparse._SubParsersAction) -> None:
    summary = "answer a prompt, given a condensed context"
    run = add_command(
        actions, "run", summary, help_texts.CONDENSE_RUN, help_texts.CONDENSE_RUN_EPILOG
    )
    _add_model(run)
    run.add_argument(
        "--context", action="append", required=True, metavar="TEXT_OR_FILE", help="may be repeated"
    )
    run.add_argument(
        "--prompt", action="append", metavar="TEXT", help="one for all, or one for each context"
    )
    run.add_argument("--ratio", type=positive, metavar="R", help="tokens per vector")
    run.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="default: 64")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="NAME_OR_PATH", help="a condenser: a folder or a hub name"
    )
    parser.add_argument(
        "--condenser", metavar="NAME_OR_PATH", help="its condenser model, if it has moved"
    )
    parser.add_argument("--decoder", metavar="NAME_OR_PATH", help="its decoder, likewise")


def _weight(text: str) -> float:
    """A number of 0 or more."""
    return 0.0 if text in ("0", "0.0") else positive_number(text)
