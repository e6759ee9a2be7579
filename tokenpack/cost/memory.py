"""How much memory a training step needs: every allocation and release of it, on the meta device.

    in use after operator i = once_i + gradients_i + encoder tokens * e_i + decoder tokens * d_i
    peak = the most over all operators

The model runs forward and backward on the meta device, where tensors have shapes alone, while
storages are followed from the operator that returns them to their release. Operators are the same
whatever the batch, so three runs, of which two have one side longer, give each its line. What is
in use at the peak for few tokens is gradients, for many what the forward kept.

Attention keeps what fused attention keeps. Tensors that grow with the square of a length (masks,
biases that a padded model builds) are taken at rows of a few tokens, so as good as left out.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ..kernels.linear_loss import smallest_chunk
from .traffic import attention_left_out, inputs_of

_ROWS, _SHORT, _LONG = 256, 16, 32
_LOSS = torch.ops.tokenpack.linear_cross_entropy_and_gradients.default
_STATE = 4 + 8  # bytes of a parameter that stay: the weight, AdamW's moments
_SPARE = 0.1  # of a device's memory: fragments, libraries, a batch that is longer than most
_GRADIENT = 4  # bytes of a gradient in float32, which it is beside activations of any dtype


@dataclass(frozen=True)
class StepMemory:
    """What a step has in use as each of its operators returns, weights and optimizer excepted.

    Attributes:
        lines: ``(operators, 4)`` bytes: whatever the batch is; of gradients that are there, and
            of the weights' 16-bit copies; of a token of the encoder; of one of the decoder.
            Without operators that never are the peak.
    """

    lines: np.ndarray

    def peak(self, encoder_tokens: float, decoder_tokens: float, share: float = 1.0) -> int:
        """Most bytes in use in a step over so many tokens.

        Args:
            share: of gradients and copies that a device holds: less than 1 where they are sharded.
        """
        return round(float((self.lines @ (1.0, share, encoder_tokens, decoder_tokens)).max()))

    def most_tokens(self, memory: float, decoder_share: float, share: float = 1.0) -> int:
        """How many tokens of both sides fit into ``memory`` bytes; 0 where none do.

        Args:
            decoder_share: of the tokens, how many are the decoder's; 1 for decoder-only models.
            share: as in `peak`.
        """
        free = memory - self.lines[:, :2] @ (1.0, share)
        of_token = self.lines[:, 2:] @ (1.0 - decoder_share, decoder_share)
        if (free < 0).any():
            return 0
        grows = of_token > 0
        return int((free[grows] / of_token[grows]).min())


def state_memory(parameters: int) -> int:
    """Bytes of trained parameters in float32 and AdamW's two states."""
    return _STATE * parameters


def token_budget(
    step: StepMemory, decoder_share: float, parameters: int, memory: int, *, devices: int = 1
) -> int:
    """Tokens of both sides that a micro-batch may have, so that a step fits into ``memory``.

    Args:
        step: of the model; see `count_memory`.
        decoder_share: of the tokens, how many are the decoder's; 1 for decoder-only models.
        parameters: how many are trained, with AdamW in float32.
        memory: bytes of a device, of which a tenth is left alone.
        devices: that share weights, gradients and optimizer (FSDP); what is gathered of them for
            a layer at a time is not counted.

    Returns:
        0 where not even weights, gradients and optimizer fit.
    """
    free = (1 - _SPARE) * memory - state_memory(parameters) / devices
    return step.most_tokens(free, decoder_share, 1 / devices)


def count_memory(model: nn.Module, device_type: str, *, packed: bool) -> StepMemory:
    """Follow the memory of a training step.

    Args:
        model: a transformers language model on the meta device, encoder-decoder or decoder-only,
            as it comes: not patched. Its dtype is that of the activations; gradients are taken to
            be in float32, and beside 16-bit activations the weights' copies of that dtype.
        device_type: ``cpu`` or ``cuda``, which the loss goes through in chunks of other sizes.
        packed: whether the loss is the patched model's, without the logits of all tokens.

    Raises:
        ValueError: if it is not on the meta device.
    """
    two_sided = model.config.is_encoder_decoder  # type: ignore[union-attr]
    chunk = smallest_chunk(device_type) if packed else None
    with attention_left_out(model):
        short = _follow(model, _SHORT, _SHORT, chunk)
        decoder = _follow(model, _SHORT, _LONG, chunk)
        encoder = _follow(model, _LONG, _SHORT, chunk) if two_sided else short
    more = _ROWS * (_LONG - _SHORT)
    of_encoder = (encoder - short)[:, 0] / more
    of_decoder = (decoder - short)[:, 0] / more
    once = short[:, 0] - _ROWS * _SHORT * (of_encoder + of_decoder)
    return StepMemory(_upper(np.stack([once, short[:, 1], of_encoder, of_decoder], axis=1)))


def _upper(lines: np.ndarray) -> np.ndarray:
    """Without lines that another is nowhere below."""
    lines = np.unique(lines, axis=0)
    kept: list[np.ndarray] = []
    for line in lines[np.argsort(-lines.sum(1))]:
        if not any((line <= other).all() for other in kept):
            kept.append(line)
    return np.array(kept)


def _follow(model: nn.Module, encoder: int, decoder: int, chunk: int | None) -> np.ndarray:
    """``(operators, 2)``: bytes in use beside gradients and copies of weights, and of these.

    ``chunk``: rows of the packed loss that go through the head at once, at least.
    """
    targets, inputs = inputs_of(model, _ROWS, encoder, decoder)
    weights = list(model.parameters())
    copies = sum(each.numel() for each in weights) * weights[0].element_size()
    loss: list[Tensor] = []

    def head(module: Any, args: tuple[Tensor]) -> Any:
        hidden, weight, bias = args[0].flatten(0, 1), module.weight, module.bias
        needs = (hidden.requires_grad, weight.requires_grad, bias is not None)
        of_tokens = hidden.new_empty(hidden.shape[0])
        options = (0.0, 0.0, 0.0, 1.0, hidden.dtype, targets.numel())
        total, *_ = _LOSS(of_tokens, hidden, weight, bias, targets.flatten(), *options, *needs)
        loss.append(total)
        return (args[0][:1, :1],)  # a token's logits are the model's to see

    model.train()
    model.zero_grad()
    with _InUse(0 if weights[0].dtype == torch.float32 else copies, chunk) as seen:
        hooks = [
            each.register_post_accumulate_grad_hook(seen.land)
            for each in weights
            if each.requires_grad
        ]
        if chunk is not None:
            hooks.append(model.get_output_embeddings().register_forward_pre_hook(head))  # type: ignore[operator]
        else:
            inputs["labels"] = targets
        try:
            seen.ignore([*weights, *model.buffers(), *inputs.values(), targets])
            own = model(**inputs).loss  # the logits are not held on to, as in a training step
            (own if chunk is None else loss[0]).backward()
        finally:
            for hook in hooks:
                hook.remove()
    return np.array(seen.events, dtype=np.float64)


class _InUse(TorchDispatchMode):
    """Follows storages from the operator that returns them until they are released.

    Attributes:
        events: bytes in use after each operator beside gradients and copies, and of these.
    """

    def __init__(self, copies: int, chunk: int | None) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        self._now, self._gradients, self._chunk = 0, copies, chunk
        self._sizes = WeakIdKeyDictionary()  # by storage: a list of its bytes, 0 once landed

    def ignore(self, tensors: list[Tensor]) -> None:
        """Do not count what was there before."""
        for tensor in tensors:
            self._sizes[tensor.untyped_storage()] = [0]

    def land(self, weight: Tensor) -> None:
        """Count a weight's gradient as such from now on."""
        assert weight.grad is not None
        size = self._sizes[weight.grad.untyped_storage()]
        self._now -= size[0]
        size[0] = 0
        self._gradients += weight.numel() * _GRADIENT
        self.events.append((self._now, self._gradients))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage() not in self._sizes:
                storage = leaf.untyped_storage()
                self._sizes[storage] = size = [storage.nbytes()]
                weakref.finalize(storage, self._release, size).atexit = False
                self._now += size[0]
        self.events.append((self._now, self._gradients))
        if function is _LOSS:
            # Inside it has a chunk's logits: so many rows, or as large as the hidden states.
            hidden, weight = args[1:3]
            for elements in (self._chunk * weight.shape[0], hidden.numel()):
                inside = elements * weight.element_size()
                self.events.append((self._now + inside, self._gradients))
        return result

    def _release(self, size: list[int]) -> None:
        self._now -= size[0]
