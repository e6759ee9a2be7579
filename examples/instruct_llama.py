"""Tune a causal model on instructions, in batches of so many tokens: it learns the answers alone.

    python examples/instruct_llama.py                           a small Llama, two minutes
    torchrun --nproc-per-node 2 examples/instruct_llama.py      the same batches, on two ranks
    python examples/instruct_llama.py --train_file my.jsonl     with "messages", or "prompt" and
                                                                "response"
    torchrun --nproc-per-node 8 examples/instruct_llama.py --model meta-llama/Llama-3.2-1B \\
        --dataset HuggingFaceH4/ultrachat_200k --dataset_split train_sft --bf16 \\
        --learning_rate 1e-5 --max_encoder_len 4096 --max_tokens_per_microbatch 8192 \\
        --max_tokens_per_batch 131072 --max_steps -1 --num_train_epochs 1

Without --dataset or --train_file the rows are made of the docstrings of Python's standard library:
half ask for the summary of a text, half for the text to a summary. Without --model the model is
small and random, and its tokenizer is trained on the same. Nothing is downloaded then, and what it
learns in minutes is the form of an answer and common words, not to follow instructions.

A row is a chat, of which the last answer is learned. The tokenizer's chat template writes it; a
tokenizer without one is given the one below, which is saved with the model. All flags of
`TokenBudgetArguments` work, and so all of transformers' `TrainingArguments`. To go on after an
interruption: --resume_from_checkpoint last, or a checkpoint's folder.
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
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.hf_argparser import HfArg, HfArgumentParser

from tokenpack.data import packed_collate_fn
from tokenpack.samples.text import split_summary, standard_library_texts
from tokenpack.samples.tokenizer import BOS, EOS, PAD, train_tokenizer
from tokenpack.trainer import TokenBudgetArguments, TokenBudgetTrainer

CHAT_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "### {{ message['role'] }}\n{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}"
    "{% endfor %}"
    "{{ '### assistant\n' if add_generation_prompt else '' }}"
)

# Where they differ from those of `TokenBudgetArguments`: what two CPU cores take minutes for.
DEFAULTS = {
    **{"output_dir": "runs/llama", "max_steps": 200, "learning_rate": 3e-3, "warmup_steps": 20},
    **{"max_tokens_per_batch": 4096, "max_tokens_per_microbatch": 2048},
    **{"max_eval_tokens_per_microbatch": 4096, "logging_steps": 10, "logging_first_step": True},
    "use_cpu": not torch.accelerator.is_available(),  # torchrun without a GPU takes it
}
SMALL = {
    **{"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}


@dataclass
class Options:
    """What is trained, and on what."""

    model: str | None = HfArg(default=None, help="A hub name or folder.")
    tokenizer: str | None = HfArg(default=None, help="By default the model's.")
    dataset: str | None = HfArg(default=None, help="A hub name or folder.")
    dataset_config: str | None = HfArg(default=None, help="Its configuration.")
    dataset_split: str = HfArg(default="train", help="Such as train[:1000].")
    messages_column: str = HfArg(default="messages", help="Its chats: lists of role and content.")
    prompt_column: str = HfArg(default="prompt", help="Where it has no chats.")
    input_column: str = HfArg(default="input", help="Follows the prompt, if there.")
    response_column: str = HfArg(default="response", help="Answers to prompts.")
    train_file: str | None = HfArg(default=None, help="A .jsonl of such columns.")
    eval_rows: int = HfArg(default=100, help="Rows to hold out.")
    vocab_size: int = HfArg(default=4096, help="Of a tokenizer trained here.")


def main(arguments: list[str] | None = None) -> TokenBudgetTrainer:
    """Train and evaluate as the flags say; the trainer, with its logs, when it is done."""
    parser = HfArgumentParser(
        (Options, TokenBudgetArguments),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(**DEFAULTS)
    options, args = parser.parse_args_into_dataclasses(arguments)
    set_seed(args.seed)

    rows = load_rows(options, args)
    tokenizer = load_tokenizer(options, args, rows)
    longest = min(args.max_encoder_len, args.max_tokens_per_microbatch)
    with args.main_process_first(desc="tokenizing"):  # the others find it in the cache
        examples = rows.map(
            lambda row: encode(chat_of(row, options), tokenizer), remove_columns=rows.column_names
        )
        # Left out, not cut: half an answer teaches to stop early.
        fitting = examples.filter(lambda row: len(row["input_ids"]) <= longest)
    if args.process_index == 0:
        print(f"{len(rows):,} rows, {len(fitting):,} of them of at most {longest} tokens")
    parts = fitting.train_test_split(test_size=options.eval_rows, seed=args.seed)

    trainer = TokenBudgetTrainer(
        model=load_model(options, tokenizer),
        args=args,
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        data_collator=(
            packed_collate_fn(longest, stream=True)
            if args.pack
            else DataCollatorForSeq2Seq(tokenizer)
        ),
        processing_class=tokenizer,
    )
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume == "last" else resume)
    if not trainer.stop_agreed:  # by a signal: there may be little time
        trainer.save_model()
        report(trainer, trainer.evaluate())
    return trainer


def load_rows(options: Options, args: TokenBudgetArguments) -> Dataset:
    """A dataset of chats, or of prompts and responses."""
    if options.dataset is None and options.train_file is None:
        texts = [split_summary(text.source) for text in standard_library_texts()]
        return Dataset.from_list(
            [
                {"messages": turns(f"Summarise this in one line.\n\n{body}", summary)}
                if number % 2
                else {"messages": turns(f"Write what this summarises.\n\n{summary}", body)}
                for number, (body, summary) in enumerate(filter(None, texts))
            ]
        )
    with args.main_process_first(desc="loading the dataset"):
        if options.train_file is not None:
            return load_dataset("json", data_files=options.train_file, split="train")
        return load_dataset(options.dataset, options.dataset_config, split=options.dataset_split)


def turns(prompt: str, response: str) -> list[dict[str, str]]:
    """A chat of one question and its answer."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def chat_of(row: dict[str, Any], options: Options) -> list[dict[str, str]]:
    """Of a row, its chat up to the last answer."""
    if options.messages_column not in row:
        prompt = [row[options.prompt_column], row.get(options.input_column)]
        return turns("\n\n".join(filter(None, prompt)), row[options.response_column])
    chat = row[options.messages_column]
    last = max(at for at, message in enumerate(chat) if message["role"] == "assistant")
    return chat[: last + 1]


def encode(chat: list[dict[str, str]], tokenizer: Any) -> dict[str, list[int]]:
    """Tokens of a chat; labels are -100 but for its last answer, which ends in EOS."""
    prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    if not whole.startswith(prompt):
        raise ValueError(f"the chat template writes {prompt!r} otherwise once it is answered")
    # Apart, as the prompt will stand alone when an answer is asked for.
    texts = [prompt, whole[len(prompt) :]]
    asked, answer = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    if tokenizer.eos_token_id not in answer:
        answer = [*answer, tokenizer.eos_token_id]
    return {"input_ids": [*asked, *answer], "labels": [-100] * len(asked) + answer}


def load_tokenizer(options: Options, args: TokenBudgetArguments, rows: Dataset) -> Any:
    """One that is named, or one trained on the chats, by the first rank for all."""
    if name := options.tokenizer or options.model:
        tokenizer = AutoTokenizer.from_pretrained(name)
    else:
        made = [None]
        if args.process_index == 0:
            texts = (message["content"] for row in rows for message in chat_of(row, options))
            made = [train_tokenizer(texts, options.vocab_size).to_str()]
        broadcast_object_list(made)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(made[0]),
            pad_token=PAD,
            eos_token=EOS,
            bos_token=BOS,
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load_model(options: Options, tokenizer: Any) -> Any:
    """The model that is named, or a small Llama of random weights."""
    if options.model is not None:
        return AutoModelForCausalLM.from_pretrained(options.model)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        **SMALL,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    return AutoModelForCausalLM.from_config(config)


def report(trainer: TokenBudgetTrainer, metrics: dict[str, float]) -> None:
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
