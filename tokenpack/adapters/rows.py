"""Packed rows: several sequences side by side in each row of a batch, and padding behind them.

    sequence s stands in slots  cu_seqlens_padded[s] ... + cu_seqlens[s + 1] - cu_seqlens[s]

of the flattened rows, as Transformer Engine calls it. Its tokens alone go through the model, as a
stream with ``cu_seqlens`` does; what comes out is put back where the tokens stood.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import PackedLayout, layout_from_mask, unpad

# Boundaries for transformers' own flash attention, which says the same in other words.
_FOR_FLASH_ATTENTION = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_BY_TOKEN = ("input_ids", "inputs_embeds", "labels", "position_ids")


def take_out_of_rows(given: dict[str, Any]) -> PackedLayout | None:
    """Replace packed rows among a call's arguments by the stream of their tokens.

    Args:
        given: the arguments by name. Tokens are left alone without ``cu_seqlens_padded``.

    Returns:
        The layout that puts streams back into the rows, of which each is one of its sequences.

    Raises:
        ValueError: if the boundaries contradict one another or the rows.
    """
    if "cu_seqlens" not in given:
        return None
    for name in _FOR_FLASH_ATTENTION:
        given.pop(name, None)
    if "cu_seqlens_padded" not in given:
        return None
    padded = given.pop("cu_seqlens_padded")
    tokens = {name: given[name] for name in _BY_TOKEN if name in given}
    name, first = next(iter(tokens.items()), ("input_ids", torch.empty(0)))
    if first.dim() < 2 or 0 in first.shape[:2]:
        raise ValueError(
            f"{name} must be (rows, columns) and not empty, got shape {tuple(first.shape)}"
        )
    shape = first.shape[:2]
    for other, values in tokens.items():
        if values.shape[:2] != shape:
            raise ValueError(
                f"{other} must begin with the rows and columns of {name}, {tuple(shape)}, "
                f"got shape {tuple(values.shape)}"
            )
    layout = layout_from_mask(_mask(given["cu_seqlens"], padded, shape, first.device))
    given.update(zip(tokens, (stream[None] for stream in unpad(list(tokens.values()), layout))))
    return layout


def _mask(cu_seqlens: Any, padded: Any, shape: torch.Size, device: torch.device) -> Tensor:
    """``(rows, columns)``, 1 where a sequence stands."""
    rows, columns = shape
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
            f"cu_seqlens_padded must give each sequence its own slots, in one row of {columns}; "
            f"sequence {at} has {int(lengths[at])} tokens from slot {int(starts[at])}, "
            f"and the next slot is {int(padded[at + 1])} of {rows * columns}"
        )
    steps = torch.zeros(rows * columns + 1, dtype=torch.int64, device=device)
    one = torch.ones_like(starts)
    steps.index_add_(0, starts, one).index_add_(0, ends, -one)
    return steps[:-1].cumsum(0).view(rows, columns)
