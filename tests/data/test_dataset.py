"""Packing into datasets: rows, columns, the cache, threads and errors."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tokenpack.data import collate_packed_rows, pack_dataset, pack_dataset_from_result
from tokenpack.packing import pack_lengths

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")

TOKENS = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11, 12]]


def kinds():
    yield "lists", TOKENS
    yield "arrays", [np.array(each, np.uint16) for each in TOKENS]
    yield "tensors", [torch.tensor(each) for each in TOKENS]
    yield "arrow", pa.array(TOKENS)
    yield "large arrow", pa.array(TOKENS, pa.large_list(pa.int32()))
    yield "chunks", pa.chunked_array([TOKENS[:1], TOKENS[1:]])
    dataset = datasets.Dataset.from_dict({"input_ids": TOKENS})
    yield "column", dataset["input_ids"]
    yield "selected column", dataset.select([3, 2, 1, 0]).select([3, 2, 1, 0])["input_ids"]
    joined = datasets.concatenate_datasets([dataset.select([0]), dataset.select([1, 2, 3])])
    yield "joined column", joined["input_ids"]


@pytest.mark.parametrize("token_ids", [pytest.param(v, id=name) for name, v in kinds()])
def test_rows(token_ids):
    rows = pack_dataset(token_ids, 8, "nf", progress=False)
    assert rows[:] == {
        "input_ids": [[1, 2, 3, 4, 5, 0, 0, 0], [6, 7, 8, 9, 10, 11, 12, 0]],
        "attention_mask": [[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0]],
        "labels": [[-100, 2, 3, -100, 5, -100, -100, -100], [-100, 7, 8, 9, -100, 11, 12, -100]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 0]],
        "seq_lengths": [[3, 2], [4, 3]],
    }
    assert {name: str(feature.feature.dtype) for name, feature in rows.features.items()} == {
        "input_ids": "int32",
        "attention_mask": "int8",
        "labels": "int32",
        "position_ids": "int32",
        "seq_lengths": "int32",
    }


def test_own_labels_padding_and_columns():
    labels = [[-100, 2, 3], [4, 5], [-100, -100, 8, 9], [10, 11, 12]]
    rows = pack_dataset(
        *(TOKENS, 8, "nf"),
        padding_value=99,
        label_padding_value=-1,
        labels=labels,
        columns=("labels", "input_ids"),
        progress=False,
    )
    assert rows.column_names == ["labels", "input_ids"]
    assert rows[:] == {
        "input_ids": [[1, 2, 3, 4, 5, 99, 99, 99], [6, 7, 8, 9, 10, 11, 12, 99]],
        "labels": [[-1, 2, 3, -1, 5, -1, -1, -1], [-1, -100, 8, 9, -1, 11, 12, -1]],
    }


def test_tokens_past_32_bits_are_kept():
    rows = pack_dataset([[2**40, 1]], 4, progress=False)
    assert rows[0]["input_ids"] == [2**40, 1, 0, 0]


@pytest.mark.parametrize("overlong", ["truncate", "split", "drop"])
def test_overlong_sequences(overlong):
    rows = pack_dataset(
        [[1, 2, 3, 4, 5], [], [6]], 3, "nf", overlong=overlong, drop_empty=True, progress=False
    )
    assert (
        rows["input_ids"][:]
        == {
            "truncate": [[1, 2, 3], [6, 0, 0]],
            "split": [[1, 2, 3], [4, 5, 6]],
            "drop": [[6, 0, 0]],
        }[overlong]
    )


def test_a_plan_made_beforehand_and_plans_that_do_not_match():
    result = pack_lengths([3, 2, 4, 3], 8, "bfd")
    rows = pack_dataset_from_result(result, TOKENS, progress=False)
    assert rows["seq_lengths"][:] == [[len(TOKENS[i]) for i in members] for members in result]
    with pytest.raises(ValueError, match="must hold the 4 sequences that were planned, got 3"):
        pack_dataset_from_result(result, TOKENS[:3])
    with pytest.raises(ValueError, match=r"token_ids\[\d\] must be of the planned length"):
        pack_dataset_from_result(result, TOKENS[::-1])
    # A truncated or split sequence does not hide a wrong length elsewhere.
    for overlong in ("truncate", "split"):
        result = pack_lengths([2, 3, 9], 8, "nf", overlong=overlong)
        for wrong in ([8, 3, 9], [2, 3, 7], [2, 3, 20][: 3 if overlong == "split" else 0]):
            with pytest.raises(ValueError, match=r"of the planned length|must hold"):
                pack_dataset_from_result(result, [[1] * length for length in wrong] or [[1]])


def test_several_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    tokens = [rng.integers(1, 99, n) for n in rng.integers(1, 30, 300)]
    whole = pack_dataset(tokens, 32, progress=False)
    monkeypatch.setattr("tokenpack.data.packed.dataset._BLOCK_TOKENS", 100)
    for num_proc in (None, 1, 3):
        assert pack_dataset(tokens, 32, num_proc=num_proc, progress=False)[:] == whole[:]


def test_rows_on_disk_are_reused(tmp_path, monkeypatch):
    want = pack_dataset(TOKENS, 8, "nf", progress=False)
    first = pack_dataset(TOKENS, 8, "nf", cache_dir=tmp_path, progress=False)
    assert first[:] == want[:]
    assert first.features == want.features
    (file,) = tmp_path.iterdir()
    assert [entry["filename"] for entry in first.cache_files] == [str(file)]

    def never(*_):
        raise AssertionError("made again")

    with monkeypatch.context() as patched:
        patched.setattr("tokenpack.data.packed.dataset._RowMaker.__call__", never)
        assert pack_dataset(TOKENS, 8, "nf", cache_dir=tmp_path, progress=False)[:] == want[:]
    # A change that affects a row makes another file.
    others = (
        {"padding_value": 1},
        {"label_padding_value": -1},
        {"columns": ("input_ids",)},
        {"labels": [[0] * len(each) for each in TOKENS]},
        {"strategy": "bfd"},
    )
    for count, change in enumerate(others, start=2):
        options = {"strategy": "nf", **change}
        pack_dataset(TOKENS, 8, cache_dir=tmp_path, progress=False, **options)
        assert len(list(tmp_path.iterdir())) == count
    pack_dataset([*TOKENS[:3], [10, 11, 13]], 8, "nf", cache_dir=tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == len(others) + 2


def test_a_damaged_file_is_made_again(tmp_path):
    want = pack_dataset(TOKENS, 8, "nf", cache_dir=tmp_path, progress=False)[:]
    (file,) = tmp_path.iterdir()
    for content in (b"", file.read_bytes()[:40]):
        file.unlink()
        file.write_bytes(content)
        assert pack_dataset(TOKENS, 8, "nf", cache_dir=tmp_path, progress=False)[:] == want


def test_rows_that_were_cut_between_record_batches_are_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr("tokenpack.data.packed.dataset._BLOCK_TOKENS", 4)
    packed = pack_dataset(TOKENS, 4, cache_dir=tmp_path, progress=False)
    whole, (path,) = packed[:], tmp_path.iterdir()
    del packed
    with pa.memory_map(str(path)) as file:
        pa.ipc.open_stream(file).read_next_batch()
        end = file.tell()
    with path.open("r+b") as file:
        file.truncate(end)
    assert len(datasets.Dataset.from_file(str(path))) < len(whole["input_ids"])
    assert pack_dataset(TOKENS, 4, cache_dir=tmp_path, progress=False)[:] == whole


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_the_mode_of_rows_on_disk_follows_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        pack_dataset(TOKENS, 4, cache_dir=tmp_path, progress=False)
    finally:
        os.umask(before)
    (path,) = tmp_path.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_concurrent_writers_do_not_collide(tmp_path):
    def pack(_):
        return pack_dataset(TOKENS, 8, "nf", cache_dir=tmp_path, progress=False)[:]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(pack, range(12)))
    assert all(result == results[0] for result in results)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failed_run_leaves_no_file(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("stopped")

    monkeypatch.setattr("tokenpack.data.packed.dataset._RowMaker._column", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        pack_dataset(TOKENS, 8, cache_dir=tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_bar_counts_rows(capsys):
    pack_dataset(TOKENS, 8, "nf", progress=True)
    assert "Packing: 100%" in capsys.readouterr().err
    pack_dataset(TOKENS, 8, "nf", progress=False)
    assert capsys.readouterr().err == ""


def test_collated_rows_have_the_boundaries_of_each_sequence():
    batch = collate_packed_rows(list(pack_dataset(TOKENS, 8, "nf", progress=False)))
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 9, 12]
    assert batch.input_ids.shape == (2, 8)


def test_bad_input():
    with pytest.raises(ValueError, match="columns must be one or more of input_ids"):
        pack_dataset(TOKENS, 8, columns=("ids",))
    with pytest.raises(ValueError, match="columns must be one or more of"):
        pack_dataset(TOKENS, 8, columns=())
    with pytest.raises(ValueError, match="num_proc must be from 1"):
        pack_dataset(TOKENS, 8, num_proc=0)
    with pytest.raises(ValueError, match=r"labels\[1\] must be as long as token_ids\[1\]"):
        pack_dataset(TOKENS, 8, labels=[TOKENS[0], [4], *TOKENS[2:]])
    with pytest.raises(ValueError, match="at most capacity = 3"):
        pack_dataset(TOKENS, 3)
    with pytest.raises(ValueError, match=r"token_ids\[1\] must hold at least one token"):
        pack_dataset([[1], []], 3)
    with pytest.raises(TypeError, match="padding_value must be an integer"):
        pack_dataset(TOKENS, 8, padding_value=None)
    with pytest.raises(ValueError, match="below 2\\*\\*63"):
        pack_dataset([np.array([2**63 + 5], np.uint64)], 8)
    with pytest.raises(ValueError, match="each once"):
        pack_dataset(TOKENS, 8, columns=("labels", "labels"))
    with pytest.raises(TypeError, match=r"token_ids\[0\]\[1\] must be an integer"):
        pack_dataset([[1, 2.5]], 8)
