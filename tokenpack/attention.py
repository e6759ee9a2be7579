"""Which attention backend runs, and why.

Every backend computes what `tokenpack.kernels.varlen_attention` documents. Each one says of a call
what it lacks for it; `auto` takes the first that lacks nothing, in the order of `BACKENDS`, and a
backend asked for by name either runs or raises with what it lacks.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels.attention import (
    cast_for_autocast,
    is_ampere_or_newer,
    kernel_lacks,
    normal_window,
    varlen_attention,
    varlen_attention_reference,
)

BACKENDS = ("flash_attn", "torch", "triton", "reference")
_HALF = (torch.float16, torch.bfloat16)


class AttentionCall(NamedTuple):
    """What backends decide by: everything about an attention call but its numbers."""

    device_type: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    default_scale: bool
    causal: bool
    window: tuple[int, int] | None
    softcap: bool
    relative_bias: bool
    dropout: bool
    flash_scratch_fits: bool


class Choice(NamedTuple):
    """The backend that a call runs on, and the reason in words."""

    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend} ({self.reason})"


class BackendStatus(NamedTuple):
    """Whether a backend can be used here at all."""

    name: str
    usable: bool
    reason: str


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
    """`varlen_attention` on the backend that suits the call.

    Takes what `tokenpack.kernels.varlen_attention` takes, and the longest lengths, which some
    backends want on the host. Returns the output and the choice that was made.

    Raises:
        ValueError: if ``backend`` is unknown, or was named and lacks something for this call.
    """
    q, k, v = cast_for_autocast(q, k, v)
    window = normal_window(window)
    heads, head_dim = q.shape[1:]
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
    if choice.backend == "flash_attn":
        function, accepted = _found(_flash_attn())
        options = _flash_attn_options(accepted, causal, scale, window, softcap, dropout_p)
        lengths = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
        out = function(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            **{name: length for name, length in lengths.items() if name in accepted},
            **options,
        )
        out = out[0] if isinstance(out, tuple) else out
    elif choice.backend == "torch":
        function, accepted = _found(_torch_varlen())
        options = _torch_options(accepted, causal, scale, window, q.shape[1] != k.shape[1])
        out = function(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)
    else:
        attend = varlen_attention if choice.backend == "triton" else varlen_attention_reference
        out = attend(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            causal=causal,
            scale=scale,
            window=window,
            softcap=softcap,
            relative_bias=relative_bias,
            dropout_p=dropout_p,
        )
    return out, choice


@lru_cache(maxsize=256)
def choose_backend(call: AttentionCall, prefer: str = "auto") -> Choice:
    """The backend for ``call``: ``prefer`` itself, or with ``"auto"`` the first that can.

    Raises:
        ValueError: if ``prefer`` is neither ``"auto"`` nor in `BACKENDS`, or lacks something.
    """
    if prefer != "auto":
        require_known_backend(prefer)
        lack = _LACKS[prefer](call)
        if lack is not None:
            raise ValueError(f"attention={prefer!r} cannot run this call: {lack}")
        return Choice(prefer, "asked for by name")
    passed_over: list[str] = []
    for name in BACKENDS:
        lack = _LACKS[name](call)
        if lack is None:
            return Choice(name, "; ".join(passed_over) or "first choice, and it lacks nothing")
        passed_over.append(f"{name}: {lack}")
    raise AssertionError("the reference runs everything")


def require_known_backend(name: str) -> None:
    """Raise ValueError unless ``name`` is ``"auto"`` or one of `BACKENDS`."""
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"attention must be one of {('auto', *BACKENDS)}, got {name!r}")


def backend_report(device: torch.device | None = None) -> list[BackendStatus]:
    """Whether each backend is usable on ``device`` for a plain bf16 call, and why not if not."""
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
    report = []
    for name in BACKENDS:
        lack = _LACKS[name](plain)
        report.append(BackendStatus(name, lack is None, lack or "ready"))
    return report


# ------------------------------------------------------------------------- what each backend takes

Parameters = Mapping[str, inspect.Parameter]


def _flash_attn_options(
    accepted: Parameters,
    causal: bool,
    scale: float,
    window: tuple[int, int] | None,
    softcap: float | None,
    dropout_p: float,
) -> dict[str, Any]:
    """Keywords of `flash_attn_varlen_func`; whatever is not asked for stays at its default."""
    options: dict[str, Any] = {"softmax_scale": scale, "causal": causal}
    if window is not None:
        # A side without limit is -1 in flash-attn 2 and 3, and None in 4: as in the default.
        endless = accepted["window_size"].default[0]
        options["window_size"] = tuple(
            endless if side < 0 else side for side in _edges(causal, window)
        )
    if softcap:
        options["softcap"] = softcap
    if dropout_p > 0.0:
        options["dropout_p"] = dropout_p
    return options


def _torch_options(
    accepted: Parameters,
    causal: bool,
    scale: float,
    window: tuple[int, int] | None,
    grouped: bool,
) -> dict[str, Any]:
    """Keywords of `varlen_attn`.

    Causality is ``is_causal`` in torch 2.10, which has no window, and from 2.11 on a window that
    ends at 0. ``scale`` came with 2.11 too, ``enable_gqa`` with 2.12.
    """
    options = {
        "is_causal": causal,
        "window_size": _edges(causal, window),
        "scale": scale,
        "enable_gqa": grouped,
    }
    return {name: value for name, value in options.items() if name in accepted}


def _edges(causal: bool, window: tuple[int, int] | None) -> tuple[int, int]:
    """Causality and window in one, as the flash kernels see them."""
    left, right = window or (-1, -1)
    return (left, 0 if causal else right)


# ------------------------------------------------------------------------ what each backend lacks


def _flash_attn_lacks(call: AttentionCall) -> str | None:
    if call.device_type != "cuda":
        return f"needs a CUDA device, not {call.device_type}"
    found = _flash_attn()
    if isinstance(found, str):
        return found
    _, accepted = found
    if call.relative_bias:
        return "has no relative bias"
    if call.softcap and call.dropout:
        return "has no softcap together with dropout"
    for wanted, option in (
        (call.softcap, "softcap"),
        (call.dropout, "dropout_p"),
        (call.window is not None, "window_size"),
    ):
        if wanted and option not in accepted:
            return f"this version takes no {option}"
    return _flash_kernels_lack(call)


def _torch_lacks(call: AttentionCall) -> str | None:
    if call.device_type != "cuda":
        return f"needs a CUDA device, not {call.device_type}"
    found = _torch_varlen()
    if isinstance(found, str):
        return found
    _, accepted = found
    for present, name in (
        (call.relative_bias, "relative bias"),
        (call.softcap, "softcap"),
        (call.dropout, "dropout"),
    ):
        if present:
            return f"has no {name}"
    if call.heads != call.kv_heads and "enable_gqa" not in accepted:
        return "this version takes no grouped-query heads"
    if not call.default_scale and "scale" not in accepted:
        return "this version takes no scale"
    if call.window is not None and "window_size" not in accepted:
        return "this version takes no window_size"
    if call.causal and not {"is_causal", "window_size"} & accepted.keys():
        return "this version takes neither is_causal nor window_size"
    return _flash_kernels_lack(call)


def _flash_kernels_lack(call: AttentionCall) -> str | None:
    """What the flash kernels lack, which flash-attn and torch have in common."""
    if call.dtype not in _HALF:
        return f"needs float16 or bfloat16, not {call.dtype}"
    if call.head_dim > 256 or call.head_dim % 8:
        return f"needs a head_dim that is a multiple of 8 up to 256, not {call.head_dim}"
    if not is_ampere_or_newer():
        return "needs compute capability 8.0 or newer"
    if not call.flash_scratch_fits:
        return "its backward fails past 2**31 scratch elements"
    return None


def _triton_lacks(call: AttentionCall) -> str | None:
    return kernel_lacks(call.device_type, call.dtype, call.head_dim)


def _reference_lacks(call: AttentionCall) -> str | None:
    return None


_LACKS: dict[str, Callable[[AttentionCall], str | None]] = {
    "flash_attn": _flash_attn_lacks,
    "torch": _torch_lacks,
    "triton": _triton_lacks,
    "reference": _reference_lacks,
}


# ------------------------------------------------------------- other people's functions, as found

Found = tuple[Callable[..., Any], Parameters]


@lru_cache(maxsize=1)
def _flash_attn() -> Found | str:
    """flash-attn's varlen function, or why there is none; 3 and 4 have modules of their own."""
    broken = None
    for module in ("flash_attn", "flash_attn_interface", "flash_attn.cute"):
        found = _probe(module, "flash_attn_varlen_func")
        if isinstance(found, tuple):
            return found
        broken = broken or found
    return broken or "flash-attn is not installed (pip install 'tokenpack[flash]')"


@lru_cache(maxsize=1)
def _torch_varlen() -> Found | str:
    """torch's varlen function, or why there is none."""
    found = _probe("torch.nn.attention.varlen", "varlen_attn")
    return found or "this torch has no torch.nn.attention.varlen.varlen_attn"


def _probe(module: str, name: str) -> Found | str | None:
    """The function and the parameters that it takes: they have moved between releases.

    None where it is not installed; a string that says what happened where it cannot be imported.
    """
    try:
        function = getattr(importlib.import_module(module), name)
    except AttributeError:
        return None
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and module.startswith(error.name or "?"):
            return None
        return f"{module} does not import: {error}"
    return function, inspect.signature(function).parameters


def _found(found: Found | str) -> Found:
    assert not isinstance(found, str)  # or the backend would not have been chosen
    return found
