"""``tokenpack inspect-model``: what a model computes on one batch of the user's data."""

from __future__ import annotations

import argparse

from .. import inspect_model
from .one_batch import model_and_batch


def run(arguments: argparse.Namespace) -> int:
    """Print the tables. Returns 0 if all lines are ok, else 1."""
    model, batch, rows = model_and_batch(arguments)
    report = inspect_model(model, batch)
    tokens = int(batch["attention_mask"].sum())
    print(f"{type(model).__name__}, {rows} rows, {tokens:,} tokens\n\n{report}\n")
    print("\n".join(report.problems) or "all lines are ok")
    return 1 if report.problems else 0
