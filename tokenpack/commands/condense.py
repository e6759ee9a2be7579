"""``tokenpack condense``: train a condenser, compare it with controls, and run it."""

from __future__ import annotations

import argparse
import functools
import math
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from ..data.condense import split_by_content, tokenize_documents
from ..data.reader import streaming_dataset_reader
from ..models import decoder as _  # noqa: F401  registers our own decoder with the Auto classes
from ..models.condenser import Condenser, CondenserConfig
from ..models.condenser.evaluation import CONTROLS, CondenserEvaluation, evaluate_condenser
from ..table import format_table
from ..trainer.condense import CondenseTrainer
from . import condense_figures, figures
from .output import make_folder, write_json

_COLUMNS = ("context", "prompt", "completion", "text")


def run(arguments: argparse.Namespace) -> int:
    """Run one of the actions. Returns 1 if a control is not beaten, otherwise 0."""
    action = {"train": _train, "eval": _eval, "run": _run}
    return action[arguments.action](arguments)


# ------------------------------------------------------------------------------------------ train


def _train(arguments: argparse.Namespace) -> int:
    make_folder(arguments.out, "--out")
    torch.manual_seed(arguments.seed)
    condenser_path = arguments.condenser or arguments.decoder
    paths = {"--condenser": condenser_path, "--decoder": arguments.decoder}
    models = [_load(AutoModelForCausalLM, path, option) for option, path in paths.items()]
    tokenizers = [_load(AutoTokenizer, path, option) for option, path in paths.items()]
    config = CondenserConfig(
        carrier=arguments.carrier,
        ratios=arguments.ratios,
        num_condense_tokens=arguments.num_condense_tokens,
        segment_length=arguments.segment_length,
        slot_positions=arguments.slot_positions,
        num_last_layers=arguments.last_layers,
        projection=arguments.projection,
        completion_weight=arguments.completion_weight,
        continuation_weight=arguments.continuation_weight,
        reconstruction_weight=arguments.reconstruction_weight,
        distillation_weight=arguments.distillation_weight,
        condenser_name_or_path=str(condenser_path),
        decoder_name_or_path=str(arguments.decoder),
    )
    model = Condenser.from_models(
        models[0],
        models[1],
        config,
        lora={"r": arguments.lora_rank, "lora_alpha": 2 * arguments.lora_rank},
        condenser_tokenizer=tokenizers[0],
        decoder_tokenizer=tokenizers[1],
    )
    data = _read(arguments.data)
    if arguments.eval_data:
        held_out = _read(arguments.eval_data)
    else:
        data, held_out = split_by_content(data, arguments.held_out, seed=arguments.seed)
    rows, eval_rows = (_documents(arguments, each, *tokenizers) for each in (data, held_out))
    trainer = CondenseTrainer(
        model,
        _training_arguments(arguments),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=tokenizers[1],
        max_tokens_per_batch=arguments.tokens_per_batch,
        max_tokens_per_microbatch=arguments.tokens_per_microbatch,
        max_eval_tokens_per_microbatch=arguments.tokens_per_microbatch,
        slots_learning_rate=arguments.slots_lr,
        projection_learning_rate=arguments.projection_lr,
        generate_samples=min(4, len(eval_rows)),
    )
    _describe(model, rows, eval_rows)
    trainer.train(resume_from_checkpoint=arguments.resume or None)
    trainer.save_model()
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    table = [[str(e["step"]), f"{e['eval_loss']:.4f}"] for e in logged]
    print(format_table(["step", "eval loss"], table))
    print(f"{arguments.out}: the condenser with the smallest eval loss")
    if arguments.push_to_hub:
        trainer.push_to_hub()
    return 0


def _training_arguments(arguments: argparse.Namespace) -> TrainingArguments:
    every: Any = arguments.eval_steps or 0.05
    push: dict[str, Any] = {}
    if arguments.push_to_hub:
        push = {"push_to_hub": True, "hub_model_id": arguments.push_to_hub}
    return TrainingArguments(
        str(arguments.out),
        num_train_epochs=arguments.epochs,
        max_steps=arguments.steps or -1,
        learning_rate=arguments.lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.01,
        bf16=arguments.bf16,
        logging_steps=every,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        seed=arguments.seed,
        report_to=arguments.report_to,
        use_cpu=not torch.cuda.is_available(),
        **push,
    )


def _describe(model: Condenser, rows: Any, eval_rows: Any) -> None:
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    everything = sum(each.numel() for each in model.parameters())
    print(
        f"{len(rows):,} documents to train on, {len(eval_rows):,} to evaluate; {trained:,} of "
        f"{everything:,} parameters are trained"
    )


# ------------------------------------------------------------------------------------------- data


def _read(files: str) -> Dataset:
    """The texts of files that ``tokenpack pack`` reads."""
    columns: dict[str, list[Any]] = {}
    for batch in streaming_dataset_reader(files, batch_size=1000):
        for name in _COLUMNS:
            if name in batch:
                columns.setdefault(name, []).extend(batch[name])
    lengths = {len(values) for values in columns.values()}
    if len(lengths) != 1:
        raise ValueError(
            "--data must have the columns context, prompt and completion, or text, in all of its "
            f"rows, got {', '.join(columns) or 'none of them'}"
        )
    return Dataset.from_dict(columns)


def _documents(arguments: argparse.Namespace, data: Dataset, condenser: Any, decoder: Any) -> Any:
    return tokenize_documents(
        data,
        condenser,
        decoder,
        max_context_tokens=arguments.context_tokens,
        continuation_tokens=arguments.continuation_tokens,
        prompt_tokens=arguments.prompt_tokens,
    )


def _load(kind: Any, path: str, option: str) -> Any:
    try:
        return kind.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{option} must be a folder or a hub name of a causal model with its tokenizer, got "
            f"{path}: {error}"
        ) from None


def _load_condenser(arguments: argparse.Namespace) -> Condenser:
    given: dict[str, Any] = {}
    for name in ("condenser", "decoder"):
        path = getattr(arguments, name)
        given[name] = None if path is None else _load(AutoModelForCausalLM, path, f"--{name}")
    model = Condenser.from_pretrained(arguments.model, **given)
    for name in given:
        path = getattr(arguments, name)
        if path is not None:
            model.set_tokenizers(**{name: _load(AutoTokenizer, path, f"--{name}")})
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


# ------------------------------------------------------------------------------------------- eval


def _eval(arguments: argparse.Namespace) -> int:
    make_folder(arguments.out, "--out")
    model = _load_condenser(arguments)
    tokenizers = [model.tokenizer_of(name) for name in ("condenser", "decoder")]
    rows = _documents(arguments, _read(arguments.data), *tokenizers)
    if arguments.documents is not None:
        rows = rows.select(range(min(arguments.documents, len(rows))))
    ratios = arguments.ratios or model.config.ratios or [None]
    if arguments.ratios and model.config.ratios is None:
        raise ValueError("--ratios must be left out for a condenser with a fixed number of vectors")
    progress = functools.partial(tqdm, desc="ratios", file=sys.stderr)
    result = evaluate_condenser(
        model, rows.to_list(), ratios, seed=arguments.seed, progress=progress
    )
    print(report(result))
    write_json(arguments.out / "condense.json", result.to_dict())
    if figures.available():
        condense_figures.draw(result, arguments.out / "condense.png")
    return 0 if all(each.beaten(name) for each in result.ratios for name in CONTROLS) else 1


def report(result: CondenserEvaluation) -> str:
    """The tables of an evaluation, and the controls that are not beaten."""
    names = ["none", "last k", "untrained", "other", "condensed", "full"]
    keys = ["none", "last_k", "untrained", "other", "condensed", "full"]
    rows = []
    for each in result.ratios:
        share = "-" if math.isnan(each.recovered) else f"{each.recovered:.0%}"
        cells = [f"{each.nll[key]:.4f}" for key in keys]
        rows.append([_name(each.ratio), f"{each.vectors:.1f}", *cells, share])
    parts = [
        f"{result.documents:,} documents, {result.context_tokens:.1f} tokens of context, "
        f"{result.targets:,} targets; negative log likelihood in nats per target",
        format_table(["ratio", "vectors", *names, "recovered"], rows),
        "",
        "condensed minus each control, with its standard error over documents",
        format_table(
            ["ratio", *names[:4]],
            [
                [
                    _name(each.ratio),
                    *(
                        f"{each.difference[k]:+.4f} ± {each.standard_error[k]:.4f}"
                        for k in CONTROLS
                    ),
                ]
                for each in result.ratios
            ],
        ),
        "",
        _costs(result),
    ]
    lost = [
        f"not beaten by two standard errors at ratio {_name(each.ratio)}: {name.replace('_', ' ')}"
        for each in result.ratios
        for name in CONTROLS
        if not each.beaten(name)
    ]
    return "\n".join([*parts, *lost])


def _costs(result: CondenserEvaluation) -> str:
    def cells(seconds: float, cache: int, peak: int | None) -> list[str]:
        memory = "-" if peak is None else f"{peak / 2**20:.1f}"
        return [f"{1e3 * seconds:.2f}", f"{cache / 2**10:.1f}", memory]

    rows = [
        [
            _name(each.ratio),
            "-" if each.teacher_forced is None else f"{each.teacher_forced:.1%}",
            "-" if each.greedy is None else f"{each.greedy:.1%}",
            *cells(each.prefill_seconds, each.cache_bytes, each.peak_bytes),
        ]
        for each in result.ratios
    ]
    figures_of_full = (result.full_prefill_seconds, result.full_cache_bytes, result.full_peak_bytes)
    rows.append(["full", "-", "-", *cells(*figures_of_full)])
    heads = [
        "ratio",
        "reconstructed\nteacher-forced",
        "reconstructed\ngreedy",
        "prefill\nms",
        "cache\nKiB",
        "peak\nMiB",
    ]
    return format_table(heads, rows)


def _name(ratio: int | None) -> str:
    return "fixed" if ratio is None else str(ratio)


# -------------------------------------------------------------------------------------------- run


def _run(arguments: argparse.Namespace) -> int:
    contexts = [_text_of(each) for each in arguments.context]
    prompts = arguments.prompt or [""]
    if len(prompts) == 1:
        prompts = prompts * len(contexts)
    if len(prompts) != len(contexts):
        raise ValueError(
            f"--prompt must be given once or {len(contexts)} times, as --context, got "
            f"{len(prompts)}"
        )
    model = _load_condenser(arguments)
    answers = model.generate(
        contexts,
        prompts,
        ratio=arguments.ratio,
        max_new_tokens=arguments.max_new_tokens,
        do_sample=False,
    )
    for prompt, answer in zip(prompts, answers):
        print(f"{prompt}{answer}")
    return 0


def _text_of(given: str) -> str:
    """The content of a file, or the text itself."""
    path = Path(given)
    try:
        return path.read_text("utf-8") if path.is_file() else given
    except OSError:  # a text that is too long for a file's name
        return given
