"""The forward of a patched model: pack, run the original forward on real tokens, and repad."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..checks import IGNORE_INDEX
from ..kernels import PackedLayout, repad
from .call import STATE, PatchState
from .embedding import share_lookup
from .head import after_head, fused_forward, logits_match, loss_from_logits, on_device
from .inputs import CannotPackError, PackedInputs, pack_inputs
from .swap import is_swapped

logger = logging.get_logger(__name__)

_BOUNDARIES = frozenset({"cu_seqlens", "decoder_cu_seqlens"})

# The candidate sides of each output. The first one in the call's layouts is the output's side.
_SIDES = {
    "last_hidden_state": ("dec", "self", "enc"),
    "hidden_states": ("self", "enc"),
    "logits": ("dec", "self", "enc"),
    "decoder_hidden_states": ("dec",),
    "encoder_last_hidden_state": ("enc",),
    "encoder_hidden_states": ("enc",),
}


# Packing reads the values of the batch on the host, so torch.compile skips this function and its
# helpers. It still compiles the model's original forward.
@functools.partial(torch.compiler.disable, recursive=False)
def packed_forward(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's forward, with its signature, on real tokens only if the call can be packed."""
    state: PatchState | None = getattr(model, STATE, None)
    if state is None:  # the model was unpatched, but accelerate still has the forward it wrapped
        return original(model, *args, **kwargs)
    inputs, parameters = _arguments_by_name(original, model, args, kwargs)
    try:
        packed = pack_inputs(model, state, dict(inputs), parameters)
    except CannotPackError as reason:
        if state.strict or not inputs.keys().isdisjoint(_BOUNDARIES):
            # The original forward ignores boundaries and would see one sequence.
            raise ValueError(f"{type(model).__name__} cannot pack this call: {reason}") from None
        return _run_padded(original, model, state, str(reason), inputs)
    outputs = _run_packed(original, model, state, packed)
    state.stats.packed_calls += 1
    state.stats.packed_tokens += sum(side.total_tokens for side in packed.call.layouts.values())
    state.stats.padded_tokens += packed.padded_slots
    return_dict = inputs.get("return_dict")
    if return_dict is None:
        return_dict = getattr(model.config, "return_dict", True)
    return outputs if return_dict else outputs.to_tuple()


@functools.partial(torch.compiler.disable, recursive=False)
def _run_packed(
    original: Callable[..., Any], model: Any, state: PatchState, packed: PackedInputs
) -> Any:
    keep_logits = state.logits == "always" or (
        state.logits == "auto" and not (model.training and packed.targets is not None)
    )
    if not keep_logits:
        _request_fused_loss(model, packed)
    arguments = packed.arguments
    if state.family.embeds_match_ids:
        arguments = share_lookup(model, arguments)
    with state.activate(packed.call):
        outputs = original(model, **arguments)
    if packed.call.attention_calls == 0 and not _may_drop_every_layer(model):
        raise RuntimeError(
            f"{type(model).__name__} never reached packed attention: was set_attn_implementation "
            "called after patch_model?"
        )
    if packed.call.loss is not None and not _head_is_plain(model, state, packed, outputs):
        # Run the forward again and compute the loss from the logits.
        packed.call.targets = packed.call.loss = None
        with state.activate(packed.call):
            outputs = original(model, **arguments)
    return _results(outputs, state, packed, keep_logits)


def _may_drop_every_layer(model: Any) -> bool:
    return model.training and any(
        getattr(model.config, name, 0.0) for name in ("encoder_layerdrop", "decoder_layerdrop")
    )


def _request_fused_loss(model: Any, packed: PackedInputs) -> None:
    """Let the head compute the loss, if `patch_model` changed the head."""
    if packed.targets is None or packed.call.state.head_is_plain is False:
        return
    head = model.get_output_embeddings()
    # Hooks see and change logits, except for those of fully_shard, which only gather the weight.
    hooked = head is not None and (head._forward_hooks or head._forward_pre_hooks)
    if is_swapped(head, fused_forward) and (not hooked or hasattr(head, "unshard")):
        packed.call.targets, packed.call.after_head = packed.targets, after_head(model)


def _head_is_plain(model: Any, state: PatchState, packed: PackedInputs, outputs: Any) -> bool:
    """Whether the fused loss is the model's loss. Checked once, on the logits of one token."""
    if state.head_is_plain is None:
        call = packed.call
        assert call.after_head is not None
        assert call.head_logits is not None
        state.head_is_plain = logits_match(call.after_head, call.head_logits, outputs.logits)
        if not state.head_is_plain:
            logger.warning_once(
                f"{type(model).__name__} changes its logits after the head in a way that tokenpack "
                "does not support: the loss is computed from materialized logits"
            )
    return state.head_is_plain


@torch.compiler.disable
def _results(outputs: Any, state: PatchState, packed: PackedInputs, keep_logits: bool) -> Any:
    """The model's outputs with the loss, in the shape of the batch."""
    call, targets = packed.call, packed.targets
    # A ModelOutput cannot drop a field that has been set, so the results go into a new one.
    fields = dict(outputs.items())
    if call.loss is not None:
        fields["loss"] = call.loss
        state.stats.loss = "fused with the head, without logits"
    elif targets is not None:
        fields["loss"] = loss_from_logits(outputs.logits.squeeze(0), targets.labels, call.num_items)
        state.stats.loss = _unfused_reason(state, keep_logits)
    if not keep_logits:
        fields.pop("logits", None)
    if not packed.is_packed:
        for name, sides in _SIDES.items():
            if name in fields:
                layout = next(call.layouts[side] for side in sides if side in call.layouts)
                fields[name] = _repadded(fields[name], layout)
    elif packed.rows is not None:
        for name in _SIDES.keys() & fields.keys():
            fields[name] = _repadded(fields[name], packed.rows)
    return type(outputs)(**fields)


def _unfused_reason(state: PatchState, keep_logits: bool) -> str:
    if keep_logits:
        return "from the logits, because they are returned"
    if state.head_is_plain is False:
        return "from the logits: the model changes them after the head in an unsupported way"
    return "from the logits: the head is not a plain nn.Linear, or has hooks"


def _repadded(value: Tensor | tuple[Tensor, ...], layout: PackedLayout) -> Any:
    if isinstance(value, Tensor):
        return repad(value.squeeze(0), layout)
    return tuple(repad([hidden.squeeze(0) for hidden in value], layout))


def _run_padded(
    original: Callable[..., Any],
    model: Any,
    state: PatchState,
    reason: str,
    inputs: dict[str, Any],
) -> Any:
    """Run and count the original forward, with a loss that respects ``num_items_in_batch``."""
    state.stats.fallbacks[reason] += 1
    if model.training:
        logger.warning_once(
            f"{type(model).__name__} runs padded: {reason}. See packing_stats(model).fallbacks."
        )
    labels, num_items = inputs.get("labels"), inputs.get("num_items_in_batch")
    if not state.has_token_head or state.shifts_labels or labels is None or num_items is None:
        return original(model, **inputs)  # causal models use the number themselves
    # Most other models ignore the number, so compute the mean loss and rescale it.
    del inputs["num_items_in_batch"]
    outputs = original(model, **inputs)
    valid = int((labels != IGNORE_INDEX).sum())
    logits = outputs[1] if isinstance(outputs, tuple) else outputs.logits
    loss = outputs[0] * valid / on_device(num_items, logits.device) if valid else logits.sum() * 0.0
    if isinstance(outputs, tuple):
        return (loss, *outputs[1:])
    outputs.loss = loss
    return outputs


@torch.compiler.disable
def _arguments_by_name(
    original: Callable[..., Any], model: Any, args: tuple, kwargs: dict[str, Any]
) -> tuple[dict[str, Any], frozenset[str]]:
    """The arguments that are not None, by name, and the names of the forward's parameters."""
    names = _parameter_names(original)
    if len(args) > len(names):
        raise TypeError(f"forward takes {len(names)} positional arguments, got {len(args)}")
    inputs = dict(zip(names, args, strict=False))
    duplicates = inputs.keys() & kwargs.keys()
    if duplicates:
        raise TypeError(f"forward got multiple values for {sorted(duplicates)}")
    inputs.update(kwargs)
    return {name: value for name, value in inputs.items() if value is not None}, frozenset(names)


@functools.cache
def _parameter_names(original: Callable[..., Any]) -> tuple[str, ...]:
    parameters = list(inspect.signature(original).parameters.values())[1:]  # without self
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
