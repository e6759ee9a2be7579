"""Ops of `torch.library`, and calls of what they run without their dispatch.

Graphs, fake tensors and dispatch modes must see an op. In a plain call nothing sees it, and its
dispatch only costs time: 20 to 70 microseconds on the host, several times a launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._triton import DEVICES

_PLAIN = (Tensor, torch.nn.Parameter)
_REFERENCES: dict[Any, Callable[..., Any]] = {}
_LAUNCHERS: dict[Any, Callable[..., Any]] = {}


def define_op(name: str, *, mutates_args: Sequence[str] = ()) -> Callable[[Callable], Any]:
    """Decorator: `torch.library.custom_op`, whose function is the reference of the op."""

    def define(reference: Callable) -> Any:
        op = torch.library.custom_op(name, reference, mutates_args=mutates_args)
        _REFERENCES[op] = reference
        return op

    return define


def on_triton(op: Any) -> Callable[[Callable], Callable]:
    """Decorator: register a function as the implementation of ``op`` on Triton's devices."""

    def register(launcher: Callable) -> Callable:
        @functools.wraps(launcher)
        def on_device_of_tensors(*args: Any, **kwargs: Any) -> Any:
            # Triton launches on the current device, which may differ from the tensors' device.
            device = _first_tensor(args).device
            if device.type != "cuda":
                return launcher(*args, **kwargs)
            with torch.cuda.device(device):
                return launcher(*args, **kwargs)

        _LAUNCHERS[op] = on_device_of_tensors
        for device in DEVICES:
            op.register_kernel(device)(on_device_of_tensors)
        return launcher

    return register


def run(op: Any, *args: Any) -> Any:
    """The results of ``op``, without its dispatch if nothing has to see the op.

    The first argument must be a tensor or a list of tensors. No gradient goes through the call, so
    it is for results that have none, and for calls from inside of ops.
    """
    tensors = (args[0],) if isinstance(args[0], Tensor) else args[0]
    if not runs_eagerly(*tensors):
        return op(*args)
    launcher = _LAUNCHERS.get(op) if tensors[0].device.type in DEVICES else None
    return (launcher or _REFERENCES[op])(*args)


def runs_reference(tensor: Tensor) -> bool:
    """Whether `run` runs the reference of every op of this tensor."""
    return tensor.device.type not in DEVICES and runs_eagerly(tensor)


def runs_eagerly(*tensors: Tensor) -> bool:
    """Whether nothing has to see an op of these tensors: no graph, fake tensor or mode."""
    return (
        not torch.compiler.is_compiling()
        and all(type(each) in _PLAIN and not each.is_meta for each in tensors)
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._is_tracing()
    )


def _first_tensor(args: Iterable[Any]) -> Tensor:
    """The first argument of an op, or its first element if the argument is a list of tensors."""
    first = next(iter(args))
    return first if isinstance(first, Tensor) else first[0]
