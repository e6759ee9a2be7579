"""Search for the largest micro-batch budget that fits in memory, before the first step.

For a given budget, the probe runs forward and backward of a micro-batch of the longest sequences,
because attention costs most for them. For a model with a decoder, it runs another micro-batch of
the longest targets, because only targets have logits. It also allocates the memory of an optimizer,
two tensors per trainable parameter, as Adam needs, unless the optimizer already has its state.

    double the budget until it does not fit, then bisect until the gap is less than 1/16
"""

from __future__ import annotations

import numpy as np
import torch
from accelerate.utils import release_memory
from numpy.typing import NDArray

from .base import TrainerBase
from .batches import cut_groups
from .measure import rounded_up
from .out_of_memory import RngSnapshot, is_out_of_memory
from .sampler import TokenBudgetBatchSampler

_RESOLUTION = 16  # stop when the gap is less than this part of the budget


def largest_budget(trainer: TrainerBase, plan: TokenBudgetBatchSampler) -> int:
    """Find the largest budget that fits on every rank. All ranks must call this.

    Weights, gradients and random number generators are restored.

    Args:
        trainer: the trainer.
        plan: its plan.

    Returns:
        The budget in tokens, at most ``max_tokens_per_batch``.

    Raises:
        RuntimeError: if the longest sequence does not fit by itself.
        ValueError: if forwards wait for other ranks (FSDP, DeepSpeed), because a rank that runs out
            of memory would leave the other ranks waiting.
    """
    probe = _Probe(trainer, plan)
    if trainer.runner.ranks.forward_communicates(probe.model):
        raise ValueError("auto_find_microbatch cannot probe under FSDP or DeepSpeed")
    most = trainer.budget.max_tokens_per_batch
    fits, fails = 0, most + 1
    budget = min(max(trainer.runner.max_tokens, probe.longest), most)
    while fails - max(fits, 1) > max(fits, 1) // _RESOLUTION:
        if probe.fits(budget):
            fits = budget
            budget = min(2 * fits, most) if fails > most else (fits + fails) // 2
        else:
            fails = budget
            if fails <= probe.longest:
                raise RuntimeError(
                    f"auto_find_microbatch: the longest sequence ({probe.longest} tokens) does not "
                    "fit in memory by itself"
                )
            budget = max((fits + fails) // 2, probe.longest)
        if budget in (fits, fails):
            break
    return fits


class _Probe:
    """Tests whether micro-batches of a given budget fit in memory.

    Attributes:
        model: the model as prepared by accelerate.
        longest: tokens, or slots, of the longest example.
    """

    def __init__(self, trainer: TrainerBase, plan: TokenBudgetBatchSampler) -> None:
        self._trainer = trainer
        self.model = trainer.model_wrapped
        traits, sides = trainer.runner.traits, plan.lengths.astype(np.int64)
        self._sides = rounded_up(sides, traits.multiple) if traits.padded else sides
        totals = self._sides.sum(1)
        self._orders = [np.argsort(-totals, kind="stable")]
        if traits.is_encoder_decoder:
            self._orders.append(np.lexsort((-totals, -self._sides[:, 1])))
        self.longest = int(totals.max())

    def fits(self, budget: int) -> bool:
        """Whether forward and backward of ``budget`` tokens fit on every rank."""
        rng = RngSnapshot(self._trainer.accelerator.device)
        try:
            reserved = self._optimizer_state()
            for order in self._orders:
                self._run(order[: self._num_examples(order, budget)].tolist())
            fits = True
            del reserved
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        self.model.zero_grad(set_to_none=True)
        release_memory()
        rng.restore()
        return all(numbers[0] for numbers in self._trainer.runner.ranks.gather([int(fits)]))

    def _num_examples(self, order: NDArray[np.int64], budget: int) -> int:
        """How many of the first examples in ``order`` the budget allows, at least 1."""
        sides = self._sides[order[:budget]]
        if self._trainer.runner.traits.padded:
            return int(cut_groups(sides, budget)[1])
        return max(int(np.searchsorted(sides.sum(1).cumsum(), budget, side="right")), 1)

    def _run(self, items: list[int]) -> None:
        trainer = self._trainer
        batch = trainer.planned_collator(trainer.planned_dataset.__getitems__(items))
        self.model.train()
        trainer.runner.compute_once(self.model, batch)

    def _optimizer_state(self) -> list[torch.Tensor]:
        if self._trainer.optimizer is not None and self._trainer.optimizer.state:
            return []
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return [torch.empty_like(p) for p in trained for _ in range(2)]
