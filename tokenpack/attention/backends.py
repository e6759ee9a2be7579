"""The attention backends: what each one lacks for a call, and how it runs.

    TABLE = (Backend(name, lacks, run), ...)     in order of preference

A new backend is one more entry. flash-attn and torch change their signatures between releases, so
their functions are imported on first use and their parameters are inspected.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from ..kernels.attention import (
    is_ampere_or_newer,
    kernel_lacks,
    varlen_attention,
    varlen_attention_reference,
)

_HALF = (torch.float16, torch.bfloat16)

Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q, k, v, cu_seqlens_q, cu_seqlens_k


class AttentionCall(NamedTuple):
    """The properties of an attention call that decide which backends can run it.

    Booleans state whether the call has the property. ``dtype`` is the dtype after autocast, and
    ``window`` is None without a limit.
    """

    device_type: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    default_scale: bool  # head_dim ** -0.5
    causal: bool
    window: tuple[int, int] | None
    softcap: bool
    relative_bias: bool
    dropout: bool
    flash_scratch_fits: bool  # 32-bit offsets address the scratch of flash attention's backward
    device_index: int | None = None  # None is the current device of the type


class Options(TypedDict):
    """The options of a call, as keywords of `varlen_attention`."""

    causal: bool
    scale: float
    window: tuple[int, int] | None
    softcap: float | None
    relative_bias: Tensor | None
    dropout_p: float


class Backend(NamedTuple):
    """An implementation of `varlen_attention`.

    Attributes:
        name: selects the backend in ``patch_model(model, attention=name)``.
        lacks: maps a call to what the backend lacks for it, or to None if it can run the call.
        run: takes ``(q, k, v, cu_seqlens_q, cu_seqlens_k)``, the longest lengths of both sides, and
            the options. Returns the output ``(total_q, heads, head_dim)``.
    """

    name: str
    lacks: Callable[[AttentionCall], str | None]
    run: Callable[[Tensors, tuple[int, int], Options], Tensor]


# ------------------------------------------------------------------------------------- flash-attn


def _flash_attn_lacks(call: AttentionCall) -> str | None:
    if call.device_type != "cuda":
        return f"needs a CUDA device, not {call.device_type}"
    found = _flash_attn()
    if isinstance(found, str):
        return found
    _, accepted = found
    if call.relative_bias:
        return "does not support a relative bias"
    if call.softcap and call.dropout:
        return "does not support softcap together with dropout"
    for needed, option in (
        (call.softcap, "softcap"),
        (call.dropout, "dropout_p"),
        (call.window is not None, "window_size"),
    ):
        if needed and option not in accepted:
            return f"this version does not accept {option}"
    return _flash_kernels_lack(call)


def _run_flash_attn(tensors: Tensors, max_seqlens: tuple[int, int], options: Options) -> Tensor:
    function, accepted = _require_found(_flash_attn())
    keywords: dict[str, Any] = {"softmax_scale": options["scale"], "causal": options["causal"]}
    if "max_seqlen_q" in accepted:  # not in flash-attn 4
        keywords["max_seqlen_q"], keywords["max_seqlen_k"] = max_seqlens
    if options["window"] is not None:
        # A side without a limit is -1 in flash-attn 2 and 3, and None in flash-attn 4.
        no_limit = accepted["window_size"].default[0]
        keywords["window_size"] = tuple(
            no_limit if side < 0 else side for side in _flash_window(options)
        )
    if options["softcap"]:
        keywords["softcap"] = options["softcap"]
    if options["dropout_p"] > 0.0:
        keywords["dropout_p"] = options["dropout_p"]
    q, k, v, cu_seqlens_q, cu_seqlens_k = tensors
    out = function(q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **keywords)
    return out[0] if isinstance(out, tuple) else out


@lru_cache(maxsize=1)
def _flash_attn() -> Found | str:
    """flash-attn's varlen function, or why it is missing. Versions 3 and 4 are other modules."""
    broken = None
    for module in ("flash_attn", "flash_attn_interface", "flash_attn.cute"):
        found = _probe(module, "flash_attn_varlen_func")
        if isinstance(found, tuple):
            return found
        broken = broken or found
    return broken or "flash-attn is not installed (pip install 'tokenpack[flash]')"


# --------------------------------------------------------------------------- torch's varlen_attn


def _torch_lacks(call: AttentionCall) -> str | None:
    if call.device_type != "cuda":
        return f"needs a CUDA device, not {call.device_type}"
    found = _torch_varlen()
    if isinstance(found, str):
        return found
    _, accepted = found
    for needed, name in (
        (call.relative_bias, "a relative bias"),
        (call.softcap, "softcap"),
        (call.dropout, "dropout"),
    ):
        if needed:
            return f"does not support {name}"
    if call.heads != call.kv_heads and "enable_gqa" not in accepted:
        return "this version does not support grouped-query heads"
    if not call.default_scale and "scale" not in accepted:
        return "this version does not accept scale"
    if call.window is not None and "window_size" not in accepted:
        return "this version does not accept window_size"
    if call.causal and not {"is_causal", "window_size"} & accepted.keys():
        return "this version accepts neither is_causal nor window_size"
    return _flash_kernels_lack(call)


def _run_torch(tensors: Tensors, max_seqlens: tuple[int, int], options: Options) -> Tensor:
    function, accepted = _require_found(_torch_varlen())
    q, k, *_ = tensors
    keywords = _torch_keywords(accepted, options, grouped=q.shape[1] != k.shape[1])
    return function(*tensors, *max_seqlens, **keywords)


def _torch_keywords(accepted: Parameters, options: Options, grouped: bool) -> dict[str, Any]:
    """The keywords of `varlen_attn`, which differ between releases.

    torch 2.10 has ``is_causal`` and no window. From 2.11 on a causal call is a window that ends at
    0. ``scale`` exists since 2.11 and ``enable_gqa`` since 2.12.
    """
    keywords = {
        "is_causal": options["causal"],
        "window_size": _flash_window(options),
        "scale": options["scale"],
        "enable_gqa": grouped,
    }
    return {name: value for name, value in keywords.items() if name in accepted}


@lru_cache(maxsize=1)
def _torch_varlen() -> Found | str:
    """torch's varlen function, or why it is missing."""
    found = _probe("torch.nn.attention.varlen", "varlen_attn")
    return found or "this torch has no torch.nn.attention.varlen.varlen_attn"


# -------------------------------------------------------------- shared by flash-attn and torch

Parameters = Mapping[str, inspect.Parameter]
Found = tuple[Callable[..., Any], Parameters]


def _flash_window(options: Options) -> tuple[int, int]:
    """Causality and window as the one window that flash attention takes."""
    left, right = options["window"] or (-1, -1)
    return (left, 0 if options["causal"] else right)


def _flash_kernels_lack(call: AttentionCall) -> str | None:
    """What the kernels lack that flash-attn and torch share."""
    if call.dtype not in _HALF:
        return f"needs float16 or bfloat16, not {call.dtype}"
    if call.head_dim > 256 or call.head_dim % 8:
        return f"needs a head_dim that is a multiple of 8 up to 256, not {call.head_dim}"
    if not is_ampere_or_newer(call.device_index):
        return "needs compute capability 8.0 or newer"
    if not call.flash_scratch_fits:
        return "its backward fails past 2**31 scratch elements"
    return None


def _probe(module: str, name: str) -> Found | str | None:
    """A function and its parameters, which differ between releases.

    None if it is not installed, or a description of the error if the import fails.
    """
    try:
        function = getattr(importlib.import_module(module), name)
    except AttributeError:
        return None
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and module.startswith(error.name or "?"):
            return None
        return f"{module} cannot be imported: {error}"
    return function, inspect.signature(function).parameters


def _require_found(found: Found | str) -> Found:
    assert not isinstance(found, str), "choose_backend selects only a function that exists"
    return found


# ------------------------------------------------------------------------------ tokenpack.kernels


def _triton_lacks(call: AttentionCall) -> str | None:
    index = call.device_index
    device = call.device_type if index is None else f"{call.device_type}:{index}"
    return kernel_lacks(device, call.dtype, call.head_dim)


def _run_triton(tensors: Tensors, max_seqlens: tuple[int, int], options: Options) -> Tensor:
    out = varlen_attention(*tensors, **options)
    assert isinstance(out, Tensor)
    return out


def _run_reference(tensors: Tensors, max_seqlens: tuple[int, int], options: Options) -> Tensor:
    return varlen_attention_reference(*tensors, **options)


TABLE = (
    Backend("flash_attn", _flash_attn_lacks, _run_flash_attn),
    Backend("torch", _torch_lacks, _run_torch),
    Backend("triton", _triton_lacks, _run_triton),
    Backend("reference", lambda call: None, _run_reference),
)
