"""Fixtures for tests that find writes outside the outputs of an op."""

import math

import pytest
import torch

from tokenpack.kernels._triton import INTERPRETED

FENCE = 256  # bytes before and after each output
UNTOUCHED = 0xA5


@pytest.fixture
def fenced(monkeypatch):
    """Put fences around the outputs that ops allocate. A write into a fence fails the test.

    In Triton's interpreter a store outside a tensor lands somewhere in this process without a word.
    """
    buffers = []

    def allocate(shape, dtype, device):
        size = math.prod(shape) * dtype.itemsize
        buffer = torch.full((size + 2 * FENCE,), UNTOUCHED, dtype=torch.uint8, device=device)
        buffers.append(buffer)
        return buffer[FENCE : FENCE + size].view(dtype).view(shape)

    def new_empty(like, *shape, dtype=None, device=None):
        shape = shape[0] if shape and not isinstance(shape[0], int) else shape
        return allocate(tuple(shape), dtype or like.dtype, device or like.device)

    def new_empty_strided(like, shape, strides):
        order = sorted(range(len(shape)), key=lambda i: -strides[i])
        dense = allocate(tuple(shape[i] for i in order), like.dtype, like.device)
        found = dense.permute([order.index(i) for i in range(len(shape))])
        assert [s for s, n in zip(found.stride(), shape) if n > 1] == [
            s for s, n in zip(strides, shape) if n > 1
        ]
        return found

    def empty_like(like, *, dtype=None, **_):
        return allocate(tuple(like.shape), dtype or like.dtype, like.device)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch.Tensor, "new_empty_strided", new_empty_strided)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    yield
    monkeypatch.undo()
    assert buffers or not INTERPRETED, "nothing was allocated in a way that this fixture sees"
    for buffer in buffers:
        assert buffer[:FENCE].eq(UNTOUCHED).all()
        assert buffer[-FENCE:].eq(UNTOUCHED).all()
