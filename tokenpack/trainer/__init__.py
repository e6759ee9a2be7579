"""transformers' trainers, batching by tokens: `HierarchicalTokenTrainer`, `TokenBudgetTrainer`."""

from __future__ import annotations

from .arguments import TokenBudget, TokenBudgetArguments
from .example_lengths import dataset_lengths
from .sampler import TokenBudgetBatchSampler
from .step import OutOfMemoryInStepError
from .trainer import HierarchicalTokenTrainer, TokenBudgetTrainer

__all__ = [
    "HierarchicalTokenTrainer",
    "OutOfMemoryInStepError",
    "TokenBudget",
    "TokenBudgetArguments",
    "TokenBudgetBatchSampler",
    "TokenBudgetTrainer",
    "dataset_lengths",
]
