"""Outputs that leave out fields, and in which no other field takes their position.

A `ModelOutput` leaves out fields that are None when it is read by position. Without logits,
``outputs[1]`` of an encoder-decoder would be ``encoder_last_hidden_state``. Without a cache,
``outputs[2]`` would be.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

_HOW_TO_GET = {
    "logits": "call patch_model(model, logits='always')",
    "past_key_values": "call the model with use_cache=True, which runs it padded",
}


@torch.compiler.assume_constant_result  # torch.compile cannot make a class
def leaving_out(output: Any, names: tuple[str, ...]) -> Any:
    """A subclass of ``output`` that keeps the positions of the fields ``names``.

    ``to_tuple`` and slices have None there. Reading such a position raises ValueError.
    """
    return _leaving_out(output, names)


@functools.cache
def _leaving_out(output: Any, names: tuple[str, ...]) -> Any:
    kept = [field for field in output.__dataclass_fields__ if field in names]
    if not kept:
        return output

    def present(self: Any) -> list[str]:
        return [name for name in self.__dataclass_fields__ if name in kept or name in self]

    def to_tuple(self: Any) -> tuple[Any, ...]:
        return tuple(self.get(name) for name in present(self))

    def __getitem__(self: Any, key: Any) -> Any:
        if not isinstance(key, int):
            return self.to_tuple()[key] if isinstance(key, slice) else output.__getitem__(self, key)
        value, name = self.to_tuple()[key], present(self)[key]
        if value is None:
            raise ValueError(
                f"{name} must be computed to be read, got the outputs of a packed forward that "
                f"did not compute them: {_HOW_TO_GET[name]}"
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
            "__reduce__": lambda self: (_rebuild, (output, names, dict(self.items()))),
        },
    )


def _rebuild(output: Any, names: tuple[str, ...], fields: dict[str, Any]) -> Any:
    return leaving_out(output, names)(**fields)
