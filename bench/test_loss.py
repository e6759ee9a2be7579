"""Packed losses compared with PyTorch's, Liger's and cut-cross-entropy's, by vocabulary size.

`test_cross_entropy` takes logits, forward and backward. The limit is a copy of as many bytes: the
loss reads the logits twice and writes their gradient once. `test_linear_cross_entropy` fuses head
and loss, without logits. Its memory is the peak allocation without the gradients.
"""

import pytest
import torch
import torch.nn.functional as F

from tokenpack.cost.allocations import peak_bytes
from tokenpack.kernels import packed_cross_entropy, packed_linear_cross_entropy

from .common import DEVICE, DTYPE, ON_GPU, liger, measure

VOCABULARIES = (32_768, 131_072, 262_144)
LOGITS_TOKENS = 8192 if ON_GPU else 128
TOKENS, HIDDEN = (8192, 2048) if ON_GPU else (1024, 64)
BASELINES = ("PyTorch", "logits")
LIMITS = ("copies of the same bytes",)

pytestmark = pytest.mark.benchmark(max_time=0.5, min_rounds=3)


def _by_pytorch(labels):
    """In float32, as in transformers."""
    return lambda logits: F.cross_entropy(logits.float(), labels)


def _liger_of_logits(labels):
    fused = liger("liger_cross_entropy")
    return lambda logits: fused(logits, labels)


# Each returns the function to time, or skips the benchmark.
ON_LOGITS = {
    "tokenpack": lambda labels: lambda logits: packed_cross_entropy(logits, labels),
    "tokenpack, in place": lambda labels: (
        lambda logits: packed_cross_entropy(logits, labels, inplace_backward=True)
    ),
    "PyTorch": _by_pytorch,
    "Liger, in place": _liger_of_logits,
}


@pytest.mark.parametrize("by", [*ON_LOGITS, "copies of the same bytes"])
@pytest.mark.parametrize("classes", VOCABULARIES)
def test_cross_entropy(benchmark, classes, by):
    """Loss and gradient of the logits."""
    benchmark.group = f"cross entropy of logits, {LOGITS_TOKENS} tokens x {classes} classes"
    labels = torch.randint(classes, (LOGITS_TOKENS,), device=DEVICE)
    leaf = torch.randn(LOGITS_TOKENS, classes, device=DEVICE, dtype=DTYPE).requires_grad_()
    size = leaf.numel() * leaf.element_size()
    if by == "copies of the same bytes":  # moves the logits three times; one copy moves them twice
        spare = torch.empty_like(leaf.detach())

        def step():
            spare.copy_(leaf.detach())
            spare[: LOGITS_TOKENS // 2].copy_(leaf.detach()[: LOGITS_TOKENS // 2])
    else:
        function = ON_LOGITS[by](labels)

        def step():
            torch.autograd.grad(function(leaf), leaf)

    step()
    benchmark.extra_info["peak memory over the logits'"] = round(peak_bytes(step, DEVICE) / size, 2)
    measure(benchmark, step, moved=3 * size)


def _tokenpack():
    return lambda hidden, weight, labels: packed_linear_cross_entropy(
        hidden, weight, None, labels, num_valid=TOKENS
    )


def _logits():
    return lambda hidden, weight, labels: F.cross_entropy(F.linear(hidden, weight).float(), labels)


def _pytorch_chunked():
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("F.linear_cross_entropy has chunks from PyTorch 2.13 on")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, labels: F.linear_cross_entropy(
        hidden, weight, labels, options=options
    )


def _liger():
    fused = liger("liger_fused_linear_cross_entropy")
    return lambda hidden, weight, labels: fused(hidden, weight, labels)


def _cut():
    if not ON_GPU:
        pytest.skip("cut-cross-entropy's kernels need a GPU")
    return pytest.importorskip("cut_cross_entropy").linear_cross_entropy


WITHOUT_LOGITS = {
    "tokenpack": _tokenpack,
    "logits": _logits,
    "F.linear_cross_entropy": _pytorch_chunked,
    "Liger": _liger,
    "cut-cross-entropy": _cut,
}


@pytest.mark.parametrize("by", WITHOUT_LOGITS)
@pytest.mark.parametrize("classes", VOCABULARIES)
def test_linear_cross_entropy(benchmark, classes, by):
    """Forward and backward of head and loss."""
    if not ON_GPU and by == "F.linear_cross_entropy" and classes > VOCABULARIES[0]:
        pytest.skip("takes minutes on a CPU")
    function = WITHOUT_LOGITS[by]()
    benchmark.group = f"head and loss, {TOKENS} tokens x {classes} classes x {HIDDEN}"
    hidden = torch.randn(TOKENS, HIDDEN, device=DEVICE, dtype=DTYPE).requires_grad_()
    weight = torch.randn(classes, HIDDEN, device=DEVICE, dtype=DTYPE).mul_(0.05).requires_grad_()
    labels = torch.randint(classes, (TOKENS,), device=DEVICE)
    leaves = (hidden, weight)
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves)

    def step():
        torch.autograd.grad(function(hidden, weight, labels), leaves)

    step()
    extra = (peak_bytes(step, DEVICE) - gradients) / 2**20
    benchmark.extra_info["extra memory, MiB"] = round(extra, 1)
    measure(benchmark, step, rounds=10 if ON_GPU else 3)
