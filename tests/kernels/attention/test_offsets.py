"""Offsets that do not cover their tensor, on the path of the kernels."""

import pytest
import torch

from tokenpack.kernels import varlen_attention
from tokenpack.kernels._triton import INTERPRETED
from tokenpack.kernels.attention.launch import size_arguments
from tokenpack.kernels.attention.spec import AttentionInputs

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="runs the kernels in Triton's interpreter")


@pytest.mark.parametrize("wrong", [[0, 9], [1, 10], [0, 7, 5, 10]], ids=str)
@pytest.mark.parametrize("side", ["q", "k"])
def test_offsets_that_do_not_cover_their_tensor_are_an_error(side, wrong):
    """Otherwise rows of the output would hold what the memory held before."""
    q, k, v = torch.randn(3, 10, 2, 16)
    right = torch.linspace(0, 10, len(wrong)).to(torch.int32)
    bounds = {"q": right, "k": right, side: torch.tensor(wrong, dtype=torch.int32)}
    with pytest.raises(RuntimeError, match=f"cu_seqlens_{side} must be non-decreasing from 0 to"):
        varlen_attention(q, k, v, bounds["q"], bounds["k"])


def test_offsets_are_checked_again_after_a_change():
    q, k, v = torch.randn(3, 10, 2, 16)
    bounds = torch.tensor([0, 4, 10], dtype=torch.int32)
    for _ in range(2):
        varlen_attention(q, k, v, bounds, bounds)
    bounds[2] = 9
    with pytest.raises(RuntimeError, match="cu_seqlens_q must be"):
        varlen_attention(q, k, v, bounds, bounds)


@pytest.mark.parametrize("side", ["q", "k"])
def test_rows_that_int32_cannot_count_are_an_error(side):
    bounds = torch.tensor([0, 1], dtype=torch.int32)
    tensors = {"q": torch.empty(1, 1, 16), "k": torch.empty(1, 1, 16)}
    tensors[side] = tensors[side].expand(2**30, 1, 16)
    inputs = AttentionInputs(tensors["q"], tensors["k"], tensors["k"], bounds, bounds, None, None)
    with pytest.raises(
        ValueError, match=rf"{side} must have less than 2\*\*30 rows, got 1073741824"
    ):
        size_arguments(inputs, 1)
