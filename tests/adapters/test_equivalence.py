"""Packed equals padded: loss, logits at real positions and every gradient, for every family."""

import copy

import pytest
import torch

from tokenpack import packing_stats, patch_model

from .models import CASES, Case, gradient_distance

LOSS = 1e-6
LOGITS = 1e-5
GRADIENT = {torch.float32: 1e-5, torch.float64: 1e-10}
GRADIENT_OF_A_FLOAT32_LOSS = 1e-6

parametrize_cases = pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=f"{case}-{position}",
            marks=pytest.mark.skipif(
                not case.available, reason=f"refused before transformers {case.since}"
            ),
        )
        for position, case in enumerate(CASES)
    ],
)


def objective(case: Case, outputs, batch):
    """The loss, or a number that depends on every real hidden state."""
    if outputs.get("loss") is not None:
        return outputs.loss
    return outputs.last_hidden_state[case.real_positions(batch)].sin().mean()


@parametrize_cases
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_equals_padded(case: Case, padding: str, dtype: torch.dtype):
    if dtype == torch.float64 and not case.float64:
        pytest.skip("transformers does not run this model in float64")
    reference = case.build(dtype)
    model = patch_model(copy.deepcopy(reference))
    for seed in (1, 2):
        batch = case.batch(padding, seed)
        model.zero_grad()
        reference.zero_grad()
        ours = objective(case, model(**batch), batch)
        theirs = objective(case, reference(**batch), batch)
        ours.backward()
        theirs.backward()
        assert abs(ours - theirs).item() <= LOSS * max(1.0, abs(theirs.item()))
        tolerance = GRADIENT[dtype]
        if case.float32_loss and dtype == torch.float64:
            tolerance = GRADIENT_OF_A_FLOAT32_LOSS
        assert gradient_distance(model, reference) <= tolerance
    stats = packing_stats(model)
    if case.pools and padding == "left":
        assert stats.packed_calls == 0  # the head reads padding
        assert sum(stats.fallbacks.values()) == 2
    else:
        assert stats.packed_calls == 2
        assert not stats.fallbacks


@parametrize_cases
def test_evaluation_outputs_equal_the_padded_models(case: Case):
    """With left padding. tests/conformance has right padding, and packed input."""
    reference = case.build().eval()
    model = patch_model(copy.deepcopy(reference))
    batch = case.batch("left", seed=3)
    with torch.no_grad():
        # Without labels, a model in evaluation returns a cache by default.
        options = {"output_hidden_states": True}
        if "labels" not in batch and case.model != "T5EncoderModel":
            options["use_cache"] = False
        ours, theirs = model(**batch, **options), reference(**batch, **options)
    assert packing_stats(model).packed_calls == (0 if case.pools else 1)
    real = {"dec": case.real_positions(batch), "enc": batch["attention_mask"].bool()}
    compared = 0
    for name, value in theirs.items():
        if name in ("loss", "past_key_values"):
            continue
        for one, other in zip(as_tuple(ours[name]), as_tuple(value), strict=True):
            assert one.shape == other.shape, name
            if one.dim() == 3:
                side = "enc" if name.startswith("encoder") else "dec"
                one, other = one[real[side]], other[real[side]]
            scale = max(1.0, float(other.abs().max()))
            assert (one - other).abs().max() <= LOGITS * scale, name
            compared += 1
    assert compared > 1


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


@parametrize_cases
def test_inference_mode_changes_nothing(case: Case):
    """Tensors of inference mode do not count their changes."""
    model = patch_model(case.build()).eval()
    model.config.use_cache = False
    batch, results = case.batch("right"), []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            made_here = {name: tensor.clone() for name, tensor in batch.items()}
            results.append(model(**made_here).to_tuple())
    assert packing_stats(model).packed_calls == 2
    torch.testing.assert_close(*results, rtol=0, atol=0)
