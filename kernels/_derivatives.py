"""Backwards whose results cannot be differentiated again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


def first_order(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Decorator of the backward of an autograd function: its results refuse to be differentiated.

    With `torch.autograd.function.once_differentiable`, they are constants if no argument of the
    backward requires a gradient. Then a second derivative lacks a term without an error. Here, the
    error comes whenever a second derivative needs the term. Outside of ``create_graph``, this also
    saves a change of the gradient mode.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *douts: Tensor) -> Gradients:
        if not torch.is_grad_enabled():
            return backward(ctx, *douts)
        with torch.no_grad():
            gradients = backward(ctx, *douts)
        refusing = (
            each if each is None else _Refuse.apply(each.detach().requires_grad_())
            for each in gradients
        )
        return tuple(refusing)

    return run


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, second):
        raise RuntimeError(
            "packed attention is differentiable once, got a second derivative: leave out "
            "create_graph=True, or run this part of the model unpatched"
        )
