"""``tokenpack inspect``: lengths of texts, padding of their batches, and what packing saves.

    padding share = 1 - tokens / slots          over all batches of an epoch
    speed-up      = operations(padded) / operations(packed)

`tokenpack.cost` counts the operations, for a model of a published shape. `tokenpack demo` measures
what a machine achieves, and `prediction` predicts it. These numbers are for padded batches, whose
padding a patched model removes. `strategies` plans rows that are packed in advance, and shows how
full they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from ..cost import ModelCost, model_cost, training_operations
from ..samples.text import Text, read_texts
from ..table import format_table
from . import figures, machine, prediction, strategies
from .epochs import (
    BATCH_SIZES,
    TextLengths,
    count_packed,
    count_padded,
    random_orders,
    sorted_order,
)
from .models import SHAPES, build_config, build_shape
from .output import make_folder, write_json
from .tokenizer import Encode, load_tokenizer

PERCENTILES = (0, 5, 25, 50, 75, 90, 95, 99, 100)

_BARS = 10
_CHUNK = 1000


@dataclass(frozen=True)
class PackingGain:
    """Padding of batches of one size, and the speed-up from removing it."""

    padding_share: float
    linear_speed_up: float
    speed_up: float


def run(arguments: argparse.Namespace) -> int:
    """Print the tables, and write the PNG and the JSON. Returns 0; bad input raises."""
    texts = read_texts(arguments.data)
    has_target = texts[0].target is not None
    if arguments.model_config is not None:
        option, shape = "--model-config", arguments.model_config
        model = build_config(shape)
    else:
        option, shape = "--shape", arguments.shape or ("t5-base" if has_target else "llama-1b")
        model = build_shape(shape)
    encoder_decoder = model.config.is_encoder_decoder
    if encoder_decoder and not has_target:
        raise ValueError(
            f"{option} must be a decoder-only model, got {shape}: an encoder-decoder needs "
            f"'source' and 'target', and {arguments.data} has only texts; use for example "
            f"--shape {next(name for name in SHAPES if name.startswith('llama'))}"
        )
    device = prediction.load_ceilings(arguments)
    make_folder(arguments.out, "--out")
    lengths = _measure(texts, load_tokenizer(arguments.tokenizer))
    cut = _cut(lengths, arguments.max_length)
    text_lengths = _text_lengths(lengths, encoder_decoder)

    cost = model_cost(model)
    ways = {
        "random": [packing_gain(text_lengths, size, cost, arguments.seed) for size in BATCH_SIZES],
        "sorted": [packing_gain(text_lengths, size, cost, None) for size in BATCH_SIZES],
    }
    print(f"{arguments.data}: {len(texts):,} texts, {_total(lengths):,} tokens\n")
    print(_length_table(lengths))
    for side, values in lengths.items():
        print(f"\n{side}\n{_histogram(values)}")
    print(f"\n{_gain_table(ways, shape)}")
    print(f"\n{_caption(shape, arguments.max_length, cut, len(texts))}")
    packing, table = _pack(text_lengths, arguments.capacity, arguments.seed)
    print(f"\n{table}")
    predicted = None
    if device is not None:
        predicted = prediction.predict(model, text_lengths, device, arguments)
        print(f"\n{prediction.format_prediction(predicted)}")
    _write(arguments, shape, lengths, cut, ways, packing, predicted)
    return 0


# ----------------------------------------------------------------------------------------- lengths


def _measure(texts: Sequence[Text], encode: Encode) -> dict[str, np.ndarray]:
    columns = {"source" if texts[0].target is not None else "text": [t.source for t in texts]}
    if texts[0].target is not None:
        columns["target"] = [t.target or "" for t in texts]
    lengths = {}
    for side, strings in columns.items():
        chunks = range(0, len(strings), _CHUNK)
        bar = tqdm(chunks, desc=f"tokenizing {side}", leave=False, disable=len(chunks) < 3)
        counts = [len(ids) for start in bar for ids in encode(strings[start : start + _CHUNK])]
        lengths[side] = np.array(counts, dtype=np.int64)
        if not lengths[side].any():
            raise ValueError(f"--tokenizer must produce tokens, got none for any {side}")
    return lengths


def _cut(lengths: dict[str, np.ndarray], max_length: int | None) -> dict[str, int]:
    """Cut the lengths in place, and return how many of each column were longer."""
    if max_length is None:
        return dict.fromkeys(lengths, 0)
    cut = {side: int((values > max_length).sum()) for side, values in lengths.items()}
    for values in lengths.values():
        np.minimum(values, max_length, out=values)
    return cut


def _text_lengths(lengths: dict[str, np.ndarray], encoder_decoder: bool) -> TextLengths:
    if encoder_decoder:
        return TextLengths(lengths["source"], lengths["target"])
    return TextLengths(None, sum(lengths.values(), np.zeros(1, dtype=np.int64)))


def _total(lengths: dict[str, np.ndarray]) -> int:
    return sum(int(values.sum()) for values in lengths.values())


# ------------------------------------------------------------------------------------ packing gain


def packing_gain(
    lengths: TextLengths, batch_size: int, cost: ModelCost, seed: int | None
) -> PackingGain:
    """Padding and speed-up over epochs of batches of ``batch_size`` rows.

    Args:
        lengths: tokens of each text.
        batch_size: rows of a batch; the last batch of an epoch may have fewer.
        cost: of the model's forward.
        seed: for the shuffling; ``None`` sorts the texts by length instead, the encoder's first.
    """
    orders = sorted_order(lengths) if seed is None else random_orders(len(lengths.decoder), seed)
    padded = count_padded(lengths, orders, batch_size)
    packed = count_packed(lengths, len(orders))
    before, after = training_operations(cost, padded), training_operations(cost, packed)
    return PackingGain(
        padding_share=1 - packed.tokens / padded.tokens,
        linear_speed_up=before.linear / after.linear,
        speed_up=before.total / after.total,
    )


# ----------------------------------------------------------------------------------------- packing


def _pack(lengths: TextLengths, capacity: int | None, seed: int) -> tuple[dict[str, Any], str]:
    """Plan packed rows of the texts. Returns the plan's metrics for the JSON, and a table."""
    if lengths.encoder is not None:
        plan = strategies.plan_pairs(lengths.encoder, lengths.decoder, capacity)
        capacities = {"source": plan.capacity, "target": plan.target_capacity}
        efficiencies = {"source": plan.efficiency, "target": plan.target_efficiency}
        pairs = {"metrics": plan.metrics._asdict(), "efficiency": efficiencies}
        return {"capacity": capacities, "pairs": pairs}, strategies.format_pairs(plan)
    capacity = capacity or strategies.default_capacity(lengths.decoder)
    compared = strategies.compare_strategies(lengths.decoder, capacity, seed)
    metrics = {name: each._asdict() for name, each in compared.metrics.items()}
    report = {"capacity": capacity, "auto": compared.auto, "strategies": metrics}
    return report, strategies.format_comparison(compared)


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
    """Bins of equal width up to the 99th percentile; the last bin holds all longer texts."""
    width = max(1, int(np.ceil((np.percentile(values, 99) + 1) / _BARS)))
    counts = np.bincount(np.minimum(values // width, _BARS), minlength=_BARS + 1)
    last = int(counts.nonzero()[0].max())
    lines = []
    for i, count in enumerate(counts[: last + 1].tolist()):
        label = f"{i * width:,}+" if i == _BARS else f"{i * width:,} - {(i + 1) * width - 1:,}"
        bar = "#" * int(np.ceil(40 * count / counts.max()))
        lines.append(f"  {label:>15}  {count:>9,}  {bar}".rstrip())
    return "\n".join(lines)


def _gain_table(ways: dict[str, list[PackingGain]], shape: str) -> str:
    headers = ["rows per\nbatch"]
    for way in ways:
        headers += [f"{way}:\npadding", "speed-up,\nlinear", "speed-up,\nall"]
    rows = []
    for i, size in enumerate(BATCH_SIZES):
        row = [str(size)]
        for gains in ways.values():
            gain = gains[i]
            row += [
                f"{gain.padding_share:.1%}",
                f"{gain.linear_speed_up:.2f}x",
                f"{gain.speed_up:.2f}x",
            ]
        rows.append(row)
    return format_table(headers, rows)


def _caption(shape: str, max_length: int | None, cut: dict[str, int], texts: int) -> str:
    lines = [
        "padding: share of the slots that hold no token. speed-up: padded / packed operations of",
        f"{shape}, forward and backward: of its linear layers, and with attention.",
        "random: batches of the shuffled texts. sorted: batches of the texts in order of length.",
    ]
    if max_length is None:
        lines.append("No text was cut; see --max-length.")
    else:
        counts = ", ".join(f"{count:,} of {texts:,} {side}s" for side, count in cut.items())
        lines.append(f"Cut to {max_length:,} tokens: {counts}.")
    return "\n".join(lines)


def _write(
    arguments: argparse.Namespace,
    shape: str,
    lengths: dict[str, np.ndarray],
    cut: dict[str, int],
    ways: dict[str, list[PackingGain]],
    packing: dict[str, Any],
    predicted: prediction.Prediction | None,
) -> None:
    report = {
        "versions": machine.versions(),
        "options": {
            "data": str(arguments.data),
            "tokenizer": arguments.tokenizer,
            "shape": shape,
            "max_length": arguments.max_length,
            "capacity": arguments.capacity,
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
            way: {str(size): vars(gain) for size, gain in zip(BATCH_SIZES, gains)}
            for way, gains in ways.items()
        },
        "packing": packing,
    }
    if predicted is not None:
        report["prediction"] = asdict(predicted)
    written = [arguments.out / "inspect.json"]
    write_json(written[0], report)
    if figures.available():
        written.append(arguments.out / "inspect.png")
        figures.draw_inspect(
            lengths,
            BATCH_SIZES,
            {way: [gain.padding_share for gain in gains] for way, gains in ways.items()},
            {way: [gain.speed_up for gain in gains] for way, gains in ways.items()},
            shape,
            written[-1],
        )
    print("\nwritten: " + ", ".join(map(str, written)))
