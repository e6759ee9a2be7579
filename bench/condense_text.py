"""Train a small decoder on Python's standard library, and write texts to condense.

    python -m bench.condense_text FOLDER --minutes 3

writes a decoder with its tokenizer to FOLDER/decoder, and train.jsonl and held_out.jsonl. Each text
is a passage of a source file. Files are split by their names, so no file is on both sides. The
commands `tokenpack condense train` and `tokenpack condense eval` go on from there; see
docs/condenser.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tokenpack.models.decoder import DecoderConfig, DecoderForCausalLM
from tokenpack.segments import offsets_of

VOCABULARY, WINDOW, BATCH, PASSAGE = 1024, 192, 16, 600  # tokens, tokens, windows, characters
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def source_files() -> dict[str, str]:
    """The text of each file of the standard library, by its name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for path in sorted(root.rglob("*.py")):
        if not SKIPPED & set(path.parts):
            found[path.relative_to(root).as_posix()] = path.read_text("utf-8", errors="ignore")
    return found


def is_held_out(name: str) -> bool:
    """One file in twelve."""
    return zlib.crc32(name.encode()) % 12 == 0


def passages(text: str) -> list[str]:
    """Passages of whole lines of about `PASSAGE` characters."""
    found, lines, size = [], [], 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= PASSAGE:
            found.append("".join(lines))
            lines, size = [], 0
    return found


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that begins each text with BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def train_decoder(ids: np.ndarray, minutes: float, threads: int) -> DecoderForCausalLM:
    """A small decoder, trained on windows of ``ids`` for some minutes of processor time."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=VOCABULARY, dim=96, n_layers=3, n_heads=3, max_seq=1024,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    model = DecoderForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, fused=True)
    rng, begun, step = np.random.default_rng(0), time.process_time(), 0
    cu_seqlens = torch.from_numpy(offsets_of([WINDOW] * BATCH)).int()
    while (spent := (time.process_time() - begun) / 60) < minutes:
        done = spent / minutes
        warmup = min(1.0, (step + 1) / 50)
        optimizer.param_groups[0]["lr"] = 3e-3 * warmup * (0.55 + 0.45 * math.cos(math.pi * done))
        starts = rng.integers(0, len(ids) - WINDOW, BATCH)
        rows = np.stack([ids[start : start + WINDOW] for start in starts])
        rows[:, 0] = 0  # BOS
        batch = torch.from_numpy(rows.reshape(1, -1))
        loss = model(input_ids=batch, cu_seqlens=cu_seqlens, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 25 == 0:
            speed = step * BATCH * WINDOW / (spent * 60)
            print(
                f"step {step}: loss {loss.item():.3f}, {speed:,.0f} tokens per CPU second",
                flush=True,
            )
    return model.eval()


def main() -> None:
    """Write the decoder and the texts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--minutes", type=float, default=3, help="processor time of training (default: 3)"
    )
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: 1)")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    files = source_files()
    for name, wanted in (("train", False), ("held_out", True)):
        texts = [
            passage
            for file, text in files.items()
            if is_held_out(file) == wanted
            for passage in passages(text)
        ]
        lines = [json.dumps({"text": text}) for text in dict.fromkeys(texts)]
        (arguments.folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{name}: {len(lines)} texts", flush=True)
    learned = [text for file, text in files.items() if not is_held_out(file)]
    tokenizer = make_tokenizer(learned[::4])
    encoded = tokenizer(learned, add_special_tokens=False)["input_ids"]
    ids = np.concatenate([np.array(each, np.int64) for each in encoded])
    print(f"{len(ids):,} tokens to learn", flush=True)
    model = train_decoder(ids, arguments.minutes, arguments.threads)
    model.save_pretrained(arguments.folder / "decoder")
    tokenizer.save_pretrained(arguments.folder / "decoder")


if __name__ == "__main__":
    main()
