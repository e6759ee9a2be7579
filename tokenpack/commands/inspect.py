"""``tokenpack inspect``: how long texts are, how much of a batch is padding, what packing gives.

    padding share = 1 - tokens / slots          over all batches of an epoch
    speed-up      = operations(padded) / operations(packed)

The operations are those that ``tokenpack.cost`` counts for a model of a published shape. What a
machine makes of them, `tokenpack demo` measures and `prediction` forecasts. All that is of padded
batches, whose padding a patched model leaves out. How full rows get that are packed beforehand,
`strategies` plans.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from ..cost import ModelCost, model_cost, training_operations
from ..samples.text import Text, read_texts
from . import figures, machine, prediction, strategies
from .epochs import BATCH_SIZES, Sides, add, count_packed, count_padded, random_orders, sorted_order
from .models import SHAPES, build_config, build_shape
from .output import make_folder, write_json
from .table import format_table
from .tokenizer import Encode, load_tokenizer

PERCENTILES = (0, 5, 25, 50, 75, 90, 95, 99, 100)

_BARS = 10
_CHUNK = 1000


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
    if arguments.model_config is not None:
        option, shape = "--model-config", arguments.model_config
        model = build_config(shape)
    else:
        option, shape = "--shape", arguments.shape or ("t5-base" if has_target else "llama-1b")
        model = build_shape(shape)
    encoder_decoder = model.config.is_encoder_decoder
    if encoder_decoder and not has_target:
        raise ValueError(
            f"{option}: {shape} is an encoder-decoder and needs 'source' and 'target', but "
            f"{arguments.data} holds texts alone; takes a decoder-only model, for instance --shape "
            f"{next(name for name in SHAPES if name.startswith('llama'))}"
        )
    device = prediction.ceilings_of(arguments)
    make_folder(arguments.out, "--out")
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
    packing, table = _pack(sides, arguments.capacity, arguments.seed)
    print(f"\n{table}")
    predicted = None
    if device is not None:
        predicted = prediction.predict(model, sides, device, arguments)
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
            raise ValueError(f"--tokenizer: makes no token of any {side}")
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
    orders = [sorted_order(sides)] if seed is None else random_orders(len(sides.decoder), seed)
    padded = add([count_padded(sides, order, batch_size) for order in orders])
    packed = add([count_packed(sides)] * len(orders))
    before, after = training_operations(cost, padded), training_operations(cost, packed)
    return Forecast(
        padding_share=1 - packed.tokens / padded.tokens,
        linear_speed_up=before.linear / after.linear,
        speed_up=before.total / after.total,
    )


# ----------------------------------------------------------------------------------------- packing


def _pack(sides: Sides, capacity: int | None, seed: int) -> tuple[dict[str, Any], str]:
    """Packed rows of the texts: for the JSON, and as a table."""
    if sides.encoder is not None:
        plan = strategies.plan_pairs(sides.encoder, sides.decoder, capacity)
        capacities = {"source": plan.capacity, "target": plan.target_capacity}
        efficiencies = {"source": plan.efficiency, "target": plan.target_efficiency}
        of_pairs = {"metrics": plan.metrics._asdict(), "efficiency": efficiencies}
        return {"capacity": capacities, "pairs": of_pairs}, strategies.format_pairs(plan)
    capacity = capacity or strategies.default_capacity(sides.decoder)
    found = strategies.compare_strategies(sides.decoder, capacity, seed)
    of_each = {name: metrics._asdict() for name, metrics in found.metrics.items()}
    report = {"capacity": capacity, "auto": found.auto, "strategies": of_each}
    return report, strategies.format_comparison(found)


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


def _write(
    arguments: argparse.Namespace,
    shape: str,
    lengths: dict[str, np.ndarray],
    cut: dict[str, int],
    ways: dict[str, list[Forecast]],
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
            way: {str(size): vars(f) for size, f in zip(BATCH_SIZES, forecasts)}
            for way, forecasts in ways.items()
        },
        "packing": packing,
    }
    if predicted is not None:
        report["prediction"] = prediction.as_json(predicted)
    written = [arguments.out / "inspect.json"]
    write_json(written[0], report)
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
