"""Files are written whole or not at all, and arrays grow in place."""

import os

import numpy as np
import pytest

from tokenpack.files import NpyWriter, written_whole


def test_a_file_is_replaced_when_the_block_succeeds(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with written_whole(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def write_half(path):
    with written_whole(path) as partial:
        partial.write_text("ne")
        raise RuntimeError("half-way")


@pytest.mark.parametrize("old", [None, "old"])
def test_a_block_that_raises_leaves_the_folder_as_it_was(tmp_path, old):
    path = tmp_path / "file"
    if old is not None:
        path.write_text(old)
    with pytest.raises(RuntimeError, match="half-way"):
        write_half(path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ([] if old is None else [old])


def test_two_writers_of_one_path_do_not_share_a_temporary_file(tmp_path):
    path = tmp_path / "file"
    with written_whole(path) as first:
        with written_whole(path) as second:
            second.write_text("second")
        first.write_text("first")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_the_mode_of_a_file_follows_the_umask(tmp_path, umask, mode):
    path = tmp_path / "file"
    before = os.umask(umask)
    try:
        with written_whole(path) as partial:
            partial.write_text("new")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
@pytest.mark.parametrize("parts", [[], [[]], [[1, 2], [], [3]], [range(100), range(7)]])
@pytest.mark.parametrize("mmap_mode", [None, "r"])
def test_an_array_written_in_parts_comes_back(tmp_path, dtype, parts, mmap_mode):
    path = tmp_path / "array.npy"
    writer = NpyWriter(path, dtype)
    for part in parts:
        writer.append(np.array(part, np.int64))
    writer.close()
    writer.close()
    back = np.load(path, mmap_mode=mmap_mode)
    assert back.dtype == dtype
    assert back.tolist() == [value for part in parts for value in part]


def test_a_strided_part_is_written_in_order(tmp_path):
    writer = NpyWriter(tmp_path / "array.npy", np.int32)
    writer.append(np.arange(10)[::-3])
    writer.close()
    assert np.load(tmp_path / "array.npy").tolist() == [9, 6, 3, 0]
