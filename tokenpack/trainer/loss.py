"""The loss of a micro-batch as the mean over its own targets, for any ``compute_loss``."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.inputs import shift_right
from ..checks import IGNORE_INDEX
from ..kernels import layout_from_cu_seqlens, repad, unpad
from .base import TrainerBase
from .measure import is_packed


class LossMixin(TrainerBase):
    """The loss and the backward of a micro-batch."""

    def _mean_loss(self, model: nn.Module, inputs: Mapping[str, Any], num_targets: int) -> Tensor:
        """The mean loss over the targets of a micro-batch."""
        inputs = self._with_decoder_inputs(inputs)
        inputs.pop(self.budget.length_column_name, None)  # collators add it, models reject it
        count = torch.full((), num_targets, device=self.args.device)
        with (
            self.compute_loss_context_manager(),
            self._without_rank_average(),
            self._with_optional_num_items(),
        ):
            return self.compute_loss(model, inputs, num_items_in_batch=count)

    def _backward(self, loss: Tensor) -> None:
        options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        self.accelerator.backward(loss, **options)

    @contextlib.contextmanager
    def _without_rank_average(self) -> Iterator[None]:
        """Compute losses over the local batch: keep transformers from scaling them by the ranks."""
        average = self.args.average_tokens_across_devices
        self.args.average_tokens_across_devices = False
        try:
            yield
        finally:
            self.args.average_tokens_across_devices = average

    @contextlib.contextmanager
    def _with_optional_num_items(self) -> Iterator[None]:
        """Allow a user's ``compute_loss`` without the parameter ``num_items_in_batch``."""
        compute_loss = self.compute_loss
        parameters = inspect.signature(compute_loss).parameters.values()
        if any(p.name == "num_items_in_batch" or p.kind is p.VAR_KEYWORD for p in parameters):
            yield
            return

        def without_num_items(*args: Any, num_items_in_batch: Any = None, **options: Any) -> Any:
            return compute_loss(*args, **options)

        on_instance = "compute_loss" in vars(self)
        self.compute_loss = without_num_items
        try:
            yield
        finally:
            del self.compute_loss
            if on_instance:
                self.compute_loss = compute_loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """The targets of a batch on this rank. The evaluation loss is weighted later."""
        with self._without_rank_average():
            return super()._get_num_items_in_batch(batch_samples, device)

    def _with_decoder_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Add the decoder's inputs if the loss is computed outside the model.

        Label smoothing and ``compute_loss_func`` remove the labels from the model's inputs, so the
        model cannot derive its decoder's inputs from them.
        """
        inputs = dict(inputs)
        replaced = self.label_smoother is not None or self.compute_loss_func is not None
        if (
            not replaced
            or not self.runner.traits.is_encoder_decoder
            or "labels" not in inputs
            or "decoder_input_ids" in inputs
            or "decoder_inputs_embeds" in inputs
        ):
            return inputs
        model = self.accelerator.unwrap_model(self.model)
        inputs["decoder_input_ids"] = _decoder_input_ids(model, inputs)
        return inputs


def _decoder_input_ids(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The labels shifted right by the model's own rule."""
    labels = inputs["labels"]
    if not is_packed(inputs):
        return shift_right(model, labels)
    layout = layout_from_cu_seqlens(
        inputs["decoder_cu_seqlens"], labels.shape[1], device=labels.device
    )
    rows = repad(labels[0], layout, fill=IGNORE_INDEX)
    return unpad(shift_right(model, rows), layout)[None]
