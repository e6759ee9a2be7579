"""`patch_model` and `unpatch_model`: what changes on a model, and how it is restored."""

from __future__ import annotations

import weakref
from typing import Any, Literal, TypeVar

from torch import nn
from transformers import PreTrainedModel

from ..attention import require_known_backend
from ..checks import optional_at_least_one
from .call import ENTRY, ROLE, SIDE, WATCHED, Entry, PackingStats, PatchState
from .entries import (
    entry_of,
    is_entry,
    is_wrapper,
    parameters_of,
    parts_of,
    reads_rows,
    tag_attention,
    watch_attention,
    whole_reason,
)
from .families import find_family
from .forward import packed_forward
from .head import swap_head
from .interface import PatchedConfig, read_bases
from .row_head import row_head_forward
from .swap import is_swapped, restore_forwards, swap_forward

Model = TypeVar("Model", bound=nn.Module)
Logits = Literal["auto", "always", "never"]


def patch_model(
    model: Model,
    *,
    attention: str = "auto",
    logits: Logits = "auto",
    strict: bool = False,
    pad_to_total: int | None = None,
) -> Model:
    """Patch a model in place, as `tokenpack.patch_model` describes, which calls this.

    Args:
        model: a `transformers.PreTrainedModel`, or a wrapper of one.
        attention: ``"auto"``, or the name of a backend.
        logits: ``"auto"``, ``"always"`` or ``"never"``.
        strict: raise ValueError instead of running a call padded.
        pad_to_total: the multiple that the number of tokens is filled up to, or None.

    Raises:
        TypeError: if ``model`` contains no transformers model, or ``pad_to_total`` is no integer.
        ValueError: if an option is unknown, or the model cannot be patched.
    """
    require_known_backend(attention)
    if logits not in ("auto", "always", "never"):
        raise ValueError(f"logits must be 'auto', 'always' or 'never', got {logits!r}")
    pad_to_total = optional_at_least_one("pad_to_total", pad_to_total)
    inner = transformers_model(model)
    family = find_family(inner.config.model_type)
    if is_entry(inner):
        _check_is_whole(inner)
        entry: Entry = getattr(inner, ENTRY)
        if strict and entry.unpackable is not None:
            raise ValueError(f"{type(inner).__name__} can never be packed: {entry.unpackable}")
        state = entry.state
        state.attention, state.logits, state.strict = attention, logits, strict
        state.pad_to_total = pad_to_total
        return model
    _check_modules(inner)
    _check_wrappers(model, inner)
    state = PatchState(family, attention, logits, strict, pad_to_total)
    state.root = weakref.ref(inner)
    reason = whole_reason(inner, family)
    if strict and reason is not None:
        raise ValueError(f"{type(inner).__name__} can never be packed: {reason}")
    if family is None or reason is not None:
        # Its parts too, so that calls of a part are counted and never ignore cu_seqlens.
        for _, part in parts_of(inner):
            setattr(part, ENTRY, Entry(state, parameters_of(part), (), unpackable=reason))
            if not is_wrapper(part):
                swap_forward(part, packed_forward)
        return model
    entries = {name: entry_of(part, state) for name, part in parts_of(inner)}
    if strict and entries[""].unpackable is not None:
        raise ValueError(f"{type(inner).__name__} can never be packed: {entries[''].unpackable}")
    state.counts_columns = family.has_relative_bias or _has_window(inner.config)
    # Stacks have copies of the config, so patch every config that a module reads.
    configs = (getattr(module, "config", None) for module in inner.modules())
    distinct = {id(config): config for config in configs if config is not None}
    state.configs = [PatchedConfig(config) for config in distinct.values()]
    for config in state.configs:
        config.replace()
    for module in list(inner.modules()):
        replacement = family.swaps.get(type(module).__name__)
        if replacement is not None:
            swap_forward(module, replacement)
    tag_attention(inner, family)
    for name, part in parts_of(inner):
        setattr(part, ENTRY, entries[name])
        if entries[name].has_token_head:
            swap_head(part.get_output_embeddings())
        if not is_wrapper(part):  # the stack inside packs
            swap_forward(part, row_head_forward if reads_rows(part) else packed_forward)
    watch_attention(inner, state)
    return model


def unpatch_model(model: Model) -> Model:
    """Undo `patch_model`: outputs are bitwise equal to those before. No effect if not patched.

    Raises:
        TypeError: if ``model`` contains no transformers model.
        ValueError: if ``model`` is a part of the model that was patched, or ``fully_shard`` has
            changed the model's classes since `patch_model`.
    """
    inner = transformers_model(model)
    if not is_entry(inner):
        return model
    _check_is_whole(inner)
    state = getattr(inner, ENTRY).state
    # Also in copies of parts (PEFT's `modules_to_save`).
    restore_forwards(model.modules())
    for module in model.modules():
        for attribute in (ENTRY, ROLE, SIDE, WATCHED):
            module.__dict__.pop(attribute, None)
    read_bases(state.configs)
    for config in state.configs:
        config.restore()
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether this model is patched."""
    try:
        return is_entry(transformers_model(model))
    except TypeError:
        return False


def packs_itself(model: nn.Module) -> bool:
    """Whether a transformers model computes real tokens only without a patch, as our decoder.

    Raises:
        TypeError: if ``model`` contains no transformers model.
    """
    return bool(getattr(transformers_model(model), "packs_itself", False))


def packing_stats(model: nn.Module) -> PackingStats:
    """The counters of a patched model: what it packed, and what it did not pack and why.

    The returned object is live: later forwards update it.

    Raises:
        TypeError: if ``model`` contains no transformers model.
        ValueError: if the model is not patched.
    """
    inner = transformers_model(model)
    if not is_entry(inner):
        raise ValueError(f"{type(model).__name__} is not patched: call patch_model(model) first")
    entry: Entry = getattr(inner, ENTRY)
    return entry.state.stats


# ------------------------------------------------------------------------------- whether to patch


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside the wrappers of PEFT, torch.compile, DDP and FSDP.

    Raises:
        TypeError: if there is none.
    """
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


def _check_modules(model: PreTrainedModel) -> None:
    """Raise ValueError if the model needs no patch, or a module would hide it or has one."""
    if packs_itself(model):
        raise ValueError(
            f"{type(model).__name__} cannot be patched, and needs no patch: it computes the real "
            "tokens of any batch by itself"
        )
    for name, module in model.named_modules():
        if "forward" in vars(module):
            raise ValueError(
                f"{name or 'model'} has a forward set on the instance, which would hide the "
                "patched one (accelerate and PEFT's X-LoRA set one): call patch_model before that"
            )
        if is_swapped(module):
            raise ValueError(
                f"model contains a module that is already patched ({name or 'itself'}): unpatch "
                "it first, or patch only the whole model"
            )


def _check_is_whole(inner: PreTrainedModel) -> None:
    """Raise ValueError if ``inner`` is a part of a model that was patched as a whole."""
    root = getattr(inner, ENTRY).state.root
    root = None if root is None else root()
    if root is not None and root is not inner and any(inner is m for m in root.modules()):
        raise ValueError(
            f"model must be the whole model that was patched, a {type(root).__name__}, "
            f"got its part {type(inner).__name__}, which is already patched"
        )


def _check_wrappers(model: nn.Module, inner: PreTrainedModel) -> None:
    """Raise ValueError if a wrapper around ``inner`` has kept its forward of before the patch."""
    inside = set(inner.modules())
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        if module not in inside and getattr(forward, "__self__", None) in inside:
            raise ValueError(
                f"{name or 'model'} ({type(module).__name__}) keeps the forward of "
                f"{type(forward.__self__).__name__}, so it would not run the patched one: call "
                "patch_model on the transformers model before wrapping it"
            )


def _has_window(config: Any) -> bool:
    return bool(getattr(config, "sliding_window", None)) or bool(
        getattr(config, "local_attention", None)
    )
