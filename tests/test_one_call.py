"""Few tokens: attention of all sequences in one call equals that of the reference."""

import pytest
import torch

from tokenpack.attention import layout_attention, one_call
from tokenpack.kernels import layout_from_lengths
from tokenpack.kernels.attention import varlen_attention_reference

HEADS, WIDTH = 4, 8
EQUAL = [[9, 7], [1, 5, 0, 3, 1], [12], [0, 6]]
OPTIONS = [
    {"causal": True},
    {"causal": False},
    {"causal": True, "sliding_window": 3},
    {"causal": False, "sliding_window": 3},
    {"causal": True, "relative_bias": 4},
    {"causal": False, "relative_bias": 20, "scale": 1.0},
]


def run(lengths_q, lengths_k, options, kv_heads=HEADS, dtype=torch.float64):
    """The output and gradients of `layout_attention`, and those of the reference in float64."""
    generator = torch.Generator().manual_seed(0)
    layouts = {"dec": layout_from_lengths(lengths_q), "enc": layout_from_lengths(lengths_k)}
    total_q, total_k = sum(lengths_q), sum(lengths_k)
    shapes = [(total_q, HEADS, WIDTH), *[(total_k, kv_heads, WIDTH)] * 2]
    options = {"scale": WIDTH**-0.5, **options}
    if "relative_bias" in options:
        shapes.append((HEADS, 2 * options.pop("relative_bias") + 1))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    dout = torch.randn(shapes[0], generator=generator, dtype=torch.float64)

    def results(dtype, attend):
        q, k, v, *tables = leaves = [each.to(dtype, copy=True).requires_grad_() for each in inputs]
        out = attend(q, k, v, tables[0] if tables else None)
        out.backward(dout.to(dtype))
        return [out, *(leaf.grad for leaf in leaves)]

    def ours(q, k, v, table):
        role = "cross" if lengths_q != lengths_k else "dec"
        sides = (side.transpose(0, 1)[None] for side in (q, k, v))
        return layout_attention(*sides, layouts, role, **options, relative_bias=table)[0][0]

    def theirs(q, k, v, table):
        window = options.get("sliding_window")
        if window is not None:
            window = (window - 1, -1 if options["causal"] else window - 1)
        more = {name: options.get(name) for name in ("causal", "scale", "softcap")}
        offsets = layouts["dec"].cu_seqlens, layouts["enc"].cu_seqlens
        return varlen_attention_reference(
            q, k, v, *offsets, **more, window=window, relative_bias=table
        )

    return zip(results(dtype, ours), results(torch.float64, theirs), strict=True)


@pytest.fixture
def plans(monkeypatch):
    """The plans that are made. One that is None leaves a call to the reference."""
    made, plan = [], one_call._plan

    def note(*args):
        made.append(plan(*args))
        return made[-1]

    monkeypatch.setattr(one_call, "_plan", note)
    return made


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", EQUAL, ids=str)
def test_self_attention(lengths, options, plans):
    for ours, theirs in run(lengths, lengths, options):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert plans[0] is not None


@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
@pytest.mark.parametrize(
    "lengths, is_one_call", [(([3, 1, 0], [5, 2, 4]), True), (([3, 2], [5, 0]), False)], ids=str
)
def test_cross_attention(lengths, is_one_call, kv_heads, plans):
    """The third sequence has keys without queries. A query without keys needs the reference."""
    for ours, theirs in run(*lengths, {"causal": False}, kv_heads):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert [plan is not None for plan in plans] == [is_one_call]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[4]], ids=str)
def test_other_dtypes(options, dtype):
    for ours, theirs in run([9, 7], [9, 7], options, dtype=dtype):
        assert ours.dtype == dtype
        assert (ours - theirs).abs().max() <= 8 * torch.finfo(dtype).eps * theirs.abs().max()


@pytest.mark.parametrize(
    "lengths, options",
    [([60, 60], {"causal": True}), ([9, 7], {"causal": True, "softcap": 2.0})],
    ids=["many tokens", "softcap"],
)
def test_calls_of_the_reference(lengths, options, plans):
    for ours, theirs in run(lengths, lengths, options):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert plans == []


def test_without_gradients_no_sequence_makes_another_one_nan(plans):
    layouts = {"self": layout_from_lengths([3, 4])}
    q = torch.randn(1, HEADS, 7, WIDTH)
    q[:, :, 1] = float("nan")
    out, _ = layout_attention(q, q, q, layouts, causal=False)
    assert plans == []
    assert out[:, :3].isnan().all()
    assert out[:, 3:].isfinite().all()


def test_layers_share_the_matrix_of_a_table():
    """Both layers add to the gradient of the table, and a later change of it is seen."""
    layouts = {"self": layout_from_lengths([5, 4])}
    q = torch.randn(1, HEADS, 9, WIDTH, dtype=torch.float64, requires_grad=True)
    table = torch.randn(HEADS, 7, dtype=torch.float64, requires_grad=True)
    gradients = []
    for memos in ([{}] * 2, [{}, {}]):
        out = q
        for memo in memos:
            out, _ = layout_attention(
                out, q, q, layouts, causal=False, relative_bias=table, memo=memo
            )
            out = out.transpose(1, 2)
        out.sum().backward()
        gradients.append(table.grad)
        table.grad = None
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        table.mul_(2.0)
    changed, fresh = (
        layout_attention(q, q, q, layouts, causal=False, relative_bias=table, memo=memo)[0]
        for memo in (memos[1], {})
    )
    assert torch.equal(changed, fresh)
