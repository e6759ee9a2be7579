"""One lookup for both stacks of an encoder-decoder that share their word embeddings.

Each lookup's backward makes a gradient as large as the table, zeros mostly, and a second one is
added to it: 3 * vocabulary * width numbers read and written beside the zeros. On packed input the
two lookups are one, and so is the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_SAME = ("padding_idx", "embed_scale")  # what two modules do with one weight


@torch.compiler.disable  # host work but for one lookup
def look_up_once(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with embeddings of both sides for the ids of both, where a gradient is due.

    Only for families whose ``inputs_embeds`` are what the stack's own module gives for the ids.
    Left alone, since the stacks must then call their own modules: separate tables, modules that
    are no plain lookup (adapters, wrappers), and stacks and modules with hooks, which see what they
    are called with (gradient checkpointing sets some).
    """
    if not torch.is_grad_enabled() or not {"input_ids", "decoder_input_ids"} <= arguments.keys():
        return arguments
    stacks = model.get_encoder(), model.get_decoder()
    if any(not hasattr(stack, "get_input_embeddings") or _has_hooks(stack) for stack in stacks):
        return arguments
    table, other = (stack.get_input_embeddings() for stack in stacks)
    if not _alike(table, other):
        return arguments
    arguments = dict(arguments)
    sides: tuple[Tensor, Tensor] = arguments.pop("input_ids"), arguments.pop("decoder_input_ids")
    both = table(torch.cat(sides, dim=1))
    embedded = both.split([side.shape[1] for side in sides], dim=1)
    arguments["inputs_embeds"], arguments["decoder_inputs_embeds"] = embedded
    return arguments


def _alike(first: Any, second: Any) -> bool:
    """Whether one of two modules may look up for both."""
    return (
        type(first) is type(second)
        and _is_plain(first)
        and _is_plain(second)
        and first.weight is second.weight
        and all(getattr(first, name, None) == getattr(second, name, None) for name in _SAME)
    )


def _is_plain(module: Any) -> bool:
    return (
        isinstance(module, nn.Embedding)
        # transformers' own scale what they look up; whoever else subclasses may do anything.
        and type(module).__module__.startswith(("torch.nn.", "transformers.models."))
        and [name for name, _ in module.named_parameters()] == ["weight"]
        and module.weight.requires_grad
        and module.max_norm is None
        and not (module.scale_grad_by_freq or module.sparse)
        and "forward" not in vars(module)
        and not _has_hooks(module)
    )


def _has_hooks(module: Any) -> bool:
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    return any(getattr(module, f"_{kind}_hooks") for kind in kinds)
