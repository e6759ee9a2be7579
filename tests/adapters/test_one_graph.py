"""torch.compile makes one graph of a patched model, and it computes what the padded model does."""

import copy
import re
from dataclasses import replace

import pytest
import torch
import transformers as hf
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokenpack import packing_stats, patch_model
from tokenpack.adapters import graph
from tokenpack.adapters.call import ENTRY

from .models import Case, gradient_distance
from .one_graph import (
    FAMILIES,
    batches_of,
    compare,
    compile_and_compare,
    needs_one_graph,
    smallest_case_of,
)

pytestmark = needs_one_graph
ROUNDING = 1e-5
BERT = smallest_case_of("BertForMaskedLM")
ROW_HEAD = smallest_case_of("BertForSequenceClassification")
# transformers writes it into the config in the first forward, which is a change for torch.compile.
ROW_HEAD.options["problem_type"] = "single_label_classification"
CLASSIFIER = smallest_case_of("LlamaForSequenceClassification")
LLAMA = smallest_case_of("LlamaForCausalLM")
NLLB = smallest_case_of("M2M100ForConditionalGeneration")
MT5 = smallest_case_of("MT5ForConditionalGeneration")


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    # Otherwise torch writes each graph and its stack traces into pytest's log, which takes time.
    monkeypatch.setattr(torch._logging._internal.trace_log, "handlers", [])
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def compiled(case: Case, options=None, **more):
    model = patch_model(case.build(), **(options or {}))
    return torch.compile(model, backend="eager", fullgraph=True, dynamic=True, **more), model


def without(batch, *tokens):
    mask = batch["attention_mask"].clone()
    mask[tokens] = 0
    return {"attention_mask": mask}


# Values that a graph cannot pack: errors when it runs.
ERRORS = {
    "T5ForConditionalGeneration": {
        "attention_mask must have no holes": lambda batch: without(batch, 0, slice(2, 4))
    },
    "M2M100ForConditionalGeneration": {
        "labels must have no decoder tokens in a row": lambda batch: without(batch, 1),
        "attention_mask must mark at least one real token": lambda batch: without(
            batch, slice(None)
        ),
    },
    "LlamaForCausalLM": {
        "attention_mask must hold only 0 and 1": lambda batch: {
            "attention_mask": batch["attention_mask"] * 2
        },
        "labels must be -100 at padded positions": lambda batch: {
            "labels": batch["input_ids"].clone()
        },
    },
    "BertForSequenceClassification": {
        "attention_mask must be 1 in the slots that the model's head reads": lambda batch: {
            "attention_mask": batch["attention_mask"].flip(1)
        }
    },
}


# Mistral and the Qwens run the code of Llama, Gemma3 that of Gemma2, and BART that of M2M100. mT5
# has a gated layer more than T5, and is compiled as a packed stream below.
LIKE_OTHERS = ("Mistral", "Qwen2", "Qwen3", "Gemma3", "MT5", "Bart")
ONE_GRAPH = [
    pytest.param(
        smallest_case_of(name), marks=pytest.mark.long if name.startswith(LIKE_OTHERS) else ()
    )
    for name in FAMILIES
]


@pytest.mark.parametrize("case", [*ONE_GRAPH, ROW_HEAD], ids=lambda case: case.model)
def test_one_graph_for_all_shapes(case):
    """One graph computes the padded model's loss and gradients, counts, and checks values."""
    run, model = compiled(case)
    batches = [case.batch("right")] if case.pools else list(batches_of(case, 3))
    counts = compare(run, model, case.build(), batches)
    for message, change in ERRORS.get(case.model, {}).items():
        with pytest.raises(ValueError, match=re.escape(message)):
            run(**{**batches[0], **change(batches[0])})
    run(**batches[0]).loss.backward()
    assert (counts.graphs, counts.breaks) == (1, 0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert counts.loss <= ROUNDING
    assert counts.gradient <= ROUNDING
    stats, sides = packing_stats(model), [s for batch in batches for s in masks_of(case, batch)]
    sides += masks_of(case, batches[0])
    assert stats.packed_calls == len(batches) + 1
    assert stats.packed_tokens == sum(int(side.sum()) for side in sides)
    assert stats.padded_tokens == sum(side.numel() for side in sides)


def masks_of(case, batch):
    """The mask of each side of the model."""
    masks = [batch["attention_mask"].bool()]
    return masks if case.labels != "seq2seq" else [*masks, case.real_positions(batch)]


def test_gradient_checkpointing():
    """Under AOTAutograd, which traces the backward, too. The padded shape is a constant."""

    def checkpointed(model):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    batches = [LLAMA.batch("right"), LLAMA.batch("left")]
    counts = compile_and_compare(LLAMA.build(), batches, "aot_eager", checkpointed, fullgraph=True)
    assert (counts.graphs, counts.breaks) == (1, 0)
    assert max(counts.loss, counts.gradient) <= ROUNDING


def test_lora():
    peft = pytest.importorskip("peft")

    def with_lora(model):
        torch.manual_seed(5)
        config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
        return peft.get_peft_model(model, config)

    counts = compile_and_compare(
        LLAMA.build(), batches_of(LLAMA, 2), change=with_lora, fullgraph=True, dynamic=True
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


def collate(features):
    columns = max(len(feature["input_ids"]) for feature in features)
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([f[name] + [fill] * (columns - len(f[name])) for f in features])
        for name, fill in fills.items()
    }


def test_torch_compile_of_a_trainer(tmp_path):
    """40 shapes. The first graph of torch.compile has constant shapes, the second serves the rest.

    ``dynamic=True`` would leave out the first.
    """
    rows = []
    for seed in range(20):
        batch = LLAMA.batch("right", seed)
        real = batch["attention_mask"].bool()
        rows += [{k: v[row][real[row]].tolist() for k, v in batch.items()} for row in (0, 2, 3, 4)]
    losses = []
    for is_compiled in (False, True):
        torch._dynamo.utils.counters.clear()
        model = patch_model(LLAMA.build())
        arguments = hf.TrainingArguments(
            tmp_path,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=1,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            torch_compile=is_compiled,
            torch_compile_backend="eager" if is_compiled else None,
        )
        trainer = hf.Trainer(model, arguments, data_collator=collate, train_dataset=rows)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        assert packing_stats(model).packed_calls == 40
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_calls_are_counted_in_a_copy_too():
    case = smallest_case_of("LlamaModel")
    run, model = compiled(case)
    twin = copy.deepcopy(model)
    twin_run = torch.compile(twin, backend="eager", fullgraph=True, dynamic=True)
    for seed in (0, 1):
        run(**case.batch("right", seed))
    twin_run(**case.batch("right", 2))
    assert packing_stats(model).packed_calls == 2
    assert packing_stats(twin).packed_calls == 1


@pytest.mark.parametrize("case", [LLAMA, MT5], ids=lambda case: case.model)
def test_a_packed_stream_is_one_graph(case):
    run, model = compiled(case)
    eager = patch_model(case.build())
    for seed in range(2):
        batch = case.batch("right", seed)
        real = batch["attention_mask"].bool()
        labels, kept = batch["labels"], case.real_positions(batch)
        stream = {
            "input_ids": batch["input_ids"][real][None],
            "cu_seqlens": boundaries(real),
            "labels": labels[kept][None],
        }
        if case is MT5:
            stream["decoder_cu_seqlens"] = boundaries(kept)
        ours, theirs = run(**stream).loss, eager(**stream).loss
        for one, loss in ((model, ours), (eager, theirs)):
            one.zero_grad()
            loss.backward()
        assert abs(ours - theirs).item() <= ROUNDING
        assert gradient_distance(model, eager) <= ROUNDING
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert packing_stats(model) == packing_stats(eager)


def boundaries(real):
    return torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).int()


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


@pytest.mark.parametrize(
    "case, implementations",
    [(LLAMA, ("sdpa", "eager")), (CLASSIFIER, ("eager",))],
    ids=lambda value: getattr(value, "model", ""),
)
def test_a_cache_left_out_and_attention_set_after_the_patch(case, implementations, monkeypatch):
    run, model = compiled(case)
    eager = patch_model(case.build())
    batch = {**case.batch("right"), "return_dict": False}
    for graphs, implementation in enumerate(implementations, 1):
        model.set_attn_implementation(implementation)
        ours, theirs = run(**batch), eager(**batch)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
        assert abs(ours[0] - theirs[0]).item() <= ROUNDING
        assert [type(each) for each in ours] == [type(each) for each in theirs]
        assert ours[2] is None
    assert packing_stats(model).packed_calls == len(implementations)
    if case is CLASSIFIER:
        return
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._local_mapping, "custom", lambda *args, **k: attention(*args, **k)
    )
    for each in (model, eager):
        each.set_attn_implementation("custom")
    assert torch.equal(run(**batch)[1], eager(**batch)[1])
    assert packing_stats(model).fallbacks == packing_stats(eager).fallbacks


# ----------------------------------------------------------------- calls that run padded in a graph


def masked_twice(batch):
    """The batch with a mask that packing does not take, and a number of items."""
    mask = batch["attention_mask"][:, None, None].bool()
    return {**batch, "attention_mask": mask, "num_items_in_batch": torch.tensor(50)}


def embedded(batch):
    """The batch with embeddings that need a gradient, and a cache."""
    ids = batch["input_ids"]
    embeds = torch.randn(*ids.shape, 32, generator=torch.manual_seed(0)).requires_grad_()
    return {**without_ids(batch), "inputs_embeds": embeds, "use_cache": True}


def without_ids(batch):
    return {name: value for name, value in batch.items() if name != "input_ids"}


PADDED = {
    "a cache": (LLAMA, lambda batch: {**batch, "use_cache": True}),
    "embeddings": (LLAMA, embedded),
    "a mask per query": (BERT, masked_twice),
    "no targets": (BERT, lambda batch: masked_twice(dict(batch, labels=batch["labels"] * 0 - 100))),
    "a classifier": (ROW_HEAD, lambda batch: {**batch, "use_cache": True}),
}


# The call with embeddings has a cache as well.
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long][: n == "a cache"]) for n in PADDED]
)
def test_a_call_that_runs_padded_is_one_graph_and_counted(name):
    case, change = PADDED[name]
    run, model = compiled(case)
    eager = patch_model(case.build())
    for seed in (0, 1):
        ours, theirs = (step(**change(case.batch("right", seed))) for step in (run, eager))
        for one, out in ((model, ours), (eager, theirs)):
            one.zero_grad()
            out.loss.backward()
        assert torch.equal(ours.loss, theirs.loss)
        assert torch.equal(ours.logits, theirs.logits)
        for one, other in zip(model.parameters(), eager.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None)
            assert one.grad is None or torch.equal(one.grad, other.grad)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert packing_stats(model) == packing_stats(eager)
    assert packing_stats(model).fallbacks.total() == 2


def test_strict_refuses_in_a_graph():
    run, _ = compiled(LLAMA, {"strict": True})
    with pytest.raises(torch._dynamo.exc.Unsupported, match="tokenpack raises an error"):
        run(**LLAMA.batch("right"), use_cache=True)
    model = patch_model(LLAMA.build(), strict=True)
    with pytest.raises(ValueError, match="cannot pack this call: a cache is in use"):
        torch.compile(model, backend="eager")(**LLAMA.batch("right"), use_cache=True)


# ------------------------------------------------------- calls that are not traced as one graph


@pytest.mark.parametrize(
    "case, option, reason",
    [
        (NLLB, {"encoder_layerdrop": 0.2}, "LayerDrop draws which layers run"),
        (LLAMA, {"num_key_value_heads": 1}, "a single head or key head"),
    ],
    ids=["LayerDrop", "single key head"],
)
def test_a_named_reason_for_a_config(case, option, reason):
    case = replace(case, options={**case.options, **option})
    run, _ = compiled(case)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=reason):
        run(**case.batch("right"))


def packed_rows(count):
    """Two sequences of 5 and 7 tokens, in one row or in two."""
    ids = torch.arange(3, 15)[None]
    batch = {"input_ids": ids, "labels": ids, "cu_seqlens": torch.tensor([0, 5, 12]).int()}
    if count == 1:
        return batch
    rows = torch.nn.functional.pad(ids, (0, 2)).view(2, 7)
    starts = torch.tensor([0, 7, 14]).int()
    return {**batch, "input_ids": rows, "labels": rows, "cu_seqlens_padded": starts}


def test_a_named_reason_for_boundaries():
    run, _ = compiled(LLAMA)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="several packed rows are given"):
        run(**packed_rows(2))
    ids = torch.arange(3, 15)[None]
    with pytest.raises(torch._dynamo.exc.Unsupported, match="position_ids without a mask"):
        run(input_ids=ids, labels=ids, position_ids=torch.arange(12)[None])
    run, _ = compiled(NLLB)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="derives positions from ids"):
        run(**packed_rows(1), decoder_cu_seqlens=torch.tensor([0, 5, 12]).int())


def test_before_torch_2_13_nothing_is_traced(monkeypatch):
    model = patch_model(LLAMA.build())
    monkeypatch.setattr(graph, "TAKES_OBJECTS", False)
    reason = graph.untraceable(model, getattr(model, ENTRY), LLAMA.batch("right"))
    assert reason in graph.UNTRACEABLE
    assert "older than 2.13" in reason


def test_without_fullgraph_such_calls_run_as_before():
    model = patch_model(LLAMA.build())
    eager = patch_model(LLAMA.build())
    run = torch.compile(model, backend="eager")
    batch = packed_rows(2)
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


def test_ops_that_read_values_follow_the_rules_of_torch():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    labels = torch.tensor([[4, -100, -100], [5, -100, -100]])
    indices = torch.tensor([0, 1, 3], dtype=torch.int32)
    ops = torch.ops.tokenpack
    for op, arguments in (
        (ops.pack_rows, (mask, "attention_mask", "", 0, 0, True, True, None)),
        (ops.full_rows, (mask, "", 0, 0)),
        (ops.count_padded, (torch.ones(2, 3, requires_grad=True), "", "a reason", "", True)),
        (ops.pack_boundaries, (torch.tensor([0, 2, 3]), mask[:1], "", 0, 0, True, None, None, "")),
        (ops.dead_tokens, (torch.tensor([0, 2, 3]), 3, 4, "")),
        (ops.take_targets, (labels, indices, "", 0, 0)),
        (ops.require_real_slots, (mask, torch.zeros(2, dtype=torch.long))),
    ):
        torch.library.opcheck(op.default, arguments)


def test_cuda_graphs_leave_out_what_runs_on_the_host():
    """A CUDA graph replays kernels: it would read no values and count nothing."""
    tagged = set()
    for name in dir(torch.ops.tokenpack):
        op = getattr(torch.ops.tokenpack, name)
        if torch.Tag.cudagraph_unsafe in getattr(getattr(op, "default", None), "tags", ()):
            tagged.add(name)
    of_loss = {"linear_cross_entropy", "linear_cross_entropy_and_gradients"}
    of_adapters = {
        *("pack_rows", "pack_boundaries", "full_rows", "take_targets", "dead_tokens"),
        *("require_real_slots", "require_plain_head", "count_padded"),
    }
    assert tagged == of_loss | of_adapters
