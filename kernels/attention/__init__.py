"""Attention over packed sequences: the public op, its reference, and relative-bias tables."""

from .api import (
    cast_for_autocast,
    normal_window,
    plan_reference,
    varlen_attention,
    varlen_attention_reference,
)
from .layers import LayerKernels, Saved
from .op import is_ampere_or_newer, kernel_lacks
from .reference import HostPlan, attend_on_host
from .relative_bias import alibi_bias_table, t5_bias_table
from .slots import Lines
from .spec import AttentionSpec

__all__ = [
    "AttentionSpec",
    "HostPlan",
    "LayerKernels",
    "Lines",
    "Saved",
    "attend_on_host",
    "alibi_bias_table",
    "cast_for_autocast",
    "is_ampere_or_newer",
    "kernel_lacks",
    "normal_window",
    "plan_reference",
    "t5_bias_table",
    "varlen_attention",
    "varlen_attention_reference",
]
