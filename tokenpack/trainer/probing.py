"""The largest micro-batch budget that memory suffices for, found before the first step.

A micro-batch of the longest sequences, up to a budget, is computed forward and backward, since
attention costs most in them; and with a decoder another one, of the longest targets, since logits
are of targets alone. Beside it lies what an optimizer will hold: two tensors a trainable parameter,
as Adam does, unless the optimizer has its state already.

    double the budget until it does not fit; then halve the gap until it is under 1/16
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .base import TrainerBase
from .batches import cut_groups
from .microbatch import rounded_up
from .step import Dice, is_out_of_memory, release_memory

_CLOSE = 16


def largest_budget(trainer: TrainerBase) -> int:
    """Probe, on all ranks alike, and take what fits on each.

    Returns:
        The budget in tokens, at most ``max_tokens_per_batch``. Weights, gradients and random
        number generators are as before.

    Raises:
        RuntimeError: if the longest sequence alone does not fit.
        ValueError: where forwards wait for other ranks (FSDP, DeepSpeed): one rank that fails would
            leave the others waiting.
    """
    probe = _Probe(trainer)
    if trainer.runner.communicates(probe.model):
        raise ValueError("auto_find_microbatch cannot probe under FSDP or DeepSpeed")
    most = trainer.budget.max_tokens_per_batch
    fits, fails = 0, most + 1
    budget = min(max(trainer.runner.max_tokens, probe.longest), most)
    while fails - max(fits, 1) > max(fits, 1) // _CLOSE:
        if probe.fits(budget):
            fits = budget
            budget = min(2 * fits, most) if fails > most else (fits + fails) // 2
        else:
            fails = budget
            if fails <= probe.longest:
                raise RuntimeError(
                    f"auto_find_microbatch: the longest sequence ({probe.longest} tokens) does not "
                    "fit into memory alone"
                )
            budget = max((fits + fails) // 2, probe.longest)
        if budget in (fits, fails):
            break
    return fits


class _Probe:
    def __init__(self, trainer: TrainerBase) -> None:
        self.trainer = trainer
        self.model = self.trainer.model_wrapped
        assert trainer.plan is not None
        shape, sides = trainer.runner.shape, trainer.plan.lengths.astype(np.int64)
        self._sides = rounded_up(sides, shape.multiple) if shape.padded else sides
        whole = self._sides.sum(1)
        self._orders = [np.argsort(-whole, kind="stable")]
        if shape.two_sided:
            self._orders.append(np.lexsort((-whole, -self._sides[:, 1])))
        self.longest = int(whole.max())

    @property
    def _dataset(self) -> Any:
        return self.trainer.planned_dataset

    def fits(self, budget: int) -> bool:
        """Whether forward and backward of ``budget`` tokens fit on every rank."""
        trainer = self.trainer
        dice = Dice(trainer.accelerator.device)
        try:
            reserved = self._optimizer_state()
            for order in self._orders:
                self._run(order[: self._how_many(order, budget)].tolist())
            fits = True
            del reserved
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        self.model.zero_grad(set_to_none=True)
        release_memory()
        dice.roll_back()
        return all(numbers[0] for numbers in trainer.runner.gather([int(fits)]))

    def _how_many(self, order: NDArray[np.int64], budget: int) -> int:
        """How many of the first sequences in ``order`` the budget allows; one at the least."""
        sides = self._sides[order[:budget]]
        if self.trainer.runner.shape.padded:
            return int(cut_groups(sides, budget)[1])
        return max(int(np.searchsorted(sides.sum(1).cumsum(), budget, side="right")), 1)

    def _run(self, items: list[int]) -> None:
        trainer = self.trainer
        batch = trainer.planned_collator(self._dataset.__getitems__(items))
        self.model.train()
        trainer.runner.compute_once(self.model, batch)

    def _optimizer_state(self) -> list[torch.Tensor]:
        if self.trainer.optimizer is not None and self.trainer.optimizer.state:
            return []
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return [torch.empty_like(p) for p in trained for _ in range(2)]
