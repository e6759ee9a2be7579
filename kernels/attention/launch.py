"""The arguments that all attention kernels share."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from .primitives import TABLE_PADDING
from .rows import MOST_ROWS
from .spec import AttentionInputs, AttentionSpec
from .tiles import Tile, chunk_for, padded_head_dim, precision

SIZES = (
    "num_seqs",
    "total_q",
    "reach",
    "q_head_stride",
    "k_head_stride",
    "v_head_stride",
)
"""The sizes that all kernels take. See `size_arguments`."""


def head_unit(*sides: Tensor) -> int:
    """In which unit of elements kernels take the strides of heads: 16 if it divides all, else 1.

    The stride of a head grows with the batch in some layouts. So Triton must not specialize on it,
    and would not know that it is a multiple of 16, which wide loads need.
    """
    return 16 if all(side.stride(1) % 16 == 0 for side in sides) else 1


def size_arguments(inputs: AttentionInputs, unit: int) -> tuple[int, ...]:
    """The values of `SIZES`: what changes from batch to batch.

    Raises:
        ValueError: q or k has more rows than the kernels can count.
    """
    q, k, v, cu_seqlens_q, _, table, _ = inputs
    for name, rows in (("q", q.shape[0]), ("k", k.shape[0])):
        if rows >= MOST_ROWS.value:
            raise ValueError(
                f"{name} must have less than 2**30 rows, got {rows}: divide its sequences"
            )
    reach = 0 if table is None else table.shape[1] // 2 - TABLE_PADDING.value
    strides = (side.stride(1) // unit for side in (q, k, v))
    return cu_seqlens_q.numel() - 1, q.shape[0], reach, *strides


def constant_arguments(inputs: AttentionInputs, spec: AttentionSpec, unit: int) -> dict[str, Any]:
    """What is the same for all layers of one kind, in all batches.

    The scale is positive (see `op`). Strides from token to token are constants: they belong to the
    model and not to the batch, and with them the offsets within a tile are part of the
    instructions. Strides between heads may change with the number of tokens.
    """
    q, k, v, _, _, table, _ = inputs
    left, right = spec.limits
    head_dim = q.shape[2]
    return {
        "Q_STRIDE": q.stride(0),
        "K_STRIDE": k.stride(0),
        "V_STRIDE": v.stride(0),
        "scale": spec.scale,
        "softcap": spec.softcap or 1.0,
        "dropout_p": spec.dropout_p,
        "left": left,
        "right": right,
        "LEFT": left >= 0,
        "RIGHT": right >= 0,
        "SOFTCAP": spec.softcap is not None,
        "BIAS": table is not None,
        "DROPOUT": spec.dropout_p > 0.0,
        "HEADS": q.shape[1],
        "GROUP": q.shape[1] // k.shape[1],
        "HEAD_DIM": head_dim,
        "HEAD_UNIT": unit,
        "COLUMNS": padded_head_dim(head_dim),
        "CHUNK": chunk_for(head_dim, q.dtype),
        "PRECISION": precision(q.dtype),
    }


def tile_arguments(tile: Tile) -> dict[str, int]:
    """The arguments that a tile gives to a kernel and to its compilation."""
    return {
        "QUERIES": tile.queries,
        "KEYS": tile.keys,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def table_for_kernels(table: Tensor, spec: AttentionSpec) -> Tensor:
    """The bias table as the kernels read it: float32, extended, in the unit of a raw score.

    With that unit (see `primitives`), a product can start from the bias. ``TABLE_PADDING`` more
    copies of each row's first and last entry spare the kernels a comparison for each score.
    """
    padding = (TABLE_PADDING.value, TABLE_PADDING.value)
    return pad((table.float() / (spec.softcap or spec.scale))[None], padding, "replicate")[0]
