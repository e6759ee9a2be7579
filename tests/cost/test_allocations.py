"""Peak memory of a call, measured."""

import pytest
import torch

from tokenpack.cost.allocations import peak_bytes


def test_peak_counts_memory_in_use_at_once_and_nothing_from_before():
    before = torch.zeros(1000, 1000)
    kilo = 1024

    def run():
        nonlocal before
        first = torch.empty(400 * kilo, dtype=torch.uint8)
        del first
        second = torch.empty(300 * kilo, dtype=torch.uint8)
        third = torch.empty(300 * kilo, dtype=torch.uint8)
        before = None
        return second, third

    assert peak_bytes(run, torch.device("cpu")) == pytest.approx(600 * kilo, rel=0.01)
