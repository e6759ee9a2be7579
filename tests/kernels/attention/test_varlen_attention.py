"""Varlen attention against a float64 oracle, sequence by sequence and score by score.

The allowed error is 1.5 times the error of PyTorch's own attention, run on each sequence separately
in the same dtype, plus two roundings, ``2 * eps * |exact|``. The second term is needed where
PyTorch's result happens to be exact.
"""

import itertools
import warnings
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from tokenpack.kernels import varlen_attention
from tokenpack.kernels.attention import normal_window

HEADS = 4

# Empty and one-token sequences, neighbors of equal and of similar length, and a much longer one.
MIXED = [5, 0, 1, 33, 7, 6, 6, 1, 7, 130]
# As many keys as queries, more, fewer, none for 7 queries, and several pairs of one offset.
CROSS = [5, 4, 3, 30, 0, 4, 4, 0, 5, 150]

LENGTHS = {
    "mixed": (MIXED, MIXED),
    "cross": (MIXED, CROSS),
    "equal": ([9] * 5, [9] * 5),
    "equal cross": ([9] * 5, [6] * 5),
    "one long": ([260, 2, 3, 1, 2], [260, 2, 3, 1, 2]),
    "single": ([17], [17]),
}


class Inputs(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor | None
    dout: torch.Tensor
    lengths: tuple[list[int], list[int]]

    @property
    def cu_seqlens(self):
        return tuple(map(cumulative, self.lengths))

    def to(self, dtype):
        return self._replace(
            **{name: getattr(self, name).to(dtype) for name in ("q", "k", "v", "dout")},
            table=None if self.table is None else self.table.to(dtype),
        )


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def make_inputs(
    lengths,
    *,
    heads=HEADS,
    head_dim=16,
    kv_heads=HEADS,
    bias=False,
    dtype=torch.float32,
    seed=0,
):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    rows, keys = map(sum, lengths)
    return Inputs(
        random(rows, heads, head_dim),
        random(keys, kv_heads, head_dim),
        random(keys, kv_heads, head_dim),
        random(heads, 2 * 11 + 1) if bias else None,  # some sequences exceed the reach
        random(rows, heads, head_dim),
        lengths,
    )


# ----------------------------------------------------------------------------------- the oracles


def per_sequence(attend_one):
    """Turn attention of one sequence, ``(heads, tokens, head_dim)``, into packed attention."""

    def attend(q, k, v, cu_seqlens_q, cu_seqlens_k, *, relative_bias=None, **options):
        outs = []
        for s in range(cu_seqlens_q.numel() - 1):
            rows = slice(*cu_seqlens_q[s : s + 2].tolist())
            keys = slice(*cu_seqlens_k[s : s + 2].tolist())
            group = q.shape[1] // k.shape[1]
            q_s = q[rows].transpose(0, 1)
            k_s = k[keys].transpose(0, 1).repeat_interleave(group, 0)
            v_s = v[keys].transpose(0, 1).repeat_interleave(group, 0)
            if q_s.shape[1] == 0:
                continue
            if k_s.shape[1] == 0:
                outs.append(torch.zeros_like(q[rows]))
                continue
            outs.append(attend_one(q_s, k_s, v_s, relative_bias, **options).transpose(0, 1))
        return torch.cat(outs)

    return attend


def bias_and_visibility(q, k, table, causal, window):
    """The bias of each score, ``(heads or 1, rows, keys)``, and whether the key is visible."""
    rows, keys = q.shape[1], k.shape[1]
    distance = torch.arange(keys) - (torch.arange(rows)[:, None] + keys - rows)
    left, right = window or (-1, -1)
    visible = torch.ones(rows, keys, dtype=torch.bool)
    if causal:
        visible &= distance <= 0
    if left >= 0:
        visible &= distance >= -left
    if right >= 0:
        visible &= distance <= right
    if table is None:
        return q.new_zeros(1, rows, keys), visible
    reach = table.shape[1] // 2
    return table[:, distance.clamp(-reach, reach) + reach], visible


@per_sequence
def by_formula(q, k, v, table, *, causal=False, scale=None, window=None, softcap=None):
    bias, visible = bias_and_visibility(q, k, table, causal, window)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = (scores + bias).masked_fill(~visible, float("-inf"))
    out = torch.zeros_like(q)
    seeing = visible.any(1)
    out[:, seeing] = scores[:, seeing].softmax(-1) @ v
    return out


@per_sequence
def by_pytorch(q, k, v, table, *, causal=False, scale=None, window=None):
    bias, visible = bias_and_visibility(q, k, table, causal, window)
    mask = bias.masked_fill(~visible, float("-inf"))
    return scaled_dot_product_attention(q[None], k[None], v[None], mask[None], scale=scale)[0]


def run(attend, inputs, **options):
    """The output and the gradients, by name."""
    leaves = {"dq": inputs.q, "dk": inputs.k, "dv": inputs.v, "dtable": inputs.table}
    leaves = {name: t.clone().requires_grad_() for name, t in leaves.items() if t is not None}
    out = attend(
        leaves["dq"],
        leaves["dk"],
        leaves["dv"],
        *inputs.cu_seqlens,
        relative_bias=leaves.get("dtable"),
        **options,
    )
    out.backward(inputs.dout.to(out.dtype))
    return {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def assert_as_exact_as_pytorch(inputs, **options):
    dtype = inputs.q.dtype
    ours = run(varlen_attention, inputs, **options)
    # SDPA has no softcap. The formula in plain PyTorch, in the same dtype, then sets the limit.
    baseline = by_formula if "softcap" in options else by_pytorch
    theirs = run(baseline, inputs, **options)
    exact = run(by_formula, inputs.to(torch.float64), **options)
    for name, truth in exact.items():
        assert ours[name].dtype == dtype
        assert ours[name].isfinite().all(), name
        error = (ours[name].double() - truth).norm()
        allowed = 1.5 * (theirs[name].double() - truth).norm()
        allowed += 2 * torch.finfo(dtype).eps * truth.norm()
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}"


# ----------------------------------------------------------------------------- values, gradients

WINDOWS = [None, (3, 0), (2, 5), (-1, 2), (4, -1)]


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["", "softcap"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("lengths", ["mixed", "cross"])
def test_all_combinations_of_options(lengths, causal, window, softcap, bias):
    options = {"causal": causal, "window": window}
    if softcap is not None:
        options["softcap"] = softcap
    # Alternate the head counts and head_dim, so that each option occurs with both.
    turn = sum(map(bool, (causal, window, softcap, bias))) % 2
    inputs = make_inputs(
        LENGTHS[lengths], head_dim=(16, 80)[turn], kv_heads=(HEADS, 2)[turn], bias=bias
    )
    assert_as_exact_as_pytorch(inputs, **options)


@pytest.mark.parametrize("kv_heads", [HEADS, 2, 1])
@pytest.mark.parametrize("head_dim", [16, 80])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_every_kind_of_batch(lengths, head_dim, kv_heads):
    for bias, causal in itertools.product([False, True], repeat=2):
        inputs = make_inputs(LENGTHS[lengths], head_dim=head_dim, kv_heads=kv_heads, bias=bias)
        assert_as_exact_as_pytorch(inputs, causal=causal)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_a_one_token_sequence_returns_its_value(bias):
    inputs = make_inputs(([1, 1, 1], [1, 1, 1]), bias=bias)
    results = run(varlen_attention, inputs, causal=True)
    assert results.pop("out").equal(inputs.v)
    assert results.pop("dv").equal(inputs.dout)
    for name, gradient in results.items():
        assert gradient.abs().max() < 1e-5, name  # rounding of sums that cancel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window": (2, 5)},
        {"softcap": 2.0, "causal": True},
        {"scale": 1.0, "window": (3, 0)},
    ],
    ids=str,
)
@pytest.mark.parametrize("lengths", ["mixed", "cross"])
def test_half_precision(lengths, options, dtype):
    for bias, (head_dim, kv_heads) in itertools.product([False, True], [(16, 4), (80, 2)]):
        inputs = make_inputs(
            LENGTHS[lengths], head_dim=head_dim, kv_heads=kv_heads, bias=bias, dtype=dtype
        )
        assert_as_exact_as_pytorch(inputs, **options)


@pytest.mark.parametrize("scale", [1.0, 0.0, -0.3])
def test_scale(scale):
    assert_as_exact_as_pytorch(make_inputs(LENGTHS["mixed"]), scale=scale)
    assert_as_exact_as_pytorch(make_inputs(LENGTHS["mixed"], bias=True), scale=scale)


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float64], ids=str)
def test_a_table_of_another_dtype_keeps_it(table_dtype):
    inputs = make_inputs(LENGTHS["mixed"], bias=True)
    expected = run(varlen_attention, inputs)
    inputs = inputs.to(torch.bfloat16)._replace(table=inputs.table.to(table_dtype))
    results = run(varlen_attention, inputs)
    assert results["out"].dtype == torch.bfloat16
    assert results["dtable"].dtype == table_dtype
    assert (results["dtable"] - expected["dtable"]).norm() < 0.02 * expected["dtable"].norm()


def test_second_derivatives_raise():
    q, k, v = torch.randn(3, 5, 2, 16, requires_grad=True)
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    out = varlen_attention(q, k, v, bounds, bounds)
    for loss in (out.square().sum(), out.sum()):
        (dv,) = torch.autograd.grad(loss, v, create_graph=True, retain_graph=True)
        with pytest.raises(RuntimeError, match=r"differentiable once|no autograd formula"):
            (dv.sum() + v.sum()).backward()
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda q: varlen_attention(q, k, v, bounds, bounds).sum())(q.detach())


def test_gradients_by_finite_differences():
    lengths = ([3, 0, 4, 4], [5, 1, 2, 2])  # the last two have queries that see no key
    inputs = make_inputs(lengths, head_dim=3, kv_heads=2, bias=True).to(torch.float64)
    leaves = [t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v, inputs.table)]

    def attend(q, k, v, table):
        return varlen_attention(
            q, k, v, *inputs.cu_seqlens, causal=True, softcap=1.5, relative_bias=table
        )

    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (2, 1)}], ids=str)
def test_all_ways_to_say_no_limit(options):
    inputs = make_inputs(LENGTHS["mixed"])
    q, k, v = inputs[:3]
    expected = varlen_attention(q, k, v, *inputs.cu_seqlens, **options)
    window = options.pop("window", None)
    spellings = [(-1, -1), (-7, -2), (1000, 1000)] if window is None else [list(window)]
    for spelling in spellings:
        out = varlen_attention(q, k, v, *inputs.cu_seqlens, **options, window=spelling, softcap=0.0)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    "window, normal",
    [(None, None), ((-1, -1), None), ((-7, -2), None), ([-7, 0], (-1, 0)), ((4, -3), (4, -1))],
    ids=str,
)
def test_normal_window(window, normal):
    assert normal_window(window) == normal
    assert type(normal_window(window)) is type(normal)


# ------------------------------------------------------------------ queries without a key, leaks


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"causal": True, "softcap": 1.0},
        {"window": (1, 0)},
        {"window": (1, 0), "softcap": 1.0},
    ],
    ids=str,
)
def test_a_query_that_sees_no_key_gives_exact_zeros(options, bias):
    # Sequences 0 and 2 have the same offset and are padded to one width. Their first two queries
    # see no key under these options. Sequence 1 has no keys.
    rows, keys = [6, 3, 5, 4], [4, 0, 3, 4]
    results = run(varlen_attention, make_inputs((rows, keys), bias=bias), **options)
    blind = {6, 7, 8}
    if options:
        blind |= {0, 1, 9, 10}
    out = results["out"].abs().amax((1, 2))
    assert {int(row) for row in (out == 0).nonzero()} == blind
    dq = results["dq"].abs().amax((1, 2))
    assert dq[sorted(blind)].eq(0).all()


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("lengths", [([0, 0], [0, 0]), ([0, 0], [2, 3]), ([2, 3], [0, 0])])
def test_batches_without_keys_or_queries_have_gradients(lengths, bias):
    results = run(varlen_attention, make_inputs(lengths, bias=bias))
    for result in results.values():
        assert result.equal(torch.zeros_like(result))


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("poisoned", ["q", "k", "v"])
def test_nan_stays_in_its_sequence(poisoned, options, bias):
    # The lengths are not tiny: PyTorch's CPU kernel turns NaN into 0 in rows shorter than a vector.
    lengths = ([4, 5, 20, 3, 90], [4, 5, 20, 3, 90])
    inputs = make_inputs(lengths, bias=bias)
    clean = run(varlen_attention, inputs, **options)
    with_nan = getattr(inputs, poisoned).clone()
    with_nan[9:29] = float("nan")  # the third sequence
    results = run(varlen_attention, inputs._replace(**{poisoned: with_nan}), **options)
    others = torch.ones(122, dtype=torch.bool)
    others[9:29] = False
    assert results["out"][~others].isnan().all()
    for name in ("out", "dq", "dk", "dv"):
        assert results[name][others].equal(clean[name][others]), name


# --------------------------------------------------------------------------- strides, memory, modes


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_views_of_a_fused_projection(bias):
    inputs = make_inputs(LENGTHS["mixed"], bias=bias)
    expected = run(varlen_attention, inputs, causal=True)
    side_by_side = torch.stack(inputs[:3], 1).requires_grad_()  # [tokens, 3, heads, head_dim]
    heads_first = torch.stack([side.transpose(0, 1) for side in inputs[:3]]).requires_grad_()
    for fused, views in (
        (side_by_side, side_by_side.unbind(1)),
        (heads_first, [side.transpose(0, 1) for side in heads_first]),
    ):
        assert not any(view.is_contiguous() for view in views)
        out = varlen_attention(*views, *inputs.cu_seqlens, causal=True, relative_bias=inputs.table)
        dout = inputs.dout.transpose(0, 1).contiguous().transpose(0, 1)
        torch.testing.assert_close(out, expected["out"])
        (grad,) = torch.autograd.grad(out, fused, dout)
        sides = grad.unbind(1) if fused is side_by_side else [g.transpose(0, 1) for g in grad]
        for name, side in zip(("dq", "dk", "dv"), sides):
            torch.testing.assert_close(side, expected[name])


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // 4)
        return result


def test_no_tensor_is_quadratic_in_the_batch():
    def largest(num_seqs):
        inputs = make_inputs(([256] * num_seqs, [256] * num_seqs), bias=True)
        with Largest() as seen:
            run(varlen_attention, inputs)
        return seen.elements

    # The scores of one group, and as many elements again for the bias's gradient.
    assert largest(8) <= 2 * 2**21
    assert largest(16) <= 2 * 2**21


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_inference_first_then_training(bias):
    inputs = make_inputs(([3, 4, 4, 3], [3, 4, 4, 3]), bias=bias)  # no other test caches these
    with torch.inference_mode():
        out = varlen_attention(*inputs[:3], *inputs.cu_seqlens, relative_bias=inputs.table)
    assert run(varlen_attention, inputs)["out"].equal(out)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_frozen_inputs_get_no_gradient(bias):
    inputs = make_inputs(LENGTHS["mixed"], bias=bias)
    expected = run(varlen_attention, inputs)["dv"]
    inputs.v.requires_grad_()
    out = varlen_attention(*inputs[:3], *inputs.cu_seqlens, relative_bias=inputs.table)
    out.backward(inputs.dout)
    assert inputs.q.grad is None
    assert inputs.k.grad is None
    torch.testing.assert_close(inputs.v.grad, expected)


def test_compiled_with_its_surroundings():
    inputs = make_inputs(LENGTHS["mixed"], bias=True)

    def layer(q, k, v, *cu_seqlens, relative_bias):
        return varlen_attention(q * 2, k, v, *cu_seqlens, relative_bias=relative_bias).tanh()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    eager, traced = run(layer, inputs), run(compiled, inputs)
    for name, result in eager.items():  # tracing changes the order of sums
        torch.testing.assert_close(traced[name], result, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_dropout_drops_and_scales_up(bias):
    # With unit vectors as values, the output is the attention weights.
    lengths = ([40, 24, 25, 40], [40, 24, 25, 40])
    inputs = make_inputs(lengths, head_dim=40, bias=bias)
    units = torch.cat([torch.eye(40)[:length] for length in lengths[1]])
    v = units[:, None].expand(-1, HEADS, -1)

    def weights(**options):
        return varlen_attention(
            inputs.q, inputs.k, v, *inputs.cu_seqlens, relative_bias=inputs.table, **options
        )

    whole = weights()
    torch.manual_seed(0)
    draws = torch.stack([weights(dropout_p=0.3) for _ in range(40)])
    dropped = draws == 0
    scaled = torch.where(dropped, 0.0, whole / 0.7)
    torch.testing.assert_close(draws, scaled.expand_as(draws))
    real = whole > 0
    shares = dropped[:, real].double().mean(1)  # per draw
    spread = (0.3 * 0.7 / int(real.sum())) ** 0.5
    assert (shares - 0.3).abs().max() < 5 * spread
    per_weight = dropped[:, real].double().mean(0)  # weights are dropped independently
    assert (per_weight - 0.3).abs().max() < 6 * (0.3 * 0.7 / 40) ** 0.5


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["", "softcap"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_forward_and_backward_drop_the_same_weights(bias, softcap):
    lengths = ([3, 5, 4, 4], [3, 5, 4, 4])
    inputs = make_inputs(lengths, head_dim=4, kv_heads=2, bias=bias).to(torch.float64)
    leaves = [t.requires_grad_() for t in inputs[:4] if t is not None]

    def attend(q, k, v, table=None):
        torch.manual_seed(7)
        return varlen_attention(
            q, k, v, *inputs.cu_seqlens, relative_bias=table, dropout_p=0.4, softcap=softcap
        )

    assert not torch.allclose(attend(*leaves), varlen_attention(*leaves[:3], *inputs.cu_seqlens))
    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


def test_no_dropout_is_deterministic():
    inputs = make_inputs(LENGTHS["mixed"], bias=True)
    one, other = (run(varlen_attention, inputs, dropout_p=0.0) for _ in range(2))
    assert all(one[name].equal(other[name]) for name in one)


def test_no_gradient_is_copied_into_zeros():
    """The backward of ``tensor[0]`` would do that for long sequences, which are not grouped."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.add(op.name())
            return op(*args, **(kwargs or {}))

    seen = set()
    inputs = make_inputs(([260, 90], [260, 90]))
    leaves = [side.clone().requires_grad_() for side in inputs[:3]]
    with Names():
        varlen_attention(*leaves, *inputs.cu_seqlens, causal=True).backward(inputs.dout)
    assert "aten::select_backward" not in seen
    assert any("attention" in name and name.endswith("backward") for name in seen)


# ------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_autocast_casts_only_q_k_and_v(bias, backward_inside):
    inputs = make_inputs(LENGTHS["mixed"], bias=bias)
    halves = inputs.to(torch.bfloat16)._replace(table=inputs.table)
    expected = run(varlen_attention, halves, causal=True)
    leaves = [side.clone().requires_grad_() for side in inputs[:3]]
    table = None if inputs.table is None else inputs.table.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = varlen_attention(*leaves, *inputs.cu_seqlens, causal=True, relative_bias=table)
        if backward_inside:
            out.backward(halves.dout)
    if not backward_inside:
        out.backward(halves.dout)
    assert out.dtype == torch.bfloat16
    assert out.equal(expected["out"])
    for name, leaf in zip(("dq", "dk", "dv"), leaves):
        assert leaf.grad.dtype == torch.float32
        assert leaf.grad.equal(expected[name].float()), name
    if bias:
        assert table.grad.equal(expected["dtable"])


def test_autocast_leaves_float64_alone():
    inputs = make_inputs(LENGTHS["mixed"]).to(torch.float64)
    expected = varlen_attention(*inputs[:3], *inputs.cu_seqlens)
    with torch.autocast("cpu", torch.bfloat16):
        assert varlen_attention(*inputs[:3], *inputs.cu_seqlens).equal(expected)


# ----------------------------------------------------------------------------------- deprecation


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_is_deprecated_and_has_no_effect(deterministic, recwarn):
    inputs = make_inputs(LENGTHS["mixed"], bias=True)
    expected = run(varlen_attention, inputs)
    assert not recwarn.list
    with pytest.warns(FutureWarning, match="deterministic has no effect") as caught:
        results = run(varlen_attention, inputs, deterministic=deterministic)
    assert [warning.filename for warning in caught] == [__file__]  # the caller's line
    assert all(results[name].equal(expected[name]) for name in expected)


def test_deterministic_warns_once_per_call_site():
    inputs = make_inputs(LENGTHS["single"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            varlen_attention(*inputs[:3], *inputs.cu_seqlens, deterministic=True)
        varlen_attention(*inputs[:3], *inputs.cu_seqlens, deterministic=True)
    assert len(caught) == 2


def test_deterministic_does_not_break_a_graph():
    inputs = make_inputs(LENGTHS["mixed"])

    def layer(*tensors):
        return varlen_attention(*tensors, deterministic=True)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    tensors = (*inputs[:3], *inputs.cu_seqlens)
    torch.testing.assert_close(compiled(*tensors), varlen_attention(*tensors))


# ------------------------------------------------------------------------------------- bad input


def attend_badly(**changes):
    inputs = make_inputs(([2, 3], [2, 3]))
    cu_seqlens_q, cu_seqlens_k = inputs.cu_seqlens
    arguments = {
        "q": inputs.q,
        "k": inputs.k,
        "v": inputs.v,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
    }
    return varlen_attention(**{**arguments, **changes})


@pytest.mark.parametrize(
    "changes, shown",
    [
        ({"q": torch.zeros(5, 64)}, r"q must be \(total, heads, head_dim\), got shape \(5, 64\)"),
        ({"k": torch.zeros(1, 5, 4, 16)}, r"k must be .* got shape \(1, 5, 4, 16\)"),
        ({"v": torch.zeros(4, 4, 16)}, r"k and v must have the same shape, got .* \(4, 4, 16\)"),
        ({"q": torch.zeros(5, 4, 8)}, "head_dim = 8, got 16"),
        ({"q": torch.zeros(5, 6, 16)}, "k must have .* heads that divides q's 6, got 4"),
        ({"k": torch.zeros(5, 0, 16), "v": torch.zeros(5, 0, 16)}, "divides q's 4, got 0"),
        ({"cu_seqlens_q": torch.tensor([0, 2, 5])}, r"cu_seqlens_q must be .* torch\.int64"),
        ({"cu_seqlens_k": cumulative([])}, r"cu_seqlens_k must be .* got shape \(1,\)"),
        ({"cu_seqlens_k": cumulative([2, 3])[None]}, r"cu_seqlens_k must be .* \(1, 3\)"),
        ({"cu_seqlens_k": cumulative([5])}, "same number of sequences, got 2 and 1"),
        (
            {"cu_seqlens_q": cumulative([6, -1])},
            r"cu_seqlens_q must be non-decreasing .* got \(0, 6, 5\)",
        ),
        (
            {"cu_seqlens_k": cumulative([6, -1])},
            r"cu_seqlens_k must be non-decreasing .* got \(0, 6, 5\)",
        ),
        ({"cu_seqlens_q": cumulative([2, 2])}, r"cu_seqlens_q must be non-decreasing from 0 to 5"),
        ({"cu_seqlens_k": cumulative([2, 4])}, r"cu_seqlens_k must be non-decreasing from 0 to 5"),
        (
            {"cu_seqlens_q": cumulative([2, 3]) + 1},
            r"cu_seqlens_q must be non-decreasing .* \(1, 3, 6\)",
        ),
        ({"relative_bias": torch.zeros(4, 6)}, r"relative_bias must be \(heads = 4, 2 \* reach"),
        ({"relative_bias": torch.zeros(3, 7)}, r"got shape \(3, 7\)"),
        ({"relative_bias": torch.zeros(4, 2, 2)}, r"got shape \(4, 2, 2\)"),
        ({"dropout_p": 1.0}, "dropout_p must be at least 0 and below 1, got 1.0"),
        ({"dropout_p": -0.1}, "got -0.1"),
        ({"softcap": -1.0}, "softcap must be positive, 0 or None, got -1.0"),
        ({"softcap": float("nan")}, "got nan"),
        ({"window": (1, 2, 3)}, r"window must be \(left, right\), got \(1, 2, 3\)"),
        ({"k": torch.zeros(5, 4, 16, device="meta")}, "k must be on q's device cpu, got meta"),
        ({"cu_seqlens_k": torch.zeros(3, dtype=torch.int32, device="meta")}, "got meta"),
        (
            {"relative_bias": torch.zeros(4, 7, device="meta")},
            "relative_bias must be on q's device",
        ),
    ],
)
def test_errors_name_the_argument(changes, shown):
    with pytest.raises(ValueError, match=shown):
        attend_badly(**changes)


@pytest.mark.parametrize(
    "changes, shown",
    [
        ({"k": torch.zeros(5, 4, 16, dtype=torch.float64)}, r"got k in torch\.float64"),
        ({"v": torch.zeros(5, 4, 16, dtype=torch.bfloat16)}, r"got v in torch\.bfloat16"),
        ({"q": torch.zeros(5, 4, 16, dtype=torch.int32)}, r"got q in torch\.int32"),
        ({"relative_bias": torch.zeros(4, 7, dtype=torch.int64)}, r"relative_bias .* torch\.int64"),
    ],
)
def test_dtype_errors_name_the_argument(changes, shown):
    with pytest.raises(TypeError, match=shown):
        attend_badly(**changes)
