"""patch_model and its relatives: what changes on a model, and how it changes back."""

from __future__ import annotations

import re
from typing import Any, Literal, TypeVar

from torch import nn
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version

from ..attention import require_known_backend
from .call import PackingStats, PatchState
from .encoder_decoder import SIDE
from .family import FAMILIES, REFUSED, Family
from .forward import packed_forward
from .head import fused_forward
from .interface import ROLE, base_of, register_over
from .pooler import first_token_forward
from .swap import is_swapped, restore_forward, swap_forward

Model = TypeVar("Model", bound=nn.Module)
Logits = Literal["auto", "always", "never"]

# Heads by the ending of their class's name: those that see each token alone, ...
_CAUSAL_HEADS = ("ForCausalLM", "LMHeadModel")
_TOKEN_HEADS = (
    *_CAUSAL_HEADS,
    "ForConditionalGeneration",
    "ForMaskedLM",
    "ForTokenClassification",
    "MTModel",
)
# ... and those that see one real token of each row. Not so a question answerer's: it weighs all
# columns of a row against one another, padding too.
_ROW_HEADS = ("ForSequenceClassification",)
_STATE = "_tokenpack_state"
_CROSS = re.compile(r"EncDecAttention|encoder_attn|crossattention")


def patch_model(
    model: Model, *, attention: str = "auto", logits: Logits = "auto", strict: bool = False
) -> Model:
    """Make a transformers model compute real tokens alone, with the numbers that it gave before.

    The instance is changed in place: its class, that of a few of its modules, and the attention
    implementation named in its configs. Parameters, state dict and saved files stay as they are.
    From then on a padded batch is packed before the embedding, and outputs come back padded (with
    zeros). A batch may also come packed: ``input_ids`` of shape ``(1, total_tokens)`` with
    ``cu_seqlens`` (and for an encoder-decoder ``labels`` or ``decoder_input_ids`` likewise with
    ``decoder_cu_seqlens``); outputs then stay packed.

    A call that only the model's own path computes takes that path and is counted by reason in
    ``packing_stats(model).fallbacks``.

    Args:
        model: a `transformers.PreTrainedModel`, or one wrapped by PEFT or ``torch.compile``.
            Patching a patched model again sets its options anew.
        attention: ``"auto"``, or the name of a backend in `tokenpack.attention.BACKENDS`.
        logits: ``"auto"`` returns logits but while training with labels, when the loss is computed
            without them; ``"always"`` returns them, ``"never"`` does not.
        strict: raise ValueError with the reason where a call would fall back, ``generate`` with
            its cache included.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: if ``model`` holds no transformers model.
        ValueError: if an option is unknown, the family is known to compute something else on
            packed input, a part of the model is patched already, or a forward set on an instance
            (accelerate's) would hide the patch; with ``strict`` also if the model can never be
            packed.
    """
    require_known_backend(attention)
    if logits not in ("auto", "always", "never"):
        raise ValueError(f"logits must be 'auto', 'always' or 'never', got {logits!r}")
    inner = _transformers_model(model)
    family = _family_of(inner)
    patched = _find_patched(inner)
    if patched is not None:
        state: PatchState = patched._tokenpack_state
        if strict and state.never is not None:
            raise ValueError(f"{type(inner).__name__} can never be packed: {state.never}")
        state.attention, state.logits, state.strict = attention, logits, strict
        return model
    for name, module in inner.named_modules():
        if "forward" in vars(module):
            raise ValueError(
                f"{name or 'model'} has a forward set on the instance, which would hide the "
                "patched one (accelerate does that): patch_model before accelerate prepares it"
            )
        if is_swapped(module):
            raise ValueError(
                f"model holds a part that is patched already ({name or 'itself'}): unpatch that "
                "before, or patch the whole only"
            )
    state = PatchState(family, attention, logits, strict)
    state.never = _why_never(inner, family)
    if family is None or state.never is not None:
        if strict:
            raise ValueError(f"{type(inner).__name__} can never be packed: {state.never}")
        _swap(inner, packed_forward, state)
        return model
    state.heads_tokens = type(inner).__name__.endswith(_TOKEN_HEADS)
    state.shifts_labels = type(inner).__name__.endswith(_CAUSAL_HEADS)
    # With a head over tokens the whole model packs, its loss included. A classifier of rows gets
    # padded hidden states from a base model that packs.
    target = inner if state.heads_tokens else inner.base_model
    state.reads_rows = target is not inner
    state.counts_columns = family.biased_by_distance or _has_window(inner.config)
    # Such a head reads the first column of those hidden states.
    state.pools_first_token = family.kind == "encoder" and state.reads_rows
    _set_attention(inner, state)
    for name, module in target.named_modules():
        _tag(module, name, state)
        replacement = family.swaps.get(type(module).__name__)
        if replacement is not None:
            _swap(module, replacement, state)
            state.pools_first_token |= replacement is first_token_forward
    head = target.get_output_embeddings() if state.heads_tokens else None
    # Exactly nn.Linear: what adapts or quantizes a head subclasses or wraps it.
    if type(head) is nn.Linear:
        _swap(head, fused_forward, state)
    _swap(target, packed_forward, state)
    return model


def unpatch_model(model: Model) -> Model:
    """Undo `patch_model`; outputs are bit for bit what they were. A model not patched stays so.

    Raises:
        TypeError: if ``model`` holds no transformers model.
        ValueError: if ``fully_shard`` changed the model's classes since it was patched.
    """
    patched = _find_patched(_transformers_model(model))
    if patched is None:
        return model
    state: PatchState = patched._tokenpack_state
    for module in patched.modules():
        if is_swapped(module) and getattr(module, "_tokenpack_state", None) is state:
            restore_forward(module)
        for attribute in (ROLE, SIDE, _STATE):
            module.__dict__.pop(attribute, None)
    for config, implementation in state.configs:
        config._attn_implementation = implementation
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether `patch_model` has changed this model and `unpatch_model` has not changed it back."""
    try:
        return _find_patched(_transformers_model(model)) is not None
    except TypeError:
        return False


def packing_stats(model: nn.Module) -> PackingStats:
    """What a patched model has packed, what it has not and why; live, it counts on.

    Raises:
        TypeError: if ``model`` holds no transformers model.
        ValueError: if it is not patched.
    """
    patched = _find_patched(_transformers_model(model))
    if patched is None:
        raise ValueError(f"{type(model).__name__} is not patched: call patch_model(model) first")
    return patched._tokenpack_state.stats


# --------------------------------------------------------------------------------- what to patch


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside wrappers of PEFT, torch.compile, DDP and FSDP."""
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
    """The module of ``model`` whose forward packs, or None."""
    for candidate in (model, model.base_model):
        if is_swapped(candidate, packed_forward):
            return candidate
    return None


def _family_of(model: PreTrainedModel) -> Family | None:
    model_type = model.config.model_type
    if model_type in REFUSED:
        raise ValueError(f"{model_type} cannot be patched: {REFUSED[model_type]}")
    family = FAMILIES.get(model_type)
    if family is None:
        return None
    oldest = family.minimum_transformers
    if oldest is not None and _numbers(transformers_version) < _numbers(oldest):
        raise ValueError(
            f"{model_type} needs transformers >= {oldest}, whose own numbers are right, "
            f"got {transformers_version}"
        )
    return family


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _why_never(model: PreTrainedModel, family: Family | None) -> str | None:
    name = type(model).__name__
    if family is None:
        return f"unknown family {model.config.model_type!r}"
    if model is not model.base_model and not name.endswith((*_TOKEN_HEADS, *_ROW_HEADS)):
        return f"{name} has a head that is not known to ignore padding"
    if family.kind == "encoder_decoder" and name.endswith("ForCausalLM"):
        return f"{name} is a decoder without its encoder"
    if family.kind == "encoder" and getattr(model.config, "is_decoder", False):
        return "an encoder configured as a decoder"
    if not type(model).forward.__module__.startswith("transformers."):
        return f"{name} has a forward of its own"
    for option in ("output_attentions", "reorder_and_upcast_attn", "add_cross_attention"):
        if getattr(model.config, option, False):
            return f"{option} is set in the config"
    return None


def _has_window(config: Any) -> bool:
    return bool(getattr(config, "sliding_window", None)) or bool(
        getattr(config, "local_attention", None)
    )


# --------------------------------------------------------------------------------- how to patch it


def _swap(module: Any, replacement: Any, state: PatchState) -> None:
    swap_forward(module, replacement)
    module._tokenpack_state = state


def _tag(module: nn.Module, name: str, state: PatchState) -> None:
    """Write on attention modules and position tables which side of the model they belong to."""
    side = "self"
    if state.family.kind == "encoder_decoder":
        side = "dec" if re.search(r"(^|\.)decoder\.", name) else "enc"
    if "Attention" in type(module).__name__:
        module.__dict__[ROLE] = "cross" if side == "dec" and _CROSS.search(name) else side
    elif "PositionalEmbedding" in type(module).__name__:
        module.__dict__[SIDE] = side
    else:
        return


def _set_attention(model: PreTrainedModel, state: PatchState) -> None:
    """Name tokenpack's attention in every config that a module reads: stacks have copies."""
    owned = [getattr(module, "config", None) for module in model.modules()]
    distinct = {id(config): config for config in owned if config is not None}
    # A config copied from a patched model's bears our name already.
    state.configs = [(c, base_of(c._attn_implementation)) for c in distinct.values()]
    for config, implementation in state.configs:
        config._attn_implementation = register_over(implementation)
