"""Plans: which sequences share a bin. NumPy only; `tokenpack.data` turns plans into batches."""

from .packer import Packer, pack_lengths
from .pairs import PairPackResult, pack_pairs
from .ranks import balance_ranks, bin_costs
from .result import PackMetrics, PackResult, merge_results
from .shards import merge_saved, pack_shards
from .stream import StreamBin, StreamPacker

__all__ = [
    "PackMetrics",
    "PackResult",
    "Packer",
    "PairPackResult",
    "StreamBin",
    "StreamPacker",
    "balance_ranks",
    "bin_costs",
    "merge_results",
    "merge_saved",
    "pack_lengths",
    "pack_pairs",
    "pack_shards",
]
