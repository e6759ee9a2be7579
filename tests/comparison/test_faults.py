"""`check_patch` finds deliberate faults, and calls correct models of all families equal."""

import contextlib

import pytest
import torch
from torch import nn
from transformers.loss import loss_utils

from tokenpack import check_patch
from tokenpack.adapters import forward, head, inputs, interface
from tokenpack.comparison.check import _patched, compare
from tokenpack.kernels import layout_from_cu_seqlens

from ..adapters.models import BERT, CASES, LLAMA, NLLB, T5


def compared(model, batch, **options):
    """As `check_patch`, without the second run for time and memory."""
    with _patched(model):
        return compare(model, batch, lambda m: m, measure=False, **options)


# ------------------------------------------------------------------------------------ no fault


@pytest.mark.parametrize("case", [case for case in CASES if case.available], ids=str)
def test_families_are_equal(case):
    model = case.build()
    for mode in (True, False):
        batch = case.batch("right" if mode or case.pools else "left")
        if not mode and case.kind != "encoder-only":
            batch["use_cache"] = False
        check = compared(model.train(mode), batch, gradients=mode)  # those of eval are the same
        assert check.verdict == "equal", str(check)
        assert check.packed_calls == 1
        assert any(c.name.startswith("gradients") for c in check.comparisons) == mode
        assert not check.notes or case.labels in ("none", "decoder_inputs")


@pytest.mark.parametrize("case", [T5, NLLB, LLAMA, BERT], ids=str)
def test_copies_in_float64_differ_by_less_than_1e_12(case):
    """Also where transformers computes norms and losses in float32."""
    check = check_patch(case.build(), case.batch("left"), dtype=torch.float64)
    assert check.ok
    assert all(c.difference <= c.allowed < 1e-12 for c in check.comparisons)
    assert check.setting == "float64, training mode, cpu"


# -------------------------------------------------------------------------------------- faults


@contextlib.contextmanager
def replaced(module, name, make):
    """Replace a function by ``make(function)``."""
    original = getattr(module, name)
    setattr(module, name, make(original))
    try:
        yield
    finally:
        setattr(module, name, original)


def wrong_causality(original):
    return lambda role, module, kwargs: not original(role, module, kwargs)


def wrong_positions(original):
    return lambda *arguments: original(*arguments) + (original(*arguments) > 3)


def dropped_last_label(original):
    def targets(*arguments):
        found = original(*arguments)
        last = int((found.labels != -100).nonzero()[-1])
        kept = found.labels.clone()
        kept[last] = -100
        return inputs.Targets(kept, found.num_valid - 1)

    return targets


def scaled_gradient(factor):
    """Of the head's weight. The loss stays the same."""

    def make(original):
        def loss(hidden, weight, *others, **options):
            mixed = factor * weight + (1 - factor) * weight.detach()
            return original(hidden, mixed, *others, **options)

        return loss

    return make


def one_sequence(original):
    """All sequences see one another."""

    def attention(query, key, value, layouts, role, **options):
        joined = {
            side: layout_from_cu_seqlens(
                torch.tensor([0, layout.total_tokens]), layout.total_tokens
            )
            for side, layout in layouts.items()
        }
        return original(query, key, value, joined, role, **options)

    return attention


def mean_over_tokens(original):
    """The sum of the losses divided by the number of tokens, with and without a label."""

    def loss(hidden, *others, num_items=None, **options):
        return original(hidden, *others, num_items=hidden.shape[0], **options)

    return loss


def no_bias(original):
    return lambda *others, relative_bias=None, **options: original(
        *others, relative_bias=None, **options
    )


def swapped_rows(original):
    """Outputs of two sequences in the wrong rows."""
    return lambda value, layout, **more: original(value, layout, **more).roll(1, 0)


FAULTS = {
    "causality": (LLAMA, interface, "_is_causal", wrong_causality),
    "causality of a decoder": (T5, interface, "_is_causal", wrong_causality),
    "positions": (LLAMA, inputs, "_positions", wrong_positions),
    "positions of a table": (NLLB, inputs, "_positions", wrong_positions),
    "the last label": (LLAMA, inputs, "_targets", dropped_last_label),
    "half a gradient": (LLAMA, head, "mean_of_counted", scaled_gradient(0.5)),
    "0.1 permille of a gradient": (
        *(LLAMA, head, "mean_of_counted"),
        scaled_gradient(1.0001),
    ),
    "sequences see one another": (LLAMA, interface, "layout_attention", one_sequence),
    "so do those of an encoder": (BERT, interface, "layout_attention", one_sequence),
    "so do those of both stacks": (T5, interface, "layout_attention", one_sequence),
    "the reduction": (T5, head, "mean_of_counted", mean_over_tokens),
    "the bias": (T5, interface, "layout_attention", no_bias),
    "the rows of logits": (BERT, forward, "repad", swapped_rows),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name):
    case, module, function, make = FAULTS[name]
    model, batch = case.build(), case.batch("right")
    with replaced(module, function, make):
        check = compared(model, batch)
    assert check.verdict == "differs", str(check)
    assert not check.ok
    assert all(c.nearer == "padded" for c in check.differences), str(check)
    assert "DIFFERS: padded is nearer to float64" in str(check)


def test_small_faults_are_found_in_bfloat16():
    model, batch = LLAMA.build().bfloat16(), LLAMA.batch("right")
    assert compared(model, batch).ok
    for module, function, make in (
        (inputs, "_targets", dropped_last_label),
        (head, "mean_of_counted", scaled_gradient(0.8)),
    ):
        with replaced(module, function, make):
            assert compared(model, batch).verdict == "differs"


# ----------------------------------------------------------------------- rounding of the padded run


def off_by(factor):
    def make(original):
        def loss(source, *others, **options):
            exact = original(source, *others, **options)
            return exact if source.dtype == torch.float64 else exact * factor

        return loss

    return make


def test_rounding_of_the_padded_run_is_no_fault():
    """Also if both are off by more than the bound, the packed run by less."""
    model, batch = LLAMA.build(), LLAMA.batch("right")
    with replaced(loss_utils, "fixed_cross_entropy", off_by(1 + 1e-4)):
        check = compared(model, batch)
    assert check.ok, str(check)
    loss = check.comparisons[0]
    assert loss.difference == pytest.approx(1e-4, rel=0.05)
    assert loss.padded_error > 1e-5 > loss.packed_error
    assert loss.result == "equal: packed is nearer to float64"


@pytest.mark.parametrize("error", [1e-4, 1e-2])
def test_the_same_error_of_the_packed_run_is_a_fault(error):
    model, batch = LLAMA.build(), LLAMA.batch("right")
    with replaced(head, "mean_of_counted", off_by_result(1 + error)):
        assert compared(model, batch).verdict == "differs"


def off_by_result(factor):
    return lambda original: lambda *others, **options: original(*others, **options) * factor


def test_a_large_difference_is_a_fault_even_where_float64_agrees():
    """Such as noise by the padded width: the packed run must do what the model does."""
    model, batch = LLAMA.build(), LLAMA.batch("right")
    with replaced(loss_utils, "fixed_cross_entropy", off_by(1.01)):
        check = compared(model, batch)
    assert check.verdict == "differs"
    assert "DIFFERS: packed is nearer to float64" in str(check)


class OffInOneRow(nn.Module):
    """A head that is 0.1 permille off if the batch has one row, as a sequence alone has too."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, hidden):
        return self.head(hidden) * (1.0001 if hidden.shape[0] == 1 else 1)


def test_a_sequence_alone_is_no_reference_if_it_depends_on_the_batch():
    model, batch = LLAMA.build(), LLAMA.batch("right")
    model.lm_head = OffInOneRow(model.lm_head)
    check = compared(model, batch)
    assert check.verdict == "differs"
    assert "DIFFERS: a sequence depends on the rest of the batch" in str(check)
