"""One optimizer step: exact gradients from micro-batches, and a retry if memory runs out.

    loss = sum of all targets' losses / N        N = targets of the step: all batches, all ranks
         = sum over micro-batches m of  n_m / N * (mean loss of the n_m targets in m)

The loss of a micro-batch is computed as the mean over its own targets: ``compute_loss`` gets
``num_items_in_batch = n_m``. A loss that divides by this number and a loss that ignores it and
takes the mean itself then agree, and this file applies the weight ``n_m / N``. DDP, FSDP and
DeepSpeed average gradients over ranks, so the weight is multiplied by the number of ranks, as in
transformers.

Before a step, the ranks exchange three numbers: targets, micro-batches, and whether to stop. After
it, they exchange whether all of them succeeded. Then the gradients are reduced; see `ranks`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import release_memory, send_to_device
from torch import Tensor, nn
from transformers.utils import logging

from .arguments import TokenBudget
from .device_feed import DeviceFeed
from .measure import ModelTraits, SequenceSizes
from .microbatch import PlannedBatch
from .out_of_memory import (
    Counts,
    Failure,
    OutOfMemoryInStepError,
    RngSnapshot,
    is_out_of_memory,
)
from .ranks import Ranks
from .step_share import MicroBatch, StepShare

logger = logging.get_logger(__name__)


@dataclasses.dataclass
class Progress:
    """What this rank has computed since the last log, and the longest sequence of the run."""

    steps: int = 0
    microbatches: int = 0
    tokens: int = 0
    slots: int = 0
    longest: int = 0


@dataclasses.dataclass
class _Attempts:
    """The state of a step across its attempts.

    Attributes:
        max_tokens: the micro-batch budget before the first attempt.
        num_shrinks: how often the budget has been lowered.
        failed_by_itself: ``(batch, row)`` of each sequence that has failed as the only one of its
            micro-batch.
    """

    max_tokens: int
    num_shrinks: int = 0
    failed_by_itself: set[tuple[int, int]] = dataclasses.field(default_factory=set)


class StepRunner:
    """Runs optimizer steps for a trainer.

    Attributes:
        max_tokens: the micro-batch budget in force. It only decreases. If a sequence of a step does
            not fit at all, the budget from before the step is restored.
        counts: see `Counts`.
        progress: see `Progress`.
        average_over_ranks: divide by the targets of all ranks, not by those of each rank.
        broadcasts_buffers: send the first rank's buffers to the other ranks before each step, as
            DDP does by default. In models of transformers, the buffers of all ranks are equal.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        budget: TokenBudget,
        traits: ModelTraits,
        mean_loss: Callable[[nn.Module, Mapping[str, Any], int], Tensor],
        backward: Callable[[Tensor], None],
    ) -> None:
        """Set up the runner.

        Args:
            accelerator: accelerate's state of this process.
            budget: the token budget.
            traits: the properties of the model.
            mean_loss: ``mean_loss(model, inputs, num_targets)`` returns the loss of a micro-batch.
            backward: computes the gradients of a loss.
        """
        self.accelerator, self.budget, self.traits = accelerator, budget, traits
        self.mean_loss, self.backward = mean_loss, backward
        self.max_tokens = budget.max_tokens_per_microbatch
        self.counts, self.progress = Counts(), Progress()
        self.average_over_ranks, self.broadcasts_buffers = True, False
        self.ranks = Ranks(accelerator, retries=budget.oom_max_retries > 0)
        self._feed = DeviceFeed(accelerator.device)

    # ------------------------------------------------------------------------------------ the step

    def run(
        self, model: nn.Module, batches: Sequence[PlannedBatch], stop: bool = False
    ) -> tuple[Tensor, bool]:
        """Accumulate the gradient of a whole step.

        Args:
            model: the model as prepared by accelerate, without gradients.
            batches: this rank's share of each batch of the step.
            stop: this rank has received a request to stop training.

        Returns:
            This rank's part of the loss, scaled so that the mean over ranks is the loss of the
            step, and whether any rank has received a request to stop.

        Raises:
            ValueError: if a sequence exceeds ``max_tokens_per_microbatch``.
            OutOfMemoryInStepError: on every rank, if the step does not fit in memory.
        """
        share = self._share_of(batches)
        attempts = _Attempts(self.max_tokens)
        if self.ranks.may_retry(model):
            self.ranks.send_buffers(model, from_first=self.broadcasts_buffers)
        rng = RngSnapshot(self.accelerator.device)
        while True:
            microbatches = share.split(self.max_tokens)
            num_targets, most, stop = self._exchange(microbatches, stop)
            microbatches = share.split_into(most, microbatches, self.max_tokens)
            loss, failed = self._attempt(model, share, microbatches, num_targets)
            failures, unused = self._exchange_failures(model, share, attempts, failed)
            if not failures:
                self.ranks.reduce(model, unused)
                self.ranks.ensure_gradient(model)
                self._note(share, microbatches)
                return loss, stop
            model.zero_grad(set_to_none=True)
            if not self._recover(share, attempts, failures, failed):
                self.ranks.ensure_gradient(model)
                return torch.zeros_like(loss), stop
            rng.restore()

    def compute_once(self, model: nn.Module, batch: PlannedBatch) -> None:
        """Run forward and backward of a whole batch as one micro-batch, to test whether it fits."""
        share = self._share_of([batch])
        microbatch = share.microbatch(0, np.arange(len(share.sizes[0].source)))
        self.ranks.send_buffers(model, from_first=False)
        inputs = next(self._feed(iter([share.inputs_of(microbatch)])))
        with self.ranks.no_sync(model):
            self.backward(self.mean_loss(model, inputs, max(microbatch.num_targets, 1)))

    def _share_of(self, batches: Sequence[PlannedBatch]) -> StepShare:
        """Measure the batches, and copy them to the device unless micro-batches are copied."""
        inputs = [self.traits.loss_inputs(batch.inputs) for batch in batches]
        sizes = [self._measure(batch, each) for batch, each in zip(batches, inputs)]
        if not self.budget.use_cpu_microbatch:
            device = self.accelerator.device
            inputs = [send_to_device(each, device, non_blocking=True) for each in inputs]
        return StepShare(batches, sizes, inputs, self.traits)

    def _measure(self, batch: PlannedBatch, inputs: Mapping[str, Any]) -> SequenceSizes:
        sizes = self.traits.measure(inputs)
        if batch.examples is not None and len(batch.examples) != len(sizes.source):
            batch.examples = None  # the collator joined or split examples
        limit = self.budget.max_tokens_per_microbatch
        counts = sizes.slots(self.traits.multiple) if self.traits.padded else sizes.tokens
        if bool((counts > limit).any()):
            row = int(counts.argmax())
            name = "a row" if batch.examples is None else f"example {batch.examples[row]}"
            raise ValueError(
                f"max_tokens_per_microbatch must hold every sequence, got {limit}, but {name} has "
                f"{counts[row]} tokens after collation; raise it, limit the lengths in the collator"
                ", or pass overlong='truncate' or 'drop'"
            )
        return sizes

    def _attempt(
        self,
        model: nn.Module,
        share: StepShare,
        microbatches: Sequence[MicroBatch],
        num_targets: int,
    ) -> tuple[Tensor, MicroBatch | None]:
        """Run all micro-batches. Returns the loss, and the one that ran out of memory, if any."""
        if not self.ranks.step_communicates(model):
            # Other ranks do not wait for micro-batches without weight, so skip them.
            microbatches = [each for each in microbatches if each.num_targets]
        loss = torch.zeros((), device=self.accelerator.device)
        reached: list[MicroBatch] = []
        try:
            self._compute(model, share, microbatches, num_targets, loss, reached)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning(f"Out of memory: {error}")
        else:
            return loss, None
        # Outside the except clause, because the error's traceback keeps the tensors alive.
        model.zero_grad(set_to_none=True)
        release_memory()
        return loss, reached[-1] if reached else microbatches[0]

    def _compute(
        self,
        model: nn.Module,
        share: StepShare,
        microbatches: Sequence[MicroBatch],
        num_targets: int,
        loss: Tensor,
        reached: list[MicroBatch],
    ) -> None:
        """Add the part of each micro-batch to ``loss`` and to the gradients."""
        scale = self.accelerator.num_processes if self.average_over_ranks else 1
        on_device = self._feed(share.inputs_of(each) for each in microbatches)
        for microbatch in microbatches:
            reached.append(microbatch)
            inputs = next(on_device)
            weight = scale * microbatch.num_targets / num_targets if num_targets else 0.0
            last = microbatch is microbatches[-1]
            with self.ranks.backward_context(model, last=last):
                part = self.mean_loss(model, inputs, max(microbatch.num_targets, 1)) * weight
                self.backward(part)
            loss += part.detach()

    def _exchange(self, microbatches: Sequence[MicroBatch], stop: bool) -> tuple[int, int, bool]:
        """The step's targets, the largest number of micro-batches, and whether any rank stops."""
        mine = [sum(each.num_targets for each in microbatches), len(microbatches), int(stop)]
        by_rank = self.ranks.gather(mine)
        num_targets = sum(numbers[0] for numbers in by_rank)
        if not self.average_over_ranks:
            num_targets = mine[0]
        return num_targets, max(numbers[1] for numbers in by_rank), any(n[2] for n in by_rank)

    def _note(self, share: StepShare, microbatches: Sequence[MicroBatch]) -> None:
        """Add the step to the progress."""
        real = [each for each in microbatches if not each.filler]
        self.progress.steps += 1
        self.progress.microbatches += len(real)
        self.progress.tokens += sum(each.tokens for each in real)
        self.progress.slots += sum(each.slots for each in real)
        for batch, sizes in zip(share.batches, share.sizes):
            if not batch.filler:
                self.progress.longest = max(self.progress.longest, int(sizes.tokens.max()))

    # ------------------------------------------------------------------------------- out of memory

    def _exchange_failures(
        self, model: nn.Module, share: StepShare, attempts: _Attempts, failed: MicroBatch | None
    ) -> tuple[list[Failure], bool]:
        """The failures of all ranks, and whether some rank has parameters without a gradient."""
        mine = Failure()
        if failed is not None:
            mine = self._failure_of(failed, share, attempts)
            if not self.ranks.may_retry(model):
                raise OutOfMemoryInStepError(
                    f"{mine}; lower max_tokens_per_microbatch, which is {self.max_tokens} (the "
                    "step cannot be repeated with oom_max_retries=0, or if the forward waits for "
                    "other ranks: FSDP, DeepSpeed)"
                )
        if self.accelerator.num_processes == 1 or not self.ranks.may_retry(model):
            return ([mine] if failed else []), False
        unused = any(p.grad is None for p in model.parameters() if p.requires_grad)
        by_rank = self.ranks.gather([*mine, int(unused)])
        return [Failure(*n[:-1]) for n in by_rank if n[0]], any(n[-1] for n in by_rank)

    def _failure_of(self, failed: MicroBatch, share: StepShare, attempts: _Attempts) -> Failure:
        row = int(failed.rows[0])
        examples = share.batches[failed.batch].examples
        return Failure(
            size=max(failed.slots if self.traits.padded else failed.tokens, 1),
            num_sequences=len(failed.rows),
            example=-1 if examples is None else examples[row],
            length=int(share.sizes[failed.batch].tokens[row]),
            rank=self.accelerator.process_index,
            is_final=int(
                len(failed.rows) == 1 and (failed.batch, row) in attempts.failed_by_itself
            ),
        )

    def _recover(
        self,
        share: StepShare,
        attempts: _Attempts,
        failures: Sequence[Failure],
        failed: MicroBatch | None,
    ) -> bool:
        """Make the next attempt smaller. Returns False if the step is skipped instead."""
        self.counts.out_of_memory += 1
        final = [failure for failure in failures if failure.is_final]
        if final and not self.budget.oom_skip_batch_on_fail:
            raise OutOfMemoryInStepError(
                f"{final[0]}: the sequence does not fit in memory by itself. Shorten or drop it "
                "(overlong=), or pass oom_skip_batch_on_fail=True to skip such sequences"
            )
        if final:
            self.counts.skipped_sequences += len(final)
            logger.warning("; ".join(f"Skipped: {failure}" for failure in final))
        if failed is not None and len(failed.rows) == 1:
            sequence = (failed.batch, int(failed.rows[0]))
            repeated = sequence in attempts.failed_by_itself
            (share.skipped if repeated else attempts.failed_by_itself).add(sequence)
        if final:
            # Lowering the budget did not help, so restore it.
            self.max_tokens, attempts.num_shrinks = attempts.max_tokens, 0
        if len(final) == len(failures):
            return True
        if attempts.num_shrinks == self.budget.oom_max_retries:
            self._skip_step(failures[0])
            return False
        attempts.num_shrinks += 1
        before = self.max_tokens
        divisible = [failure.size for failure in failures if failure.num_sequences > 1]
        self.max_tokens = max(min([before, *divisible]) // 2, 1)
        logger.warning(
            f"{failures[0]}. Lowering the micro-batch budget from {before} to {self.max_tokens} "
            "tokens and repeating the step."
        )
        return True

    def _skip_step(self, failure: Failure) -> None:
        """Count a skipped step, or raise an error if steps must not be skipped."""
        message = f"{failure}, after {self.budget.oom_max_retries} retries with smaller budgets"
        if not self.budget.oom_skip_batch_on_fail:
            raise OutOfMemoryInStepError(
                f"{message}; lower max_tokens_per_microbatch, which is now {self.max_tokens}, or "
                "raise oom_max_retries"
            )
        self.counts.skipped_steps += 1
        logger.warning(f"{message}: skipping the step")
