"""What a training step costs: operations counted, bytes counted, and the time that they predict."""

from .ceilings import Ceilings, measure_ceilings, read_ceilings, write_ceilings
from .forecast import StepSeconds, forecast_seconds
from .memory import StepMemory, count_memory, state_memory, token_budget
from .operations import (
    BatchCount,
    ModelCost,
    Operations,
    count_lengths,
    count_operations,
    count_packed,
    count_padded,
    kept_label_lengths,
    model_cost,
    training_operations,
)
from .scale import Exchange, exchange_bytes, rank_efficiency
from .traffic import Traffic, count_traffic

__all__ = [
    "BatchCount",
    "Ceilings",
    "Exchange",
    "ModelCost",
    "Operations",
    "StepMemory",
    "StepSeconds",
    "Traffic",
    "count_lengths",
    "count_memory",
    "count_operations",
    "count_packed",
    "count_padded",
    "count_traffic",
    "exchange_bytes",
    "forecast_seconds",
    "kept_label_lengths",
    "measure_ceilings",
    "model_cost",
    "rank_efficiency",
    "read_ceilings",
    "state_memory",
    "token_budget",
    "training_operations",
    "write_ceilings",
]
