"""tokenpack's entry in transformers' attention interface.

One name is registered over each implementation that a patched model had ("sdpa", "eager", ...).
With the packing keyword the function attends within packed sequences; without it, it is the
implementation below, so that `generate`, caches and encoder-only calls run as they did.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention import packed_attention
from .call import KEYWORD, PackedCall

ROLE = "_tokenpack_role"

# Keywords that attention layers pass along and that change nothing once sequences are packed.
_HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "is_causal",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


_BASES: dict[str, str] = {}  # by the name that is registered over it


def base_of(implementation: str) -> str:
    """What a registered name stands over; any other implementation itself."""
    return _BASES.get(implementation, implementation)


def register_over(base: str) -> str:
    """Register tokenpack's attention over the implementation ``base``; returns its name."""
    # Model code asks for "flash" in the name before it drops masks, so that must not be there.
    name = "tokenpack_" + base.replace("flash_attention", "fa").replace("flash", "f")
    _BASES[name] = base
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, partial(_attention_forward, base))
        if base in ALL_MASK_ATTENTION_FUNCTIONS:
            # Looked up when it is called, so that a later registration over ``base`` counts.
            AttentionMaskInterface.register(name, partial(_base_mask, base))
    return name


def _base_mask(base: str, *args: Any, **kwargs: Any) -> Any:
    return ALL_MASK_ATTENTION_FUNCTIONS[base](*args, **kwargs)


def _attention_forward(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The signature that transformers' attention layers call; q, k, v ``(1, heads, tokens, dim)``.

    Returns the output ``(1, tokens, heads, dim)`` and no weights.
    """
    call: PackedCall | None = kwargs.pop(KEYWORD, None)
    if call is None:
        marked = attention_mask is not None and attention_mask.shape == (1, 1, 1, 1)
        if marked and query.shape[2] > 1:
            raise RuntimeError(
                f"{type(module).__name__} did not hand the {KEYWORD!r} keyword down to "
                "attention while packing: this model cannot be patched"
            )
        return _base_attention(base, module)(module, query, key, value, attention_mask, **kwargs)
    return _packed_attention_forward(call, module, query, key, value, **kwargs), None


def _base_attention(base: str, module: nn.Module) -> Callable[..., Any]:
    eager: Any = None  # a model's own, in the file that defines its attention
    for parent in type(module).__mro__:
        eager = eager or getattr(sys.modules[parent.__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(base, eager)


# Chooses by what the call is and counts it: host work, whatever backend comes after.
@torch.compiler.disable
def _packed_attention_forward(
    call: PackedCall,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    unknown = [
        name for name, value in kwargs.items() if value is not None and name not in _HARMLESS
    ]
    if unknown:
        raise RuntimeError(
            f"{type(module).__name__} passes {unknown} to attention, which packing would ignore: "
            "this model cannot be patched"
        )
    table = None if position_bias is None or position_bias.numel() == 0 else position_bias
    if table is not None and table.dim() != 2:
        raise RuntimeError(
            f"{type(module).__name__} built a position bias of shape {tuple(table.shape)} "
            "while packing: this model cannot be patched"
        )
    role = getattr(module, ROLE, "self")
    layout_q, layout_k = (side.to(query.device) for side in call.sides(role))
    if query.shape[2] != layout_q.total_tokens or key.shape[2] != layout_k.total_tokens:
        raise RuntimeError(
            f"{type(module).__name__} ({role}) attends from {query.shape[2]} to {key.shape[2]} "
            f"tokens, the packed batch has {layout_q.total_tokens} and {layout_k.total_tokens}"
        )
    causal = _is_causal(role, module, kwargs)
    window = None
    if sliding_window is not None:
        # transformers counts the query's own place in.
        window = (sliding_window - 1, -1 if causal else sliding_window - 1)
    out, choice = packed_attention(
        # squeeze, not [0], whose backward writes zeros and copies the gradient into them
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        layout_q.cu_seqlens,
        layout_k.cu_seqlens,
        layout_q.max_seqlen,
        layout_k.max_seqlen,
        causal=causal,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=window,
        softcap=softcap,
        relative_bias=table,
        dropout_p=dropout,
        backend=call.backend,
    )
    call.attention_calls += 1
    call.state.stats.attention[role] = str(choice)
    return out[None]


def _is_causal(role: str, module: nn.Module, kwargs: dict[str, Any]) -> bool:
    if role != "self":
        return role == "dec"
    asked = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if asked is None else asked)
