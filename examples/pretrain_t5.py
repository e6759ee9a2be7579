"""Pretrain T5 by span corruption, with batches sized by tokens.

    python examples/pretrain_t5.py                              a small T5, two minutes on two cores
    torchrun --nproc-per-node 2 examples/pretrain_t5.py         the same batches on two ranks
    python examples/pretrain_t5.py --train_file my.txt          or .jsonl with "text"
    torchrun --nproc-per-node 8 examples/pretrain_t5.py --bf16 \\
        --model google/t5-v1_1-base --random_weights --max_steps 100000 \\
        --dataset wikimedia/wikipedia --dataset_config 20231101.en \\
        --max_tokens_per_batch 131072 --max_tokens_per_microbatch 16384

Without --dataset or --train_file, the texts are the docstrings of Python's standard library.
Without --model, the model is small with random weights, and its tokenizer is trained on the texts.
Nothing is downloaded in that case. In minutes the model learns which words are frequent in
docstrings.

All flags of `TokenBudgetArguments` work, including all of transformers' `TrainingArguments`. To
train by epochs instead of steps, pass --max_steps -1 --num_train_epochs 3. To resume an interrupted
run, pass --resume_from_checkpoint last, or the folder of a checkpoint.
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
from tokenpack.samples.text import require_texts, standard_library_texts
from tokenpack.samples.tokenizer import EOS, PAD, train_tokenizer
from tokenpack.trainer import HierarchicalTokenTrainer, TokenBudgetArguments

# Defaults that differ from `TokenBudgetArguments`: training takes minutes on two CPU cores.
DEFAULTS = {
    **{"output_dir": "runs/t5", "max_steps": 200, "learning_rate": 5e-3, "warmup_steps": 20},
    **{"max_tokens_per_batch": 4096, "max_tokens_per_microbatch": 2048},
    **{"max_eval_tokens_per_microbatch": 4096, "logging_steps": 10, "logging_first_step": True},
    "use_cpu": not torch.accelerator.is_available(),  # required by torchrun without a GPU
}
SMALL = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_heads": 4, "num_layers": 2}


@dataclass
class Options:
    """Options of this script: model and data."""

    model: str | None = HfArg(default=None, help="Model name on the Hub, or a folder.")
    random_weights: bool = HfArg(default=False, help="Use only the model's config.")
    tokenizer: str | None = HfArg(default=None, help="Default: the model's tokenizer.")
    dataset: str | None = HfArg(default=None, help="Dataset name on the Hub, or a folder.")
    dataset_config: str | None = HfArg(default=None, help="Configuration of the dataset.")
    dataset_split: str = HfArg(default="train", help="Split, such as train[:1000].")
    text_column: str = HfArg(default="text", help="Column with the texts.")
    train_file: str | None = HfArg(default=None, help="A .txt (paragraphs) or .jsonl file.")
    eval_texts: int = HfArg(default=100, help="Texts held out for evaluation.")
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

    texts = load_texts(options, args)
    require_texts(texts, options.text_column)
    tokenizer = load_tokenizer(options, args, texts)
    parts = texts.train_test_split(test_size=options.eval_texts, seed=args.seed)
    with args.main_process_first(desc="tokenizing"):  # other ranks read the cache
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
    if not trainer.stop_agreed:  # a signal may leave little time before the process is killed
        trainer.save_model()
        report(trainer, trainer.evaluate())
    return trainer


def load_texts(options: Options, args: TokenBudgetArguments) -> Dataset:
    """Load a dataset with a column of texts."""
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
    """Load a tokenizer by name, or train one on the texts on the first rank and broadcast it."""
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
        split_special_tokens=True,  # tokenize a literal "</s>" in a text as text
    )


def pieces(texts: list[str], tokenizer: Any, longest: int) -> dict[str, list[list[int]]]:
    """Tokenize texts into pieces of at most ``longest`` tokens, including an EOS, without loss."""
    step, rows = longest - 1, []
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        rows += [[*ids[at : at + step], tokenizer.eos_token_id] for at in range(0, len(ids), step)]
    return {"input_ids": rows}


def load_model(options: Options, tokenizer: Any) -> Any:
    """Load a model by name, or build a small T5 with random weights."""
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
    """Print a one-line summary on the first rank."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    rate = median(entry["tokens_per_second"] for entry in logs)
    share = median(entry["real_token_share"] for entry in logs)
    losses = f"{logs[0]['loss']:.3f} -> {logs[-1]['loss']:.3f}"
    if trainer.is_world_process_zero():
        print(
            f"{trainer.state.global_step} steps, {rate:,.0f} tokens/s, {share:.0%} of padded slots"
            f" are real tokens, loss {losses}, eval loss {metrics['eval_loss']:.3f}"
        )


if __name__ == "__main__":
    main().accelerator.end_training()
