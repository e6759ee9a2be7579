"""Packed forwards as one graph of torch.compile: which calls, and what is noted while tracing.

`forward.packed_forward` is traced whole. What it reads from tensors is in `graph_ops`. Decisions
that depend on arguments, on the config or on modules are made while tracing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .call import Entry, state_of
from .traced_once import TAKES_OBJECTS

_POSITIONS = "position_ids without a mask give boundaries, which are read from their values"
_ROWS = "several packed rows are given (PackedBatch.stream has one)"
_BOUNDARIES = (
    "cu_seqlens are given with a mask, not as a tensor, or to a model that derives positions from "
    "ids"
)
_FIRST_BATCH = "a function waits for the first batch (patch_model with check=True)"
_LAYERDROP = "LayerDrop draws which layers run (set encoder_layerdrop and decoder_layerdrop to 0)"
_SINGLE_HEAD = "attention has a single head or key head, whose stride is not a constant"
_HEADS = (
    *("num_attention_heads", "num_key_value_heads", "num_heads"),
    *("encoder_attention_heads", "decoder_attention_heads"),
)

_OLD_TORCH = "torch is older than 2.13"

UNTRACEABLE = (_OLD_TORCH, _SINGLE_HEAD, _ROWS, _BOUNDARIES, _POSITIONS, _FIRST_BATCH, _LAYERDROP)
"""Why a call is not traced as one graph. ``fullgraph=True`` is then an error with this reason."""


def untraceable(model: Any, entry: Entry, inputs: dict[str, Any]) -> str | None:
    """Why this call must be packed outside a graph: one of `UNTRACEABLE`, or None."""
    state = entry.state
    if not TAKES_OBJECTS:
        return _OLD_TORCH
    # Inductor (torch 2.13) compares strides to keep their order, and fails at one that is a symbol.
    if any(getattr(model.config, name, None) == 1 for name in _HEADS):
        return _SINGLE_HEAD
    if "cu_seqlens_padded" in inputs:
        return _ROWS
    for prefix in ("", "decoder_"):
        cu_seqlens = inputs.get(f"{prefix}cu_seqlens")
        if cu_seqlens is not None and (
            f"{prefix}attention_mask" in inputs
            or not isinstance(cu_seqlens, Tensor)
            or (state.family is not None and state.family.positions is not None)
        ):
            return _BOUNDARIES
    is_decoder = state.family is not None and state.family.kind == "decoder"
    means_boundaries = "attention_mask" not in inputs or state.splits_by_position
    has_boundaries = "cu_seqlens" in inputs
    if is_decoder and "position_ids" in inputs and means_boundaries and not has_boundaries:
        return _POSITIONS
    if model.training and torch.is_grad_enabled() and state.first_batch is not None:
        return _FIRST_BATCH
    if model.training and may_drop_layers(model):
        return _LAYERDROP
    return None


def may_drop_layers(model: Any) -> bool:
    """Whether LayerDrop is on in training."""
    config = model.config
    return bool(
        getattr(config, "encoder_layerdrop", 0.0) or getattr(config, "decoder_layerdrop", 0.0)
    )


def outside_graph(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """For each reason of `UNTRACEABLE`, the function as torch.compile runs it: not traced itself.

    What the function calls is still compiled.
    """
    return {
        reason: torch.compiler.disable(
            function, recursive=False, reason=f"tokenpack packs this call outside a graph: {reason}"
        )
        for reason in UNTRACEABLE
    }


# torch.compile runs the functions below once, while it traces. Inside a graph, attributes cannot
# be written: gradient checkpointing allows no side effects.


@torch.compiler.assume_constant_result
def note_attention(key: str, role: str, choice: str) -> None:
    """Record that a layer reached packed attention, and on which backend."""
    state = state_of(key)
    if state is not None:
        state.stats.attention[role] = choice
        state.traced_layers += 1


@torch.compiler.assume_constant_result
def count_layers(key: str) -> int:
    """How many layers have reached packed attention while their model was traced."""
    state = state_of(key)
    return 0 if state is None else state.traced_layers


@torch.compiler.assume_constant_result
def note_loss(key: str, how: str) -> None:
    """Record how the loss is computed."""
    state = state_of(key)
    if state is not None and how:
        state.stats.loss = how
