"""Ceilings: measured, written, read back, and refused if the file is not valid."""

import json
from dataclasses import asdict

import pytest
import torch

from tokenpack.cost import ceilings, measure_ceilings, read_ceilings, write_ceilings


@pytest.fixture(scope="module")
def measured():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ceilings._best, "__defaults__", (0.05,))  # seconds for each measurement
        return measure_ceilings("cpu")


def test_a_cpu_is_measured(measured):
    assert measured.device == "cpu"
    assert not measured.on_gpu
    assert measured.torch_dtype == torch.float32
    numbers = [value for value in asdict(measured).values() if not isinstance(value, str)]
    assert all(number >= 0 for number in numbers)
    # True of any machine that can run this test, and false if a rate is off by a factor of 1,000.
    assert 1e9 < measured.products < 1e14
    assert 1e8 < measured.bytes < 1e12
    assert 1e-8 < measured.call < 1e-3


def test_ceilings_survive_a_round_trip(measured, tmp_path):
    path = tmp_path / "ceilings.json"
    write_ceilings(measured, path)
    assert read_ceilings(path) == measured


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"products": "fast"}, "products must be a number"),
        ({"bytes": -1}, "bytes must be a number"),
        ({"dtype": "int8"}, "dtype must be float32"),
        ({"more": 1}, "must be a JSON object with"),
    ],
)
def test_other_files_are_refused(measured, tmp_path, change, message):
    path = tmp_path / "ceilings.json"
    path.write_text(json.dumps({**asdict(measured), **change}))
    with pytest.raises(ValueError, match=message):
        read_ceilings(path)
    path.write_text("not json")
    with pytest.raises(ValueError, match="must be a JSON file"):
        read_ceilings(path)
