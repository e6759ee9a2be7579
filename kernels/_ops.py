"""Ops of `torch.library`, and calls of what they run without their dispatch.

Graphs, fake tensors and dispatch modes must see an op. In a plain call nothing sees it, and its
dispatch only costs time: 20 to 70 microseconds on the host, several times a launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ._triton import DEVICES

_NO_DEVICE = nullcontext()
_PLAIN = (Tensor, torch.nn.Parameter)
_REFERENCES: dict[Any, Callable[..., Any]] = {}
_LAUNCHERS: dict[Any, Callable[..., Any]] = {}


ON_HOST = (torch.Tag.cudagraph_unsafe,)
"""The tag of an op that reads values on the host, or counts there. A CUDA graph would replay its
kernels alone, so ``mode="reduce-overhead"`` of torch.compile must leave it out of the graph."""


def define_op(
    name: str, *, mutates_args: Sequence[str] = (), on_host: bool = False
) -> Callable[[Callable], Any]:
    """Decorator: `torch.library.custom_op`, whose function is the reference of the op."""

    def define(reference: Callable) -> Any:
        tags = ON_HOST if on_host else ()
        op = torch.library.custom_op(name, reference, mutates_args=mutates_args, tags=tags)
        _REFERENCES[op] = reference
        return op

    return define


def on_triton(op: Any) -> Callable[[Callable], Callable]:
    """Decorator: register a function as the implementation of ``op`` on Triton's devices."""

    def register(launcher: Callable) -> Callable:
        @functools.wraps(launcher)
        def on_device_of_tensors(*args: Any, **kwargs: Any) -> Any:
            with on_device_of(_tensors(args[0])[0]):
                return launcher(*args, **kwargs)

        _LAUNCHERS[op] = on_device_of_tensors
        for device in DEVICES:
            op.register_kernel(device)(on_device_of_tensors)
        return launcher

    return register


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which may differ from the tensors' device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else _NO_DEVICE


def run(op: Any, *args: Any) -> Any:
    """The results of ``op``, without its dispatch if nothing has to see the op.

    The first argument must be a tensor or a list of tensors. Only these may require a gradient.
    """
    tensors = _tensors(args[0])
    needs_gradient = torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
    if needs_gradient or not runs_eagerly(*tensors):
        return op(*args)
    launcher = _LAUNCHERS.get(op) if tensors[0].device.type in DEVICES else None
    return (launcher or _REFERENCES[op])(*args)


def runs_reference(tensor: Tensor) -> bool:
    """Whether `run` runs the reference of every op of this tensor."""
    return tensor.device.type not in DEVICES and runs_eagerly(tensor)


def runs_eagerly(*tensors: Tensor) -> bool:
    """Whether nothing has to see an op of these tensors: no graph, fake tensor or mode."""
    for each in tensors:
        if type(each) not in _PLAIN or each.is_meta:
            return False
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._is_tracing()
    )


def _tensors(argument: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors of an argument."""
    return (argument,) if isinstance(argument, Tensor) else argument
