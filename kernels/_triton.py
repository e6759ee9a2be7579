"""Triton if it is installed, and the devices on which ops launch Triton kernels.

Triton exists only on Linux. Without it, the modules with kernels can still be imported, and every
op runs its reference. With ``TRITON_INTERPRET=1``, Triton interprets kernels on CPU tensors with
NumPy. Ops then launch their kernels on the CPU too, so that tests cover them without a GPU.
"""

from __future__ import annotations

from typing import Any

__all__ = ["AVAILABLE", "INTERPRETED", "next_power_of_2", "tl", "triton"]

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


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least ``number``, which must be positive."""
    return 1 << (number - 1).bit_length()
