"""Step time and memory of the decoder over those of a patched Llama of the same shape, on a CPU.

    python -m bench.decoder_speed [--rounds 30]

Both models have the same weights and get the same padded batch. They take turns in one process with
one thread. The ratio is the median over rounds of the ratios of process times, which exclude other
programs. Memory is the peak that a forward and backward allocates in addition to the weights and
their gradients. The exit code is 1 if a ratio of memory is above 1.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokenpack import packing_stats, patch_model
from tokenpack.cost.allocations import allocations
from tokenpack.models.decoder import DecoderConfig, DecoderForCausalLM
from tokenpack.table import format_table


class Shape(NamedTuple):
    """A model and a batch."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int
    lengths: tuple[int, ...]


SHAPES = {
    "few tokens, 12 layers": Shape(32, 12, 2, 2, 64, (8, 8)),
    "narrow": Shape(128, 4, 4, 2, 2048, (9, 33, 64, 17, 5, 48)),
    "wide": Shape(384, 4, 6, 6, 4096, (31, 127, 64, 90)),
    "long": Shape(128, 2, 4, 4, 1024, (700, 64)),
}


def build(shape: Shape) -> tuple[Any, Any]:
    """A decoder and a patched Llama with its weights."""
    sizes = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.width,
        "intermediate_size": 8 * shape.width // 3,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    torch.manual_seed(0)
    decoder = DecoderForCausalLM(DecoderConfig(**sizes)).train()
    llama = LlamaForCausalLM(LlamaConfig(**sizes)).train()
    llama.load_state_dict(decoder.state_dict())
    return decoder, patch_model(llama, strict=True)


def batch_of(shape: Shape) -> dict[str, torch.Tensor]:
    """A batch that is padded on the right."""
    lengths, columns = torch.tensor(shape.lengths), max(shape.lengths)
    mask = (torch.arange(columns) < lengths[:, None]).long()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(shape.vocab_size, mask.shape, generator=generator)
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """Process time of a forward and backward, in seconds."""
    begin = time.process_time()
    model(**batch).loss.backward()
    return time.process_time() - begin


def compare(name: str, rounds: int) -> tuple[list[str], float]:
    """A row of the table, and the ratio of memory."""
    shape = SHAPES[name]
    models, batch = build(shape), batch_of(shape)
    losses = [float(model(**batch).loss.detach()) for model in models]
    assert abs(losses[0] - losses[1]) < 1e-5, losses
    for model in models:  # gradients exist from here on
        step(model, batch)
    gc.collect()
    gc.freeze()
    gc.disable()
    times: list[list[float]] = [[], []]
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            times[which].append(step(models[which], batch))
    gc.enable()
    ours, llamas = (allocations(lambda m=model: step(m, batch)).peak for model in models)
    assert packing_stats(models[1]).fallbacks == {}
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    medians = [1e3 * statistics.median(taken) for taken in times]
    row = [name, *(f"{each:.2f}" for each in medians), f"{ratio:.3f}"]
    return [*row, f"{ours:,}", f"{llamas:,}", f"{ours / llamas:.4f}"], ours / llamas


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    torch.set_num_threads(1)
    header = ["shape", "decoder\nms", "Llama\nms", "time\nratio"]
    header += ["decoder\nbytes", "Llama\nbytes", "memory\nratio"]
    rows, memory = [], []
    for name in SHAPES:
        row, ratio = compare(name, given.rounds)
        rows.append(row)
        memory.append(ratio)
    print(format_table(header, rows))
    sys.exit(max(memory) > 1.0)


if __name__ == "__main__":
    main()
