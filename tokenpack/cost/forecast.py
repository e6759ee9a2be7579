"""Predict the time of a training step from its counts and the ceilings of a device.

    device = products / rate + attention / rate + bytes moved / rate
             + packed: sequences * extra seconds of a sequence in all attentions
    host   = calls * seconds of a call
    update = AdamW's bytes / rate + weights * seconds of AdamW per weight
    step   = update + device + host          on a CPU
    step   = update + max(device, host)      on a GPU, which runs asynchronously

This is a roofline (Williams et al. 2009, doi:10.1145/1498765.1498785). Its terms are added, because
layers run one after another. Every term is at its ceiling, so the time is that of a device at its
peak, and a ratio of two times is more reliable than either. AdamW in float32 with activations of
another dtype is mixed precision as in `torch.autocast`; its casts of weights are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from .ceilings import Ceilings
from .operations import BatchCount, ModelCost, training_operations
from .traffic import Traffic

# Bytes that AdamW moves per parameter in float32: it reads parameter, gradient and two states, and
# writes all but the gradient. This holds on a CPU, too, where a weight stays in the caches.
_ADAMW = 7 * 4
# Passes of the patched loss over the logits: read for the loss, read and written for the gradient.
_LOSS_PASSES = 3
_MMAP_BYTES = 32 * 2**20  # glibc maps new pages for each allocation above this size


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of one training step, by cause.

    Attributes:
        products: matrix products.
        attention: attention, including the extra time per sequence of packed attention.
        bytes: operators other than products and attention, by the bytes that they move.
        optimizer: AdamW.
        calls: time on the host to call the operators.
        on_gpu: whether the host's time overlaps with the device's.
    """

    products: float
    attention: float
    bytes: float
    optimizer: float
    calls: float
    on_gpu: bool

    @property
    def forward_backward(self) -> float:
        """Seconds without the optimizer."""
        device = self.products + self.attention + self.bytes
        return max(device, self.calls) if self.on_gpu else device + self.calls

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.forward_backward + self.optimizer


def forecast_seconds(
    cost: ModelCost,
    traffic: Traffic,
    count: BatchCount,
    parameters: int,
    weights: int,
    ceilings: Ceilings,
    *,
    packed: bool,
) -> StepSeconds:
    """Predict the seconds of a training step on a device at its peak.

    Args:
        cost: of the model; see `model_cost`.
        traffic: of the model, in the dtype of the ceilings; see `count_traffic`.
        count: tokens and query-key pairs that are computed; see `count_padded`, `count_packed` and
            `count_lengths`.
        parameters: number of trained parameters.
        weights: number of tensors that hold them.
        ceilings: of the device; see `measure_ceilings`.
        packed: whether the model is patched: it has packed attention, and a loss without the logits
            of all tokens.

    Returns:
        The seconds, by cause.
    """
    operations = training_operations(cost, count)
    moved = (
        traffic.moved_once
        + traffic.moved_per_encoder_token * count.encoder_tokens
        + traffic.moved_per_decoder_token * count.decoder_tokens
    )
    if packed:
        sequences = count.sequences * _seconds_per_sequence(cost, ceilings)
        loss = _LOSS_PASSES * traffic.logits_per_token * count.decoder_tokens / ceilings.bytes
    else:
        sequences = 0.0
        loss = traffic.loss_moved_per_token * count.decoder_tokens
        large = traffic.logits_per_token * count.decoder_tokens > _MMAP_BYTES
        loss /= ceilings.fresh_bytes if large else ceilings.bytes
    return StepSeconds(
        products=operations.linear / ceilings.products,
        attention=operations.attention / ceilings.attention + sequences,
        bytes=moved / ceilings.bytes + loss,
        optimizer=_ADAMW * parameters / ceilings.bytes + weights * ceilings.update,
        calls=traffic.calls * ceilings.call,
        on_gpu=ceilings.on_gpu,
    )


def _seconds_per_sequence(cost: ModelCost, ceilings: Ceilings) -> float:
    """Extra seconds per sequence, summed over all attentions."""
    # A query-key pair costs two multiply-adds per unit of width, heads * head_dim.
    own, cross = (cost.per_encoder_pair + cost.per_decoder_pair) / 2, cost.per_cross_pair / 2
    plain = cost.attentions - cost.biased_attentions
    if not cost.biased_attentions:
        own, cross = 0.0, own + cross
    return (
        plain * ceilings.sequence
        + cross * ceilings.sequence_width
        + cost.biased_attentions * ceilings.biased_sequence
        + own * ceilings.biased_sequence_width
    )
