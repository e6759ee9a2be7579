"""The attention kernels for the layers of a model, which repeat one call with other tensors.

The layers of a model have one or a few kinds of attention. What a kind's launches share in all
batches is prepared once, see `PreparedKernel`. What they share in one batch is prepared at its
first layer. A later layer allocates its outputs and launches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._last import LastResult
from .._launch import BatchLaunch, are_aligned
from .backward import (
    backward_grids,
    backward_kernels,
    backward_tiles,
    padded_rows,
    partials_shape,
    sum_partials,
)
from .forward import forward_grid, forward_kernel, forward_tile
from .launch import head_unit, size_arguments, table_for_kernels
from .spec import AttentionInputs, AttentionSpec
from .tiles import precision


class Saved(NamedTuple):
    """What the backward of a layer needs of its forward. See `LayerKernels`."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor
    table: Tensor | None  # as the kernels read it
    seed: Tensor | None


class _Backward(NamedTuple):
    """The launches of a backward in one batch, and how their outputs are allocated."""

    dq: BatchLaunch
    dkv: BatchLaunch
    like_q: tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides
    like_k: tuple[tuple[int, ...], tuple[int, ...]]
    rows: tuple[int, int]  # of delta and the logsumexp
    partials: tuple[int, int, int] | None


_KERNELS: dict[tuple[Any, ...], Any] = {}
"""The kernels of each kind of layer. The kinds are as few as the models of the process, but a scale
or a dropout that changes in each step makes more."""
_MOST_KERNELS = 256


class LayerKernels:
    """Attention of layers that have one batch, one kind of mask and one set of options.

    Shapes are those of attention layers in transformers: ``(1, heads, total, head_dim)`` for query,
    key and value, ``(1, total_q, heads, head_dim)`` for the output.

    Args:
        cu_seqlens_q, cu_seqlens_k: ``(num_seqs + 1,)`` int32, contiguous.
        spec: the options. The scale must be positive.
    """

    def __init__(self, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, spec: AttentionSpec) -> None:
        self._offsets, self._spec = (cu_seqlens_q, cu_seqlens_k), spec
        self._prepared: dict[Any, Any] = {}
        # T5's layers share one table.
        self._table_for_kernels = LastResult(partial(table_for_kernels, spec=spec))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        table: Tensor | None,
        seed: Tensor | None,
    ) -> Saved:
        """Compute a layer's output, ``out`` of the result, in one launch."""
        strides = query.stride(), key.stride(), value.stride()
        if not strides[0][3] == strides[1][3] == strides[2][3] == 1:
            query, key, value = (side.contiguous() for side in (query, key, value))
            strides = query.stride(), key.stride(), value.stride()
        _, heads, total, head_dim = query.shape
        out = query.new_empty((1, total, heads, head_dim))
        lse = query.new_empty((heads, total), dtype=torch.float32)
        if table is not None:
            table = self._table_for_kernels(table)
        saved = Saved(query, key, value, out, lse, table, seed)
        launch: BatchLaunch | None = self._prepared.get((query.dtype, strides))
        if launch is None:
            launch = self._prepared[query.dtype, strides] = self._prepare_forward(saved)
        # A kernel needs a pointer for each tensor. It reads no absent table or seed.
        of_table, of_seed = lse if table is None else table, lse if seed is None else seed
        given = (query, key, value, of_table, of_seed)
        launch((*given, lse, out, *self._offsets), are_aligned((*given, *self._offsets)))
        return saved

    def backward(
        self, dout: Tensor, saved: Saved, needs_table: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dq, dk and dv in the shapes of query, key and value, and the table's gradient.

        The table's gradient is float32, and None unless it is needed.
        """
        if dout.stride(3) != 1:
            dout = dout.contiguous()
        query, key, value, out, lse, table, seed = saved
        strides = query.stride(), key.stride(), value.stride(), dout.stride()
        kind = query.dtype, strides, needs_table
        prepared: _Backward | None = self._prepared.get(kind)
        if prepared is None:
            prepared = self._prepared[kind] = self._prepare_backward(dout, saved, needs_table)
        of_dq, of_dkv, like_q, like_k, rows, sums = prepared
        dq = query.new_empty_strided(*like_q)
        dk, dv = key.new_empty_strided(*like_k), value.new_empty_strided(*like_k)
        # With a table, also less the bias before the reach, and less the bias after it.
        delta, base2_lse = lse.new_empty(rows), lse.new_empty((1 if table is None else 3, *rows))
        partials = lse if sums is None else lse.new_zeros(sums)
        of_table, of_seed = lse if table is None else table, lse if seed is None else seed
        given = (query, key, value, of_table, of_seed, dout)
        aligned = are_aligned((*given, lse, out, *self._offsets))
        of_dq((*given, delta, lse, out, dq, base2_lse, partials, *self._offsets), aligned)
        of_dkv((*given, delta, base2_lse, dk, dv, *self._offsets), aligned)
        return dq, dk, dv, None if sums is None else sum_partials(partials)

    def _prepare_forward(self, saved: Saved) -> BatchLaunch:
        inputs, spec = self._inputs(saved), self._spec
        unit, tile = head_unit(inputs.q, inputs.k, inputs.v), forward_tile(inputs, spec)
        kind = (*_kind(inputs, spec, unit), tile)
        kernel = _kernels_of(kind, partial(forward_kernel, inputs, spec, unit, tile))
        grid = forward_grid(inputs, tile)
        return BatchLaunch(kernel, _or_none(grid, inputs.q), size_arguments(inputs, unit))

    def _prepare_backward(self, dout: Tensor, saved: Saved, needs_table: bool) -> _Backward:
        inputs, spec, dout = self._inputs(saved), self._spec, dout[0]
        q, k = inputs.q, inputs.k
        unit, tiles = head_unit(q, k, inputs.v, dout), backward_tiles(inputs, spec)
        of_backward = (tiles, dout.stride(0), needs_table)
        kind = (*_kind(inputs, spec, unit), *of_backward)
        make = partial(backward_kernels, inputs, spec, unit, *of_backward)
        of_dq, of_dkv = _kernels_of(kind, make)
        grid_dq, grid_dkv = backward_grids(inputs, tiles)
        sizes = (*size_arguments(inputs, unit), dout.stride(1) // unit)
        return _Backward(
            BatchLaunch(of_dq, _or_none(grid_dq, q), sizes),
            BatchLaunch(of_dkv, _or_none(grid_dkv, k), sizes),
            _like(q),
            _like(k),
            (q.shape[1], padded_rows(q.shape[0], inputs.cu_seqlens_q.numel() - 1)),
            partials_shape(inputs, grid_dq) if needs_table else None,
        )

    def _inputs(self, saved: Saved) -> AttentionInputs:
        q, k, v = (side.squeeze(0).transpose(0, 1) for side in saved[:3])
        return AttentionInputs(q, k, v, *self._offsets, saved.table, saved.seed)


def _kind(inputs: AttentionInputs, spec: AttentionSpec, unit: int) -> tuple[Any, ...]:
    """All that the constants of the kernels depend on, and the types of the tensors."""
    q, k, v, _, _, table, _ = inputs
    shapes = q.shape[1:], k.shape[1]
    strides = q.stride(0), k.stride(0), v.stride(0)
    types = q.dtype, k.dtype, v.dtype, q.device
    return spec, *types, *shapes, *strides, unit, table is None, precision(q.dtype)


def _kernels_of(kind: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    kernels = _KERNELS.get(kind)
    if kernels is None:
        if len(_KERNELS) >= _MOST_KERNELS:
            _KERNELS.clear()
        kernels = _KERNELS[kind] = make()
    return kernels


def _or_none(grid: tuple[int, int], written: Tensor) -> tuple[int, int]:
    """The grid, or none if there is nothing to write."""
    return grid if written.numel() else (0, 0)


def _like(side: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape and strides of a gradient: kernels write contiguous (total, heads, head_dim)."""
    total, heads, head_dim = side.shape
    width = heads * head_dim
    return (1, heads, total, head_dim), (total * width, head_dim, width, 1)
