"""torch.compile makes one graph of a patched model, and it computes what the padded model does."""

import copy
import re

import pytest
import torch

from tokenpack import packing_stats, patch_model

from .models import BERT, NLLB, T5, Case
from .one_graph import FAMILIES, batches_of, case_of, compile_and_compare

ROUNDING = 1e-5
LLAMA = case_of("LlamaForCausalLM", layers=1)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(case: Case, options=None, **more):
    model = patch_model(case.build(), **(options or {}))
    return torch.compile(model, backend="eager", fullgraph=True, dynamic=True, **more), model


@pytest.mark.parametrize("name", FAMILIES)
def test_one_graph_for_all_shapes(name):
    case = case_of(name, layers=2)
    counts = compile_and_compare(case.build(), batches_of(case, 3), fullgraph=True, dynamic=True)
    assert (counts.graphs, counts.breaks) == (1, 0)
    assert counts.loss <= ROUNDING
    assert counts.gradient <= ROUNDING


def test_no_recompilation_after_the_second_shape():
    """The first graph of torch.compile has constant shapes, unless ``dynamic=True`` is given."""
    counts = compile_and_compare(LLAMA.build(), batches_of(LLAMA, 40), fullgraph=True)
    assert (counts.graphs, counts.breaks) == (2, 0)
    assert max(counts.loss, counts.gradient) <= ROUNDING


def test_gradient_checkpointing():
    def checkpointed(model):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    counts = compile_and_compare(
        LLAMA.build(),
        batches_of(LLAMA, 2),
        "aot_eager",
        checkpointed,
        fullgraph=True,
        dynamic=True,
    )
    assert (counts.graphs, counts.breaks) == (1, 0)
    assert max(counts.loss, counts.gradient) <= ROUNDING


def test_lora():
    peft = pytest.importorskip("peft")

    def with_lora(model):
        torch.manual_seed(5)
        config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
        return peft.get_peft_model(model, config)

    counts = compile_and_compare(
        LLAMA.build(), batches_of(LLAMA, 3), change=with_lora, fullgraph=True, dynamic=True
    )
    assert (counts.graphs, counts.breaks) == (1, 0)
    assert max(counts.loss, counts.gradient) <= ROUNDING


def test_autocast():
    run, _ = compiled(LLAMA)
    batch = LLAMA.batch("left")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = run(**batch).loss
        theirs = patch_model(LLAMA.build())(**batch).loss
    assert ours.dtype == torch.float32
    assert abs(ours - theirs).item() <= 1e-3


def test_calls_are_counted_in_a_copy_too():
    run, model = compiled(NLLB)
    twin = copy.deepcopy(model)
    twin_run = torch.compile(twin, backend="eager", fullgraph=True, dynamic=True)
    eager = patch_model(NLLB.build())
    for seed in (0, 1):
        run(**NLLB.batch("right", seed))
        eager(**NLLB.batch("right", seed))
    twin_run(**NLLB.batch("right", 2))
    assert packing_stats(model) == packing_stats(eager)
    assert packing_stats(twin).packed_calls == 1


def test_evaluation_returns_the_outputs_of_the_eager_model():
    run, model = compiled(BERT)
    eager = patch_model(BERT.build()).eval()
    model.eval()
    for seed in (0, 1):
        batch = BERT.batch("right", seed)
        with torch.no_grad():
            ours, theirs = run(**batch), eager(**batch)
        assert ours.keys() == theirs.keys()
        assert torch.allclose(ours.logits, theirs.logits, atol=1e-5)
        assert torch.allclose(ours.loss, theirs.loss)


# -------------------------------------------- values that a graph cannot pack: errors when it runs


def without(batch, *tokens):
    mask = batch["attention_mask"].clone()
    mask[tokens] = 0
    return {"attention_mask": mask}


ERRORS = [
    (T5, {"attention_mask must have no holes": lambda b: without(b, 0, slice(2, 4))}),
    (
        NLLB,
        {
            "attention_mask must mark a token in each row": lambda b: without(b, 1),
            "attention_mask must mark at least one real token": lambda b: without(b, slice(None)),
        },
    ),
    (
        LLAMA,
        {
            "attention_mask must hold only 0 and 1": lambda b: {
                "attention_mask": b["attention_mask"] * 2
            },
            "labels must be -100 at padded positions": lambda b: {"labels": b["input_ids"]},
        },
    ),
    (
        case_of("BertForSequenceClassification"),
        {
            "attention_mask must be 1 in the slots that the model's head reads": lambda b: {
                "attention_mask": b["attention_mask"].flip(1)
            }
        },
    ),
]


@pytest.mark.parametrize("case, errors", ERRORS, ids=[case.model for case, _ in ERRORS])
def test_values_that_cannot_be_packed_are_errors(case, errors):
    run, model = compiled(case)
    batch = case.batch("right")
    run(**batch).loss.backward()
    for message, change in errors.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            run(**{**batch, **change(batch)})
    run(**batch).loss.backward()
    assert packing_stats(model).packed_calls == 2


# ------------------------------------------------------- calls that are not traced as one graph


def test_a_named_reason_if_layers_are_dropped():
    options = {**NLLB.options, "encoder_layerdrop": 0.2}
    case = Case(NLLB.family, NLLB.config, NLLB.model, options, NLLB.labels)
    run, _ = compiled(case)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="LayerDrop draws which layers run"):
        run(**case.batch("right"))


def test_a_named_reason_for_boundaries():
    run, _ = compiled(LLAMA)
    ids = torch.arange(3, 15)[None]
    with pytest.raises(torch._dynamo.exc.Unsupported, match="cu_seqlens are given"):
        run(input_ids=ids, labels=ids, cu_seqlens=torch.tensor([0, 5, 12], dtype=torch.int32))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="position_ids without a mask"):
        run(input_ids=ids, labels=ids, position_ids=torch.arange(12)[None])


@pytest.mark.parametrize("reason", ["cu_seqlens", "a cache is in use"])
def test_without_fullgraph_such_calls_run_as_before(reason):
    model = patch_model(LLAMA.build())
    eager = patch_model(LLAMA.build())
    run = torch.compile(model, backend="eager")
    ids = torch.arange(3, 15)[None]
    batch = {"input_ids": ids, "labels": torch.where(ids == 8, -100, ids)}
    if reason == "cu_seqlens":
        batch["cu_seqlens"] = torch.tensor([0, 5, 12], dtype=torch.int32)
    else:
        batch["use_cache"] = True
    ours, theirs = run(**batch).loss, eager(**batch).loss
    ours.backward()
    theirs.backward()
    assert abs(ours - theirs).item() <= ROUNDING
    stats, expected = packing_stats(model), packing_stats(eager)
    assert (stats.packed_calls, stats.fallbacks) == (expected.packed_calls, expected.fallbacks)


def test_logits_that_change_after_the_head_are_an_error():
    run, model = compiled(BERT)

    class Scaled(type(model.cls.predictions)):
        def forward(self, hidden_states):
            return super().forward(hidden_states) * 2.0

    model.cls.predictions.__class__ = Scaled
    with pytest.raises(RuntimeError, match="changes its logits after the head"):
        run(**BERT.batch("right"))
