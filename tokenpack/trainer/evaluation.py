"""Evaluation and prediction in batches of similar lengths, with results in dataset order.

    loss = sum of the losses of all targets / number of targets        over all batches and ranks

transformers' own loop runs, gathers and pads. This file gives it other batches and reorders its
results. The examples are sorted by length, longest first, and cut into blocks. A step evaluates one
block, in equal numbers of rows per rank. If the block has too few examples, its last example is
repeated, so that every rank has the same number of rows to gather. A rank computes a repeated row
only if it has no other row. Repeated rows have no weight in the loss and are removed after
gathering. Every rank has the whole plan, which tells the example of each row.

Packed batches are padded first, because `generate` and the gathering of results work on rows.
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
from accelerate.utils import recursively_apply
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
    """Plan the steps of an evaluation: rows of similar lengths, the same number on every rank.

    Args:
        lengths: ``(n, 2)`` source and target tokens.
        max_tokens: the largest number of slots (rows x columns) in the batch of a rank. An example
            with more slots gets a batch of its own.
        num_ranks: the number of ranks.
        rank: this rank.
        in_order: keep the dataset order instead of sorting by length.
        multiple: source and target columns are padded to a multiple of this.

    Attributes:
        order: ``(n,)`` int64, the index of each example, in the order of the gathered rows.
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
            _split(examples[block], num_ranks) for block in _blocks(sizes, max_tokens, num_ranks)
        ]

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[int]]:
        return (step[self._rank].tolist() for step in self._steps)

    def is_real(self, step: int) -> NDArray[np.bool_]:
        """``(num_ranks, rows)`` bool, which rows of a step are not repeated."""
        return self._steps[step] >= 0


def _blocks(lengths: NDArray[np.int64], max_tokens: int, num_ranks: int) -> Iterator[slice]:
    """Cut the examples into the largest blocks with at most ``max_tokens`` slots on every rank.

    A block grows by one row per rank at a time.
    """
    starts = np.arange(0, len(lengths), num_ranks)
    begin = source = target = 0
    largest = np.maximum.reduceat(lengths, starts) if len(lengths) else lengths
    for start, (new_source, new_target) in zip(starts.tolist(), largest.tolist()):
        source, target = max(source, new_source), max(target, new_target)
        rows = (start - begin) // num_ranks + 1
        if rows > 1 and rows * (source + target) > max_tokens:
            yield slice(begin, start)
            begin, source, target = start, new_source, new_target
    if len(lengths):
        yield slice(begin, len(lengths))


def _split(block: NDArray[np.int64], num_ranks: int) -> NDArray[np.int64]:
    """``(num_ranks, rows)``, the block, filled up with its last example as ``-1 - index``."""
    rows = -(-len(block) // num_ranks)
    missing = rows * num_ranks - len(block)
    return np.append(block, np.full(missing, -1 - block[-1])).reshape(num_ranks, rows)


class RowsCollator:
    """Call the user's collator, and pad its batch if it is packed, one row for each sample."""

    def __init__(self, collator: Callable[[list[Any]], Any], pad_token_id: int) -> None:
        self.collator, self.pad_token_id = collator, pad_token_id

    def __call__(self, samples: list[Any]) -> Any:
        """Collate ``samples``.

        Raises:
            ValueError: if the collator drops or splits samples.
        """
        batch = self.collator(samples)
        if not (isinstance(batch, Mapping) and is_packed(batch)):
            return batch
        rows = batch.padded(self.pad_token_id)  # type: ignore[attr-defined]
        plan = getattr(batch, "plan", None)
        if plan is None:
            return rows
        order = np.argsort(plan.items, kind="stable")  # the packer reordered the samples
        if not np.array_equal(plan.items[order], np.arange(len(samples))):
            raise ValueError(
                f"data_collator must return one sequence for each of {len(samples)} samples in "
                f"evaluation, got {len(plan.items)}: pass it overlong='truncate' or 'error'"
            )
        return {name: value[torch.from_numpy(order)] for name, value in rows.items()}


@dataclasses.dataclass(eq=False)
class _Evaluation(TrainerCallback):
    """The state of a running evaluation: its step, and the losses of this rank's batches so far."""

    plan: EvaluationSampler | None
    step: int = 0
    losses: list[Tensor] = dataclasses.field(default_factory=list)
    counts: list[int] = dataclasses.field(default_factory=list)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count the step, whose outputs have been gathered by now."""
        self.step += 1


class EvaluationMixin(TrainerBase):
    """The evaluation of the token-budget trainers."""

    _evaluation: _Evaluation | None = None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return a loader of this rank's batches.

        A batch has at most ``max_eval_tokens_per_microbatch`` slots (rows x columns). A batch of an
        `IterableDataset` has ``per_device_eval_batch_size`` rows, as in `Trainer`.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if can_be_planned(dataset):
            return self._evaluation_loader(dataset, "Evaluation")
        with self._collating_rows():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Return a loader of this rank's batches for `predict`."""
        if can_be_planned(test_dataset):
            return self._evaluation_loader(test_dataset, "test")
        with self._collating_rows():
            return super().get_test_dataloader(test_dataset)

    def _evaluation_loader(self, dataset: Any, description: str) -> DataLoader:
        lengths = self._lengths_of(dataset)
        # Lists of batches, and metrics by batch, cannot be reordered afterwards.
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
        """Replace the data collator by one that returns padded rows."""
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
        """Run `Trainer.evaluation_loop`; the loss is per target and rows are in dataset order."""
        sampler = getattr(dataloader, "batch_sampler", None)
        plan = sampler if isinstance(sampler, EvaluationSampler) else None
        running, user_metrics, outer = _Evaluation(plan), self.compute_metrics, self._evaluation
        start = time.perf_counter()
        self._evaluation = running
        self.add_callback(running)
        if plan is not None:
            self.gather_function = partial(self._gather_without_repeats, plan, running)
            if user_metrics is not None:
                self.compute_metrics = _metrics_in_order(plan, running, user_metrics)
        try:
            with self._undoing_preparation():
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
            loss = self._mean_evaluation_loss(running)
        finally:
            self._last_logged += time.perf_counter() - start  # tokens/s exclude evaluation
            self.remove_callback(running)
            self.gather_function = self.accelerator.gather_for_metrics
            self.compute_metrics, self._evaluation = user_metrics, outer
        if loss is not None and f"{metric_key_prefix}_loss" in output.metrics:
            output.metrics[f"{metric_key_prefix}_loss"] = loss
        if plan is None or plan.in_order:
            return output
        return output._replace(
            predictions=_dataset_order(output.predictions, plan.order),
            label_ids=_dataset_order(output.label_ids, plan.order),
        )

    @contextlib.contextmanager
    def _undoing_preparation(self) -> Iterator[None]:
        """Undo accelerate's preparation of the model after an evaluation before training.

        Accelerate does not prepare a model twice. After an evaluation, transformers' trainers
        therefore train without DDP and without a warning, each rank with its own gradients.
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
        real = plan.is_real(running.step)
        rows, repeats = real.shape[1], self.args.eval_batch_size
        if isinstance(values, Tensor) and values.dim() == 1 and len(values) == repeats != rows:
            values = values[:1].repeat(rows)  # Trainer repeated the batch's loss eval_batch_size x
        gathered = self.accelerator.gather(values)
        return gathered if real.all() else _select_rows(gathered, np.flatnonzero(real), real.size)

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
        """Run `Trainer.prediction_step` without the repeated rows, and record the loss."""
        rows, real = self._count_rows(inputs)
        batch = _first_rows(inputs, real or rows, rows)  # this rank must run if the others do
        batch.pop(self.budget.length_column_name, None)  # collators add it; models reject it
        asking = self.runner.asking(batch)
        count = int(self.runner.measure(asking).asked.sum()) if real else 0
        with self._by_itself(), self._accepting_num_items():
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
            labels = labels.clone()  # return the labels of the user, before `asking` changed them
            labels[:, : batch["labels"].shape[1]] = batch["labels"]
        if 0 < real < rows:
            logits = _repeat_last_row(logits, real, rows - real)
            labels = _repeat_last_row(labels, real, rows - real)
        return loss, logits, labels

    def _count_rows(self, inputs: Any) -> tuple[int, int]:
        """The number of rows in this rank's batch, and how many of them, the first, are real."""
        if isinstance(inputs, PlannedBatch) and inputs.examples is not None:
            rows = len(inputs.examples)
            return rows, rows - len(inputs.repeated)
        rows = find_batch_size(inputs)
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder < 1:
            return rows, rows
        # accelerate filled up the last global batch; its first `remainder` rows are real.
        return rows, int(np.clip(state.remainder - self.args.process_index * rows, 0, rows))

    @contextlib.contextmanager
    def _accepting_num_items(self) -> Iterator[None]:
        """Let a user's ``compute_loss`` without ``num_items_in_batch`` be called with it."""
        compute = self.compute_loss
        parameters = inspect.signature(compute).parameters.values()
        if any(p.name == "num_items_in_batch" or p.kind is p.VAR_KEYWORD for p in parameters):
            yield
            return

        def accepting(*args: Any, num_items_in_batch: Any = None, **options: Any) -> Any:
            return compute(*args, **options)

        is_own_attribute = "compute_loss" in vars(self)
        self.compute_loss = accepting
        try:
            yield
        finally:
            del self.compute_loss
            if is_own_attribute:
                self.compute_loss = compute

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Count the targets of a batch on this rank only; `prediction_step` weights the loss."""
        with self._by_itself():
            return super()._get_num_items_in_batch(batch_samples, device)


def can_be_planned(dataset: Any) -> bool:
    """Whether ``dataset`` has a length, and its examples can be read by index."""
    return dataset is not None and has_length(dataset) and not isinstance(dataset, IterableDataset)


def _metrics_in_order(
    plan: EvaluationSampler, running: _Evaluation, compute: Callable[..., Any]
) -> Callable[..., Any]:
    """Wrap a user's ``compute_metrics``: it gets rows in dataset order and the true last batch."""

    def metrics(prediction: EvalPrediction, **options: Any) -> Any:
        if "compute_result" in options:  # accelerate, which did not prepare the loader, has no end
            options["compute_result"] = running.step == len(plan)
        if plan.in_order:
            return compute(prediction, **options)
        fields = {
            name: _dataset_order(getattr(prediction, name, None), plan.order)
            for name in ("predictions", "label_ids", "inputs", "losses")
        }
        return compute(EvalPrediction(**fields), **options)

    return metrics


# --------------------------------------------------------------------------------------------- rows


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0


def _select_rows(values: Any, rows: NDArray[np.int64], count: int) -> Any:
    """Select ``rows`` of the ``count`` rows in all arrays in ``values``.

    If an array has several entries per row (``num_return_sequences``), they stay together.
    """

    def select(value: Any) -> Any:
        per_row, rest = divmod(len(value), count)
        if rest:
            return value
        index = (rows[:, None] * per_row + np.arange(per_row)).reshape(-1)
        return value[torch.from_numpy(index).to(value.device) if torch.is_tensor(value) else index]

    return recursively_apply(select, values, test_type=_is_array)


def _dataset_order(values: Any, order: NDArray[np.int64]) -> Any:
    """Reorder the rows of all arrays in ``values`` by their index in the dataset."""
    return _select_rows(values, np.argsort(order, kind="stable"), max(len(order), 1))


def _first_rows(batch: Mapping[str, Any], first: int, rows: int) -> dict[str, Any]:
    """The ``first`` rows of a batch of ``rows`` rows."""

    def cut(value: Any) -> Any:
        sized = isinstance(value, list) or (isinstance(value, Tensor) and value.dim())
        return value[:first] if sized and len(value) == rows else value

    return {name: cut(value) for name, value in batch.items()}


def _repeat_last_row(values: Any, rows: int, times: int) -> Any:
    """Append the last of ``rows`` rows ``times`` times in all arrays in ``values``."""

    def repeat(value: Any) -> Any:
        per_row, rest = divmod(len(value), rows)
        if rest:
            return value
        return torch.cat([value, *[value[-per_row:]] * times])

    return recursively_apply(repeat, values, test_type=_is_array)
