"""Attention within each packed sequence, the sequences never seeing one another.

    out[m] = sum_n softmax_n(cap(scale * q[m] . k[n]) + bias[n - m]) * v[n]

for n over the keys of m's own sequence that causality and the window allow. ``m`` and ``n`` count
from the end of their sequences where q and k differ in length (aligned bottom-right, as flash
attention does), so that the last query stands at the last key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .op import kernel_lacks
from .reference import attend_by_sequence
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
    deterministic: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend within each sequence of a packed batch.

    On a GPU of compute capability 8.0 or newer a Triton kernel runs, in float16, bfloat16 and
    float32 and for a head_dim from 16 to 256 (`docs/attention.md`); it waits for nothing and takes
    the boundaries as they are. What `kernel_lacks` names, and every other device, runs in plain
    PyTorch: `varlen_attention_reference`.

    Args:
        q: ``(total_q, heads, head_dim)``, floating point, of any strides.
        k: ``(total_k, kv_heads, head_dim)``; ``heads`` is a multiple of ``kv_heads``.
        v: ``(total_k, kv_heads, head_dim)``.
        cu_seqlens_q: ``(num_seqs + 1,)`` int32, rising from 0 to ``total_q``.
        cu_seqlens_k: ``(num_seqs + 1,)`` int32, rising from 0 to ``total_k``.
        causal: let a query see no key behind its own place; bottom-right where lengths differ.
        scale: factor of the scores, by default ``head_dim ** -0.5``.
        window: ``(left, right)``, how many keys before and after its own place a query sees;
            a negative number is no limit.
        softcap: bound on the scores, ``cap * tanh(score / cap)``, before the bias; 0 is none.
        relative_bias: ``(heads, 2 * reach + 1)`` floating point; what is added to the score of a
            key at distance ``d = n - m`` from its query, at index ``d + reach``. Beyond the reach
            the outermost value holds. Differentiable. See ``t5_bias_table``, ``alibi_bias_table``.
        dropout_p: chance that an attention weight is dropped; the others are scaled up.
        dropout_seed: ``(1,)`` int64 where q is; drawn from PyTorch's generator if not given. In
            the kernel the weights dropped depend on it, the sequence's number in the batch, the
            head, the query and the key alone: not on the other sequences, nor on padding.
        deterministic: here to be found by those who look for it. Two runs of the kernel give the
            same bits, gradients included, whatever it is.
        return_lse: return the logarithm of the sum of exponentials too, without gradient.

    Returns:
        ``(total_q, heads, head_dim)`` in q's dtype, under autocast in autocast's. A query that
        sees no key gives 0, and its gradient is 0. With ``return_lse`` also ``(heads, total_q)``
        float32 (float64 for float64 inputs), -inf where no key is seen.

    Raises:
        TypeError: if q, k and v differ in dtype, or they or the bias are not floating point.
        ValueError: if a shape, device or option does not fit, naming it.
    """
    q, k, v = cast_for_autocast(q, k, v)
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, relative_bias)
    spec = _spec(q, causal, scale, window, softcap, dropout_p)
    _check_seed(dropout_seed, q)
    on_kernel = kernel_lacks(q.device.type, q.dtype, q.shape[2]) is None
    if not (on_kernel or return_lse or dropout_seed is not None or torch.compiler.is_compiling()):
        return attend_by_sequence(q, k, v, cu_seqlens_q, cu_seqlens_k, relative_bias, spec)
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


def _check_seed(seed: Tensor | None, q: Tensor) -> None:
    if seed is None:
        return
    if seed.shape != (1,) or seed.dtype != torch.int64 or seed.device != q.device:
        raise ValueError(
            f"dropout_seed must be (1,) int64 on {q.device}, "
            f"got {tuple(seed.shape)} {seed.dtype} on {seed.device}"
        )


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
    """`varlen_attention` in plain PyTorch, on any device: the CPU path, and an oracle.

    It looks at the boundaries on the host, and checks them.

    Raises:
        ValueError: also if ``cu_seqlens`` do not rise from 0 to the length of their tensor.
    """
    q, k, v = cast_for_autocast(q, k, v)
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, relative_bias)
    spec = _spec(q, causal, scale, window, softcap, dropout_p)
    return attend_by_sequence(q, k, v, cu_seqlens_q, cu_seqlens_k, relative_bias, spec)


def _spec(
    q: Tensor,
    causal: bool,
    scale: float | None,
    window: tuple[int, int] | None,
    softcap: float | None,
    dropout_p: float,
) -> AttentionSpec:
    if softcap is not None and not softcap >= 0.0:
        raise ValueError(f"softcap must be positive, 0 or None, got {softcap}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}")
    return AttentionSpec(
        causal=causal,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        window=normal_window(window),
        softcap=softcap or None,
        dropout_p=dropout_p,
    )


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on, as PyTorch's own attention takes them."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def normal_window(window: tuple[int, int] | None) -> tuple[int, int] | None:
    """``(left, right)`` with -1 for no limit, or None where neither side has one.

    A side beyond any sequence's length is no limit either.
    """
    if window is None:
        return None
    if len(window) != 2:
        raise ValueError(f"window must be (left, right), got {window}")
    left, right = (int(side) if 0 <= side < NO_LIMIT else -1 for side in window)
    return None if left < 0 and right < 0 else (left, right)


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
                f"q, k and v must share one floating-point dtype, got {name} in {tensor.dtype}"
            )
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    heads, head_dim = q.shape[1:]
    if k.shape[2] != head_dim:
        raise ValueError(f"k must have q's head_dim = {head_dim}, got {k.shape[2]}")
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"q's {heads} heads must be a multiple of k's, got {k.shape[1]}")
    for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if offsets.dim() != 1 or offsets.numel() < 2 or offsets.dtype != torch.int32:
            raise ValueError(
                f"{name} must be (num_seqs + 1,) int32, "
                f"got shape {tuple(offsets.shape)} {offsets.dtype}"
            )
    if cu_seqlens_q.numel() != cu_seqlens_k.numel():
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must count the same sequences, "
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
            raise ValueError(f"{name} must be where q is, on {q.device}, got {other.device}")
    if relative_bias is not None and not relative_bias.is_floating_point():
        raise TypeError(f"relative_bias must be floating point, got {relative_bias.dtype}")
    if relative_bias is not None and (
        relative_bias.dim() != 2
        or relative_bias.shape[0] != heads
        or relative_bias.shape[1] % 2 == 0
    ):
        raise ValueError(
            f"relative_bias must be (heads = {heads}, 2 * reach + 1), "
            f"got shape {tuple(relative_bias.shape)}"
        )
