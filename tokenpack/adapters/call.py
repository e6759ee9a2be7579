"""The state of one packed forward, and the state that a patched model keeps.

The model's forward passes a `PackedCall` to its attention layers under the keyword `KEYWORD`. A
`PatchState` is shared by all parts of a patched model that can be called by themselves.
"""

from __future__ import annotations

import itertools
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from ..kernels import PackedLayout, repad
from .family import Family

logger = logging.get_logger(__name__)

KEYWORD = "packing"

# The attributes that `patch_model` sets on modules.
ENTRY = "_tokenpack_entry"  # the Entry, on every part that can be called by itself
WATCHED = "_tokenpack_watched"  # the PatchState, on the first attention of the model
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
        "choices",
        "head_logits",
        "layouts",
        "leaves_out_cache",
        "loss",
        "memo",
        "num_items",
        "positions",
        "state",
        "streams",
        "targets",
        "traced",
        "unfused",
    )

    def __init__(
        self, state: PatchState, layouts: dict[str, PackedLayout], traced: bool = False
    ) -> None:
        self.state = state
        self.traced = traced  # the whole forward is one graph of torch.compile
        self.layouts = layouts  # by side: "enc" and "dec", or only "self"
        self.streams = dict(layouts)  # by side, with dead tokens (see `dead_tokens`)
        self.positions: dict[str, Tensor] = {}  # by side, for models that compute positions inside
        self.choices: dict[str, Any] = {}  # the last `Choice` of each role
        self.memo: dict[Any, Any] = {}  # of `layout_attention`
        self.attention_calls = 0
        self.backend = state.attention
        self.leaves_out_cache = False  # the model's own forward would return one
        # Read by the fused head.
        self.after_head: AfterHead | None = None
        self.targets: Targets | None = None
        self.num_items: Tensor | float | None = None
        # Written by the fused head.
        self.loss: Tensor | None = None
        self.unfused: str | None = None  # why the head computed logits
        self.head_logits: Tensor | None = None  # (1, 1, classes), of the first token

    def without_dead(self, values: Tensor, sides: tuple[str, ...]) -> Tensor:
        """The tokens of the batch.

        Args:
            values: ``(1, tokens of the stream, ...)``.
            sides: the first one of these that the call has is the side of the values.

        Returns:
            ``(1, total_tokens, ...)``, a view.

        Raises:
            RuntimeError: if the values do not have the tokens of the stream.
        """
        side = next(side for side in sides if side in self.layouts)
        stream = self.streams[side]
        if stream is self.layouts[side]:
            return values
        if values.shape[1] != stream.total_tokens:
            raise RuntimeError(
                f"values must have the {stream.total_tokens} tokens of side {side!r}, "
                f"got shape {tuple(values.shape)}"
            )
        return values.narrow(1, 0, self.layouts[side].total_tokens)

    def rows_of(self, hidden: Tensor, side: str | None = None) -> Tensor:
        """Hidden states inside a packed forward, in the padded rows of the batch.

        A hook on a layer gets this object as the keyword ``packing``, and hidden states of all
        sequences in one row.

        Args:
            hidden: ``(1, total_tokens, ...)`` or ``(total_tokens, ...)``.
            side: ``"enc"`` or ``"dec"`` in an encoder-decoder. Not needed otherwise.

        Returns:
            ``(rows, columns, ...)``, zero at padding.

        Raises:
            ValueError: if ``side`` is not one of the call, or ``hidden`` does not have its tokens.
        """
        if side is None and len(self.layouts) == 1:
            side = next(iter(self.layouts))
        if side not in self.layouts:
            raise ValueError(f"side must be one of {sorted(self.layouts)}, got {side!r}")
        layout = self.layouts[side]
        stream = hidden.squeeze(0) if hidden.shape[:1] == (1,) and hidden.dim() > 1 else hidden
        if stream.shape[0] == self.streams[side].total_tokens:
            stream = stream[: layout.total_tokens]
        if stream.shape[0] != layout.total_tokens:
            raise ValueError(
                f"hidden must have the {layout.total_tokens} tokens of side {side!r}, "
                f"got shape {tuple(hidden.shape)}"
            )
        return repad(stream, layout)


@dataclass
class PackingStats:
    """Counters of a patched model.

    Attributes:
        packed_calls: number of forwards that ran on real tokens only.
        fallbacks: number of forwards that ran the model's original padded forward, by reason.
        unseen_calls: number of training forwards that reached the model's attention without going
            through any part that `patch_model` changed.
        packed_tokens: number of real tokens in packed forwards, including the decoder's.
        padded_tokens: number of slots that the same batches had before packing.
        dead_tokens: number of tokens that ``pad_to_total`` has added to packed forwards or their
            batches. They are not among the other two.
        attention: the backend of each kind of attention (``enc``, ``dec``, ``cross``, ``self``)
            in the last packed forward, and why it was selected.
        loss: how the last loss was computed, and why if logits were materialized.
    """

    packed_calls: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    unseen_calls: int = 0
    packed_tokens: int = 0
    padded_tokens: int = 0
    dead_tokens: int = 0
    attention: dict[str, str] = field(default_factory=dict)
    loss: str = ""

    def discount(self, dead: int) -> None:
        """Correct the counts of a stream that has dead tokens."""
        self.packed_tokens -= dead
        self.padded_tokens -= dead
        self.dead_tokens += dead

    @property
    def padding_share(self) -> float:
        """Fraction of the slots in packed batches that were padding, and were not computed."""
        return 1.0 - self.packed_tokens / self.padded_tokens if self.padded_tokens else 0.0

    @property
    def dead_share(self) -> float:
        """Fraction of the tokens that were computed because of ``pad_to_total`` alone."""
        computed = self.packed_tokens + self.dead_tokens
        return self.dead_tokens / computed if computed else 0.0


_PATIENCE = 8  # training forwards, a few steps of accumulation


class PatchState:
    """The options, properties and counters of a patched model."""

    def __init__(
        self,
        family: Family | None,
        attention: str,
        logits: str,
        strict: bool,
        pad_to_total: int | None = None,
    ) -> None:
        self.family = family  # None if unknown
        self.attention = attention
        self.logits = logits
        self.strict = strict
        self.pad_to_total = pad_to_total
        self.counts_columns = False  # attention depends on distances, so holes would change it
        self.stats = PackingStats()
        self.head_is_plain: bool | None = None  # None until the first fused loss has been checked
        self.configs: list[Any] = []  # the `PatchedConfig` objects of interface.py
        self.padded_training = 0  # forwards in training that were not packed
        self.root: weakref.ref[Any] | None = None  # the model that was patched; None in a copy
        # Called before the first forward in training, see `suspend.before_first_batch`.
        self.first_batch: Callable[..., bool] | None = None
        self.key = _register(self)  # names this state in a graph of torch.compile
        self.traced_layers = 0  # layers that torch.compile traced to packed attention

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "root": None}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.__dict__.update(saved)
        self.key = _register(self)  # a copy counts by itself

    def count_padded(self, reason: str, model: str, training: bool) -> None:
        """Count a forward of a class named ``model`` that runs padded."""
        self.stats.fallbacks[reason] += 1
        if training:
            logger.warning_once(
                f"{model} runs padded: {reason}. See packing_stats(model).fallbacks."
            )
            self.count_padded_training(f"it runs padded, because {reason}")

    def count_padded_training(self, reason: str) -> None:
        """Count a training forward that was not packed, and warn if none was after a few."""
        self.padded_training += 1
        if self.padded_training == _PATIENCE and self.stats.packed_calls == 0:
            warnings.warn(
                f"patch_model has no effect: {_PATIENCE} training forwards of the patched model, "
                f"and none was packed. {reason[0].upper()}{reason[1:]}. See packing_stats(model).",
                RuntimeWarning,
                stacklevel=2,
            )

    @property
    def splits_by_position(self) -> bool:
        """Whether the model's own attention infers boundaries although a mask is given."""
        return _splits_by_position(self.key)


_STATES: weakref.WeakValueDictionary[str, PatchState] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def _register(state: PatchState) -> str:
    key = str(next(_NUMBERS))
    _STATES[key] = state
    return key


def state_of(key: str) -> PatchState | None:
    """The state with this `PatchState.key`, or None if its models do not exist anymore."""
    return _STATES.get(key)


@torch.compiler.assume_constant_result  # torch.compile traces no method of str
def _splits_by_position(key: str) -> bool:
    state = state_of(key)
    return state is not None and any("flash" in config.below() for config in state.configs)


@dataclass
class Entry:
    """A part of a patched model that can be called by itself: how it packs its arguments.

    Attributes:
        state: the state of the patched model, which all its entries share.
        parameters: the names of its forward's parameters that may be passed by position.
        sides: ``("enc", "dec")`` for a whole encoder-decoder. Otherwise one side: ``"enc"``,
            ``"dec"``, or ``"self"`` in a model that has only one.
        unpackable: why no call of this part can be packed. None if calls can be.
        is_stack: an encoder or decoder stack, which calls its position table without keywords.
        has_token_head: a head reads each token separately, and the part takes labels.
        shifts_labels: each token predicts the label of the next token.
        pooler: the name of the child that reads the first token of each sequence.
        calls_loss_function: the forward computes its loss with the model's ``loss_function``.
        makes_cache: the part itself creates the cache, and not a part inside it.
    """

    state: PatchState
    parameters: tuple[str, ...]
    sides: tuple[str, ...]
    unpackable: str | None = None
    is_stack: bool = False
    has_token_head: bool = False
    shifts_labels: bool = False
    pooler: str | None = None
    calls_loss_function: bool = False
    makes_cache: bool = False


class _Active(threading.local):
    """What runs in this thread: the state of a model, and its call, None while it runs padded."""

    def __init__(self) -> None:  # called in each thread
        self.state: PatchState | None = None
        self.call: PackedCall | None = None


# Some modules (position tables, head, pooler) are called without keywords. The forward that calls
# them activates its PackedCall for the current thread, and they look it up here. torch.compile
# traces attributes of a threading.local, but no thread ids.
_ACTIVE = _Active()


def run_active(
    state: PatchState,
    call: PackedCall | None,
    function: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a function with ``call`` active in this thread; None while the model runs padded."""
    previous = _ACTIVE.state, _ACTIVE.call
    _ACTIVE.state, _ACTIVE.call = state, call
    try:
        return function(*args, **kwargs)
    finally:
        _ACTIVE.state, _ACTIVE.call = previous


def active_call() -> PackedCall | None:
    """The active call of this thread."""
    return _ACTIVE.call


def runs_padded(state: PatchState) -> bool:
    """Whether this thread is in a padded forward of the model with this state."""
    return _ACTIVE.state is state and _ACTIVE.call is None


# No real mask of a packed forward would have this shape, unless it has 2 queries and 3 keys. So
# attention that is not tokenpack's cannot broadcast the marker, and fails.
MARKER_SHAPE = (1, 1, 2, 3)


def marker_mask(device: torch.device) -> Tensor:
    """The attention mask of a packed forward, of shape `MARKER_SHAPE`.

    transformers' mask functions return a four-dimensional mask unchanged. Attention recognizes this
    one by its shape.
    """
    return torch.ones(MARKER_SHAPE, dtype=torch.bool, device=device)
