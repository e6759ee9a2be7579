"""How the attention kernels divide the work: tile sizes, and a grid that needs no lengths.

Sequence s of a packed batch owns the tile numbers from ``cu_seqlens[s] // size + s`` on. A sequence
never needs more tiles than there are numbers before the next sequence's first number. Therefore
``total // size + num_seqs`` programs suffice for all lengths, and each program finds its sequence
by a binary search in ``cu_seqlens``. This needs no table of tiles, no copy to the host, and no new
grid for a new batch of the same size. The few programs without a tile return at once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .._triton import INTERPRETED, next_power_of_2, triton


class Tile(NamedTuple):
    """Queries and keys per tile, warps per program, and software pipeline stages of loads."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The tiles of one kernel, by what takes registers in a call."""

    plain: Tile
    bias: Tile
    dropout: Tile
    both: Tile


def _tiles(plain: Tile, dropout: Tile | None = None) -> Tiles:
    """Tiles that a bias does not change."""
    dropout = plain if dropout is None else dropout
    return Tiles(plain, plain, dropout, dropout)


# Tiles for Hopper GPUs. The key is (largest head_dim, bytes of an element). They were chosen by the
# instructions of a tile and by the ceilings that follow from them (`make compile` counts both). No
# warp computes what another one computes:
#
# - The matrix units of Hopper multiply 64 rows per four warps: the queries in "forward" and "dq",
#   the keys in "dkv". With fewer rows, all warps compute the same products. So eight warps have 128
#   rows. Below 64 rows, Triton uses the instruction of older GPUs, at 62 % of the rate.
# - "dkv" of 256 columns needs eight warps for the sums of 64 keys. With 64 queries it takes the
#   loop of `backward_kv_wide`, which divides 64 rows among eight warps.
# - Some rows of float32 and of "dq" use the older instruction. It takes 16 rows per warp: 64 rows
#   for four warps.
# - Where fewer registers suffice, two or three programs share a multiprocessor, and one multiplies
#   while another computes exponentials.
# - With Triton 3.7.1, no row spills registers on Hopper. The gate fails if one does.
#
# float32 products are three tf32 products each, so above a head_dim of 32 they are computed in
# chunks of columns (`chunk_for`, `column_chunks`). Their tiles are small enough for all GPUs, and
# have as many warps as Triton divides the scores among. On Hopper, 64 keys of "dkv" take its own
# instruction; 64 keys of 128 columns would be twice as fast by the count, but Triton 3.7.1 compiles
# them to nothing for sm_100. A "dkv" tile has at most QUERY_PADDING queries.
_TILES = {
    "forward": {
        (64, 2): _tiles(Tile(128, 64, 8, 3)),
        (128, 2): _tiles(Tile(128, 128, 8, 2), dropout=Tile(128, 64, 8, 2)),
        (256, 2): _tiles(Tile(128, 32, 8, 2)),
        (64, 4): _tiles(Tile(64, 32, 4, 2)),
        (128, 4): _tiles(Tile(32, 64, 8, 2)),
        (256, 4): _tiles(Tile(16, 64, 8, 2)),
    },
    "dq": {
        (64, 2): Tiles(
            Tile(64, 64, 4, 2), Tile(64, 64, 4, 1), Tile(64, 64, 4, 1), Tile(64, 64, 4, 1)
        ),
        (128, 2): Tiles(
            Tile(128, 64, 8, 2), Tile(64, 64, 4, 1), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)
        ),
        (256, 2): _tiles(Tile(128, 32, 8, 2)),
        (64, 4): _tiles(Tile(16, 32, 4, 2)),
        (128, 4): _tiles(Tile(16, 32, 4, 2)),
        (256, 4): _tiles(Tile(16, 32, 4, 2)),
    },
    "dkv": {
        (64, 2): Tiles(
            Tile(64, 128, 8, 2), Tile(64, 128, 8, 2), Tile(64, 128, 8, 2), Tile(32, 128, 8, 2)
        ),
        (128, 2): _tiles(Tile(64, 128, 8, 2), dropout=Tile(32, 128, 8, 2)),
        (256, 2): _tiles(Tile(64, 64, 8, 2), dropout=Tile(64, 32, 8, 2)),
        (64, 4): _tiles(Tile(32, 64, 4, 2)),
        (128, 4): _tiles(Tile(32, 16, 4, 2)),
        (256, 4): _tiles(Tile(32, 16, 4, 2)),
    },
    "dkv, grouped": {
        (64, 2): Tiles(
            Tile(32, 128, 8, 2), Tile(32, 128, 8, 2), Tile(32, 128, 8, 2), Tile(16, 128, 8, 2)
        ),
        (128, 2): Tiles(
            Tile(32, 128, 8, 2), Tile(32, 128, 8, 2), Tile(32, 128, 8, 2), Tile(16, 128, 8, 2)
        ),
        (256, 2): _tiles(Tile(64, 64, 8, 2), dropout=Tile(64, 32, 8, 2)),
        (64, 4): _tiles(Tile(32, 64, 4, 2)),
        (128, 4): _tiles(Tile(32, 16, 4, 2)),
        (256, 4): _tiles(Tile(32, 16, 4, 2)),
    },
}

# 16-bit tiles for GPUs with compute capability 8, and for AMD. A warp multiplies 16 rows by 8
# columns, at the same rate everywhere. Triton gives each warp rows of its own if the sums have at
# least as many rows as columns, else columns.
_AMPERE = {
    "forward": {
        (64, 2): _tiles(Tile(128, 64, 8, 2)),
        (128, 2): Tiles(
            Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)
        ),
        (256, 2): _tiles(Tile(64, 32, 4, 2)),
    },
    "dq": {
        (64, 2): Tiles(
            Tile(64, 64, 4, 2), Tile(64, 64, 4, 1), Tile(64, 64, 4, 1), Tile(64, 64, 4, 1)
        ),
        (128, 2): Tiles(
            Tile(128, 32, 8, 2), Tile(32, 64, 4, 1), Tile(32, 64, 4, 1), Tile(32, 64, 4, 1)
        ),
        (256, 2): _tiles(Tile(32, 32, 4, 2)),
    },
    "dkv": {
        (64, 2): Tiles(
            Tile(64, 64, 4, 2), Tile(32, 64, 4, 2), Tile(32, 64, 4, 2), Tile(32, 64, 4, 2)
        ),
        (128, 2): _tiles(Tile(32, 64, 4, 2)),
        (256, 2): Tiles(
            Tile(32, 32, 4, 1), Tile(32, 16, 4, 2), Tile(32, 16, 4, 2), Tile(32, 16, 4, 2)
        ),
    },
    "dkv, grouped": {
        (64, 2): _tiles(Tile(32, 64, 4, 2)),
        (128, 2): _tiles(Tile(32, 64, 4, 1)),
        (256, 2): _tiles(Tile(32, 16, 4, 2)),
    },
}

# 16-bit tiles for GPUs with compute capability 10. Their matrix units multiply 128 rows at a time,
# into memory of their own, and 64 rows take as long as 128. The smallest tiles use the older
# instruction.
_BLACKWELL = {
    "forward": {
        (64, 2): _tiles(Tile(128, 64, 4, 3), dropout=Tile(128, 64, 8, 2)),
        (128, 2): _tiles(Tile(128, 64, 8, 2)),
        (256, 2): _tiles(Tile(128, 32, 8, 2)),
    },
    "dq": {
        (64, 2): Tiles(
            Tile(128, 64, 4, 2), Tile(128, 64, 8, 1), Tile(128, 64, 8, 2), Tile(128, 64, 8, 1)
        ),
        (128, 2): Tiles(
            Tile(128, 64, 8, 1), Tile(128, 64, 8, 1), Tile(128, 64, 8, 1), Tile(128, 32, 8, 1)
        ),
        (256, 2): _tiles(Tile(128, 32, 8, 2)),
    },
    "dkv": {
        (64, 2): _tiles(Tile(64, 128, 8, 2), dropout=Tile(32, 128, 8, 2)),
        (128, 2): Tiles(
            Tile(64, 128, 8, 1), Tile(32, 128, 8, 1), Tile(32, 128, 8, 1), Tile(32, 128, 8, 1)
        ),
        (256, 2): Tiles(
            Tile(64, 64, 8, 2), Tile(64, 64, 8, 1), Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)
        ),
    },
    "dkv, grouped": {
        (64, 2): _tiles(Tile(32, 128, 8, 2)),
        (128, 2): _tiles(Tile(32, 128, 8, 1)),
        (256, 2): _tiles(Tile(64, 64, 8, 1), dropout=Tile(64, 32, 8, 1)),
    },
}

# Shared memory available to one program, in KiB, by CUDA compute capability and by backend.
_SHARED_KIB = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}
_LEAST_SHARED_KIB = {"cuda": 99, "hip": 64}
# Targets for which every row of their table was compiled and fits. Others get smaller tiles by an
# estimate, which is generous.
_TUNED = {("cuda", 80), ("cuda", 90), ("cuda", 100)}


def tile_for(kernel: str, q: Tensor, *, bias: bool, dropout: bool) -> Tile:
    """The tile of a kernel on this device. ``dkv, grouped`` is for query heads that share keys."""
    head_dim = q.shape[2]
    width = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    row = width, q.element_size()
    table = table_of_device()
    tile = table[kernel].get(row, _TILES[kernel][row])[bias + 2 * dropout]
    if table is _TILES or (row in table[kernel] and _target() in _TUNED):
        return tile
    return _fit(tile, kernel, head_dim, q.dtype, bias, _shared_memory())


@lru_cache(maxsize=256)  # every layer repeats the same few calls
def _fit(
    tile: Tile, kernel: str, head_dim: int, dtype: torch.dtype, bias: bool, available: int
) -> Tile:
    """Reduce the stages of a tile, then its sizes, until its shared memory is available."""
    while _bytes_needed(tile, kernel, head_dim, dtype, bias) > available:
        if tile.stages > 1:
            tile = tile._replace(stages=tile.stages - 1)
        elif max(tile.queries, tile.keys) > 16:
            smaller = max(tile.queries // 2, 16), max(tile.keys // 2, 16)
            tile = tile._replace(queries=smaller[0], keys=smaller[1])
        else:
            break  # the estimate is generous: let the compiler say so if it does not fit
    return tile


def _bytes_needed(tile: Tile, kernel: str, head_dim: int, dtype: torch.dtype, bias: bool) -> int:
    """Shared memory of a program: fixed rows, rows in flight, biases in flight and scores."""
    row = padded_head_dim(head_dim) * dtype.itemsize
    fixed_rows, moving_rows = tile.queries, tile.keys
    if kernel.startswith("dkv"):
        fixed_rows, moving_rows = moving_rows, fixed_rows
    scores = tile.queries * tile.keys * 4
    # The backward exchanges float32 scores between threads: for diagonals, and between products.
    exchanged = 0 if kernel == "forward" else scores
    if chunk := chunk_for(head_dim, dtype):
        # Chunks of both sides are in flight, and one whole tile for the second product.
        in_flight = tile.stages * (fixed_rows + moving_rows) * chunk * dtype.itemsize
        return in_flight + moving_rows * row + exchanged
    fixed = fixed_rows * row * (1 if kernel == "forward" else 2)
    biases = (tile.stages - 1) * scores if bias else 0
    return fixed + 2 * tile.stages * moving_rows * row + biases + exchanged


def _shared_memory() -> int:
    """Bytes of shared memory that a program may use on the current device."""
    if INTERPRETED:
        return 227 * 1024
    backend, arch = _target()
    least = _LEAST_SHARED_KIB[backend]
    return 1024 * (_SHARED_KIB.get(arch, least) if backend == "cuda" else least)


def table_of_device() -> dict[str, dict[tuple[int, int], Tiles]]:
    """The rows of each kernel for the current device. The interpreter has those of Hopper."""
    if INTERPRETED:
        return _TILES
    backend, arch = _target()
    if backend == "cuda" and 90 <= arch < 120:
        return _TILES if arch == 90 else _BLACKWELL
    return _AMPERE  # compute capability 12 has Ampere's instructions, too


def _target() -> tuple[str, int]:
    """Triton's backend and architecture for the current device, for example ``("cuda", 90)``."""
    target = triton.runtime.driver.active.get_current_target()
    return target.backend, target.arch


def padded_head_dim(head_dim: int) -> int:
    """Columns of a tile: a power of two for Triton, and at least 16 for the matrix units."""
    return max(next_power_of_2(head_dim), 16)


def chunk_for(head_dim: int, dtype: torch.dtype) -> int:
    """Columns that `primitives.dot_transposed` multiplies at a time, or 0 for all of them.

    tf32x3 splits each operand in two, and q @ k.T needs whole rows of both operands. Wide rows
    would need too many registers.
    """
    return 32 if dtype == torch.float32 and head_dim > 32 else 0


def num_tiles(total: int, num_seqs: int, size: int) -> int:
    """The number of programs along a packed dimension; see the top of this file."""
    return total // size + num_seqs


def precision(dtype: torch.dtype) -> str:
    """The ``input_precision`` of products.

    float32 products on CUDA use tf32 if PyTorch's settings allow it. Otherwise they use tf32x3,
    which is nearly as exact as float32. With 16-bit inputs, the only float32 product sums the
    diagonals for a table's gradient: tf32 has as many bits as float16, and more than bfloat16.
    """
    if INTERPRETED or _target()[0] != "cuda":
        return "ieee"
    if dtype != torch.float32:
        return "tf32"
    matmul = torch.backends.cuda.matmul
    # Reading the older setting raises an error after the newer one was set.
    setting = getattr(matmul, "fp32_precision", None)
    allows_tf32 = setting == "tf32" if setting is not None else matmul.allow_tf32
    return "tf32" if allows_tf32 else "tf32x3"
