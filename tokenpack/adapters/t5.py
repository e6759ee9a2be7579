"""T5 and mT5: a learned relative bias that the first layer computes and all layers share.

The model builds the bias as ``(1, heads, queries, keys)``, and a tensor of zeros of that shape for
cross-attention. On packed input both are quadratic in the whole batch. Here, layers pass on the
table of biases by distance, ``(heads, 2 * max_distance + 1)``, or an empty tensor for no bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .call import KEYWORD
from .swap import Replacement


def attention_forward(original: Replacement, module: Any, *args: Any, **kwargs: Any) -> Any:
    """T5Attention: use the bias table as ``position_bias``, and compute it in the first layer."""
    if kwargs.get(KEYWORD) is not None and kwargs.get("position_bias") is None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        kwargs["position_bias"] = bias_table(module, hidden_states.device)
    return original(module, *args, **kwargs)


def bias_table(module: Any, device: torch.device) -> Tensor:
    """``(heads, 2 * max_distance + 1)`` if the layer has a bias, otherwise an empty tensor.

    Every forward computes the table, so that gradient checkpointing recomputes it with gradients.
    It calls the embedding, because FSDP gathers sharded parameters only while their module runs.
    """
    if not module.has_relative_attention_bias:
        return torch.empty(0, device=device)
    embedding = module.relative_attention_bias
    max_distance = module.relative_attention_max_distance
    distance = torch.arange(-max_distance, max_distance + 1, device=device)
    buckets = module._relative_position_bucket(
        distance,
        bidirectional=not module.is_decoder,
        num_buckets=module.relative_attention_num_buckets,
        max_distance=max_distance,
    )
    return embedding(buckets).t().contiguous()
