"""Remember what was computed from a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

_R = TypeVar("_R")


class LastResult(Generic[_R]):
    """A function of one tensor that returns its last result if it gets the same tensor again.

    The tensor must not have been changed in place. An inference tensor does not count its changes,
    so its result is computed each time.
    """

    __slots__ = ("_function", "_known")

    def __init__(self, function: Callable[[Tensor], _R]) -> None:
        self._function = function
        self._known: tuple[Tensor, int, _R] | None = None

    def __call__(self, tensor: Tensor) -> _R:
        if tensor.is_inference():
            return self._function(tensor)
        known = self._known
        if known is None or known[0] is not tensor or known[1] != tensor._version:
            known = self._known = tensor, tensor._version, self._function(tensor)
        return known[2]
