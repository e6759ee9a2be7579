"""`check_patch`: run a batch through a model as it is and patched, and compare.

1  the patched model runs the batch
2  the patch is taken off, and the same model runs it again from the same random state
3  only where the two differ by more than rounding: a float64 copy without the patch runs each
   sequence alone, and says which one is right
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..adapters import is_patched, patch_model, unpatch_model
from .bounds import bounds_of
from .findings import Findings
from .float64 import KeepFloat64
from .reference import Forward
from .result import PatchCheck
from .state import Kept, kept_state, refuse_sharded
from .two_runs import TwoRuns


def check_patch(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    labels: bool = True,
    gradients: bool = True,
    dtype: torch.dtype | None = None,
) -> PatchCheck:
    """Compare a model with itself patched, on a batch of yours.

    Both runs use the model as it is: with its adapters, its hooks, a forward that TRL has replaced,
    in training or in evaluation mode. A model that is patched already is tested with its own patch,
    and without it. Dropout is set to 0, because the padded and the packed run would drop different
    values. Afterwards the model is as before: patched or not, with its gradients, buffers, dropout,
    counters and the random state. Only a hook of yours that keeps something keeps it of all runs.

    The packed run is right if it equals the padded one up to rounding. Where they differ by more,
    but by no more than rounding can add up to, it is right if it is no further from float64 than
    the padded run. The reference in float64 is each sequence alone, without padding.
    ``docs/exactness.md`` lists the bounds.

    Args:
        model: a `transformers.PreTrainedModel`, or one wrapped by PEFT, DDP or ``torch.compile``.
        batch: the keywords of ``model(**batch)``, on the model's device. A batch with
            ``cu_seqlens`` is compared with padded rows of the same sequences.
        labels: False leaves labels out of the batch. Without a loss, the gradients are those of a
            weighted sum of the outputs.
        gradients: compare the gradients of all parameters that need one, and of inputs that do.
        dtype: run copies of the model in this dtype. ``torch.float64`` also computes the norms and
            losses in float64 that transformers computes in float32. None runs the model itself.

    Returns:
        The comparison. ``print`` shows it, and ``ok`` is True if the batch was packed and the
        numbers are right.

    Raises:
        TypeError: if ``model`` contains no transformers model.
        ValueError: if `patch_model` refuses the model, if its parameters are sharded (FSDP,
            DeepSpeed ZeRO-3), or if ``batch`` is no mapping.
        Exception: what the unpatched model raises on this batch.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"batch must be a mapping, got {type(batch).__name__}")
    while isinstance(model, (DataParallel, DistributedDataParallel)):
        model = model.module
    refuse_sharded(model)
    inputs = {n: v for n, v in batch.items() if labels or n not in ("labels", "num_items_in_batch")}
    if dtype is not None:
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, got {dtype}")
        model = copy.deepcopy(model).to(dtype)
        inputs = {name: _cast(value, dtype) for name, value in inputs.items()}
    pure = dtype == torch.float64
    with KeepFloat64() if pure else contextlib.nullcontext(), _patched(model):
        return compare(model, inputs, lambda m: m, gradients=gradients, pure=pure)


def compare(
    model: nn.Module,
    inputs: Mapping[str, Any],
    forward: Forward,
    *,
    gradients: bool = True,
    pure: bool = False,
    measure: bool = True,
) -> PatchCheck:
    """Compare a patched model, or a part of one, with itself without the patch.

    Args:
        model: that is called.
        inputs: the arguments by name.
        forward: from a model to the function to call.
        gradients: as for `check_patch`.
        pure: everything is computed in float64.
        measure: run both a second time, for their time and memory.
    """
    with kept_state(model) as kept:
        both = TwoRuns(model, inputs, forward, kept, gradients)
        stats, error = both.run_packed()
        both.run_padded()
        found = Findings(both, bounds_of(both.rounding, pure))
        if error is None:
            found.compare()
        if any(not comparison.is_within_rounding for comparison in found.comparisons):
            found.ask_float64()
        check = PatchCheck(found.comparisons, stats, both.setting, both.losses, both.seconds)
        check.error, check.notes = error, found.notes
        if measure and error is None:
            check.peak_bytes, check.seconds = both.measure()
    check.notes = _notes(check, both, kept) + check.notes
    return check


@contextlib.contextmanager
def _patched(model: nn.Module) -> Iterator[None]:
    if is_patched(model):
        yield
        return
    patch_model(model)
    try:
        yield
    finally:
        unpatch_model(model)


def _notes(check: PatchCheck, both: TwoRuns, kept: Kept) -> list[str]:
    notes = []
    if both.padded.loss is None:
        has = "the model returns no loss" if "labels" in both.batch.inputs else "no labels, no loss"
        taken = "; the gradients are those of a weighted sum of the outputs"
        notes.append(has + (taken if both.padded.gradients else ""))
    if both.gradients and not both.padded.gradients:
        notes.append("no gradients: no parameter and no input needs one")
    if kept.num_silenced:
        notes.append(
            f"dropout was set to 0 in {kept.num_silenced} modules: with the same seed, the padded "
            "and the packed run drop different values"
        )
    if check.differences and both.drew:
        notes.append("the forward draws random numbers, which may be the difference")
    if both.batch.is_stream:
        notes.append("the padded run had the sequences of cu_seqlens in rows of their own")
    return notes


def _cast(value: Any, dtype: torch.dtype) -> Any:
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floats else value
