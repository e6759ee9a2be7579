"""Train a translation model as NLLB is trained, in batches of so many tokens, and score it.

    python examples/translate_nllb.py                           a small M2M100, two minutes
    torchrun --nproc-per-node 2 examples/translate_nllb.py      the same batches, on two ranks
    python examples/translate_nllb.py --train_file my.jsonl     with "source" and "target"
    torchrun --nproc-per-node 8 examples/translate_nllb.py --bf16 \\
        --model facebook/nllb-200-distilled-600M --learning_rate 1e-4 --max_steps 20000 \\
        --dataset Helsinki-NLP/opus-100 --dataset_config de-en \\
        --source_column translation.en --target_column translation.de \\
        --max_tokens_per_batch 65536 --max_tokens_per_microbatch 16384

Without --dataset or --train_file the pairs are this machine's gettext catalogues: the messages of
its programs, in English and as people have translated them (for French: --locale fr
--target_language fra_Latn). A machine that has few of them, as a container may, falls back to
docstrings of Python's standard library, text -> summary, which is no translation. Nothing is
downloaded either way. Minutes suffice for the loss to fall, not for translations to be good.

All flags of `TokenBudgetArguments` work, and so all of transformers' `Seq2SeqTrainingArguments`.
For epochs in place of steps: --max_steps -1 --num_train_epochs 3. To go on after an interruption:
--resume_from_checkpoint last, or a checkpoint's folder.
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
from tokenpack.samples.text import split_summary, standard_library_texts
from tokenpack.samples.tokenizer import EOS, PAD, train_tokenizer
from tokenpack.trainer import HierarchicalTokenTrainer, TokenBudgetArguments

CATALOGUES = ["/usr/share/locale", "/usr/local/share/locale", "/opt/homebrew/share/locale"]
ENOUGH = 2000  # pairs to learn something from

# Where they differ from those of `TokenBudgetArguments`: what two CPU cores take minutes for.
DEFAULTS = {
    **{"output_dir": "runs/nllb", "max_steps": 200, "learning_rate": 3e-3, "warmup_steps": 20},
    **{"max_tokens_per_batch": 8192, "max_tokens_per_microbatch": 4096},
    **{"max_eval_tokens_per_microbatch": 4096, "logging_steps": 10, "logging_first_step": True},
    "use_cpu": not torch.accelerator.is_available(),  # torchrun without a GPU takes it
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
    """What is trained, and on what."""

    model: str | None = HfArg(default=None, help="A hub name or folder.")
    tokenizer: str | None = HfArg(default=None, help="By default the model's.")
    source_language: str = HfArg(default="eng_Latn", help="Token before sources; '' for none.")
    target_language: str = HfArg(default="deu_Latn", help="The same of targets.")
    dataset: str | None = HfArg(default=None, help="A hub name or folder.")
    dataset_config: str | None = HfArg(default=None, help="Its configuration.")
    dataset_split: str = HfArg(default="train", help="Such as train[:1000].")
    source_column: str = HfArg(default="source", help="Its column of sources.")
    target_column: str = HfArg(default="target", help="Its column of targets.")
    train_file: str | None = HfArg(default=None, help="A .jsonl of such columns.")
    locale: str = HfArg(default="de", help="Of catalogues, where there is no data.")
    eval_pairs: int = HfArg(default=100, help="Pairs to hold out.")
    vocab_size: int = HfArg(default=4096, help="Of a tokenizer trained here.")


def main(arguments: list[str] | None = None) -> HierarchicalTokenTrainer:
    """Train and evaluate as the flags say; the trainer, with its logs, when it is done."""
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
    with args.main_process_first(desc="tokenizing"):  # the others find it in the cache
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
    if not trainer.stop_agreed:  # by a signal: there may be little time
        trainer.save_model()
        report(trainer, trainer.evaluate())
    return trainer


def load_pairs(options: Options, args: TokenBudgetArguments) -> Dataset:
    """A dataset of sources, targets, and the language of these for the metrics."""
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
            rows = rows.select_columns([options.source_column, options.target_column])
    return rows.add_column("target_language", [options.target_language] * len(rows))


def catalogue_pairs(locale: str) -> dict[str, str]:
    """Messages of three words or more in this machine's gettext catalogues, and as translated."""
    pairs: dict[str, str] = {}
    for root in CATALOGUES:
        for path in sorted(Path(root, locale, "LC_MESSAGES").glob("*.mo")):
            try:
                with path.open("rb") as file:  # there is no public way to list a catalogue
                    messages = GNUTranslations(file)._catalog
            except (OSError, ValueError):  # ValueError: not in the encoding that it says
                continue
            for message, translated in messages.items():
                text = message[0] if isinstance(message, tuple) else message  # of several: plurals
                text = text.split("\4")[-1].strip()  # what precedes it is a context
                if len(text.split()) >= 3 and translated.strip() not in ("", text):
                    pairs.setdefault(text, translated.strip())
    return pairs


def load_tokenizer(options: Options, args: TokenBudgetArguments, pairs: Dataset) -> Any:
    """One that is named, or one trained on the texts, by the first rank for all."""
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
        split_special_tokens=True,  # "</s>" in a text is text
    )


def encode(batch: dict[str, list[str]], tokenizer: Any, options: Options) -> dict[str, list]:
    """As NLLB has it: ``language text </s>``, on either side."""
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
    """The model that is named, or a small M2M100 (which NLLB is) of random weights."""
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
    """One line of what was trained, by the first rank."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    rate = median(entry["tokens_per_second"] for entry in logs)
    share = median(entry["real_token_share"] for entry in logs)
    losses = f"{logs[0]['loss']:.3f} -> {logs[-1]['loss']:.3f}"
    if trainer.is_world_process_zero():
        print(
            f"{trainer.state.global_step} steps, {rate:,.0f} tokens/s, {share:.0%} of padded slots"
            f" real, loss {losses}, held out {metrics['eval_loss']:.3f},"
            f" BLEU {metrics['eval_bleu']:.2f}, chrF++ {metrics['eval_chrf']:.2f}"
        )


if __name__ == "__main__":
    main().accelerator.end_training()
