"""Count the bytes that a training step moves outside of matrix products and attention.

    moved = sum over operators of (bytes of their tensor arguments + bytes of their results)

Nothing is computed. The model runs forward and backward on the meta device, where tensors have
shapes but no data, and a dispatch mode looks at every operator. Matrix products and attention are
left out, because operations determine their time; views move nothing. Three runs, two of them with
one side longer, separate the bytes per encoder token, per decoder token, and per step.

A padded model writes the logits of all tokens, and a patched model computes them in chunks. The
logits of the head are therefore counted separately.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

_STAND_IN = "tokenpack_counted"  # name of an attention function that computes nothing
_ROWS, _SHORT, _LONG = 2, 16, 32

_PRODUCTS = frozenset(f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "addbmm"))
_ALLOCATIONS = frozenset(
    f"aten::{name}" for name in ("empty", "empty_like", "new_empty", "empty_strided")
)
_GATHERS = frozenset({"aten::embedding", "aten::index_select", "aten::index", "aten::gather"})


@dataclass(frozen=True)
class Traffic:
    """Bytes that one forward and backward pass moves, per token and per pass.

    Attributes:
        moved_per_encoder_token: bytes read and written per encoder token, outside of products and
            attention, without the loss.
        moved_per_decoder_token: the same per decoder token.
        moved_once: bytes that do not depend on the batch, such as accumulated gradients and zeroed
            gradients of embedding tables.
        loss_moved_per_token: bytes per decoder token of a loss on the logits of all tokens.
        logits_per_token: bytes of a token's logits.
        calls: number of operators, including products and attention.
    """

    moved_per_encoder_token: float
    moved_per_decoder_token: float
    moved_once: float
    loss_moved_per_token: float
    logits_per_token: float
    calls: int


def count_traffic(model: nn.Module) -> Traffic:
    """Count the bytes that ``model`` moves in a training step.

    Args:
        model: a transformers language model on the meta device, encoder-decoder or decoder-only,
            not patched. Its dtype is that of the activations.

    Returns:
        The bytes per token and per step.

    Raises:
        ValueError: if the model is not on the meta device.
    """
    tokens = _ROWS * (_LONG - _SHORT)
    with without_attention(model):
        short = _run(model, _SHORT, _SHORT)
        decoder = (_run(model, _SHORT, _LONG).moved - short.moved) / tokens
        encoder = 0.0
        if model.config.is_encoder_decoder:  # type: ignore[union-attr]
            encoder = (_run(model, _LONG, _SHORT).moved - short.moved) / tokens
        with_loss = _run(model, _SHORT, _SHORT, loss=True)
    tokens = _ROWS * _SHORT
    return Traffic(
        moved_per_encoder_token=encoder,
        moved_per_decoder_token=decoder,
        moved_once=max(short.moved - tokens * (encoder + decoder), 0.0),
        loss_moved_per_token=(with_loss.moved - short.moved) / tokens,
        logits_per_token=short.logits,
        calls=with_loss.calls,
    )


def count_calls(run: Callable[[], object]) -> int:
    """Number of operators that ``run`` dispatches, counted as in `Traffic`."""
    with _Operators() as operators:
        run()
    return operators.calls


@contextmanager
def without_attention(model: nn.Module) -> Iterator[None]:
    """Replace attention by a function that computes nothing and saves what fused attention saves.

    Raises:
        ValueError: if the model is not on the meta device.
    """
    if any(parameter.device.type != "meta" for parameter in model.parameters()):
        raise ValueError(
            "model must be on the meta device, got parameters on another device; build it under "
            "torch.device('meta')"
        )
    AttentionInterface.register(_STAND_IN, _attend)
    config: Any = model.config
    # Encoder and decoder have copies, which set_attn_implementation skips in some versions.
    configs = [getattr(module, "config", None) for module in model.modules()]
    before = [(c, c._attn_implementation) for c in {id(c): c for c in configs if c}.values()]
    cached, config.use_cache = config.use_cache, False
    for each, _ in before:
        each._attn_implementation = _STAND_IN
    try:
        yield
    finally:
        for each, implementation in before:
            each._attn_implementation = implementation
        config.use_cache = cached
        model.zero_grad()


def make_inputs(
    model: nn.Module, rows: int, encoder: int, decoder: int
) -> tuple[Tensor, dict[str, Any]]:
    """Targets and inputs for ``rows`` full rows; ``encoder`` is unused for a decoder-only model."""
    targets = torch.zeros(rows, decoder, dtype=torch.long, device="meta")
    ids = targets
    inputs: dict[str, Any] = {}
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        ids = torch.zeros(rows, encoder, dtype=torch.long, device="meta")
        inputs["decoder_input_ids"] = targets
    return targets, {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


@dataclass
class _PassCount:
    moved: float = 0.0
    logits: float = 0.0
    calls: int = 0


def _run(model: nn.Module, encoder: int, decoder: int, loss: bool = False) -> _PassCount:
    """One pass over full rows of ``encoder`` and ``decoder`` tokens."""
    targets, inputs = make_inputs(model, _ROWS, encoder, decoder)
    model.train()
    model.zero_grad()
    with _Operators() as operators:
        out = model(**inputs, labels=targets if loss else None)
        if loss:
            out.loss.backward()
        else:
            out.logits.backward(torch.empty_like(out.logits))
    logits = out.logits.numel() * out.logits.element_size() / targets.numel()
    return _PassCount(float(operators.moved), logits, operators.calls)


class _Operators(TorchDispatchMode):
    """Counts operators, and the bytes that each reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name
        if function.is_view or name in _ALLOCATIONS:
            return result
        self.calls += 1
        if name in _PRODUCTS:
            return result
        written = _bytes(result)
        # A gather reads only the rows that it returns, not the whole table.
        self.moved += 2 * written if name in _GATHERS else written + _bytes((args, kwargs))
        return result


def _bytes(tree: object) -> int:
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)


class _StandIn(torch.autograd.Function):
    """Saves for the backward what fused attention saves, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        q, k, v, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, None]:
    return _StandIn.apply(query, key, value), None
