"""Packed cross entropy against float64, by sequence. With TRITON_INTERPRET=1, its kernels.

The error allowed is 1.5 times PyTorch's own in the same dtype, and a floor of two roundings. In
float64, the oracle's own dtype, PyTorch makes no error: there the floor is 64 roundings.
"""

import pytest
import torch

from tokenpack.kernels import packed_cross_entropy

from .losses import DTYPES, IGNORED, assert_as_exact, reduced, token_losses

LENGTHS = [3, 0, 7, 1, 29]  # an empty sequence, and one of a single token

OPTIONS = [
    {},
    {"shift": True},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2, "shift": True},
    {"softcap": 5.0},
    {"softcap": 30.0, "label_smoothing": 0.2, "z_loss": 1e-3, "shift": True},
]


def make_inputs(classes=37, dtype=torch.float32):
    generator = torch.Generator().manual_seed(classes)
    tokens = sum(LENGTHS)
    logits = (torch.randn(tokens, classes, generator=generator) * 3).to(dtype)
    labels = torch.randint(classes, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.3] = IGNORED
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return logits, labels, cu_seqlens


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [2, 37, 4097])
def test_as_exact_as_pytorch(classes, dtype, options):
    logits, labels, cu_seqlens = make_inputs(classes, dtype)
    results = []
    for function, given in [("ours", logits), ("theirs", logits), ("exact", logits.double())]:
        leaf = given.clone().requires_grad_()
        if function == "ours":
            loss = packed_cross_entropy(leaf, labels, cu_seqlens, reduction="sum", **options)
        else:
            loss = token_losses(leaf, labels, cu_seqlens, **options)[0].sum()
        (loss * 1.7).backward()
        results.append((loss.detach(), leaf.grad))
    for ours, theirs, exact in zip(*results):
        assert_as_exact(ours, theirs, exact)
    assert results[0][0].dtype == torch.promote_types(dtype, torch.float32)


def test_rows_of_2_to_the_18_classes():
    logits, labels, cu_seqlens = make_inputs(2**18)
    logits, labels = logits[:3].requires_grad_(), torch.tensor([2**18 - 1, IGNORED, 0])
    loss = packed_cross_entropy(logits, labels, reduction="sum")
    expected = token_losses(logits.double(), labels, cu_seqlens)[0].sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    slopes = [torch.autograd.grad(side, logits)[0] for side in (loss, expected)]
    assert (slopes[0] - slopes[1]).abs().max() < 1e-6


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "sequence_mean", "sequence"])
def test_reductions_give_the_gradients_of_a_loop_over_sequences(reduction, shift, weighted):
    logits, labels, cu_seqlens = make_inputs()
    weights = torch.rand(len(LENGTHS)) + 0.5 if weighted else torch.ones(len(LENGTHS))
    ours, loop = (logits.clone().requires_grad_() for _ in range(2))
    loss = packed_cross_entropy(
        ours,
        labels,
        cu_seqlens,
        shift=shift,
        reduction=reduction,
        sequence_weights=weights if weighted else None,
    )
    expected = reduced(
        *token_losses(loop, labels, cu_seqlens, shift=shift), cu_seqlens, reduction, weights
    )
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    incoming = torch.rand_like(expected)
    loss.backward(incoming)
    expected.backward(incoming)
    assert (ours.grad - loop.grad).abs().max() <= 1e-6


def test_num_items_is_the_denominator():
    logits, labels, cu_seqlens = make_inputs()
    total = packed_cross_entropy(logits, labels, reduction="sum")
    for reduction in ("mean", "sequence_mean"):
        once = packed_cross_entropy(logits, labels, cu_seqlens, reduction=reduction, num_items=1)
        by_seven = packed_cross_entropy(
            logits, labels, cu_seqlens, reduction=reduction, num_items=torch.tensor(7)
        )
        torch.testing.assert_close(by_seven, once / 7)
    torch.testing.assert_close(packed_cross_entropy(logits, labels, num_items=11), total / 11)


def test_the_gradient_in_place_is_the_same_and_overwrites_the_logits():
    logits, labels, _ = make_inputs()
    leaf, other = (logits.clone().requires_grad_() for _ in range(2))
    in_place = leaf * 1
    packed_cross_entropy(in_place, labels, inplace_backward=True).backward()
    outside = other * 1
    packed_cross_entropy(outside, labels).backward()
    assert leaf.grad.equal(other.grad)
    assert in_place.detach().equal(leaf.grad)
    assert outside.detach().equal(logits)


def test_logits_with_strided_classes():
    logits, labels, _ = make_inputs()
    results = []
    for in_place in (False, True):
        apart = logits.mT.contiguous().mT
        assert not apart.is_contiguous()
        leaf = apart.requires_grad_()
        middle = leaf.mul(1)
        assert middle.stride() == apart.stride()
        packed_cross_entropy(middle, labels, inplace_backward=in_place).backward()
        results += [leaf.grad, middle.detach() if in_place else leaf.grad]
    expected = logits.clone().requires_grad_()
    packed_cross_entropy(expected, labels).backward()
    for result in results:
        torch.testing.assert_close(result, expected.grad)


def test_stats():
    logits, labels, cu_seqlens = make_inputs()
    loss, stats = packed_cross_entropy(logits, labels, cu_seqlens, shift=True, return_stats=True)
    expected, targets = token_losses(logits, labels, cu_seqlens, shift=True)
    torch.testing.assert_close(stats.loss, expected)
    assert stats.valid.equal(targets != IGNORED)
    assert stats.correct.equal((logits.argmax(1) == targets) & stats.valid)
    torch.testing.assert_close(stats.loss.sum() / stats.valid.sum(), loss)


@pytest.mark.usefixtures("fenced")
@pytest.mark.parametrize("classes", [1, 37, 4097])
def test_nothing_is_written_outside_the_outputs(classes):
    logits, labels, cu_seqlens = make_inputs(classes)
    packed_cross_entropy(logits.requires_grad_(), labels, cu_seqlens, shift=True).backward()


def test_rows_without_a_target_are_not_read():
    logits, labels, _ = make_inputs()
    logits[labels == IGNORED] = float("nan")
    logits.requires_grad_()
    loss = packed_cross_entropy(logits, labels)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    assert not logits.grad[labels == IGNORED].any()


def test_no_targets():
    logits, labels, cu_seqlens = make_inputs()
    labels.fill_(IGNORED)
    leaf = logits.requires_grad_()
    loss = packed_cross_entropy(leaf, labels)
    loss.backward()
    assert loss.isnan()
    assert not leaf.grad.any()
    per_sequence = packed_cross_entropy(leaf, labels, cu_seqlens, reduction="sequence")
    assert per_sequence.equal(torch.zeros(len(LENGTHS)))


def test_registered_correctly_for_compile_and_autograd():
    logits, labels, cu_seqlens = make_inputs()
    ops = torch.ops.tokenpack
    weights = torch.rand(len(LENGTHS))
    plan = (labels, cu_seqlens, weights, 37, True, True, IGNORED, torch.float32)
    torch.library.opcheck(ops.token_targets, plan)
    targets, _ = ops.token_targets(*plan)
    options = (0.1, 1e-3, 5.0, 2.0)
    torch.library.opcheck(ops.cross_entropy, (logits.requires_grad_(), targets, *options, False))
    with torch.no_grad():
        loss, lse, _ = ops.cross_entropy(logits, targets, *options, False)
    arguments = (loss, logits.detach(), lse, targets, *options)
    torch.library.opcheck(ops.cross_entropy_backward, arguments)
    torch.library.opcheck(ops.cross_entropy_backward_, arguments)


@pytest.mark.parametrize("reduction", ["mean", "none", "sequence_mean", "sequence"])
def test_traces_without_a_graph_break(reduction):
    logits, labels, cu_seqlens = make_inputs()

    def loss_of(logits):
        return packed_cross_entropy(
            logits * 2, labels, cu_seqlens, shift=True, reduction=reduction
        ).sum()

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    for function, leaf in zip((loss_of, compiled), leaves):
        function(leaf).backward()
    assert leaves[0].grad.equal(leaves[1].grad)


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "changes, error, shown",
    [
        ({"logits": torch.zeros(40)}, ValueError, r"logits must be .* got \(40,\)"),
        ({"logits": torch.zeros(40, 0)}, ValueError, r"got \(40, 0\)"),
        ({"logits": torch.zeros(40, 37).long()}, TypeError, "logits must be floating point"),
        ({"labels": torch.zeros(39).long()}, ValueError, r"labels must be \(40,\), got \(39,\)"),
        ({"labels": torch.zeros(40)}, TypeError, "labels must be integers, got torch.float32"),
        ({"labels": torch.zeros(40, device="meta").long()}, ValueError, "labels must be on cpu"),
        (
            {"cu_seqlens": None, "shift": True},
            ValueError,
            "cu_seqlens must be given for .* got None",
        ),
        (
            {"cu_seqlens": torch.zeros(1).int()},
            ValueError,
            r"must be \(num_seqs \+ 1,\), got \(1,\)",
        ),
        (
            {"cu_seqlens": torch.tensor([0.0, 40.0])},
            TypeError,
            "must be int32 or int64, got torch.float32",
        ),
        (
            {"sequence_weights": torch.ones(4)},
            ValueError,
            r"must be \(num_seqs,\) = \(5,\), got \(4,\)",
        ),
        ({"sequence_weights": torch.ones(5).int()}, TypeError, "sequence_weights must be floating"),
        ({"sequence_weights": torch.ones(5, requires_grad=True)}, ValueError, "detach"),
        ({"reduction": "average"}, ValueError, "reduction must be one of .* got 'average'"),
        ({"reduction": "sum", "num_items": 3}, ValueError, "num_items must be None unless"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be from 0 to 1, got 1.5"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive or None, got 0.0"),
    ],
)
def test_wrong_arguments_are_named(changes, error, shown):
    logits, labels, cu_seqlens = make_inputs()
    arguments = {"logits": logits, "labels": labels, "cu_seqlens": cu_seqlens, **changes}
    with pytest.raises(error, match=shown):
        packed_cross_entropy(**arguments)


@pytest.mark.parametrize("label", [37, -1])
def test_a_label_outside_the_classes(label):
    logits, labels, cu_seqlens = make_inputs()
    labels[5] = label
    # In the interpreter, a failed device assertion is an error of the host.
    with pytest.raises((ValueError, RuntimeError), match="labels must be from 0 to 36 or ignore"):
        packed_cross_entropy(logits, labels, cu_seqlens)


@pytest.mark.parametrize("bounds", [[0, 39], [1, 40], [0, 30, 20, 40], [0, 41]])
def test_wrong_cu_seqlens(bounds):
    logits, labels, _ = make_inputs()
    with pytest.raises(
        (ValueError, RuntimeError), match=r"cu_seqlens must start at 0, .* end at total_tokens = 40"
    ):
        packed_cross_entropy(logits, labels, torch.tensor(bounds, dtype=torch.int32))
