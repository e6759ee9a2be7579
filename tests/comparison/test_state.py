"""After `check_patch`, model and process are as before."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from tokenpack import PatchCheck, check_patch, is_patched, packing_stats, patch_model, unpatch_model
from tokenpack.adapters.suspend import suspended

from ..adapters.models import BERT, BY_NAME, LLAMA, T5, Case


def with_dropout(case: Case) -> nn.Module:
    names = (
        "attention_dropout",
        "hidden_dropout_prob",
        "dropout_rate",
        "attention_probs_dropout_prob",
    )
    options = {n: 0.3 for n in names if n in case.options}
    return Case(case.family, case.config, case.model, {**case.options, **options}).build()


def snapshot(model):
    """All that a check might change, in a form that can be compared."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return {
        "classes": [type(m) for m in model.modules()],
        "marks": [
            sorted(n for n in vars(m) if n.startswith("_tokenpack")) for m in model.modules()
        ],
        "modes": [m.training for m in model.modules()],
        "floats": [
            {n: v for n, v in vars(m).items() if isinstance(v, (float, int, str))}
            for m in model.modules()
        ],
        "configs": [
            {**{n: str(v) for n, v in vars(c).items()}, "attention": str(c._attn_implementation)}
            for c in configs.values()
        ],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "values": [t.detach().clone() for t in (*model.parameters(), *model.buffers())],
        "random": [torch.get_rng_state(), random.getstate(), np.random.get_state()],
    }


def same(one, other):
    if isinstance(one, (torch.Tensor, np.ndarray)):
        return bool((one == other).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("case", [T5, LLAMA, BERT], ids=str)
def test_everything_is_restored(case, patched):
    model, batch = with_dropout(case), case.batch("right")
    if patched:
        patch_model(model, logits="always")
        model(**batch).loss.backward()
        stats = packing_stats(model)
        counted = copy.deepcopy(stats)
    gradients = [p.grad for p in model.parameters()]
    copies = [None if g is None else g.clone() for g in gradients]
    called = []
    for parameter in model.parameters():  # as optimizers that step in the backward do
        parameter.register_post_accumulate_grad_hook(lambda _: called.append(1))
    before = snapshot(model)
    check = check_patch(model, batch)
    assert check.ok, str(check)
    assert any("dropout was set to 0" in note for note in check.notes)
    assert not called
    after = snapshot(model)
    assert [name for name in before if not same(before[name], after[name])] == []
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients))
    assert all(g is None or g.equal(c) for g, c in zip(gradients, copies))
    assert is_patched(model) == patched
    if patched:
        assert packing_stats(model) is stats
        assert stats == counted
        model(**batch)
        assert stats.packed_calls == counted.packed_calls + 1


def test_a_suspended_patch_leaves_the_numbers_of_before():
    batch = {**T5.batch("right"), "use_cache": False}
    model = T5.build().eval()
    logits = model(**batch).logits
    patch_model(model)
    classes = [type(m) for m in model.modules()]
    with suspended(model):
        assert not is_patched(model)
        assert model(**batch).logits.equal(logits)
        clone = copy.deepcopy(model)
    assert [type(m) for m in model.modules()] == classes
    assert not is_patched(clone)
    assert packing_stats(model).packed_calls == 0
    model(**batch)
    assert packing_stats(model).packed_calls == 1
    assert unpatch_model(model)(**batch).logits.equal(logits)


def test_a_patch_comes_back_after_an_error():
    model, batch = patch_model(LLAMA.build()), LLAMA.batch("right")
    wrong = {**batch, "input_ids": batch["input_ids"] + 1000}
    before = snapshot(model)
    with pytest.raises(IndexError):  # the unpatched model raises it too
        check_patch(model, wrong)
    assert same(before, snapshot(model))


class Counter(nn.Module):
    """A module with a buffer that each forward changes and then replaces."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, hidden):
        self.calls += 1
        self.calls = self.calls + 1
        return self.inner(hidden) * (1 + 0.001 * self.calls)


def test_buffers_begin_alike_in_both_runs():
    model, batch = LLAMA.build(), LLAMA.batch("right")
    model.model.layers[0].mlp = Counter(model.model.layers[0].mlp)
    buffer = model.model.layers[0].mlp.calls
    assert check_patch(model, batch).ok
    assert model.model.layers[0].mlp.calls is buffer
    assert buffer.item() == 0


def test_gradient_checkpointing_with_reentrance():
    model, batch = LLAMA.build(), LLAMA.batch("right")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    run = model.model.layers[0]._gradient_checkpointing_func
    check = check_patch(model, batch)
    assert check.ok, str(check)
    assert model.model.layers[0]._gradient_checkpointing_func is run


# ------------------------------------------------------------------------------------ the report


def test_the_table():
    model, batch = LLAMA.build(), LLAMA.batch("right")
    check = check_patch(model, batch)
    assert isinstance(check, PatchCheck)
    lines = str(check).splitlines()
    assert lines[0] == "the packed run equals the padded one (float32, training mode, cpu)"
    names = [comparison.name for comparison in check.comparisons]
    layers = [f"gradients of model.layers.{i}" for i in range(3)]
    assert names == [
        *("loss", "logits", "gradients of model.embed_tokens"),
        *(*layers, "gradients of model.norm", "gradients of lm_head"),
    ]
    assert all(any(line.startswith(name) for line in lines) for name in names)
    assert check.peak_bytes[0] > check.peak_bytes[1] > 0
    assert min(check.seconds) > 0
    text = str(check)
    for words in ("peak MiB: padded", "seconds: padded", "loss: padded", "packed calls: 1, 47 tok"):
        assert words in text


def test_nothing_packed_is_not_ok():
    model, batch = LLAMA.build().eval(), LLAMA.batch("right")
    del batch["labels"]
    check = check_patch(model, batch)
    assert (check.verdict, check.ok) == ("nothing packed", False)
    assert "NOTHING PACKED, so the patch was not tested" in str(check)
    assert "ran padded: a cache would be returned (pass use_cache=False) (1)" in str(check)
    assert check.fallbacks == {"a cache would be returned (pass use_cache=False)": 1}


def test_a_call_around_every_entry_is_nothing_packed():
    class Around(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.module = model

        def forward(self, input_ids, **others):
            base = self.module.model
            hidden = base.embed_tokens(input_ids)
            angles = base.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
            return (base.layers[0](hidden, position_embeddings=angles),)

    check = check_patch(Around(LLAMA.build()), LLAMA.batch("right"))
    assert check.verdict == "nothing packed"
    assert check.unseen_calls == 1
    assert "went around every patched part: 1" in str(check)


def test_labels_and_gradients_can_be_left_out():
    model, batch = LLAMA.build(), LLAMA.batch("right")
    check = check_patch(model, batch, labels=False)
    assert check.ok
    assert check.losses == (None, None)
    assert "no labels, no loss; the gradients are those of a weighted sum" in str(check)
    check = check_patch(model, batch, gradients=False)
    assert [c.name for c in check.comparisons] == ["loss", "logits"]
    model.requires_grad_(False)
    assert "no parameter and no input needs one" in str(check_patch(model, batch))


def test_gradients_of_inputs():
    model, batch = LLAMA.build().requires_grad_(False), LLAMA.batch("right")
    hidden = model.get_input_embeddings()(batch.pop("input_ids")).requires_grad_()
    check = check_patch(model, {**batch, "inputs_embeds": hidden})
    assert check.ok
    assert [c.name for c in check.comparisons] == ["loss", "logits", "gradients of inputs_embeds"]
    assert hidden.grad is None


def test_items_of_a_model_that_ignores_them():
    """Unpatched T5 ignores ``num_items_in_batch``; the patched one divides by it."""
    for case in (T5, LLAMA, BERT, BY_NAME["ModernBertForMaskedLM"]):
        batch = {**case.batch("right"), "num_items_in_batch": torch.tensor(77)}
        check = check_patch(case.build(), batch)
        assert check.ok, str(check)
        assert check.packed_calls == 1
        padded = case.build()(**case.batch("right")).loss.item()
        assert check.losses[1] < 0.8 * padded


def test_an_error_of_the_packed_run_is_a_difference():
    model = patch_model(LLAMA.build(), strict=True)
    check = check_patch(model, {**LLAMA.batch("right"), "use_cache": True})
    assert check.verdict == "differs"
    assert "the packed run raised ValueError: LlamaForCausalLM cannot pack this call" in str(check)


def test_streams_are_compared_with_padded_rows():
    """An unpatched model would see one sequence."""
    model, batch = LLAMA.build(), LLAMA.batch("right")
    mask = batch["attention_mask"].bool()
    ends = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    stream = {name: batch[name][mask][None] for name in ("input_ids", "labels")}
    check = check_patch(model, {**stream, "cu_seqlens": ends})
    assert check.ok, str(check)
    assert "the padded run had the sequences of cu_seqlens in rows of their own" in str(check)
    assert check.losses[0] == pytest.approx(model(**batch).loss.item(), rel=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (lambda m: (m, [1]), "batch must be a mapping, got list"),
        (lambda m: (nn.Linear(2, 2), {}), "model must be a transformers.PreTrainedModel or wrap"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        check_patch(*arguments(LLAMA.build()))
    with pytest.raises(ValueError, match=r"dtype must be a floating-point type, got torch.int8"):
        check_patch(LLAMA.build(), LLAMA.batch("right"), dtype=torch.int8)
