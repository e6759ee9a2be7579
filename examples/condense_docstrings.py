"""Condense the bodies of docstrings, so that a frozen decoder writes their summaries.

    python examples/condense_docstrings.py --decoder HuggingFaceTB/SmolLM2-135M
    python examples/condense_docstrings.py --decoder my/large --condenser my/small --ratios 4 8

The context is the body of a docstring of Python's standard library, the prompt is "Summary:", and
the completion its summary. At the end, the condenser is compared with controls on docstrings that
it has not seen, and saved.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from tokenpack.commands.condense import report
from tokenpack.data.condense import split_by_content, tokenize_documents
from tokenpack.models import decoder as _  # noqa: F401  our own decoder, for AutoModelForCausalLM
from tokenpack.models.condenser import Condenser
from tokenpack.models.condenser.evaluation import evaluate_condenser
from tokenpack.samples.text import split_summary, standard_library_texts
from tokenpack.trainer.condense import CondenseTrainer


def main(arguments: list[str] | None = None) -> CondenseTrainer:
    """Train, evaluate and save. Returns the trainer."""
    options = parse(arguments)
    torch.manual_seed(0)
    paths = (options.condenser or options.decoder, options.decoder)
    models = [AutoModelForCausalLM.from_pretrained(path) for path in paths]
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in paths]
    model = Condenser.from_models(
        models[0],
        models[1],
        carrier=options.carrier,
        ratios=options.ratios,
        segment_length=options.segment_length,
        condenser_name_or_path=paths[0],
        decoder_name_or_path=paths[1],
        condenser_tokenizer=tokenizers[0],
        decoder_tokenizer=tokenizers[1],
    )
    train, held_out = (
        tokenize_documents(rows, *tokenizers, max_context_tokens=None)
        for rows in split_by_content(documents(options.texts), 0.1)
    )
    trainer = CondenseTrainer(
        model,
        TrainingArguments(
            str(options.out),
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=train,
        max_tokens_per_batch=options.tokens_per_batch,
        max_tokens_per_microbatch=options.tokens_per_batch,
        overlong="drop",
    )
    trainer.train()
    print(report(evaluate_condenser(model, held_out.to_list(), options.ratios)))
    trainer.save_model()
    return trainer


def documents(count: int) -> Dataset:
    """Contexts, prompts and completions."""
    pairs = (split_summary(text.source) for text in standard_library_texts()[:count])
    return Dataset.from_list(
        [
            {"context": body, "prompt": "\nSummary:", "completion": " " + summary}
            for body, summary in filter(None, pairs)
        ]
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--decoder", required=True, help="model name or folder")
    parser.add_argument("--condenser", help="model name or folder (default: the decoder's)")
    parser.add_argument("--carrier", choices=("slots", "mean_pool"), default="mean_pool")
    parser.add_argument("--ratios", type=int, nargs="+", default=[4])
    parser.add_argument("--segment-length", type=int, default=256)
    parser.add_argument("--texts", type=int, default=4000, help="number of docstrings")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--tokens-per-batch", type=int, default=8192, help="of both streams")
    parser.add_argument("--out", type=Path, default=Path("tokenpack-condenser"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
