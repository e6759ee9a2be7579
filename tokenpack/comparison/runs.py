"""One forward and backward of a model on a batch: its outputs, gradients and time."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .sequences import Batch

# A cache is no result: a patched model leaves it out where a loss is asked for.
_NO_RESULTS = frozenset({"past_key_values"})


@dataclass
class Run:
    """What a forward and backward gave.

    Attributes:
        loss: a scalar, or None.
        values: the other tensors of the outputs, by name; None where an output has no value.
        gradients: of the parameters and inputs that need one, by name; None if they have none.
        seconds: of forward and backward.
    """

    loss: Tensor | None
    values: dict[str, Tensor | None]
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    seconds: float = 0.0


def run_once(
    call: Callable[..., Any],
    batch: Batch,
    parameters: Mapping[str, Tensor],
    device: torch.device,
    gradients: bool,
) -> Run:
    """Run a call, and take the gradients of its loss.

    Without a loss, the gradients are those of a sum of the outputs at real slots, with fixed random
    weights.

    Args:
        call: the forward.
        batch: its arguments.
        parameters: the tensors to take gradients of, by name.
        device: to wait for before and after.
        gradients: whether to take gradients.
    """
    inputs, leaves = _with_leaves(batch.inputs)
    wanted = {**parameters, **leaves}
    _wait(device)
    start = time.perf_counter()
    found: dict[str, Tensor | None] = {}
    with torch.set_grad_enabled(gradients):
        outputs = flatten(call(**inputs))
        loss = pop_loss(outputs, has_labels="labels" in inputs)
        objective = loss if loss is not None else weighted_sum(batch, outputs)
        if gradients and wanted and isinstance(objective, Tensor) and objective.requires_grad:
            taken = torch.autograd.grad(objective, list(wanted.values()), allow_unused=True)
            found = dict(zip(wanted, taken))
    _wait(device)
    seconds = time.perf_counter() - start
    values = {n: None if v is None else v.detach() for n, v in outputs.items()}
    return Run(None if loss is None else loss.detach(), values, found, seconds)


def flatten(outputs: Any, prefix: str = "") -> dict[str, Tensor | None]:
    """The tensors of an output by name or position. None for a position without a value."""
    if outputs is None or isinstance(outputs, Tensor):
        return {prefix or "0": outputs}
    items: Any = ()
    if isinstance(outputs, Mapping):
        items = ((n, v) for n, v in outputs.items() if n not in _NO_RESULTS)
    elif isinstance(outputs, (tuple, list)):
        items = enumerate(outputs)
    flat: dict[str, Tensor | None] = {}
    for name, value in items:
        flat.update(flatten(value, f"{prefix}.{name}" if prefix else str(name)))
    return flat


def pop_loss(outputs: dict[str, Tensor | None], has_labels: bool) -> Tensor | None:
    """Remove the loss from flattened outputs. None if there is none."""
    name = "loss" if "loss" in outputs else "0" if has_labels else ""
    loss = outputs.get(name)
    if loss is None or loss.dim() > 0:
        return None
    del outputs[name]
    return loss


def weighted_sum(batch: Batch, outputs: Mapping[str, Tensor | None], first: int = 0) -> Any:
    """A sum of the outputs at the slots of sequences, with weights that are the same in every run.

    Args:
        batch: that gave the outputs.
        outputs: by name.
        first: the number of the first sequence of the batch, for a sequence that runs alone.
    """
    total: Any = 0.0
    for name, value in outputs.items():
        if value is None or not value.requires_grad:
            continue
        for number, piece in enumerate(batch.pieces_of(name, value) or ()):
            seed = zlib.crc32(name.encode()) + first + number
            generator = torch.Generator().manual_seed(seed)
            weights = torch.randn(piece.shape, generator=generator)
            total = total + (piece * weights.to(piece.device, piece.dtype)).sum()
    return total


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model that need a gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _with_leaves(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inputs, with those that need a gradient cut off from what computed them."""
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.requires_grad
    }
    return {**inputs, **leaves}, leaves


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
