"""Keep a float64 model in float64, where transformers asks for float32."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class KeepFloat64(TorchFunctionMode):
    """Answer every request for float32 with float64.

    transformers computes norms, rotary angles and losses in float32, also in a float64 model:
    ``hidden.to(torch.float32)``, ``logits.float()``, ``softmax(..., dtype=torch.float32)``.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` with float64 in place of float32."""
        if func is torch.Tensor.float:
            return args[0].double()
        args = tuple(_wider(value) for value in args)
        return func(*args, **{name: _wider(value) for name, value in (kwargs or {}).items()})


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
