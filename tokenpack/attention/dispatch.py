"""Select a backend for an attention call, run it, and say why it was selected.

Each backend reports what it lacks for a call. ``"auto"`` selects the first backend of `TABLE` that
lacks nothing. A backend selected by name either runs or raises with what it lacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import PackedLayout
from ..kernels._last import LastResult
from ..kernels._ops import runs_eagerly
from ..kernels.attention import (
    HostPlan,
    LayerKernels,
    Lines,
    attend_on_host,
    cast_for_autocast,
    normal_window,
    plan_reference,
)
from .backends import TABLE, AttentionCall, Backend, Options
from .kernel_node import attend_on_kernel, layer_kernels
from .one_call import OneCall, plan_one_call

BACKENDS = tuple(backend.name for backend in TABLE)
"""The names of the backends, in order of preference."""


class Choice(NamedTuple):
    """The backend selected for a call, and the reason in words."""

    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend} ({self.reason})"


class BackendStatus(NamedTuple):
    """Whether a backend is usable on a device, and why not."""

    name: str
    usable: bool
    reason: str


def layout_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layouts: Mapping[str, PackedLayout],
    role: str = "self",
    *,
    causal: bool,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    relative_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
    memo: dict[Any, Any] | None = None,
) -> tuple[Tensor, Choice]:
    """`packed_attention` with the shapes and options of a transformers attention layer.

    Args:
        query: ``(1, heads, total_q, head_dim)``.
        key: ``(1, kv_heads, total_k, head_dim)``.
        value: ``(1, kv_heads, total_k, head_dim)``.
        layouts: the layout of each side of the model: ``"enc"`` and ``"dec"`` for an
            encoder-decoder, ``"self"`` for a model with one side.
        role: the side of a self-attention layer, or ``"cross"`` for queries from ``"dec"`` and
            keys from ``"enc"``.
        causal: mask the keys after the query's position.
        scale: factor of the scores; ``head_dim ** -0.5`` by default.
        sliding_window: how many positions a query sees to the left, and to the right if the call
            is not causal. As in transformers, the query's own position counts.
        softcap: bound on the scores, ``softcap * tanh(score / softcap)``.
        relative_bias: ``(heads, 2 * reach + 1)``, added to the scores by distance of key and query.
        dropout_p: probability that an attention weight is dropped.
        backend: ``"auto"`` or a name from `BACKENDS`.
        memo: an empty dict that the layers of one forward share. Then the backend is chosen, and
            the batch's lengths are read, once for all layers of one kind.

    Returns:
        The output ``(1, total_q, heads, head_dim)``, and the choice of backend.

    Raises:
        RuntimeError: if query or key do not have as many tokens as their layout.
        ValueError: if ``backend`` is unknown, or lacks something for this call.
    """
    autocast = torch.is_autocast_enabled(query.device.type)
    if autocast:
        query, key, value = cast_for_autocast(query, key, value)
    wanted = (
        *(role, causal, scale, sliding_window, softcap, dropout_p, backend),
        *(relative_bias is not None, query.dtype, query.device),
        *(query.shape[1], key.shape[1], query.shape[3]),
    )
    prepared = None if memo is None else memo.get(wanted)
    if prepared is None:
        prepared = _prepare(layouts, _Kind(*wanted))
        if memo is not None:
            memo[wanted] = prepared
    totals = query.shape[2], key.shape[2]
    if totals != prepared.totals:
        raise RuntimeError(
            f"query and key must have the {prepared.totals[0]} and {prepared.totals[1]} "
            f"tokens of their layouts, got {totals[0]} and {totals[1]} (role {role!r})"
        )
    return prepared(query, key, value, relative_bias), prepared.choice


class Prepared:
    """One kind of layer in one batch: what is the same for all layers of this kind."""

    def __init__(
        self,
        choice: Choice,
        options: Options,
        layouts: tuple[PackedLayout, PackedLayout],
        kind: _Kind,
    ) -> None:
        self.choice = choice
        self._kind, self._layouts = kind, layouts
        self._is_reference = choice.backend == "reference"
        # The kernels as one node of autograd, unless something has to see the op.
        self._can_be_one_node = choice.backend == "triton" and options["scale"] > 0.0
        self._kernels: LayerKernels | None = None
        self.totals = layouts[0].total_tokens, layouts[1].total_tokens
        self._options = options
        self._offsets = layouts[0].cu_seqlens, layouts[1].cu_seqlens
        self._longest = layouts[0].max_seqlen, layouts[1].max_seqlen
        self._run = find_backend(choice.backend).run
        self._plan: HostPlan | None = None  # of the reference
        self._one_call: tuple[OneCall | None] | None = None  # the same, for few tokens
        # What earlier layers have computed from the same table.
        self._lines_of: LastResult[Lines] = LastResult(lambda table: {})

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, relative_bias: Tensor | None
    ) -> Tensor:
        """``(1, heads, total, head_dim)`` each, to ``(1, total_q, heads, head_dim)``."""
        if self._is_reference:
            return self._on_host(query, key, value, relative_bias)
        options = self._options
        if self._can_be_one_node and runs_eagerly(query):
            if self._kernels is None:
                self._kernels = layer_kernels(self._offsets, options)
            dropout_p = self._kind.dropout_p
            return attend_on_kernel(query, key, value, relative_bias, dropout_p, self._kernels)
        if relative_bias is not None:
            options = {**options, "relative_bias": relative_bias}
        # The backward of [0] writes a tensor of zeros and copies the gradient into it. The backward
        # of squeeze is a view.
        q, k, v = (side.squeeze(0).transpose(0, 1) for side in (query, key, value))
        return self._run((q, k, v, *self._offsets), self._longest, options)[None]

    def _on_host(
        self, query: Tensor, key: Tensor, value: Tensor, relative_bias: Tensor | None
    ) -> Tensor:
        lines = {} if relative_bias is None else self._lines_of(relative_bias)
        if query.requires_grad or key.requires_grad or value.requires_grad:
            if self._one_call is None:
                self._one_call = (self._plan_one_call(relative_bias),)
            (one_call,) = self._one_call
            if one_call is not None:
                return one_call(query, key, value, relative_bias, lines)
        if self._plan is None:
            self._plan = self._plan_reference()
        return attend_on_host(query, key, value, relative_bias, self._plan, lines)

    def _plan_one_call(self, relative_bias: Tensor | None) -> OneCall | None:
        kind = self._kind
        if kind.device.type != "cpu":
            return None
        reach = None if relative_bias is None else relative_bias.shape[1] // 2
        heads = kind.heads, kind.kv_heads
        return plan_one_call(*self._layouts, heads, kind.dtype, self._options, reach)

    def _plan_reference(self) -> HostPlan:
        kind = self._kind
        return plan_reference(
            *self._offsets,
            self.totals,
            (kind.heads, kind.kv_heads),
            kind.device,
            kind.has_bias,
            self._options,
        )


class _Kind(NamedTuple):
    """What decides how a layer runs in one batch. See `layout_attention`."""

    role: str
    causal: bool
    scale: float | None
    sliding_window: int | None
    softcap: float | None
    dropout_p: float
    backend: str
    has_bias: bool
    dtype: torch.dtype
    device: torch.device
    heads: int
    kv_heads: int
    head_dim: int


def _prepare(layouts: Mapping[str, PackedLayout], kind: _Kind) -> Prepared:
    """Choose the backend of a kind of layer, and plan what depends on the lengths."""
    side_q, side_k = ("dec", "enc") if kind.role == "cross" else (kind.role,) * 2
    layout_q, layout_k = layouts[side_q].to(kind.device), layouts[side_k].to(kind.device)
    options = layer_options(
        *(kind.head_dim, kind.causal, kind.scale),
        *(kind.sliding_window, kind.softcap, kind.dropout_p),
    )
    call = _describe(
        (layout_q.total_tokens, kind.heads, kind.head_dim),
        kind.kv_heads,
        kind.device,
        kind.dtype,
        layout_q.num_seqs,
        options,
        kind.has_bias,
    )
    choice = choose_backend(call, kind.backend)
    return Prepared(choice, options, (layout_q, layout_k), kind)


def layer_options(
    head_dim: int,
    causal: bool,
    scale: float | None,
    sliding_window: int | None,
    softcap: float | None,
    dropout_p: float,
) -> Options:
    """The options of a layer, without its bias, in the terms of `varlen_attention`."""
    window = None
    if sliding_window is not None:  # it counts the query's own position
        left = sliding_window - 1
        window = (left, -1 if causal else left)
    return {
        "causal": causal,
        "scale": head_dim**-0.5 if scale is None else scale,
        "window": normal_window(window),
        "softcap": softcap,
        "relative_bias": None,
        "dropout_p": dropout_p,
    }


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool,
    scale: float,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    relative_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Choice]:
    """Run `varlen_attention` on a backend that supports the call.

    The arguments are those of `tokenpack.kernels.varlen_attention`. ``max_seqlen_q`` and
    ``max_seqlen_k`` are the longest lengths, which some backends require on the host.

    Returns:
        The output ``(total_q, heads, head_dim)``, and the choice of backend.

    Raises:
        ValueError: if ``backend`` is unknown, or lacks something for this call.
    """
    q, k, v = cast_for_autocast(q, k, v)
    window = normal_window(window)
    options: Options = {
        "causal": causal,
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "relative_bias": relative_bias,
        "dropout_p": dropout_p,
    }
    call = _describe(
        q.shape,
        k.shape[1],
        q.device,
        q.dtype,
        cu_seqlens_q.numel() - 1,
        options,
        relative_bias is not None,
    )
    choice = choose_backend(call, backend)
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k)
    out = find_backend(choice.backend).run(tensors, (max_seqlen_q, max_seqlen_k), options)
    return out, choice


def _describe(
    shape: tuple[int, ...],
    kv_heads: int,
    device: torch.device,
    dtype: torch.dtype,
    num_seqs: int,
    options: Options,
    has_bias: bool,
) -> AttentionCall:
    """The properties of a call. ``shape`` is q's, ``(total_q, heads, head_dim)``."""
    total, heads, head_dim = shape
    # Elements of the scratch tensor that flash attention's backward allocates.
    scratch = (total + 128 * (num_seqs + 1)) * heads * -(-head_dim // 32) * 32
    return AttentionCall(
        device_type=device.type,
        device_index=device.index,
        dtype=dtype,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        default_scale=options["scale"] == head_dim**-0.5,
        causal=options["causal"],
        window=options["window"],
        softcap=bool(options["softcap"]),
        relative_bias=has_bias,
        dropout=options["dropout_p"] > 0.0,
        flash_scratch_fits=scratch < 2**31,
    )


@lru_cache(maxsize=256)
def choose_backend(call: AttentionCall, prefer: str = "auto") -> Choice:
    """Select the backend for ``call``.

    Args:
        call: the properties of the call.
        prefer: the name of a backend, or ``"auto"`` for the first that lacks nothing.

    Raises:
        ValueError: if ``prefer`` is neither ``"auto"`` nor in `BACKENDS`, or lacks something.
    """
    if prefer != "auto":
        require_known_backend(prefer)
        lack = find_backend(prefer).lacks(call)
        if lack is not None:
            raise ValueError(f"attention={prefer!r} cannot run this call: {lack}")
        return Choice(prefer, "selected by name")
    rejected: list[str] = []
    for backend in TABLE:
        lack = backend.lacks(call)
        if lack is None:
            return Choice(backend.name, "; ".join(rejected) or "first choice, lacks nothing")
        rejected.append(f"{backend.name}: {lack}")
    raise AssertionError("the reference must support every call")


def require_known_backend(name: str) -> None:
    """Raise ValueError unless ``name`` is ``"auto"`` or in `BACKENDS`."""
    known = ("auto", *(backend.name for backend in TABLE))
    if name not in known:
        raise ValueError(f"attention must be one of {known}, got {name!r}")


def backend_report(device: torch.device | None = None) -> list[BackendStatus]:
    """Whether each backend is usable for a plain bfloat16 call, and why not.

    Args:
        device: the GPU by default, or the CPU if there is no GPU.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plain = AttentionCall(
        device_type=device.type,
        device_index=device.index,
        dtype=torch.bfloat16,
        heads=8,
        kv_heads=8,
        head_dim=64,
        default_scale=True,
        causal=True,
        window=None,
        softcap=False,
        relative_bias=False,
        dropout=False,
        flash_scratch_fits=True,
    )
    lacks = [(backend.name, backend.lacks(plain)) for backend in TABLE]
    return [BackendStatus(name, lack is None, lack or "ready") for name, lack in lacks]


@cache
def find_backend(name: str) -> Backend:
    """The backend of this name in `TABLE`."""
    return next(backend for backend in TABLE if backend.name == name)
