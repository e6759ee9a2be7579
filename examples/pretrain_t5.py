"""Pretrain T5 by span corruption, in batches of so many tokens.

    python examples/pretrain_t5.py                              a small T5, two minutes on two cores
    torchrun --nproc-per-node 2 examples/pretrain_t5.py         the same batches, on two ranks
    python examples/pretrain_t5.py --train_file my.txt          or .jsonl with a "text"
    torchrun --nproc-per-node 8 examples/pretrain_t5.py --bf16 \\
        --model google/t5-v1_1-base --random_weights --max_steps 100000 \\
        --dataset wikimedia/wikipedia --dataset_config 20231101.en \\
        --max_tokens_per_batch 131072 --max_tokens_per_microbatch 16384

Without --dataset or --train_file the texts are the docstrings of Python's standard library; without
--model the model is small and random, and its tokenizer is trained on the texts. Nothing is
downloaded then, and what it learns in minutes is which words are frequent in docstrings.

All flags of `TokenBudgetArguments` work, and so all of transformers' `TrainingArguments`. For
epochs in place of steps: --max_steps -1 --num_train_epochs 3. To go on after an interruption:
--resume_from_checkpoint last, or a checkpoint's folder.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    set_seed,
)
from transformers.hf_argparser import HfArg, HfArgumentParser

from tokenpack.data import T5SpanCorruptionCollatorFast
from tokenpack.samples.text import standard_library_texts
from tokenpack.samples.tokenizer import EOS, PAD, train_tokenizer
from tokenpack.trainer import HierarchicalTokenTrainer, TokenBudgetArguments

# Where they differ from those of `TokenBudgetArguments`: what two CPU cores take minutes for.
DEFAULTS = {
    **{"output_dir": "runs/t5", "max_steps": 200, "learning_rate": 5e-3, "warmup_steps": 20},
    **{"max_tokens_per_batch": 4096, "max_tokens_per_microbatch": 2048},
    **{"max_eval_tokens_per_microbatch": 4096, "logging_steps": 10, "logging_first_step": True},
    "use_cpu": not torch.accelerator.is_available(),  # torchrun without a GPU takes it
}
SMALL = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_heads": 4, "num_layers": 2}


@dataclass
class Options:
    """What is trained, and on what."""

    model: str | None = HfArg(default=None, help="A hub name or folder.")
    random_weights: bool = HfArg(default=False, help="Take its shape alone.")
    tokenizer: str | None = HfArg(default=None, help="By default the model's.")
    dataset: str | None = HfArg(default=None, help="A hub name or folder.")
    dataset_config: str | None = HfArg(default=None, help="Its configuration.")
    dataset_split: str = HfArg(default="train", help="Such as train[:1000].")
    text_column: str = HfArg(default="text", help="Its column of texts.")
    train_file: str | None = HfArg(default=None, help=".txt (paragraphs) or .jsonl.")
    eval_texts: int = HfArg(default=100, help="Texts to hold out.")
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

    texts = load_texts(options, args)
    tokenizer = load_tokenizer(options, args, texts)
    parts = texts.train_test_split(test_size=options.eval_texts, seed=args.seed)
    with args.main_process_first(desc="tokenizing"):  # the others find it in the cache
        parts = parts.map(
            lambda batch: pieces(batch[options.text_column], tokenizer, args.max_encoder_len),
            batched=True,
            remove_columns=texts.column_names,
        )

    trainer = HierarchicalTokenTrainer(
        model=load_model(options, tokenizer),
        args=args,
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        data_collator=T5SpanCorruptionCollatorFast(
            tokenizer,
            max_encoder_len=args.max_encoder_len,
            max_decoder_len=args.max_decoder_len,
            seed=args.seed,
            packed=args.pack,
        ),
        processing_class=tokenizer,
    )
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume == "last" else resume)
    if not trainer.stop_agreed:  # by a signal: there may be little time
        trainer.save_model()
        report(trainer, trainer.evaluate())
    return trainer


def load_texts(options: Options, args: TokenBudgetArguments) -> Dataset:
    """A dataset with a column of texts."""
    if options.dataset is None and options.train_file is None:
        texts = [text.source for text in standard_library_texts()]
        return Dataset.from_dict({options.text_column: texts})
    with args.main_process_first(desc="loading the dataset"):
        if options.dataset is not None:
            split = options.dataset_split
            return load_dataset(options.dataset, options.dataset_config, split=split)
        file = {"data_files": options.train_file, "split": "train"}
        if options.train_file.endswith(".txt"):
            return load_dataset("text", sample_by="paragraph", **file)
        return load_dataset("json", **file)


def load_tokenizer(options: Options, args: TokenBudgetArguments, texts: Dataset) -> Any:
    """One that is named, or one trained on the texts, by the first rank for all."""
    if name := options.tokenizer or options.model:
        return AutoTokenizer.from_pretrained(name)
    made = [None]
    if args.process_index == 0:
        made = [train_tokenizer(texts[options.text_column], options.vocab_size).to_str()]
    broadcast_object_list(made)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(made[0]),
        pad_token=PAD,
        eos_token=EOS,
        split_special_tokens=True,  # "</s>" in a text is text
    )


def pieces(texts: list[str], tokenizer: Any, longest: int) -> dict[str, list[list[int]]]:
    """Texts as tokens, in pieces of ``longest`` with their EOS: nothing is lost of a long one."""
    step, rows = longest - 1, []
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        rows += [[*ids[at : at + step], tokenizer.eos_token_id] for at in range(0, len(ids), step)]
    return {"input_ids": rows}


def load_model(options: Options, tokenizer: Any) -> Any:
    """The model that is named, or a small T5 of random weights."""
    if options.model is not None and not options.random_weights:
        return AutoModelForSeq2SeqLM.from_pretrained(options.model)
    if options.model is not None:
        return AutoModelForSeq2SeqLM.from_config(AutoConfig.from_pretrained(options.model))
    config = T5Config(
        vocab_size=len(tokenizer),
        **SMALL,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
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
            f" real, loss {losses}, held out {metrics['eval_loss']:.3f}"
        )


if __name__ == "__main__":
    main().accelerator.end_training()
