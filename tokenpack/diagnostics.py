"""What a model computes on one batch, line by line: sizes, value ranges, updates and gradients.

    update ratio    = |block(x) - x| / |x|               per block of the residual stream
    entropy         = mean over tokens of -sum p ln p    at most ln(vocab_size), if p is uniform
    gradient ratio  = |gradient| / |weight|              per module, against the median

Any transformers model can be inspected. Hooks observe one forward and are removed afterwards.
Gradients are computed without touching ``parameter.grad``. Every line has a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .table import format_table

UPDATE_RATIO = (0.01, 2.0)
"""The update ratios of healthy blocks."""

UNIFORM_SHARE = 0.9
"""The share of ln(vocab_size) that the entropy of a new model exceeds."""

_GRADIENT_SPREAD = 1000.0  # a gradient this many times larger or smaller than the median stands out
_BAR = 20


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a part of the model. Tied ones count where they occur first."""

    name: str
    count: int
    share: float


@dataclass(frozen=True)
class ModuleValues:
    """What a module returned. ``update_ratio`` is None for a module that is not a block."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    minimum: float
    mean: float
    maximum: float
    update_ratio: float | None
    verdict: str


@dataclass(frozen=True)
class ModuleWeights:
    """Weights of a module and their gradient. ``gradient_norm`` is None without a gradient."""

    name: str
    weight_norm: float
    gradient_norm: float | None
    verdict: str


@dataclass(frozen=True)
class ModelReport:
    """The result of `inspect_model`. ``str(report)`` is its tables.

    Attributes:
        parameters: one entry per part, and their sum.
        values: what the parts returned, in the order in which they ran.
        weights: one entry per module that has parameters of its own.
        loss: the loss of the batch, or None without labels.
        entropy: mean entropy of the predictions in nats, or None without logits.
        vocab_size: width of the logits, 0 without logits.
    """

    parameters: tuple[ParameterCount, ...]
    values: tuple[ModuleValues, ...]
    weights: tuple[ModuleWeights, ...]
    loss: float | None
    entropy: float | None
    vocab_size: int

    @property
    def entropy_verdict(self) -> str:
        """Whether the predictions are close to uniform, as those of a new model are."""
        if self.entropy is None:
            return "no logits"
        if not math.isfinite(self.entropy):
            return "not finite"
        if self.entropy >= UNIFORM_SHARE * math.log(self.vocab_size):
            return "close to uniform, as of a new model"
        return "not uniform: the model is trained, or its head starts too large"

    @property
    def problems(self) -> list[str]:
        """The lines whose verdict is not "ok", as "name: verdict"."""
        lines: list[Any] = [*self.values, *self.weights]
        return [f"{line.name}: {line.verdict}" for line in lines if line.verdict != "ok"]

    def __str__(self) -> str:
        counts = [
            (part.name, "█" * round(_BAR * part.share), f"{part.count:,}", f"{part.share:.1%}")
            for part in self.parameters
        ]
        tables = [format_table(("part", "", "parameters", "share"), counts)]
        ranges = [
            (
                *(line.name, str(list(line.shape)), str(line.dtype).removeprefix("torch.")),
                *(f"{value:+.3g}" for value in (line.minimum, line.mean, line.maximum)),
                "" if line.update_ratio is None else f"{line.update_ratio:.3g}",
                line.verdict,
            )
            for line in self.values
        ]
        heads: tuple[str, ...] = (
            "output of",
            "shape",
            "dtype",
            "min",
            "mean",
            "max",
            "update\nratio",
            "verdict",
        )
        tables.append(format_table(heads, ranges))
        if self.entropy is not None:
            uniform = math.log(self.vocab_size)
            tables.append(
                f"entropy {self.entropy:.3f} of at most {uniform:.3f} "
                f"({self.entropy / uniform:.1%}): {self.entropy_verdict}"
            )
        if self.loss is not None:
            tables.append(f"loss {self.loss:.4f}")
        health = [
            (
                *(line.name, f"{line.weight_norm:.3g}"),
                "" if line.gradient_norm is None else f"{line.gradient_norm:.3g}",
                line.verdict,
            )
            for line in self.weights
        ]
        heads = ("module", "norm of\nweights", "norm of\ngradient", "verdict")
        tables.append(format_table(heads, health))
        return "\n\n".join(tables)


def inspect_model(model: nn.Module, batch: Mapping[str, Any]) -> ModelReport:
    """Run one forward in eval mode, and with labels one backward, and report on them.

    Hooks are removed afterwards. ``parameter.grad`` and the modes of all modules stay, and random
    number generators go on as if the call had not been made. A patched model counts the forward in
    its statistics.

    Args:
        model: a transformers model, patched or not.
        batch: the arguments of its forward. Labels are needed for loss and gradients.

    Raises:
        TypeError: if ``batch`` is not a mapping.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch must map names of arguments to values, got {type(batch).__name__}")
    parts = dict(_parts(model))
    seen: list[ModuleValues] = []
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(_in_eval_mode(model))
        for name, (module, is_block) in parts.items():
            hook = _observer(name, is_block, seen)
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        with torch.enable_grad():
            outputs = model(**{**batch, "return_dict": True})
        loss = outputs.get("loss")
        gradients = _gradients(model, loss)
    entropy, classes = _entropy(outputs.get("logits"), batch.get("attention_mask"))
    return ModelReport(
        _count_parameters(model, parts),
        tuple(seen),
        _check_weights(model, gradients),
        None if loss is None else float(loss.detach()),
        entropy,
        classes,
    )


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _parts(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, bool]]]:
    """The parts by name: blocks (True), and the modules around them (False).

    A list of modules of one class is a list of blocks. A module that contains blocks is replaced by
    its children.
    """
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            is_stack = len({type(block) for block in child}) == 1
            for number, block in child.named_children():
                yield f"{name}.{number}", (block, is_stack)
        elif any(isinstance(inner, nn.ModuleList) for inner in child.modules()):
            yield from ((f"{name}.{inner}", part) for inner, part in _parts(child))
        elif not isinstance(child, (nn.Identity, nn.Dropout)):
            yield name, (child, False)


# ----------------------------------------------------------------------------------------- values


def _observer(name: str, is_block: bool, seen: list[ModuleValues]) -> Any:
    def observe(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        result = _first_tensor(output)
        if result is None or result.numel() == 0:
            return
        given = _first_tensor((*args, *kwargs.values())) if is_block else None
        seen.append(_describe(name, result.detach(), given))

    return observe


def _first_tensor(values: Any) -> Tensor | None:
    """The first floating-point tensor: hidden states come first in every block."""
    if isinstance(values, Tensor):
        return values if values.is_floating_point() else None
    if isinstance(values, Mapping):
        values = values.values()
    elif not isinstance(values, (tuple, list)):
        return None
    return next((t for t in map(_first_tensor, values) if t is not None), None)


def _describe(name: str, result: Tensor, given: Tensor | None) -> ModuleValues:
    wide = result.double()
    low, mean, high = wide.min().item(), wide.mean().item(), wide.max().item()
    ratio = None
    if given is not None and given.shape == result.shape:
        before = given.detach().double()
        norm = before.norm().item()
        ratio = (wide - before).norm().item() / norm if norm > 0.0 else math.inf
    return ModuleValues(
        *(name, tuple(result.shape), result.dtype, low, mean, high, ratio),
        _verdict_of_values(low, high, ratio),
    )


def _verdict_of_values(low: float, high: float, ratio: float | None) -> str:
    if not (math.isfinite(low) and math.isfinite(high)):
        return "not finite"
    if low == high:
        return "constant"
    if ratio is None:
        return "ok"
    if ratio < UPDATE_RATIO[0]:
        return f"update below {UPDATE_RATIO[0]}: the block does little"
    if not ratio <= UPDATE_RATIO[1]:
        return f"update above {UPDATE_RATIO[1]}: the block replaces its input"
    return "ok"


def _entropy(logits: Any, mask: Any) -> tuple[float | None, int]:
    """The mean entropy of the predictions at real tokens, and the number of classes."""
    if not isinstance(logits, Tensor):
        return None, 0
    rows = logits.detach()
    if isinstance(mask, Tensor) and mask.shape == rows.shape[:-1]:
        rows = rows[mask.to(rows.device) != 0]
    chances = rows.flatten(0, -2).double().log_softmax(-1)
    entropy = -(chances.exp() * chances).sum(-1)
    return entropy.mean().item(), logits.shape[-1]


# ---------------------------------------------------------------------------- weights and gradients


def _count_parameters(model: nn.Module, parts: dict[str, Any]) -> tuple[ParameterCount, ...]:
    counted: set[int] = set()

    def count(module: nn.Module) -> int:
        new = {id(p): p.numel() for p in module.parameters() if id(p) not in counted}
        counted.update(new)
        return sum(new.values())

    total = sum(parameter.numel() for parameter in model.parameters())
    counts = {name: count(module) for name, (module, _) in parts.items()}
    counts["others"] = total - sum(counts.values())
    counts["total"] = total
    return tuple(
        ParameterCount(name, number, number / max(total, 1))
        for name, number in counts.items()
        if number or name == "total"
    )


def _gradients(model: nn.Module, loss: Tensor | None) -> dict[int, Tensor | None]:
    """The gradient of each parameter that can have one, by its id. Empty without a loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if loss is None or not loss.requires_grad:
        return {}
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return {id(parameter): gradient for parameter, gradient in zip(trained, found)}


def _check_weights(
    model: nn.Module, gradients: dict[int, Tensor | None]
) -> tuple[ModuleWeights, ...]:
    norms = []
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if not own:
            continue
        found = [gradients.get(id(parameter)) for parameter in own]
        given = [gradient for gradient in found if gradient is not None]
        is_trained = any(id(parameter) in gradients for parameter in own)
        norms.append((name, _norm(own), _norm(given) if given else None, is_trained))
    ratios = [grad / weight for _, weight, grad, _ in norms if grad and weight > 0.0]
    typical = median(ratios) if ratios else 0.0
    return tuple(
        ModuleWeights(name, weight, grad, _verdict_of_weights(weight, grad, is_trained, typical))
        for name, weight, grad, is_trained in norms
    )


def _norm(tensors: list[Any]) -> float:
    return math.sqrt(sum(tensor.detach().double().square().sum().item() for tensor in tensors))


def _verdict_of_weights(
    weight: float, gradient: float | None, is_trained: bool, typical: float
) -> str:
    if not math.isfinite(weight):
        return "weights are not finite"
    if gradient is None:
        return "the loss does not depend on it" if is_trained else "ok"
    if not math.isfinite(gradient):
        return "gradient is not finite"
    if gradient == 0.0:
        return "gradient is zero"
    if weight == 0.0:
        return "ok"  # a bias that starts at zero
    ratio = gradient / weight
    if ratio > _GRADIENT_SPREAD * typical:
        return "gradient is far above the others"
    if ratio * _GRADIENT_SPREAD < typical:
        return "gradient is far below the others"
    return "ok"
