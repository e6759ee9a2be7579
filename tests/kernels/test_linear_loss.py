"""The fused head and loss, compared with float64 cross entropy of all logits at once.

The error allowed is 1.5 times what PyTorch's own head and cross entropy make in the same dtype, and
a floor of two roundings, ``2 * eps * |exact|``. The loss is one number, which PyTorch may
hit by luck however the logits were rounded: its floor is an eighth of a rounding in their dtype.
"""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from tokenpack.cost.allocations import allocations
from tokenpack.kernels import head_chunks, packed_cross_entropy, packed_linear_cross_entropy
from tokenpack.kernels._triton import INTERPRETED

from .losses import IGNORED, reduced, token_losses

BOUNDS = torch.tensor([0, 3, 3, 10, 11, 60], dtype=torch.int32)
LOW = torch.float16 if INTERPRETED else torch.bfloat16


counts_memory = pytest.mark.skipif(INTERPRETED, reason="an interpreter's memory is its own")


class Inputs(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    labels: torch.Tensor

    def to(self, dtype):
        tensors = (self.hidden, self.weight, self.bias)
        return Inputs(*(None if t is None else t.to(dtype) for t in tensors), self.labels)

    def leaves(self):
        return self._replace(
            hidden=self.hidden.clone().requires_grad_(),
            weight=self.weight.clone().requires_grad_(),
            bias=None if self.bias is None else self.bias.clone().requires_grad_(),
        )


def make_inputs(tokens, hidden_size=24, classes=37, *, bias=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    labels = torch.randint(classes, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.3] = IGNORED
    return Inputs(
        random(tokens, hidden_size),
        random(classes, hidden_size),
        random(classes) if bias else None,
        labels,
    )


def by_pytorch(
    hidden,
    weight,
    bias,
    labels,
    cu_seqlens=None,
    *,
    reduction="mean",
    sequence_weights=None,
    num_items=None,
    ignore_index=IGNORED,
    scale=1.0,
    **options,
):
    """What transformers computes: logits in the model's dtype, the loss in at least float32."""
    labels = labels.long().masked_fill(labels == ignore_index, IGNORED)
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, labels.numel()])
    if sequence_weights is None:
        sequence_weights = torch.ones(cu_seqlens.numel() - 1)
    logits = F.linear(hidden, weight, bias) * scale
    losses, targets = token_losses(logits, labels, cu_seqlens, **options)
    if num_items is not None:
        return reduced(losses, targets, cu_seqlens, "sum", sequence_weights) / num_items
    return reduced(losses, targets, cu_seqlens, reduction, sequence_weights)


def run(function, inputs, **options):
    leaves = inputs.leaves()
    loss = function(*leaves, **options)
    slope = torch.linspace(1.7, 0.5, loss.numel(), dtype=loss.dtype)  # more ops follow the loss
    loss.backward(slope.view(loss.shape))
    gradients = {name: getattr(leaves, name) for name in ("hidden", "weight", "bias")}
    gradients = {f"d{name}": t.grad for name, t in gradients.items() if t is not None}
    return {"loss": loss.detach(), **gradients}


def assert_as_exact_as_pytorch(inputs, **options):
    dtype = inputs.hidden.dtype
    ours = run(packed_linear_cross_entropy, inputs, **options)
    theirs = run(by_pytorch, inputs, **options)
    exact = run(by_pytorch, inputs.to(torch.float64), **options)
    assert ours["loss"].dtype == torch.promote_types(dtype, torch.float32)
    for name, truth in exact.items():
        assert ours[name].isfinite().all(), name
        assert name == "loss" or ours[name].dtype == dtype
        error = (ours[name].double() - truth).norm()
        allowed = 1.5 * (theirs[name].double() - truth).norm()
        floor = torch.finfo(dtype).eps * (0.125 if name == "loss" and dtype.itemsize == 2 else 2)
        allowed += floor * truth.norm()
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}"


OPTIONS = [
    {},
    {"softcap": 2.0},
    {"scale": 0.3},
    {"softcap": 2.0, "scale": 0.3},
    {"num_items": 7},
    {"num_items": torch.tensor(7)},
    {"num_items": torch.tensor(2.5), "softcap": 5.0},
    {"label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 3.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", sorted({torch.float32, torch.float16, LOW}, key=str), ids=str)
def test_value_and_gradients(dtype, bias, options):
    assert_as_exact_as_pytorch(make_inputs(60, bias=bias, dtype=dtype), **options)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "sequence_mean", "sequence"])
def test_reductions_give_the_gradients_of_a_loop_over_sequences(reduction, shift, weighted):
    weights = torch.rand(BOUNDS.numel() - 1) + 0.5 if weighted else None
    options = {
        "cu_seqlens": BOUNDS,
        "reduction": reduction,
        "shift": shift,
        "sequence_weights": weights,
        "scale": 0.7,
        "softcap": 4.0,
    }
    ours = run(packed_linear_cross_entropy, make_inputs(60), **options)
    loop = run(by_pytorch, make_inputs(60).to(torch.float64), **options)
    for name, expected in loop.items():
        assert (ours[name] - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max()), name


@pytest.mark.parametrize("shift", [False, True])
def test_stats(shift):
    inputs = make_inputs(60)
    loss, stats = packed_linear_cross_entropy(*inputs, BOUNDS, shift=shift, return_stats=True)
    logits = F.linear(*inputs[:3])
    _, expected = packed_cross_entropy(
        logits, inputs.labels, BOUNDS, shift=shift, return_stats=True
    )
    torch.testing.assert_close(stats, expected)
    torch.testing.assert_close(stats.loss.sum() / stats.valid.sum(), loss)
    assert not stats.loss.requires_grad


@pytest.mark.parametrize("valid", [0, 1, 30, 60])
def test_a_known_number_of_targets(valid):
    inputs = make_inputs(60)
    inputs.labels.clamp_(min=0)[valid:] = IGNORED
    expected = run(packed_linear_cross_entropy, inputs, num_items=3)
    results = run(packed_linear_cross_entropy, inputs, num_items=3, num_valid=valid)
    assert all(results[name].equal(expected[name]) for name in expected)


def assert_exact_in_float64(inputs, **options):
    inputs = inputs.to(torch.float64)
    ours = run(packed_linear_cross_entropy, inputs, **options)
    for name, truth in run(by_pytorch, inputs, **options).items():
        assert ours[name].dtype == torch.float64
        torch.testing.assert_close(ours[name], truth, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_value_and_gradients_in_float64(bias, options):
    assert_exact_in_float64(make_inputs(60, bias=bias), **options)


@pytest.fixture
def chunks_of_16(monkeypatch):
    """At most 16 tokens with a target per chunk. The usual minimum is 256, slow to interpret."""
    monkeypatch.setattr(head_chunks, "smallest_chunk", lambda device_type: 16)


@pytest.mark.parametrize("tokens", [1, 3, 15, 22, 23, 24, 50])  # 0.7 of them have a target
@pytest.mark.parametrize("dtype", [torch.float32, LOW], ids=str)
def test_any_number_of_chunks(tokens, dtype, chunks_of_16):
    inputs = make_inputs(tokens, classes=150, dtype=dtype)
    inputs.labels[0] = 3
    assert_as_exact_as_pytorch(inputs, softcap=4.0)
    assert_as_exact_as_pytorch(inputs)


@pytest.mark.parametrize("valid", [15, 16, 17, 32, 33])
def test_labels_at_the_edge_of_a_chunk(valid, chunks_of_16):
    inputs = make_inputs(40, classes=150)
    inputs.labels[:] = IGNORED
    inputs.labels[torch.randperm(40)[:valid]] = 1
    assert_exact_in_float64(inputs)


def test_gradients_by_finite_differences():
    inputs = make_inputs(9, hidden_size=4, classes=5).to(torch.float64).leaves()

    def loss(hidden, weight, bias):
        return packed_linear_cross_entropy(
            hidden, weight, bias, inputs.labels, softcap=3.0, scale=0.7
        )

    assert torch.autograd.gradcheck(loss, inputs[:3], fast_mode=INTERPRETED)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 36])
def test_ignored_tokens_have_no_effect(ignore_index):
    inputs = make_inputs(50)
    ignored = inputs.labels == IGNORED
    inputs.labels[ignored] = ignore_index
    ignored = inputs.labels == ignore_index
    assert_as_exact_as_pytorch(inputs, ignore_index=ignore_index)
    inputs.hidden[ignored] = float("nan")
    results = run(packed_linear_cross_entropy, inputs, ignore_index=ignore_index)
    assert all(result.isfinite().all() for result in results.values())
    assert results["dhidden"][ignored].eq(0).all()
    assert results["dhidden"][~ignored].ne(0).any(1).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int64], ids=str)
def test_labels_of_any_integer_type(dtype):
    inputs = make_inputs(50)
    expected = run(packed_linear_cross_entropy, inputs)
    results = run(packed_linear_cross_entropy, inputs._replace(labels=inputs.labels.to(dtype)))
    assert all(results[name].equal(expected[name]) for name in expected)


def test_extreme_logits_stay_finite():
    inputs = make_inputs(40)
    inputs = inputs._replace(hidden=inputs.hidden * 1e4)
    assert_as_exact_as_pytorch(inputs)


def test_without_any_label_it_equals_pytorch():
    inputs = make_inputs(5)
    inputs.labels[:] = IGNORED
    for function in (packed_linear_cross_entropy, by_pytorch):
        results = run(function, inputs, num_items=4)
        assert all(result.eq(0).all() for result in results.values())
        # Without a number the loss is 0 / 0, but the gradients are not NaN.
        assert function(*inputs).isnan()
    leaves = inputs.leaves()
    packed_linear_cross_entropy(*leaves).backward()
    for leaf in leaves[:3]:
        assert leaf.grad.equal(torch.zeros_like(leaf))


def test_no_tokens():
    inputs = make_inputs(0)
    results = run(packed_linear_cross_entropy, inputs, num_items=4)
    assert results["loss"] == 0
    assert results["dhidden"].shape == (0, 24)
    assert results["dweight"].eq(0).all()


def test_losses_of_micro_batches_add_up(chunks_of_16):
    inputs = make_inputs(70).to(torch.float64)
    num_items = int((inputs.labels != IGNORED).sum())
    whole = run(packed_linear_cross_entropy, inputs)
    parts = [
        inputs._replace(hidden=inputs.hidden[rows], labels=inputs.labels[rows])
        for rows in (slice(0, 1), slice(1, 65), slice(65, 70))
    ]
    parts = [run(packed_linear_cross_entropy, part, num_items=num_items) for part in parts]
    for name in ("loss", "dweight", "dbias"):
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name])
    torch.testing.assert_close(torch.cat([part["dhidden"] for part in parts]), whole["dhidden"])


# --------------------------------------------------------------------------- skipped work


@counts_memory
def test_the_logits_are_never_all_in_memory():
    tokens, hidden_size, classes = 4096, 16, 500
    inputs = make_inputs(tokens, hidden_size, classes).leaves()
    inputs.labels.clamp_(min=0)
    seen = allocations(lambda: packed_linear_cross_entropy(*inputs, softcap=3.0).backward())
    assert seen.largest <= 4 * max(256 * classes, tokens * hidden_size)
    # The gradients, the logits of a chunk, and the temporaries of the reference for softcap.
    gradients = tokens * hidden_size + classes * hidden_size + classes
    assert seen.peak <= 4 * (gradients + 256 * classes * 6)
    seen = allocations(lambda: by_pytorch(*inputs).backward())
    assert seen.largest >= 4 * tokens * classes  # otherwise the counter sees nothing


@counts_memory
def test_a_chunk_of_logits_grows_with_the_hidden_states():
    tokens, hidden_size, classes = 4096, 200, 50
    inputs = make_inputs(tokens, hidden_size, classes).leaves()
    inputs.labels.clamp_(min=0)
    seen = allocations(lambda: packed_linear_cross_entropy(*inputs).backward())
    assert seen.largest <= 4 * tokens * hidden_size
    assert seen.products == 3  # all tokens are one chunk: the logits and two gradients


@counts_memory
def test_tokens_without_a_target_are_not_multiplied():
    inputs = make_inputs(4096).leaves()
    inputs.labels[100:] = IGNORED
    seen = allocations(lambda: packed_linear_cross_entropy(*inputs).backward())
    assert seen.products == 3
    # The gradient of the hidden states has their size. Nothing else has it.
    assert seen.peak < 1.5 * 4 * inputs.hidden.numel()


@pytest.mark.parametrize(
    "learning, products",
    [
        (("hidden", "weight", "bias"), 3),
        (("hidden",), 2),
        (("weight",), 2),
        (("bias",), 1),
        ((), 1),
    ],
    ids=str,
)
def test_frozen_inputs_cost_no_product(learning, products):
    inputs = make_inputs(60)
    expected = run(packed_linear_cross_entropy, inputs)
    for name in learning:
        getattr(inputs, name).requires_grad_()

    def learn():
        loss = packed_linear_cross_entropy(*inputs)
        assert loss.requires_grad == bool(learning)
        if learning:
            (loss * 1.7).backward()

    assert allocations(learn).products == products
    for name in ("hidden", "weight", "bias"):
        grad = getattr(inputs, name).grad
        if name in learning:
            torch.testing.assert_close(grad, expected[f"d{name}"])
        else:
            assert grad is None


def test_evaluation_computes_no_gradient():
    leaves = make_inputs(60).leaves()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert allocations(lambda: packed_linear_cross_entropy(*leaves)).products == 1
            loss = packed_linear_cross_entropy(*leaves)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, packed_linear_cross_entropy(*leaves).detach())


def test_the_backward_may_run_twice():
    leaves = make_inputs(60).leaves()
    loss = packed_linear_cross_entropy(*leaves)
    first = torch.autograd.grad(loss, leaves[:3], retain_graph=True)
    second = torch.autograd.grad(loss * 2, leaves[:3])
    for one, two in zip(first, second):
        torch.testing.assert_close(two, one * 2)


def test_no_gradient_of_gradients():
    leaves = make_inputs(60).leaves()
    for reduction in ("mean", "sequence"):
        loss = packed_linear_cross_entropy(*leaves, BOUNDS, reduction=reduction).sum()
        with pytest.raises(RuntimeError, match="is differentiable once"):
            torch.autograd.grad(loss, leaves.hidden, create_graph=True)


def test_registered_correctly_for_compile_and_autograd():
    inputs = make_inputs(60).leaves()
    targets = inputs.labels.clamp(min=-1).int()
    head = (*inputs[:3], targets, 0.1, 1e-3, 5.0, 2.0, torch.float32, None, False)
    ops = torch.ops.tokenpack
    torch.library.opcheck(ops.linear_cross_entropy, head)
    arguments = (torch.rand(60), *head, True, True, True)
    torch.library.opcheck(ops.linear_cross_entropy_and_gradients, arguments)


@pytest.mark.parametrize("learning", [("hidden", "weight", "bias"), ("weight",)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none", "sequence_mean", "sequence"])
def test_traces_without_a_graph_break(reduction, learning):
    def loss_of(hidden, weight, bias, labels):
        return packed_linear_cross_entropy(
            hidden * 2, weight, bias, labels, BOUNDS, shift=True, reduction=reduction
        ).sum()

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss_of, compiled):
        inputs = make_inputs(60)
        for name in learning:
            getattr(inputs, name).requires_grad_()
        loss = function(*inputs)
        loss.backward()
        results.append([loss, *(getattr(inputs, name).grad for name in learning)])
    torch.testing.assert_close(*results)


# ------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sequence"])
@pytest.mark.parametrize("cast", ["weight", "both"])
def test_autocast_lowers_the_precision_of_the_head(cast, reduction, backward_inside):
    inputs = make_inputs(60)
    if cast == "weight":  # the hidden states already have its dtype
        inputs = inputs._replace(hidden=inputs.hidden.to(LOW))
    exact = run(
        by_pytorch, inputs.to(LOW).to(torch.float64), cu_seqlens=BOUNDS, reduction=reduction
    )
    results = []
    for function in (packed_linear_cross_entropy, by_pytorch):
        leaves = inputs.leaves()
        with torch.autocast("cpu", LOW):
            loss = function(*leaves, BOUNDS, reduction=reduction)
            slope = torch.linspace(1.7, 0.5, loss.numel())
            if backward_inside:
                loss.backward(slope.view(loss.shape))
        if not backward_inside:
            loss.backward(slope.view(loss.shape))
        results.append((loss.detach(), *(leaf.grad for leaf in leaves[:3])))
    for ours, theirs, truth, leaf in zip(*results, exact.values(), (None, *inputs[:3])):
        assert ours.dtype == (torch.float32 if leaf is None else leaf.dtype)
        error = (ours.double() - truth).norm()
        floor = torch.finfo(LOW).eps * (0.125 if leaf is None else 2) * truth.norm()
        assert error <= 1.5 * (theirs.double() - truth).norm() + floor


def test_autocast_leaves_float64_alone():
    inputs = make_inputs(60).to(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = packed_linear_cross_entropy(*inputs)
    assert loss.equal(packed_linear_cross_entropy(*inputs))


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "changes, shown",
    [
        ({"hidden": torch.zeros(1, 60, 24)}, r"hidden must be .* got \(1, 60, 24\) and \(37, 24\)"),
        ({"hidden": torch.zeros(60, 23)}, r"got \(60, 23\) and \(37, 24\)"),
        ({"weight": torch.zeros(24)}, r"got \(60, 24\) and \(24,\)"),
        ({"bias": torch.zeros(36)}, r"bias must be \(37,\), got \(36,\)"),
        ({"weight": torch.zeros(37, 24, device="meta")}, "weight must be on cpu, got meta"),
        ({"labels": torch.zeros(59, dtype=torch.int64)}, r"labels must be \(60,\), got \(59,\)"),
    ],
)
def test_a_wrong_shape_is_named(changes, shown):
    with pytest.raises(ValueError, match=shown):
        packed_linear_cross_entropy(*make_inputs(60)._replace(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"weight": torch.zeros(37, 24, dtype=torch.bfloat16)},
        {"bias": torch.zeros(37, dtype=torch.float64)},
        {"hidden": torch.zeros(60, 24, dtype=torch.int64)},
    ],
)
def test_different_dtypes_are_named(changes):
    with pytest.raises(TypeError, match="hidden, weight and bias must have one floating-point"):
        packed_linear_cross_entropy(*make_inputs(60)._replace(**changes))


def test_labels_that_are_not_integers():
    with pytest.raises(TypeError, match=r"labels must be integers, got torch\.float32"):
        packed_linear_cross_entropy(*make_inputs(60)._replace(labels=torch.zeros(60)))


@pytest.mark.parametrize(
    "options, shown",
    [
        ({"num_valid": 61}, "num_valid must be from 0 to 60, got 61"),
        ({"num_valid": 7}, "num_valid must be the number of tokens with a target, got 7 for"),
        ({"softcap": -1.0}, "softcap must be positive or None, got -1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing must be from 0 to 1, got -0.1"),
        ({"shift": True}, "cu_seqlens must be given for shift"),
    ],
)
def test_wrong_options_are_named(options, shown):
    with pytest.raises(ValueError, match=shown):
        packed_linear_cross_entropy(*make_inputs(60), **options)


@pytest.mark.parametrize("label", [37, -1])
def test_a_label_outside_the_classes_is_an_error(label):
    inputs = make_inputs(60)
    inputs.labels[5] = label
    # In the interpreter, a failed device assertion is an error of the host.
    with pytest.raises((ValueError, RuntimeError), match="labels must be from 0 to 36 or ignore"):
        packed_linear_cross_entropy(*inputs)
