"""Layouts, unpad and repad compared with plain indexing, other libraries, and a copy.

The copy of the same bytes is the limit: a function that moves as many rows cannot be faster.
"""

import pytest
import torch
from transformers import modeling_flash_attention_utils as of_transformers

from tokenpack.kernels import layout_from_lengths, layout_from_mask, repad, unpad

from .common import DEVICE, DTYPE, ON_GPU, make_batch, measure

ROWS, LONGEST, WIDTH = (256, 4096, 2048) if ON_GPU else (32, 512, 256)
BATCH = make_batch(ROWS, LONGEST)
BASELINES = ("plain indexing", "plain torch from a mask")
LIMITS = ("copy of the same bytes",)

pytestmark = pytest.mark.benchmark(max_time=0.5)


def _plain_layout(mask):
    """What models without a shared layout compute in every layer."""
    lengths = mask.sum(dim=1, dtype=torch.int32)
    indices = mask.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return indices, cu_seqlens, int(lengths.max())


@pytest.mark.benchmark(group="layout")
@pytest.mark.parametrize(
    "by", ["mask", "lengths on the host", "plain torch from a mask", "transformers from a mask"]
)
def test_layout(benchmark, by):
    """Build the layout, once per batch."""
    lengths = BATCH.lengths.tolist()
    functions = {
        "mask": lambda: layout_from_mask(BATCH.mask),
        "lengths on the host": lambda: layout_from_lengths(lengths, device=DEVICE),
        "plain torch from a mask": lambda: _plain_layout(BATCH.mask),
        "transformers from a mask": lambda: of_transformers._get_unpad_data(BATCH.mask),
    }
    measure(benchmark, functions[by], batch=BATCH)


def _bert_padding():
    return pytest.importorskip("flash_attn.bert_padding", reason="flash-attn is not installed")


def _bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _padded_tensors(kind):
    hidden = torch.randn(ROWS, LONGEST, WIDTH, dtype=DTYPE, device=DEVICE)
    if kind == "hidden states":
        return [hidden]
    ids = [torch.randint(1000, (ROWS, LONGEST), device=DEVICE) for _ in range(3)]
    return [hidden, *ids]


_KINDS = pytest.mark.parametrize("kind", ["hidden states", "hidden states and three of ids"])
_OTHERS = ("plain indexing", "transformers", "flash-attn bert_padding", "copy of the same bytes")


@_KINDS
@pytest.mark.parametrize("by", ["unpad", *_OTHERS])
def test_unpad(benchmark, by, kind):
    """From padded rows to the stream of real tokens."""
    benchmark.group = f"unpad, {kind}"
    layout = layout_from_mask(BATCH.mask)
    padded = _padded_tensors(kind)
    indices = layout.indices.long()
    streams = unpad(padded, layout)
    functions = {
        "unpad": lambda: unpad(padded, layout),
        "plain indexing": lambda: [tensor.flatten(0, 1)[indices] for tensor in padded],
        "transformers": lambda: [
            of_transformers._index_first_axis(tensor, indices) for tensor in padded
        ],
        "copy of the same bytes": lambda: [stream.clone() for stream in streams],
    }
    if by == "flash-attn bert_padding":
        index = _bert_padding().index_first_axis
        functions[by] = lambda: [index(tensor.flatten(0, 1), indices) for tensor in padded]
    measure(benchmark, functions[by], batch=BATCH, moved=2 * _bytes(streams))


@_KINDS
@pytest.mark.parametrize("by", ["repad", *_OTHERS])
def test_repad(benchmark, by, kind):
    """From the stream of real tokens to padded rows."""
    benchmark.group = f"repad, {kind}"
    layout = layout_from_mask(BATCH.mask)
    padded = _padded_tensors(kind)
    indices = layout.indices.long()
    streams = unpad(padded, layout)

    def plain(tensor):
        flat = tensor.new_zeros(ROWS * LONGEST, *tensor.shape[1:])
        flat[indices] = tensor
        return flat.unflatten(0, (ROWS, LONGEST))

    functions = {
        "repad": lambda: repad(streams, layout),
        "plain indexing": lambda: [plain(stream) for stream in streams],
        "transformers": lambda: [
            of_transformers._pad_input(stream, indices, ROWS, LONGEST) for stream in streams
        ],
        "copy of the same bytes": lambda: [tensor.clone() for tensor in padded],
    }
    if by == "flash-attn bert_padding":
        pad = _bert_padding().pad_input
        functions[by] = lambda: [pad(stream, indices, ROWS, LONGEST) for stream in streams]
    read = padded if by == "copy of the same bytes" else streams
    moved = _bytes(read) + _bytes(padded)
    measure(benchmark, functions[by], batch=BATCH, moved=moved)


@pytest.mark.benchmark(group="unpad and repad, forward and backward")
@pytest.mark.parametrize("by", ["unpad and repad", "plain indexing"])
def test_there_and_back_with_gradients(benchmark, by):
    """Unpad and repad, as before and after a stack of layers."""
    layout = layout_from_mask(BATCH.mask)
    (hidden,) = _padded_tensors("hidden states")
    hidden.requires_grad_()
    incoming = torch.randn_like(hidden)
    indices = layout.indices.long()

    def plain():
        stream = hidden.flatten(0, 1)[indices]
        flat = stream.new_zeros(ROWS * LONGEST, WIDTH).index_put((indices,), stream)
        return flat.unflatten(0, (ROWS, LONGEST))

    forward = {
        "unpad and repad": lambda: repad(unpad(hidden, layout), layout),
        "plain indexing": plain,
    }[by]
    measure(benchmark, lambda: torch.autograd.grad(forward(), hidden, incoming), batch=BATCH)
