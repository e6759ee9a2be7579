"""`check_patch`: run a batch through a model as it is and patched, and compare.

    1  the patched model runs the batch
    2  the patch is taken off, and the same model runs it again from the same random state
    3  only where the two differ by more than rounding: a float64 copy without the patch runs each
       sequence alone, and says which one is right
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..adapters import PackingStats, is_patched, patch_model, unpatch_model
from ..adapters.patching import transformers_model
from ..adapters.suspend import entry_in, fresh_counters, is_free_of_patch, suspended
from ..checks import IGNORE_INDEX
from ..cost.allocations import peak_bytes
from .bounds import Bounds, bounds_of
from .differences import Comparison, distance, size
from .float64 import KeepFloat64
from .reference import Errors, Forward, errors_of
from .result import PatchCheck
from .runs import Run, run_once, trainable
from .sequences import Batch, Model, NoReferenceError
from .state import Kept, device_of, kept_state, refuse_sharded, rounding_of


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
        both = _Both(model, inputs, forward, kept, gradients)
        stats, error = both.run_packed()
        both.run_padded()
        found = _Findings(both, bounds_of(both.rounding, pure))
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


class _Both:
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
        with suspended(self.model), fresh_check(self.model):
            self.padded = self._once(self.padded_batch)
            self.drew = self.kept.drew()
        labels, items = (self.batch.inputs.get(n) for n in ("labels", "num_items_in_batch"))
        model = self.batch.model
        if model.token_labels and not model.shifts_labels and None not in (labels, items):
            self._divide_by_items(labels, items)

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

    def _divide_by_items(self, labels: Tensor, items: Any) -> None:
        """T5, BART, BERT and others ignore ``num_items_in_batch``. A patched model divides by it."""
        factor = float((labels != IGNORE_INDEX).sum()) / float(items)
        if self.padded.loss is not None:
            self.padded.loss = self.padded.loss * factor
            self.padded.gradients = {
                name: None if g is None else g * factor for name, g in self.padded.gradients.items()
            }


class _Findings:
    """The comparisons of two runs."""

    def __init__(self, both: _Both, bounds: Bounds) -> None:
        self.both, self.bounds = both, bounds
        self.comparisons: list[Comparison] = []
        self.notes: list[str] = []
        self._sizes: dict[str, float] = {}
        packed, padded = both.packed, both.padded
        self._packed_pieces = {n: _pieces(both.batch, n, v) for n, v in packed.values.items()}
        self._padded_pieces = {
            n: _pieces(both.padded_batch, n, v) for n, v in padded.values.items()
        }

    def compare(self) -> None:
        self._loss()
        self._outputs()
        self._gradients()

    def ask_float64(self) -> None:
        """Fill in the errors of both runs against float64 on each sequence alone."""
        both = self.both
        runs = [(both.padded, self._padded_pieces), (both.packed, self._packed_pieces)]
        try:
            with suspended(both.model):
                both.kept.rewind()
                errors = errors_of(both.model, both.forward, both.batch, runs, both.gradients)
        except NoReferenceError as reason:
            self.notes.append(f"which run is right is not known: {reason}")
            return
        for comparison in self.comparisons:
            padded, packed = (self._error(comparison.name, e) for e in errors)
            comparison.padded_error, comparison.packed_error = padded, packed

    def _error(self, name: str, errors: Errors) -> float | None:
        found = [errors.loss] if name == "loss" and self.both.padded.loss is not None else []
        found += [e for output, e in errors.outputs.items() if _group_of_output(output) == name]
        if name.startswith("gradients"):
            found += [e for n, e in errors.gradients.items() if _group(n) == name]
        return max(found) / self._sizes[name] if found else None

    def _add(self, name: str, difference: float, size: float, allowed: float, note: str) -> None:
        self._sizes[name] = size = size or 1.0
        self.comparisons.append(
            Comparison(name, difference / size, allowed, self.bounds.large, note=note)
        )

    def _loss(self) -> None:
        padded, packed = self.both.padded.loss, self.both.packed.loss
        if padded is None and packed is None:
            return
        note = "" if None not in (padded, packed) else "DIFFERS: only one run has a loss"
        difference = distance(padded, packed) if not note else float("inf")
        inputs = self.both.batch.inputs
        items, share = inputs.get("num_items_in_batch"), 1.0
        if items is not None and "labels" in inputs:
            share = float((inputs["labels"] != IGNORE_INDEX).sum()) / float(items)
        # A loss near 0 is the difference of numbers near 1.
        self._add("loss", difference, max(size(padded), share), self.bounds.loss, note)

    def _outputs(self) -> None:
        padded, packed = self.both.padded.values, self.both.packed.values
        if any(v is not None and packed.get(n) is None for n, v in padded.items()):
            for name, value in self.both.logits().items():
                if packed.get(name) is None:
                    packed[name] = value
                    self._packed_pieces[name] = _pieces(self.both.batch, name, value)
        groups: dict[str, list[str]] = {}
        for name in {**padded, **packed}:
            groups.setdefault(_group_of_output(name), []).append(name)
        for group, names in groups.items():
            notes = [note for note in map(self._shape_note, names) if note]
            skipped = all(note.startswith("not") for note in notes) and bool(notes)
            compared = [] if notes else [self._distance(name) for name in names]
            difference = max(compared, default=0.0 if skipped else float("inf"))
            largest = max(size(padded.get(name)) for name in names)
            if not any(padded.get(name) is not None for name in names) and skipped:
                continue
            note = notes[0] if notes else ""
            self._add(group, difference, largest, self.bounds.outputs, note)

    def _shape_note(self, name: str) -> str:
        """Why an output cannot be compared. Empty if it can be."""
        padded, packed = (run.values.get(name) for run in (self.both.padded, self.both.packed))
        if padded is None or packed is None:
            state = entry_in(self.both.model).state
            if padded is None and packed is None:
                return "not computed"
            if packed is None and state.logits == "never" and name in ("logits", "1"):
                return "not computed (logits='never')"
            return f"DIFFERS: only the {'packed' if padded is None else 'padded'} run has it"
        if self.both.batch.is_stream:
            pieces = self._padded_pieces[name], self._packed_pieces[name]
            return "not compared: its slots are not known" if None in pieces else ""
        if padded.shape == packed.shape:
            return ""
        return f"DIFFERS: shape {tuple(packed.shape)}, not {tuple(padded.shape)}"

    def _distance(self, name: str) -> float:
        padded, packed = self._padded_pieces[name], self._packed_pieces[name]
        if padded is None or packed is None:
            return distance(self.both.padded.values[name], self.both.packed.values[name])
        if len(padded) != len(packed):
            return float("inf")
        return max((distance(a, b) for a, b in zip(padded, packed)), default=0.0)

    def _gradients(self) -> None:
        padded, packed = self.both.padded.gradients, self.both.packed.gradients
        if bool(padded) != bool(packed):
            which = "padded" if padded else "packed"
            note = f"DIFFERS: only the {which} run has gradients"
            self._add("gradients", float("inf"), 1.0, self.bounds.gradients, note)
            return
        names = [n for n in padded if not (self.both.batch.is_stream and n in _inputs(self.both))]
        largest = max((size(padded[name]) for name in names), default=0.0)
        groups: dict[str, float] = {}
        for name in names:
            difference = distance(padded[name], packed[name])
            groups[_group(name)] = max(difference, groups.get(_group(name), 0.0))
        for group, difference in groups.items():
            self._add(group, difference, largest, self.bounds.gradients, "")


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


@contextlib.contextmanager
def fresh_check(model: nn.Module) -> Iterator[None]:
    """Raise RuntimeError if a model without its patch is still patched somewhere."""
    if not is_free_of_patch(model):
        raise RuntimeError(f"{type(model).__name__} could not be unpatched for the comparison")
    yield


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


def _notes(check: PatchCheck, both: _Both, kept: Kept) -> list[str]:
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


def _pieces(batch: Batch, name: str, value: Tensor | None) -> list[Tensor] | None:
    return None if value is None else batch.pieces_of(name, value)


def _inputs(both: _Both) -> Mapping[str, Any]:
    return both.batch.inputs


def _group_of_output(name: str) -> str:
    return name.split(".")[0] if not name.isdigit() else f"output {name}"


def _group(parameter: str) -> str:
    """The module of a parameter: a layer of a stack, or else what holds the parameter."""
    parts = parameter.split(".")
    at = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), max(1, len(parts) - 1))
    return f"gradients of {'.'.join(parts[:at])}"


def _cast(value: Any, dtype: torch.dtype) -> Any:
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floats else value
