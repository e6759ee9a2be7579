"""``tokenpack demo``: train T5, NLLB and Llama padded and patched, and compare the two.

Texts, batches and initial weights are the same, and there is no dropout. The losses must agree at
every step, and the time should fall in proportion to the operations.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedModel

from ..samples.examples import ExampleSet, random_batches
from ..samples.text import Text, read_texts, standard_library_texts
from ..samples.tokenizer import train_tokenizer
from ..table import format_table
from . import figures, machine
from .models import DEMO_MODELS, SIZES, DemoSize
from .output import make_folder, write_json
from .side_by_side import Comparison, TrainingLog, train_side_by_side

# Losses agree up to rounding errors, which training amplifies step by step.
_LOSS_TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}  # fp32, bf16


@dataclass(frozen=True)
class ModelResult:
    """Results of one model, a row of the table."""

    name: str
    title: str
    task: str
    model: PreTrainedModel
    examples: ExampleSet
    batch_size: int
    comparison: Comparison


def run(arguments: argparse.Namespace) -> int:
    """Train the models, print the table, and write the PNG and the JSON.

    Returns:
        1 if the losses of a model differ or one of its steps was not packed, else 0.
    """
    device = _choose_device(arguments.device)
    size = _choose_size(arguments.size, device)
    make_folder(arguments.out, "--out")
    _use_physical_cores()

    texts = _load_texts(arguments.data)
    tokenizer = train_tokenizer(_all_strings(texts), size.vocab_size)
    _print_setting(texts, tokenizer, device, arguments)

    names = list(DEMO_MODELS) if arguments.model == "all" else [arguments.model]
    results = [
        _train(name, texts, tokenizer, size, device, arguments.steps, arguments.seed)
        for name in names
    ]

    print("\n" + _table(results))
    print("\n" + _caption(device, arguments.steps))
    report = _report(results, texts, tokenizer, size, device, arguments)
    _write(report, results, arguments.out)
    failures = _failed_checks(results, device)
    for failure in failures:
        print(f"tokenpack: check failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


# ----------------------------------------------------------------------------------------- setting


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device must be cpu here, got cuda; torch sees no CUDA device")
    return torch.device(name)


def _choose_size(name: str, device: torch.device) -> DemoSize:
    if name == "auto":
        name = "large" if device.type == "cuda" else "small"
    return SIZES[name]


def _use_physical_cores() -> None:
    # OMP_NUM_THREADS is the user's choice and takes precedence.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(machine.physical_cores())


def _load_texts(path: Path | None) -> list[Text]:
    return standard_library_texts() if path is None else read_texts(path)


def _all_strings(texts: Sequence[Text]) -> list[str]:
    return [s for text in texts for s in (text.source, text.target) if s is not None]


def _data_name(path: Path | None) -> str:
    return "docstrings of Python's standard library" if path is None else str(path)


def _print_setting(
    texts: Sequence[Text], tokenizer: Tokenizer, device: torch.device, arguments: argparse.Namespace
) -> None:
    print(f"data       {len(texts):,} texts: {_data_name(arguments.data)}")
    print(
        f"tokenizer  byte-level BPE of {tokenizer.get_vocab_size():,} tokens, trained on the texts"
    )
    if device.type == "cuda":
        print(f"device     {torch.cuda.get_device_name(device)}, bf16 autocast")
    else:
        print(f"device     {machine.cpu_name()}, {torch.get_num_threads()} threads, fp32")


# ---------------------------------------------------------------------------------------- training


def _train(
    name: str,
    texts: Sequence[Text],
    tokenizer: Tokenizer,
    size: DemoSize,
    device: torch.device,
    steps: int,
    seed: int,
) -> ModelResult:
    recipe = DEMO_MODELS[name]
    examples = recipe.make_examples(texts, tokenizer, size, seed)
    if not examples.examples:
        raise ValueError(
            f"--data must have 'source' and 'target', or texts of two or more sentences, for "
            f"{recipe.title}, got {len(texts)} texts that cannot be split into summary and body"
        )
    batch_size = recipe.batch_size(size)
    batches = random_batches(examples.examples, tokenizer, batch_size, steps, seed)
    torch.manual_seed(seed)
    model = recipe.build(size, tokenizer)
    print(f"\n{recipe.title}: {_describe_examples(recipe.task, model, examples, size)}")
    print(f"  batches of {batch_size} rows", flush=True)
    with tqdm(total=2 * steps, desc=recipe.title, unit="step", leave=False) as bar:

        def on_step(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        comparison = train_side_by_side(model, batches, device, on_step)
    return ModelResult(name, recipe.title, recipe.task, model, examples, batch_size, comparison)


def _describe_examples(
    task: str, model: PreTrainedModel, examples: ExampleSet, size: DemoSize
) -> str:
    parts = [
        f"{task}, {model.num_parameters() / 1e6:.1f} M weights, {len(examples.examples):,} examples"
    ]
    if examples.unusable:
        parts.append(f"{examples.unusable:,} texts left out: they have one sentence, so no summary")
    if examples.cut_inputs:
        parts.append(f"{examples.cut_inputs:,} inputs cut to {size.max_length} tokens")
    if examples.cut_labels:
        parts.append(f"{examples.cut_labels:,} targets cut to {size.max_label_length} tokens")
    return "\n  ".join(parts)


def _failed_checks(results: Sequence[ModelResult], device: torch.device) -> list[str]:
    """Reasons why the comparison is not valid: steps that were not packed, losses that differ."""
    failures = []
    for result in results:
        if result.comparison.fallbacks:
            reasons = ", ".join(f"{n} x {r}" for r, n in result.comparison.fallbacks.items())
            failures.append(f"{result.title} was not packed in some steps: {reasons}")
        if result.comparison.packed_calls < len(result.comparison.tokens):
            failures.append(
                f"{result.title} was packed in {result.comparison.packed_calls} of "
                f"{len(result.comparison.tokens)} steps"
            )
        worst = max(result.comparison.loss_differences)
        # In this form of the comparison a NaN fails.
        if not worst <= _LOSS_TOLERANCE[device.type]:
            failures.append(
                f"{result.title}: the losses differ by {worst:.1e}, "
                f"more than {_LOSS_TOLERANCE[device.type]:.0e}"
            )
    return failures


# ------------------------------------------------------------------------------------------ report


def _table(results: Sequence[ModelResult]) -> str:
    headers = [
        "model",
        "padding",
        "tokens/s\npadded",
        "tokens/s\npacked",
        "step-time\nratio",
        "ideal\nratio",
        "ratio /\nideal",
        "largest\nloss diff",
        "peak MiB\npadded",
        "peak MiB\npacked",
    ]
    return format_table(headers, [_row(result.title, result.comparison) for result in results])


def _row(title: str, comparison: Comparison) -> list[str]:
    padded, packed = comparison.padded, comparison.packed
    return [
        title,
        f"{comparison.padding_share:.1%}",
        f"{comparison.tokens_per_second(padded):,.0f}",
        f"{comparison.tokens_per_second(packed):,.0f}",
        f"{comparison.time_ratio:.2f}",
        f"{comparison.ideal_ratio:.2f}",
        f"{comparison.share_of_ideal:.2f}",
        f"{max(comparison.loss_differences):.1e}",
        f"{padded.peak_bytes / 2**20:,.0f}",
        f"{packed.peak_bytes / 2**20:,.0f}",
    ]


def _caption(device: torch.device, steps: int) -> str:
    statistic = "CUDA allocator" if device.type == "cuda" else "CPU allocator, by torch's profiler"
    return (
        f"{steps} steps each, timed over forward and backward (the JSON has times with the\n"
        "optimizer, too). tokens/s: real tokens. step-time ratio: padded / packed time. ideal\n"
        "ratio: padded / packed operations, counted. ratio / ideal: of each step. All ratios are\n"
        "medians over the steps. peak: memory that one forward and backward needs in addition to\n"
        f"the weights, on the batch with the most slots ({statistic})."
    )


def _report(
    results: Sequence[ModelResult],
    texts: Sequence[Text],
    tokenizer: Tokenizer,
    size: DemoSize,
    device: torch.device,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    return {
        "versions": machine.versions(),
        "machine": machine.describe_machine(),
        "device": device.type,
        "dtype": "bf16 autocast" if device.type == "cuda" else "fp32",
        "torch_threads": torch.get_num_threads(),
        "options": {
            "model": arguments.model,
            "steps": arguments.steps,
            "seed": arguments.seed,
            "size": asdict(size),
        },
        "data": {
            "name": _data_name(arguments.data),
            "texts": len(texts),
            "vocab_size": tokenizer.get_vocab_size(),
        },
        "models": {result.name: _report_model(result) for result in results},
    }


def _report_model(result: ModelResult) -> dict[str, Any]:
    comparison = result.comparison
    return {
        "task": result.task,
        "weights": result.model.num_parameters(),
        "config": result.model.config.to_diff_dict(),
        "batch_size": result.batch_size,
        "examples": {
            "usable": len(result.examples.examples),
            "unusable": result.examples.unusable,
            "cut_inputs": result.examples.cut_inputs,
            "cut_labels": result.examples.cut_labels,
        },
        "summary": {
            "padding_share": comparison.padding_share,
            "smallest_padding_share_of_a_step": min(comparison.padding_shares),
            "tokens_per_second_padded": comparison.tokens_per_second(comparison.padded),
            "tokens_per_second_packed": comparison.tokens_per_second(comparison.packed),
            "step_time_ratio": comparison.time_ratio,
            "ideal_ratio": comparison.ideal_ratio,
            "share_of_ideal": comparison.share_of_ideal,
            "largest_loss_difference": max(comparison.loss_differences),
            "peak_bytes_padded": comparison.padded.peak_bytes,
            "peak_bytes_packed": comparison.packed.peak_bytes,
        },
        "fallbacks": comparison.fallbacks,
        "steps": {
            "slots": comparison.slots,
            "tokens": comparison.tokens,
            "loss_differences": comparison.loss_differences,
            "time_ratios": comparison.time_ratios,
            "ideal_ratios": comparison.ideal_ratios,
            "padded": _report_log(comparison.padded),
            "packed": _report_log(comparison.packed),
        },
    }


def _report_log(log: TrainingLog) -> dict[str, Any]:
    return {
        "losses": log.losses,
        "forward_backward_seconds": log.forward_backward_seconds,
        "step_seconds": log.step_seconds,
        "linear_operations": [operations.linear for operations in log.operations],
        "attention_operations": [operations.attention for operations in log.operations],
    }


def _write(report: dict[str, Any], results: Sequence[ModelResult], folder: Path) -> None:
    written = [folder / "demo.json"]
    write_json(written[0], report)
    if figures.available():
        written.append(folder / "demo.png")
        figures.draw_demo([(r.title, r.comparison) for r in results], written[-1])
    print("\nwritten: " + ", ".join(map(str, written)))
