"""unpad and repad: exact copies, each the gradient of the other, without leaks from padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpack.kernels import layout_from_lengths, layout_from_mask, repad, unpad
from tokenpack.kernels._triton import INTERPRETED

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]
TRAILING = [(), (1,), (3,), (2, 5), (0,)]

# Left padding, right padding, holes, only padding.
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0]])


@st.composite
def masks(draw):
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    slots = st.lists(st.booleans(), min_size=columns, max_size=columns)
    return torch.tensor([draw(slots) for _ in range(rows)])


def values_of(dtype, *shape):
    """Values that are distinct if the dtype has enough of them, and never 0."""
    count = max(torch.Size(shape).numel(), 1)
    values = torch.arange(1, count + 1)[: torch.Size(shape).numel()].reshape(shape)
    return (values % 2 == 0) if dtype == torch.bool else (values % 251 + 1).to(dtype)


def poisoned(mask, *trailing, dtype=torch.float32):
    """Random values at real positions, and NaN at the others."""
    padded = torch.randn(*mask.shape, *trailing, dtype=dtype)
    padded[mask == 0] = float("nan")
    return padded


def oracle_unpad(padded, mask):
    rows = [row[real.bool()] for row, real in zip(padded, mask)]
    return torch.cat(rows)


# ---------------------------------------------------------------------------------- exact values


@settings(max_examples=60)
@given(
    mask=masks(),
    tensors=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.sampled_from(TRAILING)), min_size=1, max_size=4
    ),
    fill=st.sampled_from([0, 1]),
)
def test_unpad_then_repad(mask, tensors, fill):
    layout = layout_from_mask(mask)
    padded = [values_of(dtype, *mask.shape, *trailing) for dtype, trailing in tensors]
    streams = unpad(padded, layout)
    returned = repad(streams, layout, fill=fill)
    for before, stream, after in zip(padded, streams, returned, strict=True):
        assert stream.equal(oracle_unpad(before, mask))
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
        assert after[mask].equal(before[mask])
        assert after[~mask].equal(torch.full_like(after[~mask], fill))


@settings(max_examples=40)
@given(lengths=st.lists(st.integers(0, 7), min_size=1, max_size=5), dtype=st.sampled_from(DTYPES))
def test_repad_then_unpad(lengths, dtype):
    layout = layout_from_lengths(lengths)
    stream = values_of(dtype, sum(lengths), 3)
    padded = repad(stream, layout)
    assert padded.shape == (len(lengths), max(lengths), 3)
    assert unpad(padded, layout).equal(stream)


def test_a_tensor_gives_a_tensor_and_a_sequence_a_list():
    layout = layout_from_mask(MASK)
    ids = values_of(torch.int64, *MASK.shape)
    assert unpad(ids, layout).equal(ids[MASK == 1])
    for sequence in ([ids], (ids,)):
        streams = unpad(sequence, layout)
        assert isinstance(streams, list)
        assert isinstance(repad(tuple(streams), layout), list)


def test_each_tensor_has_its_own_fill():
    layout = layout_from_mask(MASK)
    streams = unpad([values_of(dtype, 4, 4) for dtype in (torch.int64, torch.float32)], layout)
    labels, scores = repad(streams, layout, fill=[-100, float("-inf")])
    assert labels[MASK == 0].eq(-100).all()
    assert scores[MASK == 0].eq(float("-inf")).all()


@pytest.mark.usefixtures("fenced")
@pytest.mark.parametrize("trailing", TRAILING, ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16], ids=str)
def test_nothing_is_written_outside_the_outputs(dtype, trailing):
    mask = torch.cat([MASK, MASK[:1]])  # 20 slots: no tile ends there
    layout = layout_from_mask(mask)
    others = values_of(torch.uint8, *mask.shape, 33)  # rows of another length in the same launch
    streams = unpad([values_of(dtype, *mask.shape, *trailing), others], layout)
    repad(streams, layout)


def test_slices_of_fused_projections():
    """q, k and v as views into one tensor, whose rows are far apart."""
    layout = layout_from_mask(MASK)
    fused = torch.randn(*MASK.shape, 3 * 32)
    views = fused.chunk(3, dim=-1)
    for view, stream in zip(views, unpad(views, layout)):
        assert stream.equal(view[MASK == 1])
        assert stream.is_contiguous()
    streams = unpad(fused, layout).chunk(3, dim=-1)
    for stream, padded in zip(streams, repad(streams, layout)):
        assert padded[MASK == 1].equal(stream)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_rows_that_begin_at_any_byte(offset):
    """Views whose first element is not aligned to 16 bytes, as after a slice of columns."""
    layout = layout_from_mask(MASK)
    wide = torch.randn(*MASK.shape, 40).half()[..., offset : offset + 32]
    assert wide.data_ptr() % 16
    assert unpad(wide, layout).equal(wide[MASK == 1])
    buffer = torch.randn(layout.total_tokens * 32 + offset).half()[offset:]
    stream = buffer.view(layout.total_tokens, 32)
    assert repad(stream, layout)[MASK == 1].equal(stream)


def test_strides_do_not_matter():
    layout = layout_from_mask(MASK)
    wide = torch.randn(4, 6, 4).transpose(1, 2)  # [rows, columns, 6]
    assert unpad(wide, layout).equal(wide[MASK == 1])
    stream = torch.randn(6, layout.total_tokens).t()
    assert repad(stream, layout)[MASK == 1].equal(stream)


def test_nan_in_padding_does_not_spread_and_nan_in_tokens_is_kept():
    layout = layout_from_mask(MASK)
    padded = poisoned(MASK, 2)
    stream = unpad(padded, layout)
    assert stream.isfinite().all()
    assert repad(stream, layout).isfinite().all()
    padded[MASK == 1] = float("nan")
    assert unpad(padded, layout).isnan().all()


def test_a_batch_of_padding_alone():
    layout = layout_from_mask(torch.zeros(2, 3))
    padded = torch.full((2, 3, 4), float("nan"), requires_grad=True)
    stream = unpad(padded, layout)
    assert stream.shape == (0, 4)
    repad(stream, layout).sum().backward()
    assert padded.grad.equal(torch.zeros(2, 3, 4))


# ------------------------------------------------------------------------------------- gradients


def test_gradient_of_unpad_is_repad():
    layout = layout_from_mask(MASK)
    padded = poisoned(MASK, 3).requires_grad_()
    stream = unpad(padded, layout)
    incoming = torch.randn_like(stream)
    stream.backward(incoming)
    assert padded.grad.equal(repad(incoming, layout))
    assert padded.grad[MASK == 0].equal(torch.zeros(int((MASK == 0).sum()), 3))


def test_gradient_of_repad_is_unpad():
    layout = layout_from_mask(MASK)
    stream = torch.randn(layout.total_tokens, 3, requires_grad=True)
    padded = repad(stream, layout, fill=float("nan"))
    incoming = poisoned(MASK, 3)
    padded.backward(incoming)
    assert stream.grad.isfinite().all()
    assert stream.grad.equal(unpad(incoming, layout))


def test_gradients_by_finite_differences_first_and_second():
    layout = layout_from_mask(MASK)
    padded = [torch.randn(4, 4, 2), torch.randn(4, 4)]
    padded = [tensor.double().requires_grad_() for tensor in padded]
    streams = [torch.randn(7, 2), torch.randn(7)]
    streams = [tensor.double().requires_grad_() for tensor in streams]

    def squares_of_unpadded(*tensors):
        return tuple(stream.square() for stream in unpad(tensors, layout))

    def squares_of_repadded(*tensors):
        return tuple(padded.square() for padded in repad(tensors, layout, fill=2.0))

    for function, inputs in ((squares_of_unpadded, padded), (squares_of_repadded, streams)):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=INTERPRETED)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=INTERPRETED)


def test_members_of_a_list_have_their_own_gradients():
    layout = layout_from_mask(MASK)
    ids = values_of(torch.int64, 4, 4)
    frozen = torch.randn(4, 4)
    used, unused = (torch.randn(4, 4, 2, requires_grad=True) for _ in range(2))
    streams = unpad([ids, frozen, used, unused], layout)
    # The tensor of a stream that is not used gets no gradient, or zeros.
    streams[2].sum().backward()
    assert used.grad.equal(MASK[..., None].expand(4, 4, 2).float())
    assert unused.grad is None or not unused.grad.any()
    assert not streams[0].requires_grad
    assert ids.grad is None
    assert frozen.grad is None


def test_members_of_a_list_have_gradients_of_their_own_in_repad():
    layout = layout_from_mask(MASK)
    ids = values_of(torch.int64, 7)
    frozen = torch.randn(7)
    used, unused = (torch.randn(7, 2, requires_grad=True) for _ in range(2))
    padded = repad([ids, frozen, used, unused], layout)
    (padded[2] * 3).sum().backward()
    assert used.grad.equal(torch.full((7, 2), 3.0))
    assert unused.grad is None or not unused.grad.any()
    assert not padded[0].requires_grad
    assert ids.grad is None
    assert frozen.grad is None


# ------------------------------------------------------------------------ registration, compilation


def test_registered_correctly_for_compile_and_autograd():
    layout = layout_from_mask(MASK)
    padded = [torch.randn(4, 4, 2, requires_grad=True), values_of(torch.int64, 4, 4)]
    torch.library.opcheck(torch.ops.tokenpack.unpad, (padded, layout.indices))
    streams = [torch.randn(7, 2, requires_grad=True), values_of(torch.int64, 7)]
    torch.library.opcheck(torch.ops.tokenpack.repad, (streams, layout.indices, 16, [0.0, -1.0]))


def test_traces_without_a_graph_break():
    layout = layout_from_mask(MASK)

    def through_a_layer(hidden, ids, layout):
        stream, stream_ids = unpad([hidden, ids], layout)
        stream = torch.tanh(stream) * stream_ids[:, None] + layout.position_ids[:, None]
        return repad([stream, stream_ids], layout, fill=[0.5, -100])

    compiled = torch.compile(through_a_layer, fullgraph=True, backend="aot_eager")
    hidden, ids = poisoned(MASK, 3), values_of(torch.int64, 4, 4)
    leaves = [hidden.clone().requires_grad_() for _ in range(2)]
    results = [
        function(leaf, ids, layout) for function, leaf in zip((through_a_layer, compiled), leaves)
    ]
    for eager, traced in zip(*results, strict=True):
        assert eager.isfinite().all()
        assert traced.equal(eager)
    for padded, _ in results:
        padded.sum().backward()
    assert leaves[0].grad.isfinite().all()
    assert leaves[1].grad.equal(leaves[0].grad)


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "tensors, shown",
    [
        (torch.zeros(4, 3), r"tensors\[0\] must have .* layout\.padded_shape = \(4, 4\)"),
        (torch.zeros(4), r"tensors\[0\] .* got \(4,\)"),
        (torch.zeros(7, 4), r"got \(7, 4\)"),
        (
            [torch.zeros(4, 4), torch.zeros(3, 4)],
            r"tensors\[1\] must have a shape that starts with",
        ),
        (
            torch.zeros(4, 4, device="meta"),
            r"tensors\[0\] must be on cpu like the layout, got meta",
        ),
        ([], "tensors must hold at least one"),
    ],
)
def test_unpad_names_wrong_arguments(tensors, shown):
    with pytest.raises(ValueError, match=shown):
        unpad(tensors, layout_from_mask(MASK))


@pytest.mark.parametrize(
    "tensors, shown",
    [
        (torch.zeros(4, 4), r"tensors\[0\] must have .* layout\.total_tokens = \(7,\)"),
        (torch.zeros(()), r"got \(\)"),
        ([torch.zeros(7), torch.zeros(8)], r"tensors\[1\] must have a shape that starts with"),
        (torch.zeros(7, device="meta"), r"tensors\[0\] must be on cpu like the layout, got meta"),
        ((), "tensors must hold at least one"),
    ],
)
def test_repad_names_wrong_arguments(tensors, shown):
    with pytest.raises(ValueError, match=shown):
        repad(tensors, layout_from_mask(MASK))


def test_a_layout_on_another_device_is_named():
    with pytest.raises(ValueError, match=r"must be on meta like the layout, got cpu"):
        unpad(torch.zeros(4, 4), layout_from_mask(MASK).to("meta"))


@pytest.mark.parametrize("move", [unpad, repad])
@pytest.mark.parametrize("tensors", [[torch.zeros(7), None], [[1.0]], [1]])
def test_values_that_are_not_tensors(move, tensors):
    layout = layout_from_lengths([7])
    tensors = [t[None] if isinstance(t, torch.Tensor) and move is unpad else t for t in tensors]
    with pytest.raises(TypeError, match=r"tensors\[\d\] must be a tensor, got"):
        move(tensors, layout)


@pytest.mark.parametrize("fill", [[], [0.0], [0.0, 0.0, 0.0]])
def test_the_number_of_fills_must_match(fill):
    with pytest.raises(ValueError, match=f"fill must be one value or 2 values, got {len(fill)}"):
        repad([torch.zeros(7), torch.zeros(7)], layout_from_mask(MASK), fill=fill)


@pytest.mark.parametrize(
    "fill, dtype",
    [
        (0.5, torch.int64),
        (float("nan"), torch.int64),
        (float("-inf"), torch.int32),
        (-100, torch.uint8),
        (2**53 + 1, torch.int64),
        (2, torch.bool),
        (0.5, torch.bool),
    ],
)
def test_a_fill_that_the_dtype_cannot_hold(fill, dtype):
    with pytest.raises(ValueError, match=rf"fill must be representable in {dtype}, got {fill}"):
        repad(torch.ones(7, dtype=dtype), layout_from_mask(MASK), fill=fill)
