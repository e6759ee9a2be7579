"""Plans of shards on disk: equal to plans merged in memory, and memory bounded by a shard."""

import resource
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tokenpack.packing import Packer, merge_results, merge_saved, pack_lengths, pack_shards


@pytest.mark.parametrize("overlong", ["split", "drop", "truncate"])
@pytest.mark.parametrize("strategy", ["obfd", "ffs", "nf"])
def test_a_plan_by_shards_is_the_merge_of_their_plans(tmp_path, overlong, strategy):
    lengths = np.random.default_rng(0).integers(0, 40, 1000)
    np.save(tmp_path / "lengths.npy", lengths)
    mapped = np.load(tmp_path / "lengths.npy", mmap_mode="r")
    packer = Packer(30, strategy, 5, overlong=overlong, drop_empty=True)
    parts = [packer.pack(lengths[first : first + 300]) for first in range(0, 1000, 300)]
    want = merge_results(parts)
    got = pack_shards(mapped, packer, tmp_path / "plan", shard_size=300)
    assert got == want
    assert (got.strategy, got.seed) == (strategy, 5 if strategy == "ffs" else None)
    for number, part in enumerate(parts):
        part.save(tmp_path / str(number))
    assert merge_saved([tmp_path / str(n) for n in range(4)], tmp_path / "merged") == want


def test_many_shards_are_merged_without_holding_them_open(tmp_path):
    plan = pack_lengths([3, 4, 5], 8, "nf")
    folders = [tmp_path / str(number) for number in range(60)]
    for folder in folders:
        plan.save(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 60, hard))
    try:
        merged = merge_saved(folders, tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert merged == merge_results([plan] * 60)


def test_all_sequences_of_a_shard_may_be_dropped(tmp_path):
    packer = Packer(8, overlong="drop")
    plan = pack_shards(np.array([9, 9, 3, 4, 9]), packer, tmp_path / "plan", shard_size=2)
    assert [members.tolist() for members in plan] == [[3, 2]]
    assert (plan.dropped.tolist(), plan.num_sequences) == ([0, 1, 4], 5)


def test_memory_depends_on_the_shard_only(tmp_path):
    peaks = []
    for count in (200_000, 800_000):
        lengths = np.lib.format.open_memmap(tmp_path / f"{count}.npy", "w+", np.uint16, (count,))
        lengths[:] = np.arange(count) % 700 + 1
        tracemalloc.start()
        pack_shards(lengths, Packer(2048), tmp_path / str(count), shard_size=50_000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] <= 1.1 * peaks[0]
    assert peaks[0] <= 100 * 50_000


def test_bad_shards(tmp_path):
    with pytest.raises(ValueError, match="at least one sequence"):
        pack_shards(np.empty(0, np.int64), Packer(8), tmp_path / "a")
    with pytest.raises(ValueError, match="shard_size must be from 1"):
        pack_shards(np.ones(3, np.int64), Packer(8), tmp_path / "a", shard_size=0)
    with pytest.raises(ValueError, match="at least one shard"):
        merge_saved([], tmp_path / "b")
    for capacity in (8, 9):
        pack_lengths([3], capacity).save(tmp_path / str(capacity))
    with pytest.raises(ValueError, match=r"one capacity, got \[8, 9\]"):
        merge_saved([tmp_path / "8", tmp_path / "9"], tmp_path / "c")
    with pytest.raises(FileNotFoundError):
        merge_saved([tmp_path / "none"], tmp_path / "d")
    # A failure half-way leaves no plan.
    with pytest.raises(ValueError, match=r"begins at 2: .* at most capacity = 8, got lengths\[0\]"):
        pack_shards(np.array([3, 3, 9]), Packer(8), tmp_path / "e", shard_size=2)
    assert not (tmp_path / "e" / "plan.json").exists()
