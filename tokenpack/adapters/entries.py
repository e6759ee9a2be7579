"""The parts of a model that can be called by themselves, and how each of them packs.

Every `PreTrainedModel` inside a model is such a part: the model, its base model, its stacks. The
part that is called packs the batch. The parts inside it find the `PackedCall` among their keywords
and run their own forward.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .call import ENTRY, ROLE, SIDE, WATCHED, Entry, PatchState
from .family import Family
from .pooler import first_token_forward

# Suffixes of the class names of heads that read each token separately ...
_CAUSAL_HEADS = ("ForCausalLM", "LMHeadModel")
_TOKEN_HEADS = (
    *_CAUSAL_HEADS,
    "ForConditionalGeneration",
    "ForMaskedLM",
    "ForTokenClassification",
    "MTModel",
)
# ... and of heads that read one real token of each row. A question-answering head is neither: it
# compares all columns of a row, including padding.
_ROW_HEADS = ("ForSequenceClassification",)
_STACKS = ("Encoder", "Decoder", "Stack", "DecoderWrapper")
_WRAPPERS = ("DecoderWrapper",)
_CROSS = re.compile(r"EncDecAttention|encoder_attn|crossattention")


def parts_of(model: nn.Module) -> list[tuple[str, PreTrainedModel]]:
    """The parts of ``model`` that can be called by themselves, by name. The first is the model."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, PreTrainedModel)]


def is_wrapper(part: PreTrainedModel) -> bool:
    """Whether the part only hands its arguments to the stack inside."""
    return type(part).__name__.endswith(_WRAPPERS)


def reads_rows(part: PreTrainedModel) -> bool:
    """Whether the part has a head that reads one token of each padded row."""
    return type(part).__name__.endswith(_ROW_HEADS)


def entry_of(part: Any, state: PatchState) -> Entry:
    """How a part packs."""
    name, family = type(part).__name__, state.family
    assert family is not None
    parameters = parameters_of(part)
    is_stack = name.endswith(_STACKS) and family.kind == "encoder_decoder"
    if family.kind != "encoder_decoder":
        sides: tuple[str, ...] = ("self",)
    elif "decoder_input_ids" in parameters:
        sides = ("enc", "dec")
    else:
        sides = (side_of(part) if is_stack else "enc",)
    children = {child: type(module).__name__ for child, module in part.named_children()}
    makes_cache = len(parts_of(part)) == 1 and "use_cache" in parameters
    poolers = (c for c, t in children.items() if family.swaps.get(t) is first_token_forward)
    return Entry(
        state,
        parameters,
        sides,
        unpackable=_head_reason(part),
        is_stack=is_stack,
        has_token_head=name.endswith(_TOKEN_HEADS),
        shifts_labels=name.endswith(_CAUSAL_HEADS),
        pooler=next(poolers, None),
        calls_loss_function="loss_function" in inspect.unwrap(part.forward).__code__.co_names,
        makes_cache=makes_cache and family.kind != "encoder" and sides != ("enc",),
    )


def parameters_of(part: PreTrainedModel) -> tuple[str, ...]:
    """The names of the parameters of a part's forward that may be passed by position."""
    parameters = inspect.signature(part.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def side_of(stack: Any) -> str:
    """``"dec"`` for a stack of decoder layers, whatever contains it. Otherwise ``"enc"``."""
    is_decoder = getattr(stack, "is_decoder", None)  # of a T5Stack; BART's has a class of its own
    if is_decoder is None:
        is_decoder = "Decoder" in type(stack).__name__
    return "dec" if is_decoder else "enc"


def tag_attention(model: PreTrainedModel, family: Family) -> None:
    """Set the role of each attention module, and the side of each position table.

    In an encoder-decoder the role comes from the stack itself, so that it is right wherever the
    stack hangs.
    """
    if family.kind != "encoder_decoder":
        _tag_stack(model, "self")
        return
    for _, part in parts_of(model):
        if type(part).__name__.endswith(_STACKS):
            _tag_stack(part, side_of(part))


def _tag_stack(stack: nn.Module, side: str) -> None:
    for name, module in stack.named_modules():
        if "Attention" in type(module).__name__:
            module.__dict__[ROLE] = "cross" if side == "dec" and _CROSS.search(name) else side
        elif "PositionalEmbedding" in type(module).__name__:
            module.__dict__[SIDE] = side


def watch_attention(model: nn.Module, state: PatchState) -> None:
    """Let the first attention of a model report forwards that go around its entries."""
    for module in model.modules():
        if ROLE in vars(module) and not any(ROLE in vars(c) for c in module.children()):
            module.__dict__[WATCHED] = state
            return


def whole_reason(model: PreTrainedModel, family: Family | None) -> str | None:
    """Why no part of a model can be packed. None if its parts can be."""
    name = type(model).__name__
    if family is None:
        return f"unknown family {model.config.model_type!r}"
    if family.kind == "encoder_decoder" and name.endswith("ForCausalLM"):
        return f"{name} is a decoder without its encoder"
    if family.kind == "encoder" and getattr(model.config, "is_decoder", False):
        return f"{name} is an encoder configured as a decoder"
    for option in ("output_attentions", "reorder_and_upcast_attn", "add_cross_attention"):
        if getattr(model.config, option, False):
            return f"{option} is set in the config"
    return None


def _head_reason(part: Any) -> str | None:
    name = type(part).__name__
    known = (*_TOKEN_HEADS, *_ROW_HEADS, *_STACKS, "Model")
    if not name.endswith(known) or name.endswith("HeadsModel"):
        return f"{name} has a head that is not known to ignore padding"
    if not type(part).forward.__module__.startswith("transformers."):
        return f"{name} has a custom forward"
    return None


def is_entry(module: Any) -> bool:
    """Whether `patch_model` has made ``module`` an entry."""
    return ENTRY in vars(module)
