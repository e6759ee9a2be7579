"""T5, mT5, UMT5 and Llama in Triton's interpreter: loss and gradients equal the padded model's.

The models have a head_dim of 16, the kernels' minimum. TRITON_INTERPRET=1 runs these tests.
"""

import copy
from dataclasses import replace

import pytest
import torch

from tokenpack import packing_stats, patch_model
from tokenpack.attention import dispatch, layout_attention
from tokenpack.kernels import layout_from_lengths
from tokenpack.kernels._triton import INTERPRETED

from .models import BY_NAME, LLAMA, gradient_distance

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="runs the kernels in Triton's interpreter")

T5S = ["T5ForConditionalGeneration", "MT5ForConditionalGeneration", "UMT5ForConditionalGeneration"]


def build(name):
    case = BY_NAME[name]
    if not case.available:
        pytest.skip(f"refused before transformers {case.since}")
    wider = replace(case, options={**case.options, "d_kv": 16, "num_layers": 2})
    return wider, wider.build()


def assert_same_step(case, reference, model, run=None):
    batch = case.batch("right")
    ours, theirs = (model if run is None else run)(**batch).loss, reference(**batch).loss
    ours.backward()
    theirs.backward()
    assert abs(ours - theirs).item() <= 1e-5
    assert gradient_distance(model, reference) <= 1e-5
    stats = packing_stats(model)
    assert not stats.fallbacks
    assert all(choice.startswith("triton (") for choice in stats.attention.values())


# mT5's attention is that of T5.
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long if n.startswith("MT5") else ()) for n in T5S]
)
def test_every_gradient_of_t5_models(name):
    case, reference = build(name)
    model = patch_model(copy.deepcopy(reference))
    assert_same_step(case, reference, model)
    biases = [p for n, p in model.named_parameters() if "relative_attention_bias" in n]
    assert biases
    assert all(bias.grad.abs().max() > 0 for bias in biases)


# Without kernels, test_patching.py runs both.
@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.long)])
def test_under_gradient_checkpointing(reentrant):
    case, reference = build(T5S[0])
    model = patch_model(copy.deepcopy(reference))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_step(case, reference, model)


def test_under_autocast():
    case, reference = build(T5S[0])
    model = patch_model(copy.deepcopy(reference))
    batch = case.batch("right")
    exact = reference(**batch).loss
    with torch.autocast("cpu", torch.float16):
        loss = model(**batch).loss
    loss.backward()
    exact.backward()
    assert abs(loss - exact).item() < 2e-3 * exact.item()
    assert gradient_distance(model, reference) < 0.02
    assert all(c.startswith("triton (") for c in packing_stats(model).attention.values())


def test_llama():
    case = replace(LLAMA, options={**LLAMA.options, "hidden_size": 64})
    reference = case.build()
    assert_same_step(case, reference, patch_model(copy.deepcopy(reference)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads, options", [(2, {"dropout_p": 0.3}), (1, {"softcap": 2.0})])
def test_one_node_of_autograd_computes_what_the_op_does(causal, kv_heads, options, monkeypatch):
    """The same kernels run, so all bits are equal, with the same seed of dropout too."""
    results = []
    for is_one_node in (True, False):
        monkeypatch.setattr(dispatch, "runs_eagerly", lambda *_, answer=is_one_node: answer)
        torch.manual_seed(0)
        q = torch.randn(1, 9, 2, 16).transpose(1, 2).requires_grad_()
        k, v = (torch.randn(1, 9, kv_heads, 16).transpose(1, 2).requires_grad_() for _ in "kv")
        table = torch.randn(2, 7, requires_grad=True)
        out, choice = layout_attention(
            *(q, k, v, {"self": layout_from_lengths([4, 5])}),
            **{"causal": causal, "relative_bias": table, "sliding_window": 3, **options},
        )
        out.square().sum().backward()
        assert choice.backend == "triton"
        results.append([out, *(each.grad for each in (q, k, v, table))])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_inference_mode_changes_nothing():
    case, model = build(T5S[0])
    patch_model(model).eval()
    losses = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            losses.append(model(**case.batch("right")).loss)
    assert torch.equal(*losses)


def test_a_second_derivative_is_an_error():
    q = torch.randn(1, 2, 9, 16, requires_grad=True)
    out, choice = layout_attention(q, q, q, {"self": layout_from_lengths([4, 5])}, causal=True)
    assert choice.backend == "triton"
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        (gradient.sum() + q.sum()).backward()
