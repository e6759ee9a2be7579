"""Packed attention compared with the alternatives, in one layer.

The alternatives are padded attention at its best setting (PyTorch's fused kernel), FlexAttention on
the packed stream, FlashAttention, and the attention of two T5 libraries (`t5_peers`). Padded causal
attention with padding on the right needs no mask and runs without one. Padded attention with a bias
needs a dense bias that includes the padding mask. As in models, this bias is built before the first
layer. The other contenders take the table from which it would be built. All compute the gradient of
the bias. Rates count the operations of real tokens and unmasked pairs, even if a contender computes
more. The limit is the rate at which this device multiplies large square matrices.
"""

from typing import NamedTuple

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from tokenpack.attention import packed_attention
from tokenpack.kernels import PackedLayout, layout_from_mask, repad, unpad
from tokenpack.kernels.attention import t5_bias_table

from . import t5_peers
from .common import DEVICE, DTYPE, ON_GPU, RaggedBatch, make_batch, measure

SLOTS, LENGTHS, HEADS = (65_536, [512, 2048, 8192], 16) if ON_GPU else (4096, [128, 512], 4)
HEAD_DIMS = [64, 128] if ON_GPU else [64]
REACH = 128
PASSES = ("forward", "backward", "forward and backward")
BASELINES = ("padded",)
LIMITS = ("matrix product",)

# On a CPU "auto" is the reference, the only backend there.
CONTENDERS = ["padded", "packed, FlexAttention", "packed, reference"]
CONTENDERS += ["packed, auto", "packed, torch", "packed, triton", "packed, FlashAttention"] * ON_GPU
# Their outputs and gradients are compared with ours before they are timed.
PEERS = ["packed, turbot5", "padded, nai-t5"]
CONTENDERS += PEERS * ON_GPU

pytestmark = pytest.mark.benchmark(max_time=0.5)


class Problem(NamedTuple):
    """One layer's attention over one batch."""

    batch: RaggedBatch
    layout: PackedLayout
    head_dim: int
    causal: bool

    @property
    def operations(self):
        """Floating-point operations of the forward's two products; the backward has five."""
        pairs = self.batch.lengths.double().square().sum().item()
        if self.causal:
            pairs = (pairs + self.layout.total_tokens) / 2
        return 2 * 2 * pairs * HEADS * self.head_dim

    def padded_qkv(self):
        """Padded queries, keys and values, ``(rows, columns, heads, head_dim)``."""
        shape = (*self.batch.mask.shape, HEADS, self.head_dim)
        return [torch.randn(shape, dtype=DTYPE, device=DEVICE) for _ in range(3)]


def _dense(problem, table):
    """Dense bias ``(rows, heads, columns, columns)`` from a table; -inf at masked pairs."""
    mask = problem.batch.mask
    positions = torch.arange(mask.shape[1], device=DEVICE)
    distance = positions - positions[:, None]
    hidden = ~mask[:, None, None, :] | (problem.causal & (distance > 0))
    bias = table[:, distance.clamp(-REACH, REACH) + REACH]
    return bias.masked_fill(hidden, float("-inf"))


def _padded(problem, table):
    qkv = [each.requires_grad_() for each in problem.padded_qkv()]
    mask = None if problem.causal else problem.batch.mask[:, None, None, :]
    if table is not None:
        mask = _dense(problem, table).requires_grad_()

    def forward():
        return scaled_dot_product_attention(
            *(each.transpose(1, 2) for each in qkv),
            attn_mask=mask,
            is_causal=mask is None,
        )

    return forward, qkv + [mask] * (table is not None)


def _packed_qkv(problem):
    return [each.requires_grad_() for each in unpad(problem.padded_qkv(), problem.layout)]


def _packed(problem, table, backend):
    qkv = _packed_qkv(problem)
    if table is not None:
        table.requires_grad_()

    def forward():
        return _attend(problem, qkv, table, backend)

    return forward, qkv + [table] * (table is not None)


def _attend(problem, qkv, table, backend):
    layout = problem.layout
    return packed_attention(
        *qkv,
        layout.cu_seqlens,
        layout.cu_seqlens,
        layout.max_seqlen,
        layout.max_seqlen,
        scale=problem.head_dim**-0.5,
        backend=backend,
        causal=problem.causal,
        relative_bias=table,
    )[0]


def _flash(problem, table):
    """FlashAttention's own varlen function."""
    if table is not None:
        pytest.skip("FlashAttention has no bias")
    attend = pytest.importorskip("flash_attn").flash_attn_varlen_func
    qkv = _packed_qkv(problem)
    cu_seqlens, longest = problem.layout.cu_seqlens, problem.layout.max_seqlen

    def forward():
        return attend(*qkv, cu_seqlens, cu_seqlens, longest, longest, causal=problem.causal)

    return forward, qkv


def _flex(problem, table):
    """FlexAttention over one row of all tokens; other sequences are masked."""
    if not ON_GPU:
        pytest.skip("FlexAttention has no backward on a CPU")
    qkv = _packed_qkv(problem)
    if table is not None:
        table.requires_grad_()
    sequences = torch.repeat_interleave(problem.batch.lengths)

    def mask_mod(row, head, m, n):
        same = sequences[m] == sequences[n]
        return same & (m >= n) if problem.causal else same

    def add_bias(score, row, head, m, n):
        return score + table[head, (n - m).clamp(-REACH, REACH) + REACH]

    total = problem.layout.total_tokens
    mask = create_block_mask(mask_mod, None, None, total, total, device=DEVICE)
    attend = torch.compile(flex_attention, dynamic=False)

    def forward():
        heads_first = (each[None].transpose(1, 2) for each in qkv)
        score_mod = None if table is None else add_bias
        return attend(*heads_first, score_mod=score_mod, block_mask=mask)

    return forward, qkv + [table] * (table is not None)


def _turbot5(problem, table):
    """turbot5 has the weights of T5's buckets in place of the table."""
    if table is None:
        pytest.skip("turbot5 is for T5, which has a bias")
    qkv = _packed_qkv(problem)
    buckets = torch.randn(t5_peers.BUCKETS, HEADS, dtype=DTYPE, device=DEVICE, requires_grad=True)
    scale = problem.head_dim**-0.5
    t5_peers.turbot5_attention()

    def forward():
        return t5_peers.turbot5(qkv, buckets, problem.layout, problem.causal, scale)

    def expected():
        return _attend(problem, qkv, t5_bias_table(buckets, not problem.causal), "auto")

    return forward, [*qkv, buckets], expected


def _nai_t5(problem, table):
    """nai-t5 reads a dense bias of one row, which T5's encoder shares between rows and layers."""
    if table is None or problem.causal:
        pytest.skip("nai-t5 has FlexAttention in T5's encoder, with a bias and both ways")
    mask, layout = problem.batch.mask, problem.layout
    qkv = [each.transpose(1, 2).detach().requires_grad_() for each in problem.padded_qkv()]
    positions = torch.arange(mask.shape[1], device=DEVICE)
    distance = (positions - positions[:, None]).clamp(-REACH, REACH)
    bias = table[:, distance + REACH].requires_grad_()
    forward = t5_peers.nai_t5(qkv, bias, mask, problem.head_dim**-0.5)

    def expected():
        packed = unpad([each.transpose(1, 2) for each in qkv], layout)
        return repad(_attend(problem, packed, table, "auto"), layout).transpose(1, 2)

    return forward, [*qkv, bias], expected


def _make(by, problem, table):
    """The forward of a contender, and the inputs that need gradients."""
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
    """One layer's attention over one batch, with the same number of slots for each length."""
    benchmark.group = (
        f"attention, head_dim {head_dim}, {direction}, {bias}, longest {longest}, {passes}"
    )
    batch = make_batch(SLOTS // longest, longest)
    problem = Problem(batch, layout_from_mask(batch.mask), head_dim, direction == "causal")
    table = None
    if bias == "relative bias":
        table = torch.randn(HEADS, 2 * REACH + 1, dtype=DTYPE, device=DEVICE)
    if by in PEERS:
        make = _turbot5 if by == "packed, turbot5" else _nai_t5
        forward, inputs, expected = make(problem, table)
        benchmark.extra_info["differs from ours"] = differences(forward, expected, inputs[:4])
    else:
        forward, inputs = _make(by, problem, table)
    out = forward()
    incoming = torch.ones_like(out)

    def forward_only():
        with torch.no_grad():
            forward()

    timed, products = {
        "forward": (forward_only, 2),
        "backward": (lambda: torch.autograd.grad(out, inputs, incoming, retain_graph=True), 5),
        "forward and backward": (lambda: torch.autograd.grad(forward(), inputs, incoming), 7),
    }[passes]
    measure(benchmark, timed, batch=batch)
    _note_rate(benchmark, problem.operations * products / 2)


def differences(forward, expected, inputs):
    """Which of the output and the gradients of the inputs differ from ours by more than 5 %.

    An output that differs fails: its time would be that of something else. Gradients are only
    noted. Inputs that ours has no gradient for are left out.
    """
    results = []
    for attend in (forward, expected):
        out = attend()
        slope = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device)
        grads = torch.autograd.grad(out, inputs, slope.view(out.shape), allow_unused=True)
        results.append([out, *grads])
    different = []
    for name, theirs, ours in zip(("out", "dq", "dk", "dv", "dbias"), *results, strict=False):
        if ours is not None and theirs is not None:
            error = (theirs.double() - ours.double()).abs().max() / ours.double().abs().max()
            if not error < 0.05:
                different.append(f"{name} by {error:.2g}")
    assert not any(each.startswith("out ") for each in different), different
    return ", ".join(different) or "nothing"


@pytest.mark.benchmark(group="attention, the limit: one matrix product")
@pytest.mark.parametrize("by", LIMITS)
def test_matrix_product(benchmark, by):
    """A large square product, the fastest that this device multiplies."""
    size = 8192 if ON_GPU else 2048
    left, right = (torch.randn(size, size, dtype=DTYPE, device=DEVICE) for _ in range(2))
    measure(benchmark, lambda: left @ right)
    _note_rate(benchmark, 2 * size**3)


def _note_rate(benchmark, operations):
    if benchmark.stats is not None:
        rate = operations / benchmark.stats.stats.median
        benchmark.extra_info["TFLOP/s"] = round(rate / 1e12, 3)
