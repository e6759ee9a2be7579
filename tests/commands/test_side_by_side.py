"""The comparison: its statistics, its memory probe, and that both runs train alike."""

import copy

import pytest
import torch

from tokenpack.commands import side_by_side
from tokenpack.commands.models import DEMO_MODELS, SIZES
from tokenpack.commands.side_by_side import Comparison, TrainingLog, train_side_by_side
from tokenpack.cost import Operations
from tokenpack.samples.examples import random_batches
from tokenpack.samples.text import Text
from tokenpack.samples.tokenizer import train_tokenizer

CPU = torch.device("cpu")
TEXTS = [Text("Words. " * count + "\nMore of them.") for count in (1, 1, 2, 3, 5, 8, 13)]


def make_log(losses, seconds, operations):
    return TrainingLog(losses, seconds, seconds, [Operations(n, n) for n in operations])


def make_case(name):
    tokenizer = train_tokenizer([text.source for text in TEXTS], SIZES["tiny"].vocab_size)
    recipe = DEMO_MODELS[name]
    torch.manual_seed(0)
    model = recipe.build(SIZES["tiny"], tokenizer)
    examples = recipe.make_examples(TEXTS, tokenizer, SIZES["tiny"], 0).examples
    # Every batch holds all texts, so that the losses of the steps are comparable.
    return model, random_batches(examples, tokenizer, len(TEXTS), 3, seed=0)


def test_statistics():
    comparison = Comparison(
        padded=make_log([2.0, 4.0, 1.0], [4.0, 6.0, 90.0], [40, 80, 60]),
        packed=make_log([2.0, 3.0, 1.0], [2.0, 2.0, 2.0], [10, 20, 10]),
        slots=[100, 100, 200],
        tokens=[20, 40, 40],
        packed_calls=3,
        fallbacks={},
    )
    assert comparison.padding_share == 0.75
    assert comparison.padding_shares == [0.8, 0.6, 0.8]
    assert comparison.time_ratio == 3.0  # of 2, 3 and 45
    assert comparison.ideal_ratio == 4.0  # of 4, 4 and 6
    assert comparison.share_of_ideal == 0.75  # of 0.5, 0.75 and 7.5
    assert comparison.loss_differences == [0.0, 0.25, 0.0]
    assert comparison.tokens_per_second(comparison.padded) == 1.0


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_both_runs_train_alike(name):
    model, batches = make_case(name)
    start = copy.deepcopy(model.state_dict())
    losses = []
    comparison = train_side_by_side(model, batches, CPU, losses.append)
    assert len(losses) == 6
    assert sorted(losses) == sorted(comparison.padded.losses + comparison.packed.losses)
    assert max(comparison.loss_differences) < 1e-5
    assert comparison.padded.losses[-1] < comparison.padded.losses[0]
    assert any(not value.equal(start[key]) for key, value in model.state_dict().items())
    assert comparison.fallbacks == {}
    assert comparison.packed_calls == 5  # three steps, and two of the memory probe
    assert 0 < comparison.packed.peak_bytes < comparison.padded.peak_bytes
    for log in (comparison.padded, comparison.packed):
        assert all(
            0 < computed < whole
            for computed, whole in zip(log.forward_backward_seconds, log.step_seconds)
        )
    assert all(ratio > 1 for ratio in comparison.ideal_ratios)


def test_fallbacks_are_reported(monkeypatch):
    model, batches = make_case("llama")
    patch = side_by_side.patch_model

    def patch_with_attentions_requested(model):
        model.set_attn_implementation("eager")
        model.config.output_attentions = True
        return patch(model)

    monkeypatch.setattr(side_by_side, "patch_model", patch_with_attentions_requested)
    comparison = train_side_by_side(model, batches, CPU, lambda loss: None)
    assert comparison.packed_calls == 0
    assert sum(comparison.fallbacks.values()) == 5
