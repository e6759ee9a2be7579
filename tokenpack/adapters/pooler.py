"""BERT's pooler: reads column 0 of the padded batch, which is the first token of each sequence."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .call import active_call
from .swap import Replacement


def first_token_forward(original: Replacement, module: Any, hidden_states: Tensor) -> Tensor:
    """``(1, total_tokens, hidden)`` to ``(num_seqs, hidden)`` in a packed forward."""
    call = active_call()
    if call is not None:
        starts = call.layouts["self"].cu_seqlens[:-1]
        hidden_states = hidden_states.squeeze(0).index_select(0, starts)[:, None]
    return original(module, hidden_states)
