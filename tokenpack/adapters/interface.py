"""tokenpack's function in transformers' attention interface.

`register_over` registers one name over each implementation that a patched model had ("sdpa",
"eager", ...). With the keyword `KEYWORD`, the registered function computes attention within packed
sequences. Without it, the function calls the implementation below, so `generate`, caches and
encoder-only calls behave as before.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention import layout_attention
from ..attention.graph import Layer, attention_in_graph
from .call import (
    KEYWORD,
    MARKER_SHAPE,
    ROLE,
    WATCHED,
    PackedCall,
    PatchState,
    runs_padded,
    state_of,
)
from .graph import note_attention
from .traced_once import traced_once

# Keywords of attention layers that do not affect attention over packed sequences.
_IGNORED = frozenset(
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


_USERS: dict[int, int] = {}  # id of a config -> number of patched models that have it
_PREFIX = "tokenpack_"
_BASES: dict[str, str] = {}  # registered name -> implementation below it


class PatchedConfig:
    """A config whose attention implementation `patch_model` replaces.

    transformers sets the implementation on the sub-configs of a config too, so create the objects
    for all configs of a model before the first `replace`.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.base = self.below()

    def below(self) -> str:
        """The implementation below tokenpack's, or the one that was set in its place."""
        current = self.config._attn_implementation
        # A config that was copied from a patched model has the registered name too.
        return _BASES.get(current, current)

    def replace(self) -> None:
        """Put tokenpack's attention over the implementation of the config."""
        key = id(self.config)
        if key not in _USERS:
            weakref.finalize(self.config, _USERS.pop, key, None)
        _USERS[key] = _USERS.get(key, 0) + 1
        self.config._attn_implementation = register_over(self.base)

    def restore(self) -> None:
        """Put the previous implementation back, unless another patched model has the config too."""
        key = id(self.config)
        _USERS[key] = _USERS.get(key, 1) - 1
        if _USERS[key] <= 0:
            _USERS.pop(key)
            self.config._attn_implementation = self.base

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.__dict__.update(saved)
        register_over(self.base)  # a new process has not registered the name


def read_bases(configs: list[PatchedConfig]) -> None:
    """Let the implementation that each config has now be the one to restore."""
    for each in configs:
        each.base = each.below()


# torch.compile runs the next two once, while it traces. It does so again if an implementation
# changes, because the attention layers read its name.


@torch.compiler.assume_constant_result
def follow(key: str) -> None:
    """Put tokenpack's attention over implementations that were set after `patch_model`, too.

    ``key`` is the one of the model's `PatchState`.
    """
    state = state_of(key)
    configs: list[PatchedConfig] = [] if state is None else state.configs
    if all(is_registered(each.config._attn_implementation) for each in configs):
        return
    read_bases(configs)
    for each in configs:
        each.config._attn_implementation = register_over(each.base)


@torch.compiler.assume_constant_result
def custom_attention(key: str) -> str | None:
    """The first implementation that may compute something else than attention does elsewhere.

    Those of transformers compute the same, and so do the flash attentions of other packages.
    """
    state = state_of(key)
    for each in [] if state is None else state.configs:
        base = each.below()
        function: Any = ALL_ATTENTION_FUNCTIONS.get(base)  # None for a model's own "eager"
        module = getattr(getattr(function, "func", function), "__module__", "")
        if function is not None and "flash" not in base and not module.startswith("transformers."):
            return base
    return None


_EQUALS = ("eager", "sdpa")  # the implementations whose names a registered name equals


class _Name(str):
    """A registered name that is equal to the name of the implementation below it, too.

    transformers compares names: it only accepts ``config.output_attentions = True`` for "eager",
    and ``generate_batch`` only runs with "sdpa" and a few others. Names of flash attention are not
    equal, because model code drops masks for them.
    """

    def __eq__(self, other: object) -> bool:
        return _equal(self, other)

    def __ne__(self, other: object) -> bool:
        return not _equal(self, other)

    def __hash__(self) -> int:
        return _hash(self)

    def __format__(self, spec: str) -> str:
        # transformers 5.17 formats the name of a paged implementation, f"paged|{name}".
        return format(next((name for name in _EQUALS if self == name), str(self)), spec)


# torch.compile traces no method of str.


@traced_once
def _hash(name: _Name) -> int:
    return str.__hash__(name)


@traced_once
def _equal(name: _Name, other: object) -> bool:
    below = str(name).removeprefix(_PREFIX)
    return str.__eq__(name, other) is True or (below in _EQUALS and below == other)


def is_registered(implementation: Any) -> bool:
    """Whether the name of an implementation is that of tokenpack's attention over another one."""
    return isinstance(implementation, _Name)


def register_over(base: str) -> str:
    """Register tokenpack's attention over the implementation ``base`` and return its name."""
    # Model code drops masks if the name contains "flash", so the name must not contain it.
    name = _Name(_PREFIX + base.replace("flash_attention", "fa").replace("flash", "f"))
    _BASES[name] = base
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, partial(_attention_forward, base))
        if base in ALL_MASK_ATTENTION_FUNCTIONS:
            # _base_mask looks ``base`` up at each call, so a later registration takes effect.
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
    """The function that transformers' attention layers call.

    query, key and value are ``(1, heads, tokens, head_dim)``. Returns the output
    ``(1, tokens, heads, head_dim)`` and no attention weights.
    """
    call: PackedCall | None = kwargs.pop(KEYWORD, None)
    if call is None:
        if kwargs.get("cu_seqlens") is not None:
            raise ValueError(
                f"cu_seqlens must reach a forward that patch_model changed, got it in "
                f"{type(module).__name__}, which would see one sequence: call a part of the "
                "patched model, or leave cu_seqlens out"
            )
        watched: PatchState | None = vars(module).get(WATCHED)
        if watched is not None and module.training and torch.is_grad_enabled():
            _count_unseen(watched, module)
        # A real mask may have the marker's shape, but then it fits the queries and keys.
        is_marker = attention_mask is not None and attention_mask.shape == MARKER_SHAPE
        if is_marker and MARKER_SHAPE[2:] != (query.shape[2], key.shape[2]):
            raise RuntimeError(
                f"{type(module).__name__} did not pass the {KEYWORD!r} keyword to attention in a "
                "packed forward: this model cannot be patched"
            )
        return _base_attention(base, module)(module, query, key, value, attention_mask, **kwargs)
    # The wrapper of torch.compiler.disable costs time in each layer.
    traced_alone = torch.compiler.is_compiling() and not call.traced
    run = _packed_attention_outside_graph if traced_alone else _packed_attention
    return run(call, module, query, key, value, **kwargs), None


def _count_unseen(state: PatchState, module: nn.Module) -> None:
    """Count a training forward that goes around every part that `patch_model` changed.

    Raises:
        ValueError: with ``strict``.
    """
    # Gradient checkpointing recomputes a padded forward within the backward.
    if runs_padded(state) or torch._C._current_graph_task_id() != -1:
        return
    if state.strict:
        raise ValueError(
            f"strict=True, and {type(module).__name__} was reached without any forward that "
            "patch_model changed: call the model, its base model or one of its stacks"
        )
    state.stats.unseen_calls += 1
    state.count_padded_training("the patched forwards are not called")


def _base_attention(base: str, module: nn.Module) -> Callable[..., Any]:
    eager: Any = None  # the model's own, from the file that defines its attention
    for parent in type(module).__mro__:
        eager = eager or getattr(sys.modules[parent.__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(base, eager)


def _packed_attention(
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
    **kwargs: Any,
) -> Tensor:
    bias: Tensor | None = kwargs.pop("position_bias", None)
    if bias is not None and bias.numel() == 0:  # a T5 layer without a bias
        bias = None
    if bias is not None and bias.dim() != 2:
        raise RuntimeError(
            f"{type(module).__name__} computed a position bias of shape {tuple(bias.shape)} "
            "in a packed forward: this model cannot be patched"
        )
    unsupported = [name for name in kwargs if kwargs[name] is not None and name not in _IGNORED]
    if unsupported:
        raise RuntimeError(
            f"{type(module).__name__} passes {unsupported} to attention, which packed attention "
            "does not support: this model cannot be patched"
        )
    role = getattr(module, ROLE, "self")
    if role != "cross" and role not in call.layouts:
        raise RuntimeError(
            f"{type(module).__name__} was added after patch_model: call unpatch_model before the "
            "change and patch_model after it"
        )
    causal = _is_causal(role, module, kwargs)
    if call.traced:
        layer = Layer(causal, scaling, sliding_window, softcap, bias, dropout)
        out, choice = attention_in_graph(query, key, value, call.streams, role, layer, call.backend)
        note_attention(call.state.key, role, f"{choice.backend} ({choice.reason})")
        return out
    out, choice = layout_attention(
        query,
        key,
        value,
        call.streams,
        role,
        causal=causal,
        scale=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        relative_bias=bias,
        dropout_p=dropout,
        backend=call.backend,
        memo=call.memo,
    )
    call.attention_calls += 1
    call.choices[role] = choice
    return out


# The choice of backend and the counters are host work for every backend, so they are not compiled.
_packed_attention_outside_graph = torch.compiler.disable(_packed_attention)


def _is_causal(role: str, module: nn.Module, kwargs: dict[str, Any]) -> bool:
    if role != "self":
        return role == "dec"
    is_causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
