"""Predictions from round numbers, checked by hand."""

from dataclasses import replace

import pytest

from tokenpack.cost import (
    BatchCount,
    Ceilings,
    ModelCost,
    Traffic,
    forecast_seconds,
)

COST = ModelCost(2, 3, 5, 7, 11, attentions=4)
TRAFFIC = Traffic(
    moved_per_encoder_token=10,
    moved_per_decoder_token=20,
    moved_once=1000,
    loss_moved_per_token=50,
    logits_per_token=8,
    calls=100,
)
DEVICE = Ceilings(
    device="cpu",
    dtype="float32",
    products=6.0,
    attention=12.0,
    bytes=10.0,
    fresh_bytes=5.0,
    call=0.25,
    update=0.25,
    sequence=0.5,
    sequence_width=0.125,
    biased_sequence=2.0,
    biased_sequence_width=3.0,
    memory=10_000,
)
COUNT = BatchCount(100, 10, 1000, 40, 60, sequences=2)
PARAMETERS, WEIGHTS = 100, 6


def seconds(packed, device=DEVICE, traffic=TRAFFIC, cost=COST):
    return forecast_seconds(cost, traffic, COUNT, PARAMETERS, WEIGHTS, device, packed=packed)


def test_a_padded_step():
    step = seconds(packed=False)
    assert step.products == 6 * (2 * 100 + 3 * 10) / 6
    assert step.attention == 6 * (5 * 1000 + 7 * 40 + 11 * 60) / 12
    assert step.bytes == (1000 + 10 * 100 + 20 * 10 + 50 * 10) / 10
    assert step.optimizer == 28 * PARAMETERS / 10 + 0.25 * WEIGHTS
    assert step.calls == 25
    assert step.forward_backward == step.products + step.attention + step.bytes + 25
    assert step.total == step.forward_backward + step.optimizer


def test_a_packed_step_passes_over_logits_three_times_and_has_costs_per_sequence():
    step = seconds(packed=True)
    widths = (5 + 7 + 11) / 2  # of all layers: a pair costs two multiply-adds per unit of width
    assert step.attention == seconds(packed=False).attention + 2 * (4 * 0.5 + widths * 0.125)
    assert step.bytes == (1000 + 10 * 100 + 20 * 10 + 3 * 8 * 10) / 10


def test_sequences_cost_more_with_a_relative_bias():
    biased = replace(COST, biased_attentions=3)
    own, cross = (5 + 7) / 2, 11 / 2
    assert seconds(packed=True, cost=biased).attention == seconds(packed=False).attention + 2 * (
        1 * 0.5 + cross * 0.125 + 3 * 2.0 + own * 3.0
    )


def test_logits_above_the_mmap_threshold_take_longer():
    large = replace(TRAFFIC, logits_per_token=2**25)
    slow = seconds(packed=False, traffic=large).bytes
    assert slow - seconds(packed=False).bytes == pytest.approx(50 * 10 / 5 - 50 * 10 / 10)


def test_calls_overlap_with_the_work_of_a_gpu():
    gpu = seconds(packed=False, device=replace(DEVICE, device="a GPU"))
    assert gpu.forward_backward == gpu.products + gpu.attention + gpu.bytes
    slow = seconds(packed=False, device=replace(DEVICE, device="a GPU", call=1e6))
    assert slow.forward_backward == slow.calls
