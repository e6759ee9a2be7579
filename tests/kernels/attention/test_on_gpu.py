"""The attention kernels on a GPU, with bf16: accuracy, determinism, and no synchronization."""

import pytest
import torch

from tokenpack.kernels import varlen_attention
from tokenpack.kernels.attention import varlen_attention_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = ([1500, 1, 0, 700, 64, 129, 333], [1500, 3, 5, 0, 65, 400, 100])
FLOORS = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def make(head_dim, dtype, *, kv_heads=4, bias=True, cross=False):
    generator = torch.Generator("cuda").manual_seed(head_dim)
    rows, keys = LENGTHS if cross else (LENGTHS[0], LENGTHS[0])

    def random(*shape):
        return torch.randn(shape, generator=generator, device="cuda").to(dtype).requires_grad_()

    sides = random(sum(rows), 8, head_dim), *(random(sum(keys), kv_heads, head_dim) for _ in "kv")
    bounds = [
        torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
        for lengths in (rows, keys)
    ]
    return sides, bounds, random(8, 2 * 128 + 1) if bias else None


def run(attend, sides, bounds, table, dtype=None, **options):
    leaves = [*sides] if table is None else [*sides, table]
    leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
    out = attend(
        *leaves[:3], *bounds, relative_bias=None if table is None else leaves[3], **options
    )
    slope = torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, slope)]


OPTIONS = [{}, {"causal": True}, {"window": (100, 30)}, {"softcap": 5.0, "causal": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cross", [False, True], ids=["", "cross"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
def test_as_exact_as_the_reference_in_the_same_dtype(dtype, head_dim, bias, cross, options):
    inputs = make(head_dim, dtype, bias=bias, cross=cross, kv_heads=2 if cross else 8)
    exact = run(varlen_attention_reference, *inputs, dtype=torch.float64, **options)
    theirs = run(varlen_attention_reference, *inputs, **options)
    for ours, other, truth in zip(run(varlen_attention, *inputs, **options), theirs, exact):
        assert ours.isfinite().all()
        error = (ours.double() - truth).norm()
        allowed = 1.5 * (other.double() - truth).norm() + 2 * FLOORS[dtype] * truth.norm()
        assert error <= allowed


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_same_bits_every_time(head_dim):
    """A race would make some run differ."""
    inputs = make(head_dim, torch.bfloat16)
    seed = torch.tensor([1], device="cuda")
    first = run(varlen_attention, *inputs, dropout_p=0.1, dropout_seed=seed)
    for _ in range(20):
        again = run(varlen_attention, *inputs, dropout_p=0.1, dropout_seed=seed)
        assert all(map(torch.equal, first, again))


def test_no_synchronization():
    inputs = make(64, torch.bfloat16)
    run(varlen_attention, *inputs, dropout_p=0.1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(varlen_attention, *inputs, dropout_p=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_hundred_thousand_sequences():
    lengths = torch.randint(0, 9, (100_000,), generator=torch.Generator().manual_seed(0))
    bounds = torch.cat([torch.zeros(1).long(), lengths.cumsum(0)]).int().cuda()
    q = torch.randn(int(bounds[-1]), 2, 64, device="cuda", dtype=torch.float16)
    out = varlen_attention(q, q, q, bounds, bounds, causal=True)
    few = bounds[-4:].tolist()
    for start, end in zip(few, few[1:]):
        side = q[start:end].transpose(0, 1).float()
        expected = torch.nn.functional.scaled_dot_product_attention(
            side[None], side[None], side[None], is_causal=True
        )[0].transpose(0, 1)
        torch.testing.assert_close(out[start:end].float(), expected, rtol=1e-2, atol=1e-2)
