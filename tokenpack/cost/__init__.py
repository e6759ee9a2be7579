"""Predict the cost of a training step: operations, memory, bytes moved, and time.

Nothing is trained. `model_cost`, `count_traffic` and `count_memory` count what a model needs, also
for a model on the meta device, without weights. `count_lengths`, `count_padded` and `count_packed`
count what a batch holds. `measure_ceilings` measures the peak rates of a device. From these,
`training_operations` gives floating-point operations, `forecast_seconds` time, `token_budget` the
size of a micro-batch that fits into memory, and `exchange_bytes` and `rank_efficiency` the cost of
several ranks. ``tokenpack inspect --gpus`` prints such predictions for a file of texts.
"""

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
