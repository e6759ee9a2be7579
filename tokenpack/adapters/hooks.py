"""Which modules someone else has changed: hooks, parametrizations and replaced forwards.

A shortcut past a module (a fused loss, a shared lookup) skips all of these, so it is only taken
around modules without any.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from .traced_once import traced_once

_HOOKS = {
    "_forward_hooks": "a forward hook",
    "_forward_pre_hooks": "a forward-pre hook",
    "_backward_hooks": "a backward hook",
    "_backward_pre_hooks": "a backward-pre hook",
}

# The arguments of PEFT's hooks that have one value for each row of the padded batch.
_BY_ROW = ("adapter_names", "alora_offsets")


# torch.compile looks hooks up once, when it traces a module: `torch.nn.Module` does the same.
@traced_once
def changed_by(module: Any) -> str | None:
    """What changes the results or gradients of a module besides its class; None if nothing does.

    The hooks of ``fully_shard`` do not count, because they only gather parameters.
    """
    if "forward" in vars(module):
        return "a forward set on the instance"
    if module._modules and parametrize.is_parametrized(module):  # it looks for a child
        return "a parametrization"
    for attribute, name in _HOOKS.items():
        hooks = getattr(module, attribute)
        if hooks and not all(map(_is_of_fsdp, hooks.values())):
            return name
    return None


@traced_once
def hook_by_row(model: nn.Module) -> str | None:
    """The hook inside ``model`` that needs padded rows, as a reason to run padded; None if none.

    PEFT hands values per row (``adapter_names``, the offsets of aLoRA, the tasks of Poly) to its
    layers in hooks, and its Shadow method compares the rows of a layer with its own.
    """
    if "peft" not in sys.modules:
        return None
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            values = hook.keywords if isinstance(hook, partial) else {}
            by_row = next((name for name in _BY_ROW if values.get(name) is not None), None)
            if by_row is not None:
                return f"PEFT passes {by_row} by row to its layers"
            if _module_of(hook).startswith("peft.tuners."):
                return f"a PEFT method has a hook on {type(module).__name__}"
    return None


def has_neftune(embedding: Any) -> bool:
    """Whether transformers' NEFTune adds noise to the embeddings, scaled by the padded width."""
    if not (embedding.training and embedding._forward_hooks):
        return False
    return bool(getattr(embedding, "neftune_noise_alpha", None))


def _is_of_fsdp(hook: Any) -> bool:
    return _module_of(hook).startswith("torch.distributed.")


def _module_of(hook: Any) -> str:
    hook = getattr(hook, "func", hook)  # functools.partial
    return getattr(hook, "__module__", None) or type(hook).__module__
