"""What the log line of an evaluation has beside its metrics: perplexity, and the best mark.

    perplexity = exp(loss)

The loss is the mean over all targets, so this is the perplexity of the whole evaluation set. Both
are added to the log alone. The metrics that `evaluate` returns are those of transformers, because a
search of hyperparameters sums them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .base import TrainerBase


def evaluation_marks(trainer: TrainerBase, logs: Mapping[str, Any]) -> dict[str, Any]:
    """The marks of a log, if it is that of the last evaluation, whose metrics begin with a prefix.

    Returns:
        ``{prefix}_perplexity`` if the loss is a cross entropy over tokens. In training,
        ``{prefix}_is_best`` if ``metric_for_best_model`` is among the metrics.
    """
    marks: dict[str, Any] = {}
    prefix = trainer.evaluated_prefix
    loss = logs.get(f"{prefix}_loss")
    if loss is None:
        return marks
    if _predicts_tokens(trainer):
        marks[f"{prefix}_perplexity"] = math.exp(loss) if loss < 700.0 else math.inf
    metric = trainer.args.metric_for_best_model
    if metric is None or not trainer.is_in_train:
        return marks
    value = logs.get(metric if metric.startswith("eval_") else f"eval_{metric}")
    if value is not None:
        greater, best = bool(trainer.args.greater_is_better), trainer.state.best_metric
        if best is None:
            best = -math.inf if greater else math.inf
        marks[f"{prefix}_is_best"] = value > best if greater else value < best
    return marks


def _predicts_tokens(trainer: TrainerBase) -> bool:
    """Whether the evaluation loss is the cross entropy of an LM head's predictions."""
    if trainer.label_smoother is not None or trainer.compute_loss_func is not None:
        return False
    model = trainer.accelerator.unwrap_model(trainer.model)
    head = getattr(model, "get_output_embeddings", None)
    return callable(head) and head() is not None
