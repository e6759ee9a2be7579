"""Attention of a layer in a graph of torch.compile: one registered op with explicit arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import PackedLayout
from ..kernels.attention import cast_for_autocast, kernel_lacks, varlen_attention
from .backends import AttentionCall
from .dispatch import Choice, choose_backend, find_backend, layer_options
from .host_op import attend_on_host_in_graph


class Layer(NamedTuple):
    """The options of a layer, as keywords of `layout_attention`."""

    causal: bool
    scale: float | None
    sliding_window: int | None
    softcap: float | None
    relative_bias: Tensor | None
    dropout_p: float


def attention_in_graph(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layouts: Mapping[str, PackedLayout],
    role: str,
    layer: Layer,
    backend: str,
) -> tuple[Tensor, Choice]:
    """`layout_attention` for torch.compile.

    The arguments, the results and the errors are those of `layout_attention`. The numbers of
    tokens may be symbols. The backend is chosen while tracing. If it is the reference, the op
    ``tokenpack::host_attention`` runs it on a CPU, and ``tokenpack::varlen_attention`` elsewhere
    and with dropout.
    """
    causal, scale, sliding_window, softcap, relative_bias, dropout_p = layer
    query, key, value = cast_for_autocast(query, key, value)
    side_q, side_k = ("dec", "enc") if role == "cross" else (role, role)
    layout_q, layout_k = layouts[side_q].to(query.device), layouts[side_k].to(query.device)
    if query.shape[2] != layout_q.total_tokens or key.shape[2] != layout_k.total_tokens:
        raise RuntimeError(
            f"query and key must have the {layout_q.total_tokens} and {layout_k.total_tokens} "
            f"tokens of their layouts, got {query.shape[2]} and {key.shape[2]} (role {role!r})"
        )
    heads, kv_heads, head_dim = map(_constant, (query.shape[1], key.shape[1], query.shape[3]))
    if sliding_window is not None:
        sliding_window = _constant(sliding_window)
    options = layer_options(head_dim, causal, scale, sliding_window, softcap, dropout_p)
    chosen = _choose(
        backend,
        device_type=query.device.type,
        device_index=query.device.index,
        dtype=query.dtype,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        default_scale=_truth(options["scale"] == head_dim**-0.5),
        causal=causal,
        window=options["window"],
        softcap=_truth(softcap),
        relative_bias=relative_bias is not None,
        dropout=_truth(dropout_p > 0.0),
    )
    if isinstance(chosen, str):
        raise ValueError(chosen)
    if relative_bias is not None:
        options["relative_bias"] = relative_bias
    q, k, v = (side.squeeze(0).transpose(0, 1) for side in (query, key, value))
    tensors = q, k, v, layout_q.cu_seqlens, layout_k.cu_seqlens
    no_dropout = not _truth(dropout_p > 0.0)
    if chosen.backend == "reference" and no_dropout and q.device.type == "cpu":
        return attend_on_host_in_graph(tensors, options)[None], chosen
    if chosen.backend == "reference" and kernel_lacks(q.device, q.dtype, q.shape[2]):
        out = varlen_attention(*tensors, **options)  # the op runs the reference
        assert isinstance(out, Tensor)
        return out[None], chosen
    if chosen.backend in ("flash_attn", "torch"):
        _check_scratch(q, layout_q.num_seqs)
    run = _function(chosen.backend)
    return run(tensors, (layout_q.max_seqlen, layout_k.max_seqlen), options)[None], chosen


def _constant(size: int) -> int:
    """The size as a number also with ``dynamic=True``, which makes symbols of all sizes."""
    return len([None] * size)


def _truth(condition: Any) -> bool:
    """A condition on numbers that may be symbols, too. torch.compile guards on the branch."""
    truth = False
    if condition:
        truth = True
    return truth


def _check_scratch(q: Tensor, num_seqs: int) -> None:
    """Raise when the graph runs if `AttentionCall.flash_scratch_fits` would be False."""
    total, heads, head_dim = q.shape
    torch._check(
        (total + 128 * (num_seqs + 1)) * heads * (-(-head_dim // 32) * 32) < 2**31,
        lambda: (
            "flash attention's backward fails past 2**31 scratch elements: use smaller batches, "
            "or patch_model(model, attention='triton')"
        ),
    )


# torch.compile runs these once, while it traces.


@torch.compiler.assume_constant_result
def _choose(backend: str, **properties: Any) -> Choice | str:
    """The choice, or the message of an error."""
    try:
        return choose_backend(AttentionCall(**properties, flash_scratch_fits=True), backend)
    except ValueError as error:
        return str(error)


@torch.compiler.assume_constant_result
def _function(backend: str) -> Any:
    return find_backend(backend).run
