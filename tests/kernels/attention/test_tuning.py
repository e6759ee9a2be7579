"""The offline tuning script: its candidates, its choice and its output. Timing needs a GPU."""

import importlib.util
from itertools import chain
from pathlib import Path

import pytest
import torch

from tokenpack.kernels._triton import INTERPRETED
from tokenpack.kernels.attention import tiles
from tokenpack.kernels.attention.primitives import QUERY_PADDING
from tokenpack.kernels.attention.tiles import Tile, Tiles


@pytest.fixture(scope="module")
def tune():
    path = Path(__file__).parents[3] / "bench" / "tune_attention.py"
    spec = importlib.util.spec_from_file_location("tune_attention", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tiles, "table_of_device", lambda: tiles._TILES
        )  # that of Hopper, on any device
        yield module


def test_fastest_picks_a_tile_that_fits_and_restores_the_table(tune):
    before = {kernel: dict(rows) for kernel, rows in tiles._TILES.items()}

    def milliseconds(run):
        tile = tiles._TILES["dq"][64, 2].plain
        assert tiles._TILES["dq"][64, 2] == Tiles(tile, tile, tile, tile)
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
    for kernel in tune.KERNELS:
        found = set(tune.candidates(kernel))
        assert found >= {Tile(32, 128, 8, 2), Tile(16, 16, 8, 1)}
    for kernel in ("dkv", "dkv, grouped"):
        tables = (tiles._TILES, tiles._AMPERE, tiles._BLACKWELL)
        rows = (chain(*table[kernel].values()) for table in tables)
        found = [*tune.candidates(kernel), *chain(*rows)]
        assert all(tile.queries <= QUERY_PADDING.value for tile in found)
    assert set(tune.KERNELS) == set(tiles._TILES)


def test_a_row_has_the_syntax_of_the_table(tune):
    best = Tiles(Tile(128, 64, 8, 3), *3 * [Tile(32, 64, 4, 1)])
    assert eval("{" + tune.as_row((64, 2), best) + "}") == {(64, 2): best}


@pytest.mark.skipif(not INTERPRETED, reason="runs the kernels in Triton's interpreter")
def test_timed_calls_run(tune, monkeypatch):
    monkeypatch.setattr(tune, "ROWS", 2)
    monkeypatch.setattr(tune, "LONGEST", 20)
    for kernel, bias in zip(tune.KERNELS, (True, False, True, False), strict=True):
        first, *_ = tune.calls(kernel, 64, torch.float32, bias, 0.1, "cpu")()
        assert first.isfinite().all()
