"""Shares of a training step's time by kind of operator, patched and padded.

Each operator's self time from the profiler (on a GPU, the time of its kernels) is attributed to one
kind: optimizer, attention, matrix products, or one of the others. Attention is everything inside
transformers' attention function, forward and backward, including its gathers and scatters. Time
outside of all operators is Python and waiting. A backward operator is attributed by the sequence
number of its forward operator. The profiler slows down every operator a little, so steps with many
small operators look slower than they are.
"""

import time
from collections import Counter
from contextlib import contextmanager
from functools import wraps

import pytest
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .common import ON_GPU, options
from .training import CONTENDERS, SIZES, TrainingStep, padded_batch

BASELINES = ("padded, SDPA",)
OUTSIDE = "outside products, attention and optimizer, %"
_PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm")}

# The kind is the first with a word in the name of the operator or of one of its callers.
_CALLERS = (
    ("optimizer", ("Optimizer.step", "Optimizer.zero_grad")),
    ("attention", ("attention", "Attention")),
    ("loss", ("cross_entropy", "log_softmax", "nll_loss")),
    ("packing", ("tokenpack::",)),
    ("embedding", ("embedding", "Embedding")),
    ("activations", ("relu", "threshold", "Relu", "gelu", "Gelu", "silu", "Silu")),
    ("norms", ("norm", "Norm", "pow", "Pow", "rsqrt", "Rsqrt", "mean", "Mean")),
)
_KINDS = ("matrix products", *(kind for kind, _ in _CALLERS))
_OTHER, _BETWEEN = "other arithmetic and copies", "Python and between operators"


@contextmanager
def attention_named():
    """Label calls of attention functions for the profiler. Enter after all are registered."""

    def named(function):
        @wraps(function)
        def run(*args, **kwargs):
            with record_function("attention"):
                return function(*args, **kwargs)

        return run

    names = ALL_ATTENTION_FUNCTIONS.valid_keys()
    for name in names:
        ALL_ATTENTION_FUNCTIONS[name] = named(ALL_ATTENTION_FUNCTIONS[name])
    try:
        yield
    finally:
        for name in names:
            del ALL_ATTENTION_FUNCTIONS[name]


def kind_of(event, forward):
    """The kind to which an operator's self time is attributed.

    Args:
        event: of the operator.
        forward: the forward operators, by sequence number.
    """
    callers = list(_with_callers(event))
    recorded = (forward.get(each.sequence_nr) for each in callers if _of_backward(each))
    names = [each.name for each in callers]
    for each in recorded:
        names += [caller.name for caller in _with_callers(each)] if each is not None else []
    found = next(
        (kind for kind, words in _CALLERS if any(w in name for name in names for w in words)),
        _OTHER,
    )
    if event.name.rstrip("_") in _PRODUCTS and found not in ("optimizer", "attention"):
        return "matrix products"
    return found


def _of_backward(event):
    return event.name.startswith("autograd::engine::evaluate_function")


_OPERATOR = 0  # the profiler's scope of operators that autograd does not call


def _with_callers(event):
    while event is not None:
        yield event
        event = event.cpu_parent


def shares(step, rounds):
    """Percent of the time of ``rounds`` steps by kind."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
    with attention_named(), profile(activities=activities) as trace:
        begin = time.perf_counter()
        for _ in range(rounds):
            step()
        total = 1e6 * (time.perf_counter() - begin)
    events = trace.events()
    # Of several events with a sequence number, the last is the operator that autograd recorded.
    forward = {
        each.sequence_nr: each
        for each in sorted(events, key=lambda each: each.time_range.start)
        if each.sequence_nr >= 0 and each.scope == _OPERATOR and not _of_backward(each)
    }
    spent = Counter()
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue  # kernels are counted with the operator that launched them
        own = event.self_cpu_time_total
        if ON_GPU:
            own = sum(kernel.duration for kernel in event.kernels)
        spent[kind_of(event, forward)] += own
    spent[_BETWEEN] = total - sum(spent.values())
    return {kind: 100 * spent[kind] / total for kind in (*_KINDS, _OTHER, _BETWEEN)}


def note_shares(benchmark, name, size, by):
    """Profile several steps, and record the shares."""
    benchmark.group = f"where a step's time goes, {size} {name}, {options.lengths}"
    batch, _ = padded_batch(name, SIZES[size], None)
    step = TrainingStep(*CONTENDERS[by](name, SIZES[size], batch))
    for _ in range(3):  # the first steps also get memory from the system
        step()
    found = shares(step, rounds=10 if ON_GPU else 3)
    inside = sum(found[kind] for kind in ("matrix products", "attention", "optimizer"))
    benchmark.extra_info[OUTSIDE] = round(100 - inside, 1)
    for kind, percent in found.items():
        benchmark.extra_info[f"{kind}, %"] = round(percent, 1)
    benchmark.pedantic(step)


_BY = pytest.mark.parametrize("by", ["packed", "padded, SDPA"])
_MODELS = pytest.mark.parametrize("name", ["T5", "NLLB", "Llama"])


@_BY
@_MODELS
def test_small(benchmark, name, by):
    """Small models: two layers on a CPU, where products have a smaller share."""
    note_shares(benchmark, name, "small", by)


@_BY
@_MODELS
def test_base(benchmark, name, by):
    """Models of a practical size."""
    if by != "packed" and not ON_GPU:
        pytest.skip("on a CPU, base models are profiled only packed")
    note_shares(benchmark, name, "base", by)
