"""transformers' trainers with batches by tokens: `HierarchicalTokenTrainer`, `TokenBudgetTrainer`.

Each file imports only from files above it:

    arguments                            the options of a token budget
    batches, sharing, sampler            the batches of an epoch, and each rank's share of them
    example_lengths                      the lengths of a dataset's examples
    device_feed, measure, microbatch     split a collated batch
    loading, signals                     from indices to collated batches; stop requests
    out_of_memory, ranks, step_share, step   one optimizer step
    base, loss, planning, evaluation, checkpoints   the parts of the trainers
    callbacks, probing, trainer          the trainers
"""

from __future__ import annotations

from .arguments import TokenBudget, TokenBudgetArguments
from .example_lengths import dataset_lengths
from .out_of_memory import OutOfMemoryInStepError
from .sampler import TokenBudgetBatchSampler
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
