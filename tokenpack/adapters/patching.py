"""`patch_model` and `unpatch_model`: what changes on a model, and how it is restored."""

from __future__ import annotations

import re
from typing import Any, Literal, TypeVar

from torch import nn
from transformers import PreTrainedModel

from ..attention import require_known_backend
from .call import ROLE, SIDE, STATE, PackingStats, PatchState
from .families import find_family
from .family import Family
from .forward import packed_forward
from .head import fused_forward
from .interface import PatchedConfig
from .pooler import first_token_forward
from .swap import is_swapped, restore_forward, swap_forward

Model = TypeVar("Model", bound=nn.Module)
Logits = Literal["auto", "always", "never"]

# Suffixes of the class names of heads that read each token separately ...
_CAUSAL_HEADS = ("ForCausalLM", "LMHeadModel")
_TOKEN_HEADS = (
    *_CAUSAL_HEADS,
    "ForConditionalGeneration",
    "ForMaskedLM",
    "ForTokenClassification",
    "MTModel",
)
# ... and of heads that read one real token of each row. A question-answering head is neither: it
# compares all columns of a row, including padding.
_ROW_HEADS = ("ForSequenceClassification",)
_CROSS = re.compile(r"EncDecAttention|encoder_attn|crossattention")


def patch_model(
    model: Model, *, attention: str = "auto", logits: Logits = "auto", strict: bool = False
) -> Model:
    """Make a transformers model compute only real tokens, with the same results.

    This changes the instance in place: its class, the classes of a few of its modules, and the
    attention implementation in its configs. Parameters, state dict and saved files do not change.
    The patched model packs a padded batch before the embedding, and pads its outputs with zeros. A
    batch may also be packed already: ``input_ids`` of shape ``(1, total_tokens)`` with
    ``cu_seqlens``, and for an encoder-decoder ``labels`` or ``decoder_input_ids`` with
    ``decoder_cu_seqlens``. The outputs are then packed too.

    A call that cannot be packed runs the original padded forward, and is counted by reason in
    ``packing_stats(model).fallbacks``.

    Args:
        model: a `transformers.PreTrainedModel`, or one wrapped by PEFT or ``torch.compile``.
            Patching a patched model again replaces its options.
        attention: ``"auto"``, or the name of a backend in `tokenpack.attention.BACKENDS`.
        logits: ``"auto"`` returns logits, except in training with labels, where the loss does not
            need them. ``"always"`` returns them, and ``"never"`` does not.
        strict: raise ValueError with the reason instead of running a call padded. This includes
            ``generate``, which uses a cache.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: if ``model`` contains no transformers model.
        ValueError: if an option is unknown, the family is known to compute wrong results on packed
            input, a submodule is already patched, or a forward set on an instance (by accelerate)
            would hide the patch. With ``strict``, also if the model can never be packed.
    """
    require_known_backend(attention)
    if logits not in ("auto", "always", "never"):
        raise ValueError(f"logits must be 'auto', 'always' or 'never', got {logits!r}")
    inner = _transformers_model(model)
    family = find_family(inner.config.model_type)
    patched = _find_patched(inner)
    if patched is not None:
        state: PatchState = patched._tokenpack_state
        if strict and state.unpackable is not None:
            raise ValueError(f"{type(inner).__name__} can never be packed: {state.unpackable}")
        state.attention, state.logits, state.strict = attention, logits, strict
        return model
    _check_modules(inner)
    state = PatchState(family, attention, logits, strict)
    state.unpackable = _unpackable_reason(inner, family)
    if family is None or state.unpackable is not None:
        if strict:
            raise ValueError(f"{type(inner).__name__} can never be packed: {state.unpackable}")
        _swap(inner, packed_forward, state)
        return model
    state.has_token_head = type(inner).__name__.endswith(_TOKEN_HEADS)
    state.shifts_labels = type(inner).__name__.endswith(_CAUSAL_HEADS)
    # A model with a head over tokens packs as a whole, including its loss. A head over rows reads
    # padded hidden states, so only the base model packs.
    target = inner if state.has_token_head else inner.base_model
    state.has_row_head = target is not inner
    state.counts_columns = family.has_relative_bias or _has_window(inner.config)
    # The head of an encoder reads the first column of those hidden states.
    state.pools_first_token = family.kind == "encoder" and state.has_row_head
    # Stacks have copies of the config, so patch every config that a module reads.
    configs = (getattr(module, "config", None) for module in inner.modules())
    distinct = {id(config): config for config in configs if config is not None}
    state.configs = [PatchedConfig(config) for config in distinct.values()]
    for config in state.configs:
        config.replace()
    for name, module in target.named_modules():
        _tag(module, name, state)
        replacement = family.swaps.get(type(module).__name__)
        if replacement is not None:
            _swap(module, replacement, state)
            state.pools_first_token |= replacement is first_token_forward
    head = target.get_output_embeddings() if state.has_token_head else None
    # Exactly nn.Linear, because adapters and quantizers of a head subclass or wrap it.
    if type(head) is nn.Linear:
        _swap(head, fused_forward, state)
    _swap(target, packed_forward, state)
    return model


def unpatch_model(model: Model) -> Model:
    """Undo `patch_model`: outputs are bitwise equal to those before. No effect if not patched.

    Raises:
        TypeError: if ``model`` contains no transformers model.
        ValueError: if ``fully_shard`` has changed the model's classes since `patch_model`.
    """
    patched = _find_patched(_transformers_model(model))
    if patched is None:
        return model
    state: PatchState = patched._tokenpack_state
    for module in patched.modules():
        if is_swapped(module) and getattr(module, "_tokenpack_state", None) is state:
            restore_forward(module)
        for attribute in (ROLE, SIDE, STATE):
            module.__dict__.pop(attribute, None)
    for config in state.configs:
        config.restore()
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether this model is patched."""
    try:
        return _find_patched(_transformers_model(model)) is not None
    except TypeError:
        return False


def packing_stats(model: nn.Module) -> PackingStats:
    """The counters of a patched model: what it packed, and what it did not pack and why.

    The returned object is live: later forwards update it.

    Raises:
        TypeError: if ``model`` contains no transformers model.
        ValueError: if the model is not patched.
    """
    patched = _find_patched(_transformers_model(model))
    if patched is None:
        raise ValueError(f"{type(model).__name__} is not patched: call patch_model(model) first")
    return patched._tokenpack_state.stats


# ------------------------------------------------------------------------------- whether to patch


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside the wrappers of PEFT, torch.compile, DDP and FSDP."""
    seen: Any = model
    while not isinstance(seen, PreTrainedModel):
        if hasattr(seen, "get_base_model"):
            seen = seen.get_base_model()
        elif hasattr(seen, "_orig_mod"):
            seen = seen._orig_mod
        elif isinstance(seen, nn.Module) and isinstance(getattr(seen, "module", None), nn.Module):
            seen = seen.module
        else:
            raise TypeError(
                "model must be a transformers.PreTrainedModel or wrap one, "
                f"got {type(model).__module__}.{type(model).__qualname__}"
            )
    return seen


def _find_patched(model: PreTrainedModel) -> Any:
    """The part of ``model`` whose forward packs, or None."""
    for candidate in (model, model.base_model):
        if is_swapped(candidate, packed_forward):
            return candidate
    return None


def _check_modules(model: PreTrainedModel) -> None:
    """Raise ValueError if a module of ``model`` would hide the patch or is already patched."""
    for name, module in model.named_modules():
        if "forward" in vars(module):
            raise ValueError(
                f"{name or 'model'} has a forward set on the instance, which would hide the "
                "patched one (accelerate sets one): call patch_model before accelerator.prepare"
            )
        if is_swapped(module):
            raise ValueError(
                f"model contains a module that is already patched ({name or 'itself'}): unpatch "
                "it first, or patch only the whole model"
            )


def _unpackable_reason(model: PreTrainedModel, family: Family | None) -> str | None:
    name = type(model).__name__
    if family is None:
        return f"unknown family {model.config.model_type!r}"
    if model is not model.base_model and not name.endswith((*_TOKEN_HEADS, *_ROW_HEADS)):
        return f"{name} has a head that is not known to ignore padding"
    if family.kind == "encoder_decoder" and name.endswith("ForCausalLM"):
        return f"{name} is a decoder without its encoder"
    if family.kind == "encoder" and getattr(model.config, "is_decoder", False):
        return f"{name} is an encoder configured as a decoder"
    if not type(model).forward.__module__.startswith("transformers."):
        return f"{name} has a custom forward"
    for option in ("output_attentions", "reorder_and_upcast_attn", "add_cross_attention"):
        if getattr(model.config, option, False):
            return f"{option} is set in the config"
    return None


def _has_window(config: Any) -> bool:
    return bool(getattr(config, "sliding_window", None)) or bool(
        getattr(config, "local_attention", None)
    )


# ----------------------------------------------------------------------------------- how to patch


def _swap(module: Any, replacement: Any, state: PatchState) -> None:
    swap_forward(module, replacement)
    module._tokenpack_state = state


def _tag(module: nn.Module, name: str, state: PatchState) -> None:
    """Set the role of an attention module, or the side of a position table."""
    side = "self"
    if state.family.kind == "encoder_decoder":
        side = "dec" if re.search(r"(^|\.)decoder\.", name) else "enc"
    if "Attention" in type(module).__name__:
        module.__dict__[ROLE] = "cross" if side == "dec" and _CROSS.search(name) else side
    elif "PositionalEmbedding" in type(module).__name__:
        module.__dict__[SIDE] = side
