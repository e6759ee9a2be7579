"""Tests that need a GPU: real stores and races, 2**31 elements, and the absence of waits.

How exact the losses are there is in test_errors.py.
"""

import subprocess
import sys
import warnings

import pytest
import torch

from tokenpack.kernels import (
    layout_from_cu_seqlens,
    layout_from_lengths,
    layout_from_mask,
    layout_from_position_ids,
    packed_cross_entropy,
    packed_linear_cross_entropy,
    repad,
    unpad,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = [64, 9, 0, 1, 17, 1300, 5, 22]


@pytest.fixture
def no_waits():
    """An error if the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def waits_of(function):
    """How often the host waits for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def launches_of(function):
    function()  # compiles
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        function()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    names = [event.name for event in seen.events() if event.device_type == cuda]
    return [name for name in names if not name.startswith(("Memcpy", "Memset"))]


def assert_same(one, other):
    for name in ("cu_seqlens", "indices", "position_ids"):
        assert getattr(one, name).cpu().equal(getattr(other, name).cpu()), name
    assert one.total_tokens == other.total_tokens
    assert one.padded_shape == other.padded_shape


SHAPES = [(1, 1), (3, 1000), (70, 129), (3, 70_000), (4096, 37), (65_536, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16], ids=str)
def test_layout_from_mask(shape, dtype):
    mask = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5).to(dtype)
    expected = layout_from_mask(mask)
    assert_same(layout_from_mask(mask.cuda()), expected)
    known = layout_from_mask(mask.cuda(), total_tokens=expected.total_tokens)
    assert known.indices.cpu().equal(expected.indices)


@pytest.mark.parametrize("count", [1, 100, 5000])
def test_layout_from_lengths_cu_seqlens_and_position_ids(count):
    lengths = torch.randint(0, 40, (count,), generator=torch.Generator().manual_seed(count))
    lengths[0] = 3000
    expected = layout_from_lengths(lengths)
    totals = {"total_tokens": expected.total_tokens, "max_seqlen": 3000}
    for options in ({}, totals):
        assert_same(layout_from_lengths(lengths.cuda(), **options), expected)
        assert_same(layout_from_cu_seqlens(expected.cu_seqlens.cuda(), **options), expected)
    real = layout_from_lengths(lengths[lengths > 0])
    assert_same(layout_from_position_ids(expected.position_ids.cuda()), real)


def test_a_wrong_value_is_an_error():
    with pytest.raises(ValueError, match="only 0 and 1, got 2"):
        layout_from_mask(torch.tensor([[1, 2]], device="cuda"))
    with pytest.raises(ValueError, match="must not fall"):
        layout_from_cu_seqlens(torch.tensor([0, 3, 2, 4], device="cuda"))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trailing", [(), (3,), (8, 64), (2049,)], ids=str)
def test_unpad_and_repad(dtype, trailing):
    layout = layout_from_lengths(LENGTHS, device="cuda")
    padded = (torch.randn(*layout.padded_shape, *trailing, device="cuda") * 9).to(dtype)
    stream = unpad(padded, layout)
    assert stream.equal(padded.flatten(0, 1)[layout.indices.long()])
    expected = torch.zeros_like(padded).flatten(0, 1)
    expected[layout.indices.long()] = stream
    assert repad(stream, layout).equal(expected.view_as(padded))


def test_more_than_2_to_the_31_elements():
    layout = layout_from_lengths([1, 40_000, 30_000], device="cuda")
    width = 32_768  # 2.3e9 elements in the stream, 3.9e9 padded
    stream = torch.randn(layout.total_tokens, 64, device="cuda", dtype=torch.bfloat16)
    stream = stream.repeat(1, width // 64)
    padded = repad(stream, layout)
    assert padded[2, 29_999].equal(stream[-1])
    assert padded[1, 39_999].equal(stream[40_000])
    assert not padded[2, 30_000:].any()
    assert unpad(padded, layout).equal(stream)


def test_logits_of_more_than_2_to_the_31_elements():
    tokens, classes = 2**14 + 8, 2**18
    logits = torch.empty(tokens, classes, device="cuda", dtype=torch.bfloat16).normal_()
    labels = torch.randint(classes, (tokens,), device="cuda")
    leaf = logits.requires_grad_()
    loss, stats = packed_cross_entropy(leaf, labels, return_stats=True)
    few = logits.detach()[-3:].double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(few, labels[-3:], reduction="none")
    torch.testing.assert_close(stats.loss[-3:].double(), expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    (gradient,) = torch.autograd.grad(expected.sum() / tokens, few)
    error = (leaf.grad[-3:].double() - gradient).norm() / gradient.norm()
    assert error < 2**-8


def head_on_gpu():
    tokens = sum(LENGTHS)
    hidden = torch.randn(tokens, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(5000, 64, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(5000, (tokens,), device="cuda")
    return hidden.requires_grad_(), weight.requires_grad_(), None, labels


def test_nothing_waits(no_waits):
    mask = torch.arange(1300, device="cuda") < torch.tensor(LENGTHS, device="cpu").pin_memory().to(
        "cuda", non_blocking=True
    ).unsqueeze(1)
    layout = layout_from_mask(mask, total_tokens=sum(LENGTHS))
    padded = torch.randn(*mask.shape, 64, device="cuda").requires_grad_()
    repad(unpad(padded, layout), layout).sum().backward()
    layout_from_lengths(LENGTHS, device="cuda")
    hidden, weight, bias, labels = head_on_gpu()
    logits = torch.nn.functional.linear(hidden, weight)
    bounds = layout.cu_seqlens
    for reduction in ("mean", "sequence_mean", "none", "sequence"):
        options = {"shift": True, "reduction": reduction}
        packed_cross_entropy(logits, labels, bounds, **options).sum().backward(retain_graph=True)
        valid = sum(max(length - 1, 0) for length in LENGTHS)
        loss = packed_linear_cross_entropy(
            hidden, weight, bias, labels, bounds, num_valid=valid, **options
        )
        loss.sum().backward()


def test_each_op_is_one_launch_and_all_wait_once():
    mask = torch.arange(1300, device="cuda") < torch.tensor(LENGTHS, device="cuda")[:, None]
    layout = layout_from_mask(mask)
    qkv = [torch.randn(*mask.shape, 4, 64, device="cuda") for _ in range(3)]
    streams = unpad(qkv, layout)
    assert waits_of(lambda: layout_from_mask(mask)) == 1
    assert len(launches_of(lambda: layout_from_mask(mask))) == 1
    assert len(launches_of(lambda: unpad(qkv, layout))) == 1
    assert len(launches_of(lambda: repad(streams, layout))) == 1


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_by_inductor(in_place):
    hidden, weight, _, labels = head_on_gpu()

    def loss_of(hidden, weight):
        logits = torch.nn.functional.linear(hidden * 2, weight)
        fused = packed_linear_cross_entropy(hidden * 2, weight, None, labels)
        return fused + packed_cross_entropy(logits, labels, inplace_backward=in_place)

    results = []
    for function in (loss_of, torch.compile(loss_of, fullgraph=True)):
        loss = function(hidden, weight)
        results.append([loss, *torch.autograd.grad(loss, (hidden, weight))])
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(
    "wrong", ["labels[3] = 5000", "cu_seqlens[1] = 50", "cu_seqlens[-1] -= 1", "num_valid = 1"]
)
def test_wrong_values_stop_the_device(wrong):
    """Runs in its own process, because a failed assertion destroys the CUDA context."""
    code = f"""
import torch
from tokenpack.kernels import packed_linear_cross_entropy
hidden, weight = (torch.randn(n, 64, device="cuda") for n in (40, 5000))
labels = torch.zeros(40, dtype=torch.int64, device="cuda")
cu_seqlens = torch.tensor([0, 10, 40], dtype=torch.int32, device="cuda")
num_valid = None
{wrong}
packed_linear_cross_entropy(hidden, weight, None, labels, cu_seqlens, num_valid=num_valid)
torch.cuda.synchronize()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0
    assert "must be" in run.stderr or "must rise" in run.stderr or "assert" in run.stderr.lower()
