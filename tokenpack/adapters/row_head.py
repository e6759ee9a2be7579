"""Heads that read one token of each row: they run on the padded output of a packed base model.

That output is zero at padded slots. A head reads a position that it computes from the ids, and not
from the mask. So the call only packs if the mask marks all positions that the head reads as real.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .call import ENTRY, Entry, runs_padded
from .checks import makes_cache
from .forward import BOUNDARIES, arguments_by_name, call_first_batch, run_padded
from .graph import outside_graph, untraceable
from .graph_ops import pads_read_slots, slots_in_graph
from .outputs import leaving_out


def row_head_forward(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a sequence classifier. Its base model packs."""
    entry: Entry = getattr(model, ENTRY)
    if runs_padded(entry.state):
        return original(model, *args, **kwargs)
    inputs = arguments_by_name(entry, args, kwargs)
    traced = torch.compiler.is_compiling()
    reason = untraceable(model, entry, inputs) if traced else None
    if reason is not None:
        return _OUTSIDE_GRAPH[reason](original, model, entry, inputs)
    return _forward(original, model, entry, inputs, traced)


def _forward(
    original: Callable[..., Any],
    model: Any,
    entry: Entry,
    inputs: dict[str, Any],
    traced: bool = False,
) -> Any:
    if entry.state.first_batch is not None and not traced:
        call_first_batch(model, entry, inputs)
    reason = entry.unpackable or _reason(model, entry, inputs, traced)
    if reason is not None:
        return run_padded(original, model, entry, reason, inputs)
    if "use_cache" in inputs or not (model.training or "labels" in inputs):
        return original(model, **inputs)
    return _without_cache(original, model, entry, inputs)


_OUTSIDE_GRAPH = outside_graph(_forward)


def _without_cache(
    original: Callable[..., Any], model: Any, entry: Entry, inputs: dict[str, Any]
) -> Any:
    """Run the head for a loss, for which no cache is needed. All outputs keep their positions."""
    if "use_cache" not in entry.parameters or entry.state.family.kind == "encoder":
        return original(model, **inputs)
    outputs = original(model, **{**inputs, "use_cache": False, "return_dict": True})
    # Heads of encoder-decoders turn the cache off themselves if labels are given.
    if not (entry.sides == ("enc", "dec") and "labels" in inputs):
        stack = model.get_decoder() or model.base_model
        if makes_cache(stack, None):
            result: Any = type(outputs)
            outputs = leaving_out(result, ("past_key_values",))(**dict(outputs.items()))
    return_dict = inputs.get("return_dict", model.config.return_dict)
    return outputs if return_dict else outputs.to_tuple()


def _reason(model: Any, entry: Entry, inputs: dict[str, Any], traced: bool) -> str | None:
    """Why the head must run on a padded forward. None if it reads real slots only."""
    family = entry.state.family
    assert family is not None
    if any(name in inputs for name in BOUNDARIES):
        return "cu_seqlens is given, but the head reads padded rows"
    prefix = "decoder_" if family.kind == "encoder_decoder" else ""
    mask_name = f"{prefix}attention_mask"
    mask = inputs.get(mask_name)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None  # all slots are real, or the base model decides
    if family.kind == "encoder":
        read = torch.zeros(len(mask), dtype=torch.long)
    elif family.kind == "decoder":
        read = _last_column(model.config.get_text_config().pad_token_id, mask, inputs)
    else:
        ids = inputs.get("input_ids")
        if ids is None or ids.shape != mask.shape:
            return None  # the model itself raises an error
        column = torch.arange(ids.shape[1], device=ids.device)
        read = (ids.eq(model.config.eos_token_id) * column).argmax(1)
    if traced:  # checked when the graph runs
        inputs[mask_name] = slots_in_graph(mask, read.to(mask.device))
    elif pads_read_slots(mask, read):
        return "the head reads a slot that the mask marks as padding"
    return None


def _last_column(pad_token_id: int | None, mask: Tensor, inputs: dict[str, Any]) -> Tensor:
    """The column of the last id of each row that is not ``pad_token_id``, as the model finds it."""
    ids = inputs.get("input_ids")
    if ids is None or pad_token_id is None or ids.shape != mask.shape:
        return torch.full((len(mask),), mask.shape[1] - 1)
    column = torch.arange(ids.shape[1], device=ids.device, dtype=torch.int32)
    return ((ids != pad_token_id) * column).argmax(1)
