"""The ids, targets and columns of the real tokens, and the counts of labels."""

import pytest
import torch
from torch.nn.functional import pad

from tokenpack.kernels import layout_from_mask
from tokenpack.kernels.tokens import _take_tokens, take_tokens


def masks():
    ragged = torch.arange(7) < torch.tensor([5, 0, 7, 1])[:, None]
    holes = ragged.clone()
    holes[2, 2:4] = False
    return {
        "right padding": ragged,
        "left padding": ragged.flip(1),
        "holes": holes,
        "one column": torch.tensor([[True], [False], [True]]),
        "several programs": torch.rand(60, 100, generator=torch.Generator().manual_seed(0)) < 0.7,
    }


def batch(mask, dtype=torch.int64, label_dtype=torch.int64):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 100, mask.shape, generator=generator)
    labels = ids.masked_fill(torch.rand(mask.shape, generator=generator) < 0.3, -100)
    return ids.to(dtype), labels.to(label_dtype)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("case", masks())
def test_values(case, shift):
    mask = masks()[case]
    ids, labels = batch(mask)
    taken = take_tokens(ids, labels, layout_from_mask(mask), shift=shift)
    shifted = pad(labels, (0, 1), value=-100)[:, 1:] if shift else labels
    assert torch.equal(taken.tokens, ids[mask])
    assert torch.equal(taken.targets, shifted[mask])
    assert torch.equal(taken.columns, mask.nonzero()[:, 1])
    counts = [int((values != -100).sum()) for values in (shifted, shifted[mask])]
    assert taken.counts.tolist() == counts


@pytest.mark.parametrize("dtypes", [(torch.int32, torch.int64), (torch.int64, torch.int32)])
def test_types_are_kept_and_strides_are_not(dtypes):
    mask = masks()["holes"]
    ids, labels = (tensor.t().contiguous().t() for tensor in batch(mask, *dtypes))
    taken = take_tokens(ids, labels, layout_from_mask(mask))
    assert (taken.tokens.dtype, taken.targets.dtype) == dtypes
    assert torch.equal(taken.tokens, ids[mask])
    assert torch.equal(taken.targets, labels[mask])


def test_errors():
    mask = masks()["holes"]
    ids, labels = batch(mask)
    layout = layout_from_mask(mask)
    with pytest.raises(ValueError, match=r"ids must be \(4, 7\), got \(4, 6\)"):
        take_tokens(ids[:, 1:], labels, layout)
    with pytest.raises(ValueError, match=r"labels must be \(4, 7\), got \(28,\)"):
        take_tokens(ids, labels.flatten(), layout)
    with pytest.raises(ValueError, match=f"labels must be on {layout.device}, got meta"):
        take_tokens(ids, labels.to("meta"), layout)


@pytest.mark.parametrize("shift", [False, True])
def test_registered_correctly(shift):
    mask = masks()["holes"]
    ids, labels = batch(mask)
    indices = layout_from_mask(mask).indices
    torch.library.opcheck(_take_tokens, (ids, labels, indices, shift))
