"""T5 and mT5: a learned bias of the distance, in the first layer's attention, shared by the rest.

The model builds that bias as ``(1, heads, queries, keys)``, and for cross-attention the same size
in zeros: on packed input, quadratic in the whole batch. Here layers hand each other the table of
distances instead, ``(heads, 2 * reach + 1)``, and no tensor for none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .call import KEYWORD
from .swap import Replacement


def attention_forward(original: Replacement, module: Any, *args: Any, **kwargs: Any) -> Any:
    """T5Attention: take the table for ``position_bias``, or make it where the layer has one."""
    if kwargs.get(KEYWORD) is not None and kwargs.get("position_bias") is None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        kwargs["position_bias"] = bias_table(module, hidden_states.device)
    return original(module, *args, **kwargs)


def bias_table(module: Any, device: torch.device) -> Tensor:
    """``(heads, 2 * max_distance + 1)`` of a layer that has a table; an empty tensor of others.

    Made anew in every forward, and by calling the embedding: gradient checkpointing recomputes it
    with gradients, and sharded parameters are only whole while their module is being called.
    """
    if not module.has_relative_attention_bias:
        return torch.empty(0, device=device)
    embedding = module.relative_attention_bias
    reach = module.relative_attention_max_distance
    distance = torch.arange(-reach, reach + 1, device=device)
    buckets = module._relative_position_bucket(
        distance,
        bidirectional=not module.is_decoder,
        num_buckets=module.relative_attention_num_buckets,
        max_distance=reach,
    )
    return embedding(buckets).t().contiguous()
