"""Train the presets of `examples/pretrain_decoder.py`: once at a stretch, once killed and resumed.

    python -m bench.decoder_examples bench/results/decoder_examples.md [--steps 300]

A batch is four windows of 128 tokens, so that a run takes about a minute of a core. The second run
is ended by SIGKILL after its first checkpoint, and resumed. Its weights and losses must be those of
the first run, bit for bit. The exit code is 1 if they are not, or if a model did not learn: its
first loss must be within 0.2 of ln(vocabulary), and its last at least 1.5 below.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
PRESETS = ("quickstart", "shakespeare", "moe")


def main() -> None:
    """Run all presets and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--preset", action="append", choices=PRESETS, help="default: all")
    given = parser.parse_args()
    lines, fine = [], True
    with tempfile.TemporaryDirectory() as scratch:
        for preset in given.preset or PRESETS:
            row, good = measure(preset, Path(scratch), given.steps)
            lines.append(row)
            fine = fine and good
            given.table.write_text(page(lines, given.steps))
            print(row, flush=True)
    sys.exit(not fine)


def measure(preset: str, scratch: Path, steps: int) -> tuple[str, bool]:
    """A row of the table, and whether all is as it should be."""
    whole, killed = scratch / f"{preset}-whole", scratch / f"{preset}-killed"
    begun = time.perf_counter()
    printed = train(preset, whole, steps).communicate()[0]
    seconds = time.perf_counter() - begun
    print(preset, [log for log in losses(whole, steps) if "eval_loss" in log], flush=True)
    at = kill_after_checkpoint(train(preset, killed, steps), killed)
    train(preset, killed, steps, "--resume_from_checkpoint", "last").communicate()
    same = losses(whole, steps) == losses(killed, steps) and digest(whole) == digest(killed)
    evaluations = {
        log["step"]: log["eval_loss"] for log in losses(whole, steps) if "eval_loss" in log
    }
    size, uniform = re.search(r"([\d,]+) parameters.*ln\(vocab\) ([\d.]+)", printed).groups()
    shown = [f"{evaluations[step]:.3f}" for step in (0, steps // 3, 2 * steps // 3, steps)]
    last = evaluations[steps]
    resumed = f"killed at step {at}: " + ("equal to the bit" if same else "DIFFERENT")
    cells = [preset, size, uniform, *shown, f"{math.exp(last):.1f}", f"{seconds:.0f}", resumed]
    learned = abs(evaluations[0] - float(uniform)) < 0.2 and last < float(uniform) - 1.5
    return f"| {' | '.join(cells)} |", same and learned


def train(preset: str, out: Path, steps: int, *more: str) -> subprocess.Popen[str]:
    """Start the example."""
    options = {
        "preset": preset,
        "output_dir": out,
        "max_steps": steps,
        "eval_steps": steps // 3,
        "save_steps": steps // 3,
        "max_tokens_per_batch": 4 * 129,
        "max_tokens_per_microbatch": 4 * 129,
        "report_to": "none",
        "disable_tqdm": True,
    }
    flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    command = [sys.executable, str(ROOT / "examples/pretrain_decoder.py"), *flags, *more]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # its lines say when to kill it
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def kill_after_checkpoint(process: subprocess.Popen[str], out: Path) -> str:
    """Send SIGKILL some steps after the first checkpoint. Returns the last step that was logged."""
    last = "0"
    assert process.stdout is not None
    logged = 0
    for line in process.stdout:
        saved = any(out.glob("checkpoint-*/tokenpack_state.json"))
        if saved and "'loss'" in line:
            logged += 1
        if logged == 3:
            checkpoint = next(out.glob("checkpoint-*")).name.removeprefix("checkpoint-")
            last = f"{int(checkpoint) + 10 * (logged - 1)} or later"
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return last


def losses(out: Path, steps: int) -> list[dict[str, Any]]:
    """The losses that a run logged, with their steps."""
    state = json.loads((out / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    kept = ("loss", "eval_loss", "step", "grad_norm", "learning_rate")
    return [{name: log[name] for name in kept if name in log} for log in state["log_history"]]


def digest(out: Path) -> str:
    """The digest of the weights that a run saved."""
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def page(rows: list[str], steps: int) -> str:
    """The table as Markdown."""
    third = steps // 3
    heads = ["preset", "parameters", "ln(vocabulary)", "loss at step 0"]
    heads += [str(third), str(2 * third), str(steps), "perplexity", "seconds", "resumed"]
    return "\n".join(
        [
            "# Training from scratch",
            "",
            "The models of transformer-toolkit's examples, at small size, on the docstrings of",
            "Python's standard library, with four windows of 128 tokens per step: validation",
            "losses, and whether a run that is killed and resumed has the same losses and weights.",
            "",
            "    python -m bench.decoder_examples bench/results/decoder_examples.md "
            f"--steps {steps}",
            "",
            f"torch {torch.__version__}, transformers {transformers.__version__}, CPU, "
            f"{torch.get_num_threads()} thread(s). Other programs ran on the machine, so the times "
            "are upper bounds.",
            "",
            f"| {' | '.join(heads)} |",
            "|" + " --- |" * len(heads),
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
