"""Packed cross entropy on logits beside PyTorch's and Liger's, forward and backward.

The floor is a copy: the loss reads the logits twice and writes their gradient once.
"""

import pytest
import torch
import torch.nn.functional as F

from tokenpack.kernels import packed_cross_entropy

from .common import DEVICE, DTYPE, ON_GPU, liger, measure, peak_memory

TOKENS, CLASSES = (8192, 128_256) if ON_GPU else (512, 32_000)
LABELS = torch.randint(CLASSES, (TOKENS,), device=DEVICE)


def _by_pytorch(logits):
    """As transformers computes it, in float32."""
    return F.cross_entropy(logits.float(), LABELS)


def _liger():
    fused = liger("liger_cross_entropy")
    return lambda logits: fused(logits, LABELS)


# Each gives the function to time, or skips before anything is timed.
CONTENDERS = {
    "tokenpack": lambda: lambda logits: packed_cross_entropy(logits, LABELS),
    "tokenpack, in place": lambda: (
        lambda logits: packed_cross_entropy(logits, LABELS, inplace_backward=True)
    ),
    "PyTorch": lambda: _by_pytorch,
    "Liger, in place": _liger,
}


@pytest.mark.benchmark(group="cross entropy of logits, forward and backward", max_time=2.0)
@pytest.mark.parametrize("by", [*CONTENDERS, "copies of the same bytes"])
def test_cross_entropy(benchmark, by):
    """The gradient of the logits, from logits that a head has just written."""
    leaf = torch.randn(TOKENS, CLASSES, device=DEVICE, dtype=DTYPE).requires_grad_()
    size = leaf.numel() * leaf.element_size()
    if by == "copies of the same bytes":  # three moves of the logits, of which a copy is two
        spare = torch.empty_like(leaf.detach())

        def step():
            spare.copy_(leaf.detach())
            spare[: TOKENS // 2].copy_(leaf.detach()[: TOKENS // 2])
    else:
        function = CONTENDERS[by]()

        def step():
            torch.autograd.grad(function(leaf), leaf)

    step()
    benchmark.extra_info["peak memory over the logits'"] = round(peak_memory(step) / size, 2)
    measure(benchmark, step, moved=3 * size)
