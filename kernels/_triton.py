"""Triton if it is installed, and the devices on which ops launch Triton kernels.

Triton exists only on Linux. Without it, the modules with kernels can still be imported, and every
op runs its reference. With ``TRITON_INTERPRET=1``, Triton interprets kernels on CPU tensors with
NumPy. Ops then launch their kernels on the CPU too, so that tests cover them without a GPU.
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
        """A placeholder for a module, in decorators, annotations and constants only."""

        @staticmethod
        def jit(function: Any = None, **options: Any) -> Any:
            return function if function is not None else lambda function: function

        @staticmethod
        def constexpr(value: Any) -> Any:
            return value

    triton = tl = _Absent()

AVAILABLE = hasattr(triton, "__version__")
INTERPRETED = AVAILABLE and triton.knobs.runtime.interpret
DEVICES = (["cuda", "cpu"] if INTERPRETED else ["cuda"]) if AVAILABLE else []


def on_triton(op: Any) -> Callable[[Callable], Callable]:
    """Decorator: register a function as the implementation of ``op`` on Triton's devices."""

    def register(launcher: Callable) -> Callable:
        @functools.wraps(launcher)
        def on_device_of_tensors(*args: Any, **kwargs: Any) -> Any:
            # Triton launches on the current device, which may differ from the tensors' device.
            with torch.cuda.device(_first_tensor(args).device):
                return launcher(*args, **kwargs)

        for device in DEVICES:
            op.register_kernel(device)(on_device_of_tensors if device == "cuda" else launcher)
        return launcher

    return register


def _first_tensor(args: Iterable[Any]) -> torch.Tensor:
    """The first argument of an op, or its first element if the argument is a list of tensors."""
    first = next(iter(args))
    return first if isinstance(first, torch.Tensor) else first[0]


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least ``number``, which must be positive."""
    return 1 << (number - 1).bit_length()
