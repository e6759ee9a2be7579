"""transformers' trainers with batches planned by tokens.

The trainers override these methods of transformers:

    get_train_dataloader     batches planned by tokens, and this rank's share of them (`planning`)
    get_batch_samples        keeps the batches of an optimizer step
    training_step            with the last batch of a step, runs the whole step (`step`)
    compute_loss             called for the mean over a micro-batch's targets (`loss`)
    evaluation_loop, ...     evaluation by tokens (`evaluation`)
    train, _save_checkpoint  a stop by signal, and complete checkpoints (`checkpoints`)
    log                      tokens and memory; perplexity and the best mark (`marks`)
    get_decay_parameter_names   weight decay on matrices (`decay`)

The loop, optimizers, schedules, callbacks, logging, saving and pushing are those of transformers.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments
from transformers.utils import logging

from ..adapters import is_patched, packs_itself, patch_model
from .arguments import FROM_ARGS, TokenBudget, args_name, budget_of
from .callbacks import PlanCallback
from .checkpoints import CheckpointsMixin
from .decay import DecayMixin, require_known_decay
from .evaluation import EvaluationMixin
from .marks import evaluation_marks
from .measure import ModelTraits
from .microbatch import PlannedBatch
from .passes import Passes
from .probing import largest_budget
from .signals import StopSignals
from .step import Progress, StepRunner

logger = logging.get_logger(__name__)

# Optimizers that update weights during the backward, so that gradients cannot be accumulated.
_FUSED_WITH_BACKWARD = ("lomo", "adalomo")


class TokenBudgetTrainer(EvaluationMixin, CheckpointsMixin, DecayMixin):
    """`transformers.Trainer` with batches planned by tokens. Accepts the same arguments.

    The additional keywords are ``decay`` and the fields of `TokenBudget`. They take precedence over
    the fields of `TokenBudgetArguments`. By default, the length of a sequence is limited only by
    ``max_tokens_per_microbatch``.

    Attributes:
        budget: the `TokenBudget`.
        decay: which parameters weight decay applies to: ``"transformers"`` (the default), those
            that are no norms and no biases by their names, or ``"matrices"``, those with two
            dimensions or more.
        plan: the `TokenBudgetBatchSampler` of the training batches. None before training, and for
            an `IterableDataset`.
        runner: runs the optimizer steps. ``runner.max_tokens`` is the micro-batch budget in force,
            and ``runner.counts`` counts out-of-memory errors.
        dropped_examples, truncated_examples: the number of training examples that ``overlong``
            dropped or truncated.

    Raises:
        TypeError, ValueError: if the budget is invalid, or does not go together with an option of
            ``args``.
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
        pad_to_total: int | None = FROM_ARGS,
        decay: str = FROM_ARGS,
        **keywords: Any,
    ) -> None:
        passed = dict(locals())
        self._given = {each.name: passed[each.name] for each in dataclasses.fields(TokenBudget)}
        args = Seq2SeqTrainingArguments("tmp_trainer") if args is None else args
        self.budget = budget_of(args, self._given, self._own_defaults)
        decay = getattr(args, "decay", "transformers") if decay is FROM_ARGS else decay
        self.decay = require_known_decay(decay)
        self._before_init(model, args)
        super().__init__(model, args, *positional, **keywords)
        self._after_init()

    def _before_init(self, model: Any, args: TrainingArguments) -> None:
        """Before transformers' constructor: check the arguments, and patch the model."""
        self.dropped_examples = self.truncated_examples = 0
        self.plan = None
        self._step_batches = []
        self.passes = Passes()
        self._stop = StopSignals()
        self._stop_agreed = False
        self._last_logged = time.perf_counter()
        self._longest_logged = 0
        self._step_is_logged = False
        _check_args(args)
        if self.budget.pack and args.neftune_noise_alpha:
            raise ValueError(
                f"neftune_noise_alpha={args.neftune_noise_alpha} divides its noise by the width of "
                "the padded batch, but a packed batch has no width; pass pack=False"
            )
        if self.budget.oom_max_retries:
            # Gradients are reduced after the last backward (`ranks`), with all parameters.
            args.ddp_find_unused_parameters = False
        if model is not None:
            self._patch(model)

    def _after_init(self) -> None:
        """After transformers' constructor: set up the steps for the model."""
        if self.args.n_gpu > 1:  # 1 for a model that its device_map places on several GPUs
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process (DataParallel) cannot share a token plan; "
                "start one process per GPU with torchrun, or set CUDA_VISIBLE_DEVICES"
            )
        self._make_runner()
        self.add_callback(PlanCallback(self))

    def _make_runner(self) -> None:
        config = getattr(self.model, "config", None)
        padded = not self.budget.pack
        traits = ModelTraits(
            is_encoder_decoder=bool(getattr(config, "is_encoder_decoder", False)),
            shifts_labels=bool(self._loss_shifts_labels) and not _prepends_tokens(self.model),
            padded=padded,
            trims_left_padding=_positions_are_relative(config),
            multiple=int(getattr(self.data_collator, "pad_to_multiple_of", None) or 1)
            if padded
            else 1,
            hidden_size=int(
                getattr(config, "hidden_size", 0) or getattr(config, "d_model", 0) or 1024
            ),
        )
        self.runner = StepRunner(
            self.accelerator, self.budget, traits, self._mean_loss, self._backward
        )
        self.runner.broadcasts_buffers = bool(self.args.ddp_broadcast_buffers)

    def _patch(self, model: Any) -> None:
        if not self.budget.pack:
            return
        if is_patched(model):
            if self.budget.pad_to_total is not None:
                raise ValueError(
                    f"pad_to_total must be None for a model that is patched already, got "
                    f"{self.budget.pad_to_total}: pass it to patch_model"
                )
            return
        try:
            if packs_itself(model):
                if self.budget.pad_to_total is not None:
                    raise ValueError(
                        f"pad_to_total must be None for {type(model).__name__}, which packs "
                        f"batches by itself, got {self.budget.pad_to_total}"
                    )
                return
            patch_model(model, strict=True, pad_to_total=self.budget.pad_to_total)
        except (TypeError, ValueError) as reason:
            raise ValueError(
                f"pack=True, but {reason}; with pack=False, the model runs padded, and budgets "
                "count padded slots"
            ) from None
        # Not strict: calls that cannot be packed (generate) run unpacked.
        patch_model(model, pad_to_total=self.budget.pad_to_total)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Create the model again, and patch it."""
        model = super().call_model_init(trial)
        self._patch(model)
        return model

    def _hp_search_setup(self, trial: Any) -> None:
        """Let the values of a trial take precedence over keywords, and reset the budget."""
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

    # -------------------------------------------------------------------------------------- a step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """The batches of a step. The step counts their targets itself."""
        self.restore_rng()
        batches = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append(batch if isinstance(batch, PlannedBatch) else PlannedBatch(batch))
        self._step_batches = batches
        self.passes.batches += len(batches)
        return batches, None

    def training_step(
        self,
        model: nn.Module,
        inputs: Any,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Run the whole optimizer step if ``inputs`` is its last batch, otherwise do nothing.

        Returns:
            The loss of the step with its last batch, otherwise 0. transformers adds these up.
        """
        batches = self._step_batches
        if not any(inputs is batch for batch in batches):  # not called by `train`
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

    def find_microbatch(self) -> None:
        """Search for the largest micro-batch budget that fits in memory, and use it.

        Raises:
            ValueError: if training has no plan, or under FSDP or DeepSpeed.
            RuntimeError: if the longest sequence does not fit by itself.
        """
        if self.plan is None:
            raise ValueError(
                "auto_find_microbatch must be False for a dataset without a length, got True"
            )
        self.runner.max_tokens = largest_budget(self, self.plan)
        logger.info(f"auto_find_microbatch: max_tokens_per_microbatch={self.runner.max_tokens}")

    # --------------------------------------------------------------------------------------- train

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Run `Trainer.train`. SIGTERM or Ctrl-C saves a checkpoint after the step, and returns.

        Args:
            resume_from_checkpoint: the folder of a checkpoint, or True for the last one in
                ``output_dir`` that is complete.
            args: further arguments of `Trainer.train`.
            kwargs: further keywords of `Trainer.train`.
        """
        resume_from_checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        self._stop_agreed = False
        self._longest_logged = 0
        with self._stop:
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Allow `log` to gather tokens, because all ranks call this method together."""
        self._step_is_logged = True
        try:
            return super()._maybe_log_save_evaluate(*args, **kwargs)
        finally:
            self._step_is_logged = False

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens and memory to the log of a training step, and marks to an evaluation's."""
        if "loss" in logs and self._step_is_logged:
            self._step_is_logged = False
            logs.update(self._token_logs())
        marks = evaluation_marks(self, logs)
        marked = {**logs, **marks}
        super().log(marked, start_time)
        logs.update({name: marked[name] for name in marked if name not in marks})  # the epoch

    def _token_logs(self) -> dict[str, float]:
        runner, progress = self.runner, self.runner.progress
        now = time.perf_counter()
        seconds, self._last_logged = now - self._last_logged, now
        numbers = torch.tensor(
            [progress.tokens, progress.slots, progress.microbatches], dtype=torch.float64
        )
        if self.args.world_size > 1:
            numbers = self.accelerator.reduce(numbers.to(self.args.device), "sum").cpu()
        tokens, slots, microbatches = numbers.tolist()
        ranks = max(self.args.world_size, 1)
        logs: dict[str, float] = {
            "real_token_share": round(tokens / max(slots, 1), 4),
            "microbatches_per_step": round(microbatches / ranks / max(progress.steps, 1), 2),
            "max_tokens_per_microbatch": runner.max_tokens,
            "out_of_memory": runner.counts.out_of_memory,
        }
        if seconds > 0:
            logs["tokens_per_second"] = round(tokens / seconds, 1)
        every = self.budget.log_longest_every
        if every and self.state.global_step // every > self._longest_logged:
            self._longest_logged = self.state.global_step // every
            logs["longest_sequence"] = progress.longest
        runner.progress = Progress(longest=progress.longest)
        return logs


def _check_args(args: TrainingArguments) -> None:
    """Raise an error for arguments that a token plan does not support."""
    if args.auto_find_batch_size:
        raise ValueError("auto_find_batch_size counts rows: pass auto_find_microbatch=True instead")
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer in _FUSED_WITH_BACKWARD or optimizer.endswith("layerwise"):
        raise ValueError(
            "optim must be an optimizer that updates weights once per step, not in each backward, "
            f"got {args.optim!r}"
        )
    if getattr(args, "ddp_static_graph", False):
        raise ValueError(
            "ddp_static_graph must be False, got True; DDP's graph differs between micro-batches"
        )
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1 and args.world_size == 1:
        raise ValueError(
            f"the launcher started {processes} processes, but without an accelerator transformers "
            "takes each for a run of its own, with all of the data; pass use_cpu=True to train on "
            "the CPUs together"
        )
    parallelism = getattr(args, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        size = getattr(parallelism, name, 1)
        if size > 1:
            raise ValueError(
                f"parallelism_config.{name} must be 1, got {size}; plans assign whole sequences to "
                "data-parallel ranks"
            )


def _prepends_tokens(model: Any) -> bool:
    """Whether prompt tuning adds virtual tokens, so that the first real token is predicted too."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def _positions_are_relative(config: Any) -> bool:
    """Whether removing columns of left padding does not change the result of a row."""
    relative = ("rope_parameters", "rope_theta", "relative_attention_num_buckets")
    from_first_token = getattr(config, "model_type", None) == "m2m_100"
    return from_first_token or any(getattr(config, name, None) for name in relative)


class HierarchicalTokenTrainer(TokenBudgetTrainer, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with batches planned by tokens. Accepts the same arguments.

    The additional keywords are ``decay`` and the fields of `TokenBudget`. They take precedence over
    the fields of `TokenBudgetArguments`. See `TokenBudgetTrainer`.

    Raises:
        TypeError, ValueError: if the budget is invalid, or does not go together with an option of
            ``args``.
    """

    _own_defaults: ClassVar[dict[str, Any]] = {}
