"""The calls of one entry: every way of giving a batch that the part's forward takes.

Encoder and decoder batches have different widths, so the shape of an output says to which side it
belongs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from .families import EOS, NUM_LABELS, PAD, VOCABULARY, WIDTH, Case

ROWS, COLUMNS, DECODER_COLUMNS = 4, 6, 5
LENGTHS = (COLUMNS, 1, 4, 3)
DECODER_LENGTHS = (2, DECODER_COLUMNS, 1, 4)

# The variants of a part that is not the top of its model. The class of the part has a case of its
# own with all variants.
INNER = frozenset(
    {"right", "left", "holes", "inputs_embeds", "return_dict=False", "positional", "stream"}
)

_CAUSAL = ("ForCausalLM", "LMHeadModel", "DoubleHeadsModel")


@dataclass
class Call:
    """One call: the arguments, and the real slots of each side."""

    kwargs: dict[str, Any]
    masks: list[Tensor] = field(default_factory=list)
    args: tuple[Any, ...] = ()
    has_token_labels: bool = False  # then a packed call in training returns no logits
    stream: dict[str, Any] | None = None  # the same tokens with cu_seqlens, for the patched model

    def real(self, name: str, output: Tensor) -> Tensor:
        """The values of an output at real slots. A tuple's outputs have numbers as names."""
        masks = self.masks
        if not name[0].isdigit():
            masks = masks[:1] if name.startswith("encoder_") else masks[-1:]
        if output.dim() < 2 or name.startswith("cross"):
            return output
        for mask in masks:
            if output.shape[:2] == mask.shape:
                return output[mask]
        return output


@dataclass(frozen=True)
class Signature:
    """What a part takes."""

    case: Case
    part: hf.PreTrainedModel
    entry: str

    @functools.cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        # A wrapper hands everything to the decoder inside.
        part = self.part.decoder if type(self.part).__name__.endswith("Wrapper") else self.part
        return dict(inspect.signature(type(part).forward).parameters)

    def takes(self, name: str) -> bool:
        return name in self.parameters

    @property
    def two_sided(self) -> bool:
        return self.takes("decoder_input_ids")

    @property
    def is_causal(self) -> bool:
        if self.case.kind == "encoder_decoder":
            name = type(self.part).__name__
            is_decoder = getattr(self.part, "is_decoder", "Decoder" in name)
            return bool(is_decoder) or name.endswith("ForCausalLM")
        return self.case.kind == "decoder" or getattr(self.part.config, "is_decoder", False)


def _ids(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, columns), generator=generator)


def _random(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _mask(lengths: tuple[int, ...], columns: int, padding: str) -> Tensor:
    column, length = torch.arange(columns), torch.tensor(lengths)[:, None]
    real = column >= columns - length if padding == "left" else column < length
    return real.long()


def _side(lengths: tuple[int, ...], columns: int, padding: str, seed: int) -> tuple[Tensor, Tensor]:
    """Ids and mask. The last real id of each row is EOS, as some classifiers require."""
    mask = _mask(lengths, columns, padding)
    ids = torch.where(mask.bool(), _ids(len(lengths), columns, seed), PAD)
    last = columns - 1 - mask.flip(1).argmax(1)
    ids[torch.arange(len(lengths)), last] = EOS
    return ids, mask


def _labels(signature: Signature, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Labels for the head of a top entry; none for a part without a head."""
    name, rows = signature.case.name, len(ids)
    row = torch.arange(rows)
    if signature.entry != "top" or not (
        signature.takes("labels") or signature.takes("start_positions")
    ):
        return {}
    if "QuestionAnswering" in name:
        return {"start_positions": row * 0, "end_positions": row % 2}
    if "NextSentence" in name:
        return {"labels": row % 2}
    if "MultipleChoice" in name:
        return {"labels": row[: rows // 2] % 2}
    if "SequenceClassification" in name:
        return {"labels": row % NUM_LABELS}
    if "ForPreTraining" in name:
        labels = torch.where(mask.bool(), ids, -100)
        return {"labels": labels, "next_sentence_label": row % 2}
    if signature.two_sided:
        labels = _ids(rows, DECODER_COLUMNS, 5)
        keep = _mask(DECODER_LENGTHS[:rows], DECODER_COLUMNS, "right").bool()
        labels = torch.where(keep, labels, -100)
        labels[0, 0] = PAD
        labels[min(1, rows - 1), 2] = -100
        return {"labels": labels}
    classes = NUM_LABELS if "TokenClassification" in name else VOCABULARY
    labels = torch.where(mask.bool(), _ids(*ids.shape, 6) % classes, -100)
    labels[0, 3] = -100
    if name.endswith(_CAUSAL):
        # No real token predicts the first token after padding.
        labels = torch.where(mask.cumsum(1) > 1, labels, -100)
    return {"labels": labels}


def make_call(
    signature: Signature,
    dtype: torch.dtype,
    *,
    labels: bool,
    padding: str = "right",
    lengths: tuple[int, ...] = LENGTHS,
    decoder_mask: str | None = None,
    change: Callable[[Tensor, Tensor], None] | None = None,
) -> Call:
    """A call with ids and a mask. ``change`` changes the ids and the mask in place."""
    ids, mask = _side(lengths, COLUMNS, padding, 1)
    if change is not None:
        change(ids, mask)
    kwargs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    call = Call(kwargs, [mask.bool()])
    given = _labels(signature, ids, mask) if labels else {}
    if "MultipleChoice" in signature.case.name and signature.entry == "top":
        for name in ("input_ids", "attention_mask"):
            kwargs[name] = kwargs[name].view(2, -1, COLUMNS)
    if signature.two_sided:
        rows = len(lengths)
        real = torch.ones(rows, DECODER_COLUMNS, dtype=torch.bool)
        is_token_label = given.get("labels", torch.empty(0)).dim() == 2
        if is_token_label:
            real = given["labels"].ne(-100).flip(1).cumsum(1).flip(1) > 0
        else:
            side = decoder_mask or "right"
            ids_of_decoder, mask_of_decoder = _side(
                DECODER_LENGTHS[:rows], DECODER_COLUMNS, side, 2
            )
            kwargs["decoder_input_ids"] = ids_of_decoder
            if decoder_mask is not None:
                kwargs["decoder_attention_mask"] = mask_of_decoder
                real = mask_of_decoder.bool()
        call.masks.append(real)
        if "SequenceClassification" in signature.case.name and signature.entry == "top":
            # It derives decoder inputs from input_ids, and reads EOS of input_ids.
            for name in ("decoder_input_ids", "decoder_attention_mask"):
                kwargs.pop(name, None)
            call.masks[-1] = torch.ones(rows, COLUMNS, dtype=torch.bool)
    kwargs.update(given)
    call.has_token_labels = given.get("labels", torch.empty(0)).dim() == 2
    if signature.takes("use_cache"):
        kwargs["use_cache"] = False
    return call


def _as_stream(call: Call) -> Call:
    """Give the patched model only the real tokens, in one row."""
    kwargs = {n: value for n, value in call.kwargs.items() if not n.endswith("attention_mask")}
    per_token = {"input_ids": call.masks[0], "decoder_input_ids": call.masks[-1]}
    if call.has_token_labels:
        per_token["labels"] = call.masks[-1]
    for name, mask in per_token.items():
        if name in kwargs:
            kwargs[name] = kwargs[name][mask][None]
    for prefix, mask in zip(("", "decoder_"), call.masks):
        kwargs[f"{prefix}cu_seqlens"] = nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    call.stream = kwargs
    return call


def _holes(ids: Tensor, mask: Tensor) -> None:
    mask[0, 2:4] = 0
    mask[2, 1] = 0


def _pad_inside(ids: Tensor, mask: Tensor) -> None:
    ids[0, 2] = ids[2, 0] = PAD


def _pad_last(ids: Tensor, mask: Tensor) -> None:
    ids[0, -2] = PAD
    ids[2, 2] = PAD


def _text_pad(ids: Tensor, mask: Tensor) -> None:
    """The pad id of the text is not that of the config."""
    ids[mask == 0] = 9


def _with_embeds(call: Call, dtype: torch.dtype, prefix: str = "") -> Call:
    ids = call.kwargs.pop(f"{prefix}input_ids")
    call.kwargs[f"{prefix}inputs_embeds"] = _random((*ids.shape, WIDTH), 7, dtype)
    return call


def _with_4d_mask(call: Call, signature: Signature, dtype: torch.dtype) -> Call:
    mask = call.kwargs["attention_mask"].bool()
    # Cross-attention reads the mask of the encoder too, with other queries.
    seen = mask[:, None, None, :].expand(-1, 1, 1 if signature.two_sided else COLUMNS, -1)
    if signature.is_causal:
        seen = seen & torch.ones(COLUMNS, COLUMNS, dtype=torch.bool).tril()
    call.kwargs["attention_mask"] = torch.zeros(seen.shape, dtype=dtype).masked_fill(
        ~seen, torch.finfo(dtype).min
    )
    return call


def _by_position(call: Call, signature: Signature) -> Call:
    names = list(signature.parameters)[1:]
    kinds = [signature.parameters[name].kind for name in names]
    named = [n for n, kind in zip(names, kinds) if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    # The base models of transformers do not take `use_cache` by position.
    named = named[: named.index("use_cache")] if "use_cache" in named else named
    last = max(named.index(name) for name in call.kwargs if name in named)
    values = []
    for name in named[: last + 1]:
        default = signature.parameters[name].default
        default = None if default is inspect.Parameter.empty else default
        values.append(call.kwargs.pop(name, default))
    call.args = tuple(values)
    return call


def calls(signature: Signature, dtype: torch.dtype, labels: bool) -> Iterator[tuple[str, Call]]:
    """Each variant that the entry takes, by name. The first is "right"."""
    for name, call in _all_calls(signature, dtype, labels):
        if signature.entry == "top" or name in INNER:
            yield name, call


def _all_calls(
    signature: Signature, dtype: torch.dtype, labels: bool
) -> Iterator[tuple[str, Call]]:
    def make(**options: Any) -> Call:
        return make_call(signature, dtype, **{"labels": labels, **options})

    multiple_choice = "MultipleChoice" in signature.case.name and signature.entry == "top"
    # No token predicts the only token of a row.
    causal = not signature.two_sided and signature.case.name.endswith(_CAUSAL)
    yield "right", make()
    yield "left", make(padding="left")
    yield "holes", make(change=_holes)
    yield "all real", make(lengths=(COLUMNS,) * ROWS)
    call = make(lengths=(COLUMNS,) * ROWS)
    del call.kwargs["attention_mask"]
    yield "no mask", call
    call = make()
    del call.kwargs["attention_mask"]
    call.masks[0] = torch.ones_like(call.masks[0])
    yield "padded without a mask", call
    if not multiple_choice:
        yield "one row", make(lengths=LENGTHS[2:3])
        yield "one row of length 1", make(lengths=LENGTHS[1:2], labels=labels and not causal)
    yield "pad inside", make(change=_pad_inside)
    yield "pad last", make(change=_pad_last)
    yield "another pad right", make(change=_text_pad)
    yield "another pad left", make(padding="left", change=_text_pad)
    yield "labels the other way", make(labels=not labels)
    # An encoder stack of T5 alone refuses a cache.
    is_encoder = signature.case.kind == "encoder_decoder" and not signature.is_causal
    may_cache = signature.two_sided or not is_encoder
    if signature.takes("use_cache") and may_cache:
        call = make()
        del call.kwargs["use_cache"]
        if labels:
            # A packed call returns no cache, and everything after it by the same position.
            options = {"return_dict": False, "output_hidden_states": True}
            yield "default cache in training", _and(call, **options)
        else:
            yield "default cache", call
    yield "output_hidden_states", _and(make(), output_hidden_states=True)
    yield "return_dict=False", _and(make(), return_dict=False)
    yield "positional", _by_position(make(), signature)
    top_of_two_sides = signature.two_sided and signature.entry == "top"
    reads_ids = top_of_two_sides and "SequenceClassification" in signature.case.name
    if signature.takes("inputs_embeds") and not reads_ids:
        yield "inputs_embeds", _with_embeds(make(), dtype)
        yield "inputs_embeds left", _with_embeds(make(padding="left"), dtype)
    if not multiple_choice:
        yield "stream", _as_stream(make())
        yield "4-D mask", _with_4d_mask(make(), signature, dtype)
    yield from _of_one_side(signature, dtype, make)
    if reads_ids:
        yield from _of_row_heads(make)
    elif signature.two_sided:
        yield from _of_two_sides(signature, dtype, make)
    if top_of_two_sides and "QuestionAnswering" in signature.case.name:
        call = make()
        del call.kwargs["decoder_input_ids"]  # the model derives them from input_ids
        call.masks[-1] = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
        yield "no decoder inputs", call


def _of_one_side(
    signature: Signature, dtype: torch.dtype, make: Callable[..., Call]
) -> Iterator[tuple[str, Call]]:
    shape = (ROWS, COLUMNS)
    if "MultipleChoice" in signature.case.name and signature.entry == "top":
        shape = (2, ROWS // 2, COLUMNS)
    if signature.takes("logits_to_keep"):
        for keep in (0, 2):
            yield f"logits_to_keep={keep}", _and(make(labels=False), logits_to_keep=keep)
    if signature.takes("position_ids"):
        own = torch.tensor([0, 1, 2, 3, 4, 5]).expand(shape)
        yield "position_ids", _and(make(), position_ids=own + 2)
        restarts = torch.tensor([0, 1, 2, 0, 1, 2]).expand(shape)
        yield "restarting position_ids", _and(make(), position_ids=restarts)
        call = _and(make(lengths=(COLUMNS,) * ROWS), position_ids=restarts)
        del call.kwargs["attention_mask"]
        yield "restarting position_ids without a mask", call
        if len(shape) == 2:
            call = make(lengths=(COLUMNS,))
            del call.kwargs["attention_mask"]
            call.kwargs["position_ids"] = restarts[:1]
            yield "one restarting row", call
    if signature.takes("token_type_ids") and signature.case.kind == "encoder":
        types = (torch.arange(COLUMNS) // 3).expand(shape)
        limit = getattr(signature.part.config, "type_vocab_size", 2)
        yield "token_type_ids", _and(make(), token_type_ids=types % limit)
    if not signature.two_sided and signature.takes("encoder_hidden_states"):
        hidden = _random((ROWS, 7, WIDTH), 8, dtype)
        mask = _mask((7, 2, 1, 4), 7, "right")
        has_cross = getattr(signature.part.config, "add_cross_attention", False)
        if has_cross or (signature.case.kind == "encoder_decoder" and signature.is_causal):
            yield "encoder_hidden_states", _and(make(), encoder_hidden_states=hidden)
            call = _and(make(), encoder_hidden_states=hidden, encoder_attention_mask=mask)
            yield "encoder_hidden_states with a mask", call


def _of_two_sides(
    signature: Signature, dtype: torch.dtype, make: Callable[..., Call]
) -> Iterator[tuple[str, Call]]:
    for side in ("right", "left"):
        yield f"decoder {side}", make(labels=False, decoder_mask=side)
        yield f"both {side}", make(labels=False, decoder_mask=side, padding=side)
    call = _with_embeds(make(labels=False, decoder_mask="right"), dtype, "decoder_")
    yield "decoder_inputs_embeds", call
    hidden = _random((ROWS, COLUMNS, WIDTH), 9, dtype)
    call = make(decoder_mask="right")
    del call.kwargs["input_ids"]
    yield "encoder_outputs", _and(call, encoder_outputs=BaseModelOutput(last_hidden_state=hidden))


def _of_row_heads(make: Callable[..., Call]) -> Iterator[tuple[str, Call]]:
    """Decoder inputs of their own. The head reads the decoder where input_ids has EOS."""
    for name in ("decoder inputs", "decoder right", "decoder mask hides EOS"):
        call = make()
        call.kwargs["decoder_input_ids"] = _ids(ROWS, COLUMNS, 3)
        if name != "decoder inputs":
            mask = _mask(LENGTHS, COLUMNS, "right")
            if name == "decoder mask hides EOS":
                mask[2, LENGTHS[2] - 1] = 0
            call.kwargs["decoder_attention_mask"] = mask
            call.masks[-1] = mask.bool()
        yield name, call


def _and(call: Call, **more: Any) -> Call:
    call.kwargs.update(more)
    return call
