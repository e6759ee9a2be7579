"""Launches of the attention kernels, and the arguments that all of them share."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.functional import pad

from .primitives import TABLE_PADDING
from .spec import AttentionInputs, AttentionSpec
from .tiles import Tile, chunk_for, padded_head_dim, precision

_LOG2_E = 1.4426950408889634


class Launch(NamedTuple):
    """A kernel, its grid, and all its arguments by name. A grid with a 0 launches nothing."""

    kernel: Any
    grid: tuple[int, int]
    arguments: dict[str, Any]

    def run(self) -> Any:
        """Launch the kernel. Returns Triton's compiled kernel, or None if there is none."""
        return self.kernel[self.grid](**self.arguments) if 0 not in self.grid else None


class RepeatedLaunch:
    """A launch that is repeated with other tensors, whose sizes and strides are the same.

    For each launch, Triton binds all arguments by name and specializes the kernel on them, which
    takes longer than the launch itself. Between the layers of one batch, only the addresses of
    tensors change. So the first launch goes through Triton, and the next ones call the compiled
    kernel that it returned. The kernel relies on the alignment of the addresses. So a launch with
    an address that is not a multiple of 16 goes through Triton, as all launches do that Triton
    interprets.

    Args:
        launch: the first launch.
        names: the arguments that change, all of which are tensors: the kernel's first parameters.
    """

    def __init__(self, launch: Launch, *names: str) -> None:
        order = tuple(launch.kernel.arg_names)
        assert order[: len(names)] == names, f"the first parameters must be {names}, got {order}"
        # The tensors of the first launch must not stay in memory.
        arguments = {**launch.arguments, **dict.fromkeys(names)}
        self._names, self._launch = names, launch._replace(arguments=arguments)
        self._unchanged = tuple(arguments[name] for name in order[len(names) :])
        self._compiled: Any = None

    def __call__(self, *tensors: Tensor) -> None:
        """Launch with these tensors, in the order of the names."""
        addresses = 0
        for tensor in tensors:
            addresses |= tensor.data_ptr()
        is_aligned = addresses % 16 == 0
        if is_aligned and self._compiled is not None:
            self._compiled(*tensors, *self._unchanged)
            return
        changed = dict(zip(self._names, tensors, strict=True))
        launch = self._launch._replace(arguments={**self._launch.arguments, **changed})
        kernel = launch.run()
        if is_aligned and kernel is not None:
            self._compiled = kernel[(*launch.grid, 1)]


def shared_arguments(inputs: AttentionInputs, lse: Tensor, spec: AttentionSpec) -> dict[str, Any]:
    """The arguments that all three kernels take, by name.

    The table is extended, and the scale is positive (see `op`). Kernels need a pointer for each
    tensor. ``lse`` stands in for an absent table or seed, which no kernel then reads.
    """
    q, k, v, cu_seqlens_q, cu_seqlens_k, table, seed = inputs
    q_stride, q_head_stride, _ = q.stride()
    k_stride, k_head_stride, _ = k.stride()
    v_stride, v_head_stride, _ = v.stride()
    total_q, heads, head_dim = q.shape
    left, right = spec.limits
    return {
        "q": q,
        "k": k,
        "v": v,
        "lse": lse,
        "table": lse if table is None else table,
        "seed": lse if seed is None else seed,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "num_seqs": cu_seqlens_q.numel() - 1,
        "total_q": total_q,
        "q_stride": q_stride,
        "q_head_stride": q_head_stride,
        "k_stride": k_stride,
        "k_head_stride": k_head_stride,
        "v_stride": v_stride,
        "v_head_stride": v_head_stride,
        "scale": spec.scale,
        "softcap": spec.softcap or 1.0,
        "dropout_p": spec.dropout_p,
        "left": left,
        "right": right,
        "reach": 0 if table is None else table.shape[1] // 2 - TABLE_PADDING.value,
        "LEFT": left >= 0,
        "RIGHT": right >= 0,
        "SOFTCAP": spec.softcap is not None,
        "BIAS": table is not None,
        "DROPOUT": spec.dropout_p > 0.0,
        "GROUP": heads // k.shape[1],
        "HEAD_DIM": head_dim,
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


def table_for_kernels(table: Tensor) -> Tensor:
    """The bias table as the kernels read it: float32, in base 2, and extended.

    ``TABLE_PADDING`` more copies of each row's first and last entry spare the kernels a comparison
    for each score.
    """
    padding = (TABLE_PADDING.value, TABLE_PADDING.value)
    return pad((table.float() * _LOG2_E)[None], padding, "replicate")[0]
