"""Select a backend for an attention call, run it, and say why it was selected.

Each backend reports what it lacks for a call. ``"auto"`` selects the first backend of `TABLE` that
lacks nothing. A backend selected by name either runs or raises with what it lacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import PackedLayout
from ..kernels.attention import cast_for_autocast, normal_window
from .backends import TABLE, AttentionCall, Backend, Options

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

    Returns:
        The output ``(1, total_q, heads, head_dim)``, and the choice of backend.

    Raises:
        RuntimeError: if query or key do not have as many tokens as their layout.
        ValueError: if ``backend`` is unknown, or lacks something for this call.
    """
    side_q, side_k = ("dec", "enc") if role == "cross" else (role, role)
    layout_q, layout_k = layouts[side_q].to(query.device), layouts[side_k].to(query.device)
    if query.shape[2] != layout_q.total_tokens or key.shape[2] != layout_k.total_tokens:
        raise RuntimeError(
            f"query and key must have the {layout_q.total_tokens} and {layout_k.total_tokens} "
            f"tokens of their layouts, got {query.shape[2]} and {key.shape[2]} (role {role!r})"
        )
    window = None
    if sliding_window is not None:  # packed_attention does not count the query's own position
        window = (sliding_window - 1, -1 if causal else sliding_window - 1)
    out, choice = packed_attention(
        # The backward of [0] writes a tensor of zeros and copies the gradient into it. The
        # backward of squeeze is a view.
        query.squeeze(0).transpose(0, 1),  # (total_q, heads, head_dim)
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        layout_q.cu_seqlens,
        layout_k.cu_seqlens,
        layout_q.max_seqlen,
        layout_k.max_seqlen,
        causal=causal,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        window=window,
        softcap=softcap,
        relative_bias=relative_bias,
        dropout_p=dropout_p,
        backend=backend,
    )
    return out[None], choice


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
    heads, head_dim = q.shape[1:]
    # Elements of the scratch tensor that flash attention's backward allocates.
    scratch = (q.shape[0] + 128 * cu_seqlens_q.numel()) * heads * -(-head_dim // 32) * 32
    call = AttentionCall(
        device_type=q.device.type,
        dtype=q.dtype,
        heads=heads,
        kv_heads=k.shape[1],
        head_dim=head_dim,
        default_scale=scale == head_dim**-0.5,
        causal=causal,
        window=window,
        softcap=bool(softcap),
        relative_bias=relative_bias is not None,
        dropout=dropout_p > 0.0,
        flash_scratch_fits=scratch < 2**31,
    )
    choice = choose_backend(call, backend)
    options: Options = {
        "causal": causal,
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "relative_bias": relative_bias,
        "dropout_p": dropout_p,
    }
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k)
    out = _find_backend(choice.backend).run(tensors, (max_seqlen_q, max_seqlen_k), options)
    return out, choice


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
        lack = _find_backend(prefer).lacks(call)
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
def _find_backend(name: str) -> Backend:
    return next(backend for backend in TABLE if backend.name == name)
