"""``tokenpack inspect``: how long texts are, how much of a batch is padding, what packing gives.

    padding share = 1 - tokens / slots          over all batches of an epoch
    speed-up      = operations(padded) / operations(packed)

The operations are those that ``tokenpack.cost`` counts for a model of a published shape. What a
machine makes of them, `tokenpack demo` measures.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import AutoTokenizer

from ..cost import BatchCount, ModelCost, model_cost, training_operations
from ..data.text import Text, read_texts
from . import figures, machine
from .models import SHAPES, build_shape
from .table import format_table

BATCH_SIZES = (8, 16, 32, 64, 128)
PERCENTILES = (0, 5, 25, 50, 75, 90, 95, 99, 100)

# Random batches of few texts vary; enough epochs of them to draw this many texts.
_TEXTS_DRAWN = 50_000
_BARS = 10
_CHUNK = 1000


@dataclass(frozen=True)
class Sides:
    """Tokens of each text, ``(texts,)`` int64. ``encoder`` is ``None`` in a decoder-only model."""

    encoder: np.ndarray | None
    decoder: np.ndarray


@dataclass(frozen=True)
class Forecast:
    """What batches of one size hold, and what packing them would give."""

    padding_share: float
    linear_speed_up: float
    speed_up: float


def run(arguments: argparse.Namespace) -> int:
    """Print the tables, write the PNG and the JSON. Returns 0; bad input raises."""
    texts = read_texts(arguments.data)
    has_target = texts[0].target is not None
    shape = arguments.shape or ("t5-base" if has_target else "llama-1b")
    model = build_shape(shape)
    encoder_decoder = model.config.is_encoder_decoder
    if encoder_decoder and not has_target:
        raise ValueError(
            f"--shape: {shape} is an encoder-decoder and needs 'source' and 'target', but "
            f"{arguments.data} holds texts alone; takes one of "
            f"{', '.join(name for name in SHAPES if name.startswith('llama'))}"
        )
    _make_folder(arguments.out)
    lengths = _measure(texts, load_tokenizer(arguments.tokenizer))
    cut = _cut(lengths, arguments.max_length)
    sides = _sides(lengths, encoder_decoder)

    cost = model_cost(model)
    ways = {
        "random": [forecast(sides, size, cost, arguments.seed) for size in BATCH_SIZES],
        "sorted": [forecast(sides, size, cost, None) for size in BATCH_SIZES],
    }
    print(f"{arguments.data}: {len(texts):,} texts, {_total(lengths):,} tokens\n")
    print(_length_table(lengths))
    for side, values in lengths.items():
        print(f"\n{side}\n{_histogram(values)}")
    print(f"\n{_forecast_table(ways, shape)}")
    print(f"\n{_caption(shape, arguments.max_length, cut, len(texts))}")
    _write(arguments, shape, lengths, cut, ways)
    return 0


# ----------------------------------------------------------------------------------------- lengths


def load_tokenizer(name_or_path: str) -> Callable[[list[str]], list[int]]:
    """A function from texts to their numbers of tokens, special tokens included.

    Args:
        name_or_path: a ``tokenizer.json``, a folder that holds a tokenizer, or a name on the hub,
            taken from the local cache where it is there.

    Raises:
        ValueError: if there is no such tokenizer, or it cannot be read or fetched.
    """
    path = Path(name_or_path)
    if path.is_file():
        return _load_file(path)
    if path.is_dir():
        return _load_pretrained(str(path), local=True)
    if path.suffix == ".json" or path.is_absolute() or name_or_path.count("/") > 1:
        raise ValueError(f"--tokenizer: no file or folder {name_or_path}")
    try:
        return _load_pretrained(name_or_path, local=True)
    except ValueError:
        _require_hub(name_or_path)
        return _load_pretrained(name_or_path, local=False)


def _load_file(path: Path) -> Callable[[list[str]], list[int]]:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower one
        raise ValueError(f"--tokenizer: {path} is not a tokenizer.json: {error}") from None
    # A file may carry both from its training; a length must be the text's.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda texts: [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]


def _load_pretrained(name: str, local: bool) -> Callable[[list[str]], list[int]]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
    except (OSError, ValueError, ImportError) as error:
        where = "in the folder" if Path(name).is_dir() else "of the name"
        raise ValueError(f"--tokenizer: no tokenizer {where} {name}: {error}") from None

    def count(texts: list[str]) -> list[int]:
        encoded = tokenizer(texts, truncation=False, padding=False, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]

    return count


def _require_hub(name: str) -> None:
    """Fail at once where there is no network: the hub's client would try again for a minute."""
    if any(os.environ.get(f"{scheme}_proxy") for scheme in ("http", "https", "HTTPS", "HTTP")):
        return  # the proxy resolves names
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        raise ValueError(
            f"--tokenizer: {name} is no file or folder here and not in the hub's local cache, and "
            f"{host} cannot be reached; takes a tokenizer.json, a folder, or a name on the hub"
        ) from None


def _measure(
    texts: Sequence[Text], count: Callable[[list[str]], list[int]]
) -> dict[str, np.ndarray]:
    columns = {"source" if texts[0].target is not None else "text": [t.source for t in texts]}
    if texts[0].target is not None:
        columns["target"] = [t.target or "" for t in texts]
    lengths = {}
    for side, strings in columns.items():
        chunks = range(0, len(strings), _CHUNK)
        bar = tqdm(chunks, desc=f"tokenizing {side}", leave=False, disable=len(chunks) < 3)
        counts = [n for start in bar for n in count(strings[start : start + _CHUNK])]
        lengths[side] = np.array(counts, dtype=np.int64)
    return lengths


def _cut(lengths: dict[str, np.ndarray], max_length: int | None) -> dict[str, int]:
    """Cut the lengths in place; how many of each side were longer."""
    if max_length is None:
        return dict.fromkeys(lengths, 0)
    cut = {side: int((values > max_length).sum()) for side, values in lengths.items()}
    for values in lengths.values():
        np.minimum(values, max_length, out=values)
    return cut


def _sides(lengths: dict[str, np.ndarray], encoder_decoder: bool) -> Sides:
    if encoder_decoder:
        return Sides(lengths["source"], lengths["target"])
    return Sides(None, sum(lengths.values(), np.zeros(1, dtype=np.int64)))


def _total(lengths: dict[str, np.ndarray]) -> int:
    return sum(int(values.sum()) for values in lengths.values())


# ---------------------------------------------------------------------------------------- forecast


def forecast(sides: Sides, batch_size: int, cost: ModelCost, seed: int | None) -> Forecast:
    """Padding and speed-up over epochs of batches of ``batch_size`` rows.

    Args:
        sides: the lengths.
        batch_size: rows; the last batch of an epoch may have fewer.
        cost: of the model's forward.
        seed: of the shuffling; ``None`` takes the texts in order of length, the encoder's first.
    """
    orders = [_sorted_order(sides)] if seed is None else _random_orders(len(sides.decoder), seed)
    padded = _sum([_count_padded(sides, order, batch_size) for order in orders])
    packed = _sum([_count_packed(sides)] * len(orders))
    before, after = training_operations(cost, padded), training_operations(cost, packed)
    return Forecast(
        padding_share=1 - packed.tokens / padded.tokens,
        linear_speed_up=before.linear / after.linear,
        speed_up=before.total / after.total,
    )


def _random_orders(texts: int, seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.permutation(texts) for _ in range(-(-_TEXTS_DRAWN // texts))]


def _sorted_order(sides: Sides) -> np.ndarray:
    if sides.encoder is None:
        return np.argsort(sides.decoder)
    return np.lexsort((sides.decoder, sides.encoder))


def _count_packed(sides: Sides) -> BatchCount:
    return _count(sides.encoder, sides.decoder, np.ones_like(sides.decoder))


def _count_padded(sides: Sides, order: np.ndarray, batch_size: int) -> BatchCount:
    starts = np.arange(0, len(order), batch_size)
    rows = np.diff([*starts, len(order)])
    encoder = None
    if sides.encoder is not None:
        encoder = np.maximum.reduceat(sides.encoder[order], starts)
    return _count(encoder, np.maximum.reduceat(sides.decoder[order], starts), rows)


def _count(encoder: np.ndarray | None, decoder: np.ndarray, rows: np.ndarray) -> BatchCount:
    """Tokens and pairs of batches with ``rows`` rows each, all of them as long as given."""
    if encoder is None:
        encoder = np.zeros_like(decoder)
    return BatchCount(
        encoder_tokens=int((rows * encoder).sum()),
        decoder_tokens=int((rows * decoder).sum()),
        encoder_pairs=int((rows * encoder**2).sum()),
        decoder_pairs=int((rows * decoder**2).sum()),
        cross_pairs=int((rows * encoder * decoder).sum()),
    )


def _sum(counts: Sequence[BatchCount]) -> BatchCount:
    return BatchCount(*map(sum, zip(*map(astuple, counts))))


# ------------------------------------------------------------------------------------------ report


def _length_table(lengths: dict[str, np.ndarray]) -> str:
    names = {0: "min", 50: "median", 100: "max"}
    headers = ["tokens", *(names.get(p, f"{p}%") for p in PERCENTILES), "mean"]
    rows = [
        [side, *(f"{np.percentile(values, p):,.0f}" for p in PERCENTILES), f"{values.mean():,.1f}"]
        for side, values in lengths.items()
    ]
    return format_table(headers, rows)


def _histogram(values: np.ndarray) -> str:
    """Bars of equal width in tokens up to the 99th percentile; the last takes what lies beyond."""
    width = max(1, int(np.ceil((np.percentile(values, 99) + 1) / _BARS)))
    counts = np.bincount(np.minimum(values // width, _BARS), minlength=_BARS + 1)
    last = int(counts.nonzero()[0].max())
    lines = []
    for i, count in enumerate(counts[: last + 1].tolist()):
        label = f"{i * width:,}+" if i == _BARS else f"{i * width:,} - {(i + 1) * width - 1:,}"
        bar = "#" * int(np.ceil(40 * count / counts.max()))
        lines.append(f"  {label:>15}  {count:>9,}  {bar}".rstrip())
    return "\n".join(lines)


def _forecast_table(ways: dict[str, list[Forecast]], shape: str) -> str:
    headers = ["rows per\nbatch"]
    for way in ways:
        headers += [f"{way}:\npadding", "speed-up,\nlinear", "speed-up,\nall"]
    rows = []
    for i, size in enumerate(BATCH_SIZES):
        row = [str(size)]
        for forecasts in ways.values():
            f = forecasts[i]
            row += [f"{f.padding_share:.1%}", f"{f.linear_speed_up:.2f}x", f"{f.speed_up:.2f}x"]
        rows.append(row)
    return format_table(headers, rows)


def _caption(shape: str, max_length: int | None, cut: dict[str, int], texts: int) -> str:
    lines = [
        "padding: share of the slots that hold no token. speed-up: operations padded / packed of",
        f"{shape}, forward and backward: of its linear layers, and with attention.",
        "random: batches of the shuffled texts; sorted: of the texts in order of length.",
    ]
    if max_length is None:
        lines.append("Nothing was cut; see --max-length.")
    else:
        counts = ", ".join(f"{count:,} of {texts:,} {side}s" for side, count in cut.items())
        lines.append(f"Cut to {max_length:,} tokens: {counts}.")
    return "\n".join(lines)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: cannot make the folder {folder}: {error.strerror}") from None


def _write(
    arguments: argparse.Namespace,
    shape: str,
    lengths: dict[str, np.ndarray],
    cut: dict[str, int],
    ways: dict[str, list[Forecast]],
) -> None:
    report = {
        "versions": machine.versions(),
        "options": {
            "data": str(arguments.data),
            "tokenizer": arguments.tokenizer,
            "shape": shape,
            "max_length": arguments.max_length,
            "seed": arguments.seed,
        },
        "lengths": {
            side: {
                "texts": len(values),
                "tokens": int(values.sum()),
                "cut": cut[side],
                "percentiles": {str(p): float(np.percentile(values, p)) for p in PERCENTILES},
            }
            for side, values in lengths.items()
        },
        "batches": {
            way: {str(size): vars(f) for size, f in zip(BATCH_SIZES, forecasts)}
            for way, forecasts in ways.items()
        },
    }
    written = [arguments.out / "inspect.json"]
    written[0].write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if figures.available():
        written.append(arguments.out / "inspect.png")
        figures.draw_inspect(
            lengths,
            BATCH_SIZES,
            {way: [f.padding_share for f in forecasts] for way, forecasts in ways.items()},
            {way: [f.speed_up for f in forecasts] for way, forecasts in ways.items()},
            shape,
            written[-1],
        )
    print("\nwritten: " + ", ".join(map(str, written)))
