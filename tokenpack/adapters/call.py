"""What one packed forward hands down through the model, and what a patched model remembers."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels import PackedLayout

if TYPE_CHECKING:
    from .family import Family
    from .head import AfterHead
    from .inputs import Targets

# The one keyword under which a `PackedCall` travels from the model's forward to its attention.
KEYWORD = "packing"


class PackedCall:
    """One forward over packed tokens.

    A plain object with slots on purpose: FSDP and accelerate rebuild dicts, tuples and dataclasses
    that they meet in a module's keywords, and would lose the identity that results come back by.
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
        self.layouts = layouts  # by side: "enc" and "dec", or "self" alone
        self.positions: dict[str, Tensor] = {}  # by side, for models that compute positions inside
        self.attention_calls = 0
        self.backend = state.attention
        # The fused head reads the next three and leaves the loss.
        self.after_head: AfterHead | None = None
        self.targets: Targets | None = None  # shifted already
        self.num_items: Tensor | float | None = None
        self.loss: Tensor | None = None
        self.head_logits: Tensor | None = None  # (1, 1, classes): the first token's, as a probe

    def sides(self, role: str) -> tuple[PackedLayout, PackedLayout]:
        """The layouts of queries and keys for an attention of this role."""
        query, key = ("dec", "enc") if role == "cross" else (role, role)
        return self.layouts[query], self.layouts[key]


@dataclass
class PackingStats:
    """What a patched model has done so far.

    Attributes:
        packed_calls: forwards that ran on real tokens alone.
        fallbacks: forwards that took the model's own path, counted by reason.
        packed_tokens: real tokens that went through packed forwards, decoder included.
        padded_tokens: slots that the same batches had as they came.
        attention: the backend of each kind of attention (``enc``, ``dec``, ``cross``, ``self``)
            in the last packed forward, with the reason that it was chosen.
        loss: how the last loss was computed, with the reason if logits had to be materialised.
    """

    packed_calls: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    packed_tokens: int = 0
    padded_tokens: int = 0
    attention: dict[str, str] = field(default_factory=dict)
    loss: str = ""

    @property
    def padding_share(self) -> float:
        """Share of the packed batches' slots that were padding and never computed."""
        return 1.0 - self.packed_tokens / self.padded_tokens if self.padded_tokens else 0.0


class PatchState:
    """Everything that `patch_model` keeps on a model; shared by the modules that it changed."""

    def __init__(self, family: Family | None, attention: str, logits: str, strict: bool) -> None:
        self.family: Any = family  # None where it is unknown
        self.attention = attention
        self.logits = logits
        self.strict = strict
        self.never: str | None = None  # why no call of this model can be packed
        self.heads_tokens = False  # the patched module has a head over tokens, and takes labels
        self.shifts_labels = False  # a token is asked for the next one's label
        self.counts_columns = False  # attention depends on distances, so holes would change it
        self.reads_rows = False  # a head behind the patched base model reads rows
        self.pools_first_token = False
        self.stats = PackingStats()
        self.head_is_plain: bool | None = None  # unknown until the first fused loss has been probed
        self.configs: list[tuple[Any, str]] = []  # each config with the implementation it had
        self._running: dict[int, PackedCall] = {}

    # A few modules (position tables, head, pooler) are called without keywords by the model. They
    # find the call of their own thread here, put there by whichever forward calls them.

    @contextmanager
    def running(self, call: PackedCall | None) -> Iterator[None]:
        """Make ``call`` the one that this thread's modules without keywords work for."""
        thread = threading.get_ident()
        before = self._running.get(thread)
        self._set(thread, call)
        try:
            yield
        finally:
            self._set(thread, before)

    def current(self) -> PackedCall | None:
        """The call of this thread, if one is running."""
        return self._running.get(threading.get_ident())

    def _set(self, thread: int, call: PackedCall | None) -> None:
        if call is None:
            self._running.pop(thread, None)
        else:
            self._running[thread] = call

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_running": {}}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        from .interface import register_over

        self.__dict__.update(saved)
        for _, base in self.configs:
            register_over(base)  # a fresh process knows none of our names


def marker_mask(device: torch.device) -> Tensor:
    """The attention mask of a packed forward: four-dimensional, so that every mask function of
    transformers hands it on as it is, and too small for attention to take it for a real one."""
    return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)
