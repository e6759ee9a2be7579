"""Recognize out-of-memory errors, and describe them across ranks."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from accelerate.utils.memory import should_reduce_batch_size

# Allocation errors of CUDA's libraries that accelerate does not recognize.
_ALLOCATION_FAILED = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


class OutOfMemoryInStepError(RuntimeError):
    """A step ran out of memory and cannot be repeated, or all retries failed."""


@dataclasses.dataclass
class Counts:
    """Counts of out-of-memory errors in this run. Checkpoints contain them.

    Attributes:
        out_of_memory: attempts at a step that ran out of memory.
        skipped_sequences: sequences that did not fit by themselves and were skipped.
        skipped_steps: steps that were skipped.
    """

    out_of_memory: int = 0
    skipped_sequences: int = 0
    skipped_steps: int = 0


class Failure(NamedTuple):
    """A micro-batch that ran out of memory, as integers that ranks exchange.

    Attributes:
        size: its tokens, or slots, that count against the budget. 0 if there was no failure.
        num_sequences: the number of its sequences.
        example: the dataset index of its first sequence, or -1 if unknown.
        length: the tokens of its first sequence.
        rank: the rank it ran on.
        is_final: 1 if it held a single sequence that has already failed by itself in this step. The
            first such failure is not final: other tensors may have filled the memory.
    """

    size: int = 0
    num_sequences: int = 0
    example: int = -1
    length: int = 0
    rank: int = 0
    is_final: int = 0

    def __str__(self) -> str:
        example = "a sequence" if self.example < 0 else f"example {self.example}"
        more = f" and {self.num_sequences - 1} more" if self.num_sequences > 1 else ""
        return (
            f"Rank {self.rank} ran out of memory on {example} ({self.length} tokens){more}, "
            f"{self.size} against the budget"
        )


class RngSnapshot:
    """The states of the random number generators that a forward uses, to repeat the forward."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Set the generators to the states in the snapshot."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of any library means that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return should_reduce_batch_size(error) or any(
        status in str(error) for status in _ALLOCATION_FAILED
    )
