"""Take a patch off a model for a while, and put it back as it was.

`unpatch_model` and `patch_model` would not do: a forward that TRL or accelerate has set on an
instance, or a part that was replaced after the patch, would keep the second patch from being equal
to the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .call import ENTRY, ROLE, SIDE, WATCHED, Entry, PackingStats, PatchState
from .interface import is_registered, read_bases
from .patching import transformers_model
from .swap import is_swapped, restore_forwards


def entry_in(model: nn.Module) -> Entry:
    """The entry of a patched model, or of a part of one, inside its wrappers."""
    entry: Entry = getattr(transformers_model(model), ENTRY)
    return entry


@contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """Make a patched model, and all parts of it, run as before `patch_model`.

    Args:
        model: a patched model, a part of one, or a wrapper of either.

    Raises:
        ValueError: if ``fully_shard`` has changed classes since `patch_model`.
    """
    state = entry_in(model).state
    modules = list(_all_modules(model, state))
    classes: list[tuple[Any, type]] = [(module, type(module)) for module in modules]
    marks = [
        (module, {name: vars(module)[name] for name in (ENTRY, ROLE, SIDE, WATCHED)
                  if name in vars(module)})
        for module in modules
    ]  # fmt: skip
    implementations = [config.config._attn_implementation for config in state.configs]
    restore_forwards(modules)
    read_bases(state.configs)
    try:
        for module, marked in marks:
            for name in marked:
                del module.__dict__[name]
        for config in state.configs:
            # Also if another patched model shares the config: it does not run in the meantime.
            config.config._attn_implementation = config.base
        yield
    finally:
        for module, swapped in classes:
            module.__class__ = swapped
        for module, marked in marks:
            module.__dict__.update(marked)
        for config, implementation in zip(state.configs, implementations):
            config.config._attn_implementation = implementation


@contextmanager
def fresh_counters(model: nn.Module, logits: str | None = None) -> Iterator[PackingStats]:
    """Count the calls of a patched model in new `PackingStats`. What it has learned is kept out.

    Args:
        model: as in `suspended`.
        logits: replaces this option of `patch_model`. None keeps it.
    """
    state = entry_in(model).state
    saved = dict(state.__dict__)
    state.stats, state.padded_training = PackingStats(), 0
    state.logits = logits or state.logits
    try:
        yield state.stats
    finally:
        state.__dict__.clear()
        state.__dict__.update(saved)


def before_first_batch(model: nn.Module, function: Callable[..., bool] | None) -> None:
    """Let a patched model call a function before its first forward in training.

    Args:
        model: a patched model.
        function: gets the part that is called, and its arguments by name. It is called again before
            the next forward in training if it returns False or raises an error. None takes a
            function back.
    """
    entry_in(model).state.first_batch = function


def _all_modules(model: nn.Module, state: PatchState) -> Iterator[nn.Module]:
    """The modules of ``model`` and of the model that was patched, each once."""
    root = None if state.root is None else state.root()
    seen: set[int] = set()
    for top in (model, root):
        for module in () if top is None else top.modules():
            if id(module) not in seen:
                seen.add(id(module))
                yield module


def is_free_of_patch(model: nn.Module) -> bool:
    """Whether nothing of a patch is left in a model."""
    return not any(
        is_swapped(module)
        or is_registered(getattr(getattr(module, "config", None), "_attn_implementation", None))
        or any(mark in vars(module) for mark in (ENTRY, ROLE, SIDE, WATCHED))
        for module in model.modules()
    )
