"""What patched models and models of our own need to lay out a batch.

The number of real tokens depends on values. An op that lays out a batch in a graph of
torch.compile therefore gives its outputs sizes that are known when the graph runs (`new_size`). All
layers run on one size of this kind, so one graph serves every batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._library.fake_impl import allocate_size

from ..kernels import PackedLayout

Rows = tuple[Tensor, Tensor, Tensor, Tensor]
"""What an op returns of a layout: ``cu_seqlens``, ``indices``, ``position_ids``, and an empty
tensor ``(max_seqlen, 0)``, because an op returns a size only as the shape of a tensor."""


def slots_of_sequences(
    cu_seqlens: Any, padded: Any, rows: int, columns: int, device: torch.device
) -> Tensor:
    """``(rows, columns)`` int64, 1 in the slots of packed rows that hold a token.

    Args:
        cu_seqlens: ``(num_seqs + 1,)`` integers, boundaries of the sequences without padding.
        padded: ``(num_seqs + 1,)`` integers, the first slot of each sequence in the flattened rows.
        rows, columns: of the batch.
        device: of the result.

    Raises:
        ValueError: if the shapes differ, or a sequence does not have its own slots in one row.
    """
    cu_seqlens = torch.as_tensor(cu_seqlens, dtype=torch.int64, device=device)
    padded = torch.as_tensor(padded, dtype=torch.int64, device=device)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape != padded.shape or len(padded) < 2:
        raise ValueError(
            "cu_seqlens and cu_seqlens_padded must both be (num_seqs + 1,), "
            f"got shapes {tuple(cu_seqlens.shape)} and {tuple(padded.shape)}"
        )
    lengths = cu_seqlens.diff()
    starts, ends = padded[:-1], padded[:-1] + lengths
    fits = (starts >= 0) & (lengths >= 0) & (ends <= padded[1:]) & (ends <= rows * columns)
    fits &= (lengths == 0) | (starts // columns == (ends - 1) // columns)
    if not bool(fits.all()):
        at = int((~fits).nonzero()[0])
        raise ValueError(
            f"cu_seqlens_padded must give each sequence its own slots in one row of {columns}, "
            f"got sequence {at} with {int(lengths[at])} tokens from slot {int(starts[at])}, "
            f"and slot {int(padded[at + 1])} of {rows * columns} after it"
        )
    steps = torch.zeros(rows * columns + 1, dtype=torch.int64, device=device)
    one = torch.ones_like(starts)
    steps.index_add_(0, starts, one).index_add_(0, ends, -one)
    return steps[:-1].cumsum(0).view(rows, columns)


# ------------------------------------------------------------------------------------ ops in graphs


def outputs_of(layout: PackedLayout, like: Tensor) -> Rows:
    """What an op returns of a layout."""
    longest = like.new_empty((layout.max_seqlen, 0))
    return layout.cu_seqlens, layout.indices, layout.position_ids, longest


def layout_of(outputs: Rows, shape: tuple[int, int] | None = None) -> PackedLayout:
    """The layout that an op has returned, with its padded shape. None: right-padded sequences."""
    cu_seqlens, indices, position_ids, empty = outputs
    longest = empty.shape[0]
    if shape is None:
        shape = cu_seqlens.shape[0] - 1, longest
    return PackedLayout(cu_seqlens, indices, position_ids, indices.shape[0], longest, shape)


def fake_rows(mask: Tensor) -> Rows:
    """The outputs of an op on a ``(rows, columns)`` mask, for tracing."""
    total, longest = new_size(), new_size()
    cu_seqlens, indices, position_ids = (
        mask.new_empty(size, dtype=torch.int32) for size in (mask.shape[0] + 1, total, total)
    )
    return cu_seqlens, indices, position_ids, mask.new_empty((longest, 0))


def fake_stream(cu_seqlens: Tensor, like: Tensor, total: int) -> Rows:
    """The outputs of an op on the boundaries of a stream of ``total`` tokens, for tracing.

    ``like`` is on the device of the tokens, which may not be that of ``cu_seqlens``.
    """
    offsets, indices, position_ids = (
        like.new_empty(size, dtype=torch.int32) for size in (cu_seqlens.shape[0], total, total)
    )
    return offsets, indices, position_ids, like.new_empty((new_size(), 0))


def new_size() -> Any:
    """A size that is known when the graph runs.

    ``new_dynamic_size`` of the same context does this only under a flag of torch.compile, which
    would change how the user's other code is traced.
    """
    context: Any = torch.library.get_ctx()
    return allocate_size(context._shape_env)
