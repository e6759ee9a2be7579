"""Layouts of a batch, also while torch.compile traces the model.

Outside a graph, `kernels` reads the number of real tokens on the host. In a graph, one op lays out
the batch when the graph runs; see `tokenpack.attention.layouts`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...attention.layouts import Rows, fake_rows, fake_stream, layout_of, outputs_of
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
    rows, columns = mask.shape
    return layout_of(torch.ops.tokenpack.decoder_rows(mask), (rows, columns))


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
    return layout_of(torch.ops.tokenpack.decoder_stream(cu_seqlens, like))


def _layout_with_tokens(mask: Tensor) -> PackedLayout:
    layout = layout_from_mask(mask)
    if layout.total_tokens == 0:
        raise ValueError("attention_mask must mark at least one real token, got none")
    return layout


def sequence_ids(layout: PackedLayout) -> Tensor:
    """``(total_tokens,)`` int64, the number of each token's sequence."""
    token = torch.arange(layout.total_tokens, dtype=torch.int32, device=layout.device)
    return torch.bucketize(token, layout.cu_seqlens[1:], right=True)


@torch.library.custom_op("tokenpack::decoder_rows", mutates_args=())
def _decoder_rows(mask: Tensor) -> Rows:
    layout = _layout_with_tokens(mask)
    return outputs_of(layout, mask)


@torch.library.custom_op("tokenpack::decoder_stream", mutates_args=())
def _decoder_stream(cu_seqlens: Tensor, tokens: Tensor) -> Rows:
    layout = layout_from_cu_seqlens(cu_seqlens, tokens.shape[0], device=tokens.device)
    return outputs_of(layout, tokens)


@_decoder_rows.register_fake
def _(mask: Tensor) -> Rows:
    return fake_rows(mask)


@_decoder_stream.register_fake
def _(cu_seqlens: Tensor, tokens: Tensor) -> Rows:
    return fake_stream(cu_seqlens, tokens, tokens.shape[0])
