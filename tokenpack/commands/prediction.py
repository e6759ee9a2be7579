"""Predict what training on a file's texts needs, on one device and on many, with `tokenpack.cost`.

Batches are random ones of 8 to 128 rows. The token budget is the size of a micro-batch whose packed
step fits into the device's memory. Many ranks are simulated: enough lengths are drawn from
the file's with replacement, and the trainer's own sampler plans them and assigns them to ranks.
"""

from __future__ import annotations

import argparse
from dataclasses import astuple, dataclass
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedModel

from .. import cost
from ..cost import BatchCount, Ceilings, ModelCost, StepMemory, StepSeconds, Traffic
from ..table import format_table
from ..trainer.sampler import TokenBudgetBatchSampler
from .epochs import (
    BATCH_SIZES,
    TextLengths,
    count_packed,
    count_padded,
    random_orders,
)

RANKS = (8, 64, 1024)
_GIB = 2**30
_SEQUENCES = 1_000_000  # upper limit of the lengths drawn for the simulation
_STEPS = 8
_DEFAULT_BUDGET = 2**14  # tokens of a simulated rank if the model does not fit the devices
# A device gains nothing from more tokens, and larger budgets would make balancing look too easy.
_LARGEST_BUDGET = 2**16


@dataclass(frozen=True)
class BatchPrediction:
    """Random batches of ``rows`` rows: seconds of the mean step, bytes of the largest step."""

    rows: int
    padded: StepSeconds
    packed: StepSeconds
    padded_bytes: int
    packed_bytes: int

    @property
    def ratio(self) -> float:
        """Padded / packed time."""
        return self.padded.total / self.packed.total


@dataclass(frozen=True)
class RankPrediction:
    """A packed step on several ranks, each with the same token budget.

    Attributes:
        balance: operations of the mean rank over those of the busiest, the median over the steps.
        steps: number of simulated steps.
        compute: seconds that a rank computes.
        data_parallel: seconds that DDP communicates, without overlap.
        fully_sharded: seconds that FSDP communicates, without overlap.
    """

    ranks: int
    balance: float
    steps: int
    compute: float
    data_parallel: float
    fully_sharded: float

    def efficiency(self, communication: float) -> float:
        """Speed per rank over that of a single rank, which neither waits nor communicates."""
        return self.compute / (self.compute / self.balance + communication)


@dataclass(frozen=True)
class Prediction:
    """Everything that ``--gpus`` prints.

    Attributes:
        parameters: number of trained parameters.
        link: gigabytes per second between ranks.
        state_bytes: bytes of weights and optimizer.
        packed_budget: tokens of a packed micro-batch that fits a device with all weights on it.
        padded_budget: slots of a padded micro-batch that fits it.
        sharded_budget: tokens if weights, gradients and optimizer are sharded over all devices.
        simulated_budget: tokens of a rank in the simulation.
        of_rows: predictions for one device, by batch size.
        of_ranks: predictions for several ranks.
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
    of_rows: list[BatchPrediction]
    of_ranks: list[RankPrediction]


def load_ceilings(arguments: argparse.Namespace) -> Ceilings | None:
    """The ceilings to predict with, measured or from a file; None without ``--gpus``.

    Raises:
        ValueError: if ``--ceilings`` comes without ``--gpus``, or its file is not valid.
    """
    if arguments.gpus is None:
        if arguments.ceilings is not None:
            raise ValueError("--ceilings must be used with --gpus N, got no --gpus")
        return None
    if arguments.ceilings is None:
        return cost.measure_ceilings()
    return cost.read_ceilings(arguments.ceilings)


class CountedModel(NamedTuple):
    """Counts of a model that predictions are made from."""

    cost: ModelCost
    traffic: Traffic
    padded: StepMemory
    packed: StepMemory
    parameters: int
    weights: int


def predict(
    model: PreTrainedModel, lengths: TextLengths, device: Ceilings, arguments: argparse.Namespace
) -> Prediction:
    """Predict for ``model``, which is on the meta device, and texts of these lengths."""
    model = model.to(device.torch_dtype)
    kind = "cuda" if device.on_gpu else "cpu"
    counted = CountedModel(
        cost.model_cost(model),
        cost.count_traffic(model),
        cost.count_memory(model, kind, packed=False),
        cost.count_memory(model, kind, packed=True),
        sum(parameter.numel() for parameter in model.parameters()),
        len(list(model.parameters())),
    )
    tokens = count_packed(lengths)
    decoder_share = tokens.decoder_tokens / tokens.tokens

    def budget(step: StepMemory, devices: int = 1) -> int:
        parameters, memory = counted.parameters, device.memory
        return cost.token_budget(step, decoder_share, parameters, memory, devices=devices)

    packed = budget(counted.packed)
    sharded = budget(counted.packed, arguments.gpus)
    longest = int(_as_array(lengths).sum(1).max())
    simulated = max(min(packed or sharded or _DEFAULT_BUDGET, _LARGEST_BUDGET), longest)
    orders = random_orders(len(lengths.decoder), arguments.seed)
    ranks = sorted({*RANKS, *([arguments.gpus] if arguments.gpus > 1 else [])})
    return Prediction(
        ceilings=device,
        parameters=counted.parameters,
        gpus=arguments.gpus,
        link=arguments.link,
        state_bytes=cost.state_memory(counted.parameters),
        packed_budget=packed,
        padded_budget=budget(counted.padded),
        sharded_budget=sharded,
        simulated_budget=simulated,
        of_rows=[_predict_batches(rows, lengths, orders, counted, device) for rows in BATCH_SIZES],
        of_ranks=[
            _predict_ranks(count, simulated, lengths, counted, device, arguments) for count in ranks
        ],
    )


# ------------------------------------------------------------------------------------ one device


def _predict_batches(
    rows: int, lengths: TextLengths, orders: np.ndarray, model: CountedModel, device: Ceilings
) -> BatchPrediction:
    batches = len(orders) * -(-len(lengths.decoder) // rows)
    padded = _mean_count(count_padded(lengths, orders, rows), batches)
    packed = _mean_count(count_packed(lengths, len(orders)), batches)

    def seconds(count: BatchCount, packed: bool) -> StepSeconds:
        return _step_seconds(model, count, device, packed)

    def memory(reduce: np.ufunc, step: StepMemory) -> int:
        largest = _largest_bytes(lengths, orders[0], rows, reduce, step)
        return cost.state_memory(model.parameters) + largest

    return BatchPrediction(
        rows,
        seconds(padded, False),
        seconds(packed, True),
        padded_bytes=memory(np.maximum, model.padded),
        packed_bytes=memory(np.add, model.packed),
    )


def _step_seconds(
    model: CountedModel, count: BatchCount, device: Ceilings, packed: bool
) -> StepSeconds:
    return cost.forecast_seconds(
        model.cost,
        model.traffic,
        count,
        model.parameters,
        model.weights,
        device,
        packed=packed,
    )


def _mean_count(count: BatchCount, batches: int) -> BatchCount:
    return BatchCount(*(round(each / batches) for each in astuple(count)))


def _largest_bytes(
    lengths: TextLengths, order: np.ndarray, rows: int, reduce: np.ufunc, step: StepMemory
) -> int:
    """Bytes of the batch that needs the most memory.

    ``reduce`` is ``np.maximum`` for padded batches, and ``np.add`` for packed ones.
    """
    starts = np.arange(0, len(order), rows)
    in_batch = np.diff([*starts, len(order)]) if reduce is np.maximum else 1
    decoder = in_batch * reduce.reduceat(lengths.decoder[order], starts)
    encoder = np.zeros_like(decoder)
    if lengths.encoder is not None:
        encoder = in_batch * reduce.reduceat(lengths.encoder[order], starts)
    # Only batches that no other batch exceeds on both sides can be the largest.
    by_size = np.lexsort((-decoder, -encoder))
    longest = np.maximum.accumulate(decoder[by_size])
    front = by_size[np.diff(longest, prepend=-1) > 0]
    return max(step.peak(encoder[batch], decoder[batch]) for batch in front)


# ------------------------------------------------------------------------------------ many ranks


def _predict_ranks(
    ranks: int,
    budget: int,
    lengths: TextLengths,
    model: CountedModel,
    device: Ceilings,
    arguments: argparse.Namespace,
) -> RankPrediction:
    table = _as_array(lengths)
    mean = table.sum(1).mean()
    steps = int(min(max(_SEQUENCES * mean // (ranks * budget), 1), _STEPS))
    # Half a step more than needed, so that all ``steps`` steps are full.
    count = int(np.ceil((steps + 0.5) * ranks * budget / mean))
    random = np.random.default_rng(arguments.seed)
    drawn = table[random.choice(len(table), count)]
    sampler = TokenBudgetBatchSampler(
        drawn, ranks * budget, num_ranks=ranks, seed=arguments.seed, hidden_size=_hidden_size(model)
    )
    items, offsets = sampler.plan()
    members = [items[a:b] for a, b in zip(offsets[:-1], offsets[1:])][:steps]
    balance = cost.rank_efficiency(
        [sampler.ranks_of(each) for each in members], members, drawn, model.cost, ranks
    )
    share = budget / mean / len(table)
    step = BatchCount(*(round(share * each) for each in astuple(count_packed(lengths))))
    sent = cost.exchange_bytes(model.parameters, ranks)
    return RankPrediction(
        ranks,
        balance=float(np.median(balance)),
        steps=len(members),
        compute=_step_seconds(model, step, device, packed=True).total,
        data_parallel=sent.data_parallel / (1e9 * arguments.link),
        fully_sharded=sent.fully_sharded / (1e9 * arguments.link),
    )


def _as_array(lengths: TextLengths) -> np.ndarray:
    """``(texts, 1)`` or ``(texts, 2)`` int64; the sampler needs at least one token per side."""
    columns = [lengths.decoder] if lengths.encoder is None else [lengths.encoder, lengths.decoder]
    return np.maximum(np.stack(columns, axis=1), 1)


def _hidden_size(model: CountedModel) -> int:
    """The hidden size with which the sampler's cost of a query-key pair equals this model's.

    In the sampler's cost model, a token costs as much as ``6 * hidden_size`` pairs.
    """
    pairs = model.cost.per_decoder_pair + model.cost.per_encoder_pair
    tokens = model.cost.per_decoder_token + model.cost.per_encoder_token
    return max(round(tokens / pairs / 6), 1)


# ---------------------------------------------------------------------------------------- report


def format_prediction(prediction: Prediction) -> str:
    """The tables, and notes on them."""
    device = prediction.ceilings
    lines = [
        f"predicted for {device.device} at its peak ({device.dtype}: products "
        f"{device.products / 1e12:,.3g} TFLOP/s, attention {device.attention / 1e12:,.3g}, "
        f"{device.bytes / 1e9:,.3g} GB/s, {device.memory / _GIB:,.3g} GiB),",
        f"with AdamW on {prediction.parameters / 1e6:,.0f} million parameters: weights and "
        f"optimizer states need {prediction.state_bytes / _GIB:,.3g} GiB",
        "",
        _rows_table(prediction.of_rows),
        "",
        *_budgets(prediction),
    ]
    if prediction.gpus > 1:
        lines += ["", _ranks_table(prediction), "", *_ranks_caption(prediction)]
    return "\n".join(lines)


def _rows_table(of_rows: list[BatchPrediction]) -> str:
    headers = ["rows", "seconds,\npadded", "seconds,\npacked", "speed-up"]
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


def _budgets(prediction: Prediction) -> list[str]:
    if prediction.packed_budget:
        lines = [
            f"max_tokens_per_microbatch={prediction.packed_budget:,} fits and leaves a tenth of "
            f"the memory free; a padded micro-batch fits with {prediction.padded_budget:,} slots"
        ]
    else:
        lines = ["weights, gradients and optimizer do not fit into this device's memory"]
    if prediction.gpus > 1:
        lines.append(
            f"sharded over {prediction.gpus} devices (FSDP), max_tokens_per_microbatch="
            f"{prediction.sharded_budget:,} fits"
            if prediction.sharded_budget
            else f"nor do they fit when sharded over {prediction.gpus} devices (FSDP)"
        )
    return lines


def _ranks_table(prediction: Prediction) -> str:
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
            for each in prediction.of_ranks
        ],
    )


def _ranks_caption(prediction: Prediction) -> list[str]:
    steps = min(each.steps for each in prediction.of_ranks)
    return [
        f"a packed step of {prediction.simulated_budget:,} tokens per rank over links of "
        f"{prediction.link:g} GB/s, without overlap of communication and backward;",
        f"balance: batches of the trainer's own sampler, over {steps} or more steps, with lengths "
        "drawn from the file",
    ]
