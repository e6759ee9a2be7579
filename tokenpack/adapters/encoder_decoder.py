"""M2M100/NLLB, BART, mBART, Marian, Pegasus: positions that the model computes for itself.

These stacks ask a position table for as many rows as they have tokens, and hand it no keyword. So
while a stack runs packed, its table looks up the positions that the call carries: those that the
tokens had in the padded batch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .call import KEYWORD, PackedCall
from .swap import Replacement

SIDE = "_tokenpack_side"


@functools.partial(torch.compiler.disable, recursive=False)
def stack_forward(original: Replacement, module: Any, *args: Any, **kwargs: Any) -> Any:
    """An encoder or decoder stack: put its call where its position table finds it.

    Here and not in the model's forward, so that checkpointing a whole stack finds it again too.
    """
    call: PackedCall | None = kwargs.get(KEYWORD)
    if call is None:
        return original(module, *args, **kwargs)
    if getattr(module.embed_positions, "_tokenpack_state", None) is not call.state:
        raise RuntimeError(
            f"{type(module).__name__}.embed_positions was replaced after patch_model, and would "
            "count packed tokens: unpatch_model before replacing it, patch_model after"
        )
    with call.state.running(call):
        return original(module, *args, **kwargs)


@torch.compiler.disable
def _positions_here(module: Any) -> Tensor | None:
    state = getattr(module, "_tokenpack_state", None)
    call = None if state is None else state.current()
    return None if call is None else call.positions[getattr(module, SIDE)]


def learned_positions_forward(
    original: Replacement, module: Any, *args: Any, **kwargs: Any
) -> Tensor:
    """BartLearnedPositionalEmbedding: rows of ``weight``, which begins with two unused ones."""
    positions = _positions_here(module)
    if positions is None:
        return original(module, *args, **kwargs)
    return original(module, positions[None], position_ids=positions)


def sinusoidal_positions_forward(
    original: Replacement, module: Any, *args: Any, **kwargs: Any
) -> Tensor:
    """MarianSinusoidalPositionalEmbedding: rows of a frozen ``weight``."""
    positions = _positions_here(module)
    if positions is None:
        return original(module, *args, **kwargs)
    return original(module, (1, positions.numel()), position_ids=positions)


@torch.no_grad()
def m2m100_positions_forward(
    original: Replacement, module: Any, *args: Any, **kwargs: Any
) -> Tensor:
    """M2M100SinusoidalPositionalEmbedding: rows of a buffer that the model lets grow."""
    positions = _positions_here(module)
    if positions is None:
        return original(module, *args, **kwargs)
    return module.weights.index_select(0, positions)[None]


def m2m100_positions(model: Any, side: str, ids: Tensor) -> Tensor:
    """Count the ids that are not padding, from ``padding_idx + 1``; padding sits at its index.

    Counted on the padded ids, so that padding on the left and padding ids inside a text get what
    the model gives them. Grows the position table as the model would for a batch this wide.
    """
    table = (model.get_encoder() if side == "enc" else model.get_decoder()).embed_positions
    needed = table.padding_idx + 1 + ids.shape[1]
    if needed > table.weights.shape[0]:
        table.make_weights(needed + table.offset, table.embedding_dim, table.padding_idx)
    return table.create_position_ids_from_input_ids(ids, table.padding_idx)
