"""Packed attention beside what a user would otherwise run, in one layer.

Beside padded attention at its best setting, PyTorch's fused kernel, FlexAttention on the packed
stream, and FlashAttention. Padded causal attention needs no mask where padding is on the right, so
it gets none. A bias must be dense there, with the padding mask in it. It is given as models have
it, built before the first layer; the others take the table that it would be built from. All have
its gradient. Floating-point operations are those of real tokens in sight, whoever computes more;
the limit is the rate at which this device multiplies large square matrices.
"""

from typing import NamedTuple

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from tokenpack.attention import packed_attention
from tokenpack.kernels import PackedLayout, layout_from_mask, unpad

from .common import DEVICE, DTYPE, ON_GPU, Batch, make_batch, measure

SLOTS, LENGTHS, HEADS = (65_536, [512, 2048, 8192], 16) if ON_GPU else (4096, [128, 512], 4)
HEAD_DIMS = [64, 128] if ON_GPU else [64]
REACH = 128
PASSES = ("forward", "backward", "forward and backward")
BASELINES = ("padded",)
LIMITS = ("matrix product",)

# On a CPU "auto" is the reference, and all that there is.
CONTENDERS = ["padded", "packed, FlexAttention", "packed, reference"]
CONTENDERS += ["packed, auto", "packed, torch", "packed, triton", "packed, FlashAttention"] * ON_GPU

pytestmark = pytest.mark.benchmark(max_time=0.5)


class Problem(NamedTuple):
    """One layer's attention over one batch."""

    batch: Batch
    layout: PackedLayout
    head_dim: int
    causal: bool

    @property
    def operations(self):
        """Of the two products of the forward; the backward has five."""
        pairs = self.batch.lengths.double().square().sum().item()
        if self.causal:
            pairs = (pairs + self.layout.total_tokens) / 2
        return 2 * 2 * pairs * HEADS * self.head_dim

    def sides(self):
        """Padded queries, keys and values."""
        shape = (*self.batch.mask.shape, HEADS, self.head_dim)
        return [torch.randn(shape, dtype=DTYPE, device=DEVICE) for _ in range(3)]


def _dense(problem, table):
    """``(rows, heads, columns, columns)`` from ``(heads, 2 * REACH + 1)``, padding at -inf."""
    mask = problem.batch.mask
    places = torch.arange(mask.shape[1], device=DEVICE)
    distance = places - places[:, None]
    hidden = ~mask[:, None, None, :] | (problem.causal & (distance > 0))
    bias = table[:, distance.clamp(-REACH, REACH) + REACH]
    return bias.masked_fill(hidden, float("-inf"))


def _padded(problem, table):
    q, k, v = (side.requires_grad_() for side in problem.sides())
    mask = None if problem.causal else problem.batch.mask[:, None, None, :]
    if table is not None:
        mask = _dense(problem, table).requires_grad_()

    def forward():
        return scaled_dot_product_attention(
            *(side.transpose(1, 2) for side in (q, k, v)),
            attn_mask=mask,
            is_causal=mask is None,
        )

    return forward, [q, k, v] + [mask] * (table is not None)


def _packed(problem, table, backend):
    sides = [side.requires_grad_() for side in unpad(problem.sides(), problem.layout)]
    if table is not None:
        table.requires_grad_()
    layout = problem.layout

    def forward():
        return packed_attention(
            *sides,
            layout.cu_seqlens,
            layout.cu_seqlens,
            layout.max_seqlen,
            layout.max_seqlen,
            scale=problem.head_dim**-0.5,
            backend=backend,
            causal=problem.causal,
            relative_bias=table,
        )[0]

    return forward, sides + [table] * (table is not None)


def _flash(problem, table):
    """As its authors have it called."""
    if table is not None:
        pytest.skip("FlashAttention has no bias")
    attend = pytest.importorskip("flash_attn").flash_attn_varlen_func
    sides = [side.requires_grad_() for side in unpad(problem.sides(), problem.layout)]
    offsets, longest = problem.layout.cu_seqlens, problem.layout.max_seqlen

    def forward():
        return attend(*sides, offsets, offsets, longest, longest, causal=problem.causal)

    return forward, sides


def _flex(problem, table):
    """One row of all tokens, where those of other documents are out of sight."""
    if not ON_GPU:
        pytest.skip("FlexAttention has no backward on a CPU")
    sides = [side.requires_grad_() for side in unpad(problem.sides(), problem.layout)]
    if table is not None:
        table.requires_grad_()
    documents = torch.repeat_interleave(problem.batch.lengths)

    def in_sight(row, head, m, n):
        same = documents[m] == documents[n]
        return same & (m >= n) if problem.causal else same

    def biased(score, row, head, m, n):
        return score + table[head, (n - m).clamp(-REACH, REACH) + REACH]

    total = problem.layout.total_tokens
    mask = create_block_mask(in_sight, None, None, total, total, device=DEVICE)
    attend = torch.compile(flex_attention, dynamic=False)

    def forward():
        heads_first = (side[None].transpose(1, 2) for side in sides)
        score_mod = None if table is None else biased
        return attend(*heads_first, score_mod=score_mod, block_mask=mask)

    return forward, sides + [table] * (table is not None)


def _made(by, problem, table):
    """The forward of a contender, and what it has gradients of."""
    if by == "padded":
        return _padded(problem, table)
    if by == "packed, FlexAttention":
        return _flex(problem, table)
    if by == "packed, FlashAttention":
        return _flash(problem, table)
    if by == "packed, torch" and table is not None:
        pytest.skip("PyTorch's varlen attention has no bias")
    return _packed(problem, table, by.removeprefix("packed, "))


@pytest.mark.parametrize("by", CONTENDERS)
@pytest.mark.parametrize("longest", LENGTHS)
@pytest.mark.parametrize("bias", ["no bias", "relative bias"])
@pytest.mark.parametrize("direction", ["both ways", "causal"])
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_attention(benchmark, head_dim, passes, direction, bias, longest, by):
    """One layer's attention over one batch, of as many slots at any length."""
    benchmark.group = (
        f"attention, head_dim {head_dim}, {direction}, {bias}, longest {longest}, {passes}"
    )
    batch = make_batch(SLOTS // longest, longest)
    problem = Problem(batch, layout_from_mask(batch.mask), head_dim, direction == "causal")
    table = None
    if bias == "relative bias":
        table = torch.randn(HEADS, 2 * REACH + 1, dtype=DTYPE, device=DEVICE)
    forward, inputs = _made(by, problem, table)
    out = forward()
    incoming = torch.ones_like(out)

    def forward_alone():
        with torch.no_grad():
            forward()

    timed, products = {
        "forward": (forward_alone, 2),
        "backward": (lambda: torch.autograd.grad(out, inputs, incoming, retain_graph=True), 5),
        "forward and backward": (lambda: torch.autograd.grad(forward(), inputs, incoming), 7),
    }[passes]
    measure(benchmark, timed, batch=batch)
    _note_rate(benchmark, problem.operations * products / 2)


@pytest.mark.benchmark(group="attention, the limit: one matrix product")
@pytest.mark.parametrize("by", LIMITS)
def test_matrix_product(benchmark, by):
    """Large and square, as fast as this device multiplies."""
    size = 8192 if ON_GPU else 2048
    left, right = (torch.randn(size, size, dtype=DTYPE, device=DEVICE) for _ in range(2))
    measure(benchmark, lambda: left @ right)
    _note_rate(benchmark, 2 * size**3)


def _note_rate(benchmark, operations):
    if benchmark.stats is not None:
        rate = operations / benchmark.stats.stats.median
        benchmark.extra_info["TFLOP/s"] = round(rate / 1e12, 3)
