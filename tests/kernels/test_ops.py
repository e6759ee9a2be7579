"""Calls of ops without dispatch: equal results, and nothing that must see an op misses it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from tokenpack.kernels import (
    layout_from_mask,
    packed_cross_entropy,
    packed_linear_cross_entropy,
    repad,
    unpad,
)
from tokenpack.kernels._ops import runs_eagerly

MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])
LABELS = torch.tensor([0, 3, -100, 2, 1])


def whole_step(hidden, weight):
    """A loss, with every op that plain calls run without dispatch."""
    layout = layout_from_mask(MASK.to(hidden.device))
    labels = repad(unpad(repad(LABELS, layout, fill=-100), layout), layout, fill=-100)
    stream = unpad(hidden, layout)
    return packed_linear_cross_entropy(stream, weight, None, unpad(labels, layout))


def parameters():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    return hidden, weight


class SeenOps(TorchDispatchMode):
    """Notes the names of all ops of tokenpack."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tokenpack":
            self.names.add(func._schema.name.removeprefix("tokenpack::"))
        return func(*args, **(kwargs or {}))


def test_a_plain_call_equals_a_dispatched_one():
    plain = parameters()
    loss = whole_step(*plain)
    loss.backward()
    dispatched = parameters()
    with SeenOps():
        same_loss = whole_step(*dispatched)
        same_loss.backward()
    assert torch.equal(loss, same_loss)
    for a, b in zip(plain, dispatched, strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_dispatch_mode_sees_every_op():
    with SeenOps() as seen:
        whole_step(*parameters()).backward()
    expected = {"mask_layout", "unpad", "repad", "token_targets"}
    assert seen.names >= expected | {"linear_cross_entropy_and_gradients"}


def test_make_fx_traces_the_ops():
    """With real tensors, a trace would otherwise hold what an op computed for this input."""
    hidden, weight = (tensor.detach() for tensor in parameters())

    def losses(hidden):
        return packed_linear_cross_entropy(hidden[0], weight, None, LABELS[:3])

    graph = make_fx(losses)(hidden)
    assert "linear_cross_entropy" in graph.code
    assert "token_targets" in graph.code
    assert torch.equal(graph(-hidden), losses(-hidden))


def test_fake_tensors_and_meta_tensors_reach_the_fakes():
    with FakeTensorMode() as mode:
        hidden = mode.from_tensor(torch.zeros(5, 8))
        weight = mode.from_tensor(torch.zeros(4, 8))
        labels = mode.from_tensor(LABELS)
        assert not runs_eagerly(hidden)
        assert packed_linear_cross_entropy(hidden, weight, None, labels).shape == ()
    meta = torch.zeros(5, 4, device="meta")
    assert not runs_eagerly(meta)
    assert packed_cross_entropy(meta, LABELS.to("meta"), reduction="none").shape == (5,)


def test_function_transforms_see_the_ops():
    """A kernel could not read the tensors that a transform wraps."""
    seen = []

    def function(x):
        seen.append(runs_eagerly(x))
        return x.sum()

    torch.func.grad(function)(torch.ones(3))
    torch.vmap(function)(torch.ones(2, 3))
    assert seen == [False, False]
    assert runs_eagerly(torch.ones(3), torch.nn.Parameter(torch.ones(3)))


@pytest.mark.parametrize("reduction", ["none", "sequence"])
def test_losses_without_a_gradient_equal_those_with_one(reduction):
    hidden, weight = parameters()
    stream, cu_seqlens = hidden.flatten(0, 1)[:5], torch.tensor([0, 2, 5], dtype=torch.int32)
    arguments = (stream, weight, None, LABELS, cu_seqlens)
    with_gradient = packed_linear_cross_entropy(*arguments, reduction=reduction)
    with torch.no_grad():
        without = packed_linear_cross_entropy(*arguments, reduction=reduction)
    assert torch.equal(with_gradient, without)
