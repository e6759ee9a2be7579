"""A training step of the condenser, packed, against the same step padded, as condense-trainer is.

    python -m bench.condense_speed [FILE]        also writes the figures to FILE, as JSON

Both steps have the same models, LoRA, documents and loss. The padded step pads contexts to the
longest one of the batch and appends the slots, and pads prompts and completions for the decoder,
each to its longest. (Here prompts are padded on the left, so that no target is predicted from
padding, and masks are right: the losses of both steps are compared.) Contexts are log-normal.
The two steps alternate, and each time is processor time of one thread, so that other processes
disturb less. The ideal is the ratio of counted operations: linear layers and
attention of both sides, with the head on all slots or on the targets alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from torch import Tensor, nn

from tokenpack.commands.machine import describe_machine
from tokenpack.cost import BatchCount, count_lengths, model_cost
from tokenpack.data.condense import CondenseCollator
from tokenpack.models.condenser import Condenser

VOCABULARY, SLOTS, DOCUMENTS, REPEATS = 4096, 16, 12, 5


def causal_model(seed: int) -> hf.PreTrainedModel:
    """A Llama with random weights."""
    torch.manual_seed(seed)
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=4096,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


def documents(seed: int) -> list[dict[str, Any]]:
    """Documents whose contexts and completions are log-normal."""
    rng = np.random.default_rng(seed)

    def ids(median: float, most: int) -> list[int]:
        length = int(np.clip(np.exp(rng.normal(np.log(median), 0.8)), 4, most))
        return rng.integers(3, VOCABULARY, length).tolist()

    return [
        {
            "context_ids": ids(160, 1500),
            "reference_ids": [3],
            "prompt_ids": ids(12, 60),
            "completion_ids": ids(24, 200),
            "is_text": False,
        }
        for _ in range(DOCUMENTS)
    ]


def padded(rows: list[list[int]], left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows padded with 0, and their mask."""
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        lacking = [0] * (width - len(row))
        ids.append([*lacking, *row] if left else [*row, *lacking])
        ones = [1] * len(row)
        mask.append([*lacking, *ones] if left else [*ones, *lacking])
    return torch.tensor(ids), torch.tensor(mask)


class PaddedStep(nn.Module):
    """The same condenser, with contexts, prompts and completions padded."""

    def __init__(self, model: Condenser, condenser: Any, decoder: Any) -> None:
        super().__init__()
        self.condenser, self.decoder = condenser, decoder
        self.slots, self.projection = copy.deepcopy(model.slots), copy.deepcopy(model.projection)

    def forward(self, rows: list[dict[str, Any]]) -> Tensor:
        """The mean loss of the completions."""
        count = len(rows)
        ids, mask = padded([row["context_ids"] for row in rows])
        embeds = self.condenser.get_input_embeddings()(ids)
        slots = self.slots.expand(count, -1, -1)
        base = self.condenser.get_base_model().model
        places = torch.cat([mask.cumsum(1) - 1, mask.sum(1)[:, None] + torch.arange(SLOTS)], 1)
        hidden = base(
            inputs_embeds=torch.cat([embeds, slots], 1),
            attention_mask=torch.cat([mask, mask.new_ones(count, SLOTS)], 1),
            position_ids=places.clamp(min=0),
            use_cache=False,
        ).last_hidden_state[:, -SLOTS:]
        vectors = self.projection(hidden)
        read = self.decoder.get_input_embeddings()
        parts, masks, labels = [read(torch.full((count, 1), 1)), vectors], [], []
        masks.append(mask.new_ones(count, 1 + SLOTS))
        labels.append(torch.full((count, 1 + SLOTS), -100))
        for name in ("prompt_ids", "completion_ids"):
            tokens, real = padded([row[name] for row in rows], left=name == "prompt_ids")
            parts.append(read(tokens))
            masks.append(real)
            ignored = real == 0 if name == "completion_ids" else torch.ones_like(real).bool()
            labels.append(tokens.masked_fill(ignored, -100))
        seen = torch.cat(masks, 1)
        return self.decoder(
            inputs_embeds=torch.cat(parts, 1),
            attention_mask=seen,
            position_ids=(seen.cumsum(1) - 1).clamp(min=0),
            labels=torch.cat(labels, 1),
            use_cache=False,
        ).loss

    def lengths(self, rows: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
        """Slots of each row on both sides."""
        longest = {
            name: max(len(row[f"{name}_ids"]) for row in rows)
            for name in ("context", "prompt", "completion")
        }
        after = 1 + SLOTS + longest["prompt"] + longest["completion"]
        return [longest["context"] + SLOTS] * len(rows), [after] * len(rows)


def operations(model: Any, count: BatchCount, head_tokens: int) -> int:
    """Multiply-adds of a forward, with the head on some tokens alone."""
    cost, head = model_cost(model), VOCABULARY * model.config.hidden_size
    linear = (cost.per_decoder_token - head) * count.decoder_tokens + head * head_tokens
    return linear + cost.per_decoder_pair * count.decoder_pairs


def ideal(step: PaddedStep, rows: list[dict[str, Any]]) -> float:
    """Padded over packed operations. Gradients of inputs double both."""
    context = [len(row["context_ids"]) + SLOTS for row in rows]
    after = [1 + SLOTS + len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows]
    targets = sum(len(row["completion_ids"]) for row in rows)
    wide, late = step.lengths(rows)
    condenser, decoder = step.condenser.get_base_model(), step.decoder
    less = operations(condenser, count_lengths(None, context), 0)
    less += operations(decoder, count_lengths(None, after), targets)
    more = operations(condenser, count_lengths(None, wide), 0)
    more += operations(decoder, count_lengths(None, late), sum(late))
    return more / less


def processor_time(loss_of: Any, batch: Any) -> float:
    """Seconds of this process in one forward and backward."""
    begun = time.process_time()
    loss_of(batch).backward()
    return time.process_time() - begun


def measure(batches: int) -> dict[str, Any]:
    """Padded over packed time and operations of some batches, each the median of its repeats."""
    plain = causal_model(0), causal_model(1)
    model = Condenser.from_models(
        *copy.deepcopy(plain), num_condense_tokens=SLOTS, lora={"r": 16}
    ).train()
    from peft import get_peft_model

    condenser = get_peft_model(plain[0], model.condenser.peft_config["default"])
    condenser.load_state_dict(model.condenser.state_dict())
    step = PaddedStep(model, condenser, plain[1].eval().requires_grad_(False)).train()
    step.decoder.eval()
    collator, found = CondenseCollator(None), []
    for seed in range(batches):
        rows = documents(seed)
        batch = collator(rows)
        ours, theirs = model(**batch).loss, step(rows)
        if abs(ours.item() - theirs.item()) > 1e-4 * theirs.item():
            raise SystemExit(f"the losses differ: packed {ours.item()}, padded {theirs.item()}")
        times: list[list[float]] = [[], []]
        for _ in range(REPEATS):
            times[0].append(processor_time(step, rows))
            times[1].append(processor_time(lambda each: model(**each).loss, batch))
        found.append((*map(statistics.median, times), ideal(step, rows)))
        ratio = found[-1][0] / found[-1][1]
        print(
            f"batch {seed}: padded {found[-1][0]:.2f} s, packed {found[-1][1]:.2f} s, ratio "
            f"{ratio:.2f}, ideal {found[-1][2]:.2f}, ratio / ideal {ratio / found[-1][2]:.2f}",
            flush=True,
        )
    ratios = [padded_time / packed_time for padded_time, packed_time, _ in found]
    shares = [ratio / each[2] for ratio, each in zip(ratios, found)]
    return {
        "machine": describe_machine(),
        "documents": DOCUMENTS,
        "batches": batches,
        "ratio": statistics.median(ratios),
        "ideal": statistics.median(each[2] for each in found),
        "ratio_of_ideal": statistics.median(shares),
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--batches", type=int, default=5, help="default: 5")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(arguments.batches)
    print(json.dumps(figures, indent=1))
    if arguments.file is not None:
        arguments.file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
