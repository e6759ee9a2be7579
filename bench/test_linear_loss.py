"""LM head and loss without logits, beside logits that are there and others' fused heads.

Forward and backward of 4096 tokens, hidden size 512, over 32,768 and 262,144 classes on a CPU, and
of a larger head on a GPU. Extra memory is what is allocated at the peak beyond the gradients. Each
large case runs once: minutes on a CPU.
"""

import pytest
import torch
import torch.nn.functional as F

from tokenpack.kernels import packed_linear_cross_entropy

from .common import DEVICE, DTYPE, ON_GPU, liger, measure, peak_memory

TOKENS, HIDDEN = (8192, 2048) if ON_GPU else (4096, 512)
CLASSES = [128_256, 262_144] if ON_GPU else [32_768, 262_144]


def _tokenpack():
    return lambda hidden, weight, labels: packed_linear_cross_entropy(
        hidden, weight, None, labels, num_valid=TOKENS
    )


def _logits():
    return lambda hidden, weight, labels: F.cross_entropy(F.linear(hidden, weight).float(), labels)


def _pytorch_chunked():
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("F.linear_cross_entropy goes by chunks from PyTorch 2.13 on")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, labels: F.linear_cross_entropy(
        hidden, weight, labels, options=options
    )


def _liger():
    fused = liger("liger_fused_linear_cross_entropy")
    return lambda hidden, weight, labels: fused(hidden, weight, labels)


# Each gives the function to time, or skips before anything is timed.
CONTENDERS = {
    "tokenpack": _tokenpack,
    "logits": _logits,
    "F.linear_cross_entropy": _pytorch_chunked,
    "Liger": _liger,
}


@pytest.mark.parametrize("by", CONTENDERS)
@pytest.mark.parametrize("classes", CLASSES)
def test_linear_cross_entropy(benchmark, classes, by):
    """One training step of the head."""
    function = CONTENDERS[by]()
    benchmark.group = f"head and loss, {TOKENS} tokens x {classes} classes x {HIDDEN}"
    hidden = torch.randn(TOKENS, HIDDEN, device=DEVICE, dtype=DTYPE).requires_grad_()
    weight = torch.randn(classes, HIDDEN, device=DEVICE, dtype=DTYPE).mul_(0.05).requires_grad_()
    labels = torch.randint(classes, (TOKENS,), device=DEVICE)
    leaves = (hidden, weight)
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    peaks = []

    def step():
        torch.autograd.grad(function(hidden, weight, labels), leaves)

    def measured_step():
        peaks.append(peak_memory(step))

    rounds = 3 if classes == CLASSES[0] or ON_GPU else 1
    if ON_GPU:
        measured_step()
    measure(benchmark, step if ON_GPU else measured_step, rounds=rounds)
    extra = (min(peaks) - gradients) / 2**20
    benchmark.extra_info["extra memory, MiB"] = round(extra)
