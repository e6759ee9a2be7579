"""Planning compared with TRL and a lower bound; packing token lists, with TRL and fast_axolotl.

SeqPacker is missing because its only distribution, a source distribution, does not build.

The floor is a lower bound for any planner that sorts by length: count the lengths, and sort them as
16-bit integers (radix sort). These suites always run on the CPU.
"""

import numpy as np
import pytest

from tokenpack.data import pack_dataset
from tokenpack.packing import Packer, StreamPacker, pack_lengths, pack_shards

DISTRIBUTIONS = ("lognormal", "uniform", "exponential", "all short")
COUNTS = (10_000, 100_000, 1_000_000)

BASELINES = ("TRL bfd",)
LIMITS = ("floor",)

pytestmark = pytest.mark.benchmark(max_time=0.2, min_rounds=5)


def make_lengths(shape, capacity, count):
    """Lengths of a named distribution, the same on every machine."""
    rng = np.random.default_rng(0)
    lengths = {
        "lognormal": lambda: rng.lognormal(np.log(180), 1.0, count),
        "uniform": lambda: rng.integers(1, capacity + 1, count),
        "exponential": lambda: rng.exponential(capacity / 8, count),
        "all short": lambda: rng.integers(1, capacity // 16 + 1, count),
    }[shape]()
    return np.clip(lengths.astype(np.int64), 1, capacity)


def floor(lengths):
    """The minimal work of a planner that sorts by length."""
    np.bincount(lengths)
    lengths.argsort(kind="stable")


def trl(name):
    """A function of TRL; skips the benchmark if TRL is not installed."""
    return getattr(pytest.importorskip("trl.data_utils"), name)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("capacity", [2048, 8192])
@pytest.mark.parametrize("shape", DISTRIBUTIONS)
@pytest.mark.parametrize("by", ["floor", "auto", "obfd", "obfdp"])
def test_plan(benchmark, by, shape, capacity, count):
    """Plan bins for lengths."""
    benchmark.group = f"plan {count:,} {shape} lengths into bins of {capacity:,}"
    lengths = make_lengths(shape, capacity, count)
    if by == "floor":
        narrow = lengths.astype(np.uint16)
        benchmark(lambda: floor(narrow))
        return
    result = benchmark(lambda: pack_lengths(lengths, capacity, by))
    benchmark.extra_info["strategy"] = result.strategy
    benchmark.extra_info["bins"] = result.num_bins
    benchmark.extra_info["efficiency"] = round(result.efficiency, 5)


@pytest.mark.benchmark(group="plan 10,000 log-normal lengths by each strategy")
@pytest.mark.parametrize("strategy", Packer.strategies())
def test_strategies(benchmark, strategy):
    """Each strategy on the same lengths."""
    lengths = make_lengths("lognormal", 2048, 10_000)
    result = benchmark(lambda: pack_lengths(lengths, 2048, strategy))
    benchmark.extra_info["efficiency"] = round(result.efficiency, 5)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("by", ["harmonic", "stream of next fit", "stream of auto"])
def test_linear(benchmark, by, count):
    """Planners whose time must be linear in the number of sequences."""
    benchmark.group = f"linear planners, {count:,} log-normal lengths"
    lengths = make_lengths("lognormal", 2048, count)

    def stream(strategy):
        packer = StreamPacker(2048, strategy)
        return len(packer.extend(lengths)) + len(packer.finish())

    functions = {
        "harmonic": lambda: pack_lengths(lengths, 2048, "hk"),
        "stream of next fit": lambda: stream("nf"),
        "stream of auto": lambda: stream("auto"),
    }
    benchmark(functions[by])
    benchmark.extra_info["ns per sequence"] = round(benchmark.stats.stats.median / count * 1e9)


@pytest.mark.benchmark(group="plan 100,000 log-normal lengths, lengths alone")
@pytest.mark.parametrize("by", ["tokenpack auto", "TRL bfd"])
def test_lengths_alone(benchmark, by):
    """Plan without tokens. TRL packs tables, so it gets a column of lists of one-byte tokens."""
    lengths = make_lengths("lognormal", 2048, 100_000)
    if by == "tokenpack auto":
        benchmark(lambda: pack_lengths(lengths, 2048))
        return
    table = token_table(lengths, np.int8)
    pack = trl("_pack_bfd")
    benchmark.pedantic(lambda: pack(table, 2048), rounds=3)


@pytest.mark.benchmark(group="100,000 log-normal sequences to packed rows")
@pytest.mark.parametrize(
    "by",
    ["tokenpack", "tokenpack, all columns", "tokenpack, two threads", "TRL bfd", "fast_axolotl"],
)
def test_rows(benchmark, by):
    """Pack token lists into rows of 2,048 tokens in memory.

    The lists are Arrow data, except for fast_axolotl, which takes Python lists. TRL and "tokenpack"
    return ids and the lengths of each row's sequences. fast_axolotl returns ids, masks and labels,
    without sequence boundaries; it keeps the order and adds two tokens after each sequence.
    """
    datasets = pytest.importorskip("datasets")
    lengths = np.minimum(make_lengths("lognormal", 2048, 100_000), 2046)
    dataset = datasets.Dataset(token_table(lengths, np.int32))
    benchmark.extra_info["tokens"] = int(lengths.sum())
    if by == "fast_axolotl":
        pack = pytest.importorskip("fast_axolotl").pack_sequences
        sequences = dataset["input_ids"][:]
        packed = benchmark.pedantic(lambda: pack(sequences, 2048, 0, 1), rounds=3)
        rows = packed["input_ids"]
    elif by == "TRL bfd":
        # One batch of all sequences, as in tokenpack. TRL's default, 1,000, gives less full bins.
        pack = trl("pack_dataset")
        options = {"batch_size": None, "load_from_cache_file": False}
        rows = benchmark.pedantic(lambda: pack(dataset, 2048, "bfd", options), rounds=3)
    else:
        options = {"progress": False, "num_proc": 2 if "threads" in by else 1}
        if "all" not in by:
            options["columns"] = ("input_ids", "seq_lengths")
        rows = benchmark.pedantic(
            lambda: pack_dataset(dataset["input_ids"], 2048, **options), rounds=5, warmup_rounds=1
        )
    benchmark.extra_info["rows"] = len(rows)
    benchmark.extra_info["slots with a token of the data, %"] = round(
        100 * int(lengths.sum()) / (2048 * len(rows)), 2
    )


def token_table(lengths, dtype):
    """An Arrow table of token lists with these lengths."""
    pa = pytest.importorskip("pyarrow")
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.random.default_rng(1).integers(0, 100, offsets[-1], dtype)
    return pa.table({"input_ids": pa.LargeListArray.from_arrays(offsets, tokens)})


@pytest.mark.benchmark(group="plan 10,000,000 log-normal lengths from a file, in bounded memory")
def test_shards(benchmark, tmp_path):
    """Plan a file of lengths, and save the plan in a folder."""
    lengths = np.lib.format.open_memmap(tmp_path / "l.npy", "w+", np.uint16, (10_000_000,))
    lengths[:] = make_lengths("lognormal", 2048, 10_000_000)
    folders = (tmp_path / str(number) for number in range(9))
    benchmark.pedantic(
        lambda: pack_shards(lengths, Packer(2048), next(folders), shard_size=2_500_000), rounds=3
    )
