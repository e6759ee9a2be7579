"""Evaluation and prediction by tokens: sharded over ranks, sorted by length, in dataset order.

    loss = sum of all targets' losses / all targets        over all batches and ranks

transformers' own loop runs, gathers and pads. Here it gets other batches, and its results are put
back in order. A step takes one block of the examples sorted by length, longest first, and assigns
the same number of rows to each rank. If there are not enough examples, a rank repeats one, so that
every rank has rows to gather. A repeated row is not computed if the rank has other rows, has no
weight, and is removed when rows are gathered. Each rank has the whole plan, and therefore the
example of every row.

Packed batches are padded first, because `generate` and the gather work on rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from accelerate.utils import recursively_apply
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import (
    EvalPrediction,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import EvalLoopOutput

from ..checks import IGNORE_INDEX
from .loading import PlannedDataset
from .loss import LossMixin
from .measure import is_packed, rounded_up
from .microbatch import PlannedBatch
from .planning import PlanningMixin, can_be_planned


class EvaluationSampler(Sampler[list[int]]):
    """The rows of each evaluation step: the same number for every rank, of similar lengths.

    Args:
        lengths: ``(n, 2)`` source and target tokens.
        max_tokens: maximum number of slots (rows x columns) of a rank's batch. A longer example
            gets a batch of its own.
        num_ranks: the number of ranks.
        rank: this rank, from 0.
        in_order: keep dataset order instead of sorting by length.
        multiple: source and target columns are padded to a multiple of this.

    Attributes:
        order: ``(n,)`` int64, the dataset index of each row, in the order in which rows are
            gathered.
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
            _deal_to_ranks(examples[block], num_ranks)
            for block in _blocks(sizes, max_tokens, num_ranks)
        ]

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[int]]:
        return (step[self._rank].tolist() for step in self._steps)

    def real(self, step: int) -> NDArray[np.bool_]:
        """``(num_ranks, rows)``, True for the rows of a step that are not repeated."""
        return self._steps[step] >= 0


def _blocks(lengths: NDArray[np.int64], max_tokens: int, num_ranks: int) -> Iterator[slice]:
    """Consecutive examples, as many as each rank can take with at most ``max_tokens`` slots.

    A block grows by one row for every rank at once.
    """
    starts = np.arange(0, len(lengths), num_ranks)
    begin = source = target = 0
    largest = np.maximum.reduceat(lengths, starts) if len(lengths) else lengths
    for start, (next_source, next_target) in zip(starts.tolist(), largest.tolist()):
        source, target = max(source, next_source), max(target, next_target)
        rows = (start - begin) // num_ranks + 1
        if rows > 1 and rows * (source + target) > max_tokens:
            yield slice(begin, start)
            begin, source, target = start, next_source, next_target
    if len(lengths):
        yield slice(begin, len(lengths))


def _deal_to_ranks(block: NDArray[np.int64], num_ranks: int) -> NDArray[np.int64]:
    """``(num_ranks, rows)``, the block, filled up with ``-1 - index`` of its last example."""
    rows = -(-len(block) // num_ranks)
    missing = rows * num_ranks - len(block)
    return np.append(block, np.full(missing, -1 - block[-1])).reshape(num_ranks, rows)


class UnpackingCollator:
    """Wraps the user's collator, and pads its packed batches to one row per sample.

    A batch that already has a row per sample, with one or more sequences each, stays as it is.
    """

    def __init__(self, collator: Callable[[list[Any]], Any], pad_token_id: int) -> None:
        self.collator, self.pad_token_id = collator, pad_token_id

    def __call__(self, samples: list[Any]) -> Any:
        """Collate ``samples``.

        Raises:
            ValueError: if the collator drops or splits samples, so that they have no row.
        """
        batch = self.collator(samples)
        if not (isinstance(batch, Mapping) and is_packed(batch)) or _has_packed_rows(
            batch, samples
        ):
            return batch
        rows = batch.padded(self.pad_token_id)  # type: ignore[attr-defined]
        plan = getattr(batch, "plan", None)
        if plan is None:
            return rows
        to_samples = np.argsort(plan.items, kind="stable")  # a packer reorders samples
        if not np.array_equal(plan.items[to_samples], np.arange(len(samples))):
            raise ValueError(
                f"data_collator must return one sequence per sample in evaluation, got "
                f"{len(plan.items)} for {len(samples)} samples; use overlong='truncate' or 'error'"
            )
        return {name: value[torch.from_numpy(to_samples)] for name, value in rows.items()}


def _has_packed_rows(batch: Mapping[str, Any], samples: list[Any]) -> bool:
    plan = getattr(batch, "plan", None)
    is_in_order = plan is None or plan.strategy == "rows"  # a packer reorders samples
    rows = "cu_seqlens_padded" in batch and len(batch["input_ids"])
    return is_in_order and rows == len(samples)


@dataclasses.dataclass(eq=False)
class _Evaluation(TrainerCallback):
    """A running evaluation: its current step, and the losses of this rank's batches so far."""

    plan: EvaluationSampler | None
    step: int = 0
    losses: list[Tensor] = dataclasses.field(default_factory=list)
    num_targets: list[int] = dataclasses.field(default_factory=list)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count the step, after all of its results are gathered."""
        self.step += 1


class EvaluationMixin(LossMixin, PlanningMixin):
    """Evaluation and prediction for the trainers."""

    _evaluation: _Evaluation | None = None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """This rank's rows, in batches of at most ``max_eval_tokens_per_microbatch`` slots.

        The batches of an `IterableDataset` have ``per_device_eval_batch_size`` rows, as in
        `Trainer`.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if can_be_planned(dataset):
            return self._evaluation_loader(dataset, "Evaluation")
        with self._unpacking_batches():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """The loader of `predict`. Its batches are like those of `get_eval_dataloader`."""
        if can_be_planned(test_dataset):
            return self._evaluation_loader(test_dataset, "test")
        with self._unpacking_batches():
            return super().get_test_dataloader(test_dataset)

    def _evaluation_loader(self, dataset: Any, description: str) -> DataLoader:
        lengths = self._lengths_of(dataset)
        # Lists of batches, and metrics per batch, cannot be put back in order.
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
        with self._unpacking_batches():
            return self._planned_loader(view, sampler, description)

    @contextlib.contextmanager
    def _unpacking_batches(self) -> Iterator[None]:
        """Make loaders whose collator pads packed batches."""
        collator = self.data_collator
        pad = getattr(self.processing_class, "pad_token_id", None)
        if pad is None:
            pad = getattr(getattr(self.model, "config", None), "pad_token_id", None) or 0
        self.data_collator = UnpackingCollator(collator, pad)
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
        """Run `Trainer.evaluation_loop`: the loss is over all targets, rows in dataset order."""
        sampler = getattr(dataloader, "batch_sampler", None)
        plan = sampler if isinstance(sampler, EvaluationSampler) else None
        running, user_metrics, outer = _Evaluation(plan), self.compute_metrics, self._evaluation
        self.evaluated_prefix = metric_key_prefix
        begun = time.perf_counter()
        self._evaluation = running
        getattr(user_metrics, "reset", lambda: None)()  # rows of an interrupted evaluation
        self.add_callback(running)
        if plan is not None:
            self.gather_function = self._gather_without_repeated
            if user_metrics is not None:
                self.compute_metrics = _wrap_metrics(plan, running, user_metrics)
        try:
            with self._restoring_preparation():
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
            loss = self._mean_evaluation_loss(running)
        finally:
            self._last_logged += time.perf_counter() - begun  # for tokens per second of training
            self.remove_callback(running)
            self.gather_function = self.accelerator.gather_for_metrics
            self.compute_metrics, self._evaluation = user_metrics, outer
        if loss is not None and f"{metric_key_prefix}_loss" in output.metrics:
            output.metrics[f"{metric_key_prefix}_loss"] = loss
        if plan is None or plan.in_order:
            return output
        return output._replace(
            predictions=_in_dataset_order(output.predictions, plan.order),
            label_ids=_in_dataset_order(output.label_ids, plan.order),
        )

    @contextlib.contextmanager
    def _restoring_preparation(self) -> Iterator[None]:
        """Undo the preparation of the model for evaluation if training has not begun.

        Otherwise accelerate would not prepare the model again, and ranks would train without DDP,
        each with its own gradients. transformers' trainers have this problem, without an error.
        """
        prepared = self.accelerator._models or self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.args.world_size == 1 or prepared:
            yield
            return
        wrapped, before = self.model_wrapped, set(self.model.__dict__)
        try:
            yield
        finally:
            self.accelerator._models.clear()
            self.model_wrapped = wrapped
            for name in {"_is_accelerate_prepared", "_original_forward", "forward"} - before:
                self.model.__dict__.pop(name, None)

    def _gather_without_repeated(self, values: Any) -> Any:
        """Gather the results of a step from all ranks, and remove repeated rows."""
        running = self._evaluation
        assert running is not None
        assert running.plan is not None
        real = running.plan.real(running.step)
        rows, repeats = real.shape[1], self.args.eval_batch_size
        if isinstance(values, Tensor) and values.dim() == 1 and len(values) == repeats != rows:
            # transformers repeats the loss of a batch ``eval_batch_size`` times.
            values = values[:1].repeat(rows)
        gathered = self.accelerator.gather(values)
        return gathered if real.all() else _take_rows(gathered, np.flatnonzero(real), real.size)

    def _mean_evaluation_loss(self, running: _Evaluation) -> float | None:
        """The mean loss over all targets: NaN without targets, None if no loss was computed."""
        if not running.losses:
            return None
        means = torch.stack(running.losses).tolist()
        total = sum(mean * count for mean, count in zip(means, running.num_targets) if count)
        numbers = torch.tensor([total, sum(running.num_targets)], dtype=torch.float64)
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
        """Run the trainer's `prediction_step`, and record the loss and its targets."""
        rows, own = self._count_rows(inputs)
        batch = _first_rows(inputs, own or rows, rows)  # compute at least one row, as other ranks
        batch.pop(self.budget.length_column_name, None)  # collators add it, models reject it
        loss_inputs = self.runner.traits.loss_inputs(batch)
        num_targets = 0
        if own:
            num_targets = int(self.runner.traits.measure(loss_inputs).num_targets.sum())
        with self._without_rank_average(), self._with_optional_num_items():
            loss, logits, labels = super().prediction_step(
                model,
                self._with_decoder_inputs(loss_inputs),
                prediction_loss_only,
                ignore_keys,
                **options,
            )
        if loss is not None and self._evaluation is not None:
            self._evaluation.losses.append(loss.detach())
            self._evaluation.num_targets.append(num_targets)
        if loss_inputs is not batch and isinstance(labels, Tensor):
            # Return the original labels, not those of the loss.
            labels = labels.clone()
            labels[:, : batch["labels"].shape[1]] = batch["labels"]
        if 0 < own < rows:
            logits = _repeat_last(logits, own, rows - own)
            labels = _repeat_last(labels, own, rows - own)
        return loss, logits, labels

    def _count_rows(self, inputs: Any) -> tuple[int, int]:
        """The rows of this rank's batch, and how many of them, from the first, are not repeated."""
        if isinstance(inputs, PlannedBatch) and inputs.examples is not None:
            rows = len(inputs.examples)
            return rows, rows - len(inputs.repeated)
        rows = find_batch_size(inputs)
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder < 1:
            return rows, rows
        # accelerate has filled up the last batch. The real rows are on the first ranks.
        return rows, int(np.clip(state.remainder - self.args.process_index * rows, 0, rows))


def _wrap_metrics(
    plan: EvaluationSampler, running: _Evaluation, compute_metrics: Callable[..., Any]
) -> Callable[..., Any]:
    """The user's ``compute_metrics``, called with rows in dataset order, or at the last batch."""

    def metrics(prediction: EvalPrediction, **options: Any) -> Any:
        if "compute_result" in options:  # accelerate has not prepared the loader, so set it here
            options["compute_result"] = running.step == len(plan)
        if plan.in_order:
            return compute_metrics(prediction, **options)
        fields = {
            name: _in_dataset_order(getattr(prediction, name, None), plan.order)
            for name in ("predictions", "label_ids", "inputs", "losses")
        }
        return compute_metrics(EvalPrediction(**fields), **options)

    return metrics


# -------------------------------------------------------------------------------------------- rows


def _has_rows(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0


def _take_rows(values: Any, rows: NDArray[np.int64], count: int) -> Any:
    """Take some of ``count`` rows from every array or tensor in tuples, lists and mappings.

    If there are several entries per row (``num_return_sequences``), take all of them.
    """

    def take(value: Any) -> Any:
        several, rest = divmod(len(value), count)
        if rest:
            return value
        index = (rows[:, None] * several + np.arange(several)).reshape(-1)
        return value[torch.from_numpy(index).to(value.device) if torch.is_tensor(value) else index]

    return recursively_apply(take, values, test_type=_has_rows)


def _in_dataset_order(values: Any, order: NDArray[np.int64]) -> Any:
    """Sort rows by their index in the dataset."""
    return _take_rows(values, np.argsort(order, kind="stable"), max(len(order), 1))


def _first_rows(batch: Mapping[str, Any], kept: int, rows: int) -> dict[str, Any]:
    """The first ``kept`` of the ``rows`` rows of a batch. In packed rows, the others lose their
    labels instead."""
    if is_packed(batch):
        labels = batch["labels"].clone()
        labels[kept:] = IGNORE_INDEX
        return {**batch, "labels": labels}

    def first(value: Any) -> Any:
        sized = isinstance(value, list) or (isinstance(value, Tensor) and value.dim())
        return value[:kept] if sized and len(value) == rows else value

    return {name: first(value) for name, value in batch.items()}


def _repeat_last(values: Any, rows: int, times: int) -> Any:
    """Append the outputs of the last of ``rows`` rows ``times`` times."""

    def repeat(value: Any) -> Any:
        several, rest = divmod(len(value), rows)
        if rest:
            return value
        return torch.cat([value, *[value[-several:]] * times])

    return recursively_apply(repeat, values, test_type=_has_rows)
