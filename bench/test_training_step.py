"""Forward, backward and AdamW of whole models: patched beside padded ones and others' ways.

In each round the padded model under SDPA takes its step right before the contender, so that what
else the machine does falls on both: "round by round" is the median of the ratios within rounds.
The ideal is the ratio of the operations counted, of forward and backward, and so is what is held
against it. What `tokenpack.cost` predicts of the whole step is noted beside what was measured.

Base models take minutes each on a CPU: there `bench.run` runs them where --only names them.
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

from .common import DEVICE, ON_GPU, ceilings, chosen
from .length_distributions import PRESETS
from .training import CONTENDERS, IDS, MODELS, SIZES, TrainingStep, padded_batch

BASELINES = ("padded, SDPA",)
ROUNDS = dict.fromkeys(SIZES, 10) if ON_GPU else {"tiny": 9, "small": 3, "base": 3}


def compare(benchmark, name, size, by, preset, rounds):
    """Time ``by``, each round after one of the baseline, and note how they compare."""
    batch, real = padded_batch(name, size, preset)
    step = TrainingStep(*CONTENDERS[by](name, size, batch))
    baseline = None
    if by not in BASELINES:
        baseline = TrainingStep(*CONTENDERS[BASELINES[0]](name, size, batch))
        baseline()
        baseline.reset()
    step()  # compiles, and makes the optimizer's states
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
    """What the model of cost says of the batch; `tokenpack inspect` says it of a file."""
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


def _ratio(theirs, ours):
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def of_models_and_contenders(test):
    """Each of them."""
    by = pytest.mark.parametrize("by", CONTENDERS)
    return pytest.mark.parametrize("name", MODELS)(by(test))


def compare_size(benchmark, name, size, by):
    """On the lengths that were asked for."""
    benchmark.group = f"training step, {size} {name}, {chosen.lengths}"
    compare(benchmark, name, SIZES[size], by, None, ROUNDS[size])


@of_models_and_contenders
def test_tiny(benchmark, name, by):
    """Where what a step costs beside its products weighs most."""
    compare_size(benchmark, name, "tiny", by)


@of_models_and_contenders
def test_small(benchmark, name, by):
    """Half the width of a base model; on a CPU two layers of it."""
    if not ON_GPU and name == "mT5":
        pytest.skip("on a CPU mT5 runs tiny alone")
    compare_size(benchmark, name, "small", by)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["T5", "NLLB", "Llama"] if ON_GPU else ["T5", "Llama"])
def test_presets(benchmark, name, preset):
    """The patched model beside the padded one, over lengths of every shape."""
    benchmark.group = f"training step over padding shares, small {name}"
    benchmark.extra_info["preset"] = preset
    size = SIZES["small"] if ON_GPU else SIZES["small"]._replace(rows=12)
    compare(benchmark, name, size, "packed", preset, ROUNDS["small"])


@of_models_and_contenders
def test_base(benchmark, name, by):
    """Of a practical size."""
    if not ON_GPU and (by not in ("packed", "padded, SDPA") or name == "mT5"):
        pytest.skip("on a CPU base models run packed and padded alone, mT5 not at all")
    compare_size(benchmark, name, "base", by)
