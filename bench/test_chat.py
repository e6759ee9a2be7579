"""Conversations to ids and labels, compared with the preparation of TRL's SFTTrainer.

TRL runs with ``assistant_only_loss`` on the same dataset, tokenizer and chat template, whose
``{% generation %}`` markers it needs. Both run in one process, without truncation, and keep the
rows in memory. Both give the same ids and labels, which is checked for the first rows. The limit is
the tokenizer alone, for ids without offsets, on texts that are rendered already; it also uses all
cores. Processor seconds are those of all threads, for machines that do other work at the same time.
"""

import random
import statistics
import string
import time
from functools import partial

import pytest

from tokenpack.data import chat_dataset, train_tokenizer
from tokenpack.samples.text import standard_library_texts

CONVERSATIONS = 100_000
TURNS = 4
CHARACTERS = (40, 400)  # of a turn
COMPARED = 200

BASELINES = ("TRL",)
LIMITS = ("tokenizer alone",)


def make_conversations(count):
    """Conversations of parts of docstrings of Python's standard library."""
    texts = [text.source for text in standard_library_texts(4000)]
    rng = random.Random(0)

    def part():
        text = rng.choice(texts)[: rng.randint(*CHARACTERS)].strip()
        return text + rng.choice(string.ascii_letters)

    roles = ["user", "assistant"] * (TURNS // 2)
    return [
        {"messages": [{"role": role, "content": part()} for role in roles]} for _ in range(count)
    ]


@pytest.fixture(scope="module")
def conversations():
    """The dataset."""
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list(make_conversations(CONVERSATIONS))


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer of 8,000 tokens with the template."""
    texts = [text.source for text in standard_library_texts(4000)]
    return train_tokenizer(texts, 8000, chat_template="chatml")


def prepare_with_trl(tokenizer, tmp_path):
    """TRL's preparation of a dataset, as a function."""
    trl = pytest.importorskip("trl")
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, **small)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        assistant_only_loss=True,
        max_length=None,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    import datasets

    trainer = trl.SFTTrainer(
        model=LlamaForCausalLM(config),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(make_conversations(1)),
        processing_class=tokenizer,
    )
    return lambda rows: trainer._prepare_dataset(rows, tokenizer, arguments, False, None, "train")


def _processor_seconds(run):
    begin = time.process_time()
    run()
    return time.process_time() - begin


@pytest.mark.benchmark(group=f"{CONVERSATIONS:,} conversations of {TURNS} turns to ids and labels")
@pytest.mark.parametrize("by", ["TRL", "tokenpack", "tokenizer alone"])
def test_encode(benchmark, by, conversations, tokenizer, tmp_path):
    """Render, tokenize and mask conversations."""
    ours = chat_dataset(conversations.select(range(COMPARED)), tokenizer, checks="ignore")
    if by == "TRL":
        prepare = prepare_with_trl(tokenizer, tmp_path)
        prepared = prepare(conversations.select(range(COMPARED)))
        for name in ("input_ids", "labels"):
            assert prepared[name][:] == ours[name][:]
        run, rounds = partial(prepare, conversations), 1
    elif by == "tokenpack":
        run, rounds = partial(chat_dataset, conversations, tokenizer, checks="ignore"), 3
    else:
        chats = conversations["messages"][:]
        texts = tokenizer.apply_chat_template(chats, tokenize=False)
        backend = tokenizer.backend_tokenizer
        run = partial(backend.encode_batch_fast, texts, add_special_tokens=False)
        rounds = 3
    used = []
    benchmark.pedantic(lambda: used.append(_processor_seconds(run)), rounds=rounds)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["processor seconds"] = round(statistics.median(used), 2)
    benchmark.extra_info["conversations/s"] = round(len(conversations) / seconds)
    benchmark.extra_info["tokens of a conversation"] = round(sum(ours["length"]) / len(ours))
