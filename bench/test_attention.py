"""Packed attention beside padded attention at its best setting: PyTorch's fused kernel.

Padded causal attention needs no mask where padding is on the right, so it gets none. A bias must be
dense there, with the padding mask in it. It is given as models have it, built before the first
layer; packed attention takes the table that it would be built from. Both have their gradient.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tokenpack.attention import packed_attention
from tokenpack.kernels import layout_from_mask, unpad

from .common import DEVICE, DTYPE, ON_GPU, make_batch, measure

ROWS, LONGEST, HEADS, HEAD_DIM = (32, 2048, 16, 64) if ON_GPU else (16, 256, 4, 64)
REACH = 128
BATCH = make_batch(ROWS, LONGEST)
LAYOUT = layout_from_mask(BATCH.mask)

# On a CPU "auto" is the reference.
CONTENDERS = ["padded", "packed, reference"] + ["packed, auto", "packed, triton"] * ON_GPU

pytestmark = pytest.mark.benchmark(max_time=0.5)


def _dense(table, causal):
    """``(rows, heads, columns, columns)`` from ``(heads, 2 * REACH + 1)``, padding at -inf."""
    places = torch.arange(LONGEST, device=DEVICE)
    distance = places - places[:, None]
    hidden = ~BATCH.mask[:, None, None, :] | (causal & (distance > 0))
    bias = table[:, distance.clamp(-REACH, REACH) + REACH]
    return bias.masked_fill(hidden, float("-inf"))


def _padded(causal, table):
    q, k, v = (side.requires_grad_() for side in _sides())
    mask = None if causal else BATCH.mask[:, None, None, :]
    if table is not None:
        mask = _dense(table, causal).requires_grad_()

    def forward():
        return scaled_dot_product_attention(
            *(side.transpose(1, 2) for side in (q, k, v)),
            attn_mask=mask,
            is_causal=mask is None,
        )

    return forward, [q, k, v] + [mask] * (table is not None)


def _packed(causal, table, backend):
    sides = [side.requires_grad_() for side in unpad(_sides(), LAYOUT)]
    if table is not None:
        table.requires_grad_()
    offsets = (LAYOUT.cu_seqlens, LAYOUT.cu_seqlens)
    options = {"causal": causal, "relative_bias": table}

    longest = (LAYOUT.max_seqlen, LAYOUT.max_seqlen)

    def forward():
        return packed_attention(
            *sides, *offsets, *longest, scale=HEAD_DIM**-0.5, backend=backend, **options
        )[0]

    return forward, sides + [table] * (table is not None)


def _sides():
    shape = (ROWS, LONGEST, HEADS, HEAD_DIM)
    return [torch.randn(shape, dtype=DTYPE, device=DEVICE) for _ in range(3)]


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("bias", ["no bias", "relative bias"])
@pytest.mark.parametrize("direction", ["both ways", "causal"])
@pytest.mark.parametrize("passes", ["forward", "forward and backward"])
def test_attention(benchmark, passes, direction, bias, contender):
    """One layer's attention over one batch."""
    benchmark.group = f"attention, {direction}, {bias}, {passes}"
    table = None
    if bias == "relative bias":
        table = torch.randn(HEADS, 2 * REACH + 1, dtype=DTYPE, device=DEVICE)
    causal = direction == "causal"
    if contender == "padded":
        forward, inputs = _padded(causal, table)
    else:
        forward, inputs = _packed(causal, table, contender.removeprefix("packed, "))
    incoming = torch.ones_like(forward())

    def forward_alone():
        with torch.no_grad():
            forward()

    def forward_and_backward():
        torch.autograd.grad(forward(), inputs, incoming)

    both = passes == "forward and backward"
    measure(benchmark, forward_and_backward if both else forward_alone, batch=BATCH)
