"""``tokenpack preview``: what is learned of conversations, in the terminal and as HTML."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ..data.chat.checks import ChatReport, count_padding
from ..data.chat.pipeline import ChatOptions, ChatPipeline, count_samples
from ..data.chat.preview import preview_rows
from ..data.chat.sources import first_rows, open_source
from ..data.chat.templates import set_template
from .arguments import template_of
from .tokenizer import load_pretrained

_ROWS = 100  # that are checked


def run(arguments: argparse.Namespace) -> int:
    """Print the preview. Returns 1 if a check found a problem, else 0."""
    tokenizer = load_pretrained(arguments.tokenizer)
    set_template(tokenizer, template_of(arguments.template))
    options = {
        "loss_on": _loss_on(arguments.loss_on),
        "truncation": arguments.truncation,
        "keep": arguments.keep,
        "generation_config": _generation_config(arguments.tokenizer),
    }
    pipeline = ChatPipeline(tokenizer, ChatOptions(max_length=arguments.max_length, **options))
    whole = ChatPipeline(tokenizer, ChatOptions(**options))
    dataset, json_column = open_source(arguments.data, "train", streaming=True)
    count = max(_ROWS, arguments.n)
    found = enumerate(first_rows(dataset, json_column, count))
    rows = [(number, row) for number, row in found if row is not None]
    sparse = json_column is None
    report = ChatReport(rows=len(rows))
    count_samples(pipeline.encode(rows, sparse=sparse), report)
    if arguments.max_length is not None:
        count_padding(report, arguments.max_length)
    shown = preview_rows(rows, pipeline, whole, tokenizer, arguments.n, sparse=sparse)
    _print(shown.render(_style(arguments.style)), arguments.style == "plain")
    if arguments.style != "plain":
        print(f"\nthe first {len(rows)} rows: {report}")
    if arguments.html is not None:
        arguments.html.write_text(shown.html(), encoding="utf-8")
        print(f"wrote {arguments.html}", file=sys.stderr)
    return 1 if any(report.problems.values()) else 0


def _print(text: str, exact: bool) -> None:
    sys.stdout.flush()
    if exact and hasattr(sys.stdout, "buffer"):  # no translation of line ends
        sys.stdout.buffer.write(text.encode("utf-8"))
    else:
        print(text, end="" if exact else "\n")


def _style(asked: str) -> str:
    if asked != "auto":
        return asked
    return "color" if sys.stdout.isatty() else "marks"


def _loss_on(text: str) -> str | tuple[str, ...]:
    return text if text in ("all", "last") else tuple(text.split(","))


def _generation_config(tokenizer: str) -> Any:
    """The config beside the tokenizer, or None."""
    if not (Path(tokenizer) / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(tokenizer)
