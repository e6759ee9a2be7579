"""``tokenpack check``: one batch of the user's data through a model, padded and packed."""

from __future__ import annotations

import argparse

import torch

from .. import check_patch
from .one_batch import model_and_batch


def run(arguments: argparse.Namespace) -> int:
    """Print the report. Returns 0 if the packed run is right, 1 if it differs or nothing packed."""
    model, batch, rows = model_and_batch(arguments)
    model.train(not arguments.eval)
    takes_cache = not model.training and hasattr(model.config, "use_cache")
    more = {"use_cache": False} if takes_cache else {}
    # Of a model in float64, also the norms and losses that transformers computes in float32.
    exact = torch.float64 if arguments.dtype == "float64" else None
    check = check_patch(model, {**batch, **more}, gradients=arguments.gradients, dtype=exact)
    slots, tokens = batch["attention_mask"].numel(), int(batch["attention_mask"].sum())
    print(f"{type(model).__name__}, {rows} rows, {tokens:,} tokens in {slots:,} slots\n{check}")
    return 0 if check.ok else 1
