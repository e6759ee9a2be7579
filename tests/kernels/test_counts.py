"""Launches, waits for the device and bytes of layout, unpad and repad beside what users have today.

The same batch through tokenpack, through transformers' own path and, where it is installed, through
flash-attn's bert_padding. Run with -s to see the table.
"""

import pytest
import torch

from tokenpack.kernels import layout_from_mask, repad, unpad
from tokenpack.kernels._triton import INTERPRETED

from .counting import counted

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counts kernels in Triton's interpreter")

ROWS, COLUMNS, HEADS, HEAD_DIM = 8, 64, 4, 16
LENGTHS = [64, 9, 30, 1, 17, 40, 5, 22]
TOKENS = sum(LENGTHS)
ROW_BYTES = 4 * HEADS * HEAD_DIM


@pytest.fixture
def batch():
    mask = torch.arange(COLUMNS) < torch.tensor(LENGTHS)[:, None]
    qkv = [torch.randn(ROWS, COLUMNS, HEADS, HEAD_DIM) for _ in range(3)]
    return mask, qkv


def by_tokenpack(mask, qkv):
    with counted() as layout_counter:
        layout = layout_from_mask(mask)
    with counted() as unpad_counter:
        streams = unpad(qkv, layout)
    with counted() as repad_counter:
        returned = repad(streams[0], layout)
    return streams, returned, [layout_counter, unpad_counter, repad_counter]


def by_transformers(mask, qkv):
    """What flash attention of transformers does in every layer."""
    paths = pytest.importorskip("transformers.modeling_flash_attention_utils")
    with counted() as layout_counter:
        indices, *_ = paths._get_unpad_data(mask)
    with counted() as unpad_counter:
        streams = [paths._index_first_axis(tensor, indices) for tensor in qkv]
    with counted() as repad_counter:
        returned = paths._pad_input(streams[0], indices, ROWS, COLUMNS)
    return streams, returned, [layout_counter, unpad_counter, repad_counter]


def by_bert_padding(mask, qkv):
    """The layout comes with the first tensor. The other tensors use its indices."""
    bert_padding = pytest.importorskip("flash_attn.bert_padding")
    with counted() as layout_counter:
        first, indices, *_ = bert_padding.unpad_input(qkv[0], mask)[:4]
    with counted() as unpad_counter:
        others = [bert_padding.index_first_axis(t.flatten(0, 1), indices) for t in qkv[1:]]
    with counted() as repad_counter:
        returned = bert_padding.pad_input(first, indices, ROWS, COLUMNS)
    return [first, *others], returned, [layout_counter, unpad_counter, repad_counter]


def show(name, counters):
    for what, counter in zip(("layout", "unpad q, k, v", "repad"), counters):
        cost = counter.cost
        print(f"{name:14} {what:14} {cost.launches:3} {cost.waits:2} {cost.bytes:8,}")


def test_each_op_is_one_launch_and_all_wait_once(batch):
    mask, qkv = batch
    *_, counters = by_tokenpack(mask, qkv)
    show("tokenpack", counters)
    layout, unpadding, repadding = (counter.cost for counter in counters)
    assert (layout.launches, layout.waits) == (1, 1)
    assert (unpadding.launches, unpadding.waits) == (1, 0)
    assert (repadding.launches, repadding.waits) == (1, 0)
    # unpad reads and writes each real row of three tensors. repad reads each and writes every slot.
    indices = 4 * TOKENS
    assert unpadding.bytes == 3 * 2 * TOKENS * ROW_BYTES + indices
    rows = (TOKENS + ROWS * COLUMNS) * ROW_BYTES
    searches = (TOKENS.bit_length() + 1) * ROWS * COLUMNS * 4
    assert rows < repadding.bytes <= rows + searches


@pytest.mark.parametrize("peer", [by_transformers, by_bert_padding])
def test_peers_need_more_launches_waits_or_bytes(batch, peer):
    mask, qkv = batch
    streams, returned, counters = peer(mask, qkv)
    expected_streams, expected, ours = by_tokenpack(mask, qkv)
    assert all(map(torch.equal, streams, expected_streams))
    assert returned.equal(expected)
    show(peer.__name__[3:], counters)
    assert sum(c.launches for c in counters) >= 3 * sum(c.launches for c in ours)
    assert sum(c.waits for c in counters) > sum(c.waits for c in ours)
    assert sum(c.bytes for c in counters) > sum(c.bytes for c in ours)


def test_known_totals_need_no_wait(batch):
    mask, _ = batch
    with counted() as counter:
        layout_from_mask(mask, total_tokens=TOKENS)
    assert counter.cost[:2] == (1, 0)
    lengths = torch.tensor(LENGTHS)
    with counted() as counter:  # the call of the builders for lengths on a GPU
        torch.ops.tokenpack.boundary_layout(lengths, False, TOKENS, COLUMNS)
    assert counter.cost[:2] == (1, 0)


def test_backward_is_one_launch(batch):
    mask, qkv = batch
    layout = layout_from_mask(mask)
    leaves = [tensor.requires_grad_() for tensor in qkv]
    streams = unpad(leaves, layout)
    paddeds = repad(streams, layout)
    for outputs, inputs in ((streams, leaves), (paddeds, streams)):
        slopes = [torch.ones_like(output) for output in outputs]
        with counted() as counter:
            torch.autograd.grad(outputs, inputs, slopes, retain_graph=True)
        assert counter.cost[:2] == (1, 0)
