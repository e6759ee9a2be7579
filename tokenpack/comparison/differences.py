"""The distance of two tensors, and what it says about two runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .bounds import FACTOR


@dataclass
class Comparison:
    """One quantity in both runs.

    Attributes:
        name: the loss, an output, or a module whose gradients these are.
        difference: the largest one, relative to the size of the quantity.
        allowed: the bound of rounding.
        large: the bound above which the runs differ, whatever float64 says.
        padded_error: of the padded run against float64 on each sequence alone. None if it was not
            needed or cannot be computed.
        packed_error: the same of the packed run.
        batch_error: of the padded run in float64. Above 0, the result of a sequence depends on the
            rest of the batch, and float64 on a sequence alone is no reference.
        note: what else there is to say.
    """

    name: str
    difference: float
    allowed: float
    large: float
    padded_error: float | None = None
    packed_error: float | None = None
    batch_error: float | None = None
    note: str = ""

    @property
    def is_within_rounding(self) -> bool:
        """Whether the two are equal up to rounding."""
        return self.difference <= self.allowed

    @property
    def ok(self) -> bool:
        """Whether the packed run is right."""
        if self.is_within_rounding:
            return True
        if not self.difference <= self.large or None in (self.padded_error, self.packed_error):
            return False
        if self.depends_on_batch:
            return False
        padded, packed = self.padded_error or 0.0, self.packed_error or 0.0
        near = max(padded, packed) <= self.large
        return packed <= self.allowed or (near and packed <= FACTOR * padded)

    @property
    def depends_on_batch(self) -> bool:
        """Whether the result of a sequence depends on the rest of the batch."""
        return self.batch_error is not None and not self.batch_error <= self.allowed / 4

    @property
    def nearer(self) -> str:
        """Which run is nearer to float64: ``"packed"``, ``"padded"``, or ``""`` if not known."""
        if self.padded_error is None or self.packed_error is None:
            return ""
        return "packed" if self.packed_error <= self.padded_error else "padded"

    @property
    def result(self) -> str:
        """In words."""
        if self.note:
            return self.note
        if self.is_within_rounding:
            return "equal"
        if self.depends_on_batch:
            return "DIFFERS: a sequence depends on the rest of the batch"
        words = "equal" if self.ok else "DIFFERS"
        return f"{words}: {self.nearer} is nearer to float64" if self.nearer else words


def distance(one: Tensor | None, other: Tensor | None) -> float:
    """The largest absolute difference. None is zero.

    Infinite if the shapes differ or a value is NaN, also if both are: nothing is compared then.
    """
    if one is None or other is None:
        present = one if other is None else other
        return 0.0 if present is None or not present.numel() else _largest(present.double().abs())
    if one.shape != other.shape:
        return float("inf")
    if not one.numel():
        return 0.0
    one, other = one.detach().double(), other.detach().to(one.device).double()
    same = one == other  # infinite logits of masked classes, whose difference is NaN
    return _largest((one - other).abs().masked_fill(same, 0.0))


def size(value: Tensor | None) -> float:
    """The largest finite absolute value."""
    if value is None or not value.numel():
        return 0.0
    return float(value.detach().double().abs().nan_to_num(0.0, 0.0, 0.0).max())


def _largest(values: Tensor) -> float:
    return float(torch.nan_to_num(values.double(), nan=float("inf"), posinf=float("inf")).max())
