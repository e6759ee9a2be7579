"""Varlen attention in plain PyTorch: the CPU path, and the oracle of every other backend.

Two ways through it. Where PyTorch's fused attention says all there is to say (no bias, window or
softcap, no query without a key) each sequence goes through it, short ones of similar length
together. Everything else runs score by score, sequence by sequence, in `_ExplicitAttention`.

The explicit way rests on one observation: causality, window and relative bias all depend on the
distance n - m alone. So they are one *line* of values per head, with -inf where a key is out of
sight. With the queries in reverse order, row w of the scores wants ``line[w : w + num_keys]``: a
view of the line whose two strides are both 1. The bias of a whole sequence is added without being
built, and its gradient is one sum down the columns of the scores' gradient, read through a view
that is one column wider than it was written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .relative_bias import bias_line, line_distances

# A fused call costs about 0.13 ms forward and backward on a CPU whatever its size; sequences up to
# this long compute for less than that, so they are worth padding to share one.
_SHORT = 32
_SHORT_STEP = 8
_WORTH_SHARING = 4


class AttentionSpec(NamedTuple):
    """The options of one attention call that are no tensors."""

    causal: bool
    scale: float
    window: tuple[int, int] | None  # (left, right), -1 for no limit
    softcap: float | None
    dropout_p: float


class Sequences(NamedTuple):
    """Where each sequence lies on the q and the k side, on the host."""

    starts_q: list[int]
    starts_k: list[int]

    def __iter__(self) -> Iterator[tuple[slice, slice]]:  # type: ignore[override]
        for s in range(len(self.starts_q) - 1):
            yield (
                slice(self.starts_q[s], self.starts_q[s + 1]),
                slice(self.starts_k[s], self.starts_k[s + 1]),
            )

    @property
    def lengths(self) -> list[tuple[int, int]]:
        return [(rows.stop - rows.start, keys.stop - keys.start) for rows, keys in self]


# Host lists and loops per sequence: nothing that torch.compile could make faster.
@torch.compiler.disable
def attend_by_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    relative_bias: Tensor | None,
    spec: AttentionSpec,
) -> Tensor:
    """Attention within each sequence. Shapes as in `varlen_attention`, which has checked them."""
    sequences = Sequences(cu_seqlens_q.tolist(), cu_seqlens_k.tolist())
    for name, starts, total in (
        ("cu_seqlens_q", sequences.starts_q, q.shape[0]),
        ("cu_seqlens_k", sequences.starts_k, k.shape[0]),
    ):
        if starts[0] != 0 or starts[-1] != total or any(a > b for a, b in zip(starts, starts[1:])):
            raise ValueError(
                f"{name} must rise from 0 to {total}, the length of its tensor, "
                f"got {starts if len(starts) < 9 else [*starts[:4], '...', *starts[-4:]]}"
            )
    lengths = sequences.lengths
    every_query_sees_a_key = all(
        keys >= rows if spec.causal else keys > 0 for rows, keys in lengths if rows
    )
    causal_is_square = not spec.causal or all(rows == keys for rows, keys in lengths if rows)
    if (
        relative_bias is None
        and spec.window is None
        and spec.softcap is None
        and every_query_sees_a_key
        and causal_is_square  # PyTorch's flag aligns top-left
    ):
        return _fused(q, k, v, lengths, spec)
    return _ExplicitAttention.apply(q, k, v, relative_bias, sequences, spec)


# -------------------------------------------------------------------------- PyTorch's fused kernel


def _fused(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[tuple[int, int]], spec: AttentionSpec
) -> Tensor:
    buckets = _short_buckets(lengths)
    if not buckets:
        return _fused_one_by_one(q, k, v, lengths, spec)
    shared = {s for members in buckets.values() for s in members}
    alone = [s for s in range(len(lengths)) if s not in shared]
    starts_q, starts_k = _starts(lengths)
    parts: list[Tensor] = []
    places: list[Tensor] = []
    if alone:
        rows = torch.cat([torch.arange(starts_q[s], starts_q[s] + lengths[s][0]) for s in alone])
        keys = torch.cat([torch.arange(starts_k[s], starts_k[s] + lengths[s][1]) for s in alone])
        rows, keys = rows.to(q.device), keys.to(q.device)
        parts.append(
            _fused_one_by_one(q[rows], k[keys], v[keys], [lengths[s] for s in alone], spec)
        )
        places.append(rows)
    for (width_q, width_k), members in buckets.items():
        rows, rows_real = _padded_rows(starts_q, lengths, members, 0, width_q, q.device)
        keys, keys_real = _padded_rows(starts_k, lengths, members, 1, width_k, q.device)
        seen = keys_real[:, None, None, :]
        if spec.causal:
            seen = seen & seen.new_ones(width_q, width_k).tril()
        out = scaled_dot_product_attention(
            q[rows].transpose(1, 2),
            k[keys].transpose(1, 2),
            v[keys].transpose(1, 2),
            attn_mask=None if bool(seen.all()) else seen,
            dropout_p=spec.dropout_p,
            scale=spec.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # [members, heads, width_q, head_dim]
        parts.append(out.transpose(1, 2)[rows_real])
        places.append(rows[rows_real])
    stream = torch.cat(places)
    inverse = torch.empty_like(stream)
    inverse[stream] = torch.arange(stream.numel(), device=q.device)
    return torch.cat(parts)[inverse]


def _short_buckets(lengths: list[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    """Short sequences that may share a call, by the widths that they are padded to."""
    buckets: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for s, (rows, keys) in enumerate(lengths):
        if 0 < rows <= _SHORT and 0 < keys <= _SHORT:
            buckets[-(-rows // _SHORT_STEP), -(-keys // _SHORT_STEP)].append(s)
    return {
        (rows * _SHORT_STEP, keys * _SHORT_STEP): members
        for (rows, keys), members in buckets.items()
        if len(members) >= _WORTH_SHARING
    }


def _padded_rows(
    starts: list[int],
    lengths: list[tuple[int, int]],
    members: list[int],
    side: int,
    width: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Stream rows of each member, padded to ``width`` with its own last row, and which are real."""
    start = torch.tensor([starts[s] for s in members], device=device)[:, None]
    length = torch.tensor([lengths[s][side] for s in members], device=device)[:, None]
    column = torch.arange(width, device=device)
    return start + torch.minimum(column, length - 1), column < length


def _starts(lengths: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    starts_q, starts_k = [0], [0]
    for rows, keys in lengths:
        starts_q.append(starts_q[-1] + rows)
        starts_k.append(starts_k[-1] + keys)
    return starts_q, starts_k


def _fused_one_by_one(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[tuple[int, int]], spec: AttentionSpec
) -> Tensor:
    rows_of, keys_of = ([pair[side] for pair in lengths] for side in (0, 1))
    outs = []
    # split, not slices: its backward writes one gradient, a slice's a whole one for each sequence.
    for q_s, k_s, v_s in zip(q.split(rows_of), k.split(keys_of), v.split(keys_of), strict=True):
        if q_s.shape[0] == 0:
            continue
        out = scaled_dot_product_attention(
            q_s.transpose(0, 1)[None],
            k_s.transpose(0, 1)[None],
            v_s.transpose(0, 1)[None],
            dropout_p=spec.dropout_p,
            is_causal=spec.causal,
            scale=spec.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # [1, heads, rows, head_dim]
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs) if outs else q.new_zeros(q.shape)


# ------------------------------------------------------------------------------- score by score


class _ExplicitAttention(torch.autograd.Function):
    """Attention of each sequence in turn; only the output and the row sums are kept for backward.

    Computes in float32 for 16-bit inputs, rounding once at the end. All of a sequence's queries are
    in reverse order between `_reversed_rows` and the write back.
    """

    @staticmethod
    def forward(ctx, q, k, v, table, sequences: Sequences, spec: AttentionSpec) -> Tensor:
        out = q.new_zeros(q.shape)
        row_sums: list[Tensor | None] = []  # logsumexp, [heads, rows]
        keeps: list[Tensor | None] = []  # dropout's survivors, [heads, rows, keys]
        lines = _Lines(table, spec, q)
        for rows, keys in sequences:
            row_sum = keep = None
            if rows.stop > rows.start and keys.stop > keys.start:
                q_s = _reversed_rows(q[rows])
                k_s, v_s = (_per_query_head(side[keys], q.shape[1]) for side in (k, v))
                scores, _ = _scores(q_s, k_s, lines, spec)
                row_sum = scores.logsumexp(dim=-1)
                weights = scores.sub_(_finite(row_sum)[..., None]).exp_()
                if spec.dropout_p > 0.0:
                    keep = torch.rand_like(weights) >= spec.dropout_p
                    weights = weights * keep / (1.0 - spec.dropout_p)
                out[rows] = (weights @ v_s).flip(1).transpose(0, 1).to(q.dtype)
            row_sums.append(row_sum)
            keeps.append(keep)
        ctx.save_for_backward(q, k, v, table, out)
        ctx.row_sums, ctx.keeps, ctx.sequences, ctx.spec = row_sums, keeps, sequences, spec
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        q, k, v, table, out = ctx.saved_tensors
        spec: AttentionSpec = ctx.spec
        dq, dk, dv = (torch.zeros_like(side) for side in (q, k, v))
        lines = _Lines(table, spec, q)
        dtable = None if table is None else torch.zeros_like(table, dtype=lines.dtype)
        for (rows, keys), row_sum, keep in zip(
            ctx.sequences, ctx.row_sums, ctx.keeps, strict=True
        ):
            if row_sum is None:
                continue
            q_s, dout_s, out_s = (_reversed_rows(side[rows]) for side in (q, grad_out, out))
            k_s, v_s = (_per_query_head(side[keys], q.shape[1]) for side in (k, v))
            scores, slope = _scores(q_s, k_s, lines, spec)
            weights = scores.sub_(_finite(row_sum)[..., None]).exp_()
            dweights = dout_s @ v_s.mT
            kept = weights
            if keep is not None:
                kept = weights * keep / (1.0 - spec.dropout_p)
                dweights = dweights * keep / (1.0 - spec.dropout_p)
            dv[keys] = _per_kv_head(kept.mT @ dout_s, v.shape[1]).to(v.dtype)
            # The softmax's Jacobian: each weight's pull less the row's mean pull.
            mean_pull = (dout_s * out_s).sum(-1, keepdim=True)
            dscores = dweights.sub_(mean_pull).mul_(weights)
            if dtable is not None:
                dtable.index_add_(
                    1,
                    line_distances(*dscores.shape[1:], device=q.device, table=table),
                    _sum_along_line(dscores),
                )
            if slope is not None:
                dscores = dscores * slope
            dq[rows] = (dscores @ k_s).mul_(spec.scale).flip(1).transpose(0, 1).to(q.dtype)
            dk[keys] = _per_kv_head((dscores.mT @ q_s).mul_(spec.scale), k.shape[1]).to(k.dtype)
        return dq, dk, dv, None if dtable is None else dtable.to(table.dtype), None, None


class _Lines:
    """Bias, causality and window of each pair of lengths, as values along the distance."""

    def __init__(self, table: Tensor | None, spec: AttentionSpec, q: Tensor) -> None:
        self.dtype = _compute_dtype(q)
        self._table = None if table is None else table.to(self.dtype)
        self._spec = spec
        self._device = q.device
        self._made: dict[tuple[int, int], Tensor] = {}

    def windows(self, rows: int, keys: int) -> Tensor:
        """``(heads or 1, rows, keys)``, a view: what is added to scores with reversed queries."""
        if (rows, keys) not in self._made:
            self._made[rows, keys] = self._make(rows, keys)
        return self._made[rows, keys].unfold(1, keys, 1)

    def _make(self, rows: int, keys: int) -> Tensor:
        distance = line_distances(rows, keys, self._device)
        if self._table is None:
            line = torch.zeros(1, distance.numel(), dtype=self.dtype, device=self._device)
        else:
            line = bias_line(self._table, rows, keys)
        left, right = self._spec.window or (-1, -1)
        if self._spec.causal:
            right = 0
        if right >= 0:
            line = line.masked_fill(distance > right, float("-inf"))
        if left >= 0:
            line = line.masked_fill(distance < -left, float("-inf"))
        return line


def _scores(
    q_s: Tensor, k_s: Tensor, lines: _Lines, spec: AttentionSpec
) -> tuple[Tensor, Tensor | None]:
    """``[heads, rows, keys]`` scores, and the softcap's derivative where there is a softcap."""
    scores = (q_s @ k_s.mT).mul_(spec.scale)
    slope = None
    if spec.softcap is not None:
        bounded = scores.div_(spec.softcap).tanh_()
        slope = 1.0 - bounded.square()
        scores = bounded.mul(spec.softcap)
    return scores.add_(lines.windows(*scores.shape[1:])), slope


def _sum_along_line(dscores: Tensor) -> Tensor:
    """Sum ``[heads, rows, keys]`` over equal distances: ``[heads, rows + keys - 1]``.

    Row w, column n is for line entry w + n. Written into rows of ``rows + keys`` and read back in
    rows one shorter, row w has moved right by w, and equal distances stand in one column.
    """
    heads, rows, keys = dscores.shape
    wide = dscores.new_zeros(heads, rows, rows + keys)
    wide[:, :, :keys] = dscores
    length = rows + keys - 1
    return wide.flatten(1)[:, : rows * length].unflatten(1, (rows, length)).sum(1)


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _reversed_rows(side: Tensor) -> Tensor:
    """``(rows, heads, head_dim)`` as ``[heads, rows, head_dim]``, last row first."""
    return side.to(_compute_dtype(side)).transpose(0, 1).flip(1)


def _per_query_head(side: Tensor, heads: int) -> Tensor:
    """``(keys, kv_heads, head_dim)`` as ``[heads, keys, head_dim]``, repeated for its group."""
    side = side.to(_compute_dtype(side)).transpose(0, 1)
    return side if side.shape[0] == heads else side.repeat_interleave(heads // side.shape[0], 0)


def _per_kv_head(grad: Tensor, kv_heads: int) -> Tensor:
    """``[heads, keys, head_dim]`` as ``(keys, kv_heads, head_dim)``, summed over each group."""
    if grad.shape[0] != kv_heads:
        grad = grad.unflatten(0, (kv_heads, -1)).sum(1)
    return grad.transpose(0, 1)


def _finite(row_sum: Tensor) -> Tensor:
    """A query that sees no key has a row sum of -inf; with 0 instead its weights become 0."""
    return row_sum.masked_fill(row_sum == float("-inf"), 0.0)
