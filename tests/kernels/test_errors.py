"""How far each op is from float64, beside what PyTorch makes in the same dtype.

Of sizes that models have, so that sums are long. Errors are |ours - exact| / |exact|, of the whole
tensor. ERRORS_TABLE=FILE writes them down; -s shows them.
"""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tokenpack.kernels import (
    layout_from_lengths,
    packed_cross_entropy,
    packed_linear_cross_entropy,
    repad,
    unpad,
)
from tokenpack.kernels._triton import INTERPRETED

from .losses import reduced, token_losses

LENGTHS = [200, 1, 31, 0, 24]
TOKENS, HIDDEN, CLASSES = sum(LENGTHS), 256, 8192
FLOORS = {
    torch.float64: 2**-44,
    torch.float32: 2**-24,
    torch.bfloat16: 2**-9,
    torch.float16: 2**-12,
}
DTYPES = sorted(FLOORS, key=lambda dtype: -dtype.itemsize)
OPTIONS = {
    "": {},
    "smoothing, z_loss, softcap": {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0},
}

pytestmark = pytest.mark.skipif(INTERPRETED, reason="larger than an interpreter likes")

devices = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)


@pytest.fixture(scope="module")
def rows():
    rows = []
    yield rows
    lines = [
        "| op | result | dtype | device | ours | PyTorch | ours / PyTorch |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *rows,
    ]
    print("", *lines, sep="\n")
    if path := os.environ.get("ERRORS_TABLE"):
        head = (
            "# Errors against float64\n\n"
            f"|result - exact| / |exact| of whole tensors, torch {torch.__version__}.\n"
            "ERRORS_TABLE=FILE pytest tests/kernels/test_errors.py writes this.\n\n"
        )
        Path(path).write_text(head + "\n".join(lines) + "\n")


def make_head(dtype, device):
    # A CPU takes seconds for fp16 products of the full size.
    classes = CLASSES // 4 if dtype == torch.float16 and device == "cpu" else CLASSES
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(classes, HIDDEN, generator=generator) * HIDDEN**-0.5 * 3
    bias = torch.randn(classes, generator=generator)
    labels = torch.randint(classes, (TOKENS,), generator=generator)
    labels[::7] = -100
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return [t.to(device, dtype) for t in (hidden, weight, bias)], labels, cu_seqlens


def compare(rows, op, names, dtype, device, ours, theirs, exact):
    """The loss and the gradients of the leaves, from our op, from PyTorch, and in float64."""
    for name, mine, other, truth in zip(names, ours, theirs, exact, strict=True):
        mine, other, truth = (tensor.double().cpu() for tensor in (mine, other, truth))
        assert mine.isfinite().all()
        error, their_error = ((side - truth).norm() / truth.norm() for side in (mine, other))
        ratio = f"{error / their_error:.2f}" if their_error else "-"
        rows.append(
            f"| {op} | {name} | {str(dtype)[6:]} | {device} | {error:.2e} | {their_error:.2e} "
            f"| {ratio} |"
        )
        # A single number may be exact by luck, although its terms were rounded.
        floor = FLOORS[dtype] / (8 if name == "loss" and dtype.itemsize == 2 else 1)
        assert error <= max(1.5 * their_error, floor), f"{op}, {name}"


def run(function, tensors):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    loss = function(*leaves)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@devices
@pytest.mark.parametrize("reduction", ["mean", "sequence_mean"])
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy(rows, dtype, kind, reduction, device):
    (hidden, weight, bias), labels, cu_seqlens = make_head(torch.float64, "cpu")
    logits = F.linear(hidden, weight, bias).to(device, dtype)
    labels, cu_seqlens = labels.to(device), cu_seqlens.to(device)
    options = OPTIONS[kind]

    def ours(logits):
        return packed_cross_entropy(
            logits, labels, cu_seqlens, shift=True, reduction=reduction, **options
        )

    def plain(logits):
        losses = token_losses(logits, labels, cu_seqlens, shift=True, **options)
        return reduced(*losses, cu_seqlens, reduction, torch.ones(len(LENGTHS), device=device))

    results = run(ours, [logits]), run(plain, [logits]), run(plain, [logits.double()])
    op = ", ".join(filter(None, ["packed_cross_entropy", reduction, kind]))
    compare(rows, op, ["loss", "dlogits"], dtype, device, *results)


@devices
@pytest.mark.parametrize("reduction", ["mean", "sequence_mean"])
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_cross_entropy(rows, dtype, kind, reduction, device):
    head, labels, cu_seqlens = make_head(dtype, device)
    labels, cu_seqlens = labels.to(device), cu_seqlens.to(device)
    options = OPTIONS[kind]

    def ours(hidden, weight, bias):
        return packed_linear_cross_entropy(
            hidden, weight, bias, labels, cu_seqlens, shift=True, reduction=reduction, **options
        )

    def plain(hidden, weight, bias):
        logits = F.linear(hidden, weight, bias)
        losses = token_losses(logits, labels, cu_seqlens, shift=True, **options)
        return reduced(*losses, cu_seqlens, reduction, torch.ones(len(LENGTHS), device=device))

    exact = run(plain, [tensor.double() for tensor in head])
    op = ", ".join(filter(None, ["packed_linear_cross_entropy", reduction, kind]))
    names = ["loss", "dhidden", "dweight", "dbias"]
    compare(rows, op, names, dtype, device, run(ours, head), run(plain, head), exact)


@devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpad_and_repad(rows, dtype, device):
    """Both are copies: neither forward nor backward rounds anything."""
    layout = layout_from_lengths(LENGTHS, device=device)
    (hidden, *_), _, _ = make_head(dtype, device)
    padded = repad(hidden, layout)
    slots = layout.indices.long()

    def ours(padded):
        return (repad(unpad(padded, layout) * 3, layout) * padded).mean()

    def plain(padded):
        tokens = padded.flatten(0, 1)[slots] * 3
        again = torch.zeros_like(padded).flatten(0, 1).index_put((slots,), tokens)
        return (again.view_as(padded) * padded).mean()

    results = run(ours, [padded]), run(plain, [padded]), run(plain, [padded.double()])
    compare(rows, "unpad, repad", ["loss", "dpadded"], dtype, device, *results)
