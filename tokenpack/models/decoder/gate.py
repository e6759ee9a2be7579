"""``act(gate) * up``, which keeps two tensors for its backward instead of three.

    d gate = act'(gate) * (up * d out)        d up = act(gate) * d out

Autograd would keep ``act(gate)`` too, an eighth of what a dense block keeps. Computing it again is
one elementwise pass. Forward and backward are the operations that autograd would run, so values and
gradients are the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, SiLUActivation

_aten = torch.ops.aten
_FEW = 2**14  # elements. Of fewer, the host's time of a node in Python counts more than memory.
# (d out, gate, act(gate)) -> d gate, for activations without options.
_DERIVATIVES: dict[type[nn.Module], Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    SiLUActivation: lambda grad, gate, active: _aten.silu_backward(grad, gate),
    nn.SiLU: lambda grad, gate, active: _aten.silu_backward(grad, gate),
    GELUActivation: lambda grad, gate, active: _aten.gelu_backward(grad, gate),
    nn.ReLU: lambda grad, gate, active: _aten.threshold_backward(grad, active, 0),
    nn.Sigmoid: lambda grad, gate, active: _aten.sigmoid_backward(grad, active),
}


def gated(act: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """``act(gate) * up``. Both tensors have one shape and dtype.

    The plain formula is left to graphs of torch.compile, which decide by themselves what to keep,
    to few elements, and to activations whose derivative is not known here.
    """
    if torch.compiler.is_compiling() or gate.numel() < _FEW:
        return act(gate) * up
    if type(act) not in _DERIVATIVES or gate.dtype != up.dtype:
        return act(gate) * up
    return _Gated.apply(act, gate, up)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, act: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
        ctx.act = act
        ctx.save_for_backward(gate, up)
        return act(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the derivatives below have none of their own
            out = ctx.act(gate) * up
            return None, *torch.autograd.grad(out, (gate, up), grad, create_graph=True)
        active = ctx.act(gate)
        grad_gate = _DERIVATIVES[type(ctx.act)](grad * up, gate, active)
        return None, grad_gate, active.mul_(grad)
