"""Compile a patched model and an unpatched one, and count graphs.

`python -m tests.adapters.one_graph` prints the table of docs/torch-compile.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch._dynamo.utils import counters

from tokenpack import patch_model
from tokenpack.adapters.traced_once import TAKES_OBJECTS

from .models import CASES, Case, gradient_distance

Batch = dict[str, torch.Tensor]

needs_one_graph = pytest.mark.skipif(
    not TAKES_OBJECTS, reason="torch before 2.13 cannot trace a patched model as one graph"
)

# The families of the table, by class.
FAMILIES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "T5ForConditionalGeneration",
    "MT5ForConditionalGeneration",
    "M2M100ForConditionalGeneration",
    "BartForConditionalGeneration",
    "BertForMaskedLM",
    "ModernBertForMaskedLM",
)


class Counts(NamedTuple):
    """What torch.compile did with a model, and how far its results are from the padded model's.

    Attributes:
        graphs: graphs that were compiled.
        breaks: graph breaks.
        loss: the largest difference of losses.
        gradient: the largest difference of gradients, relative to the largest gradient.
    """

    graphs: int
    breaks: int
    loss: float
    gradient: float


def compile_and_compare(
    reference: torch.nn.Module,
    batches: Iterable[Batch],
    backend: str = "eager",
    change: Callable[[torch.nn.Module], torch.nn.Module] = lambda model: model,
    **options: Any,
) -> Counts:
    """Train a compiled patched copy of ``reference`` and ``reference`` itself on the same batches.

    ``change`` is applied to both models, and ``options`` are those of `torch.compile`.
    """
    torch.compiler.reset()
    counters.clear()
    model = change(patch_model(copy.deepcopy(reference)))
    run = torch.compile(model, backend=backend, **options)
    return compare(run, model, change(reference), batches)


def compare(
    run: Callable[..., Any],
    model: torch.nn.Module,
    reference: torch.nn.Module,
    batches: Iterable[Batch],
) -> Counts:
    """Train ``model``, compiled as ``run``, and ``reference`` on the same batches."""
    loss = gradient = 0.0
    for batch in batches:
        model.zero_grad()
        reference.zero_grad()
        ours, theirs = run(**batch).loss, reference(**batch).loss
        ours.backward()
        theirs.backward()
        loss = max(loss, abs(ours.item() - theirs.item()) / max(1.0, abs(theirs.item())))
        gradient = max(gradient, gradient_distance(model, reference))
    graphs = counters["stats"]["unique_graphs"]
    return Counts(graphs, sum(counters["graph_break"].values()), loss, gradient)


# The fewest layers that have one of each kind. In T5, the second layer reads the first one's table
# of the bias. The layers of mT5 are the same.
_ONE_LAYER = {"num_hidden_layers": 1}
_ONE_EACH = {"encoder_layers": 1, "decoder_layers": 1}
_TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
_FEWEST_LAYERS: dict[str, dict[str, Any]] = {
    "Qwen3ForCausalLM": _TWO_KINDS,
    "Gemma2ForCausalLM": _TWO_KINDS,
    "Gemma3ForCausalLM": _TWO_KINDS,
    "ModernBertForMaskedLM": _TWO_KINDS,
    "T5ForConditionalGeneration": {"num_layers": 2, "num_decoder_layers": 2},
    "MT5ForConditionalGeneration": {"num_layers": 1, "num_decoder_layers": 1},
    "M2M100ForConditionalGeneration": _ONE_EACH,
    "BartForConditionalGeneration": _ONE_EACH,
}


def case_of(name: str) -> Case:
    """The case of a model class."""
    return next(case for case in CASES if case.model == name)


def smallest_case_of(name: str) -> Case:
    """The case of a model class with one layer of each kind. Tracing takes time for each layer."""
    case = case_of(name)
    return replace(case, options={**case.options, **_FEWEST_LAYERS.get(name, _ONE_LAYER)})


def batches_of(case: Case, count: int) -> Iterable[Batch]:
    """Batches of other lengths each. Padding, numbers of rows and of columns vary."""
    for seed in range(count):
        batch = case.batch("left" if seed % 2 else "right", seed)
        # Copies, because torch.compile distinguishes views from other tensors.
        yield {name: values[: 2 + seed % 4].clone() for name, values in batch.items()}


def table(count: int = 100) -> str:
    """The table in Markdown, over ``count`` batches."""
    lines = [
        "| model | graphs | breaks | recompilations | loss | gradient |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in FAMILIES:
        case = case_of(name)
        counts = compile_and_compare(case.build(), batches_of(case, count), dynamic=True)
        lines.append(
            f"| {name} | {counts.graphs} | {counts.breaks} | {counts.graphs - 1} "
            f"| {counts.loss:.0e} | {counts.gradient:.0e} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table())
