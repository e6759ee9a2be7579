"""The offline tuning script: its candidates, its choice and its output. Timing needs a GPU."""

import importlib.util
from pathlib import Path

import pytest
import torch

from tokenpack.kernels._triton import INTERPRETED
from tokenpack.kernels.attention import tiles
from tokenpack.kernels.attention.tiles import Tile


@pytest.fixture(scope="module")
def tune():
    path = Path(__file__).parents[3] / "bench" / "tune_attention.py"
    spec = importlib.util.spec_from_file_location("tune_attention", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_fastest_picks_a_tile_that_fits_and_restores_the_table(tune):
    before = {kernel: dict(rows) for kernel, rows in tiles._TILES.items()}

    def milliseconds(run):
        tile = tiles._TILES["dq"][64, 2][0]
        assert tiles._TILES["dq"][64, 2] == (tile, tile)
        if tile.queries == 64:
            raise RuntimeError("out of resource: shared memory")
        return abs(tile.queries - 40) + abs(tile.keys - 64) + tile.warps + tile.stages

    assert tune.fastest("dq", (64, 2), None, milliseconds) == Tile(32, 64, 4, 1)
    assert before == tiles._TILES

    def broken(run):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        tune.fastest("dq", (64, 2), None, broken)
    assert before == tiles._TILES


def test_candidates_meet_the_kernels_constraints(tune):
    assert all(tile.queries <= tile.keys for tile in tune.candidates("dq"))
    for kernel in tune.KERNELS:
        assert set(tune.candidates(kernel)) >= {Tile(32, 64, 8, 2), Tile(16, 16, 8, 1)}
    assert set(tune.KERNELS) == set(tiles._TILES)


def test_a_row_has_the_syntax_of_the_table(tune):
    text = tune.as_row((64, 2), Tile(128, 64, 8, 3), Tile(32, 64, 4, 1))
    assert eval("{" + text + "}") == {(64, 2): (Tile(128, 64, 8, 3), Tile(32, 64, 4, 1))}
    rows = tiles._TILES["forward"]
    assert tune.as_row((64, 2), *rows[64, 2]) in Path(tiles.__file__).read_text()


@pytest.mark.skipif(not INTERPRETED, reason="runs the kernels in Triton's interpreter")
def test_timed_calls_run(tune, monkeypatch):
    monkeypatch.setattr(tune, "ROWS", 2)
    monkeypatch.setattr(tune, "LONGEST", 20)
    for kernel in tune.KERNELS:
        first, *_ = tune.calls(kernel, 64, torch.float32, 0.1, "cpu")()
        assert first.isfinite().all()
