"""transformers' trainers with a token plan: what to run together is decided by tokens, not rows.

What is extended, and where:

    get_train_dataloader     batches planned by tokens, each rank's share of them
    get_batch_samples        the batches of an optimizer step are kept together
    training_step            does nothing but for the last of these, which runs the whole step
    evaluation_loop, ...     the same for evaluation (`evaluation`)
    train, _save_checkpoint  a stop by signal; checkpoints that are whole (`checkpoints`)
    log                      what a user wants to see of tokens and memory

All else is transformers': the loop, optimizers, schedules, callbacks, logging, saving, pushing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments
from transformers.trainer_utils import seed_worker
from transformers.utils import logging

from ..adapters import is_patched, patch_model
from ..adapters.inputs import shift_right
from ..kernels import layout_from_cu_seqlens, repad, unpad
from .arguments import FROM_ARGS, TokenBudget, args_name, budget_of
from .callbacks import PlanCallback
from .checkpoints import CheckpointsMixin, seed_generator
from .evaluation import EvaluationMixin, can_be_planned
from .example_lengths import dataset_lengths
from .loading import Caps, PlannedCollator, PlannedDataset
from .microbatch import PlannedBatch, is_packed
from .probing import largest_budget
from .sampler import TokenBudgetBatchSampler
from .signals import StopSignals
from .step import Done, Shape, StepRunner

logger = logging.get_logger(__name__)

# Optimizers that update weights while they compute gradients: no step can be put together then.
_FUSED_WITH_BACKWARD = ("lomo", "adalomo")


class TokenBudgetTrainer(EvaluationMixin, CheckpointsMixin):
    """`transformers.Trainer` that batches by tokens, and accepts all that it does.

    Further keywords are the fields of `TokenBudget`. They outweigh those of `TokenBudgetArguments`,
    if ``args`` are such. By default sequences may be as long as a micro-batch.

    Attributes:
        budget: the `TokenBudget` as it was set.
        runner: runs optimizer steps; ``runner.max_tokens`` is the micro-batch budget in force, and
            ``runner.counts`` says how often memory ran out.
        dropped_examples, truncated_examples: training examples that ``overlong`` changed.

    Raises:
        TypeError, ValueError: if the budget, or an option of ``args``, makes no sense here.
    """

    _own_defaults: ClassVar[dict[str, Any]] = {"max_encoder_len": None, "max_decoder_len": None}

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        max_tokens_per_batch: int = FROM_ARGS,
        max_tokens_per_microbatch: int = FROM_ARGS,
        max_eval_tokens_per_microbatch: int = FROM_ARGS,
        max_encoder_len: int | None = FROM_ARGS,
        max_decoder_len: int | None = FROM_ARGS,
        overlong: str = FROM_ARGS,
        length_column_name: str = FROM_ARGS,
        use_cpu_microbatch: bool = FROM_ARGS,
        pack: bool = FROM_ARGS,
        auto_find_microbatch: bool = FROM_ARGS,
        log_longest_every: int = FROM_ARGS,
        debug: bool = FROM_ARGS,
        oom_max_retries: int = FROM_ARGS,
        oom_skip_batch_on_fail: bool = FROM_ARGS,
        **keywords: Any,
    ) -> None:
        passed = dict(locals())
        given = {each.name: passed[each.name] for each in dataclasses.fields(TokenBudget)}
        args = Seq2SeqTrainingArguments("tmp_trainer") if args is None else args
        self._given = given
        self.budget = budget_of(args, given, self._own_defaults)
        self._begin(model, args)
        super().__init__(model, args, *positional, **keywords)
        self._finish()

    def _begin(self, model: Any, args: TrainingArguments) -> None:
        """Before transformers' own construction: check, and patch the model."""
        self.dropped_examples = self.truncated_examples = 0
        self._step_batches: list[PlannedBatch] = []
        self._plan: TokenBudgetBatchSampler | None = None
        self._loader_generator: torch.Generator | None = None
        self._stop = StopSignals()
        self._stop_agreed = False
        self._last_logged = time.perf_counter()
        self._longest_logged = 0
        self._step_is_logged = False
        _refuse(args)
        if self.budget.pack and args.neftune_noise_alpha:
            raise ValueError(
                f"neftune_noise_alpha={args.neftune_noise_alpha} divides its noise by the width of "
                "the padded batch, and a packed one has none: pass pack=False"
            )
        if self.budget.oom_max_retries:
            _leave_gradients_to_us(args)
        if model is not None:
            self._patch(model)

    def _finish(self) -> None:
        """After transformers' own construction: what the model is decides how steps run."""
        if self.args.n_gpu > 1:  # not so for a model that lies on several by its device_map
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process (DataParallel) cannot share a token plan: "
                "start one process a GPU with torchrun, or set CUDA_VISIBLE_DEVICES"
            )
        self._make_runner()
        self.add_callback(PlanCallback(self))

    def _make_runner(self) -> None:
        config = getattr(self.model, "config", None)
        two_sided = bool(getattr(config, "is_encoder_decoder", False))
        padded = not self.budget.pack
        shape = Shape(
            two_sided,
            bool(self._loss_shifts_labels) and not _prepends_tokens(self.model),
            padded,
            _positions_float(config),
            int(getattr(self.data_collator, "pad_to_multiple_of", None) or 1) if padded else 1,
            int(getattr(config, "hidden_size", 0) or getattr(config, "d_model", 0) or 1024),
        )
        self.runner = StepRunner(
            self.accelerator, self.budget, shape, self._mean_loss, self._backward
        )
        self.runner.broadcasts_buffers = bool(self.args.ddp_broadcast_buffers)

    def _patch(self, model: Any) -> None:
        if not self.budget.pack or is_patched(model):
            return
        try:
            patch_model(model, strict=True)
        except (TypeError, ValueError) as reason:
            raise ValueError(
                f"pack=True, but {reason}; with pack=False the model runs padded, and budgets "
                "count padded slots"
            ) from None
        patch_model(model)  # from now on, what cannot be packed (generate) takes the model's path

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make the model anew, and patch it."""
        model = super().call_model_init(trial)
        self._patch(model)
        return model

    def _hp_search_setup(self, trial: Any) -> None:
        """A trial's budget outweighs the keywords, and memory begins anew."""
        before = vars(self.args).copy()
        super()._hp_search_setup(trial)
        if self.hp_search_backend is None or trial is None:
            return
        tried = {name for name, value in vars(self.args).items() if before.get(name) != value}
        given = {
            name: FROM_ARGS if args_name(name) in tried else value
            for name, value in self._given.items()
        }
        self.budget = budget_of(self.args, given, self._own_defaults)
        self._make_runner()

    # ----------------------------------------------------------------------------------------- data

    def get_train_dataloader(self) -> DataLoader:
        """Batches of ``max_tokens_per_batch`` tokens; of these, the share of this rank.

        An `IterableDataset` has no lengths to plan by: its batches are of
        ``per_device_train_batch_size`` rows, as in `Trainer`, and cut into micro-batches all the
        same.

        Raises:
            ValueError: if there is no dataset, or ``overlong="error"`` and an example is.
        """
        if not can_be_planned(self.train_dataset):
            return self._stop.protect_workers(super().get_train_dataloader())
        sampler = self._get_train_sampler()
        return self._planned_loader(self.planned_dataset, sampler, "Training")

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not can_be_planned(dataset):
            return super()._get_train_sampler(train_dataset)
        lengths = self._lengths_of(dataset)
        kept, lengths, caps = self._fitted(lengths)
        self.planned_dataset = PlannedDataset(dataset, kept, caps)
        strategy = getattr(self.args, "train_sampling_strategy", "random")
        if strategy not in ("random", "sequential"):
            logger.warning(
                f"train_sampling_strategy={strategy!r} plays no part: batches are planned by tokens"
            )
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._plan = TokenBudgetBatchSampler(
            lengths,
            self.budget.max_tokens_per_batch,
            num_ranks=self.args.world_size,
            rank=self.args.process_index,
            seed=seed,
            shuffle=strategy != "sequential",
            hidden_size=self.runner.shape.hidden_size,
            padded=self.runner.shape.padded,
            max_tokens_per_group=self._longest_fitting if self.runner.shape.padded else None,
        )
        return self._plan

    def _lengths_of(self, dataset: Any) -> NDArray[np.int64]:
        """``(n, 2)`` source and target tokens of each example."""
        lengths = dataset_lengths(
            dataset,
            self.budget.length_column_name,
            kind="seq2seq" if self.runner.shape.two_sided else "causal",
            collator=self.data_collator,
            show_progress=not self.args.disable_tqdm,
        )
        lengths = np.asarray(lengths, np.int64)
        if lengths.ndim == 1:
            lengths = np.stack([lengths, np.zeros_like(lengths)], axis=1)
        return lengths

    @property
    def _longest_fitting(self) -> int:
        """Tokens of the longest training example that the budget allows."""
        return min(self.budget.max_tokens_per_microbatch, self.budget.max_tokens_per_batch)

    def _fitted(
        self, lengths: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], Caps | None]:
        """Examples that are kept, their lengths, and where they are cut, by ``overlong``."""
        budget, shape, most = self.budget, self.runner.shape, self._longest_fitting
        source_cap = most if budget.max_encoder_len is None else budget.max_encoder_len
        target_cap = most if budget.max_decoder_len is None else budget.max_decoder_len
        if not shape.two_sided:
            target_cap = 0
        source = np.minimum(lengths[:, 0], source_cap)
        target = np.minimum(lengths[:, 1], target_cap)
        # Of both together the longer is cut, down to half of the room if need be.
        target = np.minimum(target, np.maximum(most - source, most // 2))
        source = np.minimum(source, most - target)
        over = np.flatnonzero((source < lengths[:, 0]) | (target < lengths[:, 1]))
        everyone = np.arange(len(lengths))
        if not len(over):
            return everyone, lengths, None
        first = over[0]
        found = (
            f"{len(over)} of {len(lengths)} training examples are over max_encoder_len="
            f"{budget.max_encoder_len}, max_decoder_len={budget.max_decoder_len} or {most} tokens "
            f"in all (example {first} is the first, with {lengths[first, 0]} and "
            f"{lengths[first, 1]})"
        )
        if budget.overlong == "error":
            raise ValueError(f"{found}: raise the limits, or pass overlong='truncate' or 'drop'")
        if budget.overlong == "drop":
            self.dropped_examples = len(over)
            logger.warning(f"{found}: dropped")
            kept = np.setdiff1d(everyone, over)
            if not len(kept):
                raise ValueError(f"{found}: none is left to train on")
            return kept, lengths[kept], None
        self.truncated_examples = len(over)
        logger.warning(f"{found}: truncated")
        return everyone, np.stack([source, target], axis=1), Caps(source, target)

    def _planned_loader(
        self, dataset: PlannedDataset, sampler: Any, description: str
    ) -> DataLoader:
        """Not prepared by accelerate: plans deal to ranks, and micro-batches move by themselves."""
        args, collator = self.args, self.data_collator
        inner = dataset.dataset
        if hasattr(inner, "column_names") and hasattr(inner, "remove_columns"):
            inner = self._remove_unused_columns(inner, description=description)
            dataset = PlannedDataset(inner, dataset.kept, dataset.caps)
        else:
            collator = self._get_collator_with_removed_columns(collator, description=description)
        training = sampler is self._plan
        workers = args.dataloader_num_workers
        options: dict[str, Any] = {}
        if workers:
            options["persistent_workers"] = args.dataloader_persistent_workers and training
            options["prefetch_factor"] = args.dataloader_prefetch_factor
        for name in ("multiprocessing_context", "in_order"):  # not all versions have them
            if (value := getattr(args, f"dataloader_{name}", None)) is not None:
                options[name] = value
        collate = PlannedCollator(collator)
        # Its own, since a loader draws its workers' seeds from the generator that training draws
        # from, and does so as often as it starts workers: a resumed run starts others.
        generator = torch.Generator()
        seed_generator(args.seed, 0, generator)
        if training:
            self.planned_collator, self._loader_generator = collate, generator
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory and self.accelerator.device.type == "cuda",
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=args.process_index),
            generator=generator,
            **options,
        )
        return self._stop.protect_workers(loader)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Examples of an optimizer step, on average; for what transformers logs and measures."""
        if self._plan is None:
            return super().get_total_train_batch_size(args)
        per_batch = len(self.planned_dataset) / max(len(self._plan), 1)
        return max(round(per_batch * args.gradient_accumulation_steps), 1)

    @property
    def plan(self) -> TokenBudgetBatchSampler | None:
        """The plan that training runs by; None before, and for an `IterableDataset`."""
        return self._plan

    def set_plan_epoch(self, epoch: int) -> None:
        """Shuffle for ``epoch``; collators that draw by epoch are told too."""
        for each in (self._plan, self.data_collator):
            tell = getattr(each, "set_epoch", None)
            if tell is not None:
                tell(epoch)
        if self._loader_generator is not None:
            seed_generator(self.args.seed, epoch, self._loader_generator)

    # --------------------------------------------------------------------------------------- a step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """The batches of a step. Targets are counted where the step runs."""
        self.restore_random_state()
        batches = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append(batch if isinstance(batch, PlannedBatch) else PlannedBatch(batch))
        self._step_batches = batches
        return batches, None

    def training_step(
        self,
        model: nn.Module,
        inputs: Any,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Run the optimizer step that ``inputs`` is the last batch of; until then, nothing.

        Returns:
            What transformers sums up to the loss of the step: all of it with the last batch.
        """
        batches = self._step_batches
        if not any(inputs is batch for batch in batches):  # called by hand
            inputs = inputs if isinstance(inputs, PlannedBatch) else PlannedBatch(inputs)
            batches = [inputs]
        if inputs is not batches[-1]:
            return torch.zeros((), device=self.args.device)
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        self.runner.average_over_ranks = bool(self.args.average_tokens_across_devices)
        loss, self._stop_agreed = self.runner.run(model, batches, self._stop.requested)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            torch.cuda.empty_cache()
        return loss

    def _mean_loss(self, model: nn.Module, inputs: Mapping[str, Any], targets: int) -> Tensor:
        """The mean loss of a micro-batch's targets, whichever way the loss is defined."""
        inputs = self._with_decoder_inputs(inputs)
        inputs.pop(self.budget.length_column_name, None)  # collators add it; no model takes it
        count = torch.full((), targets, device=self.args.device)
        with self.compute_loss_context_manager(), self._by_itself(), self._accepting_num_items():
            return self.compute_loss(model, inputs, num_items_in_batch=count)

    def _backward(self, loss: Tensor) -> None:
        options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        self.accelerator.backward(loss, **options)

    @contextlib.contextmanager
    def _by_itself(self) -> Iterator[None]:
        """Losses are of the batch alone: transformers' ``compute_loss`` knows of no other ranks."""
        averages = self.args.average_tokens_across_devices
        self.args.average_tokens_across_devices = False
        try:
            yield
        finally:
            self.args.average_tokens_across_devices = averages

    def _with_decoder_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Label smoothing takes labels from the model, which must be told its decoder's input."""
        inputs = dict(inputs)
        replaced = self.label_smoother is not None or self.compute_loss_func is not None
        if (
            not replaced
            or not self.runner.shape.two_sided
            or "labels" not in inputs
            or "decoder_input_ids" in inputs
            or "decoder_inputs_embeds" in inputs
        ):
            return inputs
        model = self.accelerator.unwrap_model(self.model)
        inputs["decoder_input_ids"] = _shifted(model, inputs)
        return inputs

    def find_microbatch(self) -> None:
        """Put the largest micro-batch budget in force that memory suffices for; see `probing`."""
        if self._plan is None:
            raise ValueError("auto_find_microbatch takes a dataset with a length to probe with")
        self.runner.max_tokens = largest_budget(self)
        logger.info(f"max_tokens_per_microbatch={self.runner.max_tokens}, found by probing")

    # ---------------------------------------------------------------------------------------- train

    @property
    def stop_agreed(self) -> bool:
        """Whether some rank was asked to stop, and all know."""
        return self._stop_agreed or (self.args.world_size == 1 and self._stop.requested)

    def restart_clock(self, now: float) -> None:
        """Measure tokens per second from ``now``."""
        self._last_logged = now

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As `Trainer.train`. SIGTERM or Ctrl-C saves a checkpoint after the step, and returns.

        Args:
            resume_from_checkpoint: True for the last checkpoint that is whole.
        """
        resume_from_checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        self._stop_agreed = False
        self._longest_logged = 0
        with self._stop:
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """All ranks come here together, and nowhere else may a log ask them for their tokens."""
        self._step_is_logged = True
        try:
            return super()._maybe_log_save_evaluate(*args, **kwargs)
        finally:
            self._step_is_logged = False

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to a training log what the step's tokens and memory were."""
        if "loss" in logs and self._step_is_logged:
            self._step_is_logged = False
            logs.update(self._token_logs())
        super().log(logs, start_time)

    def _token_logs(self) -> dict[str, float]:
        runner, done = self.runner, self.runner.done
        now = time.perf_counter()
        seconds, self._last_logged = now - self._last_logged, now
        numbers = torch.tensor([done.tokens, done.slots, done.microbatches], dtype=torch.float64)
        if self.args.world_size > 1:
            numbers = self.accelerator.reduce(numbers.to(self.args.device), "sum").cpu()
        tokens, slots, microbatches = numbers.tolist()
        ranks = max(self.args.world_size, 1)
        logs: dict[str, float] = {
            "real_token_share": round(tokens / max(slots, 1), 4),
            "microbatches_per_step": round(microbatches / ranks / max(done.steps, 1), 2),
            "max_tokens_per_microbatch": runner.max_tokens,
            "out_of_memory": runner.counts.out_of_memory,
        }
        if seconds > 0:
            logs["tokens_per_second"] = round(tokens / seconds, 1)
        every = self.budget.log_longest_every
        if every and self.state.global_step // every > self._longest_logged:
            self._longest_logged = self.state.global_step // every
            logs["longest_sequence"] = done.longest
        self.runner.done = Done(longest=done.longest)
        return logs


def _refuse(args: TrainingArguments) -> None:
    """Arguments that say something else than a token plan does."""
    if args.auto_find_batch_size:
        raise ValueError("auto_find_batch_size counts rows: pass auto_find_microbatch=True instead")
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer in _FUSED_WITH_BACKWARD or optimizer.endswith("layerwise"):
        raise ValueError(f"optim={args.optim!r} updates weights in each backward, not in each step")
    if getattr(args, "ddp_static_graph", False):
        raise ValueError("ddp_static_graph=True: micro-batches are not known to be alike to DDP")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1 and args.world_size == 1:
        raise ValueError(
            f"the launcher started {processes} processes, but without an accelerator transformers "
            "takes each for a run of its own, on all of the data: pass use_cpu=True to train on "
            "the CPUs together"
        )
    parallelism = getattr(args, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        if parallelism is not None and getattr(parallelism, name, 1) > 1:
            raise ValueError(
                f"parallelism_config.{name} must be 1: plans deal whole sequences to data-parallel "
                "ranks"
            )


def _prepends_tokens(model: Any) -> bool:
    """Prompt tuning: a virtual token before each row is asked for its first."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def _positions_float(config: Any) -> bool:
    """Whether a row may be moved to the left, out of columns of padding, and stay the same."""
    relative = ("rope_parameters", "rope_theta", "relative_attention_num_buckets")
    from_first_token = getattr(config, "model_type", None) == "m2m_100"
    return from_first_token or any(getattr(config, name, None) for name in relative)


def _leave_gradients_to_us(args: TrainingArguments) -> None:
    """What goes with gradients that are reduced apart from any backward (`step`).

    Forwards run without DDP looking on, so there is nothing for it to find.
    """
    args.ddp_find_unused_parameters = False


def _shifted(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The decoder's input for the labels, by the model's own rule."""
    labels = inputs["labels"]
    if not is_packed(inputs):
        return shift_right(model, labels)
    layout = layout_from_cu_seqlens(
        inputs["decoder_cu_seqlens"], labels.shape[1], device=labels.device
    )
    rows = repad(labels[0], layout, fill=-100)
    return unpad(shift_right(model, rows), layout)[None]


class HierarchicalTokenTrainer(TokenBudgetTrainer, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` that batches by tokens, and accepts all that it does.

    Further keywords are the fields of `TokenBudget`. They outweigh those of `TokenBudgetArguments`,
    if ``args`` are such.

    Raises:
        TypeError, ValueError: if the budget, or an option of ``args``, makes no sense here.
    """

    _own_defaults: ClassVar[dict[str, Any]] = {}
