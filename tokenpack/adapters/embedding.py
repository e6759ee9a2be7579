"""One lookup for both stacks of an encoder-decoder that share their word embeddings.

The backward of a lookup writes a gradient as large as the table, most of it zeros. With two
lookups, autograd also adds the two gradients, which reads and writes 3 * vocabulary * width
numbers. On packed input, one lookup serves both stacks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .hooks import changed_by
from .traced_once import traced_once

_SETTINGS = ("padding_idx", "embed_scale")


def share_lookup(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Replace the ids of both sides in the arguments by embeddings from one lookup.

    Only for families with ``embeds_match_ids``. Returns the arguments unchanged if no gradient is
    needed, or if the stacks must call their own modules: separate tables, modules that are not a
    plain lookup (adapters, wrappers), or stacks and modules with hooks, which see their inputs
    (gradient checkpointing sets some).
    """
    if not torch.is_grad_enabled() or not {"input_ids", "decoder_input_ids"} <= arguments.keys():
        return arguments
    if not _shares_table(model):
        return arguments
    table = model.get_encoder().get_input_embeddings()
    arguments = dict(arguments)
    sides: tuple[Tensor, Tensor] = arguments.pop("input_ids"), arguments.pop("decoder_input_ids")
    both = table(torch.cat(sides, dim=1))
    embedded = both.split([side.shape[1] for side in sides], dim=1)
    arguments["inputs_embeds"], arguments["decoder_inputs_embeds"] = embedded
    return arguments


@traced_once  # `changed_by` is
def _shares_table(model: Any) -> bool:
    """Whether the embedding of the encoder can look up the ids of the decoder."""
    stacks = model.get_encoder(), model.get_decoder()
    if any(not hasattr(stack, "get_input_embeddings") or changed_by(stack) for stack in stacks):
        return False
    first, second = (stack.get_input_embeddings() for stack in stacks)
    return (
        type(first) is type(second)
        and _is_plain(first)
        and _is_plain(second)
        and first.weight is second.weight
        and all(getattr(first, name, None) == getattr(second, name, None) for name in _SETTINGS)
    )


def _is_plain(module: Any) -> bool:
    return (
        isinstance(module, nn.Embedding)
        # Subclasses in transformers only scale the result. Other subclasses may do anything.
        and type(module).__module__.startswith(("torch.nn.", "transformers.models."))
        and [name for name, _ in module.named_parameters()] == ["weight"]
        and module.weight.requires_grad
        and module.max_norm is None
        and not (module.scale_grad_by_freq or module.sparse)
        and changed_by(module) is None
    )
