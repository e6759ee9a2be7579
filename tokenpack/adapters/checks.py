"""Calls that cannot be packed: the arguments, settings and hooks that need the padded batch."""

from __future__ import annotations

from typing import Any

from transformers.loss import loss_utils

from ..kernels import PackedLayout
from .call import Entry
from .errors import CannotPackError
from .graph_ops import pads_first_column
from .hooks import has_neftune, hook_by_row
from .interface import custom_attention, is_registered
from .swap import is_swapped
from .traced_once import traced_once

# The losses of transformers that are the mean cross entropy over valid labels, which a causal model
# shifts first.
_CAUSAL_LOSSES = frozenset({loss_utils.ForCausalLMLoss})
_TOKEN_LOSSES = frozenset({loss_utils.ForMaskedLMLoss, loss_utils.ForTokenClassification})


def check_call(model: Any, entry: Entry, inputs: dict[str, Any]) -> None:
    """Raise CannotPackError if an argument, the config or a hook requires the original forward."""
    config, family = model.config, entry.state.family
    assert family is not None
    if "labels" in inputs and entry.has_token_head and not _has_stock_loss(model, entry):
        raise CannotPackError("the model has a custom loss_function")
    if inputs.get("past_key_values") is not None or inputs.get("use_cache"):
        raise CannotPackError("a cache is in use")
    if (
        not (model.training or "labels" in inputs)
        and "use_cache" not in inputs
        and "cu_seqlens" not in inputs  # a cache has rows, and a packed stream has none to continue
        and "use_cache" in entry.parameters
        and family.kind != "encoder"
        and getattr(config, "use_cache", False)
    ):
        raise CannotPackError("a cache would be returned (pass use_cache=False)")
    inputs.pop("use_cache", None)
    for name in ("output_attentions", "output_router_logits"):
        value = inputs.pop(name, None)
        if value or (value is None and getattr(config, name, False)):
            raise CannotPackError(f"{name} is set")
    if _rope_depends_on_width(config):
        raise CannotPackError("rotary embeddings depend on the length of the padded batch")
    if getattr(config, "sparse_prediction", False):
        raise CannotPackError("sparse_prediction is set")
    custom = custom_attention(entry.state.key)
    if custom is not None:
        raise CannotPackError(f"the attention implementation {custom!r} is not of transformers")
    hook = hook_by_row(model)
    if hook is not None:
        raise CannotPackError(hook)
    embedding = model.get_input_embeddings()
    if embedding is not None and has_neftune(embedding):
        raise CannotPackError("NEFTune scales its noise by the padded width")


def makes_cache(stack: Any, use_cache: bool | None) -> bool:
    """Whether the own forward of a stack or base model creates a cache, with this argument."""
    if use_cache is None:
        use_cache = getattr(stack.config, "use_cache", False)
    checkpoints = stack.training and getattr(stack, "gradient_checkpointing", False)
    return bool(use_cache) and not checkpoints


def has_pooler(model: Any, entry: Entry) -> bool:
    """Whether the part has a pooler now, which reads the first column."""
    return entry.pooler is not None and getattr(model, entry.pooler) is not None


def check_pooling(model: Any, entry: Entry, layout: PackedLayout, traced: bool) -> None:
    """Check that a pooler, if there is one, reads a real token of each row.

    Raises:
        CannotPackError: if a row has padding in its first column.
        RuntimeError: if the pooler is not the one that `patch_model` changed.
    """
    if entry.pooler is None or (pooler := getattr(model, entry.pooler)) is None:
        return
    _require_swapped(model, entry.pooler, pooler)
    if not traced and pads_first_column(layout):  # a graph checks it where it lays out the batch
        raise CannotPackError("a pooler reads the first column, where a row has padding")


def check_position_table(stack: Any) -> None:
    """Raise RuntimeError if a stack's position table is not the one that `patch_model` changed."""
    table = getattr(stack, "embed_positions", None)
    if table is not None:
        _require_swapped(stack, "embed_positions", table)


def check_added_layers(model: Any, error: Exception) -> None:
    """Raise RuntimeError from ``error`` if a layer has a config that `patch_model` did not see."""
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        implementation = getattr(config, "_attn_implementation", None)
        if implementation is not None and not is_registered(implementation):
            raise RuntimeError(
                f"{type(model).__name__}.{name} was added after patch_model, with a config of its "
                "own: call unpatch_model before the change and patch_model after it"
            ) from error


def _require_swapped(parent: Any, name: str, child: Any) -> None:
    """PEFT may wrap a child. Then the child that `patch_model` changed is inside."""
    if not _contains_swapped(child):
        raise RuntimeError(
            f"{type(parent).__name__}.{name} was replaced after patch_model: call unpatch_model "
            "before the replacement and patch_model after it"
        )


@traced_once
def _contains_swapped(child: Any) -> bool:
    return any(is_swapped(module) for module in child.modules())


def _has_stock_loss(model: Any, entry: Entry) -> bool:
    """Whether the forward's loss is a mean cross entropy. `loss_function` is looked up per call."""
    if "_loss_function" in model.__dict__:
        return False
    return not entry.calls_loss_function or _is_stock(model, model.loss_type, entry.shifts_labels)


@traced_once  # `loss_function` may log, which torch.compile cannot trace
def _is_stock(model: Any, loss_type: str | None, shifts_labels: bool) -> bool:
    return model.loss_function in (_CAUSAL_LOSSES if shifts_labels else _TOKEN_LOSSES)


def _rope_depends_on_width(config: Any) -> bool:
    rope = getattr(config, "rope_parameters", None)
    kinds = rope.values() if isinstance(rope, dict) else ()  # one dict, or one per layer type
    return any(
        kind in ("dynamic", "longrope")
        or (isinstance(kind, dict) and kind.get("rope_type") in ("dynamic", "longrope"))
        for kind in kinds
    )
