"""What training on a file's texts would take, on one device and on many, by the model of cost.

Batches are random ones of 8 to 128 rows. The token budget is what a micro-batch may hold so that a
packed step fits the device. Many ranks are a simulation: the texts' lengths, drawn again and again
until there are enough, are planned and dealt to ranks by the trainer's own sampler.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, astuple, dataclass
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel

from .. import cost
from ..cost import BatchCount, Ceilings, ModelCost, StepMemory, StepSeconds, Traffic
from ..trainer.sampler import TokenBudgetBatchSampler
from .epochs import BATCH_SIZES, Sides, add, count_packed, count_padded, random_orders
from .table import format_table

RANKS = (8, 64, 1024)
_GIB = 2**30
_SEQUENCES = 1_000_000  # drawn for the simulation of ranks, at most
_STEPS = 8
_USUAL_BUDGET = 2**14  # tokens of a simulated rank, where no device can hold the model
_LARGEST_BUDGET = 2**16  # beyond which a device gains nothing, and ranks are the easier to balance


@dataclass(frozen=True)
class OfRows:
    """Random batches of so many rows: seconds of the mean step, bytes of the largest one."""

    rows: int
    padded: StepSeconds
    packed: StepSeconds
    padded_bytes: int
    packed_bytes: int

    @property
    def ratio(self) -> float:
        """Times as fast, packed."""
        return self.padded.total / self.packed.total


@dataclass(frozen=True)
class OfRanks:
    """A packed step of a token budget on each of so many ranks; seconds without any overlap.

    Attributes:
        balance: operations of the mean rank over the busiest one's, the median over steps.
        steps: that were simulated.
    """

    ranks: int
    balance: float
    steps: int
    compute: float
    data_parallel: float
    fully_sharded: float

    def efficiency(self, exchange: float) -> float:
        """Of one rank's speed, where every rank waits for the busiest and for ``exchange``."""
        return self.compute / (self.compute / self.balance + exchange)


@dataclass(frozen=True)
class Prediction:
    """All of it.

    Attributes:
        link: gigabytes a second between ranks.
        state_bytes: of weights and optimizer.
        packed_budget: tokens of a micro-batch that fit a device, where it holds all weights.
        padded_budget: slots of a padded one.
        sharded_budget: tokens, where weights, gradients and optimizer are shared by all devices.
    """

    ceilings: Ceilings
    parameters: int
    gpus: int
    link: float
    state_bytes: int
    packed_budget: int
    padded_budget: int
    sharded_budget: int
    simulated_budget: int
    of_rows: list[OfRows]
    of_ranks: list[OfRanks]


def ceilings_of(arguments: argparse.Namespace) -> Ceilings | None:
    """Of the device that is asked about; None if none is.

    Raises:
        ValueError: if there is a file, but no question, or the file is none of ceilings.
    """
    if arguments.gpus is None:
        if arguments.ceilings is not None:
            raise ValueError("--ceilings: is of a prediction; name --gpus N too")
        return None
    if arguments.ceilings is None:
        return cost.measure_ceilings()
    return cost.read_ceilings(arguments.ceilings)


class Model(NamedTuple):
    """What is counted of a model."""

    cost: ModelCost
    traffic: Traffic
    padded: StepMemory
    packed: StepMemory
    parameters: int
    weights: int


def predict(
    model: PreTrainedModel, sides: Sides, device: Ceilings, arguments: argparse.Namespace
) -> Prediction:
    """Predict for ``model``, on the meta device, and texts of these lengths."""
    model = model.to(device.torch_dtype)
    kind = "cuda" if device.on_gpu else "cpu"
    counted = Model(
        cost.model_cost(model),
        cost.count_traffic(model),
        cost.count_memory(model, kind, packed=False),
        cost.count_memory(model, kind, packed=True),
        sum(parameter.numel() for parameter in model.parameters()),
        len(list(model.parameters())),
    )
    packed = count_packed(sides)
    share = packed.decoder_tokens / packed.tokens

    def budget(step: StepMemory, devices: int = 1) -> int:
        parameters, memory = counted.parameters, device.memory
        return cost.token_budget(step, share, parameters, memory, devices=devices)

    of_one = budget(counted.packed)
    sharded = budget(counted.packed, arguments.gpus)
    longest = int(_lengths(sides).sum(1).max())
    simulated = max(min(of_one or sharded or _USUAL_BUDGET, _LARGEST_BUDGET), longest)
    orders = random_orders(len(sides.decoder), arguments.seed)
    ranks = sorted({*RANKS, *([arguments.gpus] if arguments.gpus > 1 else [])})
    return Prediction(
        ceilings=device,
        parameters=counted.parameters,
        gpus=arguments.gpus,
        link=arguments.link,
        state_bytes=cost.state_memory(counted.parameters),
        packed_budget=of_one,
        padded_budget=budget(counted.padded),
        sharded_budget=sharded,
        simulated_budget=simulated,
        of_rows=[_of_rows(rows, sides, orders, counted, device) for rows in BATCH_SIZES],
        of_ranks=[
            _of_ranks(count, simulated, sides, counted, device, arguments) for count in ranks
        ],
    )


# ------------------------------------------------------------------------------------ one device


def _of_rows(
    rows: int, sides: Sides, orders: list[np.ndarray], model: Model, device: Ceilings
) -> OfRows:
    batches = len(orders) * -(-len(sides.decoder) // rows)
    padded = _mean([count_padded(sides, order, rows) for order in orders], batches)
    packed = _mean([count_packed(sides)] * len(orders), batches)

    def seconds(count: BatchCount, packed: bool) -> StepSeconds:
        return _seconds(model, count, device, packed)

    def memory(reduce: np.ufunc, step: StepMemory) -> int:
        largest = _largest(sides, orders[0], rows, reduce, step)
        return cost.state_memory(model.parameters) + largest

    return OfRows(
        rows,
        seconds(padded, False),
        seconds(packed, True),
        padded_bytes=memory(np.maximum, model.padded),
        packed_bytes=memory(np.add, model.packed),
    )


def _seconds(model: Model, count: BatchCount, device: Ceilings, packed: bool) -> StepSeconds:
    return cost.forecast_seconds(
        model.cost,
        model.traffic,
        count,
        model.parameters,
        model.weights,
        device,
        packed=packed,
    )


def _mean(counts: list[BatchCount], batches: int) -> BatchCount:
    return BatchCount(*(round(each / batches) for each in astuple(add(counts))))


def _largest(sides: Sides, order: np.ndarray, rows: int, reduce: np.ufunc, step: StepMemory) -> int:
    """Bytes of the batch that needs the most; ``reduce`` is ``maximum`` for padded ones."""
    starts = np.arange(0, len(order), rows)
    in_batch = np.diff([*starts, len(order)]) if reduce is np.maximum else 1
    decoder = in_batch * reduce.reduceat(sides.decoder[order], starts)
    encoder = np.zeros_like(decoder)
    if sides.encoder is not None:
        encoder = in_batch * reduce.reduceat(sides.encoder[order], starts)
    # Of batches of which another has more of both sides, none is the largest.
    by_size = np.lexsort((-decoder, -encoder))
    longest = np.maximum.accumulate(decoder[by_size])
    front = by_size[np.diff(longest, prepend=-1) > 0]
    return max(step.peak(encoder[batch], decoder[batch]) for batch in front)


# ------------------------------------------------------------------------------------ many ranks


def _of_ranks(
    ranks: int,
    budget: int,
    sides: Sides,
    model: Model,
    device: Ceilings,
    arguments: argparse.Namespace,
) -> OfRanks:
    lengths = _lengths(sides)
    mean = lengths.sum(1).mean()
    steps = int(min(max(_SEQUENCES * mean // (ranks * budget), 1), _STEPS))
    # Half a step more, so that as many are full.
    count = int(np.ceil((steps + 0.5) * ranks * budget / mean))
    random = np.random.default_rng(arguments.seed)
    drawn = lengths[random.choice(len(lengths), count)]
    sampler = TokenBudgetBatchSampler(
        drawn, ranks * budget, num_ranks=ranks, seed=arguments.seed, hidden_size=_hidden(model)
    )
    items, offsets = sampler.plan()
    members = [items[a:b] for a, b in zip(offsets[:-1], offsets[1:])][:steps]
    balance = cost.rank_efficiency(
        [sampler.ranks_of(each) for each in members], members, drawn, model.cost, ranks
    )
    of_text = astuple(count_packed(sides))
    share = budget / mean / len(lengths)
    step = BatchCount(*(round(share * each) for each in of_text))
    sent = cost.exchange_bytes(model.parameters, ranks)
    return OfRanks(
        ranks,
        balance=float(np.median(balance)),
        steps=len(members),
        compute=_seconds(model, step, device, packed=True).total,
        data_parallel=sent.data_parallel / (1e9 * arguments.link),
        fully_sharded=sent.fully_sharded / (1e9 * arguments.link),
    )


def _lengths(sides: Sides) -> np.ndarray:
    """``(texts, 1)`` or ``(texts, 2)`` int64; a text without a token counts as one."""
    columns = [sides.decoder] if sides.encoder is None else [sides.encoder, sides.decoder]
    return np.maximum(np.stack(columns, axis=1), 1)


def _hidden(model: Model) -> int:
    """The width at which the sampler's cost of a pair is this model's: 6 tokens' worth of it."""
    pairs = model.cost.per_decoder_pair + model.cost.per_encoder_pair
    tokens = model.cost.per_decoder_token + model.cost.per_encoder_token
    return max(round(tokens / pairs / 6), 1)


# ---------------------------------------------------------------------------------------- report


def format_prediction(found: Prediction) -> str:
    """Tables and what they are of."""
    device = found.ceilings
    lines = [
        f"predicted on {device.device} at its best ({device.dtype}: products "
        f"{device.products / 1e12:,.3g} TFLOP/s, attention {device.attention / 1e12:,.3g}, "
        f"{device.bytes / 1e9:,.3g} GB/s, {device.memory / _GIB:,.3g} GiB),",
        f"AdamW on {found.parameters / 1e6:,.0f} million parameters, whose weights and states take "
        f"{found.state_bytes / _GIB:,.3g} GiB",
        "",
        _rows_table(found.of_rows),
        "",
        *_budgets(found),
    ]
    if found.gpus > 1:
        lines += ["", _ranks_table(found), "", *_ranks_caption(found)]
    return "\n".join(lines)


def _rows_table(of_rows: list[OfRows]) -> str:
    headers = ["rows", "seconds,\npadded", "seconds,\npacked", "times\nas fast"]
    headers += ["GiB,\npadded", "GiB,\npacked"]
    return format_table(
        headers,
        [
            [
                str(each.rows),
                f"{each.padded.total:.3g}",
                f"{each.packed.total:.3g}",
                f"{each.ratio:.2f}",
                f"{each.padded_bytes / _GIB:,.2f}",
                f"{each.packed_bytes / _GIB:,.2f}",
            ]
            for each in of_rows
        ],
    )


def _budgets(found: Prediction) -> list[str]:
    if found.packed_budget:
        lines = [
            f"max_tokens_per_microbatch={found.packed_budget:,} fits, with a tenth of the memory "
            f"to spare; padded, {found.padded_budget:,} slots do"
        ]
    else:
        lines = ["weights, gradients and optimizer do not fit this device"]
    if found.gpus > 1:
        lines.append(
            f"shared by {found.gpus} devices (FSDP), max_tokens_per_microbatch="
            f"{found.sharded_budget:,} fits"
            if found.sharded_budget
            else f"nor do they where {found.gpus} devices share them (FSDP)"
        )
    return lines


def _ranks_table(found: Prediction) -> str:
    headers = ["ranks", "balance", "seconds of\na step", "DDP's\nall-reduce"]
    headers += ["FSDP's\ngathers", "efficiency,\nDDP", "efficiency,\nFSDP"]
    return format_table(
        headers,
        [
            [
                f"{each.ranks:,}",
                f"{each.balance:.1%}",
                f"{each.compute:.3g}",
                f"{each.data_parallel:.3g}",
                f"{each.fully_sharded:.3g}",
                f"{each.efficiency(each.data_parallel):.0%}",
                f"{each.efficiency(each.fully_sharded):.0%}",
            ]
            for each in found.of_ranks
        ],
    )


def _ranks_caption(found: Prediction) -> list[str]:
    steps = min(each.steps for each in found.of_ranks)
    return [
        f"a packed step of {found.simulated_budget:,} tokens a rank over links of {found.link:g} "
        "GB/s, nothing hidden behind the backward;",
        f"balance of the planner's own batches, over {steps} or more steps of lengths drawn from "
        "the file's",
    ]


def as_json(found: Prediction) -> dict[str, Any]:
    """For the JSON."""
    return asdict(found)
