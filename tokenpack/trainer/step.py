"""One optimizer step: its batches as micro-batches, exactly, and again where memory ran out.

    loss = sum of all targets' losses / N        N = targets of the step: all batches, all ranks
         = sum over micro-batches m of  n_m / N * (mean loss of the n_m targets in m)

Each micro-batch's loss is asked for as the mean over its own targets: ``compute_loss`` is told
``num_items_in_batch = n_m``. Whether a loss divides by it or takes a mean of its own makes no
difference then, and weighting it by ``n_m / N`` is left to this file. DDP, FSDP and DeepSpeed
average gradients over ranks, so the weight is multiplied by their number, as in transformers.

What ranks tell each other, in a step: before it, three numbers (targets, micro-batches, whether to
stop), and with more than one rank, after it, whether all went through. Gradients are reduced once,
after that: under DDP a rank that is out of memory would otherwise leave the others waiting for its
part of a bucket for ever. The reduction is DDP's own, hooks and buckets included, run by a backward
of zeros into every parameter (`Accelerator.trigger_sync_in_backward`). Without retries, and where
the model itself communicates (FSDP, DeepSpeed), it runs within the last backward as usual.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.utils import logging

from .arguments import TokenBudget
from .microbatch import (
    DeviceFeed,
    PlannedBatch,
    Rows,
    ask_no_padding,
    measure,
    plan_microbatches,
    rounded_up,
    select_rows,
    to_device,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.get_logger(__name__)

# What CUDA's libraries say when they cannot allocate, beside what accelerate knows.
_ALLOCATION_FAILED = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


@dataclasses.dataclass
class Shape:
    """What of the model a step has to know.

    Attributes:
        two_sided: it has a decoder of its own, which labels belong to.
        shifts_labels: its loss takes the label of each token's neighbour.
        padded: it computes rows x columns, not real tokens alone.
        floats: its positions are relative, or counted from the first real token: columns of padding
            on the left can be left out.
        multiple: what padded widths are divisible by.
        hidden_size: how much attention weighs beside linear layers.
    """

    two_sided: bool
    shifts_labels: bool
    padded: bool
    floats: bool = True
    multiple: int = 1
    hidden_size: int = 1024


@dataclasses.dataclass
class Counts:
    """What happened to memory in this run; saved in checkpoints.

    Attributes:
        out_of_memory: steps that ran out of memory and were done again, or given up.
        skipped_sequences: sequences that did not fit alone and were left out.
        skipped_steps: steps given up.
    """

    out_of_memory: int = 0
    skipped_sequences: int = 0
    skipped_steps: int = 0


@dataclasses.dataclass
class Done:
    """What was computed since it was last asked for, on this rank; the longest in this run."""

    steps: int = 0
    microbatches: int = 0
    tokens: int = 0
    slots: int = 0
    longest: int = 0


class Micro(NamedTuple):
    """One micro-batch of this rank's share.

    Attributes:
        batch: which batch of the step it is of.
        chosen: rows of that.
        asked: targets of the loss among them.
        tokens: real tokens.
        slots: rows x columns of them.
        filler: there to have something to run in step with other ranks; without weight.
    """

    batch: int
    chosen: NDArray[np.int64]
    asked: int
    tokens: int
    slots: int
    filler: bool = False


class Failure(NamedTuple):
    """A micro-batch that memory did not suffice for; as ranks tell each other of it.

    Attributes:
        size: what it counted against the budget; 0 if there was no failure.
        sequences: how many it held.
        example: index in the dataset of the first, or -1.
        length: tokens of that.
        rank: whose it was.
        again: it held that one sequence and nothing else, for the second time in this step. The
            first time, memory may have been short for what lay beside it.
    """

    size: int = 0
    sequences: int = 0
    example: int = -1
    length: int = 0
    rank: int = 0
    again: int = 0


class OutOfMemoryInStepError(RuntimeError):
    """A step ran out of memory, and what could be done about that was done."""


@dataclasses.dataclass
class _Step:
    """What stays the same over the attempts at one step, and what each attempt learns."""

    model: nn.Module
    batches: Sequence[PlannedBatch]
    shares: list[Rows]
    inputs: list[Mapping[str, Any]]
    max_tokens: int  # the budget that it began with
    # Sequences by (batch, row):
    left_out: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    failed_alone: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    shrinks: int = 0


class StepRunner:
    """Runs optimizer steps for a trainer.

    Attributes:
        max_tokens: the micro-batch budget in force. It only shrinks; but a step in which a sequence
            turned out not to fit at all leaves it as it was.
        counts: see `Counts`.
        done: see `Done`.
        average_over_ranks: divide by the targets of all ranks, not by each rank's own.
        broadcasts_buffers: let DDP send the first rank's buffers to the others, as it does by
            itself. Those of transformers' models are the same everywhere.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        budget: TokenBudget,
        shape: Shape,
        mean_loss: Callable[[nn.Module, Mapping[str, Any], int], Tensor],
        backward: Callable[[Tensor], None],
    ) -> None:
        """Args: ``mean_loss(model, inputs, targets)``, and what computes a loss's gradients."""
        self.accelerator, self.budget, self.shape = accelerator, budget, shape
        self.mean_loss, self.backward = mean_loss, backward
        self.max_tokens = budget.max_tokens_per_microbatch
        self.counts, self.done = Counts(), Done()
        self.average_over_ranks, self.broadcasts_buffers = True, False
        self._feed = DeviceFeed(accelerator.device)

    # ------------------------------------------------------------------------------------ the step

    def run(
        self, model: nn.Module, batches: Sequence[PlannedBatch], stop: bool = False
    ) -> tuple[Tensor, bool]:
        """Accumulate the gradient of a whole step.

        Args:
            model: as accelerate prepared it, with no gradients.
            batches: this rank's share of each batch of the step.
            stop: this rank was asked to stop training.

        Returns:
            This rank's part of the loss, so scaled that its mean over ranks is that of the step;
            and whether any rank was asked to stop.

        Raises:
            ValueError: if a sequence is over the budget that the user set.
            OutOfMemoryInStepError: if memory does not suffice; on every rank.
        """
        asking = [self.asking(batch.inputs) for batch in batches]
        shares = [self._measured(batch, inputs) for batch, inputs in zip(batches, asking)]
        placed = [self._placed(inputs) for inputs in asking]
        step = _Step(model, batches, shares, placed, self.max_tokens)
        if self._may_retry(model):
            self._send_buffers(model, first_ones=self.broadcasts_buffers)
        dice = Dice(self.accelerator.device)
        while True:
            micros = self._plan(step)
            total, most, stop = self._exchange(micros, stop)
            micros = self._evened(step, micros, most)
            loss, failed = self._attempt(step, micros, total)
            failures, unused = self._agree(step, failed)
            if not failures:
                self._reduce(model, unused)
                self._satisfy_scaler(model)
                self._note(step, micros)
                return loss, stop
            model.zero_grad(set_to_none=True)
            if not self._recover(step, failures, failed):
                self._satisfy_scaler(model)
                return torch.zeros_like(loss), stop
            dice.roll_back()

    def compute_once(self, model: nn.Module, batch: PlannedBatch) -> None:
        """Forward and backward of a whole batch as one micro-batch, to see whether it fits."""
        inputs = self.asking(batch.inputs)
        shares = [self._measured(batch, inputs)]
        step = _Step(model, [batch], shares, [self._placed(inputs)], self.max_tokens)
        micro = self._micro(step, 0, np.arange(len(step.shares[0].source)))
        self._send_buffers(model, first_ones=False)
        piece = next(self._feed(iter([self._piece(step, micro)])))
        with self._no_sync(model):
            self.backward(self.mean_loss(model, piece, max(micro.asked, 1)))

    def _send_buffers(self, model: nn.Module, *, first_ones: bool) -> None:
        """Now, if at all: DDP would do it in the next forward.

        A rank that ran out of memory before it came to that would leave the others waiting.
        """
        ddp = _ddp(model)
        if ddp is not None:
            if first_ones:
                ddp._sync_buffers()
            ddp.require_forward_param_sync = False

    def _placed(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.budget.use_cpu_microbatch:
            return inputs
        return to_device(inputs, self.accelerator.device)

    def asking(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The batch as its targets are counted and computed."""
        return ask_no_padding(inputs) if self.shape.shifts_labels else inputs

    def measure(self, inputs: Mapping[str, Any]) -> Rows:
        """The batch's sequences, by what the model is."""
        rows = measure(
            inputs, two_sided=self.shape.two_sided, shifts_labels=self.shape.shifts_labels
        )
        return rows if self.shape.floats else rows._replace(first=np.zeros_like(rows.first))

    def _measured(self, batch: PlannedBatch, inputs: Mapping[str, Any]) -> Rows:
        rows = self.measure(inputs)
        if batch.examples is not None and len(batch.examples) != len(rows.source):
            batch.examples = None  # the collator joined or split what it was given
        limit = self.budget.max_tokens_per_microbatch
        sizes = rows.sizes(self.shape.multiple) if self.shape.padded else rows.tokens
        if bool((sizes > limit).any()):
            row = int(sizes.argmax())
            name = "a row" if batch.examples is None else f"example {batch.examples[row]}"
            raise ValueError(
                f"max_tokens_per_microbatch must hold every sequence, but {name} takes {sizes[row]}"
                f" after collating and the bound is {limit}: raise it, give the collator caps, or "
                "pass overlong='truncate' or 'drop'"
            )
        return rows

    # ------------------------------------------------------------------------------ micro-batches

    def _plan(self, step: _Step, more: int = 0) -> list[Micro]:
        """This rank's micro-batches; ``more`` than needed, if there are as many rows."""
        micros: list[Micro] = []
        for at, rows in enumerate(step.shares):
            if step.batches[at].filler:
                continue
            kept = np.array([r for r in range(len(rows.source)) if (at, r) not in step.left_out])
            if not len(kept):
                continue
            part = Rows(*(values[kept] for values in rows))
            groups = self._groups(part, 1)
            extra = min(more, len(kept) - len(groups))
            if extra > 0:
                groups = self._groups(part, len(groups) + extra)
                more -= extra
            micros += [self._micro(step, at, kept[group]) for group in groups]
        return micros

    def _groups(self, rows: Rows, at_least: int) -> list[NDArray[np.int64]]:
        return plan_microbatches(
            rows,
            self.max_tokens,
            padded=self.shape.padded,
            multiple=self.shape.multiple,
            hidden_size=self.shape.hidden_size,
            at_least=at_least,
        )

    def _micro(
        self, step: _Step, at: int, chosen: NDArray[np.int64], filler: bool = False
    ) -> Micro:
        rows = step.shares[at]
        sides = np.array([rows.columns[chosen].max(), rows.target[chosen].max()])
        return Micro(
            at,
            chosen,
            0 if filler else int(rows.asked[chosen].sum()),
            int(rows.tokens[chosen].sum()),
            len(chosen) * int(rounded_up(sides, self.shape.multiple).sum()),
            filler,
        )

    def _evened(self, step: _Step, micros: list[Micro], most: int) -> list[Micro]:
        """As many micro-batches as the rank that needs most of them has."""
        if len(micros) < most:
            micros = self._plan(step, most - len(micros))
        if len(micros) < most:
            at = min(range(len(step.shares)), key=lambda each: step.shares[each].tokens.min())
            row = step.shares[at].tokens.argmin()
            micros += [self._micro(step, at, np.array([row]), True)] * (most - len(micros))
        return micros

    def _attempt(
        self, step: _Step, micros: Sequence[Micro], total: int
    ) -> tuple[Tensor, Micro | None]:
        """Forward and backward of all: the loss, and the micro-batch that memory failed, if any."""
        if not self._waits(step.model):  # then what has no weight need not run
            micros = [micro for micro in micros if micro.asked]
        loss = torch.zeros((), device=self.accelerator.device)
        reached: list[Micro] = []
        try:
            self._compute(step, micros, total, loss, reached)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning(f"Out of memory: {error}")
        else:
            return loss, None
        # Outside of the except clause: the error's traceback keeps every frame's tensors alive.
        step.model.zero_grad(set_to_none=True)
        release_memory()
        return loss, reached[-1] if reached else micros[0]

    def _compute(
        self,
        step: _Step,
        micros: Sequence[Micro],
        total: int,
        loss: Tensor,
        reached: list[Micro],
    ) -> None:
        """Add each micro-batch's part to ``loss`` and to the gradients."""
        scale = self.accelerator.num_processes if self.average_over_ranks else 1
        pieces = self._feed(self._piece(step, micro) for micro in micros)
        for micro in micros:
            reached.append(micro)
            piece = next(pieces)
            weight = scale * micro.asked / total if total else 0.0
            with self._sync(step.model, last=micro is micros[-1]):
                part = self.mean_loss(step.model, piece, max(micro.asked, 1)) * weight
                self.backward(part)
            loss += part.detach()

    def _piece(self, step: _Step, micro: Micro) -> dict[str, Any]:
        piece = select_rows(
            step.inputs[micro.batch],
            step.shares[micro.batch],
            micro.chosen,
            two_sided=self.shape.two_sided,
            padded=self.shape.padded,
            multiple=self.shape.multiple,
        )
        for name in ("labels", "shift_labels"):
            labels = piece.get(name)
            if not micro.asked and isinstance(labels, Tensor):
                # A mean over nothing is no number, and zero times that is none either.
                piece[name] = labels = labels.clone()
                labels.view(len(labels), -1)[0, -1] = 0
        return piece

    # ---------------------------------------------------------------------------- between ranks

    def _exchange(self, micros: Sequence[Micro], stop: bool) -> tuple[int, int, bool]:
        """Targets of the step, micro-batches of the rank with most, whether any is to stop."""
        mine = [sum(micro.asked for micro in micros), len(micros), int(stop)]
        everyone = self.gather(mine)
        total = sum(numbers[0] for numbers in everyone) if self.average_over_ranks else mine[0]
        return total, max(numbers[1] for numbers in everyone), any(n[2] for n in everyone)

    def _agree(self, step: _Step, failed: Micro | None) -> tuple[list[Failure], bool]:
        """Failures of all ranks, and whether some rank has parameters without a gradient."""
        mine = Failure() if failed is None else self._failure(step, failed)
        if failed is not None and not self._may_retry(step.model):
            raise OutOfMemoryInStepError(
                f"{_described(mine)}; lower max_tokens_per_microbatch, which is {self.max_tokens} "
                "(the step cannot be done again with oom_max_retries=0, nor where a failed "
                "forward leaves other ranks waiting inside theirs: FSDP, DeepSpeed)"
            )
        if self.accelerator.num_processes == 1 or not self._may_retry(step.model):
            return ([mine] if failed else []), False
        unused = any(p.grad is None for p in step.model.parameters() if p.requires_grad)
        everyone = self.gather([*mine, int(unused)])
        return [Failure(*n[:-1]) for n in everyone if n[0]], any(n[-1] for n in everyone)

    def _failure(self, step: _Step, micro: Micro) -> Failure:
        row = int(micro.chosen[0])
        examples = step.batches[micro.batch].examples
        return Failure(
            max(micro.slots if self.shape.padded else micro.tokens, 1),
            len(micro.chosen),
            -1 if examples is None else examples[row],
            int(step.shares[micro.batch].tokens[row]),
            self.accelerator.process_index,
            int(len(micro.chosen) == 1 and (micro.batch, row) in step.failed_alone),
        )

    def gather(self, numbers: list[int]) -> list[list[int]]:
        """Everyone's ``numbers``, by rank."""
        if self.accelerator.num_processes == 1:
            return [numbers]
        mine = torch.tensor([numbers], device=self.accelerator.device)
        return self.accelerator.gather(mine).tolist()

    def _reduce(self, model: nn.Module, unused: bool) -> None:
        """Average gradients over ranks, if the last backward did not."""
        ddp = _ddp(model)
        if ddp is None or self._waits(model):
            return
        parameters = [p for p in ddp.parameters() if p.requires_grad]
        used = torch.ones(len(parameters), dtype=torch.int32, device=self.accelerator.device)
        if unused:  # what no rank used gets no gradient, and so no weight decay
            for at, parameter in enumerate(parameters):
                used[at] = int(parameter.grad is not None)
            dist.all_reduce(used, dist.ReduceOp.MAX, group=ddp.process_group)
        with self.accelerator.trigger_sync_in_backward(ddp):
            torch.autograd.backward(parameters, [p.new_zeros(()).expand_as(p) for p in parameters])
        # Once, DDP orders its buckets anew, for which ranks talk. It would do so in its next
        # forward, and a rank may have none, or not come to it.
        ddp.reducer._rebuild_buckets()
        if unused:
            for parameter, is_used in zip(parameters, used.tolist()):
                parameter.grad = parameter.grad if is_used else None

    def _satisfy_scaler(self, model: nn.Module) -> None:
        """A gradient of zeros where there is none at all: fp16's scaler cannot step on nothing.

        Of the smallest parameter alone, since an optimizer leaves those without a gradient as they
        are, weight decay included.
        """
        scaler = self.accelerator.scaler
        trained = [p for p in model.parameters() if p.requires_grad]
        if scaler is None or not trained or any(p.grad is not None for p in trained):
            return
        least = min(trained, key=lambda p: p.numel())
        scaler.scale(least.new_zeros((), dtype=torch.float32))  # sets it up, if that was the first
        least.grad = torch.zeros_like(least)

    def _may_retry(self, model: nn.Module) -> bool:
        """Whether a step can be done again after it failed on some rank."""
        return self.budget.oom_max_retries > 0 and not self.communicates(model)

    def communicates(self, model: nn.Module) -> bool:
        """Whether each forward waits for other ranks, so that all must run as many."""
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return True
        return self.accelerator.num_processes > 1 and _ddp(model) is None

    def _waits(self, model: nn.Module) -> bool:
        """Whether ranks wait for each other within forward or backward, if but in the last."""
        within_backward = _ddp(model) is not None and self.budget.oom_max_retries == 0
        return within_backward or self.communicates(model)

    @contextlib.contextmanager
    def _sync(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """A forward and backward; gradients are reduced in the last, unless `_reduce` does that."""
        reduces = last and (_ddp(model) is None or self._waits(model))
        self.accelerator.gradient_state._set_sync_gradients(reduces)  # DeepSpeed steps by this
        try:
            with contextlib.nullcontext() if reduces else self._no_sync(model):
                yield
        finally:
            self.accelerator.gradient_state._set_sync_gradients(True)

    def _no_sync(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        # accelerate's does nothing for DDP on one rank, which reduces all the same.
        ddp = _ddp(model)
        return self.accelerator.no_sync(model) if ddp is None else ddp.no_sync()

    # ------------------------------------------------------------------------------- out of memory

    def _recover(self, step: _Step, failures: Sequence[Failure], failed: Micro | None) -> bool:
        """Make the next attempt a smaller one. False if the step is given up."""
        self.counts.out_of_memory += 1
        hopeless = [failure for failure in failures if failure.again]
        if hopeless and not self.budget.oom_skip_batch_on_fail:
            raise OutOfMemoryInStepError(
                f"{_described(hopeless[0])}: it does not fit alone. Shorten or drop it (overlong=),"
                " or pass oom_skip_batch_on_fail=True to leave such sequences out"
            )
        if hopeless:
            self.counts.skipped_sequences += len(hopeless)
            logger.warning("; ".join(f"Left out: {_described(each)}" for each in hopeless))
        if failed is not None and len(failed.chosen) == 1:
            sequence = (failed.batch, int(failed.chosen[0]))
            known = sequence in step.failed_alone
            (step.left_out if known else step.failed_alone).add(sequence)
        several = [failure.size for failure in failures if failure.sequences > 1]
        if hopeless:  # whatever it was that it cost the budget, that was in vain
            self.max_tokens, step.shrinks = step.max_tokens, 0
        if len(hopeless) == len(failures):
            return True
        if step.shrinks == self.budget.oom_max_retries:
            return self._give_up(failures)
        step.shrinks += 1
        before, self.max_tokens = self.max_tokens, max(min([self.max_tokens, *several]) // 2, 1)
        logger.warning(
            f"{_described(failures[0])}. Micro-batches now take {self.max_tokens} tokens instead"
            f" of {before}, and the step is done again."
        )
        return True

    def _give_up(self, failures: Sequence[Failure]) -> bool:
        message = f"{_described(failures[0])}, after {self.budget.oom_max_retries} smaller tries"
        if not self.budget.oom_skip_batch_on_fail:
            raise OutOfMemoryInStepError(
                f"{message}: lower max_tokens_per_microbatch, which is {self.max_tokens} by now, "
                "or raise oom_max_retries"
            )
        self.counts.skipped_steps += 1
        logger.warning(f"{message}: the step is left out")
        return False

    def _note(self, step: _Step, micros: Sequence[Micro]) -> None:
        real = [micro for micro in micros if not micro.filler]
        self.done.steps += 1
        self.done.microbatches += len(real)
        self.done.tokens += sum(micro.tokens for micro in real)
        self.done.slots += sum(micro.slots for micro in real)
        for batch, rows in zip(step.batches, step.shares):
            if not batch.filler:
                self.done.longest = max(self.done.longest, int(rows.tokens.max()))


class Dice:
    """The random number generators that a forward draws from, to draw the same once more."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def roll_back(self) -> None:
        """Back to when this was made."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is any library's way of saying that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return should_reduce_batch_size(error) or any(
        status in str(error) for status in _ALLOCATION_FAILED
    )


def _described(failure: Failure) -> str:
    example = "a sequence" if failure.example < 0 else f"example {failure.example}"
    more = f" and {failure.sequences - 1} more" if failure.sequences > 1 else ""
    return (
        f"Rank {failure.rank} ran out of memory on {example} ({failure.length} tokens){more}, "
        f"{failure.size} against the budget"
    )


def _ddp(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """The DDP wrapper, if there is one; ``torch.compile`` may have wrapped that again."""
    model = getattr(model, "_orig_mod", model)
    return model if isinstance(model, nn.parallel.DistributedDataParallel) else None


def release_memory() -> None:
    """Give back what nothing refers to any longer, to the device too."""
    gc.collect()
    clear_device_cache()
