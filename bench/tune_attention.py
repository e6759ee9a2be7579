"""Time tiles for the attention kernels on this GPU, and print rows for their table.

    python bench/tune_attention.py [--dtype bf16|fp16|fp32] [--head-dim 64 128 256]

For each kernel and head_dim it times all candidate tiles on 32 sequences of log-normal lengths up
to 2048, with and without a bias and dropout. It prints the fastest tiles as a row of the table in
`kernels/attention/tiles.py`. tokenpack does not tune at run time. Copy the row into the table, and
check with `make compile` that it does not spill.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from tokenpack.kernels.attention import op, tiles
from tokenpack.kernels.attention.primitives import QUERY_PADDING
from tokenpack.kernels.attention.tiles import Tile, Tiles

KERNELS = ("forward", "dq", "dkv", "dkv, grouped")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEADS, ROWS, LONGEST = 16, 32, 2048

Run = Callable[[], object]


def candidates(kernel: str) -> Iterator[Tile]:
    """All tiles to time."""
    sizes = (16, 32, 64, 128)
    for queries, keys, warps, stages in itertools.product(sizes, sizes, (4, 8), (1, 2, 3)):
        if kernel.startswith("dkv") and queries > QUERY_PADDING.value:
            continue
        if queries * keys >= 256:
            yield Tile(queries, keys, warps, stages)


@contextmanager
def using(kernel: str, row: tuple[int, int], tile: Tile) -> Iterator[None]:
    """Replace a row of a kernel in this GPU's table for the duration of a block."""
    rows = tiles.table_of_device()[kernel]
    before = rows.get(row)  # only Hopper's table has rows for float32
    rows[row] = Tiles(tile, tile, tile, tile)
    try:
        yield
    finally:
        if before is None:
            del rows[row]
        else:
            rows[row] = before


def fastest(
    kernel: str, row: tuple[int, int], run: Run, milliseconds: Callable[[Run], float]
) -> Tile:
    """The candidate that makes ``run`` fastest. Skips candidates that do not fit the device."""
    times = {}
    for tile in candidates(kernel):
        with using(kernel, row, tile):
            try:
                times[tile] = milliseconds(run)
            except Exception as error:  # Triton has several types for out of resources
                if "resource" not in str(error).lower():
                    raise
    return min(times, key=times.__getitem__)


def as_row(row: tuple[int, int], best: Tiles) -> str:
    """A row in the syntax of the table."""
    return f"        {row}: Tiles({', '.join(f'Tile{tuple(tile)}' for tile in best)}),"


def calls(
    kernel: str, head_dim: int, dtype: torch.dtype, bias: bool, dropout_p: float, device: str
) -> Run:
    """A function that runs the forward or the backward of one layer."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(ROWS, generator=generator) * 0.8).exp() * LONGEST / 6
    lengths = lengths.long().clamp(1, LONGEST)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int().to(device)
    total = int(lengths.sum())
    kv_heads = HEADS // 4 if kernel == "dkv, grouped" else HEADS
    q, dout = (torch.randn(total, HEADS, head_dim, dtype=dtype, device=device) for _ in "qd")
    k, v = (torch.randn(total, kv_heads, head_dim, dtype=dtype, device=device) for _ in "kv")
    table = torch.randn(HEADS, 257, device=device) if bias else None
    seed = torch.ones(1, dtype=torch.int64, device=device)
    rest = (bounds, bounds, table, seed, head_dim**-0.5, -1, -1, 0.0, dropout_p)
    if kernel == "forward":
        return lambda: op.varlen_attention_triton(q, k, v, *rest)
    out, lse = op.varlen_attention_triton(q, k, v, *rest)
    return lambda: op.varlen_attention_backward_triton(dout, q, k, v, out, lse, *rest, bias)


def main() -> int:
    """Time the tiles and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--head-dim", type=int, nargs="+", default=[64, 128, 256], choices=[64, 128, 256]
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("this script needs a CUDA device", file=sys.stderr)
        return 2
    from triton.testing import do_bench

    def milliseconds(run: Run) -> float:
        return do_bench(run, return_mode="median")

    dtype = DTYPES[arguments.dtype]
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}")
    for kernel in KERNELS:
        print(f'    "{kernel}":')
        for head_dim in arguments.head_dim:
            row = (head_dim, dtype.itemsize)
            best = Tiles(
                *(
                    fastest(
                        kernel,
                        row,
                        calls(kernel, head_dim, dtype, bias, dropout_p, "cuda"),
                        milliseconds,
                    )
                    for dropout_p in (0.0, 0.1)
                    for bias in (False, True)
                )
            )
            print(as_row(row, best), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
