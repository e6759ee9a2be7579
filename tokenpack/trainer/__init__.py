"""transformers' trainers with batches by tokens: `HierarchicalTokenTrainer`, `TokenBudgetTrainer`.

Each file imports only from files above it:

    arguments                                        the options of a token budget
    batches, shares, sampler                         batches of an epoch, and each rank's share
    example_lengths                                  lengths of a dataset's examples
    device_feed, measure, microbatch                 micro-batches of a collated batch
    loading                                          from planned indices to a collated batch
    signals                                          stop requests
    out_of_memory, ranks, step_share, step           one optimizer step
    base, loss, planning, evaluation, checkpoints    parts of the trainers
    decay, marks                                     weight decay; the log line of an evaluation
    callbacks, probing, trainer                      the trainers
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
