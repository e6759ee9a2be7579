"""The attention kernels for the layers of a model, which repeat one call with other tensors.

In the layers of one batch, everything but the tensors' data is the same. So the options, tiles,
grids and strides of a call are prepared at its first layer. A later layer allocates its outputs and
launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backward import (
    BackwardOutputs,
    backward_launches,
    padded_rows,
    partials_shape,
    sum_partials,
)
from .forward import forward_launch
from .launch import RepeatedLaunch, table_for_kernels
from .spec import AttentionInputs, AttentionSpec

_SHARED = ("q", "k", "v", "table", "seed")


class Saved(NamedTuple):
    """What the backward of a layer needs of its forward. See `LayerKernels`."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor
    table: Tensor | None  # as the kernels read it
    seed: Tensor | None


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
        self._num_seqs = cu_seqlens_q.numel() - 1
        self._prepared: dict[Any, Any] = {}
        self._table: tuple[Tensor, int, Tensor] | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        table: Tensor | None,
        seed: Tensor | None,
    ) -> Saved:
        """Compute a layer's output, ``out`` of the result, in one launch."""
        kind = query.dtype, query.stride(), key.stride(), value.stride()
        if not kind[1][3] == kind[2][3] == kind[3][3] == 1:
            query, key, value = (side.contiguous() for side in (query, key, value))
            kind = query.dtype, query.stride(), key.stride(), value.stride()
        _, heads, total, head_dim = query.shape
        out = query.new_empty((1, total, heads, head_dim))
        lse = query.new_empty((heads, total), dtype=torch.float32)
        if table is not None:
            table = self._table_for_kernels(table)
        saved = Saved(query, key, value, out, lse, table, seed)
        launch = self._prepared.get(kind)
        if launch is None:
            inputs = self._inputs(saved)
            first = forward_launch(inputs, self._spec, out, lse)
            launch = RepeatedLaunch(first, *_SHARED, "lse", "out")
            self._prepared[kind] = launch
        # A kernel needs a pointer for each tensor. It reads no absent table or seed.
        of_table, of_seed = lse if table is None else table, lse if seed is None else seed
        launch(query, key, value, of_table, of_seed, lse, out)
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
        kind = needs_table, query.dtype, *strides
        prepared = self._prepared.get(kind)
        if prepared is None:
            prepared = self._prepared[kind] = self._prepare_backward(dout, saved, needs_table)
        new_outputs, launch_dq, launch_dkv = prepared
        outputs = new_outputs(saved)
        dq, dk, dv, delta, base2_lse, partials = outputs
        of_table, of_seed = lse if table is None else table, lse if seed is None else seed
        of_partials = lse if partials is None else partials
        inputs = (query, key, value, of_table, of_seed, dout, delta)
        launch_dq(*inputs, lse, out, dq, base2_lse, of_partials)
        launch_dkv(*inputs, base2_lse, dk, dv)
        return dq, dk, dv, None if partials is None else sum_partials(partials)

    def _prepare_backward(
        self, dout: Tensor, saved: Saved, needs_table: bool
    ) -> tuple[Callable[[Saved], BackwardOutputs], RepeatedLaunch, RepeatedLaunch]:
        inputs, spec = self._inputs(saved), self._spec
        (_, heads, total_q, head_dim), (_, kv_heads, total_k, _) = (
            saved.query.shape,
            saved.key.shape,
        )
        # The kernels write contiguous (total, heads, head_dim).
        width_q, width_k = heads * head_dim, kv_heads * head_dim
        like_q = (1, heads, total_q, head_dim), (total_q * width_q, head_dim, width_q, 1)
        like_k = (1, kv_heads, total_k, head_dim), (total_k * width_k, head_dim, width_k, 1)
        rows = heads, padded_rows(total_q, self._num_seqs)
        sums = partials_shape(inputs, spec) if needs_table else None

        def new_outputs(saved: Saved) -> BackwardOutputs:
            query, key, value, _, lse, *_ = saved
            return BackwardOutputs(
                query.new_empty_strided(*like_q),
                key.new_empty_strided(*like_k),
                value.new_empty_strided(*like_k),
                lse.new_empty(rows),
                lse.new_empty(rows),
                None if sums is None else lse.new_zeros(sums),
            )

        first_dq, first_dkv = backward_launches(
            dout[0], saved.out[0], saved.lse, inputs, spec, new_outputs(saved)
        )
        names = (*_SHARED, "dout", "delta", "lse")
        launch_dq = RepeatedLaunch(first_dq, *names, "out", "dq", "base2_lse", "partials")
        return new_outputs, launch_dq, RepeatedLaunch(first_dkv, *names, "dk", "dv")

    def _inputs(self, saved: Saved) -> AttentionInputs:
        q, k, v = (side.squeeze(0).transpose(0, 1) for side in saved[:3])
        return AttentionInputs(q, k, v, *self._offsets, saved.table, saved.seed)

    def _table_for_kernels(self, table: Tensor) -> Tensor:
        """The table as the kernels read it. T5's layers share one table."""
        last = self._table
        if last is None or last[0] is not table or last[1] != table._version:
            last = self._table = table, table._version, table_for_kernels(table)
        return last[2]
