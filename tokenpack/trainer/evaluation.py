"""Evaluation and prediction by tokens: sharded, sorted by length, and back in dataset order.

    loss = sum of all targets' losses / all targets        over all batches and ranks

transformers' own loop runs, gathers and pads; here it is given other batches, and what it made is
put in order. A step takes one block of the examples sorted by length, longest first, and gives each
rank as many rows of it. Where examples do not suffice, a rank repeats one, so that every rank has
rows to gather. What is repeated is not computed, as long as the rank has rows of its own, and
weighs nothing; it is left out where rows are gathered. Each rank knows the whole plan, and so which
row is which example.

Packed batches are padded first: what is gathered, and `generate`, are by rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import (
    EvalPrediction,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import EvalLoopOutput, has_length

from .base import TrainerBase
from .loading import PlannedDataset
from .microbatch import PlannedBatch, is_packed, rounded_up


class EvaluationSampler(Sampler[list[int]]):
    """Each step of evaluation: as many rows for every rank, of similar lengths.

    Args:
        lengths: ``(n, 2)`` source and target tokens.
        max_tokens: most slots (rows x columns) of one rank's batch. A longer example has a batch to
            itself.
        num_ranks, rank: how many there are, and which this is.
        in_order: keep dataset order in place of sorting by length.
        multiple: columns of either side are padded to a multiple of this.

    Attributes:
        order: ``(n,)`` int64, index of each example as ranks' rows are gathered step by step.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        max_tokens: int,
        *,
        num_ranks: int = 1,
        rank: int = 0,
        in_order: bool = False,
        multiple: int = 1,
    ) -> None:
        examples = np.arange(len(lengths))
        if not in_order:
            examples = np.lexsort((-lengths[:, 1], -lengths[:, 0]))
        sizes = rounded_up(lengths[examples], multiple)
        self.in_order, self.order = in_order, examples
        self._rank = rank
        self._steps = [
            _dealt(examples[block], num_ranks) for block in _blocks(sizes, max_tokens, num_ranks)
        ]

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[int]]:
        return (step[self._rank].tolist() for step in self._steps)

    def real(self, step: int) -> NDArray[np.bool_]:
        """``(num_ranks, rows)``, which rows of a step are not repeated ones."""
        return self._steps[step] >= 0


def _blocks(lengths: NDArray[np.int64], max_tokens: int, num_ranks: int) -> Iterator[slice]:
    """Consecutive examples, as many that each rank's rows take at most ``max_tokens`` slots.

    Ranks are given a row each at a time, which either all have room for or none.
    """
    starts = np.arange(0, len(lengths), num_ranks)
    begin = source = target = 0
    largest = np.maximum.reduceat(lengths, starts) if len(lengths) else lengths
    for start, (one, other) in zip(starts.tolist(), largest.tolist()):
        source, target = max(source, one), max(target, other)
        rows = (start - begin) // num_ranks + 1
        if rows > 1 and rows * (source + target) > max_tokens:
            yield slice(begin, start)
            begin, source, target = start, one, other
    if len(lengths):
        yield slice(begin, len(lengths))


def _dealt(block: NDArray[np.int64], num_ranks: int) -> NDArray[np.int64]:
    """``(num_ranks, rows)``, the block and maybe its last example over again as ``-1 - index``."""
    rows = -(-len(block) // num_ranks)
    missing = rows * num_ranks - len(block)
    return np.append(block, np.full(missing, -1 - block[-1])).reshape(num_ranks, rows)


class RowsCollator:
    """Collates as the user's collator does; what that packs is padded, a row for each sample."""

    def __init__(self, collator: Callable[[list[Any]], Any], pad_token_id: int) -> None:
        self.collator, self.pad_token_id = collator, pad_token_id

    def __call__(self, samples: list[Any]) -> Any:
        """Collate ``samples``.

        Raises:
            ValueError: if the collator drops samples or splits them, so that no row is theirs.
        """
        batch = self.collator(samples)
        if not (isinstance(batch, Mapping) and is_packed(batch)):
            return batch
        rows = batch.padded(self.pad_token_id)  # type: ignore[attr-defined]
        plan = getattr(batch, "plan", None)
        if plan is None:
            return rows
        back = np.argsort(plan.items, kind="stable")  # a packer puts samples where they fit
        if not np.array_equal(plan.items[back], np.arange(len(samples))):
            raise ValueError(
                f"data_collator must give each of {len(samples)} samples one sequence to be "
                f"evaluated by, got {len(plan.items)} (overlong='truncate' or 'error' does)"
            )
        return {name: value[torch.from_numpy(back)] for name, value in rows.items()}


@dataclasses.dataclass(eq=False)
class _Evaluation(TrainerCallback):
    """An evaluation while it runs: where it is, and the losses of this rank's batches so far."""

    plan: EvaluationSampler | None
    step: int = 0
    losses: list[Tensor] = dataclasses.field(default_factory=list)
    counts: list[int] = dataclasses.field(default_factory=list)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """All of the step is gathered by now."""
        self.step += 1


class EvaluationMixin(TrainerBase):
    """Evaluation for the trainers."""

    _evaluation: _Evaluation | None = None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Batches of at most ``max_eval_tokens_per_microbatch`` slots, of this rank's rows.

        Those of an `IterableDataset` are of ``per_device_eval_batch_size`` rows, as in `Trainer`.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if can_be_planned(dataset):
            return self._evaluation_loader(dataset, "Evaluation")
        with self._collating_rows():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """The same for `predict`."""
        if can_be_planned(test_dataset):
            return self._evaluation_loader(test_dataset, "test")
        with self._collating_rows():
            return super().get_test_dataloader(test_dataset)

    def _evaluation_loader(self, dataset: Any, description: str) -> DataLoader:
        lengths = self._lengths_of(dataset)
        # Lists of batches, and metrics by batch, are in the order of the dataset only if these are.
        in_order = not self.args.eval_do_concat_batches or self.args.batch_eval_metrics
        sampler = EvaluationSampler(
            lengths,
            self.budget.max_eval_tokens_per_microbatch,
            num_ranks=self.args.world_size,
            rank=self.args.process_index,
            in_order=in_order,
            multiple=int(getattr(self.data_collator, "pad_to_multiple_of", None) or 1),
        )
        view = PlannedDataset(dataset, np.arange(len(lengths)))
        with self._collating_rows():
            return self._planned_loader(view, sampler, description)

    @contextlib.contextmanager
    def _collating_rows(self) -> Iterator[None]:
        collator = self.data_collator
        pad = getattr(self.processing_class, "pad_token_id", None)
        if pad is None:
            pad = getattr(getattr(self.model, "config", None), "pad_token_id", None) or 0
        self.data_collator = RowsCollator(collator, pad)
        try:
            yield
        finally:
            self.data_collator = collator

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`, with a loss by tokens and rows in dataset order."""
        sampler = getattr(dataloader, "batch_sampler", None)
        plan = sampler if isinstance(sampler, EvaluationSampler) else None
        running, user_metrics, outer = _Evaluation(plan), self.compute_metrics, self._evaluation
        begun = time.perf_counter()
        self._evaluation = running
        self.add_callback(running)
        if plan is not None:
            self.gather_function = partial(self._gather_without_repeats, plan, running)
            if user_metrics is not None:
                self.compute_metrics = _metrics_by(plan, running, user_metrics)
        try:
            with self._prepared_for_now():
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
            loss = self._mean_evaluation_loss(running)
        finally:
            self._last_logged += time.perf_counter() - begun  # tokens/s are those of training
            self.remove_callback(running)
            self.gather_function = self.accelerator.gather_for_metrics
            self.compute_metrics, self._evaluation = user_metrics, outer
        if loss is not None and f"{metric_key_prefix}_loss" in output.metrics:
            output.metrics[f"{metric_key_prefix}_loss"] = loss
        if plan is None or plan.in_order:
            return output
        return output._replace(
            predictions=_in_order(output.predictions, plan.order),
            label_ids=_in_order(output.label_ids, plan.order),
        )

    @contextlib.contextmanager
    def _prepared_for_now(self) -> Iterator[None]:
        """Before training, leave no trace of how the model was prepared for evaluation.

        Accelerate would not prepare it once more, and ranks would train without DDP, each with the
        gradients of its own. transformers' trainers do so, without a word.
        """
        prepared = self.accelerator._models or self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.args.world_size == 1 or prepared:
            yield
            return
        wrapped, before = self.model_wrapped, set(vars(self.model))
        try:
            yield
        finally:
            self.accelerator._models.clear()
            self.model_wrapped = wrapped
            for name in {"_is_accelerate_prepared", "_original_forward", "forward"} - before:
                self.model.__dict__.pop(name, None)

    def _gather_without_repeats(
        self, plan: EvaluationSampler, running: _Evaluation, values: Any
    ) -> Any:
        """Gather the outputs of a step from all ranks, and drop those of repeated rows."""
        real = plan.real(running.step)
        rows, repeats = real.shape[1], self.args.eval_batch_size
        if isinstance(values, Tensor) and values.dim() == 1 and len(values) == repeats != rows:
            values = values[:1].repeat(rows)  # the loss of a batch, for as many as are usual
        gathered = self.accelerator.gather(values)
        return gathered if real.all() else _chosen(gathered, np.flatnonzero(real), real.size)

    def _mean_evaluation_loss(self, running: _Evaluation) -> float | None:
        """The mean over all targets, NaN without targets, None if no loss was computed."""
        losses, counts = running.losses, running.counts
        if not losses:
            return None
        means = torch.stack(losses).tolist()
        total = sum(mean * count for mean, count in zip(means, counts) if count)
        numbers = torch.tensor([total, sum(counts)], dtype=torch.float64)
        if self.args.world_size > 1:
            device = self.args.device
            dtype = torch.float32 if device.type == "mps" else torch.float64
            numbers = self.accelerator.reduce(numbers.to(device, dtype), "sum").cpu()
        total, count = numbers.tolist()
        return total / count if count else float("nan")

    def prediction_step(
        self,
        model: Any,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **options: Any,
    ) -> tuple[Any, Any, Any]:
        """As the trainer's own; what the loss weighs is noted."""
        rows, own = self._rows(inputs)
        batch = _first_rows(inputs, own or rows, rows)  # something must run, with other ranks
        batch.pop(self.budget.length_column_name, None)  # collators add it; no model takes it
        asking = self.runner.asking(batch)
        count = int(self.runner.measure(asking).asked.sum()) if own else 0
        with self._by_itself(), self._told_of_targets():
            loss, logits, labels = super().prediction_step(
                model,
                self._with_decoder_inputs(asking),
                prediction_loss_only,
                ignore_keys,
                **options,
            )
        if loss is not None and self._evaluation is not None:
            self._evaluation.losses.append(loss.detach())
            self._evaluation.counts.append(count)
        if asking is not batch and isinstance(labels, Tensor):
            labels = labels.clone()  # as they were given, not as they were asked
            labels[:, : batch["labels"].shape[1]] = batch["labels"]
        if 0 < own < rows:
            logits = _with_last_repeated(logits, own, rows - own)
            labels = _with_last_repeated(labels, own, rows - own)
        return loss, logits, labels

    def _rows(self, inputs: Any) -> tuple[int, int]:
        """Rows of this rank's batch, and how many of them, the first, are not there to fill it."""
        if isinstance(inputs, PlannedBatch) and inputs.examples is not None:
            rows = len(inputs.examples)
            return rows, rows - len(inputs.repeated)
        rows = find_batch_size(inputs)
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder < 1:
            return rows, rows
        # accelerate has filled up the last batch, from where the first rank's rows begin.
        return rows, int(np.clip(state.remainder - self.args.process_index * rows, 0, rows))

    @contextlib.contextmanager
    def _told_of_targets(self) -> Iterator[None]:
        """transformers tells ``compute_loss`` how many there are; a user's may not want to know."""
        compute = self.compute_loss
        parameters = inspect.signature(compute).parameters.values()
        if any(p.name == "num_items_in_batch" or p.kind is p.VAR_KEYWORD for p in parameters):
            yield
            return

        def told(*args: Any, num_items_in_batch: Any = None, **options: Any) -> Any:
            return compute(*args, **options)

        of_instance = "compute_loss" in vars(self)
        self.compute_loss = told
        try:
            yield
        finally:
            del self.compute_loss
            if of_instance:
                self.compute_loss = compute

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Targets of one batch on this rank: losses are weighed afterwards."""
        with self._by_itself():
            return super()._get_num_items_in_batch(batch_samples, device)


def can_be_planned(dataset: Any) -> bool:
    """Whether examples have a number, to be asked for in any order."""
    return dataset is not None and has_length(dataset) and not isinstance(dataset, IterableDataset)


def _metrics_by(
    plan: EvaluationSampler, running: _Evaluation, compute: Callable[..., Any]
) -> Callable[..., Any]:
    """A user's ``compute_metrics`` that sees rows in dataset order, or learns of the last batch."""

    def metrics(prediction: EvalPrediction, **options: Any) -> Any:
        if "compute_result" in options:  # transformers would ask accelerate, which knows no end
            options["compute_result"] = running.step == len(plan)
        if plan.in_order:
            return compute(prediction, **options)
        fields = {
            name: _in_order(getattr(prediction, name, None), plan.order)
            for name in ("predictions", "label_ids", "inputs", "losses")
        }
        return compute(EvalPrediction(**fields), **options)

    return metrics


# --------------------------------------------------------------------------------------------- rows


def _each(change: Callable[[Any], Any], values: Any) -> Any:
    """The change to every array or tensor in tuples, lists and mappings."""
    if isinstance(values, Mapping):
        return {name: _each(change, value) for name, value in values.items()}
    if isinstance(values, (tuple, list)):
        return type(values)(_each(change, value) for value in values)
    return change(values) if isinstance(values, (Tensor, np.ndarray)) and values.ndim else values


def _chosen(values: Any, rows: NDArray[np.int64], count: int) -> Any:
    """Of ``count`` rows those; where each gave several (sequences to return), all of them."""

    def choose(value: Any) -> Any:
        several, rest = divmod(len(value), count)
        if rest:
            return value
        index = (rows[:, None] * several + np.arange(several)).reshape(-1)
        return value[torch.from_numpy(index).to(value.device) if torch.is_tensor(value) else index]

    return _each(choose, values)


def _in_order(values: Any, order: NDArray[np.int64]) -> Any:
    """Rows by index in the dataset."""
    return _chosen(values, np.argsort(order, kind="stable"), max(len(order), 1))


def _first_rows(batch: Mapping[str, Any], kept: int, rows: int) -> dict[str, Any]:
    """A batch of ``rows`` rows without the last of them."""

    def one(value: Any) -> Any:
        sized = isinstance(value, list) or (isinstance(value, Tensor) and value.dim())
        return value[:kept] if sized and len(value) == rows else value

    return {name: one(value) for name, value in batch.items()}


def _with_last_repeated(values: Any, rows: int, more: int) -> Any:
    """Outputs of ``rows`` rows, and of the last of these ``more`` times again."""

    def repeat(value: Any) -> Any:
        several, rest = divmod(len(value), rows)
        if rest:
            return value
        return torch.cat([value, *[value[-several:]] * more])

    return _each(repeat, values)
