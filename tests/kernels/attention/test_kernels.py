"""The attention kernels in Triton's interpreter, against float64 and PyTorch's own attention.

test_varlen_attention.py tests what `varlen_attention` does on every path, and defines the oracle.
This file tests only the kernels. test_on_gpu.py tests bf16, which the interpreter computes wrongly.
"""

import itertools

import pytest
import torch

from tokenpack.kernels import varlen_attention
from tokenpack.kernels._triton import DEVICES, INTERPRETED
from tokenpack.kernels.attention import op, primitives, tiles, varlen_attention_reference

from .test_varlen_attention import (
    HEADS,
    assert_as_exact_as_pytorch,
    cumulative,
    make_inputs,
    run,
)

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs the kernels in Triton's interpreter")

# Lengths around the tile sizes 64 and 128, empty and one-token sequences, queries without keys.
ROWS = [1, 0, 65, 128, 7]
KEYS = [4, 3, 130, 0, 64]


# ------------------------------------------------------------------------------------------ values


# 96 fills a part of a tile's columns. 64 and 128 fill all of them, so they share the combinations.
PADDED, FULL = 96, (64, 128)


@interpreted
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("cross", [False, True], ids=["", "cross"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("grouped", [False, True], ids=["", "grouped"])
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["", "softcap"])
@pytest.mark.parametrize("window", [None, (20, 9)], ids=["", "window"])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_all_combinations_of_options(causal, window, softcap, grouped, bias, cross, padded):
    number_of_options = sum(map(bool, (causal, window, softcap, grouped, bias, cross)))
    head_dim = PADDED if padded else FULL[number_of_options % 2]
    options = {"causal": causal, "window": window}
    if softcap is not None:
        options["softcap"] = softcap
    rows, keys = (ROWS, KEYS) if cross else ([5, 0, 1, 130], [5, 0, 1, 130])
    inputs = make_inputs(
        (rows, keys),
        heads=2,
        head_dim=head_dim,
        kv_heads=1 if grouped else 2,
        bias=bias,
        dtype=torch.float16,
    )
    assert_as_exact_as_pytorch(inputs, **options)


@interpreted
@pytest.mark.parametrize("head_dim", [16, 40, 80, 256])  # float32 computes 80 as 32 + 32 + 16
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 3.0}], ids=str)
def test_head_dims_and_float32(options, dtype, head_dim):
    inputs = make_inputs(
        (ROWS, KEYS), heads=2, head_dim=head_dim, kv_heads=2, bias=True, dtype=dtype
    )
    assert_as_exact_as_pytorch(inputs, **options)


@interpreted
@pytest.mark.parametrize(
    "options", [{"window": (20, 9), "softcap": 2.0}, {"causal": True}], ids=str
)
def test_wide_rows_of_grouped_heads(options):
    """The gradients of k and v have a loop of their own for more than 128 columns."""
    inputs = make_inputs(
        (ROWS, KEYS), heads=4, head_dim=200, kv_heads=2, bias=True, dtype=torch.float16
    )
    assert_as_exact_as_pytorch(inputs, **options)


@interpreted
@pytest.mark.parametrize("reach", [1, 31, 64, 200])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (-1, 40)}], ids=str)
def test_any_reach(reach, options):
    """No tile, some tiles or all tiles are beyond the table's reach."""
    inputs = make_inputs(([3, 200], [3, 200]), heads=1, kv_heads=1, bias=True, dtype=torch.float16)
    table = torch.randn(1, 2 * reach + 1, generator=torch.Generator().manual_seed(reach))
    assert_as_exact_as_pytorch(inputs._replace(table=table.half()), **options)


@interpreted
@pytest.mark.parametrize("queries, keys", [(16, 32), (32, 128), (64, 32), (128, 32)])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (9, 30)}], ids=str)
def test_diagonals_of_tiles_of_any_shape(queries, keys, options, monkeypatch):
    """A distance is in several tiles of keys if a tile has more queries than keys."""
    tile = tiles.Tile(queries, keys, 4, 1)
    monkeypatch.setitem(tiles._TILES["dq"], (64, 4), tiles.Tiles(tile, tile, tile, tile))
    lengths = ([5, 150, 70], [3, 190, 60])
    inputs = make_inputs(lengths, heads=1, head_dim=16, kv_heads=1, bias=True)
    assert_as_exact_as_pytorch(inputs, **options)


@interpreted
@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=str)
def test_diagonals_in_tf32_are_exact_enough_for_16_bits(options, monkeypatch):
    """The interpreter multiplies in float32. This drops the 13 bits that tensor cores ignore."""
    from triton.runtime import interpreter

    product, truncated = interpreter.InterpreterBuilder.create_dot, []

    def create_dot(self, a, b, *rest):
        if a.data.dtype == "float32":  # the 16-bit inputs of the other products are not
            a, b = (interpreter.TensorHandle(one.data.copy(), one.dtype.scalar) for one in (a, b))
            for one in (a, b):
                one.data.view("uint32")[...] &= 0xFFFFE000
            truncated.append(a)
        return product(self, a, b, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    inputs = make_inputs(([5, 300], [3, 290]), heads=1, kv_heads=1, bias=True, dtype=torch.float16)
    assert_as_exact_as_pytorch(inputs, **options)
    assert truncated


@interpreted
def test_one_bias_for_every_distance_changes_nothing():
    inputs = make_inputs(([3, 70], [3, 70]), bias=True)._replace(table=torch.full((HEADS, 1), 5.0))
    results = run(varlen_attention, inputs)
    for name, expected in run(varlen_attention, inputs._replace(table=None)).items():
        torch.testing.assert_close(results[name], expected, rtol=1e-4, atol=1e-5)
    assert results["dtable"].abs().max() < 1e-4


@interpreted
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_that_is_not_positive(scale):
    """The kernels scale each row's maximum, which is right only for a positive factor."""
    lengths = ([3, 70], [3, 70])
    for softcap in ({}, {"softcap": 2.0}):
        inputs = make_inputs(lengths, heads=1, kv_heads=1, bias=True)
        assert_as_exact_as_pytorch(inputs, scale=scale, **softcap)


def test_the_extended_table_covers_every_tile():
    tables = (tiles._TILES, tiles._AMPERE, tiles._BLACKWELL)
    for kind in itertools.chain.from_iterable(table.values() for table in tables):
        for tile in itertools.chain.from_iterable(kind.values()):
            assert 2 * max(tile.queries, tile.keys) <= primitives.TABLE_PADDING.value


@interpreted
def test_many_sequences():
    lengths = [n % 4 for n in range(100)]
    inputs = make_inputs((lengths, lengths[::-1]), heads=1, kv_heads=1, bias=True)
    expected = run(varlen_attention_reference, inputs)
    for name, result in run(varlen_attention, inputs).items():
        torch.testing.assert_close(result, expected[name], rtol=1e-4, atol=1e-5)


@interpreted
@pytest.mark.usefixtures("fenced")
@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=str)
def test_nothing_is_written_outside_the_outputs(options):
    inputs = make_inputs((ROWS, KEYS), head_dim=24, kv_heads=2, bias=True)
    run(varlen_attention, inputs, **options)


@interpreted
@pytest.mark.parametrize("poisoned", ["q", "k", "v"])
def test_nan_stays_in_its_sequence(poisoned):
    lengths = ([4, 5, 90, 3], [4, 5, 90, 3])
    inputs = make_inputs(lengths, bias=True)
    clean = run(varlen_attention, inputs)
    with_nan = getattr(inputs, poisoned).clone()
    with_nan[4:9] = float("nan")
    results = run(varlen_attention, inputs._replace(**{poisoned: with_nan}))
    others = torch.ones(102, dtype=torch.bool)
    others[4:9] = False
    for name in ("out", "dq", "dk", "dv"):
        assert results[name][others].equal(clean[name][others]), name


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (2, 1)}], ids=str)
def test_logsumexp(options):
    inputs = make_inputs((ROWS, KEYS), head_dim=16, kv_heads=2, bias=True)
    out, lse = varlen_attention(
        *inputs[:3], *inputs.cu_seqlens, relative_bias=inputs.table, return_lse=True, **options
    )
    doubles = inputs.to(torch.float64)
    exact, exact_lse = op._varlen_attention._init_fn(
        *doubles[:3], *inputs.cu_seqlens, doubles.table, None, 0.25, *limits(**options), 0.0, 0.0
    )
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    assert lse.isneginf().any()
    assert not lse.requires_grad


def limits(causal=False, window=(-1, -1)):
    return window[0], 0 if causal else window[1]


# ------------------------------------------------------------------------ determinism and dropout


@interpreted
def test_two_runs_give_the_same_bits():
    inputs = make_inputs((ROWS, KEYS), kv_heads=2, bias=True, dtype=torch.float16)
    seed = torch.tensor([7])
    one, two = (run(varlen_attention, inputs, dropout_p=0.2, dropout_seed=seed) for _ in range(2))
    assert all(one[name].equal(two[name]) for name in one)


def weights_of(lengths, seed, dropout_p, head_dim=128):
    """``(rows, HEADS, keys)`` attention weights of each sequence, from unit vectors as values."""
    inputs = make_inputs((lengths, lengths), head_dim=head_dim, bias=True)
    units = torch.cat([torch.eye(head_dim)[:length] for length in lengths])
    v = units[:, None].expand(-1, HEADS, -1).contiguous()
    # All queries and keys are equal, so a sequence's weights do not depend on its neighbors.
    q, k = (torch.ones_like(side) * 0.1 for side in inputs[:2])
    out = varlen_attention(
        q,
        k,
        v,
        *inputs.cu_seqlens,
        relative_bias=inputs.table,
        dropout_p=dropout_p,
        dropout_seed=torch.tensor([seed]),
    )
    parts = out.split(lengths)
    return [part[..., :length] for part, length in zip(parts, lengths)]


def test_dropout_does_not_depend_on_other_sequences():
    lengths = [70, 0, 5, 33]
    packed = weights_of(lengths, 5, 0.3)
    for s, length in enumerate(lengths):
        single = weights_of([*[0] * s, length], 5, 0.3)[s]
        assert (packed[s] == 0).equal(single == 0)
    share = torch.cat([(part == 0).flatten() for part in packed]).float().mean()
    assert 0.28 < share < 0.32
    other = weights_of(lengths, 6, 0.3)
    assert not (packed[0] == 0).equal(other[0] == 0)
    first, second = (packed[s][:5, :, :5] == 0 for s in (0, 2))
    assert not first.equal(second)  # two sequences have different masks
    heads = (packed[0] == 0).unbind(1)
    assert not any(a.equal(b) for a, b in itertools.combinations(heads, 2))


@pytest.mark.parametrize(
    "causal, head_dim, dtype",
    [(False, 128, torch.float32), (True, 128, torch.float32), (True, 256, torch.float16)],
    ids=str,
)
def test_dropout_gradients_match_its_mask(causal, head_dim, dtype):
    lengths = [70, 5, 33]
    inputs = make_inputs((lengths, lengths), head_dim=head_dim, bias=True, dtype=dtype)
    seed = torch.tensor([5])
    options = {"causal": causal, "dropout_p": 0.25, "dropout_seed": seed}
    results = run(varlen_attention, inputs, **options)
    units = torch.cat([torch.eye(head_dim, dtype=dtype)[:length] for length in lengths])[:, None]
    shown = varlen_attention(
        *inputs[:2],
        units.expand(-1, HEADS, -1).contiguous(),
        *inputs.cu_seqlens,
        relative_bias=inputs.table,
        **options,
    )
    keep_masks = [
        part[..., :n].transpose(0, 1) != 0 for part, n in zip(shown.split(lengths), lengths)
    ]

    def by_formula(q, k, v, cu_seqlens_q, _, *, relative_bias, **_options):
        outs = []
        for s, keep in enumerate(keep_masks):
            rows = slice(*cu_seqlens_q[s : s + 2].tolist())
            q_s, k_s, v_s = (side[rows].transpose(0, 1) for side in (q, k, v))
            distance = torch.arange(lengths[s]) - torch.arange(lengths[s])[:, None]
            reach = relative_bias.shape[1] // 2
            scores = q_s @ k_s.mT * head_dim**-0.5
            scores = scores + relative_bias[:, distance.clamp(-reach, reach) + reach]
            if causal:
                scores = scores.masked_fill(distance > 0, float("-inf"))
            outs.append(((scores.softmax(-1) * keep / 0.75) @ v_s).transpose(0, 1))
        return torch.cat(outs)

    tolerances = {"rtol": 1e-4, "atol": 1e-5}
    if dtype == torch.float16:
        tolerances = {"rtol": 1e-2, "atol": 1e-2}
    for name, exact in run(by_formula, inputs.to(torch.float64)).items():
        torch.testing.assert_close(results[name].double(), exact, **tolerances)


# -------------------------------------------------------------------------------- registration


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_registered_correctly_for_compile_and_autograd(bias):
    inputs = make_inputs(([3, 0, 9], [3, 2, 9]), kv_heads=2, bias=bias)
    options = (0.25, -1, 0, 3.0, 0.1)
    arguments = (*inputs[:3], *inputs.cu_seqlens, inputs.table, torch.tensor([3]), *options)
    ops = torch.ops.tokenpack
    leaves = [side.requires_grad_() for side in inputs[:3]]
    if bias:
        inputs.table.requires_grad_()
    torch.library.opcheck(ops.varlen_attention, arguments)
    with torch.no_grad():
        out, lse = ops.varlen_attention(*arguments)
    tensors = [side.detach() for side in (inputs.dout, *leaves, out, lse)]
    table = None if inputs.table is None else inputs.table.detach()
    rest = (*inputs.cu_seqlens, table, torch.tensor([3]), *options, bias)
    torch.library.opcheck(ops.varlen_attention_backward, (*tensors, *rest))


@pytest.mark.parametrize("options", [{}, {"causal": True, "dropout_p": 0.2}], ids=str)
def test_traces_without_a_graph_break(options):
    inputs = make_inputs(([3, 0, 9], [3, 0, 9]), bias=True)

    def layer(q, k, v, *cu_seqlens, relative_bias, dropout_seed):
        return varlen_attention(
            q * 2,
            k,
            v,
            *cu_seqlens,
            relative_bias=relative_bias,
            dropout_seed=dropout_seed,
            **options,
        ).tanh()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    seed = torch.tensor([3])
    eager, traced = (run(function, inputs, dropout_seed=seed) for function in (layer, compiled))
    for name, result in eager.items():
        torch.testing.assert_close(traced[name], result)


# ------------------------------------------------------------------------------------------ memory


@interpreted
def test_memory_is_linear_in_tokens_and_the_partials_are_as_stated(monkeypatch):
    allocated = []

    def counting(name):
        original = getattr(torch.Tensor, name)

        def allocate(like, *shape, **options):
            result = original(like, *shape, **options)
            allocated.append(result.numel())
            return result

        monkeypatch.setattr(torch.Tensor, name, allocate)

    counting("new_empty")
    counting("new_zeros")

    def sizes(count):
        allocated.clear()
        run(varlen_attention, make_inputs(([40] * count, [40] * count), bias=True))
        return list(allocated)

    first, second, third = (sizes(count) for count in (1, 2, 4))
    assert sum(third) - sum(second) <= 2.01 * (sum(second) - sum(first))
    # A row per tile of queries and head: the table's entries, and a sum beyond each end.
    tile = tiles.tile_for("dq", torch.empty(1, HEADS, 16), bias=True, dropout=False)
    partials = (2 * 40 // tile.queries + 2) * HEADS * (2 * 11 + 3)
    assert second.count(partials) == 1
    assert max(second) == max(partials, 2 * 40 * HEADS * 16)


@pytest.mark.parametrize("window", [(2**31 - 1, 0), (3, 2**31 - 1), (2**63, 2**40)], ids=str)
def test_a_window_beyond_32_bits_is_no_limit(window):
    inputs = make_inputs(([3, 40], [3, 40]), kv_heads=2)
    expected = tuple(side if side < 2**30 else -1 for side in window)
    results = [run(varlen_attention, inputs, window=w) for w in (window, expected)]
    for name in results[0]:
        assert results[0][name].equal(results[1][name])


def test_strided_boundaries_and_heads():
    inputs = make_inputs(([3, 40, 7], [3, 40, 7]), kv_heads=2)
    expected = run(varlen_attention, inputs)
    bounds = torch.stack([inputs.cu_seqlens[0], inputs.cu_seqlens[0] * 0], 1)[:, 0]
    q, k, v = (
        side.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for side in inputs[:3]
    )
    out = varlen_attention(q, k, v, bounds, bounds)
    out.backward(inputs.dout)
    for name, result in zip(("out", "dq", "dk", "dv"), (out, q.grad, k.grad, v.grad)):
        torch.testing.assert_close(result.detach(), expected[name])


@pytest.mark.parametrize(
    "seed", [torch.tensor(3), torch.tensor([3]).int(), torch.tensor([3], device="meta")], ids=str
)
def test_a_wrong_seed_is_an_error(seed):
    inputs = make_inputs(([3], [3]))
    with pytest.raises(ValueError, match=r"dropout_seed must be \(1,\) int64 on cpu, got"):
        varlen_attention(*inputs[:3], *inputs.cu_seqlens, dropout_p=0.1, dropout_seed=seed)


def test_dropout_without_a_seed_is_an_error():
    inputs = make_inputs(([3], [3]))
    options = (0.25, -1, -1, 0.0, 0.5)
    with pytest.raises(ValueError, match=r"seed must be .* when dropout_p is 0\.5, got None"):
        torch.ops.tokenpack.varlen_attention(*inputs[:3], *inputs.cu_seqlens, None, None, *options)


@interpreted
def test_kernel_lacks():
    for head_dim, dtype, lack in (
        (8, torch.float32, "head_dim from 16 to 256, not 8"),
        (264, torch.float16, "head_dim from 16 to 256, not 264"),
        (64, torch.float64, "not torch.float64"),
        (64, torch.bfloat16, None),
    ):
        reason = op.kernel_lacks(DEVICES[-1], dtype, head_dim)
        assert reason is None if lack is None else reason.endswith(lack)


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs Triton")
def test_kernel_lacks_asks_the_device_of_the_call(monkeypatch):
    """The first GPU is too old, the second one is not, and the current one is the first."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda index=None: [(7, 5), (9, 0)][index or 0]
    )
    for device, lack in (("cuda", "capability 8.0"), ("cuda:0", "capability 8.0"), ("cuda:1", "")):
        for given in (device, torch.device(device)):
            reason = op.kernel_lacks(given, torch.float16, 64)
            assert (lack in reason) if lack else reason is None


if INTERPRETED:
    import triton
    import triton.language as tl

    @triton.jit
    def places_of_programs(
        places,
        cu_seqlens,
        num_seqs,
        HEADS: tl.constexpr,
        REVERSED: tl.constexpr,
        SIZE: tl.constexpr,
    ):
        number, head = primitives.program_place(HEADS, REVERSED)
        seq, first, span, _ = primitives.find_tile(number, cu_seqlens, cu_seqlens, num_seqs, SIZE)
        place = places + 4 * tl.program_id(0)
        tl.store(place, head)
        tl.store(place + 1, seq)
        tl.store(place + 2, first)
        tl.store(place + 3, (first < span.count).to(tl.int32))


@interpreted
@pytest.mark.parametrize("last_first", [False, True])
def test_order_of_programs(last_first):
    """Heads side by side; under a causal mask, a sequence's last queries, which see most, first."""
    lengths, heads, size = [70, 0, 5, 160], 3, 16
    programs = tiles.num_tiles(sum(lengths), len(lengths), size) * heads
    places = torch.full((programs, 4), -1, dtype=torch.int32)
    cu_seqlens = cumulative(lengths).int()
    places_of_programs[(programs,)](places, cu_seqlens, len(lengths), heads, last_first, size)
    assert places[:, 0].equal(torch.arange(programs).int() % heads)
    found = [tuple(place[1:3]) for place in places.tolist() if place[3]]
    steps = [range(0, length, size) for length in lengths]
    expected = [(s, first) for s, firsts in enumerate(steps) for first in firsts]
    expected = expected[::-1] if last_first else expected
    assert found == [place for place in expected for _ in range(heads)]


def test_no_two_sequences_share_a_tile_number():
    """The numbering of `tiles`, and its bound on the number of programs."""
    for size in (16, 64, 128):
        lengths = torch.randint(0, 300, (200,), generator=torch.Generator().manual_seed(size))
        starts = cumulative(lengths.tolist()).tolist()
        first = [start // size + s for s, start in enumerate(starts[:-1])]
        ends = [f + -(-int(length) // size) for f, length in zip(first, lengths)]
        assert all(end <= begin for end, begin in zip(ends, first[1:]))
        assert ends[-1] <= tiles.num_tiles(starts[-1], len(lengths), size)
