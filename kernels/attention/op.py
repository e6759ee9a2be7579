"""Varlen attention as `torch.library` ops: the Triton kernels, and a loop over sequences for them.

The loop says the formulas in the plainest way, score by score. It is what the op runs on a CPU
while it is traced or asked for the logsumexp; `reference` is faster there, and runs otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._triton import DEVICES, on_triton
from .backward import attention_backward
from .forward import attention_forward
from .spec import AttentionSpec

_LOG2_E = 1.4426950408889634
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def kernel_devices() -> tuple[str, ...]:
    """Types of the devices whose tensors the Triton kernel can take."""
    return tuple(DEVICES)


def kernel_lacks(dtype: torch.dtype, head_dim: int) -> str | None:
    """What the Triton kernel lacks for a call, or None if nothing."""
    if dtype not in _DTYPES:
        return f"needs float16, bfloat16 or float32, not {dtype}"
    if not 16 <= head_dim <= 256:
        return f"needs a head_dim from 16 to 256, not {head_dim}"
    return None


@torch.library.custom_op("tokenpack::varlen_attention", mutates_args=())
def _varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    table: Tensor | None,
    seed: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """out, and ``(heads, total_q)`` logsumexp. Limits -1 and softcap 0 are none."""
    spec = _spec(scale, left, right, softcap, dropout_p, seed)
    return _attend(q, k, v, cu_seqlens_q, cu_seqlens_k, table, seed, spec)


@torch.library.custom_op("tokenpack::varlen_attention_backward", mutates_args=())
def _varlen_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    table: Tensor | None,
    seed: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
    needs_table: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and the table's gradient, empty where nobody needs it."""
    spec = _spec(scale, left, right, softcap, dropout_p, seed)
    return _pull(
        dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, table, seed, spec, needs_table
    )


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    table: Tensor | None,
    seed: Tensor | None,
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor]:
    out, lse = _new_outputs(q)
    out.zero_()
    for s, rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
        q_s, k_s, v_s = _heads_first(q, k, v, rows, keys)
        scores, _ = _scores(q_s, k_s, table, spec)
        row_lse = scores.logsumexp(-1)
        weights = _weights(scores, row_lse)
        weights = weights * _kept(weights, seed, s, spec.dropout_p)
        out[rows] = (weights @ v_s).transpose(0, 1).to(out.dtype)
        lse[:, rows] = row_lse
    return out, lse


def _pull(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    table: Tensor | None,
    seed: Tensor | None,
    spec: AttentionSpec,
    needs_table: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dtable = _new_gradients(q, k, v, table, needs_table)
    for gradient in (dq, dk, dv, dtable):
        gradient.zero_()
    for s, rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
        q_s, k_s, v_s = _heads_first(q, k, v, rows, keys)
        dout_s, out_s = (side[rows].transpose(0, 1).to(q_s.dtype) for side in (dout, out))
        scores, slope = _scores(q_s, k_s, table, spec)
        weights = _weights(scores, lse[:, rows])
        keep = _kept(weights, seed, s, spec.dropout_p)
        delta = (dout_s * out_s).sum(-1, keepdim=True)
        dscores = weights * ((dout_s @ v_s.mT) * keep - delta)
        if table is not None and needs_table:
            index = _table_indices(_distances(q_s, k_s), table).flatten()
            dtable.index_add_(1, index, dscores.flatten(1))
        dscores = dscores * slope * spec.scale
        dq[rows] = (dscores @ k_s).transpose(0, 1).to(dq.dtype)
        dk[keys] = _per_kv_head(dscores.mT @ q_s, k).to(dk.dtype)
        dv[keys] = _per_kv_head((weights * keep).mT @ dout_s, v).to(dv.dtype)
    return dq, dk, dv, dtable


def _spec(
    scale: float, left: int, right: int, softcap: float, dropout_p: float, seed: Tensor | None
) -> AttentionSpec:
    if dropout_p > 0.0 and seed is None:
        raise ValueError(f"seed must be given where dropout_p is {dropout_p}, got None")
    return AttentionSpec(False, scale, (left, right), softcap or None, dropout_p)


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[int, slice, slice]]:
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for s in range(len(starts_q) - 1):
        yield s, slice(*starts_q[s : s + 2]), slice(*starts_k[s : s + 2])


def _heads_first(
    q: Tensor, k: Tensor, v: Tensor, rows: slice, keys: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """``(heads, tokens, head_dim)`` of one sequence, in float32 at least, keys for each head."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q_s, k_s, v_s = (
        side[part].transpose(0, 1).to(wide) for side, part in ((q, rows), (k, keys), (v, keys))
    )
    group = q.shape[1] // k.shape[1]
    return q_s, k_s.repeat_interleave(group, 0), v_s.repeat_interleave(group, 0)


def _distances(q_s: Tensor, k_s: Tensor) -> Tensor:
    """``(rows, keys)``, from the place of each query to each key."""
    rows, keys = q_s.shape[1], k_s.shape[1]
    places = torch.arange(keys - rows, keys, device=q_s.device)
    return torch.arange(keys, device=q_s.device) - places[:, None]


def _scores(
    q_s: Tensor, k_s: Tensor, table: Tensor | None, spec: AttentionSpec
) -> tuple[Tensor, Tensor | float]:
    """``(heads, rows, keys)``, -inf out of sight, and the softcap's slope."""
    scores = (q_s @ k_s.mT) * spec.scale
    slope: Tensor | float = 1.0
    if spec.softcap is not None:
        bent = torch.tanh(scores / spec.softcap)
        scores, slope = bent * spec.softcap, 1.0 - bent.square()
    distance = _distances(q_s, k_s)
    if table is not None:
        scores = scores + table.to(scores.dtype)[:, _table_indices(distance, table)]
    left, right = spec.limits
    if left >= 0:
        scores = scores.masked_fill(distance < -left, float("-inf"))
    if right >= 0:
        scores = scores.masked_fill(distance > right, float("-inf"))
    return scores, slope


def _table_indices(distance: Tensor, table: Tensor) -> Tensor:
    reach = table.shape[1] // 2
    return distance.clamp(-reach, reach) + reach


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """The softmax; 0 in rows that see nothing."""
    return (scores - lse.masked_fill(lse == float("-inf"), float("inf"))[..., None]).exp()


def _kept(weights: Tensor, seed: Tensor | None, seq: int, dropout_p: float) -> Tensor | float:
    """0 for the weights that dropout takes away, 1 / (1 - p) for the others; as often as asked."""
    if seed is None or dropout_p == 0.0:
        return 1.0
    generator = torch.Generator(weights.device).manual_seed(int(seed) + seq)
    chance = torch.rand(weights.shape, generator=generator, device=weights.device)
    return (chance >= dropout_p) / (1.0 - dropout_p)


def _per_kv_head(grad: Tensor, side: Tensor) -> Tensor:
    """``(heads, keys, head_dim)`` to ``(keys, kv_heads, head_dim)``, summed."""
    return grad.unflatten(0, (side.shape[1], -1)).sum(1).transpose(0, 1)


# ------------------------------------------------------------------------------------------ Triton


@on_triton(_varlen_attention)
def varlen_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    table: Tensor | None,
    seed: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """The op ``varlen_attention`` in one launch."""
    spec = _spec(scale, left, right, softcap, dropout_p, seed)
    if kernel_lacks(q.dtype, q.shape[2]):
        return _attend(q, k, v, cu_seqlens_q, cu_seqlens_k, table, seed, spec)
    q, k, v = map(_close_columns, (q, k, v))
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    return attention_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, _log2(table), seed, spec)


@on_triton(_varlen_attention_backward)
def varlen_attention_backward_triton(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    table: Tensor | None,
    seed: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
    needs_table: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``varlen_attention_backward`` in two launches, and the sum of the bias's partials."""
    spec = _spec(scale, left, right, softcap, dropout_p, seed)
    if kernel_lacks(q.dtype, q.shape[2]):
        return _pull(
            dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, table, seed, spec, needs_table
        )
    dout, q, k, v = map(_close_columns, (dout, q, k, v))
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    dq, dk, dv, dtable = attention_backward(
        dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, _log2(table), seed, spec, needs_table
    )
    return dq, dk, dv, lse.new_empty(0) if dtable is None else dtable


def _close_columns(side: Tensor) -> Tensor:
    return side if side.stride(2) == 1 else side.contiguous()


def _log2(table: Tensor | None) -> Tensor | None:
    """The table in the kernels' units, float32 and in one piece."""
    return None if table is None else (table.float() * _LOG2_E).contiguous()


# ------------------------------------------------------------- what torch.compile and autograd need


def _new_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=wide)


def _new_gradients(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, needs_table: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    shape = (0,) if table is None or not needs_table else table.shape
    dq, dk, dv = (side.new_empty(side.shape) for side in (q, k, v))
    return dq, dk, dv, q.new_empty(shape, dtype=wide)


@_varlen_attention.register_fake
def _(q, k, v, cu_q, cu_k, table, seed, scale, left, right, softcap, dropout_p):
    return _new_outputs(q)


@_varlen_attention_backward.register_fake
def _(
    dout, q, k, v, out, lse, cu_q, cu_k, table, seed, scale, left, right, softcap, p, needs_table
):
    return _new_gradients(q, k, v, table, needs_table)


def _save_for_backward(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, table, seed, *ctx.options = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, table, seed)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout: Tensor | None, _dlse):
    nothing = (None,) * (7 + len(ctx.options))
    if dout is None:
        return nothing
    tensors = ctx.saved_tensors  # once: checkpointing forbids to look again
    table, needs_table = tensors[7], ctx.needs_input_grad[5]
    dq, dk, dv, dtable = torch.ops.tokenpack.varlen_attention_backward(
        dout, *tensors, *ctx.options, needs_table
    )
    return dq, dk, dv, None, None, dtable.to(table.dtype) if needs_table else None, *nothing[6:]


_varlen_attention.register_autograd(_backward, setup_context=_save_for_backward)
