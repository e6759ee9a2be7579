"""Input in every supported form, and error messages for invalid input."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from tokenpack.packing import Packer, pack_lengths

pa = pytest.importorskip("pyarrow")
datasets = pytest.importorskip("datasets")
NAMES = [*Packer.strategies(), "auto"]


@pytest.mark.parametrize(
    "lengths",
    [
        np.array([3, 1, 2], np.uint8),
        np.array([3, 1, 2], np.int16)[::1],
        np.array([3, 0, 1, 0, 2])[::2],
        (3, 1, 2),
        torch.tensor([3, 1, 2]),
        torch.tensor([3, 1, 2], dtype=torch.int32),
        pa.array([3, 1, 2]),
        pa.chunked_array([[3], [1, 2]]),
        datasets.Dataset.from_dict({"length": [3, 1, 2]})["length"],
        datasets.Dataset.from_dict({"length": [2, 1, 3]}).select([2, 1, 0])["length"],
    ],
    ids=lambda lengths: type(lengths).__name__,
)
def test_every_kind_of_lengths(lengths):
    assert pack_lengths(lengths, 4, "nf").item_lengths.tolist() == [3, 1, 2]


def test_lengths_may_be_memory_mapped(tmp_path):
    np.save(tmp_path / "lengths.npy", np.array([3, 1, 2], np.uint16))
    lengths = np.load(tmp_path / "lengths.npy", mmap_mode="r")
    assert pack_lengths(lengths, 4, "nf").item_lengths.tolist() == [3, 1, 2]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "lengths, message",
    [
        ([2, -1, 3], r"lengths must not be negative, got lengths\[1\] = -1"),
        ([2, 0, 3, 0], r"lengths must be 1 or more, got lengths\[1\] = 0 and 1 more"),
        ([2, 3, 9], r"at most capacity = 8, got lengths\[2\] = 9"),
        ([], "at least one sequence, got none"),
        ([[1, 2], [3]], "one-dimensional, got a ragged"),
        ([[1, 2], [3, 4]], r"one-dimensional, got shape \(2, 2\)"),
    ],
)
def test_values_that_cannot_be_packed(name, lengths, message):
    with pytest.raises(ValueError, match=message):
        pack_lengths(lengths, 8, name)


@pytest.mark.parametrize(
    "lengths, message",
    [
        ([1.0, 2.5], r"integers, got float64: lengths\[1\] = 2.5"),
        ([1.0, float("nan")], r"lengths\[1\] = nan"),
        ([1.0, 2.0], "integers, got float64"),
        ([True, False], "integers, got bool"),
        (["3"], "integers, got <U1"),
        ([None, 3], "integers, got object"),
        ("12", "one per sequence, got str"),
        (7, "one per sequence, got int"),
        (pa.array([1, None]), "1 nulls"),
        (torch.ones(2, device="meta", dtype=torch.int64), "on the CPU, got a tensor on meta"),
    ],
)
def test_lengths_that_are_not_integers(lengths, message):
    with pytest.raises(TypeError, match=message):
        pack_lengths(lengths, 8)


def test_extreme_values_of_integer_types():
    narrow = np.array([3, 0, 5], np.uint8)
    plan = pack_lengths(narrow, 2048, overlong="truncate", drop_empty=True)
    assert plan.dropped.tolist() == [1]
    with pytest.raises(ValueError, match=r"below 2\*\*63, got lengths\[0\]"):
        pack_lengths(np.array([2**64 - 1, 5], np.uint64), 2**30, "nf", overlong="split")
    capacity = 2**31 - 1
    for name in ("auto", "bfd", "obfdp", "ffd", "nf"):
        assert pack_lengths([capacity, capacity // 2, 5], capacity, name).num_bins == 2


@pytest.mark.parametrize("seed, error", [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_seeds(seed, error):
    with pytest.raises(error, match="seed must be"):
        Packer(8, "ffs", seed)
    assert Packer(8, "ffs", np.int64(3)).pack([1]).seed == 3


@pytest.mark.parametrize("name", NAMES)
def test_empty_sequences_may_be_dropped(name):
    result = pack_lengths([2, 0, 3, 0], 8, name, drop_empty=True)
    assert sorted(result.items.tolist()) == [0, 2]
    assert result.dropped.tolist() == [1, 3]


@pytest.mark.parametrize(
    "capacity, error",
    [
        (0, ValueError),
        (-3, ValueError),
        (2.5, TypeError),
        (True, TypeError),
        (None, TypeError),
        (2**31, ValueError),
    ],
)
def test_capacities(capacity, error):
    with pytest.raises(error, match="capacity must be"):
        pack_lengths([1], capacity)


def test_options():
    with pytest.raises(ValueError, match="max_sequences must be from 1"):
        pack_lengths([1], 8, max_sequences=0)
    with pytest.raises(ValueError, match="window must be from 1"):
        pack_lengths([1], 8, window=0)
    with pytest.raises(ValueError, match="overlong must be one of error, truncate, split, drop"):
        pack_lengths([1], 8, overlong="cut")
    with pytest.raises(ValueError, match="max_sequences must be None with strategy mffd"):
        pack_lengths([1], 8, "mffd", max_sequences=2)
    with pytest.raises(ValueError, match=r"one of nf \(next_fit\).*hk \(harmonic\), got 'best'"):
        pack_lengths([1], 8, "best")
    with pytest.raises(ValueError, match="a sequence that is not dropped, got 2 sequences"):
        pack_lengths([9, 9], 8, overlong="drop")


def test_strategies_by_textbook_name():
    for name in ("First-Fit Decreasing", "first_fit_decreasing", "FFD"):
        assert Packer(8, name).strategy == "ffd"
    assert Packer(8).strategy == "auto"
    assert set(Packer.strategies()) == {
        *("nf", "ff", "bf", "wf", "ffd", "bfd", "ffs", "mffd", "obfd", "obfdp", "hk")
    }


def test_the_input_is_not_modified():
    lengths = np.array([5, 3, 8, 2])
    for name in NAMES:
        pack_lengths(lengths, 8, name)
    assert lengths.tolist() == [5, 3, 8, 2]


@pytest.mark.parametrize("module", ["packing", "checks", "segments", "files"])
def test_planning_imports_numpy_only(module):
    code = f"""
import sys
before = set(sys.modules)
import tokenpack.{module}
added = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*sorted(added - set(sys.stdlib_module_names)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["numpy", "tokenpack"]
