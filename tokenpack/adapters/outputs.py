"""Outputs without logits, in which position 1 is not silently something else.

A `ModelOutput` leaves out fields that are None when it is read by position. Without logits,
``outputs[1]`` of an encoder-decoder would be ``encoder_last_hidden_state``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


@torch.compiler.assume_constant_result  # torch.compile cannot make a class
def without_logits(output: Any) -> Any:
    """A subclass of ``output`` that keeps the position of ``logits``.

    ``to_tuple`` and slices have None there. Reading the position raises an error.
    """
    return _without_logits(output)


@functools.cache
def _without_logits(output: Any) -> Any:
    def to_tuple(self: Any) -> tuple[Any, ...]:
        names = [name for name in self.__dataclass_fields__ if name == "logits" or name in self]
        return tuple(self.get(name) for name in names)

    def __getitem__(self: Any, key: Any) -> Any:
        if not isinstance(key, int):
            return self.to_tuple()[key] if isinstance(key, slice) else output.__getitem__(self, key)
        value = self.to_tuple()[key]
        if value is None:
            raise ValueError(
                "logits must be computed to be read, got a training forward that returns only the "
                "loss: call patch_model(model, logits='always')"
            )
        return value

    return type(
        output.__name__,
        (output,),
        {
            "__module__": output.__module__,
            "__qualname__": output.__qualname__,
            "__doc__": output.__doc__,
            "to_tuple": to_tuple,
            "__getitem__": __getitem__,
            "__reduce__": lambda self: (_rebuild, (output, dict(self.items()))),
        },
    )


def _rebuild(output: Any, fields: dict[str, Any]) -> Any:
    return without_logits(output)(**fields)
