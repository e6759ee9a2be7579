"""All kernels with their programs in other orders: no races, no access outside of tensors."""

from functools import cache, partial

import pytest
import torch

from tokenpack.kernels import (
    layout_from_lengths,
    layout_from_mask,
    layout_from_position_ids,
    layout_ops,
    packed_cross_entropy,
    repad,
    unpad,
    varlen_attention,
)
from tokenpack.kernels._triton import INTERPRETED
from tokenpack.kernels.tokens import take_tokens

from .test_compile_gate import MODULES

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter")

if INTERPRETED:
    import triton
    import triton.language as tl

    from .races import BoundsError, RaceError, programs_in_order

    @triton.jit
    def write_one_address(out):
        tl.store(out, tl.program_id(0))

    @triton.jit
    def read_the_next(out):
        number = tl.program_id(0)
        tl.store(out + number, tl.load(out + (number + 1) % 2))

    @triton.jit
    def read_outside(out, count):
        number = tl.program_id(0)
        tl.store(out + number, tl.load(out + number + count))

    @triton.jit
    def write_outside(out, count):
        tl.store(out + tl.program_id(0) + count, 0)


@pytest.fixture(params=["reversed", "shuffled"])
def order(request):
    return request.param


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LENGTHS = [70, 0, 1, 5]
WIDTH = max(LENGTHS)
MASK = torch.arange(WIDTH)[None, :] < torch.tensor(LENGTHS)[:, None]


def layouts():
    position_ids = torch.cat([torch.arange(length) for length in LENGTHS])
    lengths = torch.tensor(LENGTHS)
    built = [layout_from_mask(MASK), layout_from_mask(torch.ones(300, 300))]
    built += [layout_from_lengths(lengths), layout_from_position_ids(position_ids)]
    built.append(layout_from_position_ids(position_ids.repeat(900)))
    tensors = [
        tensor
        for layout in built
        for tensor in (layout.cu_seqlens, layout.indices, layout.position_ids)
    ]
    cu_seqlens, *_ = layout_ops.boundary_layout_triton(lengths, False, None, None)
    return [*tensors, cu_seqlens]


def copies():
    layout = layout_from_mask(MASK)
    padded = [random(*MASK.shape, 24).requires_grad_(), MASK.long()]
    streams = unpad(padded, layout)
    returned = repad(streams, layout)
    (returned[0] * random(24)).sum().backward()
    wide = torch.ones(40, 60, dtype=torch.bool)
    taken = [take_tokens(mask.long(), mask.long(), layout_from_mask(mask)) for mask in (MASK, wide)]
    return [*streams, *returned, padded[0].grad, *taken[0], *taken[1]]


def losses():
    layout = layout_from_mask(MASK)
    found = []
    for classes in (40, 9000):
        logits = random(layout.total_tokens, classes).requires_grad_()
        labels = torch.randint(classes, (layout.total_tokens,))
        options = {"cu_seqlens": layout.cu_seqlens, "shift": True, "label_smoothing": 0.1}
        loss = packed_cross_entropy(logits, labels, reduction="mean", **options)
        loss.backward()
        found += [loss, logits.grad]
        # The mean of each sequence has kernels of its own.
        found.append(packed_cross_entropy(logits, labels, reduction="sequence_mean", **options))
    return found


ATTENTION = {  # key heads of 2 query heads, bias, options
    "bias": (2, True, {}),
    "causal, grouped": (1, False, {"causal": True}),
    "window and softcap, grouped": (1, True, {"window": (9, 3), "softcap": 2.0}),
    "dropout": (2, True, {"dropout_p": 0.2, "dropout_seed": torch.tensor([3])}),
}


def attention(kind):
    kv_heads, bias, options = ATTENTION[kind]
    bounds = layout_from_lengths(LENGTHS).cu_seqlens
    q = random(sum(LENGTHS), 2, 24).requires_grad_()
    k, v = (random(sum(LENGTHS), kv_heads, 24, seed=seed).requires_grad_() for seed in (1, 2))
    leaves = [q, k, v, random(2, 33).requires_grad_()][: 4 if bias else 3]
    out = varlen_attention(q, k, v, bounds, bounds, relative_bias=[*leaves, None][3], **options)
    out.square().sum().backward()
    return [out, *(leaf.grad for leaf in leaves)]


CASES = {"layouts": layouts, "copies": copies, "losses": losses}
CASES |= {f"attention, {kind}": partial(attention, kind) for kind in ATTENTION}


def seeded(name):
    torch.manual_seed(0)
    return CASES[name]()


in_order = cache(seeded)  # both orders are compared with one run


def test_programs_of_all_kernels_keep_to_their_own_addresses(order):
    launched = set()
    for name in CASES:
        expected = in_order(name)
        with programs_in_order(order) as names:
            found = seeded(name)
        launched |= names
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other), name
    assert launched == {
        name
        for module in MODULES
        for name, value in vars(module).items()
        if name.endswith("_kernel") and hasattr(value, "fn")
    }


@pytest.mark.parametrize("name", ["write_one_address", "read_the_next"])
def test_a_race_is_found(name, order):
    with programs_in_order(order), pytest.raises(RaceError, match=name):
        globals()[name][(2,)](torch.zeros(2, dtype=torch.int32))


@pytest.mark.parametrize("name", ["read_outside", "write_outside"])
def test_an_access_outside_is_found(name, order):
    out = torch.zeros(8, dtype=torch.int32)[:2]  # what follows in memory is no tensor of the launch
    with programs_in_order(order), pytest.raises(BoundsError, match=name):
        globals()[name][(2,)](out, 2)
