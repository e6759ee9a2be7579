"""Training steps under torch.compile: padded and packed, eager and compiled.

A careful user compiles the padded model. So each packed step is compared with the padded step of
its own kind: compiled with compiled, eager with eager. The padded step runs right before it in each
round, so that other load on the machine affects both. "of the ideal" divides the ratio of forward
and backward by the ratio of the counted operations, as in `test_training_step`.
"""

import statistics

import pytest
import torch

from tokenpack import packing_stats
from tokenpack.cost import count_packed, count_padded, model_cost, training_operations

from .common import ON_GPU, options
from .training import CONTENDERS, IDS, MODELS, SIZES, TrainingStep, padded_batch

ROUNDS = {"tiny": 9, "small": 3, "base": 3} if not ON_GPU else dict.fromkeys(SIZES, 10)
CONTENDER_OF = {
    "padded": "padded, SDPA",
    "padded, compiled": "padded, SDPA",
    "packed": "packed",
    "packed, compiled": "packed",
}
BASELINES = ("padded, compiled",)
NAMES = ("T5", "NLLB", "Llama")


def make_step(by, name, size, batch):
    """A training step that has been compiled and run once."""
    step = TrainingStep(*CONTENDERS[CONTENDER_OF[by]](name, size, batch))
    if by.endswith("compiled"):
        step.model = torch.compile(step.model)
    step()
    step.reset()
    return step


def compare(benchmark, name, size, by):
    """Time a step. A packed one alternates with the padded one of its kind."""
    batch, real = padded_batch(name, SIZES[size], None)
    benchmark.group = f"compile, {size} {name}, {options.lengths}"
    step, padded = make_step(by, name, SIZES[size], batch), None
    if by.startswith("packed"):
        padded = make_step(by.replace("packed", "padded"), name, SIZES[size], batch)
    benchmark.pedantic(step, setup=padded and (lambda: padded()), rounds=ROUNDS[size])
    if not step.seconds:  # --benchmark-disable
        return
    notes = benchmark.extra_info
    notes["tokens/s"] = round(real / statistics.median(step.seconds))
    if padded is None:
        return
    assert not packing_stats(step.model).fallbacks
    with torch.device("meta"):
        model = MODELS[name](SIZES[size].model, IDS)
    cost = model_cost(model)
    counts = count_padded(model, batch), count_packed(model, batch)
    more, less = (training_operations(cost, count).total for count in counts)
    pairs = zip(padded.forward_backward, step.forward_backward, strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    notes["ideal, forward and backward"] = round(more / less, 3)
    notes["of the same padded, forward and backward"] = round(ratio, 3)
    notes["of the ideal"] = round(ratio * less / more, 3)


@pytest.mark.parametrize("by", CONTENDER_OF)
@pytest.mark.parametrize("name", NAMES)
def test_tiny(benchmark, name, by):
    """Tiny models, where the host's work has the largest share."""
    compare(benchmark, name, "tiny", by)


@pytest.mark.parametrize("by", CONTENDER_OF)
@pytest.mark.parametrize("name", NAMES)
def test_small(benchmark, name, by):
    """Two thirds of the width of a base model; on a CPU, two layers."""
    compare(benchmark, name, "small", by)


@pytest.mark.parametrize("by", CONTENDER_OF)
@pytest.mark.parametrize("name", NAMES)
def test_base(benchmark, name, by):
    """Models of a practical size."""
    if not ON_GPU and name != "Llama":
        pytest.skip("on a CPU, only Llama runs in size base")
    compare(benchmark, name, "base", by)
