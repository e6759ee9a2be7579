"""Data loaders whose batches are planned by tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainingArguments
from transformers.trainer_utils import has_length, seed_worker
from transformers.utils import logging

from ..data.collators.special_tokens import EndOfSequence
from .base import TrainerBase
from .example_lengths import dataset_lengths
from .loading import Caps, PlannedCollator, PlannedDataset
from .sampler import TokenBudgetBatchSampler

logger = logging.get_logger(__name__)


class PlanningMixin(TrainerBase):
    """Plans the training batches, and makes data loaders for plans."""

    _loader_generator: torch.Generator | None = None

    def get_train_dataloader(self) -> DataLoader:
        """Batches of ``max_tokens_per_batch`` tokens, and this rank's share of each.

        An `IterableDataset` has no lengths to plan with. Its batches have
        ``per_device_train_batch_size`` rows, as in `Trainer`, and are also split into
        micro-batches.

        Raises:
            ValueError: if there is no dataset, or if an example is too long and ``overlong`` is
                "error".
        """
        if not can_be_planned(self.train_dataset):
            return self._stop.shield_workers(super().get_train_dataloader())
        sampler = self._get_train_sampler()
        return self._planned_loader(self.planned_dataset, sampler, "Training")

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not can_be_planned(dataset):
            return super()._get_train_sampler(train_dataset)
        lengths = self._lengths_of(dataset)
        kept, lengths, caps = self._handle_overlong(lengths)
        self.planned_dataset = PlannedDataset(dataset, kept, caps, EndOfSequence(self._tokenizer))
        strategy = getattr(self.args, "train_sampling_strategy", "random")
        if strategy not in ("random", "sequential"):
            logger.warning(
                f"train_sampling_strategy={strategy!r} has no effect: batches are planned by tokens"
            )
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        traits = self.runner.traits
        self.plan = TokenBudgetBatchSampler(
            lengths,
            self.budget.max_tokens_per_batch,
            num_ranks=self.args.world_size,
            rank=self.args.process_index,
            seed=seed,
            shuffle=strategy != "sequential",
            hidden_size=traits.hidden_size,
            padded=traits.padded,
            max_tokens_per_group=self._max_example_tokens if traits.padded else None,
        )
        return self.plan

    @property
    def _tokenizer(self) -> Any:
        """The tokenizer, which knows the special tokens; None if there is none."""
        collators = getattr(self.data_collator, "tokenizer", None)
        return getattr(self.processing_class, "tokenizer", self.processing_class) or collators

    def _lengths_of(self, dataset: Any) -> NDArray[np.int64]:
        """``(n, 2)`` source and target tokens of each example."""
        lengths = dataset_lengths(
            dataset,
            self.budget.length_column_name,
            kind="seq2seq" if self.runner.traits.is_encoder_decoder else "causal",
            collator=self.data_collator,
            show_progress=not self.args.disable_tqdm,
        )
        lengths = np.asarray(lengths, np.int64)
        if lengths.ndim == 1:
            lengths = np.stack([lengths, np.zeros_like(lengths)], axis=1)
        return lengths

    @property
    def _max_example_tokens(self) -> int:
        """The most tokens of a training example that the budget allows."""
        return min(self.budget.max_tokens_per_microbatch, self.budget.max_tokens_per_batch)

    def _handle_overlong(
        self, lengths: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], Caps | None]:
        """Apply ``overlong``.

        Returns:
            The indices of the kept examples, their lengths, and their maximum lengths if some are
            truncated.
        """
        budget, most = self.budget, self._max_example_tokens
        source, target = self._capped(lengths)
        over = np.flatnonzero((source < lengths[:, 0]) | (target < lengths[:, 1]))
        indices = np.arange(len(lengths))
        if not len(over):
            return indices, lengths, None
        first = over[0]
        found = (
            f"{len(over)} of {len(lengths)} training examples are over max_encoder_len="
            f"{budget.max_encoder_len}, max_decoder_len={budget.max_decoder_len} or a total of "
            f"{most} tokens (example {first} is the first, with {lengths[first, 0]} and "
            f"{lengths[first, 1]})"
        )
        if budget.overlong == "error":
            raise ValueError(f"{found}; raise the limits, or pass overlong='truncate' or 'drop'")
        if budget.overlong == "drop":
            self.dropped_examples = len(over)
            kept = np.setdiff1d(indices, over)
            if not len(kept):
                raise ValueError(f"{found}; no examples are left to train on, raise the limits")
            logger.warning(f"{found}: dropping them")
            return kept, lengths[kept], None
        self.truncated_examples = len(over)
        logger.warning(f"{found}: truncating them")
        return indices, np.stack([source, target], axis=1), Caps(source, target)

    def _capped(self, lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source and target lengths that the limits allow, ``(n,)`` int64 each."""
        budget, most = self.budget, self._max_example_tokens
        source_cap = most if budget.max_encoder_len is None else budget.max_encoder_len
        target_cap = most if budget.max_decoder_len is None else budget.max_decoder_len
        if not self.runner.traits.is_encoder_decoder:
            target_cap = 0
        source = np.minimum(lengths[:, 0], source_cap)
        target = np.minimum(lengths[:, 1], target_cap)
        # If both exceed the total, cut the longer one, but not below half of the total.
        target = np.minimum(target, np.maximum(most - source, most // 2))
        return np.minimum(source, most - target), target

    def _planned_loader(
        self, dataset: PlannedDataset, sampler: Any, description: str
    ) -> DataLoader:
        """A loader for a plan.

        accelerate does not prepare it: the plan assigns examples to ranks, and micro-batches are
        copied to the device later.
        """
        args, collator = self.args, self.data_collator
        inner = dataset.dataset
        if hasattr(inner, "column_names") and hasattr(inner, "remove_columns"):
            inner = self._remove_unused_columns(inner, description=description)
            dataset = PlannedDataset(inner, dataset.kept, dataset.caps, dataset.end)
        else:
            collator = self._get_collator_with_removed_columns(collator, description=description)
        training = sampler is self.plan
        workers = args.dataloader_num_workers
        options: dict[str, Any] = {}
        if workers:
            options["persistent_workers"] = args.dataloader_persistent_workers and training
            options["prefetch_factor"] = args.dataloader_prefetch_factor
        for name in ("multiprocessing_context", "in_order"):  # depends on transformers' version
            if (value := getattr(args, f"dataloader_{name}", None)) is not None:
                options[name] = value
        collate = PlannedCollator(collator)
        # A loader draws the seeds of its workers whenever it starts them, and a resumed run starts
        # them at other times. So the loader does not draw from the generator that training uses.
        generator = torch.Generator()
        seed_generator(generator, args.seed, 0)
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
        return self._stop.shield_workers(loader)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """The mean number of examples per optimizer step, for transformers' logs and metrics."""
        if self.plan is None:
            return super().get_total_train_batch_size(args)
        per_batch = len(self.planned_dataset) / max(len(self.plan), 1)
        return max(round(per_batch * args.gradient_accumulation_steps), 1)

    def set_plan_epoch(self, epoch: int) -> None:
        """Set the epoch of the plan, of the collator if it has ``set_epoch``, and of the loader."""
        for each in (self.plan, self.data_collator):
            set_epoch = getattr(each, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)
        if self._loader_generator is not None:
            seed_generator(self._loader_generator, self.args.seed, epoch)


def can_be_planned(dataset: Any) -> bool:
    """Whether examples can be accessed by index, in any order."""
    return dataset is not None and has_length(dataset) and not isinstance(dataset, IterableDataset)


def seed_generator(generator: torch.Generator, seed: int, epoch: int) -> None:
    """Seed the generator from which a loader draws the seeds of its workers."""
    generator.manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))
