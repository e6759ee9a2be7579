"""Training end to end compared with `Seq2SeqTrainer`, on real text, with equal tokens per step.

The data are those of the demo: docstrings with corrupted spans (T5), or their bodies and summaries
(NLLB). Every contender has the same average number of real tokens per optimizer step.
`Seq2SeqTrainer` sets it by the number of rows, in one batch or accumulated over micro-batches that
have as many tokens as those of `HierarchicalTokenTrainer`. Tokens are real tokens of encoder and
decoder. The time is that of ``train()``, including planning.
"""

from functools import cache

import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from tokenpack.commands.models import DEMO_MODELS, SIZES
from tokenpack.cost.allocations import peak_bytes
from tokenpack.samples.examples import Example, pad_batch
from tokenpack.samples.text import standard_library_texts
from tokenpack.samples.tokenizer import PAD, token_id, train_tokenizer
from tokenpack.trainer import HierarchicalTokenTrainer

from .common import DEVICE, ON_GPU

SIZE = SIZES["large" if ON_GPU else "small"]
TEXTS, EXAMPLES = (20_000, 20_000) if ON_GPU else (3_000, 64)
STEP, MICRO = (65_536, 16_384) if ON_GPU else (4_096, 1_024)
BASELINES = ("fixed batches",)
TRAINERS = ("token budget", "fixed batches", "fixed batches, accumulated", "group_by_length")


@cache
def material(name):
    """Model builder, examples as rows of a dataset, and the id of the padding token."""
    texts = standard_library_texts(TEXTS)
    tokenizer = train_tokenizer([text.source for text in texts], SIZE.vocab_size)
    demo = DEMO_MODELS[name]
    made = demo.make_examples(texts, tokenizer, SIZE, 0).examples
    rows = [{"input_ids": each.input_ids, "labels": each.labels} for each in made]
    return lambda: demo.build(SIZE, tokenizer), rows[:EXAMPLES], token_id(tokenizer, PAD)


def collator(pad):
    """A collator that pads like the demo."""

    def collate(rows):
        return pad_batch([Example(row["input_ids"], row["labels"]) for row in rows], pad)

    return collate


class RealTokens:
    """Wraps a collator, and counts the real tokens of its batches."""

    def __init__(self, collate):
        self.tokens, self.inner = 0, collate

    def __call__(self, rows):
        self.tokens += sum(len(row["input_ids"]) + len(row["labels"]) for row in rows)
        return self.inner(rows)


def make_trainer(by, name, folder, steps=-1):
    """The trainer of a contender, and its collator, which counts real tokens."""
    build, rows, pad = material(name)
    torch.manual_seed(0)
    counted = RealTokens(collator(pad))
    mean = sum(len(row["input_ids"]) + len(row["labels"]) for row in rows) / len(rows)
    pieces = 1 if by in ("token budget", "fixed batches") else STEP // MICRO
    options = {}
    if by == "group_by_length":
        options["train_sampling_strategy"] = "group_by_length"
    args = Seq2SeqTrainingArguments(
        str(folder),
        use_cpu=not ON_GPU,
        bf16=ON_GPU,
        max_steps=steps,
        num_train_epochs=1,
        per_device_train_batch_size=round(STEP / pieces / mean),
        gradient_accumulation_steps=pieces,
        report_to=[],
        save_strategy="no",
        logging_steps=10_000,
        disable_tqdm=True,
        dataloader_pin_memory=ON_GPU,
        **options,
    )
    common = {"train_dataset": rows, "data_collator": counted}
    if by == "token budget":
        trainer = HierarchicalTokenTrainer(
            build(),
            args,
            max_tokens_per_batch=STEP,
            max_tokens_per_microbatch=MICRO,
            **common,
        )
    else:
        trainer = Seq2SeqTrainer(build(), args, **common)
    return trainer, counted


@pytest.mark.parametrize("by", TRAINERS)
@pytest.mark.parametrize("name", ["t5", "nllb"] if ON_GPU else ["t5"])
def test_training(benchmark, by, name, tmp_path):
    """One epoch: the whole call of ``train()``."""
    benchmark.group = f"an epoch of {name}, steps of {STEP:,} tokens, micro-batches of {MICRO:,}"
    token_counts = []

    def setup():
        return make_trainer(by, name, tmp_path), {}

    def train(trainer, counted):
        trainer.train()
        token_counts.append(counted.tokens)

    benchmark.pedantic(train, setup=setup, rounds=3)
    notes = benchmark.extra_info
    notes["real tokens"] = token_counts[-1]
    if benchmark.stats is not None:
        notes["tokens/s"] = round(token_counts[-1] / benchmark.stats.stats.median, 1)
    trainer, _ = make_trainer(by, name, tmp_path, steps=1)
    notes["peak MiB of a step"] = round(peak_bytes(trainer.train, DEVICE) / 2**20)
