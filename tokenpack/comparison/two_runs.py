"""The packed and the padded run of one model, from the same state."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import PackingStats
from ..adapters.patching import transformers_model
from ..adapters.suspend import entry_in, fresh_counters, is_free_of_patch, suspended
from ..checks import IGNORE_INDEX
from ..cost.allocations import peak_bytes
from .reference import Forward, doubled
from .runs import Run, run_once, trainable
from .sequences import Batch, Model
from .state import Kept, device_of, rounding_of


class TwoRuns:
    """The padded and the packed run of one model."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        forward: Forward,
        kept: Kept,
        gradients: bool,
    ) -> None:
        self.model, self.forward, self.kept, self.gradients = model, forward, kept, gradients
        self.batch = Batch(inputs, _describe(model))
        self.padded_batch = self.batch.as_padded() if self.batch.is_stream else self.batch
        # Of such models some ignore the number of items, and run_padded divides for all of them.
        described = self.batch.model
        self._divides = described.token_labels and not described.shifts_labels
        if self._divides and "num_items_in_batch" in self.batch.inputs:
            kept_inputs = {**self.padded_batch.inputs, "num_items_in_batch": None}
            self.padded_batch = self.padded_batch.with_inputs(kept_inputs)
        self.parameters = trainable(model) if gradients else {}
        self.device = device_of(model, self.batch.inputs)
        self.rounding = rounding_of(model, self.device)
        self.packed: Run = Run(None, {})
        self.padded: Run = Run(None, {})
        self.drew = False

    @property
    def setting(self) -> str:
        mode = "training" if self.model.training else "evaluation"
        return f"{str(self.rounding).removeprefix('torch.')}, {mode} mode, {self.device.type}"

    @property
    def losses(self) -> tuple[float | None, float | None]:
        padded, packed = self.padded.loss, self.packed.loss
        return (
            None if padded is None else float(padded),
            None if packed is None else float(packed),
        )

    @property
    def seconds(self) -> tuple[float, float]:
        return self.padded.seconds, self.packed.seconds

    def run_packed(self) -> tuple[PackingStats, Exception | None]:
        with fresh_counters(self.model) as stats:
            try:
                self.packed = self._once(self.batch)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                return stats, error
        return stats, None

    def run_padded(self) -> None:
        with suspended(self.model):
            self._require_unpatched()
            self.padded = self._once(self.padded_batch)
            self.drew = self.kept.drew()
        self._divide_by_items(self.padded)

    def run_exact(self, exact: nn.Module) -> tuple[Run, Batch]:
        """The padded run of a copy in float64, and its batch."""
        batch = self.padded_batch.with_inputs(doubled(self.padded_batch.inputs)[0])
        parameters = trainable(exact) if self.gradients else {}
        self.kept.rewind()
        run = run_once(self.forward(exact), batch, parameters, self.device, self.gradients)
        self._divide_by_items(run)
        return run, batch

    def logits(self) -> dict[str, Tensor | None]:
        """The outputs of the patched model, with the logits that training leaves out."""
        with fresh_counters(self.model, logits="always"):
            call = self.forward(self.model)
            self.kept.rewind()
            return run_once(call, self.batch, {}, self.device, gradients=False).values

    def measure(self) -> tuple[tuple[int, int], tuple[float, float]]:
        """Peak bytes and the better of two times, each padded and packed."""
        again: list[Run] = []

        def padded() -> None:
            again.append(self._once(self.padded_batch))

        def packed() -> None:
            again.append(self._once(self.batch))

        with suspended(self.model):
            first = peak_bytes(padded, self.device)
        with fresh_counters(self.model):
            second = peak_bytes(packed, self.device)
        seconds = [min(t, run.seconds) for t, run in zip(self.seconds, again)]
        return (first, second), (seconds[0], seconds[1])

    def _once(self, batch: Batch) -> Run:
        self.kept.rewind()
        return run_once(
            self.forward(self.model), batch, self.parameters, self.device, self.gradients
        )

    def _require_unpatched(self) -> None:
        """Raise RuntimeError if a model without its patch is still patched somewhere."""
        if not is_free_of_patch(self.model):
            name = type(self.model).__name__
            raise RuntimeError(f"{name} could not be unpatched for the comparison")

    def _divide_by_items(self, run: Run) -> None:
        """Unpatched T5, BART and BERT take the mean over labels. Patched, they divide by items."""
        labels, items = (self.batch.inputs.get(n) for n in ("labels", "num_items_in_batch"))
        if run.loss is None or items is None or not self._divides or not isinstance(labels, Tensor):
            return
        factor = float((labels != IGNORE_INDEX).sum()) / float(items)
        run.loss = run.loss * factor
        run.gradients = {n: None if g is None else g * factor for n, g in run.gradients.items()}


def _describe(model: nn.Module) -> Model:
    entry = entry_in(model)
    family = entry.state.family
    config = getattr(model, "active_peft_config", None)
    virtual = getattr(config, "num_virtual_tokens", None) if config is not None else None
    return Model(
        entry.sides,
        None if family is None else family.kind,
        entry.shifts_labels,
        entry.has_token_head,
        "position_ids" in inspect.signature(transformers_model(model).forward).parameters,
        virtual or 0,
    )
