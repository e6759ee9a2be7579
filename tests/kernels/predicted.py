"""The clocks of a whole attention call with T5's bias, compared with one without, by the model.

Tiles come from the loops as the interpreter runs them (`loop_trips`), and clocks per tile from the
machine code of the same loops (`tile_counts`): the serial ceiling turned round. Work outside of the
loops is not counted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from .tile_counts import GPUS, NEEDED_PRODUCTS, LoopCount

ROOT = Path(__file__).parents[2]
# The kinds of calls that `compile_cases` compiles for this, by (causal, bias).
CASES = {
    (False, False): "plain",
    (False, True): "bias",
    (True, False): "causal",
    (True, True): "bias, causal",
}
KERNELS = dict(
    zip(("forward", "dq", "dk and dv"), (name for name in NEEDED_PRODUCTS if "attention" in name))
)


class Prediction(NamedTuple):
    """One sequence and head. Ratios are clocks with a bias over clocks without."""

    tokens: int
    head_dim: int
    direction: str
    clocks: int  # of an SM with a bias, forward and backward
    forward: float
    dq: float
    dkv: float
    backward: float
    both: float

    def line(self) -> str:
        """The row in Markdown."""
        cells = (f"{value:.2f}" if isinstance(value, float) else str(value) for value in self)
        return f"| {' | '.join(cells)} |"


def trips() -> list[dict]:
    """The tiles of all loops, from a process that runs the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-m", "tests.kernels.loop_trips"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def clocks_of_tiles(counts: list[LoopCount]) -> dict[tuple[str, str, str], float]:
    """SM clocks of one tile, by kernel, case and kind of loop. Equal kinds give their mean."""
    found: dict[tuple[str, str, str], list[float]] = {}
    gpu = GPUS["sm_90"]
    for row in counts:
        if row.target != "sm_90" or not row.case.endswith("bf16"):
            continue
        queries, keys = map(int, row.tile.split(",")[0].split(" x "))
        head_dim = int(row.case.split(", ")[-2])
        products = NEEDED_PRODUCTS[row.kernel] * 2 * queries * keys * head_dim
        clocks = products / 4096 * gpu.peak / row.serial
        found.setdefault((row.kernel, row.case, row.kind), []).append(clocks)
    return {key: sum(each) / len(each) for key, each in found.items()}


def predict(counts: list[LoopCount]) -> list[Prediction]:
    """A row per length, head_dim and direction."""
    of_tile, found = clocks_of_tiles(counts), {}
    for call in trips():
        case = f"attention, {CASES[call['causal'], call['bias']]}, {call['head_dim']}, bf16"
        key = call["length"], call["head_dim"], "causal" if call["causal"] else "both directions"
        found[(*key, call["bias"])] = {
            name: sum(n * of_tile[kernel, case, kind] for kind, n in tiles.items() if n)
            for name, kernel in KERNELS.items()
            for tiles in [call["tiles"][kernel]]
        }
    rows = []
    for *key, bias in found:
        if bias:
            ours, plain = found[(*key, True)], found[(*key, False)]
            parts = [ours[name] / plain[name] for name in KERNELS]
            backward = (ours["dq"] + ours["dk and dv"]) / (plain["dq"] + plain["dk and dv"])
            total = sum(ours.values())
            rows.append(
                Prediction(*key, round(total), *parts, backward, total / sum(plain.values()))
            )
    return rows
