"""The forward of a part of a patched model: pack, run the original forward, and repad."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.utils import logging

from ..checks import IGNORE_INDEX
from ..kernels import PackedLayout, repad, unpad
from .call import ENTRY, KEYWORD, Entry, PackedCall, run_active, runs_padded
from .checks import check_added_layers, check_position_table, makes_cache
from .embedding import share_lookup
from .errors import CannotPackError
from .graph import count_layers, may_drop_layers, note_loss, outside_graph, untraceable
from .graph_ops import count_padded_in_graph, logits_match, loss_in_graph
from .head import (
    LOGITS_OF,
    after_head,
    fused_forward,
    loss_from_logits,
    on_device,
    swap_head,
)
from .hooks import changed_by
from .inputs import PackedInputs, pack_inputs
from .interface import follow
from .outputs import leaving_out
from .swap import is_swapped

logger = logging.get_logger(__name__)

BOUNDARIES = frozenset({"cu_seqlens", "decoder_cu_seqlens"})

# The candidate sides of each output. The first one in the call's layouts is the output's side.
_SIDES = {
    "last_hidden_state": ("dec", "self", "enc"),
    "hidden_states": ("self", "enc", "dec"),
    "logits": LOGITS_OF,
    "decoder_hidden_states": ("dec",),
    "encoder_last_hidden_state": ("enc",),
    "encoder_hidden_states": ("enc",),
}


def packed_forward(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a part, with its signature, on real tokens only if the call can be packed."""
    entry: Entry = getattr(model, ENTRY)
    call: PackedCall | None = kwargs.get(KEYWORD)
    if call is not None:  # a larger part has packed the batch
        return _run_with(call, original, model, entry, *args, **kwargs)
    if runs_padded(entry.state):
        return original(model, *args, **kwargs)
    inputs = arguments_by_name(entry, args, kwargs)
    if not torch.compiler.is_compiling():
        return _forward(original, model, entry, inputs)
    reason = untraceable(model, entry, inputs)
    if reason is not None:
        return _OUTSIDE_GRAPH[reason](original, model, entry, inputs)
    packed = _pack_in_graph(model, entry, inputs)
    if isinstance(packed, str):
        return run_padded(original, model, entry, packed, inputs)
    outputs = _run_packed(original, model, entry, packed)
    return outputs if _returns_dict(model, inputs) else outputs.to_tuple()


def _forward(original: Callable[..., Any], model: Any, entry: Entry, inputs: dict[str, Any]) -> Any:
    """`packed_forward` outside a graph: a call that cannot be packed runs padded."""
    if entry.state.first_batch is not None:
        call_first_batch(model, entry, inputs)
    try:
        packed = _pack(model, entry, dict(inputs))
    except CannotPackError as reason:
        return run_padded(original, model, entry, str(reason), inputs)
    outputs = _run_outside_graph(original, model, entry, packed)
    stats = entry.state.stats
    stats.packed_calls += 1
    stats.attention.update((role, str(choice)) for role, choice in packed.call.choices.items())
    stats.packed_tokens += sum(side.total_tokens for side in packed.call.layouts.values())
    stats.padded_tokens += packed.padded_slots
    stats.discount(packed.dead_tokens)
    return outputs if _returns_dict(model, inputs) else outputs.to_tuple()


# Outside a graph, packing reads values on the host. torch.compile still compiles the layers.
_pack = torch.compiler.disable(pack_inputs)
_OUTSIDE_GRAPH = outside_graph(_forward)


def _pack_in_graph(model: Any, entry: Entry, inputs: dict[str, Any]) -> PackedInputs | str:
    """The packed arguments, or why the call cannot be packed."""
    try:
        return pack_inputs(model, entry, dict(inputs), traced=True)
    except CannotPackError as reason:
        return str(reason)


def _returns_dict(model: Any, inputs: dict[str, Any]) -> bool:
    return_dict = inputs.get("return_dict")
    return bool(getattr(model.config, "return_dict", True) if return_dict is None else return_dict)


@torch.compiler.disable
def call_first_batch(model: Any, entry: Entry, inputs: dict[str, Any]) -> None:
    """In training, call the function that waits for the first batch of a patched model."""
    state = entry.state
    function = state.first_batch
    if function is None or not (model.training and torch.is_grad_enabled()):
        return
    state.first_batch = None  # it may run the model itself
    done = False
    try:
        done = function(model, inputs)
    finally:
        if not done:
            state.first_batch = function


def _run_with(
    call: PackedCall,
    original: Callable[..., Any],
    model: Any,
    entry: Entry,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run the original forward with an active call.

    Parts inside the one that packed activate the call too. So gradient checkpointing of a whole
    stack activates it again for the stack's position table.
    """
    if entry.is_stack:
        check_position_table(model)
    if entry.makes_cache:
        call.leaves_out_cache = makes_cache(model, kwargs.get("use_cache"))
        kwargs["use_cache"] = False
    return run_active(entry.state, call, original, model, *args, **kwargs)


def _run_packed(
    original: Callable[..., Any], model: Any, entry: Entry, packed: PackedInputs
) -> Any:
    state = entry.state
    keep_logits = state.logits == "always" or (
        state.logits == "auto" and not (model.training and packed.targets is not None)
    )
    if not keep_logits:
        _request_fused_loss(model, entry, packed)
    arguments = packed.arguments
    if state.family.embeds_match_ids:
        arguments = share_lookup(model, arguments)
    follow(state.key)
    if packed.call.traced:
        layers_before = count_layers(state.key)
        outputs = _run_with(packed.call, original, model, entry, **arguments)
        _check_in_graph(model, entry, packed.call, layers_before, outputs)
        return _results(outputs, entry, packed, keep_logits)
    try:
        outputs = _run_with(packed.call, original, model, entry, **arguments)
    except Exception as error:
        check_added_layers(model, error)
        raise
    if packed.call.attention_calls == 0 and not (model.training and may_drop_layers(model)):
        raise _unreached(model)
    if packed.call.loss is not None and not _head_is_plain(model, entry, packed, outputs):
        # Run the forward again and compute the loss from the logits.
        packed.call.targets = packed.call.loss = None
        outputs = _run_with(packed.call, original, model, entry, **arguments)
    return _results_outside_graph(outputs, entry, packed, keep_logits)


_run_outside_graph = torch.compiler.disable(_run_packed, recursive=False)


def _check_in_graph(
    model: Any, entry: Entry, call: PackedCall, layers_before: int, outputs: Any
) -> None:
    """What the code after `_run_packed` checks outside a graph."""
    if count_layers(entry.state.key) == layers_before:
        raise _unreached(model)
    if call.loss is not None and entry.state.head_is_plain is None:
        assert call.after_head is not None
        assert call.head_logits is not None
        call.loss = loss_in_graph(call.loss, call.after_head, call.head_logits, outputs.logits)


def _unreached(model: Any) -> RuntimeError:
    return RuntimeError(
        f"{type(model).__name__} never reached packed attention: was its attention replaced after "
        "patch_model?"
    )


def _request_fused_loss(model: Any, entry: Entry, packed: PackedInputs) -> None:
    """Let the head compute the loss, if nothing else sees or changes its logits."""
    if packed.targets is None or entry.state.head_is_plain is False:
        return
    head = model.get_output_embeddings()
    swap_head(head)  # it is new if `resize_token_embeddings` was called after `patch_model`
    if not is_swapped(head, fused_forward):
        packed.call.unfused = f"the head is a {type(head).__name__}, not a plain nn.Linear"
        return
    change = changed_by(head)
    if change is not None:
        packed.call.unfused = f"the head has {change}"
        return
    packed.call.targets, packed.call.after_head = packed.targets, after_head(model)


def _head_is_plain(model: Any, entry: Entry, packed: PackedInputs, outputs: Any) -> bool:
    """Whether the fused loss is the model's loss. Checked once, on the logits of one token."""
    state = entry.state
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


def _results(outputs: Any, entry: Entry, packed: PackedInputs, keep_logits: bool) -> Any:
    """The model's outputs with the loss, in the shape of the batch."""
    call, targets, how = packed.call, packed.targets, ""
    # A ModelOutput cannot drop a field that has been set, so the results go into a new one.
    fields = dict(outputs.items())
    absent: tuple[str, ...] = ("past_key_values",) if call.leaves_out_cache else ()
    if not keep_logits and "logits" in fields:
        del fields["logits"]
        absent = ("logits", *absent)
    result: Any = type(outputs)
    if absent:
        result = leaving_out(result, absent)
    for name in _SIDES:
        if name in fields:
            fields[name] = _repadded(fields[name], name, packed)
    if call.loss is not None:
        fields["loss"] = call.loss
        how = "fused with the head, without logits"
    elif targets is not None:
        stream = call.without_dead(outputs.logits, LOGITS_OF).squeeze(0)
        layout = _layout_of("logits", packed)
        if keep_logits and layout is not None and stream.requires_grad:
            # Read back, so that the loss is a function of the logits that the caller gets.
            stream = unpad(fields["logits"], layout)
        fields["loss"] = loss_from_logits(stream, targets.labels, call.num_items)
        how = f"from the logits: {_unfused_reason(entry, packed, keep_logits)}"
    if call.traced:
        note_loss(entry.state.key, how)
    else:
        entry.state.stats.loss = how or entry.state.stats.loss
    return result(**fields)


_results_outside_graph = torch.compiler.disable(_results)


def _layout_of(name: str, packed: PackedInputs) -> PackedLayout | None:
    """The layout that puts an output into the shape of the batch. None if it has that shape."""
    if packed.is_packed:
        return packed.rows
    layouts = packed.call.layouts
    return next(layouts[side] for side in _SIDES[name] if side in layouts)


def _unfused_reason(entry: Entry, packed: PackedInputs, keep_logits: bool) -> str:
    if keep_logits:
        return "they are returned"
    if entry.state.head_is_plain is False:
        return "the model changes them after the head in an unsupported way"
    return packed.call.unfused or "the model did not call its head"


def _repadded(value: Any, name: str, packed: PackedInputs) -> Any:
    """A tensor or a tuple of tensors, padded. None stands for a layer that was not asked for."""
    layout, sides = _layout_of(name, packed), _SIDES[name]
    if isinstance(value, Tensor):
        value = packed.call.without_dead(value, sides)
        return value if layout is None else repad(value.squeeze(0), layout)
    streams = [packed.call.without_dead(each, sides) for each in value if each is not None]
    if layout is not None:
        streams = repad([stream.squeeze(0) for stream in streams], layout)
    results = iter(streams)
    return tuple(None if hidden is None else next(results) for hidden in value)


def run_padded(
    original: Callable[..., Any], model: Any, entry: Entry, reason: str, inputs: dict[str, Any]
) -> Any:
    """Count and run the original forward, with a loss that respects ``num_items_in_batch``.

    Raises:
        ValueError: with ``strict``, or if the original forward would ignore sequence boundaries.
    """
    if entry.state.strict or any(name in inputs for name in BOUNDARIES):
        _refuse(model, reason)
    if torch.compiler.is_compiling():
        inputs = count_padded_in_graph(inputs, entry.state.key, reason, model)
    else:
        entry.state.count_padded(reason, type(model).__name__, model.training)
    return _padded_forward(original, model, entry, inputs)


@torch.compiler.disable(reason="tokenpack raises an error for this call")
def _refuse(model: Any, reason: str) -> NoReturn:
    raise ValueError(f"{type(model).__name__} cannot pack this call: {reason}") from None


def _padded_forward(
    original: Callable[..., Any], model: Any, entry: Entry, inputs: dict[str, Any]
) -> Any:
    labels, num_items = inputs.get("labels"), inputs.get("num_items_in_batch")
    if not entry.has_token_head or entry.shifts_labels or labels is None or num_items is None:
        # Causal models use the number themselves.
        return run_active(entry.state, None, original, model, **inputs)
    # Most other models ignore the number, so compute the mean loss and rescale it.
    others = {name: value for name, value in inputs.items() if name != "num_items_in_batch"}
    outputs = run_active(entry.state, None, original, model, **others)
    mean = outputs[0]
    num_valid = (labels != IGNORE_INDEX).sum().to(mean.device)
    loss = mean * num_valid / on_device(num_items, mean.device)
    # The mean of zero targets is NaN. Its gradient is 0, as cross entropy skips all targets.
    loss = torch.where(num_valid > 0, loss, torch.zeros_like(loss))
    if isinstance(outputs, tuple):
        return (loss, *outputs[1:])
    outputs.loss = loss
    return outputs


def arguments_by_name(entry: Entry, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a part's forward that are not None, by name."""
    names = entry.parameters
    if len(args) > len(names):
        raise TypeError(f"forward takes {len(names)} positional arguments, got {len(args)}")
    inputs = dict(zip(names, args, strict=False))
    duplicates = sorted(name for name in inputs if name in kwargs)
    if duplicates:
        raise TypeError(f"forward got multiple values for {duplicates}")
    inputs.update(kwargs)
    return {name: value for name, value in inputs.items() if value is not None}
