"""The ops behind the layout builders, with whatever a builder could hand them on any device.

On a CPU the builders look at lengths themselves; so here the ops are called, and under
TRITON_INTERPRET=1 that means their kernels, which say -1 for values that the references refuse.
"""

import itertools

import pytest
import torch

from tokenpack.kernels import layout_ops
from tokenpack.kernels._triton import INTERPRETED

ops = torch.ops.tokenpack
needs_kernel = pytest.mark.skipif(not INTERPRETED, reason="what a kernel does without looking")

LENGTHS = [[3], [0], [3, 0, 7, 1], [0, 0, 5], [1500, 1, 0, 1024], [1, 2] * 150]


def describe(lengths, max_seqlen):
    cu_seqlens = [0, *itertools.accumulate(lengths)]
    indices = [s * max_seqlen + i for s, length in enumerate(lengths) for i in range(length)]
    return cu_seqlens, indices, [i for length in lengths for i in range(length)]


def is_refused(op, *arguments):
    """Whether the op reports that its values are wrong."""
    if not INTERPRETED:
        with pytest.raises(ValueError, match="must"):
            op(*arguments)
        return True
    return op(*arguments)[3][0] == -1


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: str(lengths[:5]))
@pytest.mark.parametrize("cumulative", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_boundaries(lengths, cumulative, dtype, fenced):
    longest = max(lengths)
    cu_seqlens, indices, position_ids = describe(lengths, longest)
    given = torch.tensor(cu_seqlens if cumulative else lengths, dtype=dtype)
    found, _, _, sizes = ops.boundary_layout(given, cumulative, None, None)
    assert found.tolist() == cu_seqlens
    assert sizes.tolist() == [cu_seqlens[-1], longest]
    results = ops.boundary_layout(given, cumulative, cu_seqlens[-1], longest)
    assert [result.tolist() for result in results[:3]] == [cu_seqlens, indices, position_ids]


def test_many_lengths_are_summed_first(monkeypatch, fenced):
    monkeypatch.setattr(layout_ops, "_ONE_LAUNCH_SEQS", 3)
    results = ops.boundary_layout(torch.tensor([3, 0, 7, 1]), False, 11, 7)
    assert tuple(result.tolist() for result in results[:3]) == describe([3, 0, 7, 1], 7)


@pytest.mark.parametrize(
    "given, cumulative",
    [
        ([3, -1, 4], False),
        ([2**30] * 3, False),
        ([2**31 - 1, 1], False),
        ([1, 3], True),
        ([0, 3, 2, 4], True),
        ([0, 2**31 + 5], True),
    ],
)
def test_invalid_boundaries(given, cumulative, fenced):
    assert is_refused(ops.boundary_layout, torch.tensor(given), cumulative, None, None)


@needs_kernel
@pytest.mark.parametrize("total", [5, 14])
@pytest.mark.parametrize("given, cumulative", [([3, 0, 7, 1], False), ([0, 3, 3, 10, 11], True)])
def test_a_wrong_total_writes_nothing_outside(given, cumulative, total, fenced):
    _, indices, position_ids, _ = ops.boundary_layout(torch.tensor(given), cumulative, total, 7)
    assert indices.numel() == position_ids.numel() == total
    _, expected, _ = describe([3, 0, 7, 1], 7)
    assert indices[:11].tolist() == expected[:total]


@needs_kernel
@pytest.mark.parametrize("total", [0, 3, 12])
def test_a_wrong_total_of_a_mask_writes_nothing_outside(total, fenced):
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 0], [1, 0, 1]])
    _, indices, position_ids, _ = ops.mask_layout(mask, total)
    assert indices.numel() == position_ids.numel() == total
    assert indices[:7].tolist() == [1, 2, 3, 4, 5, 9, 11][:total]


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("columns", [1, 7, 1000])
@pytest.mark.parametrize("know_total", [False, True])
@pytest.mark.parametrize("many_rows", [40, 2048])  # from this number on, a program takes several
def test_masks(rows, columns, know_total, many_rows, monkeypatch, fenced):
    monkeypatch.setattr(layout_ops, "_MANY_ROWS", many_rows)
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows)) < 0.4
    mask[rows // 2] = False
    total = int(mask.sum())
    cu_seqlens, indices, position_ids, sizes = ops.mask_layout(mask, total if know_total else None)
    assert cu_seqlens.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert indices[:total].tolist() == mask.flatten().nonzero().flatten().tolist()
    assert position_ids[:total].tolist() == [i for n in mask.sum(1).tolist() for i in range(n)]
    if not know_total:
        assert sizes.tolist() == [total, int(mask.sum(1).max())]


@pytest.mark.parametrize("slots", [100, 70_000])  # one launch, and two
@pytest.mark.parametrize("value", [2, -1])
def test_invalid_masks(slots, value, fenced):
    mask = torch.ones(2, slots, dtype=torch.int64)
    mask[1, slots - 3] = value
    assert is_refused(ops.mask_layout, mask, None)


@pytest.mark.parametrize("length", [100, 70_000])  # one launch, and two
def test_positions(length, fenced):
    lengths = [1, length, 3, 50]
    cu_seqlens, indices, position_ids = describe(lengths, length)
    given = torch.tensor(position_ids)
    results = ops.position_layout(given)
    assert results[3].tolist() == [4, length]
    assert results[0][:5].tolist() == cu_seqlens
    assert [result.tolist() for result in results[1:3]] == [indices, position_ids]
    given[-5] += 1
    assert is_refused(ops.position_layout, given)
