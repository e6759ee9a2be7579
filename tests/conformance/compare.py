"""Run one call on a patched and an unpatched model, and compare what both return."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from tokenpack import packing_stats, patch_model

from .entries import Call, Signature, calls
from .families import Case

PACKS, FALLS_BACK, REFUSED = "packs", "falls back", "refused"
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
# transformers computes many losses in float32, also of a float64 model.
FLOAT32_LOSS = 1e-5
FLOAT32_NORMS = 1e-6  # of gradients


class Allowed(NamedTuple):
    """The largest errors, relative to the largest of each output, or of all gradients."""

    values: float
    gradients: float
    loss: float


@dataclass
class Cell:
    """What one entry of one class does with each variant."""

    kinds: dict[str, str] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)  # by variant

    def add(self, variant: str, kind: str) -> None:
        order = (PACKS, FALLS_BACK, REFUSED)
        self.kinds[variant] = max(kind, self.kinds.get(variant, PACKS), key=order.index)


def _allowed(case: Case, dtype: torch.dtype) -> Allowed:
    tolerance = TOLERANCE[dtype]
    gradients = max(tolerance, FLOAT32_NORMS) if case.has_float32_norms else tolerance
    in_float32 = "loss_function" in inspect.unwrap(case.model_class.forward).__code__.co_names
    return Allowed(tolerance, gradients, max(tolerance, FLOAT32_LOSS) if in_float32 else tolerance)


@functools.lru_cache(maxsize=4)
def models(case: Case, dtype: torch.dtype) -> tuple[hf.PreTrainedModel, hf.PreTrainedModel]:
    """A patched model and the model without the patch."""
    reference = case.build(dtype)
    return patch_model(copy.deepcopy(reference)), reference


def run_cell(case: Case, entry: str) -> Cell:
    """Every variant of an entry, in training and evaluation, in float32 and float64."""
    cell = Cell()
    for dtype in case.dtypes:
        model, reference = models(case, dtype)
        name = case.parts()[entry]
        allowed = _allowed(case, dtype)
        signature = Signature(case, reference.get_submodule(name), entry)
        for training in (True, False):
            model.train(training)
            reference.train(training)
            variants = calls(signature, dtype, labels=training)
            if entry != "top" and not training:
                # The class of the part has a case of its own, which has all of them.
                variants = (each for each in variants if each[0] in ("right", "stream"))
            if dtype == torch.float32 and torch.float64 in case.dtypes:
                # float32 is here for its own code paths, which do not depend on the batch.
                variants = itertools.islice(variants, 1)
            for variant, call in variants:
                kind, fault = run_call(model, reference, name, call, allowed, cell.reasons)
                if fault is not None:
                    mode = f"{'train' if training else 'eval'}, {str(dtype).removeprefix('torch.')}"
                    cell.failures.setdefault(variant, f"({mode}) {fault}")
                cell.add(variant, kind)
    return cell


def run_call(
    model: hf.PreTrainedModel,
    reference: hf.PreTrainedModel,
    name: str,
    call: Call,
    allowed: Allowed,
    reasons: Counter[str],
) -> tuple[str, str | None]:
    """The kind of the call, and what is wrong with it; None if nothing is."""
    stats = packing_stats(model)
    packed, fallbacks = stats.packed_calls, stats.fallbacks.copy()
    theirs_call, theirs_leaves = _with_leaves(call)
    try:
        theirs = reference.get_submodule(name)(*theirs_call.args, **theirs_call.kwargs)
    except Exception as error:
        return REFUSED, f"the unpatched model raises {_short(error)}"
    ours_call, ours_leaves = _with_leaves(call if call.stream is None else Call(call.stream))
    try:
        ours = model.get_submodule(name)(*ours_call.args, **ours_call.kwargs)
    except (ValueError, RuntimeError) as error:
        reasons[str(error)] += 1
        return REFUSED, None if _is_named(error) else f"raises {_short(error)}"
    except Exception as error:
        return REFUSED, f"raises {_short(error)}"
    fell_back = stats.fallbacks - fallbacks
    reasons.update(fell_back)
    if stats.packed_calls == packed:
        if not fell_back:
            return FALLS_BACK, "neither packs nor counts a fall back"
        kind, call = FALLS_BACK, Call(call.kwargs)  # compare all slots
    else:
        kind = FALLS_BACK if fell_back else PACKS
    may_drop_logits = kind == PACKS and model.training and call.has_token_labels
    parameters = [p for p in reference.parameters() if p.requires_grad] + theirs_leaves
    patched = [p for p in model.parameters() if p.requires_grad] + ours_leaves
    left, right = _flat(ours), _flat(theirs)
    if call.stream is not None:
        left = {name: _in_rows(call, value) for name, value in left.items()}
    if may_drop_logits:
        for name in ("logits", "1"):
            if name in right and left.get(name) is None:
                right.pop(name)
                left.pop(name, None)
                break
    if kind == PACKS and model.training:
        for name in [n for n, value in right.items() if _is_cache(value)]:
            if left.get(name) is None:
                del right[name]
                left.pop(name, None)
    if isinstance(ours, tuple) != isinstance(theirs, tuple):
        return kind, f"returns a {type(ours).__name__}, not a {type(theirs).__name__}"
    fault, objectives = _compare_values(call, left, right, allowed)
    if fault is None:
        tolerance = allowed.gradients
        if any(isinstance(value, Tensor) and value.dim() == 0 for value in right.values()):
            tolerance = max(tolerance, allowed.loss)
        fault = _compare_gradients(objectives, patched, parameters, tolerance)
    return kind, fault


def _is_cache(output: Any) -> bool:
    """Whether an output from `_flat` is a cache, of which only the class is compared."""
    return isinstance(output, str) and output.endswith("Cache")


def _is_named(error: Exception) -> bool:
    """Whether a `raise` of tokenpack raised the error, and not PyTorch or transformers."""
    frame, _ = list(traceback.walk_tb(error.__traceback__))[-1]
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    module = frame.f_globals["__name__"]
    return module.partition(".")[0] == "tokenpack" and line.startswith("raise ")


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _with_leaves(call: Call) -> tuple[Call, list[Tensor]]:
    """A copy of the call whose embeddings and hidden states are leaves that need gradients."""
    leaves: list[Tensor] = []

    def leaf(name: str, value: Any) -> Any:
        if isinstance(value, BaseModelOutput):
            return BaseModelOutput(last_hidden_state=leaf("hidden", value.last_hidden_state))
        if isinstance(value, Tensor) and value.is_floating_point() and "mask" not in name:
            if value.dim() == 4:  # a mask by position
                return value
            leaves.append(value.clone().requires_grad_())
            return leaves[-1]
        return value

    kwargs = {name: leaf(name, value) for name, value in call.kwargs.items()}
    args = tuple(leaf("", value) for value in call.args)
    return Call(kwargs, call.masks, args), leaves


def _flat(outputs: Any, prefix: str = "") -> dict[str, Any]:
    """The tensors of an output by name, None for a missing position."""
    if isinstance(outputs, Tensor) or outputs is None:
        return {prefix or "0": outputs}
    if isinstance(outputs, dict):
        items: Any = outputs.items()
    elif isinstance(outputs, (tuple, list)):
        items = enumerate(outputs)
    else:
        return {prefix: type(outputs).__name__}
    flat: dict[str, Any] = {}
    for name, value in items:
        flat.update(_flat(value, f"{prefix}.{name}" if prefix else str(name)))
    return flat


def _in_rows(call: Call, output: Any) -> Any:
    """An output for a stream, in the padded rows of the call."""
    for mask in call.masks:
        total = int(mask.sum())
        if isinstance(output, Tensor) and output.shape[:2] == (1, total):
            rows = output.new_zeros((*mask.shape, *output.shape[2:]))
            rows[mask] = output[0]
            return rows
    return output


def _compare_values(
    call: Call, ours: dict[str, Any], theirs: dict[str, Any], allowed: Allowed
) -> tuple[str | None, list[Tensor]]:
    """What differs, and a random linear functional of both outputs at real slots."""
    objectives = [torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    if ours.keys() != theirs.keys():
        return f"returns {sorted(ours)}, not {sorted(theirs)}", objectives
    generator = torch.Generator().manual_seed(11)
    for name, expected in theirs.items():
        value = ours[name]
        if not isinstance(expected, Tensor) or not isinstance(value, Tensor):
            if type(value) is not type(expected) or value != expected:
                return f"{name} is {value}, not {expected}", objectives
            continue
        is_loss = expected.dim() == 0
        # The packed loss has the dtype of the model, and that of transformers may be float32.
        may_differ = is_loss and allowed.loss > allowed.values
        if value.shape != expected.shape or not (may_differ or value.dtype == expected.dtype):
            shapes = f"{value.shape} {value.dtype}, not {expected.shape} {expected.dtype}"
            return f"{name} is {shapes}", objectives
        value, expected = call.real(name, value), call.real(name, expected)
        if not torch.isfinite(expected).all():
            return f"the unpatched model's {name} is not finite", objectives
        error = _distance(value, expected)
        if not error <= (allowed.loss if is_loss else allowed.values):
            return f"{name} differs by {error:.1e} of the largest", objectives
        if expected.is_floating_point() and expected.requires_grad:
            weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
            weight = torch.ones(()) if is_loss else weight / max(1, expected.numel()) ** 0.5
            for at, tensor in enumerate((value, expected)):
                objectives[at] = objectives[at] + (tensor.double() * weight).sum()
    return None, objectives


def _compare_gradients(
    objectives: list[Tensor], our_inputs: list[Tensor], their_inputs: list[Tensor], tolerance: float
) -> str | None:
    if not objectives[1].requires_grad:
        return "the unpatched model's outputs have no gradient"
    if not objectives[0].requires_grad:
        return "the outputs have no gradient"
    ours, theirs = (
        torch.autograd.grad(objective, inputs, allow_unused=True)
        for objective, inputs in zip(objectives, (our_inputs, their_inputs))
    )
    largest = max(float(g.abs().max()) for g in theirs if g is not None)
    if not largest > 0:
        return "the unpatched model's gradients are zero"
    worst = 0.0
    for one, other in zip(ours, theirs):
        if one is None and other is None:
            continue
        one = torch.zeros_like(other) if one is None else one
        other = torch.zeros_like(one) if other is None else other
        error = float((one - other).abs().max())
        if not error <= tolerance * largest:
            worst = max(worst, error) if error == error else float("inf")
    return f"a gradient differs by {worst / largest:.1e} of the largest" if worst else None


def _distance(value: Tensor, expected: Tensor) -> float:
    if expected.numel() == 0:
        return 0.0
    value, expected = value.detach(), expected.detach()
    scale = max(float(expected.double().abs().max()), 1e-30)
    return float((value.double() - expected.double()).abs().max()) / scale
