"""Shards are written whole or not at all, and a run that is killed goes on to the same bytes."""

import io
import json
import os
import resource
import signal

import numpy as np
import pytest

from tokenpack.data import TokenShards
from tokenpack.data.shards import megatron
from tokenpack.data.shards.datatrove import write_metadata
from tokenpack.data.shards.writer import ShardWriter

from . import layouts

DOCUMENTS = [[5], [1, 2, 3], [], [60000, 7, 7, 7], [9, 9]]


def write(path, format="megatron", dtype="uint16", documents=DOCUMENTS, **options):
    with ShardWriter(path, format, dtype, **options) as shards:
        for document in documents:
            shards.write(np.array(document[:1], np.int64))
            shards.write(np.array(document[1:], np.int64))
            shards.end_document()
    return shards.path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_megatron_files_are_byte_for_byte_those_of_the_layout(tmp_path):
    for code, dtype in ((8, "<u2"), (4, "<i4"), (5, "<i8")):
        (tmp_path / "x").mkdir(exist_ok=True)
        layouts.megatron(tmp_path / "x/a", [[each] for each in DOCUMENTS], code, dtype)
        write(tmp_path / "a.bin", dtype=dtype, overwrite=True)
        for name, content in contents(tmp_path / "x").items():
            assert (tmp_path / name).read_bytes() == content
    assert not (tmp_path / "a.unfinished").exists()


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_datatrove_files_are_byte_for_byte_those_of_the_layout(tmp_path, dtype):
    (tmp_path / "x").mkdir()
    layouts.datatrove(tmp_path / "x/a.ds", DOCUMENTS, dtype, loss=[0, 1] * 5)
    with ShardWriter(tmp_path / "a", "datatrove", dtype, mask=True, tokenizer="gpt2") as shards:
        tokens = np.concatenate([np.array(each, np.int64) for each in DOCUMENTS])
        shards.write(tokens, np.arange(10) % 2 == 1)
        shards.end_documents(np.array([len(each) for each in DOCUMENTS]))
    expected = contents(tmp_path / "x")
    expected["a.ds.metadata"] = expected["a.ds.metadata"].replace(b"1 T", b"10.0 T")
    found = contents(tmp_path)
    assert {name: found[name] for name in expected} == expected


def test_a_document_longer_than_a_length_of_megatron_is_several_sequences(tmp_path, monkeypatch):
    monkeypatch.setattr(megatron, "MAX_SEQUENCE", 2)
    path = write(tmp_path / "a")
    shards = TokenShards(path)
    assert [each.tolist() for each in shards] == DOCUMENTS
    assert shards.files[0].details["sequences"] == 7


NUMBERS = {0: "0.00 T", 999: "999 T", 1500: "1.50 kT", 999_999: "1.00 MT", 12_345_678: "12.3 MT"}


@pytest.mark.parametrize(("count", "text"), [*NUMBERS.items(), (10**9, "1.00 GT")])
def test_numbers_in_the_metadata_are_for_people(count, text):
    file = io.BytesIO()
    write_metadata(file, "gpt2", 2, count)
    assert file.getvalue().decode() == f"gpt2|2\n{count}\n{text}"


def in_steps(path, steps):
    """Write two documents a step, with a checkpoint after each."""
    with ShardWriter(path, "datatrove", "uint16", mask=True, key={"steps": steps}) as shards:
        if shards.is_finished:
            return
        for step in range(shards.position.get("step", 0), steps):
            for length in (step, 3):
                tokens = np.arange(length) + step
                shards.write(tokens, tokens % 3 > 0)
                shards.end_document()
            shards.checkpoint({"step": step + 1})


def killed_after(calls, path, steps):
    """Run `in_steps` in a child that kills itself at the given call to the system. Returns whether
    it was killed."""
    child = os.fork()
    if not child:
        left = [calls]

        def counted(function):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        for owner, name in (
            (os, "fsync"),
            (ShardWriter, "_append"),
            (type(path), "replace"),
            (type(path), "write_text"),
            (type(path), "mkdir"),
            (type(path), "unlink"),
            (type(path), "rmdir"),
        ):
            setattr(owner, name, counted(getattr(owner, name)))
        in_steps(path, steps)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_a_run_that_is_killed_at_any_call_goes_on_to_the_same_bytes(tmp_path):
    folder = tmp_path / "expected"
    folder.mkdir()
    in_steps(folder / "a", 2)
    expected = contents(folder)
    assert len(expected) == 5
    at, killed = 0, True
    while killed:
        folder = tmp_path / str(at)
        folder.mkdir()
        killed = killed_after(at, folder / "a", 2)
        if killed:
            assert contents(folder).items() <= expected.items()
            state = folder / "a.unfinished/state.json"
            if state.exists() or not (folder / "a.ds").exists():
                in_steps(folder / "a", 2)
                assert not state.parent.exists()
        assert contents(folder) == expected
        at += 2
    assert at > 30


def test_a_run_with_another_key_is_refused(tmp_path):
    def stops():
        with ShardWriter(tmp_path / "a", "megatron", "u2", key={"n": 1}) as shards:
            shards.write(np.arange(3))
            shards.end_document()
            shards.checkpoint({"at": 3})
            shards.write(np.arange(5))  # lost
            raise KeyError

    with pytest.raises(KeyError):
        stops()
    assert not contents(tmp_path)
    with pytest.raises(ValueError, match=r"a.unfinished differs in n; remove that folder"):
        ShardWriter(tmp_path / "a", "megatron", "u2", key={"n": 2}).__enter__()
    with ShardWriter(tmp_path / "a", "megatron", "u2", key={"n": 1}) as shards:
        assert shards.position == {"at": 3}
        shards.write(np.arange(2))
    assert [each.tolist() for each in TokenShards(tmp_path / "a")] == [[0, 1, 2], [0, 1]]


def test_two_runs_at_once(tmp_path):
    with ShardWriter(tmp_path / "a", "megatron", "uint16", key={}) as shards:
        with pytest.raises(ValueError, match="out must not be in use, but another run writes"):
            ShardWriter(tmp_path / "a", "megatron", "uint16", key={}).__enter__()
        shards.write(np.arange(3))
    assert len(TokenShards(tmp_path / "a")[0]) == 3


def test_a_full_disk_is_an_error_that_names_the_file_and_the_next_run_goes_on(tmp_path):
    """A limit on the size of files stands for the disk."""

    def two_documents():
        with ShardWriter(tmp_path / "a", "megatron", "uint16", key={}) as shards:
            if not shards.position:
                shards.write(np.arange(3000))
                shards.end_document()
                shards.checkpoint({"done": 1})
            shards.write(np.arange(3000))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
        with pytest.raises(OSError, match=r"File too large.*a.unfinished/tokens"):
            two_documents()
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path / "b", documents=[range(5000)])  # without a key
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.name for path in tmp_path.iterdir()] == ["a.unfinished"]
    two_documents()
    assert [len(each) for each in TokenShards(tmp_path / "a")] == [3000, 3000]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out: cannot create the folder .*file/a.unfinished"):
        write(tmp_path / "file/a")
    with pytest.raises(ValueError, match="out: cannot create the folder /proc/"):
        write("/proc/tokenpack/a")


def test_arguments(tmp_path):
    write(tmp_path / "a")
    with pytest.raises(ValueError, match=r"new name, but .*a.tokenpack.json exists; remove it"):
        write(tmp_path / "a")
    assert not (tmp_path / "a.unfinished").exists()
    for message, arguments in (
        ("format must be one of megatron, datatrove, got 'npy'", ("b", "npy", "uint16")),
        ("out must not end in .ds for megatron", ("b.ds", "megatron", "uint16")),
        ("dtype must be uint16 or uint32 for datatrove, got int32", ("b", "datatrove", "int32")),
        ("one that Megatron has a code for", ("b", "megatron", "uint32")),
        ("out must be the name of a file", ("", "megatron", "uint16")),
    ):
        with pytest.raises(ValueError, match=message):
            ShardWriter(*arguments)
    with pytest.raises(ValueError, match="format must be datatrove to store a mask"):
        ShardWriter(tmp_path / "b", "megatron", "uint16", mask=True)
    for bad in ([-1], [65_536]):
        with pytest.raises(ValueError, match=f"from 0 to 65535 for uint16, got {bad[0]}"):
            write(tmp_path / "b", documents=[bad])
    with ShardWriter(tmp_path / "b", "megatron", "uint16") as shards:
        shards.write(np.arange(3))
        with pytest.raises(ValueError, match="lengths must sum to 3"):
            shards.end_documents(np.array([1]))
        with pytest.raises(ValueError, match="no document may be open"):
            shards.checkpoint({})
    about = json.loads((tmp_path / "a.tokenpack.json").read_text())
    assert (about["tokens"], about["documents"], about["dtype"]) == (10, 5, "uint16")
    assert not (tmp_path / "b.unfinished").exists()
