"""Plans: which sequences share which bin. By NumPy alone; `tokenpack.data` makes batches of it."""

from .packer import Packer, pack_lengths
from .result import PackMetrics, PackResult, merge_results

__all__ = ["PackMetrics", "PackResult", "Packer", "merge_results", "pack_lengths"]
