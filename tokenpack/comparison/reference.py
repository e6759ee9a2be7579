"""The errors of both runs against float64 on each sequence alone.

    loss = sum over sequences of  n_s / N * loss of sequence s alone

n_s is the number of labels of a sequence, and N that of the batch, or ``num_items_in_batch``. Where
labels belong to rows, each row weighs the same. A sequence alone is a batch of one row without
padding after it, so no error of padding, packing or masking can be in it. But it is only the truth
about a model that computes each row by itself. So the padded batch runs in float64 too: if that is
not the same, the result depends on what else is in the batch, and what the packed run left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .differences import distance
from .float64 import KeepFloat64
from .runs import Run, flatten, pop_loss, trainable, weighted_sum
from .sequences import Batch, NoReferenceError

Forward = Callable[[nn.Module], Callable[..., Any]]
Pieces = Mapping[str, "list[Tensor] | None"]
Result = tuple[Run, Pieces]


@dataclass
class Errors:
    """The largest absolute errors of one run, by the name of an output or a parameter."""

    loss: float = 0.0
    outputs: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)


def errors_of(
    model: nn.Module,
    forward: Forward,
    batch: Batch,
    runs: Sequence[Result],
    gradients: bool,
    whole: Callable[[nn.Module], Result],
) -> list[Errors]:
    """The errors of runs of the same batch, and of the padded batch in float64.

    Args:
        model: not patched.
        forward: from a model to the function to call.
        batch: of the runs.
        runs: each with the pieces of its outputs, by the number of the sequence.
        gradients: whether the runs took gradients.
        whole: runs the padded batch with a model in float64.

    Raises:
        NoReferenceError: if the model cannot be copied, or a copy in float64 cannot run.
    """
    try:
        exact = copy.deepcopy(model).double()
        with KeepFloat64(), torch.autocast(_device_type(exact), enabled=False):
            runs = [*runs, whole(exact)]
            return _errors(exact, forward(exact), batch, runs, gradients)
    except NoReferenceError:
        raise
    except Exception as error:  # whatever a model in an unusual dtype raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise NoReferenceError(f"a copy in float64 does not run: {reason}") from error


def _errors(
    exact: nn.Module,
    call: Callable[..., Any],
    batch: Batch,
    runs: Sequence[Result],
    gradients: bool,
) -> list[Errors]:
    shares = _shares(batch)
    found = [Errors() for _ in runs]
    wanted = trainable(exact) if gradients else {}
    total: float | None = None
    sums: dict[str, Tensor] = {}
    for number, inputs in batch.alone():
        inputs, leaves = doubled(inputs)
        with torch.set_grad_enabled(gradients):
            alone = batch.with_inputs(inputs)
            outputs = flatten(call(**inputs))
            loss = pop_loss(outputs, has_labels="labels" in inputs)
            objective: Any = weighted_sum(alone, outputs, number) if loss is None else 0.0
            if loss is not None and shares[number]:
                objective = loss * shares[number]
                total = (total or 0.0) + float(objective.detach())
            if gradients and isinstance(objective, Tensor) and objective.requires_grad:
                taken = torch.autograd.grad(
                    objective, [*wanted.values(), *leaves.values()], allow_unused=True
                )
                _add(sums, batch, number, dict(zip([*wanted, *leaves], taken)))
        _compare_outputs(found, runs, alone, outputs, number)
    for errors, (run, _) in zip(found, runs):
        if run.loss is not None:
            errors.loss = float("inf") if total is None else abs(float(run.loss) - total)
        for name, gradient in run.gradients.items():
            errors.gradients[name] = distance(gradient, sums.get(name))
    return found


def _shares(batch: Batch) -> list[float]:
    """The weight of each sequence in the loss."""
    counts = batch.label_counts()
    if counts is None:
        return [1 / max(1, len(batch))] * len(batch)
    total = batch.inputs.get("num_items_in_batch")
    total = max(1, sum(counts)) if total is None else float(total)
    return [count / total for count in counts]


def doubled(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Inputs in float64, and those of them that need a gradient."""
    found: dict[str, Any] = {}
    for name, value in inputs.items():
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        found[name] = value
        if is_float:
            found[name] = value.detach().double().requires_grad_(value.requires_grad)
    leaves = {n: v for n, v in found.items() if isinstance(v, Tensor) and v.requires_grad}
    return found, leaves


def _device_type(model: nn.Module) -> str:
    return next((p.device.type for p in model.parameters()), "cpu")


def _add(
    sums: dict[str, Tensor], batch: Batch, number: int, taken: dict[str, Tensor | None]
) -> None:
    """Add the gradients of one sequence. Those of an input go where the sequence is in it."""
    for name, gradient in taken.items():
        if gradient is None:
            continue
        whole = batch.inputs.get(name)
        if isinstance(whole, Tensor):
            place = sums.setdefault(name, torch.zeros_like(whole, dtype=torch.float64))
            place[batch.slots_alone(name, number)] += gradient[0]
        elif name in sums:
            sums[name] += gradient
        else:
            sums[name] = gradient.clone()


def _compare_outputs(
    found: list[Errors],
    runs: Sequence[Result],
    alone: Batch,
    outputs: Mapping[str, Tensor | None],
    number: int,
) -> None:
    for name, value in outputs.items():
        expected = None if value is None else alone.pieces_of(name, value)
        for errors, (_, pieces) in zip(found, runs):
            mine = pieces.get(name)
            if expected and mine:
                error = distance(mine[number], expected[0])
                errors.outputs[name] = max(error, errors.outputs.get(name, 0.0))
