"""Dead tokens: they fill the stream of a batch, so that its number of tokens is a constant.

    tokens in the stream    = the next multiple of pad_to_total
    sequences in the stream = the next power of two, at least 64

The dead tokens are one sequence after the last one, and empty sequences follow it. No token of the
batch attends to them. They are cut off before the head computes a loss and before outputs are
returned, so their gradients are 0. Each one is a copy of the first token of the batch with its
position: a position beyond the batch might not exist, and a value beyond the batch's might change
the scale of a quantized layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import PackedLayout
from .call import PackedCall, PatchState
from .graph_ops import dead_tokens_in_graph, filled_boundaries


def add_dead_tokens(
    call: PackedCall, arguments: dict[str, Tensor], prefixes: dict[str, str]
) -> None:
    """Fill the streams of a call up to a multiple of ``pad_to_total``.

    Args:
        call: its ``streams`` and ``positions`` are changed.
        arguments: of the packed forward, changed in place. Those of a side have all its tokens.
        prefixes: by side, what the names of its arguments begin with.
    """
    multiple = call.state.pad_to_total
    if multiple is None:
        return
    for side, prefix in prefixes.items():
        stream, dead = _filled(call.layouts[side], multiple, call.state, call.traced)
        call.streams[side] = stream
        for name in _PER_TOKEN:
            if prefix + name in arguments:
                arguments[prefix + name] = _with_copies(arguments[prefix + name], dead, dim=1)
        if side in call.positions:
            call.positions[side] = _with_copies(call.positions[side], dead, dim=0)


_PER_TOKEN = ("input_ids", "inputs_embeds", "position_ids", "token_type_ids")


def _filled(
    layout: PackedLayout, multiple: int, state: PatchState, traced: bool
) -> tuple[PackedLayout, int]:
    """The layout of the stream with its dead tokens, and their number.

    The dead tokens have no slot in the batch, so the layout has no indices and cannot repad.
    """
    if traced:
        cu_seqlens, dead = dead_tokens_in_graph(layout, multiple, state.key)
    else:
        dead = -layout.total_tokens % multiple
        cu_seqlens = filled_boundaries(layout.cu_seqlens, layout.total_tokens + dead)
        state.stats.dead_tokens += dead
    nothing = layout.indices[:0]
    return (
        PackedLayout(
            cu_seqlens,
            nothing,
            nothing,
            layout.total_tokens + dead,
            torch.sym_max(layout.max_seqlen, dead),
            layout.padded_shape,
        ),
        dead,
    )


def _with_copies(values: Tensor, count: int, dim: int) -> Tensor:
    """The values of a stream, then ``count`` copies of the first one, without a gradient."""
    first = values.narrow(dim, 0, 1).detach()
    shape = list(values.shape)
    shape[dim] = count
    return torch.cat([values, first.expand(shape)], dim=dim)
