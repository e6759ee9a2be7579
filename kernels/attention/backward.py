"""The backward of attention: one launch for dq and the bias table, one for dk and dv.

The kernel of dq also writes what the kernel of dk and dv reads of each query: the logsumexp in base
2, and ``delta[m] = sum(dout[m] * out[m])``.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .backward_kv import _attention_backward_kv_kernel
from .backward_q import _attention_backward_q_kernel
from .launch import Launch, shared_arguments, tile_arguments
from .primitives import QUERY_PADDING, TABLE_PADDING
from .spec import AttentionInputs, AttentionSpec
from .tiles import num_tiles, tile_for


class BackwardOutputs(NamedTuple):
    """What the kernels of the backward write.

    The memory of ``dq``, ``dk`` and ``dv`` is contiguous ``(total, heads, head_dim)``. ``delta``
    and ``base2_lse`` have room for `padded_rows` queries of each head. ``partials`` is zero before,
    and None if the gradient of the table is not needed.
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor
    delta: Tensor
    base2_lse: Tensor
    partials: Tensor | None


def attention_backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    inputs: AttentionInputs,
    spec: AttentionSpec,
    needs_table: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv, and in float32 the gradient of the table if it is needed."""
    q, k, v = inputs.q, inputs.k, inputs.v
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    rows = padded_rows(q.shape[0], inputs.cu_seqlens_q.numel() - 1)
    delta, base2_lse = lse.new_empty((2, q.shape[1], rows))
    partials = None
    if needs_table:
        partials = lse.new_zeros(partials_shape(inputs, spec))
    outputs = BackwardOutputs(dq, dk, dv, delta, base2_lse, partials)
    for launch in backward_launches(dout, out, lse, inputs, spec, outputs):
        launch.run()
    return dq, dk, dv, None if partials is None else sum_partials(partials)


def backward_launches(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    inputs: AttentionInputs,
    spec: AttentionSpec,
    outputs: BackwardOutputs,
) -> tuple[Launch, Launch]:
    """The launches that write ``outputs``, in this order."""
    q, k = inputs.q, inputs.k
    num_seqs = inputs.cu_seqlens_q.numel() - 1
    options = {"bias": inputs.table is not None, "dropout": spec.dropout_p > 0.0}
    shared = shared_arguments(inputs, lse, spec)
    dout_stride, dout_head_stride, _ = dout.stride()
    shared |= {
        "dout": dout,
        "dout_stride": dout_stride,
        "dout_head_stride": dout_head_stride,
        "delta": outputs.delta,
    }
    partials = outputs.partials
    tile = tile_for("dq", q, **options)
    of_dq = {
        "out": out,
        "dq": outputs.dq,
        "base2_lse": outputs.base2_lse,
        "partials": lse if partials is None else partials,
        "DTABLE": partials is not None,
        **tile_arguments(tile),
    }
    tiles = num_tiles(q.shape[0], num_seqs, tile.queries) if outputs.dq.numel() else 0
    dq = Launch(_attention_backward_q_kernel, (tiles, q.shape[1]), shared | of_dq)
    grouped = k.shape[1] != q.shape[1]
    tile = tile_for("dkv, grouped" if grouped else "dkv", q, **options)
    of_dkv = {
        "lse": outputs.base2_lse,
        "dk": outputs.dk,
        "dv": outputs.dv,
        **tile_arguments(tile),
    }
    tiles = num_tiles(k.shape[0], num_seqs, tile.keys) if outputs.dk.numel() else 0
    return dq, Launch(_attention_backward_kv_kernel, (tiles, k.shape[1]), shared | of_dkv)


def padded_rows(total_q: int, num_seqs: int) -> int:
    """The queries of a head in ``delta`` and ``base2_lse``: each sequence has padding behind it."""
    return total_q + num_seqs * QUERY_PADDING.value


def partials_shape(inputs: AttentionInputs, spec: AttentionSpec) -> tuple[int, int, int]:
    """A row per program of dq: 2 * reach + 1 distances, and a total for each side beyond them."""
    q, table = inputs.q, inputs.table
    assert table is not None
    tile = tile_for("dq", q, bias=True, dropout=spec.dropout_p > 0.0)
    tiles = num_tiles(q.shape[0], inputs.cu_seqlens_q.numel() - 1, tile.queries)
    return tiles, q.shape[1], table.shape[1] - 2 * TABLE_PADDING.value + 2


def sum_partials(partials: Tensor) -> Tensor:
    """``(tiles, heads, 2 * reach + 3)`` to ``(heads, 2 * reach + 1)``.

    The first and last column are the sums beyond the reach. They belong to the table's end entries.
    """
    sums = partials.sum(0)
    dtable = sums[:, 1:-1].contiguous()
    dtable[:, 0] += sums[:, 0]
    dtable[:, -1] += sums[:, -1]
    return dtable
