"""The backward of attention: one launch for dq and the bias table, one for dk and dv.

The kernel of dq also writes what the kernel of dk and dv reads of each query: the logsumexp in base
2, and ``delta[m] = sum(dout[m] * out[m])``.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._launch import PreparedKernel
from .backward_kv import _attention_backward_kv_kernel
from .backward_q import _attention_backward_q_kernel
from .launch import SIZES, constant_arguments, tile_arguments
from .primitives import QUERY_PADDING, TABLE_PADDING
from .spec import AttentionInputs, AttentionSpec
from .tiles import Tile, num_tiles, tile_for


class BackwardTiles(NamedTuple):
    """The tiles of the two kernels."""

    dq: Tile
    dkv: Tile


def backward_kernels(
    inputs: AttentionInputs,
    spec: AttentionSpec,
    unit: int,
    tiles: BackwardTiles,
    dout_stride: int,
    needs_table: bool,
) -> tuple[PreparedKernel, PreparedKernel]:
    """The kernels of all layers with inputs, options and gradients of this kind."""
    shared = constant_arguments(inputs, spec, unit) | {"DOUT_STRIDE": dout_stride}
    sides = ("q", "k", "v", "table", "seed", "dout", "delta", "lse")
    offsets, sizes = ("cu_seqlens_q", "cu_seqlens_k"), (*SIZES, "dout_head_stride")
    dq = PreparedKernel(
        _attention_backward_q_kernel,
        (*sides, "out", "dq", "base2_lse", "partials", *offsets),
        sizes,
        shared | tile_arguments(tiles.dq) | {"DTABLE": needs_table},
    )
    dkv = PreparedKernel(
        _attention_backward_kv_kernel,
        (*sides, "dk", "dv", *offsets),
        sizes,
        shared | tile_arguments(tiles.dkv),
    )
    return dq, dkv


def backward_tiles(inputs: AttentionInputs, spec: AttentionSpec) -> BackwardTiles:
    """The tiles of the two kernels."""
    q = inputs.q
    options = {"bias": inputs.table is not None, "dropout": spec.dropout_p > 0.0}
    dkv = "dkv" if inputs.k.shape[1] == q.shape[1] else "dkv, grouped"
    return BackwardTiles(tile_for("dq", q, **options), tile_for(dkv, q, **options))


def backward_grids(
    inputs: AttentionInputs, tiles: BackwardTiles
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The programs of the two kernels."""
    (total_q, heads, _), (total_k, kv_heads, _) = inputs.q.shape, inputs.k.shape
    num_seqs = inputs.cu_seqlens_q.numel() - 1
    dq = num_tiles(total_q, num_seqs, tiles.dq.queries) * heads, 1
    return dq, (num_tiles(total_k, num_seqs, tiles.dkv.keys) * kv_heads, 1)


def padded_rows(total_q: int, num_seqs: int) -> int:
    """The queries of a head in ``delta`` and ``base2_lse``: each sequence has padding behind it."""
    return total_q + num_seqs * QUERY_PADDING.value


def partials_shape(inputs: AttentionInputs, grid: tuple[int, int]) -> tuple[int, int, int]:
    """A row per program of dq: 2 * reach + 1 distances, and a total for each side beyond them."""
    assert inputs.table is not None
    heads = inputs.q.shape[1]
    return grid[0] // heads, heads, inputs.table.shape[1] - 2 * TABLE_PADDING.value + 2


def sum_partials(partials: Tensor) -> Tensor:
    """``(tiles, heads, 2 * reach + 3)`` to ``(heads, 2 * reach + 1)``.

    The first and last column are the sums beyond the reach. They belong to the table's end entries.
    """
    sums = partials.sum(0)
    dtable = sums[:, 1:-1].contiguous()
    dtable[:, 0] += sums[:, 0]
    dtable[:, -1] += sums[:, -1]
    return dtable
