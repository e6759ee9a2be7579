"""A command that a signal ends: one line, and nothing half written."""

import os
import signal

import pytest

from tokenpack.cli import main
from tokenpack.commands import pack
from tokenpack.data.packed import dataset

from .test_pack import TOKENS, rows_of, run, write_lines

fcntl = pytest.importorskip("fcntl")


@pytest.fixture(autouse=True)
def interrupts_arrive():
    """Take SIGINT, which the background jobs of a shell ignore from the start."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture
def tokens(tmp_path):
    return write_lines(tmp_path / "tokens.jsonl", [{"input_ids": ids} for ids in TOKENS])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", ["rows", "report", "cleanup"])
def test_a_signal_leaves_no_output_and_the_next_run_succeeds(
    number, where, tokens, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}

    def interrupted(function):
        def call(*arguments, **options):
            result = function(*arguments, **options)
            os.kill(os.getpid(), number)
            return result

        return call

    with monkeypatch.context() as patched:
        if where == "report":
            patched.setattr(pack, "write_json", interrupted(pack.write_json))
        else:
            patched.setattr(dataset, "_make_blocks", interrupted(dataset._make_blocks))
        if where == "cleanup":  # a second signal does not stop it
            patched.setattr(pack, "empty", interrupted(pack.empty))
        assert run(tokens, out) == 128 + number
    assert not out.exists()
    error = capsys.readouterr().err
    assert error.splitlines()[-1] == f"tokenpack: ended by {number.name}"
    assert "Traceback" not in error
    assert {each: signal.getsignal(each) for each in before} == before
    assert run(tokens, out) == 0
    assert len(rows_of(out)["input_ids"]) == 2


def test_what_a_killed_run_left_does_not_block_the_next(tokens, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "plan").mkdir(parents=True)
    (out / f"packed-0123456789abcdef.arrow.{'0' * 32}.partial").write_bytes(b"cut")
    (out / "plan" / "items.npy").write_bytes(b"cut")
    assert run(tokens, out) == 0
    assert {path.suffix for path in out.iterdir()} <= {".arrow", ".json", ".png"}
    assert run(tokens, out) == 2  # a whole output is never replaced
    assert "OUT must be a new or empty folder" in capsys.readouterr().err


def test_two_runs_do_not_write_one_folder(tokens, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert run(tokens, out) == 2
    assert "OUT must not be in use, but another run writes" in capsys.readouterr().err
    os.close(descriptor)
    assert run(tokens, out) == 0


def test_a_handler_of_the_caller_stays(tokens, tmp_path, monkeypatch):
    calls = []
    previous = signal.signal(signal.SIGTERM, lambda *_: calls.append(1))
    try:
        write_json = pack.write_json
        monkeypatch.setattr(
            pack, "write_json", lambda *a: (os.kill(os.getpid(), signal.SIGTERM), write_json(*a))
        )
        assert main(["pack", str(tokens), str(tmp_path / "out"), "--capacity", "8"]) == 0
        assert calls == [1]
    finally:
        signal.signal(signal.SIGTERM, previous)
