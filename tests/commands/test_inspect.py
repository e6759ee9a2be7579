"""Padding and speed-up, computed by hand."""

import numpy as np
import pytest

from tokenpack.commands import inspect
from tokenpack.cost import ModelCost

# One multiply-add per decoder token and pair, two per encoder token, nothing across.
COST = ModelCost(2, 1, 0, 1, 0)


def test_sorted_batches_of_a_decoder_only_model():
    lengths = inspect.TextLengths(None, np.array([5, 1, 4, 2, 3]))
    gain = inspect.packing_gain(lengths, 2, COST, seed=None)
    # Batches 1 2 | 3 4 | 5: 4 + 8 + 5 slots for 15 tokens.
    assert gain.padding_share == pytest.approx(1 - 15 / 17)
    assert gain.linear_speed_up == pytest.approx(17 / 15)
    pairs_padded = 2 * 4 + 2 * 16 + 25
    assert gain.speed_up == pytest.approx((17 + pairs_padded) / (15 + 55))


def test_sorted_batches_of_an_encoder_decoder():
    lengths = inspect.TextLengths(np.array([3, 1, 2, 4]), np.array([1, 5, 2, 3]))
    gain = inspect.packing_gain(lengths, 2, COST, seed=None)
    # In order of the encoder's lengths: (1, 5) (2, 2) | (3, 1) (4, 3).
    encoder_slots, decoder_slots = 2 * 2 + 2 * 4, 2 * 5 + 2 * 3
    assert gain.padding_share == pytest.approx(1 - 21 / (encoder_slots + decoder_slots))
    assert gain.linear_speed_up == pytest.approx(
        (2 * encoder_slots + decoder_slots) / (2 * 10 + 11)
    )


def test_random_batches_depend_on_the_seed_and_waste_more():
    lengths = inspect.TextLengths(None, np.arange(1, 1001))
    first, again, other = (inspect.packing_gain(lengths, 16, COST, seed) for seed in (0, 0, 1))
    assert first == again != other
    # The largest of 16 draws from 1 .. n is about 16 / 17 n; the mean is half of n.
    assert first.padding_share == pytest.approx(1 - 0.5 / (16 / 17), abs=0.02)
    assert inspect.packing_gain(lengths, 16, COST, seed=None).padding_share < 0.02


def test_one_batch_of_all_is_the_same_in_any_order():
    lengths = inspect.TextLengths(None, np.array([7, 2]))
    shuffled, in_order = (inspect.packing_gain(lengths, 128, COST, seed) for seed in (0, None))
    assert shuffled.padding_share == pytest.approx(in_order.padding_share)


def test_histogram_counts_every_text():
    values = np.array([0, 1, 1, 2, 5000])
    lines = inspect._histogram(values).splitlines()
    counts = [
        int(line.split("  ")[-2 if "#" in line else -1].strip().replace(",", "")) for line in lines
    ]
    assert sum(counts) == 5
