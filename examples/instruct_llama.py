"""Instruction tuning of a causal model, with batches sized by tokens and loss on answers only.

    python examples/instruct_llama.py                           a small Llama, two minutes
    torchrun --nproc-per-node 2 examples/instruct_llama.py      the same batches on two ranks
    python examples/instruct_llama.py --train_file my.jsonl     columns "messages", or "prompt"
                                                                and "response"
    torchrun --nproc-per-node 8 examples/instruct_llama.py --model meta-llama/Llama-3.2-1B \\
        --dataset HuggingFaceH4/ultrachat_200k --dataset_split train_sft --bf16 \\
        --learning_rate 1e-5 --max_encoder_len 4096 --max_tokens_per_microbatch 8192 \\
        --max_tokens_per_batch 131072 --max_steps -1 --num_train_epochs 1

Without --dataset or --train_file, the rows are built from the docstrings of Python's standard
library. Half of the prompts ask for the summary of a text, and half for the text of a summary.
Without --model, the model is small with random weights, and its tokenizer is trained on the same
texts. Nothing is downloaded in that case. In minutes the model learns the form of an answer and
common words, but not to follow instructions.

Each row is a chat, and the model is trained on its last answer. The tokenizer's chat template
formats the chat. A tokenizer without a template gets the one below, which is saved with the model.
All flags of `TokenBudgetArguments` work, including all of transformers' `TrainingArguments`. To
resume an interrupted run, pass --resume_from_checkpoint last, or the folder of a checkpoint.
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

# Defaults that differ from `TokenBudgetArguments`: training takes minutes on two CPU cores.
DEFAULTS = {
    **{"output_dir": "runs/llama", "max_steps": 200, "learning_rate": 3e-3, "warmup_steps": 20},
    **{"max_tokens_per_batch": 4096, "max_tokens_per_microbatch": 2048},
    **{"max_eval_tokens_per_microbatch": 4096, "logging_steps": 10, "logging_first_step": True},
    "use_cpu": not torch.accelerator.is_available(),  # required by torchrun without a GPU
}
SMALL = {
    **{"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}


@dataclass
class Options:
    """Options of this script: model and data."""

    model: str | None = HfArg(default=None, help="Model name on the Hub, or a folder.")
    tokenizer: str | None = HfArg(default=None, help="Default: the model's tokenizer.")
    dataset: str | None = HfArg(default=None, help="Dataset name on the Hub, or a folder.")
    dataset_config: str | None = HfArg(default=None, help="Configuration of the dataset.")
    dataset_split: str = HfArg(default="train", help="Split, such as train[:1000].")
    messages_column: str = HfArg(default="messages", help="Chats: lists of role and content.")
    prompt_column: str = HfArg(default="prompt", help="Prompts, if there are no chats.")
    input_column: str = HfArg(default="input", help="Optional text after the prompt.")
    response_column: str = HfArg(default="response", help="Answers to the prompts.")
    train_file: str | None = HfArg(default=None, help="A .jsonl file with these columns.")
    eval_rows: int = HfArg(default=100, help="Rows held out for evaluation.")
    vocab_size: int = HfArg(default=4096, help="Size of a newly trained tokenizer.")


def main(arguments: list[str] | None = None) -> TokenBudgetTrainer:
    """Train and evaluate. Returns the trainer, with its logs."""
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
    with args.main_process_first(desc="tokenizing"):  # other ranks read the cache
        examples = rows.map(
            lambda row, at: encode(chat_of(row, at, options), tokenizer),
            with_indices=True,
            remove_columns=rows.column_names,
        )
        # Drop long rows instead of truncating them: half an answer teaches the model to stop early.
        fitting = examples.filter(lambda row: len(row["input_ids"]) <= longest)
    if args.process_index == 0:
        print(f"{len(rows):,} rows, {len(fitting):,} of them with at most {longest} tokens")
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
    if not trainer.stop_agreed:  # a signal may leave little time before the process is killed
        trainer.save_model()
        report(trainer, trainer.evaluate())
    return trainer


def load_rows(options: Options, args: TokenBudgetArguments) -> Dataset:
    """Load a dataset of chats, or of prompts and responses."""
    if options.dataset is None and options.train_file is None:
        texts = [split_summary(text.source) for text in standard_library_texts()]
        return Dataset.from_list(
            [
                {"messages": turns(f"Summarize this in one line.\n\n{body}", summary)}
                if number % 2
                else {"messages": turns(f"Write the text that this summarizes.\n\n{summary}", body)}
                for number, (body, summary) in enumerate(filter(None, texts))
            ]
        )
    with args.main_process_first(desc="loading the dataset"):
        if options.train_file is not None:
            return load_dataset("json", data_files=options.train_file, split="train")
        return load_dataset(options.dataset, options.dataset_config, split=options.dataset_split)


def turns(prompt: str, response: str) -> list[dict[str, str]]:
    """Build a chat of one prompt and its response."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def chat_of(row: dict[str, Any], at: int, options: Options) -> list[dict[str, Any]]:
    """Get the chat of row number ``at``, up to its last answer."""
    if options.messages_column not in row:
        prompt, response = options.prompt_column, options.response_column
        for column in (prompt, response):
            if not isinstance(row.get(column), str):
                raise SystemExit(
                    f"row {at} must have a text as {column!r}, got {row.get(column)!r}"
                )
        parts = [row[prompt], row.get(options.input_column)]
        return turns("\n\n".join(filter(None, parts)), row[response])
    chat = row[options.messages_column] or []
    answers = [number for number, message in enumerate(chat) if message["role"] == "assistant"]
    if not answers:
        raise SystemExit(
            f"row {at} must have an answer, a message of the assistant, got {chat!r:.80}"
        )
    chat = chat[: answers[-1] + 1]
    for message in chat:
        # A template would write None as a word. Calls of tools may have no text.
        if message["content"] is None and not message.get("tool_calls"):
            raise SystemExit(f"row {at} must have a text in each message, got {message!r:.80}")
    return chat


def encode(chat: list[dict[str, str]], tokenizer: Any) -> dict[str, list[int]]:
    """Tokenize a chat. Labels are -100 except for the last answer, which ends in EOS."""
    prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    if not whole.startswith(prompt):
        raise ValueError(
            f"the chat template must format the prompt the same with and without an answer, got "
            f"{whole!r} for the prompt {prompt!r}"
        )
    # Tokenize the two separately, because the model gets the prompt alone during generation.
    texts = [prompt, whole[len(prompt) :]]
    prompt_ids, answer_ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    if tokenizer.eos_token_id not in answer_ids:
        answer_ids = [*answer_ids, tokenizer.eos_token_id]
    return {
        "input_ids": [*prompt_ids, *answer_ids],
        "labels": [-100] * len(prompt_ids) + answer_ids,
    }


def load_tokenizer(options: Options, args: TokenBudgetArguments, rows: Dataset) -> Any:
    """Load a tokenizer by name, or train one on the chats on the first rank and broadcast it."""
    if name := options.tokenizer or options.model:
        tokenizer = AutoTokenizer.from_pretrained(name)
    else:
        made = [None]
        if args.process_index == 0:
            chats = [chat_of(row, at, options) for at, row in enumerate(rows)]
            texts = (message["content"] or "" for chat in chats for message in chat)
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
    """Load a model by name, or build a small Llama with random weights."""
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
