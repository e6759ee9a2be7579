"""A model's arguments, packed: padded batch in, token streams and a `PackedCall` out.

A batch that comes packed already (``cu_seqlens``) has its ids, few bytes a token, laid out in
padded rows first. So labels are shifted and positions counted in one way for both, and nothing
can cross a boundary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import (
    PackedLayout,
    layout_from_cu_seqlens,
    layout_from_lengths,
    layout_from_mask,
    repad,
    unpad,
)
from .call import KEYWORD, PackedCall, PatchState, marker_mask
from .rows import take_out_of_rows

IGNORE_INDEX = -100

# Arguments that change nothing about what is computed, whatever their value.
_INDIFFERENT = frozenset({"num_items_in_batch", "return_dict", "output_hidden_states"})


class CannotPackError(Exception):
    """This call takes the model's own path; the message is the reason, as it is counted."""


class Targets(NamedTuple):
    """What the tokens of the head's side are asked for.

    Attributes:
        labels: ``(total_tokens,)`` each token's own class, or -100.
        num_valid: how many have one.
    """

    labels: Tensor
    num_valid: int


@dataclass
class PackedInputs:
    """What a packed forward is called with, and how its results come back."""

    call: PackedCall
    arguments: dict[str, Any]
    targets: Targets | None
    came_packed: bool
    padded_slots: int
    rows: PackedLayout | None = None  # where the tokens stood, if they came in packed rows


@dataclass
class _Side:
    """One stream: the tokens of an encoder, a decoder, or a model that has only one of them."""

    layout: PackedLayout
    padded: Tensor  # (rows, columns[, hidden]) ids or embeddings
    came_packed: bool
    slots: int


@torch.compiler.disable
def pack_inputs(
    model: Any, state: PatchState, given: dict[str, Any], parameters: frozenset[str]
) -> PackedInputs:
    """Pack the arguments of one forward.

    Args:
        model: the patched model.
        given: its arguments by name, those that are None left out. Consumed.
        parameters: the names that its forward takes.

    Raises:
        CannotPackError: if only the model's own path computes this call.
        ValueError: if the arguments contradict one another.
    """
    if state.never is not None:
        raise CannotPackError(state.never)
    _refuse_what_only_the_model_can_do(model, state, given, parameters)
    rows = take_out_of_rows(given)
    if state.family.kind == "encoder_decoder" and "decoder_input_ids" in parameters:
        packed = _pack_encoder_decoder(model, state, given)
    else:
        packed = _pack_single(model, state, given, parameters)
    left = sorted(name for name in given if name not in _INDIFFERENT)
    if left:
        raise CannotPackError(f"argument {left[0]!r}")
    if rows is not None:
        packed.rows, packed.padded_slots = rows, rows.padded_shape[0] * rows.padded_shape[1]
    packed.arguments[KEYWORD] = packed.call
    packed.arguments["return_dict"] = True
    packed.call.num_items = given.get("num_items_in_batch")
    if "output_hidden_states" in given:
        packed.arguments["output_hidden_states"] = given["output_hidden_states"]
    if "use_cache" in parameters:
        packed.arguments["use_cache"] = False
    return packed


def shifted(labels: Tensor) -> Tensor:
    """``(rows, columns)``: for each slot the label of the next one, ignored at the end of a row."""
    return nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]


def shift_right(model: Any, labels: Tensor) -> Tensor:
    """Decoder inputs from labels, by the model's own rule."""
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        return prepare(labels=labels)
    config = model.config
    inputs = labels.new_empty(labels.shape)
    inputs[:, 1:] = labels[:, :-1]
    inputs[:, 0] = config.decoder_start_token_id
    return inputs.masked_fill_(inputs == IGNORE_INDEX, config.pad_token_id)


# ---------------------------------------------------------------------------------- the two kinds


def _pack_encoder_decoder(model: Any, state: PatchState, given: dict[str, Any]) -> PackedInputs:
    if "encoder_outputs" in given:
        raise CannotPackError("encoder_outputs are given")
    labels = given.pop("labels", None)
    encoder = _take_side(given, "", state)
    if labels is not None and given.keys().isdisjoint(
        {"decoder_input_ids", "decoder_inputs_embeds"}
    ):
        labels, own_layout = _labels_in_rows(labels, given.get("decoder_cu_seqlens"))
        ids = shift_right(model, labels)
        if own_layout is None:
            given["decoder_input_ids"] = ids
        else:  # back into the stream, which _take_side lays out again
            given["decoder_input_ids"] = unpad(ids, own_layout)[None]
    elif labels is not None:
        labels, _ = _labels_in_rows(labels, given.get("decoder_cu_seqlens"))
    if given.keys().isdisjoint({"decoder_input_ids", "decoder_inputs_embeds"}):
        raise CannotPackError("neither decoder inputs nor labels are given")
    decoder = _take_side(given, "decoder_", state, labels)
    if decoder.layout.num_seqs != encoder.layout.num_seqs:
        raise ValueError(
            f"input_ids hold {encoder.layout.num_seqs} sequences, "
            f"the decoder's inputs or labels {decoder.layout.num_seqs}"
        )
    if bool(((encoder.layout.lengths == 0) & (decoder.layout.lengths > 0)).any()):
        raise CannotPackError("a row of padding alone on the encoder's side, and labels for it")
    if decoder.came_packed != encoder.came_packed:
        raise ValueError("cu_seqlens and decoder_cu_seqlens must be given together or not at all")
    targets = None if labels is None else _targets(labels, decoder)

    call = PackedCall(state, {"enc": encoder.layout, "dec": decoder.layout})
    if state.family.swaps and not state.family.biased_by_distance:
        for name, side in (("enc", encoder), ("dec", decoder)):
            call.positions[name] = _positions(model, state, name, side)
    marker = marker_mask(encoder.padded.device)
    return PackedInputs(
        call,
        {
            _input_name("", encoder): unpad(encoder.padded, encoder.layout)[None],
            _input_name("decoder_", decoder): unpad(decoder.padded, decoder.layout)[None],
            "attention_mask": marker,
            "decoder_attention_mask": marker,
        },
        targets,
        encoder.came_packed,
        encoder.slots + decoder.slots,
    )


def _pack_single(
    model: Any, state: PatchState, given: dict[str, Any], parameters: frozenset[str]
) -> PackedInputs:
    labels = given.pop("labels", None) if state.heads_tokens else None
    cu_seqlens = given.get("cu_seqlens")
    masked = "attention_mask" in given or cu_seqlens is not None
    side = _take_side(given, "", state)
    name = "enc" if state.family.kind == "encoder_decoder" else "self"
    if side.came_packed and state.reads_rows:
        raise CannotPackError("cu_seqlens, and a head that reads rows")
    call = PackedCall(state, {name: side.layout})
    _refuse_pooling_over_padding(state, side.layout)

    arguments = {
        _input_name("", side): unpad(side.padded, side.layout)[None],
        "attention_mask": marker_mask(side.padded.device),
    }
    if "position_ids" in parameters:
        own = _in_rows("position_ids", given.pop("position_ids", None), side)
        if own is not None and not masked and bool((own.diff(dim=1) != 1).any()):
            raise CannotPackError(
                "position_ids that do not count up and no mask: transformers takes sequences out "
                "of them (give cu_seqlens instead)"
            )
        positions = _positions(model, state, name, side) if own is None else unpad(own, side.layout)
        arguments["position_ids"] = positions.long()[None]
    elif name in ("enc", "dec") and state.family.swaps and not state.family.biased_by_distance:
        call.positions[name] = _positions(model, state, name, side)
    if state.family.kind == "encoder" and "token_type_ids" in parameters:
        types = _in_rows("token_type_ids", given.pop("token_type_ids", None), side)
        if types is not None:
            arguments["token_type_ids"] = unpad(types, side.layout)[None]
    targets = None
    if labels is not None:
        labels, _ = _labels_in_rows(labels, cu_seqlens)
        targets = _targets(shifted(labels) if state.shifts_labels else labels, side)
    if isinstance(given.get("logits_to_keep"), int) and given["logits_to_keep"] == 0:
        del given["logits_to_keep"]
    return PackedInputs(call, arguments, targets, side.came_packed, side.slots)


# --------------------------------------------------------------------------------------- one side


def _take_side(
    given: dict[str, Any], prefix: str, state: PatchState, labels: Tensor | None = None
) -> _Side:
    """Take the ids or embeddings of one side out of ``given``, with what lays them out."""
    ids_name = f"{prefix}input_ids"
    embeds_name = f"{prefix}inputs_embeds"
    if (ids_name in given) == (embeds_name in given):
        raise CannotPackError(f"{ids_name} and {embeds_name}: both or neither are given")
    name = ids_name if ids_name in given else embeds_name
    tokens: Tensor = given.pop(name)
    if tokens.dim() != (2 if name == ids_name else 3) or 0 in tokens.shape[:2]:
        raise ValueError(
            f"{name} must be (rows, columns{'' if name == ids_name else ', hidden'}) and not "
            f"empty, got shape {tuple(tokens.shape)}"
        )
    mask = given.pop(f"{prefix}attention_mask", None)
    cu_seqlens = given.pop(f"{prefix}cu_seqlens", None)
    given.pop(f"{prefix}max_seqlen", None)  # collators pass it along; the layout knows it
    if cu_seqlens is not None:
        if tokens.shape[0] != 1:
            raise ValueError(
                f"{name} must be (1, total_tokens) when {prefix}cu_seqlens is given, "
                f"got shape {tuple(tokens.shape)}"
            )
        if mask is not None and not bool((mask != 0).all()):
            raise ValueError(f"{prefix}attention_mask must be all ones beside {prefix}cu_seqlens")
        layout = layout_from_cu_seqlens(cu_seqlens, tokens.shape[1], device=tokens.device)
        return _Side(layout, repad(tokens.squeeze(0), layout), True, layout.total_tokens)
    layout = _layout(f"{prefix}attention_mask", mask, name, tokens, state, labels)
    return _Side(layout, tokens, False, tokens.shape[0] * tokens.shape[1])


def _layout(
    mask_name: str,
    mask: Tensor | None,
    name: str,
    tokens: Tensor,
    state: PatchState,
    labels: Tensor | None,
) -> PackedLayout:
    rows, columns = tokens.shape[:2]
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise CannotPackError(f"{mask_name} is a {type(mask).__name__}")
        if mask.dim() != 2:
            raise CannotPackError(f"{mask_name} is {mask.dim()}-dimensional")
        if mask.shape != (rows, columns):
            raise ValueError(
                f"{mask_name} must have the shape of {name}, "
                f"got {tuple(mask.shape)} for {(rows, columns)}"
            )
        mask = mask.to(tokens.device)
        layout = layout_from_mask(mask)
        if layout.total_tokens == 0:
            raise ValueError(f"{mask_name} must mark at least one real token, got none")
        if state.counts_columns and _has_holes(layout):
            raise CannotPackError(
                f"{mask_name} has holes, and this model's attention counts the columns between "
                "tokens"
            )
        return layout
    if labels is None:
        return layout_from_lengths([columns] * rows, device=tokens.device)
    # Behind a row's last label nothing is asked of a causal decoder, so those slots are padding.
    if labels.shape != (rows, columns):
        raise ValueError(
            f"labels must have the shape of {name}, got {tuple(labels.shape)} for {(rows, columns)}"
        )
    column = torch.arange(1, columns + 1, device=labels.device)
    last = ((labels != IGNORE_INDEX) * column).amax(dim=1, keepdim=True)
    layout = layout_from_mask(column <= last)
    if layout.total_tokens == 0:
        raise CannotPackError("labels ask for nothing")
    return layout


def _has_holes(layout: PackedLayout) -> bool:
    if layout.total_tokens < 2:
        return False
    gap = layout.columns.diff() - layout.position_ids.diff()
    return bool((gap[layout.position_ids[1:] > 0] != 0).any())


def _in_rows(name: str, values: Tensor | None, side: _Side) -> Tensor | None:
    """Values that come one a token, in the padded rows of ``side``."""
    if values is None:
        return None
    expected = (1, side.layout.total_tokens) if side.came_packed else side.layout.padded_shape
    if values.dim() == 1:
        values = values[None]
    if values.shape != expected and values.shape != (1, expected[1]):
        raise ValueError(f"{name} must be {expected}, got {tuple(values.shape)}")
    if side.came_packed:
        return repad(values[0], side.layout)
    return values.expand(expected)


def _labels_in_rows(labels: Tensor, cu_seqlens: Any) -> tuple[Tensor, PackedLayout | None]:
    """Labels in padded rows, and the layout that they came packed in, if they did."""
    if labels.dim() != 2:
        raise ValueError(f"labels must be (rows, columns), got shape {tuple(labels.shape)}")
    if cu_seqlens is None:
        return labels, None
    layout = layout_from_cu_seqlens(cu_seqlens, labels.shape[1], device=labels.device)
    return repad(labels[0], layout, fill=IGNORE_INDEX), layout


def _positions(model: Any, state: PatchState, name: str, side: _Side) -> Tensor:
    """``(total_tokens,)`` int64: where the model would see each token in the padded batch."""
    rule = state.family.positions
    if rule is None or side.padded.dim() == 3:
        if rule is not None:
            raise CannotPackError(
                "positions that follow from ids, and inputs_embeds instead of ids"
            )
        return side.layout.columns.long()
    return unpad(rule(model, name, side.padded), side.layout)


def _targets(labels: Tensor, side: _Side) -> Targets:
    """The labels of the real tokens, once no other slot is asked for one."""
    if labels.shape != side.layout.padded_shape:
        raise ValueError(
            f"labels must have the shape of their inputs, {side.layout.padded_shape}, "
            f"got {tuple(labels.shape)}"
        )
    labels = labels.to(side.layout.device)
    targets = unpad(labels, side.layout)
    counts = [(values != IGNORE_INDEX).sum() for values in (labels, targets)]
    asked, num_valid = torch.stack(counts).tolist()
    if asked != num_valid:
        raise CannotPackError(
            "labels ask something of padding (set labels to -100 there and, for a causal model, "
            "at the first token behind padding)"
        )
    return Targets(targets, num_valid)


def _input_name(prefix: str, side: _Side) -> str:
    return f"{prefix}input_ids" if side.padded.dim() == 2 else f"{prefix}inputs_embeds"


# -------------------------------------------------------------------- what takes the model's path


def _refuse_what_only_the_model_can_do(
    model: Any, state: PatchState, given: dict[str, Any], parameters: frozenset[str]
) -> None:
    config = model.config
    if "labels" in given and state.heads_tokens and "_loss_function" in vars(model):
        raise CannotPackError("a loss_function of its own")
    if given.get("past_key_values") is not None or given.get("use_cache"):
        raise CannotPackError("a cache is in use")
    if (
        "use_cache" not in given
        and "use_cache" in parameters
        and getattr(config, "use_cache", False)
        and not (model.training or "labels" in given or state.reads_rows)
        and state.family.kind != "encoder"
    ):
        raise CannotPackError("a cache would be returned (pass use_cache=False)")
    given.pop("use_cache", None)
    for name in ("output_attentions", "output_router_logits"):
        asked = given.pop(name, None)
        if asked or (asked is None and getattr(config, name, False)):
            raise CannotPackError(f"{name} is set")
    rope = getattr(config, "rope_parameters", None)
    kinds = rope.values() if isinstance(rope, dict) else ()  # one dict, or one for each layer type
    if any(
        kind in ("dynamic", "longrope")
        or (isinstance(kind, dict) and kind.get("rope_type") in ("dynamic", "longrope"))
        for kind in kinds
    ):
        raise CannotPackError("rotary embeddings that change with the length of the padded batch")
    if getattr(config, "sparse_prediction", False):
        raise CannotPackError("sparse_prediction is set")


def _refuse_pooling_over_padding(state: PatchState, layout: PackedLayout) -> None:
    if not state.pools_first_token:
        return
    starts = layout.cu_seqlens[:-1].clamp(max=layout.total_tokens - 1)
    if bool((layout.lengths == 0).any()) or bool((layout.columns[starts] != 0).any()):
        raise CannotPackError("a pooler that reads the first column, and padding there")
