"""``pad_to_total`` makes shapes constant, and changes neither results nor counts."""

import numpy as np
import pytest
import torch

from tokenpack import packing_stats, patch_model
from tokenpack.attention import one_call
from tokenpack.data import packed_collate_fn
from tokenpack.trainer import TokenBudget, TokenBudgetBatchSampler

from .models import BERT, CASES, LLAMA, NLLB, T5, gradient_distance
from .one_graph import batches_of, compare, needs_one_graph, smallest_case_of

MULTIPLE = 16
ROUNDING = 2e-6
# One case for each way to compute positions, to route tokens and to read the tokens of a head.
NAMES = (
    *("T5ForConditionalGeneration", "T5EncoderModel", "T5ForTokenClassification"),
    *("UMT5ForConditionalGeneration", "M2M100ForConditionalGeneration", "BartModel"),
    *("MarianMTModel", "LlamaForCausalLM", "LlamaForSequenceClassification"),
    *("MixtralForCausalLM", "Qwen3MoeForCausalLM", "Gemma3ForCausalLM", "CohereForCausalLM"),
    *("GPT2LMHeadModel", "BertForSequenceClassification", "RobertaForMaskedLM"),
    "ModernBertForMaskedLM",
)


def loss_of(outputs):
    loss = getattr(outputs, "loss", None)
    return outputs.last_hidden_state.square().mean() if loss is None else loss


def watch(model):
    """The numbers of tokens and sequences that attention gets."""
    seen = set()

    def hook(module, args, kwargs):
        for stream in kwargs["packing"].streams.values():
            seen.add((stream.total_tokens % MULTIPLE, stream.num_seqs))

    for module in model.modules():
        if hasattr(module, "_tokenpack_role"):
            module.register_forward_pre_hook(hook, with_kwargs=True)
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_results_and_counts_are_those_without(name):
    case = next(case for case in CASES if case.model == name)
    if not case.available:
        pytest.skip(f"transformers has {name} since {case.since}")
    filled, model = patch_model(case.build(), pad_to_total=MULTIPLE), patch_model(case.build())
    seen = watch(filled)
    for seed, padding in enumerate(("right", "right" if case.pools else "left")):
        batch = case.batch(padding, seed)
        losses = []
        for each in (filled, model):
            each.zero_grad()
            losses.append(loss_of(each(**batch)))
            losses[-1].backward()
        assert abs(losses[0] - losses[1]).item() <= ROUNDING * max(1.0, losses[1].item())
        assert gradient_distance(filled, model) <= ROUNDING
    stats, expected = packing_stats(filled), packing_stats(model)
    assert (stats.packed_calls, stats.packed_tokens) == (2, expected.packed_tokens)
    assert (stats.padded_tokens, stats.loss) == (expected.padded_tokens, expected.loss)
    assert seen == {(0, 64)}
    assert stats.dead_tokens > 0
    assert expected.dead_tokens == 0
    assert stats.dead_share == stats.dead_tokens / (stats.dead_tokens + stats.packed_tokens)


def test_results_are_bitwise_equal_on_the_reference_path(monkeypatch):
    """Where sequences are grouped as before, rounding does not change either."""
    monkeypatch.setattr(one_call, "_MOST_SCORES", 0)
    filled, model = patch_model(LLAMA.build(), pad_to_total=8), patch_model(LLAMA.build())
    batch = LLAMA.batch("right")
    losses = [each(**batch).loss for each in (filled, model)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert gradient_distance(filled, model) == 0.0
    assert packing_stats(filled).dead_tokens == -int(batch["attention_mask"].sum()) % 8 > 0


@pytest.mark.parametrize("case", [LLAMA, T5, BERT], ids=lambda case: case.model)
def test_all_outputs(case):
    options = {"logits": "always"}
    filled = patch_model(case.build(), pad_to_total=MULTIPLE, **options).eval()
    model = patch_model(case.build(), **options).eval()
    batch = {**case.batch("left"), "output_hidden_states": True, "num_items_in_batch": 7}
    ours, theirs = filled(**batch, use_cache=False), model(**batch, use_cache=False)
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(dict(ours), dict(theirs), rtol=1e-5, atol=1e-5)
    assert packing_stats(filled).dead_tokens > 0


def test_hooks_and_rows():
    """A hook on a layer sees the dead tokens. `rows_of` leaves them out."""
    filled = patch_model(LLAMA.build(), pad_to_total=MULTIPLE)
    found = []

    def hook(module, args, kwargs, output):
        found.append((output, kwargs["packing"].rows_of(output)))

    filled.model.layers[0].register_forward_hook(hook, with_kwargs=True)
    batch = LLAMA.batch("right")
    filled(**batch)
    hidden, rows = found[0]
    real = batch["attention_mask"].bool()
    assert hidden.shape[1] == -(-int(real.sum()) // MULTIPLE) * MULTIPLE
    assert torch.equal(rows[real], hidden[0, : int(real.sum())])


@needs_one_graph
def test_one_graph():
    case = smallest_case_of(NLLB.model)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    filled = patch_model(case.build(), pad_to_total=MULTIPLE)
    run = torch.compile(filled, backend="eager", fullgraph=True, dynamic=True)
    batches = list(batches_of(case, 2))
    counts = compare(run, filled, case.build(), batches)
    assert (counts.graphs, counts.breaks) == (1, 0)
    assert max(counts.loss, counts.gradient) <= 1e-5
    eager = patch_model(case.build(), pad_to_total=MULTIPLE)
    for batch in batches:
        eager(**batch)
    assert packing_stats(filled) == packing_stats(eager)


# ------------------------------------------------------------------- batches with dead tokens


SEQUENCES = [list(range(3, 3 + length)) for length in (5, 9, 2, 7)]


def test_a_collator_makes_streams_of_one_shape():
    plain, filling = (
        packed_collate_fn(16, "nf", stream=True, pad_to_total=total) for total in (None, 32)
    )
    model = patch_model(LLAMA.build())
    shapes = set()
    for count in (2, 3, 4):
        losses = []
        for collate in (plain, filling):
            batch = collate(SEQUENCES[:count])
            model.zero_grad()
            losses.append(model(**batch).loss)
            losses[-1].backward()
            losses.append(model.model.embed_tokens.weight.grad.clone())
        assert abs(losses[0] - losses[2]).item() <= ROUNDING
        assert (losses[1] - losses[3]).abs().max() <= ROUNDING * losses[1].abs().max()
        shapes.add((batch.input_ids.shape, batch.labels.shape, batch.cu_seqlens.shape))
        assert int(batch.dead_tokens) == 32 - sum(map(len, SEQUENCES[:count]))
    assert shapes == {((1, 32), (1, 32), (65,))}
    stats = packing_stats(model)
    assert stats.packed_tokens == stats.padded_tokens == 2 * (14 + 16 + 23)
    assert stats.dead_tokens == 18 + 16 + 9


def test_a_filled_batch_has_the_sequences_of_the_plain_one():
    plain, filled = (
        packed_collate_fn(16, "nf", stream=True, pad_to_total=total)(SEQUENCES)
        for total in (None, 32)
    )
    assert filled.attention_mask.sum() == 23
    assert torch.equal(filled.boundaries[0], plain.boundaries[0])
    for ours, theirs in (
        (filled.stream, plain),
        (filled.select([2, 0]), plain.select([2, 0])),
        (filled.padded(0), plain.padded(0)),
    ):
        assert ours.keys() == theirs.keys()
        torch.testing.assert_close(dict(ours), dict(theirs), rtol=0, atol=0)
    with pytest.raises(IndexError, match="from 0 to 3"):
        filled.select([4])
    shifted = packed_collate_fn(16, "nf", stream=True, pad_to_total=32, labels_shifted=True)
    assert shifted(SEQUENCES).labels.shape == (1, 32)
    assert "labels" not in shifted(SEQUENCES)


@needs_one_graph
def test_one_graph_with_constant_shapes():
    """Without ``dynamic=True``, there is no second graph."""
    case = smallest_case_of("LlamaForCausalLM")
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model, eager = patch_model(case.build()), patch_model(case.build())
    run = torch.compile(model, backend="eager", fullgraph=True)
    collate = packed_collate_fn(16, "nf", stream=True, pad_to_total=24)
    for count in (2, 3, 4):
        batch = collate(SEQUENCES[:count])
        assert abs(run(**batch).loss - eager(**batch).loss).item() <= ROUNDING
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert packing_stats(model) == packing_stats(eager)


@pytest.mark.parametrize("longest, budget", [(256, 4096), (1024, 4096), (1024, 16384)])
def test_an_epoch_of_the_sampler_has_one_shape_and_little_waste(longest, budget):
    """Less than 2 % of the tokens that are computed are dead."""
    lengths = np.random.default_rng(0).integers(8, longest, 4000)
    batches = [lengths[items] for items in TokenBudgetBatchSampler(lengths, budget)]
    collate = packed_collate_fn(budget, "nf", stream=True, pad_to_total=budget)
    filled = [collate([np.zeros(length, int) for length in batch]) for batch in batches[::20]]
    assert {batch.input_ids.shape for batch in filled} == {(1, budget)}
    totals = np.array([batch.sum() for batch in batches])
    assert set(-(-totals // budget)) == {1}
    assert 1 - totals.sum() / (budget * len(batches)) < 0.02


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("value, error", [(0, ValueError), (True, TypeError), (1.5, TypeError)])
def test_pad_to_total_must_be_a_positive_integer(value, error):
    for call in (
        lambda: patch_model(LLAMA.build(), pad_to_total=value),
        lambda: packed_collate_fn(8, stream=True, pad_to_total=value),
        lambda: TokenBudget(pad_to_total=value),
    ):
        with pytest.raises(error, match="pad_to_total must be"):
            call()


def test_what_dead_tokens_need():
    with pytest.raises(ValueError, match="pass stream=True for one row of all tokens"):
        packed_collate_fn(8, pad_to_total=8)
    with pytest.raises(ValueError, match="pad_to_total must be None with pack=False"):
        TokenBudget(pad_to_total=8, pack=False)
    ids = torch.arange(3, 9)[None]
    model = patch_model(LLAMA.build())
    with pytest.raises(ValueError, match="dead_tokens must be given with cu_seqlens"):
        model(input_ids=ids, labels=ids, dead_tokens=torch.tensor(2))


def test_a_second_patch_replaces_the_option():
    model = patch_model(LLAMA.build(), pad_to_total=MULTIPLE)
    model(**LLAMA.batch("right"))
    before = packing_stats(model).dead_tokens
    patch_model(model)
    model(**LLAMA.batch("right"))
    assert packing_stats(model).dead_tokens == before > 0
