"""Token shards of a billion tokens: time to open, memory, and speed next to `np.memmap`.

    python -m bench.token_shards [--tokens 1000000000] [--folder FOLDER]

The file is synthetic: random ids of 16 bits in documents of 1 to 1,999 tokens, in Megatron's
format. Each measurement runs in a process of its own, because the peak of its memory is measured.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tokenpack.data.shards.shards import TokenShards
from tokenpack.data.shards.windows import shard_windows
from tokenpack.data.shards.writer import ShardWriter

_BLOCK = 1 << 24
_REPEATS = 5


def write(prefix: Path, tokens: int) -> None:
    """Write the file."""
    rng = np.random.default_rng(0)
    with ShardWriter(prefix, "megatron", "uint16") as writer:
        while writer.tokens < tokens:
            lengths = rng.integers(1, 2000, _BLOCK // 1000)
            writer.write(rng.integers(0, 1 << 16, int(lengths.sum()), np.uint16))
            writer.end_documents(lengths)


def peak_mebibytes() -> float:
    """The most memory that this process had, pages of mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_opening(prefix: Path) -> None:
    """Time to open, and memory for ten random windows."""
    before = peak_mebibytes()
    begin = time.perf_counter()
    shards = TokenShards(prefix)
    seconds = time.perf_counter() - begin
    samples = shard_windows(shards, 2048, seed=1)
    begin = time.perf_counter()
    for number in range(10):
        samples.sample(number)
    reading = time.perf_counter() - begin
    print(
        f"{shards.num_tokens:,} tokens in {len(shards):,} documents: opened in {seconds:.3f} s; "
        f"ten random windows in {reading:.3f} s; peak memory {peak_mebibytes():.0f} MiB, of which "
        f"{before:.0f} MiB before the file was opened"
    )


def measure_reading(prefix: Path, slots: int) -> None:
    """Sequential reading by slices, against a memory map; the median of several passes."""
    shards = TokenShards(prefix)
    mapped = np.memmap(prefix.with_name(prefix.name + ".bin"), np.uint16, "r")
    count = min(len(mapped), 400 * slots * 1000) // slots * slots
    seconds: dict[str, list[float]] = {"np.memmap": [], "TokenShards": []}
    for _ in range(_REPEATS):
        for name, read in (
            ("np.memmap", lambda at: np.array(mapped[at : at + slots])),
            ("TokenShards", lambda at: np.array(shards.tokens(at, at + slots))),
        ):
            begin = time.perf_counter()
            for at in range(0, count, slots):
                read(at)
            seconds[name].append(time.perf_counter() - begin)
    rates = {name: count / statistics.median(each) / 1e6 for name, each in seconds.items()}
    print_rates(f"slices of {slots:,}", rates)


def measure_windows(prefix: Path, seq_len: int) -> None:
    """Rows with labels and boundaries, one after the other, against int64 copies of a map."""
    samples = shard_windows(TokenShards(prefix), seq_len, shuffle=False)
    mapped = np.memmap(prefix.with_name(prefix.name + ".bin"), np.uint16, "r")
    count = min(len(samples) - 1, 20_000)
    seconds: dict[str, list[float]] = {"np.memmap": [], "rows": []}
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        for at in range(0, count * seq_len, seq_len):
            block = mapped[at : at + seq_len + 1].astype(np.int64)
            block[:-1], block[1:]
        seconds["np.memmap"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        for first in range(0, count, 32):
            samples.numbered(range(first, first + 32))
        seconds["rows"].append(time.perf_counter() - begin)
    rates = {name: count * seq_len / statistics.median(s) / 1e6 for name, s in seconds.items()}
    print_rates(f"windows of {seq_len:,}", rates)


def print_rates(what: str, rates: dict[str, float]) -> None:
    """Print two rates, in millions of tokens per second, and the second over the first."""
    (_, one), (_, other) = rates.items()
    text = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
    print(f"{what}: {text} million tokens/s ({other / one:.2f})")


def main() -> None:
    """Write the file if it is not there, and run each measurement in a new process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=10**9)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    prefix = arguments.folder / f"tokenpack-shards-{arguments.tokens}"
    measurements = {
        "opening": lambda: measure_opening(prefix),
        "slices": lambda: [measure_reading(prefix, slots) for slots in (2048, 1 << 20)],
        "windows": lambda: measure_windows(prefix, 2048),
    }
    if arguments.only:
        measurements[arguments.only]()
        return
    if not prefix.with_name(prefix.name + ".idx").exists():
        write(prefix, arguments.tokens)
    for name in measurements:
        command = [sys.executable, "-m", "bench.token_shards", *sys.argv[1:], "--only", name]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
