"""Pretrain a decoder from scratch: tokenizer, token shards, training, evaluation, generation.

    python examples/pretrain_decoder.py                        minutes on two CPU cores
    python examples/pretrain_decoder.py --preset shakespeare   grouped-query attention and dropout
    python examples/pretrain_decoder.py --preset moe           eight experts, two per token
    python examples/pretrain_decoder.py --train_file shakespeare.txt --preset shakespeare --full \\
        --vocab_size 8000 --max_steps 3000 --learning_rate 3e-4 --max_tokens_per_batch 16512
    torchrun --nproc-per-node 8 examples/pretrain_decoder.py --shards corpus --tokenizer my --bf16

Without --train_file and --shards, the texts are the docstrings of Python's standard library. The
presets are the three models of transformer-toolkit's examples. Without --full they are narrower and
shallower, so that 300 steps take minutes on a CPU.

The tokenizer and the shards are written to the output folder once, and used again by later runs.
Ctrl-C saves a checkpoint and returns. To go on, also after a kill, pass --resume_from_checkpoint
last: the run has the batches, learning rates and losses of one that was not interrupted. All flags
of `TokenBudgetArguments` work, including all of transformers' `TrainingArguments`.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import AutoTokenizer, set_seed
from transformers.hf_argparser import HfArg, HfArgumentParser

from tokenpack.data import (
    TokenShards,
    collate_packed_rows,
    shard_windows,
    train_tokenizer,
    write_shards,
)
from tokenpack.models.decoder import DecoderConfig, DecoderForCausalLM
from tokenpack.samples.text import read_texts, standard_library_texts
from tokenpack.trainer import TokenBudgetArguments, TokenBudgetTrainer

# Defaults that differ from `TokenBudgetArguments`. A batch is 16 windows of 128 tokens.
DEFAULTS = {
    **{"output_dir": "runs/decoder", "max_steps": 300, "warmup_steps": 30, "learning_rate": 2e-3},
    **{"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    **{"weight_decay": 0.1, "decay": "matrices", "adam_beta2": 0.95, "max_grad_norm": 1.0},
    **{"max_tokens_per_batch": 16 * 129, "max_tokens_per_microbatch": 16 * 129},
    **{"max_eval_tokens_per_microbatch": 32 * 129, "max_encoder_len": None},
    **{"logging_steps": 10, "logging_first_step": True, "eval_on_start": True},
    **{"eval_strategy": "steps", "eval_steps": 100, "save_steps": 100, "save_total_limit": 3},
    **{"load_best_model_at_end": True, "metric_for_best_model": "loss"},
    "remove_unused_columns": False,  # rows have `seq_lengths`, the boundaries of documents
    "use_cpu": not torch.accelerator.is_available(),  # required by torchrun without a GPU
}

# transformer-toolkit's examples: Quick Start, Small Model (Shakespeare), MoE Model.
PRESETS: dict[str, dict[str, Any]] = {
    "quickstart": {"dim": 512, "n_layers": 8, "n_heads": 8, "pos_enc": "rope"},
    "shakespeare": {
        **{"dim": 384, "n_layers": 6, "n_heads": 6, "attn": "gqa", "n_kv_heads": 3},
        **{"ffn": "swiglu", "hidden_dim": 1536, "norm": "rmsnorm", "pos_enc": "rope"},
        "dropout": 0.1,
    },
    "moe": {
        **{"dim": 512, "n_layers": 8, "n_heads": 8, "attn": "flash", "pos_enc": "rope"},
        **{"ffn": "moe", "n_experts": 8, "top_k": 2, "moe_aux_weight": 0.01, "dropout": 0.1},
    },
}
SMALL: dict[str, dict[str, Any]] = {
    "quickstart": {"dim": 128, "n_layers": 3, "n_heads": 4},
    "shakespeare": {"dim": 96, "n_layers": 4, "hidden_dim": 384},
    "moe": {"dim": 96, "n_layers": 2, "n_heads": 4, "hidden_dim": 192},
}


@dataclass
class Options:
    """Options of this script: model and data."""

    preset: str = HfArg(default="quickstart", help="quickstart, shakespeare or moe.")
    full: bool = HfArg(default=False, help="The size of the preset, not a small one.")
    config: str | None = HfArg(default=None, help="A folder with a DecoderConfig, not a preset.")
    train_file: str | None = HfArg(default=None, help="A .txt (paragraphs) or .jsonl file.")
    shards: str | None = HfArg(default=None, help="Token shards that exist, with --tokenizer.")
    tokenizer: str | None = HfArg(default=None, help="Default: one that is trained on the texts.")
    vocab_size: int = HfArg(default=2048, help="Size of a newly trained tokenizer.")
    seq_len: int = HfArg(default=128, help="Tokens of a window.")
    eval_windows: int = HfArg(default=64, help="Windows of an evaluation; 10 % are held out.")
    prompts: list[str] = field(default_factory=lambda: ["Return the", "This method"])


def main(arguments: list[str] | None = None) -> TokenBudgetTrainer:
    """Train, evaluate and generate. Returns the trainer, with its logs."""
    parser = HfArgumentParser(
        (Options, TokenBudgetArguments),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(**DEFAULTS)
    options, args = parser.parse_args_into_dataclasses(arguments)
    set_seed(args.seed)

    with args.main_process_first(desc="preparing the data"):  # other ranks read the files
        tokenizer, shards = prepare(options, Path(args.output_dir))
    train, held_out = shard_windows(shards, options.seq_len, split=0.9, seed=args.seed)
    held_out = Subset(held_out, range(min(options.eval_windows, len(held_out))))
    model = DecoderForCausalLM(make_config(options, tokenizer))
    if args.process_index == 0:
        size = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"{size:,} parameters, {len(train):,} windows, ln(vocab) {math.log(len(tokenizer)):.3f}"
        )

    trainer = TokenBudgetTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=collate_packed_rows,
        processing_class=tokenizer,
    )
    resume = args.resume_from_checkpoint
    args.eval_on_start = args.eval_on_start and not resume
    trainer.train(resume_from_checkpoint=True if resume == "last" else resume)
    if not trainer.stop_agreed:  # a signal may leave little time before the process is killed
        trainer.save_model()
        report(trainer, trainer.evaluate(), options.prompts)
    return trainer


def prepare(options: Options, folder: Path) -> tuple[Any, TokenShards]:
    """The tokenizer and the shards. Those that are made are written once, and then used again.

    Raises:
        SystemExit: if ``--shards`` is given without ``--tokenizer``.
    """
    if options.shards is not None:
        if options.tokenizer is None:
            raise SystemExit("--tokenizer must be given with --shards, which hold its ids")
        return AutoTokenizer.from_pretrained(options.tokenizer), TokenShards(options.shards)
    folder.mkdir(parents=True, exist_ok=True)
    corpus, texts = folder / "corpus", folder / "texts.jsonl"
    name = options.tokenizer or folder / "tokenizer"
    if not corpus.with_suffix(".idx").exists():  # written last
        read = read_texts(options.train_file) if options.train_file else standard_library_texts()
        lines = [text.source if text.target is None else text.source + text.target for text in read]
        texts.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        if options.tokenizer is None:
            train_tokenizer(lines, options.vocab_size).save_pretrained(name)
        report = write_shards(texts, corpus, AutoTokenizer.from_pretrained(name))
        print(report)
    return AutoTokenizer.from_pretrained(name), TokenShards(corpus)


def make_config(options: Options, tokenizer: Any) -> DecoderConfig:
    """The configuration of the preset or of ``--config``, for this tokenizer."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    if options.config is not None:
        return DecoderConfig.from_pretrained(options.config, vocab_size=len(tokenizer), **ids)
    if options.preset not in PRESETS:
        raise SystemExit(f"--preset must be one of {', '.join(PRESETS)}, got {options.preset!r}")
    small = {} if options.full else SMALL[options.preset]
    sizes = {**PRESETS[options.preset], **small, "tie_weights": False}
    return DecoderConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes, **ids
    )


def report(trainer: TokenBudgetTrainer, metrics: dict[str, float], prompts: list[str]) -> None:
    """Print the losses of the evaluations, and continuations of the prompts, on the first rank."""
    if not trainer.is_world_process_zero():
        return
    logs = trainer.state.log_history
    losses = [f"{log['step']}: {log['eval_loss']:.3f}" for log in logs[:-1] if "eval_loss" in log]
    loss = metrics["eval_loss"]
    print(f"validation loss at step {', '.join(losses)}")
    print(f"best {loss:.4f}, perplexity {math.exp(loss):.2f}")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return  # one rank alone cannot generate
    tokenizer, model = trainer.processing_class, trainer.accelerator.unwrap_model(trainer.model)
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").to(model.device)
        out = model.generate(**ids, max_new_tokens=30, do_sample=True, temperature=0.8, top_k=40)
        print(repr(tokenizer.decode(out[0], skip_special_tokens=True)))


if __name__ == "__main__":
    main().accelerator.end_training()
