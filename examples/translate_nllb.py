"""Train and score an NLLB-style translation model, with batches sized by tokens.

    python examples/translate_nllb.py                           a small M2M100, two minutes
    torchrun --nproc-per-node 2 examples/translate_nllb.py      the same batches on two ranks
    python examples/translate_nllb.py --train_file my.jsonl     with "source" and "target"
    torchrun --nproc-per-node 8 examples/translate_nllb.py --bf16 \\
        --model facebook/nllb-200-distilled-600M --learning_rate 1e-4 --max_steps 20000 \\
        --dataset Helsinki-NLP/opus-100 --dataset_config de-en \\
        --source_column translation.en --target_column translation.de \\
        --max_tokens_per_batch 65536 --max_tokens_per_microbatch 16384

Without --dataset or --train_file, the pairs come from the gettext catalogs on this machine: program
messages in English and their translations (for French, pass --locale fr --target_language
fra_Latn). If there are too few, as in most containers, the pairs are docstrings of Python's
standard library and their summaries, which is not translation. Nothing is downloaded in either
case. In minutes the loss falls, but the translations are not good yet.

All flags of `TokenBudgetArguments` work, including all of transformers' `Seq2SeqTrainingArguments`.
To train by epochs instead of steps, pass --max_steps -1 --num_train_epochs 3. To resume an
interrupted run, pass --resume_from_checkpoint last, or the folder of a checkpoint.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from gettext import GNUTranslations
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    M2M100Config,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.hf_argparser import HfArg, HfArgumentParser

from tokenpack.data import CappedSeq2SeqCollator
from tokenpack.metrics import make_seq2seq_compute_metrics
from tokenpack.samples.text import require_texts, split_summary, standard_library_texts
from tokenpack.samples.tokenizer import EOS, PAD, train_tokenizer
from tokenpack.trainer import HierarchicalTokenTrainer, TokenBudgetArguments

CATALOGUES = ["/usr/share/locale", "/usr/local/share/locale", "/opt/homebrew/share/locale"]
ENOUGH = 2000  # with fewer pairs, use docstrings

# Defaults that differ from `TokenBudgetArguments`: training takes minutes on two CPU cores.
DEFAULTS = {
    **{"output_dir": "runs/nllb", "max_steps": 200, "learning_rate": 3e-3, "warmup_steps": 20},
    **{"max_tokens_per_batch": 8192, "max_tokens_per_microbatch": 4096},
    **{"max_eval_tokens_per_microbatch": 4096, "logging_steps": 10, "logging_first_step": True},
    "use_cpu": not torch.accelerator.is_available(),  # required by torchrun without a GPU
    **{"max_encoder_len": 128, "max_decoder_len": 128, "generation_max_length": 64},
    **{"predict_with_generate": True},
}
SMALL = {
    **{"d_model": 128, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256},
    **{"encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 512},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
    **{"dropout": 0.0, "attention_dropout": 0.0},
}


@dataclass
class Options:
    """Options of this script: model and data."""

    model: str | None = HfArg(default=None, help="Model name on the Hub, or a folder.")
    tokenizer: str | None = HfArg(default=None, help="Default: the model's tokenizer.")
    source_language: str = HfArg(default="eng_Latn", help="Token before each source; '' for none.")
    target_language: str = HfArg(default="deu_Latn", help="Token before each target.")
    dataset: str | None = HfArg(default=None, help="Dataset name on the Hub, or a folder.")
    dataset_config: str | None = HfArg(default=None, help="Configuration of the dataset.")
    dataset_split: str = HfArg(default="train", help="Split, such as train[:1000].")
    source_column: str = HfArg(default="source", help="Column with the sources.")
    target_column: str = HfArg(default="target", help="Column with the targets.")
    train_file: str | None = HfArg(default=None, help="A .jsonl file with these columns.")
    locale: str = HfArg(default="de", help="Locale of the gettext catalogs.")
    eval_pairs: int = HfArg(default=100, help="Pairs held out for evaluation.")
    vocab_size: int = HfArg(default=4096, help="Size of a newly trained tokenizer.")


def main(arguments: list[str] | None = None) -> HierarchicalTokenTrainer:
    """Train and evaluate. Returns the trainer, with its logs."""
    parser = HfArgumentParser(
        (Options, TokenBudgetArguments),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(**DEFAULTS)
    options, args = parser.parse_args_into_dataclasses(arguments)
    set_seed(args.seed)

    pairs = load_pairs(options, args)
    tokenizer = load_tokenizer(options, args, pairs)
    parts = pairs.train_test_split(test_size=options.eval_pairs, seed=args.seed)
    with args.main_process_first(desc="tokenizing"):  # other ranks read the cache
        parts = parts.map(lambda batch: encode(batch, tokenizer, options), batched=True)

    model = load_model(options, tokenizer)
    if options.target_language:
        target_code = tokenizer.convert_tokens_to_ids(options.target_language)
        model.generation_config.forced_bos_token_id = target_code
    trainer = HierarchicalTokenTrainer(
        model=model,
        args=args,
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        data_collator=CappedSeq2SeqCollator(
            tokenizer, args.max_encoder_len, args.max_decoder_len, packed=args.pack
        ),
        compute_metrics=make_seq2seq_compute_metrics(
            tokenizer, parts["test"], options.source_column
        ),
        processing_class=tokenizer,
    )
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume == "last" else resume)
    if not trainer.stop_agreed:  # a signal may leave little time before the process is killed
        trainer.save_model()
        report(trainer, trainer.evaluate())
    return trainer


def load_pairs(options: Options, args: TokenBudgetArguments) -> Dataset:
    """Load a dataset of sources, targets and target languages, which the metrics use."""
    if options.dataset is None and options.train_file is None:
        pairs = catalogue_pairs(options.locale)
        origin = f"messages in English and {options.locale}"
        if len(pairs) < ENOUGH:
            texts = [split_summary(text.source) for text in standard_library_texts()]
            pairs, origin = dict(filter(None, texts)), "docstrings and their summaries"
            options.target_language = options.source_language
        if args.process_index == 0:
            print(f"{len(pairs):,} pairs: {origin}")
        sides = {options.source_column: list(pairs), options.target_column: list(pairs.values())}
        rows = Dataset.from_dict(sides)
    else:
        with args.main_process_first(desc="loading the dataset"):
            if options.dataset is not None:
                split = options.dataset_split
                rows = load_dataset(options.dataset, options.dataset_config, split=split)
            else:
                rows = load_dataset("json", data_files=options.train_file, split="train")
            rows = rows.flatten()  # {"translation": {"en": ...}} becomes "translation.en"
            columns = [options.source_column, options.target_column]
            for column in columns:
                require_texts(rows, column)
            rows = rows.select_columns(columns)
    return rows.add_column("target_language", [options.target_language] * len(rows))


def catalogue_pairs(locale: str) -> dict[str, str]:
    """Find messages of three words or more in the gettext catalogs, with their translations."""
    pairs: dict[str, str] = {}
    for root in CATALOGUES:
        for path in sorted(Path(root, locale, "LC_MESSAGES").glob("*.mo")):
            try:
                with path.open("rb") as file:  # gettext has no public way to list messages
                    messages = GNUTranslations(file)._catalog
            except (OSError, ValueError):  # ValueError: wrong encoding declared
                continue
            for message, translated in messages.items():
                # The key of a message with plurals is (singular, index).
                text = message[0] if isinstance(message, tuple) else message
                text = text.split("\4")[-1].strip()  # "\4" separates the context from the message
                if len(text.split()) >= 3 and translated.strip() not in ("", text):
                    pairs.setdefault(text, translated.strip())
    return pairs


def load_tokenizer(options: Options, args: TokenBudgetArguments, pairs: Dataset) -> Any:
    """Load a tokenizer by name, or train one on the texts on the first rank and broadcast it."""
    if name := options.tokenizer or options.model:
        return AutoTokenizer.from_pretrained(name)
    made = [None]
    if args.process_index == 0:
        texts = [*pairs[options.source_column], *pairs[options.target_column]]
        made = [train_tokenizer(texts, options.vocab_size).to_str()]
    broadcast_object_list(made)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(made[0]),
        pad_token=PAD,
        eos_token=EOS,
        extra_special_tokens=[options.source_language, options.target_language],
        split_special_tokens=True,  # tokenize a literal "</s>" in a text as text
    )


def encode(batch: dict[str, list[str]], tokenizer: Any, options: Options) -> dict[str, list]:
    """Tokenize as NLLB does: ``language text </s>`` on both sides."""
    plain = {"add_special_tokens": False, "verbose": False}
    sources = tokenizer(batch[options.source_column], **plain)["input_ids"]
    targets = tokenizer(text_target=batch[options.target_column], **plain)["input_ids"]

    def whole(rows: list[list[int]], language: str) -> list[list[int]]:
        code = [tokenizer.convert_tokens_to_ids(language)] if language else []
        return [[*code, *ids, tokenizer.eos_token_id] for ids in rows]

    return {
        "input_ids": whole(sources, options.source_language),
        "labels": whole(targets, options.target_language),
    }


def load_model(options: Options, tokenizer: Any) -> Any:
    """Load a model by name, or build a small M2M100 (NLLB's architecture) with random weights."""
    if options.model is not None:
        return AutoModelForSeq2SeqLM.from_pretrained(options.model)
    config = M2M100Config(
        vocab_size=len(tokenizer),
        **SMALL,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
    )
    return AutoModelForSeq2SeqLM.from_config(config)


def report(trainer: HierarchicalTokenTrainer, metrics: dict[str, float]) -> None:
    """Print a one-line summary on the first rank."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    rate = median(entry["tokens_per_second"] for entry in logs)
    share = median(entry["real_token_share"] for entry in logs)
    losses = f"{logs[0]['loss']:.3f} -> {logs[-1]['loss']:.3f}"
    if trainer.is_world_process_zero():
        print(
            f"{trainer.state.global_step} steps, {rate:,.0f} tokens/s, {share:.0%} of padded slots"
            f" are real tokens, loss {losses}, eval loss {metrics['eval_loss']:.3f},"
            f" BLEU {metrics['eval_bleu']:.2f}, chrF++ {metrics['eval_chrf']:.2f}"
        )


if __name__ == "__main__":
    main().accelerator.end_training()
