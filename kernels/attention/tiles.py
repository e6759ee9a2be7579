"""How the attention kernels cut the work: tiles of queries and keys, found without the host.

Sequence s of a packed batch gets the tiles from ``cu_seqlens[s] // size + s`` on. No sequence needs
more than there are up to the next one's first, so ``total // size + num_seqs`` programs always
suffice, whatever the lengths, and each finds its sequence by binary search in ``cu_seqlens``: no
table of tiles, no copy to the host, no new grid for a new batch of the same size. The few programs
left over return at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._triton import INTERPRETED, next_power_of_2, triton


class Tile(NamedTuple):
    """Queries and keys at a time, warps that share them, and loads in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


# For a Hopper GPU, by head_dim up to and bytes of an element: without dropout, and with it, which
# takes registers. On sm_90 none of them spills in what `make compile` tries: each row with a bias,
# with dropout, with grouped heads, and with every option at once (grouped). Other mixes of options
# may: up to 67 words where they were tried. float32, whose products are three of tf32, is beyond a
# head_dim of 64 multiplied by columns in turn (`chunk_for`). In "dq" there are never more queries
# than keys, since its diagonals wrap around once.
_TILES = {
    "forward": {
        (64, 2): (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
        (128, 2): (Tile(128, 64, 8, 2), Tile(128, 32, 8, 3)),
        (256, 2): (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
        (64, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
        (128, 4): (Tile(32, 64, 8, 2), Tile(32, 32, 8, 2)),
        (256, 4): (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    },
    "dq": {
        (64, 2): (Tile(64, 64, 8, 2), Tile(32, 64, 4, 1)),
        (128, 2): (Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
        (256, 2): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        (64, 4): (Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
        (128, 4): (Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
        (256, 4): (Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
    },
    "dkv": {
        (64, 2): (Tile(64, 64, 8, 2), Tile(32, 64, 4, 2)),
        (128, 2): (Tile(32, 64, 8, 2), Tile(32, 64, 8, 2)),
        (256, 2): (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
        (64, 4): (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
        (128, 4): (Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
        (256, 4): (Tile(16, 16, 8, 2), Tile(16, 16, 8, 2)),
    },
    "dkv, grouped": {
        (64, 2): (Tile(32, 64, 8, 2), Tile(32, 32, 8, 2)),
        (128, 2): (Tile(32, 32, 8, 2), Tile(16, 32, 8, 2)),
        (256, 2): (Tile(16, 32, 8, 2), Tile(16, 32, 8, 1)),
        (64, 4): (Tile(16, 32, 8, 2), Tile(16, 32, 8, 1)),
        (128, 4): (Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
        (256, 4): (Tile(16, 16, 8, 2), Tile(16, 16, 8, 2)),
    },
}

# Shared memory that a program may have, KiB: by compute capability, and on AMD.
_SHARED_KIB = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}
_LEAST_SHARED_KIB = {"cuda": 99, "hip": 64}


def tile_for(kernel: str, q: Tensor, *, bias: bool, dropout: bool) -> Tile:
    """The tile of a kernel on this device; ``dkv, grouped`` where query heads share keys.

    The table's, with fewer loads in flight and then fewer keys where shared memory is short.
    """
    rows = _TILES[kernel]
    width = next(width for width in (64, 128, 256) if q.shape[2] <= width)
    tile = rows[width, q.element_size()][dropout]
    room = _shared_memory()
    while _bytes_needed(kernel, tile, q, bias) > room:
        if tile.stages > 1:
            tile = tile._replace(stages=tile.stages - 1)
        else:
            tile = tile._replace(queries=tile.queries // 2, keys=tile.keys // 2)
    return tile


def _bytes_needed(kernel: str, tile: Tile, q: Tensor, bias: bool) -> int:
    """Shared memory: the rows that stay, those in flight, and the bias's values in flight."""
    row = padded_head_dim(q) * q.element_size()
    staying, moving = tile.queries, tile.keys
    if kernel.startswith("dkv"):
        staying, moving = moving, staying
    scores = tile.queries * tile.keys * 4
    exchanged = 0 if kernel == "forward" else scores  # diagonals, and scores between the products
    if chunk := chunk_for(q):  # of both sides in flight; one whole tile for the second product
        in_flight = tile.stages * (staying + moving) * chunk * q.element_size()
        return in_flight + moving * row + exchanged
    kept = staying * row * (1 if kernel == "forward" else 2)
    return kept + 2 * tile.stages * moving * row + bias * (tile.stages - 1) * scores + exchanged


def _shared_memory() -> int:
    if INTERPRETED:
        return 227 * 1024
    backend, arch = _target()
    least = _LEAST_SHARED_KIB[backend]
    return 1024 * (_SHARED_KIB.get(arch, least) if backend == "cuda" else least)


def _target() -> tuple[str, int]:
    """What the current device is to Triton: ``("cuda", 90)``, say."""
    target = triton.runtime.driver.active.get_current_target()
    return target.backend, target.arch


def padded_head_dim(q: Tensor) -> int:
    """Columns that a tile has: Triton's are powers of two, and matrix units want 16."""
    return max(next_power_of_2(q.shape[2]), 16)


def chunk_for(q: Tensor) -> int:
    """Columns that `primitives.multiply` reads and multiplies at a time, 0 for all of them.

    tf32x3 splits each operand in two, and q @ k.T takes whole rows of both: too many registers
    where rows are wide.
    """
    return 32 if q.dtype == torch.float32 and q.shape[2] > 64 else 0


def num_tiles(total: int, num_seqs: int, size: int) -> int:
    """Programs along a packed dimension: see above."""
    return total // size + num_seqs


def precision(q: Tensor) -> str:
    """How float32 products are computed: as PyTorch is told to, and else nearly as exact as it."""
    if q.dtype != torch.float32 or INTERPRETED or _target()[0] != "cuda":
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # Once the newer setting was used, reading the older one is an error.
    told = getattr(matmul, "fp32_precision", None)
    allowed = told == "tf32" if told is not None else matmul.allow_tf32
    return "tf32" if allowed else "tf32x3"
