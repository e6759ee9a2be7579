"""The state of one packed forward, and the state that a patched model keeps.

The model's forward passes a `PackedCall` to its attention layers under the keyword `KEYWORD`. A
`PatchState` is shared by all modules that `patch_model` changed.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import PackedLayout
from .family import Family

KEYWORD = "packing"

# The attributes that `patch_model` sets on modules.
STATE = "_tokenpack_state"  # the PatchState
ROLE = "_tokenpack_role"  # of an attention: "enc", "dec", "cross" or "self"
SIDE = "_tokenpack_side"  # of a position table: "enc" or "dec"


class Targets(NamedTuple):
    """The labels of the tokens that the head reads.

    Attributes:
        labels: ``(total_tokens,)``, already shifted, or -100.
        num_valid: the number of labels that are not -100.
    """

    labels: Tensor
    num_valid: int


class AfterHead(NamedTuple):
    """What a model does to its logits after the head, as far as tokenpack supports it."""

    scale: float = 1.0
    softcap: float | None = None
    bias: Tensor | None = None  # (classes,)

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.bias is None else logits + self.bias

    @property
    def is_identity(self) -> bool:
        return self.scale == 1.0 and self.softcap is None and self.bias is None


class PackedCall:
    """One forward over packed tokens.

    This is a plain object with slots. FSDP and accelerate rebuild the dicts, tuples and dataclasses
    in a module's keywords, so results written to one of those would be lost.
    """

    __slots__ = (
        "after_head",
        "attention_calls",
        "backend",
        "head_logits",
        "layouts",
        "loss",
        "num_items",
        "positions",
        "state",
        "targets",
    )

    def __init__(self, state: PatchState, layouts: dict[str, PackedLayout]) -> None:
        self.state = state
        self.layouts = layouts  # by side: "enc" and "dec", or only "self"
        self.positions: dict[str, Tensor] = {}  # by side, for models that compute positions inside
        self.attention_calls = 0
        self.backend = state.attention
        # Read by the fused head.
        self.after_head: AfterHead | None = None
        self.targets: Targets | None = None
        self.num_items: Tensor | float | None = None
        # Written by the fused head.
        self.loss: Tensor | None = None
        self.head_logits: Tensor | None = None  # (1, 1, classes), of the first token


@dataclass
class PackingStats:
    """Counters of a patched model.

    Attributes:
        packed_calls: number of forwards that ran on real tokens only.
        fallbacks: number of forwards that ran the model's original padded forward, by reason.
        packed_tokens: number of real tokens in packed forwards, including the decoder's.
        padded_tokens: number of slots that the same batches had before packing.
        attention: the backend of each kind of attention (``enc``, ``dec``, ``cross``, ``self``)
            in the last packed forward, and why it was selected.
        loss: how the last loss was computed, and why if logits were materialized.
    """

    packed_calls: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    packed_tokens: int = 0
    padded_tokens: int = 0
    attention: dict[str, str] = field(default_factory=dict)
    loss: str = ""

    @property
    def padding_share(self) -> float:
        """Fraction of the slots in packed batches that were padding, and were not computed."""
        return 1.0 - self.packed_tokens / self.padded_tokens if self.padded_tokens else 0.0


class PatchState:
    """The options, properties and counters of a patched model."""

    def __init__(self, family: Family | None, attention: str, logits: str, strict: bool) -> None:
        self.family = family  # None if unknown
        self.attention = attention
        self.logits = logits
        self.strict = strict
        self.unpackable: str | None = None  # why no call of this model can be packed
        self.has_token_head = False  # the patched module has a head over tokens, and takes labels
        self.shifts_labels = False  # each token predicts the label of the next token
        self.counts_columns = False  # attention depends on distances, so holes would change it
        self.has_row_head = False  # a head outside the patched base model reads padded rows
        self.pools_first_token = False
        self.stats = PackingStats()
        self.head_is_plain: bool | None = None  # None until the first fused loss has been checked
        self.configs: list[Any] = []  # the `PatchedConfig` objects of interface.py
        self._active: dict[int, PackedCall] = {}  # by thread

    # The model calls some modules (position tables, head, pooler) without keywords. The forward
    # that calls them activates its PackedCall for the current thread, and they look it up here.

    @contextmanager
    def activate(self, call: PackedCall | None) -> Iterator[None]:
        """Make ``call`` the active call of this thread."""
        thread = threading.get_ident()
        previous = self._active.get(thread)
        self._set_active(thread, call)
        try:
            yield
        finally:
            self._set_active(thread, previous)

    def active_call(self) -> PackedCall | None:
        """The active call of this thread."""
        return self._active.get(threading.get_ident())

    def _set_active(self, thread: int, call: PackedCall | None) -> None:
        if call is None:
            self._active.pop(thread, None)
        else:
            self._active[thread] = call

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_active": {}}


def marker_mask(device: torch.device) -> Tensor:
    """The ``(1, 1, 1, 1)`` attention mask of a packed forward.

    transformers' mask functions return a four-dimensional mask unchanged. Attention recognizes this
    one by its shape.
    """
    return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)
