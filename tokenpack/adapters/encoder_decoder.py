"""M2M100/NLLB, BART, mBART, Marian, Pegasus: models that compute positions inside their stacks.

A stack calls its position table with a shape or ids and no keywords. In a packed forward, the table
looks up the positions in the active `PackedCall`: those of the tokens in the padded batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .call import SIDE, active_call
from .swap import Replacement


def _packed_positions(module: Any) -> Tensor | None:
    call = active_call()
    return None if call is None else call.positions[getattr(module, SIDE)]


def learned_positions_forward(
    original: Replacement, module: Any, *args: Any, **kwargs: Any
) -> Tensor:
    """BartLearnedPositionalEmbedding: rows of ``weight``, after an offset of two rows."""
    positions = _packed_positions(module)
    if positions is None:
        return original(module, *args, **kwargs)
    return original(module, positions[None], position_ids=positions)


def sinusoidal_positions_forward(
    original: Replacement, module: Any, *args: Any, **kwargs: Any
) -> Tensor:
    """MarianSinusoidalPositionalEmbedding: rows of a frozen ``weight``."""
    positions = _packed_positions(module)
    if positions is None:
        return original(module, *args, **kwargs)
    return original(module, (1, positions.numel()), position_ids=positions)


@torch.no_grad()
def m2m100_positions_forward(
    original: Replacement, module: Any, *args: Any, **kwargs: Any
) -> Tensor:
    """M2M100SinusoidalPositionalEmbedding: rows of a buffer that grows on demand."""
    positions = _packed_positions(module)
    if positions is None:
        return original(module, *args, **kwargs)
    return module.weights.index_select(0, positions)[None]


def m2m100_positions(stack: Any, ids: Tensor) -> Tensor:
    """Positions count the ids that are not the padding id, from ``padding_idx + 1``.

    They are computed from the padded ids, so that left padding and padding ids within a text get
    the model's own positions. Grows the position table as the model does for this width.
    """
    table = stack.embed_positions
    needed = table.padding_idx + 1 + ids.shape[1]
    if needed > table.weights.shape[0]:
        table.make_weights(needed + table.offset, table.embedding_dim, table.padding_idx)
    return table.create_position_ids_from_input_ids(ids, table.padding_idx)
