"""Forward, backward and AdamW of whole models: patched, padded, and other libraries.

In each round the padded model with SDPA runs its step right before the contender, so that other
load on the machine affects both. "round by round" is the median of the ratios within rounds. The
ideal is the ratio of the counted operations of forward and backward, and is compared with the
measured ratio of forward and backward. The predictions of `tokenpack.cost` for the whole step are
recorded with the measurements.

Base models take minutes each on a CPU, where `bench.run` runs them only if --only selects them.
"""

import statistics

import pytest
import torch

from tokenpack import packing_stats
from tokenpack.cost import (
    count_memory,
    count_packed,
    count_padded,
    count_traffic,
    forecast_seconds,
    model_cost,
    training_operations,
)
from tokenpack.cost.allocations import peak_bytes

from .common import DEVICE, ON_GPU, ceilings, options
from .length_distributions import PRESETS
from .training import CONTENDERS, IDS, MODELS, SIZES, TrainingStep, padded_batch

BASELINES = ("padded, SDPA",)
ROUNDS = dict.fromkeys(SIZES, 10) if ON_GPU else {"tiny": 9, "small": 3, "base": 3}


def compare(benchmark, name, size, by, preset, rounds):
    """Time the contender ``by``, alternating with the baseline, and record the comparison."""
    batch, real = padded_batch(name, size, preset)
    step = TrainingStep(*CONTENDERS[by](name, size, batch))
    baseline = None
    if by not in BASELINES:
        baseline = TrainingStep(*CONTENDERS[BASELINES[0]](name, size, batch))
        baseline()
        baseline.reset()
    step()  # compiles kernels, and allocates the optimizer states
    peak = peak_bytes(step, DEVICE)
    step.reset()
    benchmark.pedantic(step, setup=baseline and (lambda: baseline()), rounds=rounds)

    notes = benchmark.extra_info
    slots = batch["input_ids"].numel() + (0 if name == "Llama" else batch["labels"].numel())
    notes["padding share"] = round(1 - real / slots, 3)
    notes["real tokens"] = real
    notes["dtype"] = "bf16 autocast" if ON_GPU else "fp32"
    notes["peak memory, MiB"] = round(peak / 2**20)
    if not step.seconds:  # --benchmark-disable
        return
    notes["tokens/s"] = round(real / statistics.median(step.seconds))
    if baseline is not None:
        ratio = _ratio(baseline.seconds, step.seconds)
        notes["of the baseline's speed, round by round"] = round(ratio, 3)
    if by == "packed":
        assert not packing_stats(step.model).fallbacks
        _note_predictions(notes, name, size, batch, peak)
        ideal = notes["ideal, forward and backward"]
        both = _ratio(baseline.forward_backward, step.forward_backward)
        notes["forward and backward, round by round"] = round(both, 3)
        notes["of the ideal"] = round(both / ideal, 3)
        notes["ratio predicted / measured"] = round(notes["ratio predicted"] / ratio, 3)
        seconds = notes["seconds predicted"] / statistics.median(step.seconds)
        notes["seconds predicted / measured"] = round(seconds, 3)


def _note_predictions(notes, name, size, batch, peak):
    """Record the cost model's predictions for the batch."""
    with torch.device("meta"):
        model = MODELS[name](size.model, IDS)
    device = ceilings()
    cost, traffic = model_cost(model), count_traffic(model.to(device.torch_dtype))
    memory = count_memory(model, DEVICE.type, packed=True)
    sizes = [each.numel() for each in model.parameters()]
    counts = [count_padded(model, batch), count_packed(model, batch)]
    operations = [training_operations(cost, count).total for count in counts]
    padded, packed = (
        forecast_seconds(cost, traffic, count, sum(sizes), len(sizes), device, packed=packed)
        for count, packed in zip(counts, (False, True))
    )
    notes["ideal, forward and backward"] = round(operations[0] / operations[1], 3)
    notes["ratio predicted"] = round(padded.total / packed.total, 3)
    notes["seconds predicted"] = float(f"{packed.total:.4g}")
    tokens = counts[1].encoder_tokens, counts[1].decoder_tokens
    notes["memory predicted / measured"] = round(memory.peak(*tokens) / peak, 3)


def _ratio(baseline, contender):
    return statistics.median(a / b for a, b in zip(baseline, contender, strict=True))


def for_models_and_contenders(test):
    """Parametrize a test by model and contender."""
    by = pytest.mark.parametrize("by", CONTENDERS)
    return pytest.mark.parametrize("name", MODELS)(by(test))


def compare_size(benchmark, name, size, by):
    """Compare on the lengths of this run."""
    benchmark.group = f"training step, {size} {name}, {options.lengths}"
    compare(benchmark, name, SIZES[size], by, None, ROUNDS[size])


@for_models_and_contenders
def test_tiny(benchmark, name, by):
    """Tiny models, where costs other than products have the largest share."""
    compare_size(benchmark, name, "tiny", by)


@for_models_and_contenders
def test_small(benchmark, name, by):
    """Two thirds of the width of a base model; on a CPU, two layers."""
    if not ON_GPU and name == "mT5":
        pytest.skip("on a CPU, mT5 runs only in size tiny")
    compare_size(benchmark, name, "small", by)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["T5", "NLLB", "Llama"] if ON_GPU else ["T5", "Llama"])
def test_presets(benchmark, name, preset):
    """The patched model compared with the padded one, for every preset of lengths."""
    benchmark.group = f"training step over padding shares, small {name}"
    benchmark.extra_info["preset"] = preset
    size = SIZES["small"] if ON_GPU else SIZES["small"]._replace(rows=12)
    compare(benchmark, name, size, "packed", preset, ROUNDS["small"])


@for_models_and_contenders
def test_base(benchmark, name, by):
    """Models of a practical size."""
    if not ON_GPU and (by not in ("packed", "padded, SDPA") or name == "mT5"):
        pytest.skip("on a CPU, base models run only packed and padded, without mT5")
    compare_size(benchmark, name, "base", by)
