"""Attention over packed sequences: the public op, its reference, and relative-bias tables."""

from .api import varlen_attention
from .relative_bias import alibi_bias_table, t5_bias_table

__all__ = ["alibi_bias_table", "t5_bias_table", "varlen_attention"]
