"""Layouts of a batch, also while torch.compile traces the model.

The number of real tokens depends on the values of a mask. Outside a graph, `kernels` reads it on
the host. In a graph, one op lays out the batch when the graph runs, and its fake allocates a size
that is known only then. All layers run on this size, so one graph serves every batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._library.fake_impl import allocate_size

from ...kernels import (
    PackedLayout,
    layout_from_cu_seqlens,
    layout_from_lengths,
    layout_from_mask,
)


def mask_layout(mask: Tensor) -> PackedLayout:
    """The layout of a ``(rows, columns)`` mask, which must mark a token."""
    if not torch.compiler.is_compiling():
        return _layout_with_tokens(mask)
    cu_seqlens, indices, position_ids, longest = torch.ops.tokenpack.decoder_rows(mask)
    return _in_graph(cu_seqlens, indices, position_ids, longest, tuple(mask.shape))


def full_layout(rows: int, columns: int, device: torch.device) -> PackedLayout:
    """The layout of ``(rows, columns)`` tokens that are all real."""
    if not torch.compiler.is_compiling():
        return layout_from_lengths([columns] * rows, device=device)
    cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=device) * columns
    indices = torch.arange(rows * columns, dtype=torch.int32, device=device)
    return PackedLayout(
        cu_seqlens, indices, indices % columns, rows * columns, columns, (rows, columns)
    )


def stream_layout(cu_seqlens: Any, total: int, device: torch.device) -> PackedLayout:
    """The layout of a stream of ``total`` tokens with these boundaries."""
    if not torch.compiler.is_compiling():
        return layout_from_cu_seqlens(cu_seqlens, total, device=device)
    like = torch.empty((total, 0), dtype=torch.int32, device=device)
    offsets, indices, position_ids, longest = torch.ops.tokenpack.decoder_stream(cu_seqlens, like)
    shape = offsets.shape[0] - 1, longest.shape[0]
    return PackedLayout(offsets, indices, position_ids, total, longest.shape[0], shape)


def _in_graph(
    cu_seqlens: Tensor, indices: Tensor, position_ids: Tensor, longest: Tensor, shape: Any
) -> PackedLayout:
    return PackedLayout(
        cu_seqlens, indices, position_ids, indices.shape[0], longest.shape[0], shape
    )


def _layout_with_tokens(mask: Tensor) -> PackedLayout:
    layout = layout_from_mask(mask)
    if layout.total_tokens == 0:
        raise ValueError("attention_mask must mark at least one real token, got none")
    return layout


def sequence_ids(layout: PackedLayout) -> Tensor:
    """``(total_tokens,)`` int64, the number of each token's sequence."""
    token = torch.arange(layout.total_tokens, dtype=torch.int32, device=layout.device)
    return torch.bucketize(token, layout.cu_seqlens[1:], right=True)


Rows = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("tokenpack::decoder_rows", mutates_args=())
def _decoder_rows(mask: Tensor) -> Rows:
    layout = _layout_with_tokens(mask)
    longest = mask.new_empty((layout.max_seqlen, 0))
    return layout.cu_seqlens, layout.indices, layout.position_ids, longest


@torch.library.custom_op("tokenpack::decoder_stream", mutates_args=())
def _decoder_stream(cu_seqlens: Tensor, tokens: Tensor) -> Rows:
    layout = layout_from_cu_seqlens(cu_seqlens, tokens.shape[0], device=tokens.device)
    longest = tokens.new_empty((layout.max_seqlen, 0))
    return layout.cu_seqlens.clone(), layout.indices, layout.position_ids, longest


def _new_size() -> Any:
    context: Any = torch.library.get_ctx()
    return allocate_size(context._shape_env)


@_decoder_rows.register_fake
def _(mask: Tensor) -> Rows:
    total, longest = _new_size(), _new_size()
    cu_seqlens, indices, position_ids = (
        mask.new_empty(size, dtype=torch.int32) for size in (mask.shape[0] + 1, total, total)
    )
    return cu_seqlens, indices, position_ids, mask.new_empty((longest, 0))


@_decoder_stream.register_fake
def _(cu_seqlens: Tensor, tokens: Tensor) -> Rows:
    total = tokens.shape[0]
    offsets, indices, position_ids = (
        tokens.new_empty(size, dtype=torch.int32) for size in (cu_seqlens.shape[0], total, total)
    )
    return offsets, indices, position_ids, tokens.new_empty((_new_size(), 0))
