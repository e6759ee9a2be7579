"""The options of the commands that run a model of the user's."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import help_texts
from .arguments import (
    add_command,
    add_template,
    not_negative,
    positive,
    probability,
    temperature,
)


def add_check(commands: argparse._SubParsersAction) -> None:
    """Add ``tokenpack check``."""
    summary = "run your data through your model padded and packed, and compare"
    check = add_command(commands, "check", summary, help_texts.CHECK, help_texts.CHECK_EPILOG)
    add_model_and_batch(check)
    check.add_argument(
        "--no-gradients",
        dest="gradients",
        action="store_false",
        help="compare only the loss and the outputs",
    )
    check.add_argument("--eval", action="store_true", help="in evaluation mode, not in training")


def add_generate(commands: argparse._SubParsersAction) -> None:
    """Add ``tokenpack generate``."""
    summary = "let your model continue a prompt, or chat with it"
    generate = add_command(
        commands, "generate", summary, help_texts.GENERATE, help_texts.GENERATE_EPILOG
    )
    _add_model(generate)
    generate.add_argument(
        "--prompt", metavar="TEXT", help="a text to continue; with --chat, a message"
    )
    generate.add_argument(
        "--max-new-tokens",
        type=positive,
        default=200,
        metavar="N",
        help="longest continuation or answer (default: 200)",
    )
    generate.add_argument(
        "--context",
        type=positive,
        metavar="N",
        help="tokens of the prompt and what is generated (default: those of the model's config)",
    )
    _add_dtype(generate)
    chat = generate.add_argument_group("chat")
    chat.add_argument("--chat", action="store_true", help="answer messages, by the chat template")
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    add_template(chat)
    _add_sampling(
        generate.add_argument_group("sampling (default: as the model's generation config)")
    )


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--temperature",
        type=temperature,
        metavar="T",
        help="divides the logits; 0: always the most probable token",
    )
    group.add_argument(
        "--top-k", type=positive, metavar="K", help="sample from the K most probable tokens"
    )
    group.add_argument(
        "--top-p",
        type=probability,
        metavar="P",
        help="sample from the most probable tokens that together have probability P",
    )
    group.add_argument(
        "--seed",
        type=not_negative,
        metavar="S",
        help="seed of the samples (default: other samples each time)",
    )


def add_inspect_model(commands: argparse._SubParsersAction) -> None:
    """Add ``tokenpack inspect-model``."""
    summary = "what your model computes on your data: values, updates, gradients"
    add_model_and_batch(
        add_command(
            *(commands, "inspect-model", summary),
            *(help_texts.INSPECT_MODEL, help_texts.INSPECT_MODEL_EPILOG),
        )
    )


def add_model_and_batch(parser: argparse.ArgumentParser) -> None:
    """Add the options that `one_batch.model_and_batch` reads."""
    _add_model(parser)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="see below")
    parser.add_argument("--column", metavar="NAME", help="column of texts or of lists of ids")
    parser.add_argument(
        "--target-column", metavar="NAME", help="column of targets, with --column (default: none)"
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=8,
        metavar="N",
        help="rows of the batch (default: 8)",
    )
    parser.add_argument(
        "--max-length",
        type=positive,
        default=512,
        metavar="N",
        help="cut each text, or each side of a pair, to N tokens (default: 512)",
    )
    _add_dtype(parser)
    parser.add_argument(
        "--random", action="store_true", help="random weights, from the config of --model"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME_OR_PATH",
        help="a folder that holds a model, or a name on the Hugging Face hub",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME_OR_PATH",
        help="a tokenizer.json, a folder or a name on the hub (default: that of --model)",
    )


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=("float32", "float64", "bfloat16", "float16"),
        help="dtype of the weights and of the computation (default: as saved)",
    )
