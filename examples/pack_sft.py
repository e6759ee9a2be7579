"""Supervised fine-tuning with TRL's `SFTTrainer` on rows packed by `pack_dataset`.

    python examples/pack_sft.py                              a tiny Llama on docstrings, one minute
    python examples/pack_sft.py --model Qwen/Qwen3-0.6B --data my.jsonl --capacity 4096

Each sequence of a row attends only to itself and is not trained to predict tokens of the next one,
so the loss equals that of the same sequences padded. `patch_model` is optional. It also skips the
remaining padding, and computes attention per sequence instead of under a mask of the whole row.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from trl import SFTConfig, SFTTrainer

from tokenpack import patch_model
from tokenpack.data import collate_packed_rows, pack_dataset
from tokenpack.samples.text import read_texts, standard_library_texts
from tokenpack.samples.tokenizer import BOS, EOS, PAD, train_tokenizer


def main(arguments: list[str] | None = None) -> SFTTrainer:
    """Train. Returns the trainer, with its logs."""
    options = parse(arguments)
    texts = read_texts(options.data) if options.data else standard_library_texts(options.texts)
    texts = [text.source if text.target is None else text.source + text.target for text in texts]
    if options.model is None:
        model, tokenizer = tiny_llama(texts)
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)

    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    token_ids = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    rows = pack_dataset(
        token_ids,
        options.capacity,
        padding_value=tokenizer.pad_token_id,
        overlong="truncate",
        drop_empty=True,
    )
    tokens = sum(map(sum, rows["seq_lengths"]))
    share = tokens / (len(rows) * options.capacity)
    print(f"{len(texts):,} texts in {len(rows):,} rows of {options.capacity:,}, {share:.1%} filled")

    if not options.unpatched:
        patch_model(model)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(options.out),
            per_device_train_batch_size=options.rows_per_batch,
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            # The rows are complete, including sequence boundaries: TRL must not change them.
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
        ),
        train_dataset=rows,
        data_collator=collate_packed_rows,
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="model name or folder (default: a tiny random Llama)")
    parser.add_argument(
        "--data",
        type=Path,
        help=".txt or .jsonl file (default: docstrings of Python's standard library)",
    )
    parser.add_argument("--texts", type=int, default=2000, help="number of docstrings")
    parser.add_argument("--capacity", type=int, default=1024, help="tokens per row")
    parser.add_argument("--rows-per-batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--unpatched", action="store_true", help="do not patch the model")
    parser.add_argument("--out", type=Path, default=Path("tokenpack-sft"))
    return parser.parse_args(arguments)


def tiny_llama(texts: list[str]) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Build a Llama with a million random weights, and train a tokenizer on the texts."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(texts, 2048), pad_token=PAD, eos_token=EOS, bos_token=BOS
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    return LlamaForCausalLM(config), tokenizer


if __name__ == "__main__":
    main()
