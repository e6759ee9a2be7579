"""Pack the arguments of a model's forward: from a padded batch to token streams and a `PackedCall`.

A batch that is already packed (``cu_seqlens``) is repadded first: ids take only a few bytes per
token, and embeddings stay a stream. Labels are then shifted and positions computed in the same way
for both kinds of batch, and no label crosses a sequence boundary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import IGNORE_INDEX
from ..kernels import (
    PackedLayout,
    layout_from_cu_seqlens,
    layout_from_lengths,
    layout_from_mask,
    repad,
    unpad,
)
from ..kernels.tokens import TakenTokens, count_labels, shift_left, take_tokens
from .call import KEYWORD, Entry, PackedCall, PatchState, Targets, marker_mask
from .checks import check_call, check_pooling, has_pooler
from .dead_tokens import add_dead_tokens
from .errors import CannotPackError
from .graph_ops import (
    Counted,
    GraphSide,
    full_layout_in_graph,
    has_holes,
    layout_in_graph,
    packed_layout_in_graph,
    targets_in_graph,
)
from .packed_rows import positions_to_stream, rows_to_stream

# Arguments that do not affect whether a call can be packed.
_ALWAYS_ACCEPTED = frozenset({"num_items_in_batch", "return_dict", "output_hidden_states"})


@dataclass
class PackedInputs:
    """The arguments of a packed forward, and what is needed to restore the batch's shape."""

    call: PackedCall
    arguments: dict[str, Any]
    targets: Targets | None
    is_packed: bool  # the batch was already packed
    padded_slots: int
    rows: PackedLayout | None = None  # restores packed rows, if the batch had them
    dead_tokens: int = 0  # that the batch had, among its tokens


@dataclass
class _Side:
    """The tokens of an encoder, of a decoder, or of a model with one side."""

    layout: PackedLayout
    padded: Tensor  # (rows, columns[, hidden]) ids or embeddings, or a stream
    is_packed: bool
    slots: int
    is_stream: bool = False  # packed embeddings, which are too large to pad
    taken: TakenTokens | None = None  # if the labels have been taken in the same launch

    @property
    def stream(self) -> Tensor:
        """``(1, total_tokens[, hidden])``."""
        if self.taken is not None:
            return self.taken.tokens[None]
        return self.padded if self.is_stream else unpad(self.padded, self.layout)[None]


def pack_inputs(
    model: Any, entry: Entry, inputs: dict[str, Any], traced: bool = False
) -> PackedInputs:
    """Pack the arguments of one forward.

    Args:
        model: a part of a patched model.
        entry: how the part packs.
        inputs: the arguments that are not None, by name. Changed in place.
        traced: the forward becomes one graph of torch.compile. What depends on values of the batch
            is then checked when the graph runs, see `graph_ops`.

    Raises:
        CannotPackError: if only the model's original forward computes this call correctly.
        ValueError: if the arguments contradict each other.
    """
    if entry.unpackable is not None:
        raise CannotPackError(entry.unpackable)
    labels_end_cache = "labels" in inputs and entry.state.family.labels_end_cache
    turns_cache_off = "use_cache" in inputs or labels_end_cache
    check_call(model, entry, inputs)
    rows = rows_to_stream(inputs)
    if rows is None and not traced and entry.state.family.kind == "decoder":
        rows = positions_to_stream(inputs, entry.state.splits_by_position)
    if entry.sides == ("enc", "dec"):
        packed = _pack_encoder_decoder(model, entry, inputs, traced)
    else:
        packed = _pack_single(model, entry, inputs, traced)
    unsupported = sorted(name for name in inputs if name not in _ALWAYS_ACCEPTED)
    if unsupported:
        raise CannotPackError(f"argument {unsupported[0]!r} is not supported")
    if rows is not None:
        packed.rows, packed.padded_slots = rows, rows.padded_shape[0] * rows.padded_shape[1]
    add_dead_tokens(packed.call, packed.arguments, dict(zip(entry.sides, ("", "decoder_"))))
    packed.arguments[KEYWORD] = packed.call
    packed.arguments["return_dict"] = True
    packed.call.num_items = inputs.get("num_items_in_batch")
    if "output_hidden_states" in inputs:
        packed.arguments["output_hidden_states"] = inputs["output_hidden_states"]
    if turns_cache_off:
        packed.arguments["use_cache"] = False
    return packed


def shift_right(model: Any, labels: Tensor) -> Tensor:
    """Decoder inputs from labels, by the model's own rule. ``(rows, columns)``."""
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        return prepare(labels=labels)
    config = model.config
    inputs = labels.new_empty(labels.shape)
    inputs[:, 1:] = labels[:, :-1]
    inputs[:, 0] = config.decoder_start_token_id
    return inputs.masked_fill_(inputs == IGNORE_INDEX, config.pad_token_id)


# -------------------------------------------------------------------------- the two kinds of model


def _pack_encoder_decoder(
    model: Any, entry: Entry, inputs: dict[str, Any], traced: bool
) -> PackedInputs:
    if "encoder_outputs" in inputs:
        raise CannotPackError("encoder_outputs are given")
    labels, label_layout = inputs.pop("labels", None), None
    state = entry.state
    counted = Counted()
    in_graph = GraphSide(counted, state.counts_columns) if traced else None
    encoder = _pop_side(inputs, "", state, in_graph)
    if in_graph is not None:
        key = "" if labels is not None else state.key
        counted = counted.after(encoder.layout, encoder.slots, key)
        in_graph = GraphSide(counted, state.counts_columns, encoder=encoder.layout.cu_seqlens)
    no_decoder_inputs = "decoder_input_ids" not in inputs and "decoder_inputs_embeds" not in inputs
    if labels is not None:
        cu_seqlens = inputs.get("decoder_cu_seqlens")
        if in_graph is not None and cu_seqlens is not None:
            label_layout = packed_layout_in_graph(cu_seqlens, labels, in_graph)
        labels, label_layout = _padded_labels(labels, cu_seqlens, label_layout)
        if no_decoder_inputs:
            ids = shift_right(model, labels)
            if label_layout is not None:
                ids = unpad(ids, label_layout)[None]
            inputs["decoder_input_ids"] = ids
    elif no_decoder_inputs:
        raise CannotPackError("neither decoder inputs nor labels are given")
    packed_layout = label_layout if traced else None  # a second one would have other symbols
    decoder = _pop_side(inputs, "decoder_", state, in_graph, labels, packed_layout)
    if decoder.layout.num_seqs != encoder.layout.num_seqs:
        raise ValueError(
            "decoder inputs or labels must have as many sequences as input_ids, "
            f"{encoder.layout.num_seqs}, got {decoder.layout.num_seqs}"
        )
    if not traced and bool(((encoder.layout.lengths == 0) & (decoder.layout.lengths > 0)).any()):
        raise CannotPackError("an encoder row is all padding, but its decoder row is not")
    if decoder.is_packed != encoder.is_packed:
        raise ValueError("cu_seqlens and decoder_cu_seqlens must be given together or not at all")
    counted = counted.after(decoder.layout, decoder.slots, state.key)
    targets = None
    if labels is not None:
        targets = _targets(labels, False, decoder, counted if traced else None)
    call = PackedCall(state, {"enc": encoder.layout, "dec": decoder.layout}, traced)
    if state.family.swaps and not state.family.has_relative_bias:
        for name, side in (("enc", encoder), ("dec", decoder)):
            stack = model.get_encoder() if name == "enc" else model.get_decoder()
            call.positions[name] = _positions(stack, state, side)
    marker = marker_mask(encoder.padded.device)
    return PackedInputs(
        call,
        {
            _input_name("", encoder): encoder.stream,
            _input_name("decoder_", decoder): decoder.stream,
            "attention_mask": marker,
            "decoder_attention_mask": marker,
        },
        targets,
        encoder.is_packed,
        encoder.slots + decoder.slots,
    )


def _pack_single(model: Any, entry: Entry, inputs: dict[str, Any], traced: bool) -> PackedInputs:
    state, name = entry.state, entry.sides[0]
    labels = inputs.pop("labels", None) if entry.has_token_head else None
    cu_seqlens = inputs.get("cu_seqlens")
    masked = "attention_mask" in inputs or cu_seqlens is not None
    dead = _pop_dead_tokens(inputs)
    in_graph = None
    if traced:
        counted = Counted("" if labels is not None else state.key)
        pools = has_pooler(model, entry)
        in_graph = GraphSide(counted, state.counts_columns, pools, dead=dead, dead_key=state.key)
    side = _pop_side(inputs, "", state, in_graph)
    call = PackedCall(state, {name: side.layout}, traced)
    check_pooling(model, entry, side.layout, traced)
    targets = None
    if labels is not None:
        labels, _ = _padded_labels(labels, cu_seqlens, side.layout if traced else None)
        counted = Counted().after(side.layout, side.slots, state.key)
        targets = _targets(labels, entry.shifts_labels, side, counted if traced else None)

    arguments = {
        _input_name("", side): side.stream,
        "attention_mask": marker_mask(side.padded.device),
    }
    if "position_ids" in entry.parameters:
        own = _to_padded("position_ids", inputs.pop("position_ids", None), side)
        if own is not None and not masked and bool((own.diff(dim=1) != 1).any()):
            raise CannotPackError(
                "position_ids do not count up and no mask is given, so transformers infers "
                "sequence boundaries from them (pass cu_seqlens instead)"
            )
        positions = _positions(model, state, side) if own is None else unpad(own, side.layout)
        arguments["position_ids"] = positions.long()[None]
    elif name != "self" and state.family.swaps and not state.family.has_relative_bias:
        stack = model if entry.is_stack else model.get_encoder()
        call.positions[name] = _positions(stack, state, side)
    if state.family.kind == "encoder" and "token_type_ids" in entry.parameters:
        types = _to_padded("token_type_ids", inputs.pop("token_type_ids", None), side)
        if types is not None:
            arguments["token_type_ids"] = unpad(types, side.layout)[None]
    if isinstance(inputs.get("logits_to_keep"), int) and inputs["logits_to_keep"] == 0:
        del inputs["logits_to_keep"]
    packed = PackedInputs(call, arguments, targets, side.is_packed, side.slots)
    if dead is not None and not traced:
        packed.dead_tokens = int(dead)
    return packed


# --------------------------------------------------------------------------------------- one side


def _pop_side(
    inputs: dict[str, Any],
    prefix: str,
    state: PatchState,
    in_graph: GraphSide | None,
    labels: Tensor | None = None,
    packed_layout: PackedLayout | None = None,
) -> _Side:
    """Remove the ids or embeddings of one side from ``inputs``, with their mask and boundaries.

    ``packed_layout`` is that of the boundaries, if it is known.
    """
    ids_name = f"{prefix}input_ids"
    embeds_name = f"{prefix}inputs_embeds"
    if (ids_name in inputs) == (embeds_name in inputs):
        raise CannotPackError(f"both or neither of {ids_name} and {embeds_name} are given")
    name = ids_name if ids_name in inputs else embeds_name
    tokens: Tensor = inputs.pop(name)
    if tokens.dim() != (2 if name == ids_name else 3) or 0 in tokens.shape[:2]:
        raise ValueError(
            f"{name} must be (rows, columns{'' if name == ids_name else ', hidden'}) and not "
            f"empty, got shape {tuple(tokens.shape)}"
        )
    mask = inputs.pop(f"{prefix}attention_mask", None)
    cu_seqlens = inputs.pop(f"{prefix}cu_seqlens", None)
    inputs.pop(f"{prefix}max_seqlen", None)  # collators pass it; the layout computes it
    if cu_seqlens is not None:
        if tokens.shape[0] != 1:
            raise ValueError(
                f"{name} must be (1, total_tokens) when {prefix}cu_seqlens is given, "
                f"got shape {tuple(tokens.shape)}"
            )
        if mask is not None and not bool((mask != 0).all()):
            raise ValueError(
                f"{prefix}attention_mask must be all ones when {prefix}cu_seqlens is given, got "
                "zeros: leave the mask out"
            )
        if packed_layout is not None:
            layout = packed_layout
        elif in_graph is not None:
            layout = packed_layout_in_graph(cu_seqlens, tokens, in_graph)
        else:
            layout = layout_from_cu_seqlens(cu_seqlens, tokens.shape[1], device=tokens.device)
        if tokens.dim() == 3 and in_graph is None:
            return _Side(layout, tokens, True, layout.total_tokens, is_stream=True)
        return _Side(layout, repad(tokens.squeeze(0), layout), True, layout.total_tokens)
    rows, columns = tokens.shape[:2]
    if mask is not None:
        mask_name = f"{prefix}attention_mask"
        layout = _layout_from_mask(mask_name, mask, name, tokens, state, in_graph)
    elif labels is not None:
        layout = _layout_from_labels(labels, name, (rows, columns), in_graph)
    elif in_graph is not None and in_graph.encoder is not None:
        full = torch.ones((rows, columns), dtype=torch.bool, device=tokens.device)
        layout = layout_in_graph(full, f"{prefix}attention_mask", in_graph)
    elif in_graph is not None:
        layout = full_layout_in_graph(tokens, in_graph)
    else:
        layout = layout_from_lengths([columns] * rows, device=tokens.device)
    return _Side(layout, tokens, False, rows * columns)


def _pop_dead_tokens(inputs: dict[str, Any]) -> Tensor | None:
    """``()``, how many of the last tokens of a stream only fill it up. See `PackedBatch`."""
    dead = inputs.pop("dead_tokens", None)
    if dead is None:
        return None
    if "cu_seqlens" not in inputs:
        raise ValueError("dead_tokens must be given with cu_seqlens, got no cu_seqlens")
    return torch.as_tensor(dead)


def _layout_from_mask(
    mask_name: str,
    mask: Any,
    name: str,
    tokens: Tensor,
    state: PatchState,
    in_graph: GraphSide | None,
) -> PackedLayout:
    if not isinstance(mask, Tensor):
        raise CannotPackError(f"{mask_name} is a {type(mask).__name__}")
    if mask.dim() != 2:
        raise CannotPackError(f"{mask_name} is {mask.dim()}-dimensional")
    if mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"{mask_name} must have the shape of {name}, {tuple(tokens.shape[:2])}, "
            f"got {tuple(mask.shape)}"
        )
    mask = mask.to(tokens.device)
    if in_graph is not None:
        return layout_in_graph(mask, mask_name, in_graph)
    layout = layout_from_mask(mask)
    if layout.total_tokens == 0:
        raise ValueError(f"{mask_name} must mark at least one real token, got none")
    if state.counts_columns and has_holes(layout):
        raise CannotPackError(
            f"{mask_name} has holes, and this model's attention depends on the number of columns "
            "between tokens"
        )
    return layout


def _layout_from_labels(
    labels: Tensor, name: str, shape: tuple[int, int], in_graph: GraphSide | None
) -> PackedLayout:
    """Treat the slots after a row's last label as padding. A causal decoder's loss ignores them."""
    if labels.shape != shape:
        raise ValueError(
            f"labels must have the shape of {name}, {shape}, got {tuple(labels.shape)}"
        )
    column = torch.arange(1, shape[1] + 1, device=labels.device)
    last = ((labels != IGNORE_INDEX) * column).amax(dim=1, keepdim=True)
    if in_graph is not None:
        return layout_in_graph(column <= last, "labels", in_graph)
    layout = layout_from_mask(column <= last)
    if layout.total_tokens == 0:
        raise CannotPackError("all labels are -100")
    return layout


def _to_padded(name: str, values: Tensor | None, side: _Side) -> Tensor | None:
    """Values per token, in the padded rows of ``side``."""
    if values is None:
        return None
    expected = (1, side.layout.total_tokens) if side.is_packed else side.layout.padded_shape
    if values.dim() == 1:
        values = values[None]
    if values.shape != expected and values.shape != (1, expected[1]):
        raise ValueError(f"{name} must be {expected}, got shape {tuple(values.shape)}")
    if side.is_packed:
        return repad(values[0], side.layout)
    return values.expand(expected)


def _padded_labels(
    labels: Tensor, cu_seqlens: Any, layout: PackedLayout | None = None
) -> tuple[Tensor, PackedLayout | None]:
    """Labels in padded rows, and their layout if they were packed, which may be known."""
    if labels.dim() != 2:
        raise ValueError(f"labels must be (rows, columns), got shape {tuple(labels.shape)}")
    if cu_seqlens is None:
        return labels, None
    if layout is None:
        layout = layout_from_cu_seqlens(cu_seqlens, labels.shape[1], device=labels.device)
    return repad(labels[0], layout, fill=IGNORE_INDEX), layout


def _positions(stack: Any, state: PatchState, side: _Side) -> Tensor:
    """``(total_tokens,)`` int64, the position that the model gives each token when padded."""
    rule = state.family.positions
    if rule is None:
        return side.layout.columns.long() if side.taken is None else side.taken.columns
    if side.padded.dim() == 3:
        raise CannotPackError("positions are computed from ids, but inputs_embeds is given")
    return unpad(rule(stack, side.padded), side.layout)


def _targets(labels: Tensor, shift: bool, side: _Side, counted: Counted | None) -> Targets:
    """The labels of the real tokens, or with ``shift`` those of the next slots.

    Labels at padded positions must be -100. ``counted`` is what the call counts, if it is traced.
    """
    layout = side.layout
    if labels.shape != layout.padded_shape:
        raise ValueError(
            f"labels must have the shape of their inputs, {layout.padded_shape}, "
            f"got {tuple(labels.shape)}"
        )
    labels = labels.to(layout.device)
    if counted is not None:
        return Targets(*targets_in_graph(shift_left(labels) if shift else labels, layout, counted))
    if side.padded.dim() == 2:
        side.taken = take_tokens(side.padded, labels, layout, shift=shift)
        targets, counts = side.taken.targets, side.taken.counts
    else:  # embeddings
        labels = shift_left(labels) if shift else labels
        targets = unpad(labels, layout)
        counts = count_labels(labels, targets)
    num_labels, num_valid = counts.tolist()
    if num_labels != num_valid:
        raise CannotPackError(
            "labels at padded positions must be -100 (and, for a causal model, the label of the "
            "first token after left padding)"
        )
    return Targets(targets, num_valid)


def _input_name(prefix: str, side: _Side) -> str:
    return f"{prefix}input_ids" if side.padded.dim() == 2 else f"{prefix}inputs_embeds"
