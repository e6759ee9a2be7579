"""What differs between two runs, and which one float64 agrees with."""

from __future__ import annotations

from torch import Tensor, nn

from ..adapters.suspend import entry_in, suspended
from ..checks import IGNORE_INDEX
from .bounds import Bounds
from .differences import Comparison, distance, size
from .reference import Errors, Result, errors_of
from .sequences import Batch, NoReferenceError
from .two_runs import TwoRuns


class Findings:
    """The comparisons of two runs."""

    def __init__(self, both: TwoRuns, bounds: Bounds) -> None:
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
                errors = errors_of(
                    both.model, both.forward, both.batch, runs, both.gradients, self._whole
                )
        except NoReferenceError as reason:
            self.notes.append(f"which run is right is not known: {reason}")
            return
        for comparison in self.comparisons:
            found = [self._error(comparison.name, e) for e in errors]
            comparison.padded_error, comparison.packed_error, comparison.batch_error = found

    def _whole(self, exact: nn.Module) -> Result:
        run, batch = self.both.run_exact(exact)
        return run, {name: _pieces(batch, name, value) for name, value in run.values.items()}

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
            sizes = [[size(run.get(name)) for name in names] for run in (padded, packed)]
            largest = max(sizes[0]) or max(sizes[1])
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
        names = [
            n for n in padded if not (self.both.batch.is_stream and n in self.both.batch.inputs)
        ]
        largest = max((size(padded[name]) for name in names), default=0.0)
        largest = largest or max((size(packed[name]) for name in names), default=0.0)
        groups: dict[str, float] = {}
        for name in names:
            difference = distance(padded[name], packed[name])
            groups[_group(name)] = max(difference, groups.get(_group(name), 0.0))
        for group, difference in groups.items():
            self._add(group, difference, largest, self.bounds.gradients, "")


def _pieces(batch: Batch, name: str, value: Tensor | None) -> list[Tensor] | None:
    return None if value is None else batch.pieces_of(name, value)


def _group_of_output(name: str) -> str:
    return name.split(".")[0] if not name.isdigit() else f"output {name}"


def _group(parameter: str) -> str:
    """The module of a parameter: a layer of a stack, or else what holds the parameter."""
    parts = parameter.split(".")
    at = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), max(1, len(parts) - 1))
    return f"gradients of {'.'.join(parts[:at])}"
