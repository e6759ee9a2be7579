"""Move rows between a padded batch and the stream of its real tokens.

    unpad:  stream[t] = padded.flatten(0, 1)[indices[t]]
    repad:  padded.flatten(0, 1)[indices[t]] = stream[t], every other slot = fill

Each is the other's backward. ``unpad`` reads and writes each real row once; ``repad`` reads each
real row once and writes each padded row once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from .layout import PackedLayout


@overload
def unpad(tensors: Tensor, layout: PackedLayout) -> Tensor: ...
@overload
def unpad(tensors: Sequence[Tensor], layout: PackedLayout) -> list[Tensor]: ...
def unpad(tensors: Tensor | Sequence[Tensor], layout: PackedLayout) -> Tensor | list[Tensor]:
    """Take the real tokens out of padded tensors.

    Args:
        tensors: ``(rows, columns, ...)`` of any dtype, or several such tensors whose dtypes and
            trailing shapes may differ. ``(rows, columns)`` is ``layout.padded_shape``.
        layout: which slots are real, on the same device.

    Returns:
        ``(total_tokens, ...)`` for each tensor, in the order it came; one tensor for one tensor,
        a list for a sequence. Differentiable: the gradient of a padded slot is zero.

    Raises:
        TypeError: if something other than tensors is given.
        ValueError: if a tensor does not begin with ``layout.padded_shape`` or is elsewhere.
    """
    several = _as_list(tensors)
    for position, tensor in enumerate(several):
        _require_leading(position, tensor, layout.padded_shape, "layout.padded_shape", layout)
    streams = torch.ops.tokenpack.unpad(several, layout.indices)
    return streams[0] if isinstance(tensors, Tensor) else streams


@overload
def repad(
    tensors: Tensor, layout: PackedLayout, *, fill: float | Sequence[float] = 0
) -> Tensor: ...
@overload
def repad(
    tensors: Sequence[Tensor], layout: PackedLayout, *, fill: float | Sequence[float] = 0
) -> list[Tensor]: ...
def repad(
    tensors: Tensor | Sequence[Tensor],
    layout: PackedLayout,
    *,
    fill: float | Sequence[float] = 0,
) -> Tensor | list[Tensor]:
    """Put token streams back into padded tensors.

    Args:
        tensors: ``(total_tokens, ...)`` of any dtype, or several such tensors whose dtypes and
            trailing shapes may differ.
        layout: which slots are real, on the same device.
        fill: what the other slots hold; one value for all tensors or one for each. Each tensor's
            dtype must be able to hold its own exactly, unless it is floating point.

    Returns:
        ``(rows, columns, ...)`` for each tensor, in the order it came; one tensor for one tensor,
        a list for a sequence. Differentiable: filled slots take no part.

    Raises:
        TypeError: if something other than tensors is given.
        ValueError: if a tensor does not begin with ``layout.total_tokens`` or is elsewhere, there
            are more or fewer fills than tensors, or a fill is nothing that its tensor can hold.
    """
    several = _as_list(tensors)
    for position, tensor in enumerate(several):
        _require_leading(position, tensor, (layout.total_tokens,), "layout.total_tokens", layout)
    fills = [fill] * len(several) if isinstance(fill, (int, float)) else list(fill)
    if len(fills) != len(several):
        raise ValueError(f"fill must be one value or {len(several)} values, got {len(fills)}")
    for value, tensor in zip(fills, several, strict=True):
        _require_fill(value, tensor.dtype)
    rows, columns = layout.padded_shape
    flat = torch.ops.tokenpack.repad(
        several, layout.indices, rows * columns, list(map(float, fills))
    )
    padded = [tensor.unflatten(0, (rows, columns)) for tensor in flat]
    return padded[0] if isinstance(tensors, Tensor) else padded


# ------------------------------------------------------------------ reference: CPU path and oracle


@torch.library.custom_op("tokenpack::unpad", mutates_args=())
def _unpad(tensors: Sequence[Tensor], indices: Tensor) -> list[Tensor]:
    return [tensor.flatten(0, 1).index_select(0, indices) for tensor in tensors]


@torch.library.custom_op("tokenpack::repad", mutates_args=())
def _repad(
    tensors: Sequence[Tensor], indices: Tensor, num_slots: int, fills: Sequence[float]
) -> list[Tensor]:
    target = indices.long()  # index_copy_ takes no int32
    return [
        tensor.new_full(
            (num_slots, *tensor.shape[1:]), _fill_value(fill, tensor.dtype)
        ).index_copy_(0, target, tensor)
        for tensor, fill in zip(tensors, fills, strict=True)
    ]


def _fill_value(fill: float, dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return bool(fill)
    return fill if dtype.is_floating_point or dtype.is_complex else int(fill)


# ------------------------------------------------------------- what torch.compile and autograd need


@_unpad.register_fake
def _(tensors: Sequence[Tensor], indices: Tensor) -> list[Tensor]:
    return [tensor.new_empty((indices.shape[0], *tensor.shape[2:])) for tensor in tensors]


@_repad.register_fake
def _(
    tensors: Sequence[Tensor], indices: Tensor, num_slots: int, fills: Sequence[float]
) -> list[Tensor]:
    return [tensor.new_empty((num_slots, *tensor.shape[1:])) for tensor in tensors]


def _save_unpad(ctx, inputs, output) -> None:
    tensors, indices = inputs
    ctx.save_for_backward(indices)
    ctx.padded_shapes = [tensor.shape[:2] for tensor in tensors]


def _unpad_backward(ctx, grads: list[Tensor | None]):
    (indices,) = ctx.saved_tensors

    def to_padded(grad: Tensor | None, shape: torch.Size) -> Tensor | None:
        if grad is None:
            return None
        (flat,) = torch.ops.tokenpack.repad([grad], indices, shape[0] * shape[1], [0.0])
        return flat.unflatten(0, shape)

    return list(map(to_padded, grads, ctx.padded_shapes)), None


def _save_repad(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _repad_backward(ctx, grads: list[Tensor | None]):
    (indices,) = ctx.saved_tensors
    streams = [
        None if grad is None else torch.ops.tokenpack.unpad([grad.unsqueeze(0)], indices)[0]
        for grad in grads
    ]
    return streams, None, None, None


_unpad.register_autograd(_unpad_backward, setup_context=_save_unpad)
_repad.register_autograd(_repad_backward, setup_context=_save_repad)


# --------------------------------------------------------------------------------------- checks


def _as_list(tensors: Tensor | Sequence[Tensor]) -> list[Tensor]:
    several = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    for position, tensor in enumerate(several):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tensors[{position}] must be a tensor, got {type(tensor).__name__}")
    if not several:
        raise ValueError("tensors must hold at least one tensor, got none")
    return several


def _require_leading(
    position: int, tensor: Tensor, leading: tuple[int, ...], meaning: str, layout: PackedLayout
) -> None:
    if tuple(tensor.shape[: len(leading)]) != leading:
        raise ValueError(
            f"tensors[{position}] must begin with {meaning} = {leading}, "
            f"got shape {tuple(tensor.shape)}"
        )
    if tensor.device != layout.device:
        raise ValueError(
            f"tensors[{position}] is on {tensor.device} but the layout is on {layout.device}: "
            "move one with .to(device)"
        )


def _require_fill(value: float, dtype: torch.dtype) -> None:
    if dtype.is_floating_point or dtype.is_complex:
        return
    bounds = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    # The op takes fills as float, which not every int64 survives.
    if not (bounds[0] <= value <= bounds[1] and int(value) == value == float(value)):
        raise ValueError(f"fill must be a value of {dtype}, got {value}")
