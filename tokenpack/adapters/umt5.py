"""UMT5: T5 with a separate relative bias in every layer.

Its attention does not accept ``position_bias``, and builds a bias of all queries by all keys in
every layer. In a packed forward, `attention_forward` replaces it and uses a table by distance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .call import KEYWORD
from .swap import Replacement


def attention_forward(
    original: Replacement,
    module: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """UMT5Attention: ``(1, tokens, d_model)`` to ``(1, tokens, d_model)`` in a packed forward."""
    if kwargs.get(KEYWORD) is None:
        return original(
            module,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            **kwargs,
        )
    key_states = hidden_states if encoder_hidden_states is None else encoder_hidden_states

    def per_head(projected: Tensor) -> Tensor:  # [1, heads, tokens, head_dim]
        return projected.unflatten(-1, (module.n_heads, module.key_value_proj_dim)).transpose(1, 2)

    attend = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    out, weights = attend(
        module,
        per_head(module.q(hidden_states)),
        per_head(module.k(key_states)),
        per_head(module.v(key_states)),
        attention_mask,
        dropout=module.dropout if module.training else 0.0,
        scaling=module.scaling,
        position_bias=bias_table(module),
        **kwargs,
    )
    return module.o(out.flatten(2)), weights


def bias_table(module: Any) -> Tensor | None:
    """``(heads, 2 * max_distance + 1)``, or None in cross-attention, which has no bias."""
    if not module.has_relative_attention_bias:
        return None
    max_distance = module.relative_attention_max_distance
    embedding = module.relative_attention_bias
    distance = torch.arange(-max_distance, max_distance + 1, device=embedding.weight.device)
    return embedding(module._relative_position_bucket(distance)).t().contiguous()
