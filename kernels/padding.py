"""Move rows between a padded batch and the stream of its real tokens.

    unpad:  stream[t] = padded.flatten(0, 1)[indices[t]]
    repad:  padded.flatten(0, 1)[indices[t]] = stream[t], every other slot = fill

The backward of each op is the other op. ``unpad`` reads and writes each real row once. ``repad``
reads each real row once and writes each slot once.

On a GPU, one launch copies all tensors of a call. The kernels copy words of up to 8 bytes,
regardless of the dtypes. A program of ``repad`` writes a block of slots. It finds the token of each
slot, if there is one, by binary search in ``indices``, which are sorted. So the output need not be
filled first, no slot is written twice, and no inverse of ``indices`` is stored.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from ._launch import PreparedKernel
from ._ops import define_op, on_triton, run
from ._triton import next_power_of_2, triton
from .layout import PackedLayout, require_padded_form
from .padding_kernels import _repad_kernel, _unpad_kernel


@overload
def unpad(tensors: Tensor, layout: PackedLayout) -> Tensor: ...
@overload
def unpad(tensors: Sequence[Tensor], layout: PackedLayout) -> list[Tensor]: ...
def unpad(tensors: Tensor | Sequence[Tensor], layout: PackedLayout) -> Tensor | list[Tensor]:
    """Gather the real tokens of padded tensors into token streams.

    Args:
        tensors: a ``(rows, columns, ...)`` tensor of any dtype, or a sequence of such tensors.
            Their dtypes and trailing shapes may differ. ``(rows, columns)`` must be
            ``layout.padded_shape``.
        layout: the layout of the padded batch, on the same device.

    Returns:
        A ``(total_tokens, ...)`` tensor, or a list of them if ``tensors`` is a sequence.
        Differentiable. The gradient of a padded slot is zero.

    Raises:
        TypeError: ``tensors`` is neither a tensor nor a sequence of tensors.
        ValueError: the shape of a tensor does not start with ``layout.padded_shape``, or a tensor
            and the layout are on different devices.
    """
    require_padded_form(layout)
    several = _as_list(tensors)
    for position, tensor in enumerate(several):
        _require_leading(position, tensor, layout.padded_shape, "layout.padded_shape", layout)
    streams = run(_unpad, several, layout.indices)
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
    """Scatter token streams back into padded tensors.

    Args:
        tensors: a ``(total_tokens, ...)`` tensor of any dtype, or a sequence of such tensors.
            Their dtypes and trailing shapes may differ.
        layout: the layout of the padded batch, on the same device.
        fill: value of the padded slots: one for all tensors, or one for each. An integer or bool
            tensor must be able to represent its value exactly. For a complex tensor it must be 0.

    Returns:
        A ``(rows, columns, ...)`` tensor, or a list of them if ``tensors`` is a sequence.
        Differentiable. The gradients of padded slots are ignored.

    Raises:
        TypeError: ``tensors`` is neither a tensor nor a sequence of tensors.
        ValueError: the shape of a tensor does not start with ``layout.total_tokens``, a tensor and
            the layout are on different devices, the number of fills is not the number of tensors,
            or a tensor cannot represent its fill.
    """
    require_padded_form(layout)
    several = _as_list(tensors)
    for position, tensor in enumerate(several):
        _require_leading(position, tensor, (layout.total_tokens,), "layout.total_tokens", layout)
    fills = [fill] * len(several) if isinstance(fill, (int, float)) else list(fill)
    if len(fills) != len(several):
        raise ValueError(f"fill must be one value or {len(several)} values, got {len(fills)}")
    for value, tensor in zip(fills, several, strict=True):
        _require_fill(value, tensor.dtype)
    rows, columns = layout.padded_shape
    flat = run(_repad, several, layout.indices, rows * columns, list(map(float, fills)))
    padded = [tensor.unflatten(0, (rows, columns)) for tensor in flat]
    return padded[0] if isinstance(tensors, Tensor) else padded


# ------------------------------------------------------------------ reference: CPU path and oracle


@define_op("tokenpack::unpad")
def _unpad(tensors: Sequence[Tensor], indices: Tensor) -> list[Tensor]:
    return [tensor.flatten(0, 1).index_select(0, indices) for tensor in tensors]


@define_op("tokenpack::repad")
def _repad(
    tensors: Sequence[Tensor], indices: Tensor, num_slots: int, fills: Sequence[float]
) -> list[Tensor]:
    target = indices.long()  # index_copy_ does not accept int32
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


# ------------------------------------------------------------------------------------------ Triton


@on_triton(_unpad)
def unpad_triton(tensors: Sequence[Tensor], indices: Tensor) -> list[Tensor]:
    """The op ``unpad`` in one launch."""
    total_tokens = indices.numel()
    streams = [tensor.new_empty((total_tokens, *tensor.shape[2:])) for tensor in tensors]
    moves = [
        _as_words(_flat_rows(tensor), stream)
        for tensor, stream in zip(tensors, streams, strict=True)
        if stream.numel()
    ]
    if moves:
        tile = _tile(moves)
        grid = (triton.cdiv(total_tokens, tile.rows), _column_blocks(moves, tile))
        kernel = _prepared(_unpad_kernel, _kind(moves), tile, ())
        targets, sources = zip(*(move[:2] for move in moves), strict=True)
        kernel(grid, (targets, sources, indices), (total_tokens,))
    return streams


@on_triton(_repad)
def repad_triton(
    tensors: Sequence[Tensor], indices: Tensor, num_slots: int, fills: Sequence[float]
) -> list[Tensor]:
    """The op ``repad`` in one launch."""
    total_tokens = indices.numel()
    paddeds = [tensor.new_empty((num_slots, *tensor.shape[1:])) for tensor in tensors]
    moves, patterns = [], []
    for tensor, padded, fill in zip(tensors, paddeds, fills, strict=True):
        if padded.numel():
            moves.append(_as_words(_rows(tensor), padded))
            patterns.append(_fill_pattern(fill, tensor.dtype, moves[-1].target.dtype))
    if moves:
        tile = _tile(moves)
        grid = (triton.cdiv(num_slots, tile.rows), _column_blocks(moves, tile))
        kernel = _prepared(_repad_kernel, _kind(moves), tile, tuple(patterns))
        targets, sources = zip(*(move[:2] for move in moves), strict=True)
        sizes = (total_tokens, num_slots, total_tokens.bit_length())
        kernel(grid, (targets, sources, indices), sizes)
    return paddeds


_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
# 8 KiB in words of 8 bytes, so that each of 128 threads has 4 loads of 16 bytes in flight.
_TILE_WORDS = 1024
# Words per row. A program then has at least two rows, whose indices it loads at the same time.
_WIDEST_TILE = 512


class _Move(NamedTuple):
    """Rows to copy, viewed as words of one size. The rows of the target are contiguous."""

    target: Tensor
    source: Tensor
    row_words: int
    source_stride: int  # words


_Kind = tuple[torch.device, tuple[tuple[torch.dtype, int, int], ...]]


def _kind(moves: Sequence[_Move]) -> _Kind:
    """What a compiled kernel needs of the moves: words, their number per row, and strides."""
    return moves[0].target.device, tuple((move.target.dtype, *move[2:]) for move in moves)


class _Tile(NamedTuple):
    rows: int
    words: int


def _tile(moves: Sequence[_Move]) -> _Tile:
    widest = max(move.row_words for move in moves)
    words = min(next_power_of_2(widest), _WIDEST_TILE)
    return _Tile(_TILE_WORDS // words, words)


@functools.lru_cache(maxsize=256)
def _prepared(kernel: Any, kind: _Kind, tile: _Tile, fills: tuple[int, ...]) -> PreparedKernel:
    moves = kind[1]
    constants = {
        "row_words": tuple(words for _, words, _ in moves),
        "row_strides": tuple(stride for _, _, stride in moves),
        "BLOCK_ROWS": tile.rows,
        "BLOCK_WORDS": tile.words,
        "num_warps": 4,
    }
    if kernel is _unpad_kernel:
        return PreparedKernel(kernel, ("streams", "paddeds", "indices"), _SIZES[:1], constants)
    constants["fills"] = fills
    return PreparedKernel(kernel, ("paddeds", "streams", "indices"), _SIZES, constants)


_SIZES = ("total_tokens", "num_slots", "search_steps")


def _column_blocks(moves: Sequence[_Move], tile: _Tile) -> int:
    return max(triton.cdiv(move.row_words, tile.words) for move in moves)


def _as_words(source: Tensor, target: Tensor) -> _Move:
    """View both in the widest words that divide the row size, the strides and the addresses."""
    size = source.element_size()
    row_bytes = target.stride(0) * size
    stride_bytes = source.stride(0) * size
    # A power of two divides all four numbers if and only if it divides their bitwise or.
    combined = row_bytes | stride_bytes | source.data_ptr() | target.data_ptr()
    word = next(width for width in _WORDS if combined % width == 0)
    return _Move(
        _view_as_words(target, word),
        _view_as_words(source, word),
        row_bytes // word,
        stride_bytes // word,
    )


def _view_as_words(rows: Tensor, word: int) -> Tensor:
    """A flat tensor of words at the address of ``rows``. Kernels use only its pointer."""
    if rows.dtype == _WORDS[word]:
        return rows
    storage = rows.untyped_storage()
    first = rows.storage_offset() * rows.element_size()
    words = torch.empty(0, dtype=_WORDS[word], device=rows.device)
    # .view(dtype) fails if the size of the last dimension is not a multiple of the word.
    return words.set_(storage, first // word, ((storage.nbytes() - first) // word,), (1,))


def _flat_rows(tensor: Tensor) -> Tensor:
    """``(rows, columns, ...)`` as ``(rows * columns, ...)`` with one stride, copied if needed."""
    rows, columns = tensor.shape[:2]
    one_stride = rows == 1 or tensor.stride(0) == columns * tensor.stride(1)
    if not one_stride:
        tensor = tensor.contiguous()
    return _rows(tensor.flatten(0, 1))


def _rows(tensor: Tensor) -> Tensor:
    """``(rows, ...)`` with each row contiguous, copied if needed."""
    return tensor if tensor[:1].is_contiguous() else tensor.contiguous()


@functools.lru_cache(maxsize=256)
def _fill_pattern(fill: float, dtype: torch.dtype, word: torch.dtype) -> int:
    """The word whose bytes are repeated copies of ``fill``."""
    if fill == 0:
        return 0
    count = max(word.itemsize // dtype.itemsize, 1)
    filled = torch.full((count,), _fill_value(fill, dtype), dtype=dtype, device="cpu")
    return int(filled.view(word)[0])


# --------------------------------------------------------------- fakes for torch.compile, autograd


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
    results: list[Tensor | None] = [None] * len(grads)
    present = {i: grad for i, grad in enumerate(grads) if grad is not None}
    if present:
        shape = ctx.padded_shapes[0]  # the same for all
        flat = torch.ops.tokenpack.repad(
            list(present.values()), indices, shape[0] * shape[1], [0.0] * len(present)
        )
        for i, padded in zip(present, flat, strict=True):
            results[i] = padded.unflatten(0, shape)
    return results, None


def _save_repad(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _repad_backward(ctx, grads: list[Tensor | None]):
    (indices,) = ctx.saved_tensors
    results: list[Tensor | None] = [None] * len(grads)
    present = {i: grad.unsqueeze(0) for i, grad in enumerate(grads) if grad is not None}
    if present:
        streams = torch.ops.tokenpack.unpad(list(present.values()), indices)
        for i, stream in zip(present, streams, strict=True):
            results[i] = stream
    return results, None, None, None


_unpad.register_autograd(_unpad_backward, setup_context=_save_unpad)
_repad.register_autograd(_repad_backward, setup_context=_save_repad)


# --------------------------------------------------------------------------------------- checks


def _as_list(tensors: Tensor | Sequence[Tensor]) -> list[Tensor]:
    several = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    for position, tensor in enumerate(several):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tensors[{position}] must be a tensor, got {type(tensor).__name__}")
    if not several:
        raise ValueError("tensors must hold at least one tensor, got an empty sequence")
    return several


def _require_leading(
    position: int, tensor: Tensor, leading: tuple[int, ...], meaning: str, layout: PackedLayout
) -> None:
    if tuple(tensor.shape[: len(leading)]) != leading:
        raise ValueError(
            f"tensors[{position}] must have a shape that starts with {meaning} = {leading}, "
            f"got {tuple(tensor.shape)}"
        )
    if tensor.device != layout.device:
        raise ValueError(
            f"tensors[{position}] must be on {layout.device} like the layout, "
            f"got {tensor.device}; move one with .to(device)"
        )


def _require_fill(value: float, dtype: torch.dtype) -> None:
    if dtype.is_floating_point or (dtype.is_complex and value == 0):
        return
    if dtype.is_complex:
        raise ValueError(f"fill must be 0 for {dtype}, got {value}")
    bounds = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    # The op takes fills as float, which cannot represent every int64.
    if not (bounds[0] <= value <= bounds[1] and int(value) == value == float(value)):
        raise ValueError(f"fill must be representable in {dtype}, got {value}")
