"""Attention within each sequence of a packed batch.

    out[m] = sum_n softmax_n(softcap(scale * q[m] . k[n]) + bias[n - m]) * v[n]

The sum is over the keys n of query m's own sequence that the causal mask and the window allow. If q
and k have different lengths, ``m`` and ``n`` count from the ends of their sequences (bottom-right
alignment, as in flash attention): the last query has the position of the last key.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .._ops import runs_eagerly
from .offsets import assert_offsets
from .op import kernel_lacks
from .reference import HostPlan, attend_by_sequence, plan_on_host
from .spec import NO_LIMIT, AttentionSpec


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    relative_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend within each sequence of a packed batch.

    On a GPU of compute capability 8.0 or newer, a Triton kernel runs for float16, bfloat16 and
    float32 and for a head_dim from 16 to 256 (`docs/attention.md`). It never synchronizes with the
    host. Invalid values in ``cu_seqlens`` are device-side assertions, but not in a graph of
    torch.compile, which does not check them. All other calls run in plain PyTorch,
    as `varlen_attention_reference` does; `kernel_lacks` gives the reason. Results are deterministic
    on the kernel: two runs give the same bits, gradients included. Gradients are of first order:
    differentiating them again raises an error, as `torch.func.grad` does.

    Args:
        q: ``(total_q, heads, head_dim)``, floating point, with any strides.
        k: ``(total_k, kv_heads, head_dim)``; ``heads`` is a multiple of ``kv_heads``.
        v: ``(total_k, kv_heads, head_dim)``.
        cu_seqlens_q: ``(num_seqs + 1,)`` int32, non-decreasing from 0 to ``total_q``.
        cu_seqlens_k: ``(num_seqs + 1,)`` int32, non-decreasing from 0 to ``total_k``.
        causal: hide the keys after each query's position, bottom-right aligned.
        scale: factor of the products q . k; default ``head_dim ** -0.5``.
        window: ``(left, right)``, how many keys before and after its position a query sees. A
            negative number means no limit.
        softcap: bound on the scores, ``cap * tanh(score / cap)``, applied before the bias. 0 or
            None means no bound.
        relative_bias: ``(heads, 2 * reach + 1)``, floating point. The score of a key at distance
            ``d = n - m`` from its query gets the bias at index ``d + reach``. Distances beyond the
            reach get the bias of the nearest end. Differentiable. See ``t5_bias_table`` and
            ``alibi_bias_table``.
        dropout_p: probability that an attention weight is dropped. The remaining weights are
            scaled by ``1 / (1 - dropout_p)``.
        dropout_seed: ``(1,)`` int64 on q's device; by default drawn from PyTorch's generator. On
            the kernel, the dropped weights depend only on the seed, the sequence's number in the
            batch, the head, the query and the key. They do not depend on other sequences.
        deterministic: Accepted for compatibility; has no effect. Deprecated.
        return_lse: also return the logarithm of each query's sum of exponentials, without gradient.

    Returns:
        ``(total_q, heads, head_dim)`` in q's dtype, or in autocast's dtype under autocast. A query
        that sees no key gives 0 and has a gradient of 0. With ``return_lse``, also the logsumexp:
        ``(heads, total_q)`` float32 (float64 for float64 inputs), -inf where no key is visible.

    Raises:
        TypeError: if q, k and v have different dtypes, or they or the bias are not floating point.
        ValueError: if an argument has a wrong shape, device or value, or if the kernels get 2**30
            rows or more. The message names it.
    """
    if deterministic is not None and not torch.compiler.is_compiling():
        message = "deterministic has no effect and is deprecated; leave it out of varlen_attention"
        warnings.warn(message, FutureWarning, stacklevel=2)
    q, k, v = cast_for_autocast(q, k, v)
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, relative_bias)
    spec = _spec(q.shape[-1], causal, scale, window, softcap, dropout_p)
    _check_seed(dropout_seed, q)
    on_kernel = kernel_lacks(q.device, q.dtype, q.shape[2]) is None
    if not (on_kernel or return_lse or dropout_seed is not None or torch.compiler.is_compiling()):
        return attend_by_sequence(q, k, v, cu_seqlens_q, cu_seqlens_k, relative_bias, spec)
    if on_kernel and runs_eagerly(q, cu_seqlens_q, cu_seqlens_k):
        assert_offsets("cu_seqlens_q", cu_seqlens_q, q.shape[0])
        assert_offsets("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    if spec.dropout_p > 0.0 and dropout_seed is None:
        dropout_seed = torch.randint(2**62, (1,), device=q.device)
    out, lse = torch.ops.tokenpack.varlen_attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        relative_bias,
        dropout_seed,
        spec.scale,
        *spec.limits,
        spec.softcap or 0.0,
        spec.dropout_p,
    )
    return (out, lse) if return_lse else out


def varlen_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    relative_bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """`varlen_attention` in plain PyTorch on any device: the CPU path, and a test oracle.

    It copies ``cu_seqlens`` to the host and validates their values.

    Raises:
        TypeError: as `varlen_attention`.
        ValueError: as `varlen_attention`, and if ``cu_seqlens`` are not non-decreasing from 0 to
            the length of their tensor.
    """
    q, k, v = cast_for_autocast(q, k, v)
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, relative_bias)
    spec = _spec(q.shape[-1], causal, scale, window, softcap, dropout_p)
    return attend_by_sequence(q, k, v, cu_seqlens_q, cu_seqlens_k, relative_bias, spec)


def plan_reference(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    totals: tuple[int, int],
    heads: tuple[int, int],
    device: torch.device,
    has_bias: bool,
    options: Any,
) -> HostPlan:
    """What `varlen_attention_reference` does for all layers that have the same layout and options.

    `attend_on_host` runs the plan.

    Args:
        cu_seqlens_q, cu_seqlens_k: as in `varlen_attention`.
        totals: the numbers of queries and of keys.
        heads: the numbers of heads of queries, and of keys and values.
        device: the device of q, k and v.
        has_bias: whether there is a relative bias.
        options: the keywords ``causal``, ``scale``, ``window``, ``softcap`` and ``dropout_p``.

    Raises:
        ValueError: as `varlen_attention_reference`.
    """
    if heads[1] == 0 or heads[0] % heads[1]:
        raise ValueError(
            f"k must have a number of heads that divides q's {heads[0]}, got {heads[1]}"
        )
    names = ("causal", "scale", "window", "softcap", "dropout_p")
    spec = _spec(0, *(options[name] for name in names))
    return plan_on_host(cu_seqlens_q, cu_seqlens_k, totals, heads, device, has_bias, spec)


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast tensors to autocast's dtype if autocast is on, as PyTorch's own attention does."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def normal_window(window: tuple[int, int] | None) -> tuple[int, int] | None:
    """Normalize a window: ``(left, right)`` with -1 for no limit, or None if neither side has one.

    A side larger than any sequence also counts as no limit.
    """
    if window is None:
        return None
    if len(window) != 2:
        raise ValueError(f"window must be (left, right), got {window}")
    left, right = (int(side) if 0 <= side < NO_LIMIT else -1 for side in window)
    return None if left < 0 and right < 0 else (left, right)


def _spec(
    head_dim: int,
    causal: bool,
    scale: float | None,
    window: tuple[int, int] | None,
    softcap: float | None,
    dropout_p: float,
) -> AttentionSpec:
    if softcap is not None and not softcap >= 0.0:  # NaN fails too
        raise ValueError(f"softcap must be positive, 0 or None, got {softcap}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}")
    return AttentionSpec(
        causal=causal,
        scale=head_dim**-0.5 if scale is None else scale,
        window=normal_window(window),
        softcap=softcap or None,
        dropout_p=dropout_p,
    )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    relative_bias: Tensor | None,
) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ValueError(
                f"{name} must be (total, heads, head_dim), got shape {tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point() or tensor.dtype != q.dtype:
            raise TypeError(
                f"q, k and v must have the same floating-point dtype, got {name} in {tensor.dtype}"
            )
    if k.shape != v.shape:
        raise ValueError(
            f"k and v must have the same shape, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    heads, head_dim = q.shape[1:]
    if k.shape[2] != head_dim:
        raise ValueError(f"k must have q's head_dim = {head_dim}, got {k.shape[2]}")
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(
            f"k must have a number of heads that divides q's {heads}, got {k.shape[1]}"
        )
    for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if offsets.dim() != 1 or offsets.numel() < 2 or offsets.dtype != torch.int32:
            raise ValueError(
                f"{name} must be (num_seqs + 1,) int32, "
                f"got shape {tuple(offsets.shape)} {offsets.dtype}"
            )
    if cu_seqlens_q.numel() != cu_seqlens_k.numel():
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must have the same number of sequences, "
            f"got {cu_seqlens_q.numel() - 1} and {cu_seqlens_k.numel() - 1}"
        )
    for name, other in (
        ("k", k),
        ("v", v),
        ("cu_seqlens_q", cu_seqlens_q),
        ("cu_seqlens_k", cu_seqlens_k),
        ("relative_bias", relative_bias),
    ):
        if other is not None and other.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {other.device}")
    if relative_bias is not None:
        _check_bias(relative_bias, heads)


def _check_bias(relative_bias: Tensor, heads: int) -> None:
    shape = tuple(relative_bias.shape)
    if not relative_bias.is_floating_point():
        raise TypeError(f"relative_bias must be floating point, got {relative_bias.dtype}")
    if len(shape) != 2 or shape[0] != heads or shape[1] % 2 == 0:
        raise ValueError(
            f"relative_bias must be (heads = {heads}, 2 * reach + 1), got shape {shape}"
        )


def _check_seed(seed: Tensor | None, q: Tensor) -> None:
    if seed is None:
        return
    if seed.shape != (1,) or seed.dtype != torch.int64 or seed.device != q.device:
        raise ValueError(
            f"dropout_seed must be (1,) int64 on {q.device}, "
            f"got {tuple(seed.shape)} {seed.dtype} on {seed.device}"
        )
