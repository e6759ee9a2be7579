"""Predict the memory of a training step: follow its allocations and releases on the meta device.

    in use after operator i = once_i + gradients_i + encoder tokens * e_i + decoder tokens * d_i
    peak = max over all operators

The model runs forward and backward on the meta device, where tensors have shapes but no data. A
dispatch mode follows each storage from the operator that returns it to its release. The operators
are the same for every batch, so three runs, two of them with one side longer, give the line of each
operator. At the peak, gradients dominate for few tokens, and saved activations for many.

Attention keeps what fused attention keeps. Tensors that grow with the square of a length (masks,
and the biases of a padded model) are measured with short rows, so they are hardly included.

`allocations.py` measures the peak of a call that really runs.
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

from ..kernels.head_chunks import smallest_chunk
from .traffic import make_inputs, without_attention

_ROWS, _SHORT, _LONG = 256, 16, 32
_LOSS = torch.ops.tokenpack.linear_cross_entropy_and_gradients.default
_STATE = 4 + 8  # bytes per parameter of the weight and of AdamW's moments
_SPARE = 0.1  # share of the memory for fragmentation, libraries and unusually long batches
_GRADIENT = 4  # bytes per parameter: gradients are float32 for activations of any dtype


@dataclass(frozen=True)
class StepMemory:
    """Memory that a step has in use after each operator, without weights and optimizer states.

    Attributes:
        lines: ``(operators, 4)`` float64, in bytes. The columns are: memory that does not depend on
            the batch; gradients so far and 16-bit copies of the weights; memory per encoder token;
            memory per decoder token. Operators that can never be the peak are left out.
    """

    lines: np.ndarray

    def peak(self, encoder_tokens: float, decoder_tokens: float, share: float = 1.0) -> int:
        """Peak bytes of a step.

        Args:
            encoder_tokens: of the batch; 0 for a decoder-only model.
            decoder_tokens: of the batch.
            share: share of the gradients and weight copies on a device, less than 1 if sharded.
        """
        return round(float((self.lines @ (1.0, share, encoder_tokens, decoder_tokens)).max()))

    def most_tokens(self, memory: float, decoder_share: float, share: float = 1.0) -> int:
        """The largest number of tokens, of both sides together, that fits.

        Args:
            memory: bytes available to the step.
            decoder_share: share of the tokens on the decoder's side; 1 for a decoder-only model.
            share: as in `peak`.

        Returns:
            The number of tokens; 0 if the step does not fit at all.
        """
        free = memory - self.lines[:, :2] @ (1.0, share)
        per_token = self.lines[:, 2:] @ (1.0 - decoder_share, decoder_share)
        if (free < 0).any():
            return 0
        grows = per_token > 0
        return int((free[grows] / per_token[grows]).min())


def state_memory(parameters: int) -> int:
    """Bytes of float32 parameters and AdamW's two states, for ``parameters`` trained parameters."""
    return _STATE * parameters


def token_budget(
    step: StepMemory, decoder_share: float, parameters: int, memory: int, *, devices: int = 1
) -> int:
    """The largest micro-batch whose step fits into the memory of a device.

    Args:
        step: of the model; see `count_memory`.
        decoder_share: share of the tokens on the decoder's side; 1 for a decoder-only model.
        parameters: number of trained parameters, with AdamW in float32.
        memory: bytes of memory of a device. A tenth of it stays free.
        devices: number of devices over which weights, gradients and optimizer are sharded (FSDP).
            The weights that FSDP gathers for one layer at a time are not counted.

    Returns:
        Tokens of both sides together; 0 if weights, gradients and optimizer do not fit.
    """
    free = (1 - _SPARE) * memory - state_memory(parameters) / devices
    return step.most_tokens(free, decoder_share, 1 / devices)


def count_memory(model: nn.Module, device_type: str, *, packed: bool) -> StepMemory:
    """Count the memory of a training step, operator by operator.

    Args:
        model: a transformers language model on the meta device, encoder-decoder or decoder-only,
            not patched. Its dtype is that of the activations. Gradients count as float32; for
            16-bit activations, copies of the weights in that dtype are counted, too.
        device_type: ``cpu`` or ``cuda``, which determines the chunk size of the packed loss.
        packed: whether the loss is the patched model's, without the logits of all tokens.

    Returns:
        The memory in use after each operator, as a function of the tokens.

    Raises:
        ValueError: if the model is not on the meta device.
    """
    two_sided = model.config.is_encoder_decoder  # type: ignore[union-attr]
    chunk = smallest_chunk(device_type) if packed else None
    with without_attention(model):
        short = _follow(model, _SHORT, _SHORT, chunk)
        decoder = _follow(model, _SHORT, _LONG, chunk)
        encoder = _follow(model, _LONG, _SHORT, chunk) if two_sided else short
    more_tokens = _ROWS * (_LONG - _SHORT)
    per_encoder = (encoder - short)[:, 0] / more_tokens
    per_decoder = (decoder - short)[:, 0] / more_tokens
    once = short[:, 0] - _ROWS * _SHORT * (per_encoder + per_decoder)
    lines = np.stack([once, short[:, 1], per_encoder, per_decoder], axis=1)
    return StepMemory(_without_dominated(lines))


def _without_dominated(lines: np.ndarray) -> np.ndarray:
    """Remove lines that are at most as large as another line in every column."""
    lines = np.unique(lines, axis=0)
    kept: list[np.ndarray] = []
    for line in lines[np.argsort(-lines.sum(1))]:
        if not any((line <= other).all() for other in kept):
            kept.append(line)
    return np.array(kept)


def _follow(model: nn.Module, encoder: int, decoder: int, chunk: int | None) -> np.ndarray:
    """Follow one step over full rows of ``encoder`` and ``decoder`` tokens.

    Args:
        chunk: smallest number of rows that the packed loss takes through the head at once; None
            for the model's own loss.

    Returns:
        ``(operators, 2)`` float64: bytes in use without gradients and copies of the weights, and
        bytes of these.
    """
    targets, inputs = make_inputs(model, _ROWS, encoder, decoder)
    weights = list(model.parameters())
    copies = sum(each.numel() for each in weights) * weights[0].element_size()
    loss: list[Tensor] = []

    def head(module: Any, args: tuple[Tensor]) -> Any:
        hidden, weight, bias = args[0].flatten(0, 1), module.weight, module.bias
        needs = (hidden.requires_grad, weight.requires_grad, bias is not None)
        of_tokens = hidden.new_empty(hidden.shape[0])
        options = (0.0, 0.0, 0.0, 1.0, hidden.dtype, targets.numel(), True)
        total, *_ = _LOSS(of_tokens, hidden, weight, bias, targets.flatten(), *options, *needs)
        loss.append(total)
        return (args[0][:1, :1],)  # the head computes the logits of a single token

    model.train()
    model.zero_grad()
    with _InUse(0 if weights[0].dtype == torch.float32 else copies, chunk) as memory:
        hooks = [
            each.register_post_accumulate_grad_hook(memory.count_gradient)
            for each in weights
            if each.requires_grad
        ]
        if chunk is not None:
            hooks.append(model.get_output_embeddings().register_forward_pre_hook(head))  # type: ignore[operator]
        else:
            inputs["labels"] = targets
        try:
            memory.ignore([*weights, *model.buffers(), *inputs.values(), targets])
            model_loss = model(**inputs).loss  # releases the logits, as a training step does
            (model_loss if chunk is None else loss[0]).backward()
        finally:
            for hook in hooks:
                hook.remove()
    return np.array(memory.events, dtype=np.float64)


class _InUse(TorchDispatchMode):
    """Follows storages from the operator that returns them to their release.

    Attributes:
        events: for each operator, bytes in use after it without gradients and copies of weights,
            and bytes of these.
    """

    def __init__(self, copies: int, chunk: int | None) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        self._now, self._gradients, self._chunk = 0, copies, chunk
        self._sizes = WeakIdKeyDictionary()  # by storage: [bytes], [0] if counted elsewhere

    def ignore(self, tensors: list[Tensor]) -> None:
        """Do not count these tensors, which exist before the step."""
        for tensor in tensors:
            self._sizes[tensor.untyped_storage()] = [0]

    def count_gradient(self, weight: Tensor) -> None:
        """Move an accumulated gradient from the memory in use to the gradients."""
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
            # The op allocates the logits of a chunk: `chunk` rows, or as many elements as `hidden`.
            hidden, weight = args[1:3]
            for elements in (self._chunk * weight.shape[0], hidden.numel()):
                inside = elements * weight.element_size()
                self.events.append((self._now + inside, self._gradients))
        return result

    def _release(self, size: list[int]) -> None:
        self._now -= size[0]
