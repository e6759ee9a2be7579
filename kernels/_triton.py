"""Triton, where there is one, and the devices whose tensors go to Triton kernels.

Triton exists on Linux alone. Elsewhere the files that hold kernels still import, and every op runs
its reference. Under ``TRITON_INTERPRET=1`` Triton runs kernels on CPU tensors, in NumPy: the ops
then take their kernels there too, which is how the tests run them without a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

__all__ = ["AVAILABLE", "INTERPRETED", "next_power_of_2", "on_triton", "tl", "triton"]

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Absent:
        """Takes the place of a module in decorators and annotations, and of nothing else."""

        @staticmethod
        def jit(function: Any = None, **options: Any) -> Any:
            return function if function is not None else lambda function: function

    triton = tl = _Absent()

AVAILABLE = hasattr(triton, "__version__")
INTERPRETED = AVAILABLE and triton.knobs.runtime.interpret
DEVICES = (["cuda", "cpu"] if INTERPRETED else ["cuda"]) if AVAILABLE else []


def on_triton(op: Any) -> Callable[[Callable], Callable]:
    """Decorator: the function is what ``op`` runs where Triton does."""

    def register(launcher: Callable) -> Callable:
        @functools.wraps(launcher)
        def on_device_of_tensors(*args: Any, **kwargs: Any) -> Any:
            # Triton launches on the current device, which need not be the tensors'.
            with torch.cuda.device(_first_tensor(args).device):
                return launcher(*args, **kwargs)

        for device in DEVICES:
            op.register_kernel(device)(on_device_of_tensors if device == "cuda" else launcher)
        return launcher

    return register


def _first_tensor(args: Iterable[Any]) -> torch.Tensor:
    """The first tensor among arguments of an op, which are tensors or begin with a list of them."""
    first = next(iter(args))
    return first if isinstance(first, torch.Tensor) else first[0]


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below ``number``, which is 1 or more."""
    return 1 << (number - 1).bit_length()
