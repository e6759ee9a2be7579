"""Predict the time of a training step from what was counted and what a device can do.

    device = products / rate + attention / rate + bytes moved / rate
             + packed: sequences * what one costs all attentions beside its operations
    host   = calls * seconds of a call
    update = AdamW's bytes / rate + weights * seconds of its call for one
    step   = update + (device + host on a CPU, max(device, host) on a GPU, which is called ahead)

A roofline (Williams et al. 2009, doi:10.1145/1498765.1498785) whose terms are added, since layers
run one after another. Every term is at its ceiling, so times are those of a device at its best;
the ratio of two of them is what to believe. AdamW in float32 beside activations of another dtype
is mixed precision as torch.autocast has it; its casts of weights are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from .ceilings import Ceilings
from .operations import BatchCount, ModelCost, training_operations
from .traffic import Traffic

# Bytes that AdamW moves for a parameter in float32: parameter, gradient and two states are read,
# all but the gradient written. Once, also on a CPU, in whose caches one weight's operators stay.
_ADAMW = 7 * 4
# Of a token's logits in the patched loss: read for the loss, read and written for the gradient.
_LOSS_PASSES = 3
_MAPPED_ANEW = 32 * 2**20  # bytes beyond which glibc keeps no memory for the next tensor


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of one training step, by what they go into."""

    products: float
    attention: float
    bytes: float
    optimizer: float
    calls: float
    on_gpu: bool

    @property
    def forward_backward(self) -> float:
        """Without the optimizer."""
        device = self.products + self.attention + self.bytes
        return max(device, self.calls) if self.on_gpu else device + self.calls

    @property
    def total(self) -> float:
        """The whole step."""
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
    """Seconds that a step over ``count`` tokens takes at the least.

    Args:
        cost: of the model; see `model_cost`.
        traffic: of the model, in the ceilings' dtype; see `count_traffic`.
        count: tokens and pairs that are computed: `count_padded` or `count_packed`.
        parameters: how many numbers are trained.
        weights: in how many tensors.
        ceilings: of the device.
        packed: whether the loss is the patched model's, without the logits of all tokens.
    """
    operations = training_operations(cost, count)
    moved = (
        traffic.moved_once
        + traffic.moved_per_encoder_token * count.encoder_tokens
        + traffic.moved_per_decoder_token * count.decoder_tokens
    )
    if packed:
        sequences = count.sequences * _seconds_of_a_sequence(cost, ceilings)
        loss = _LOSS_PASSES * traffic.logits_per_token * count.decoder_tokens / ceilings.bytes
    else:
        sequences = 0.0
        loss = traffic.loss_moved_per_token * count.decoder_tokens
        large = traffic.logits_per_token * count.decoder_tokens > _MAPPED_ANEW
        loss /= ceilings.fresh_bytes if large else ceilings.bytes
    return StepSeconds(
        products=operations.linear / ceilings.products,
        attention=operations.attention / ceilings.attention + sequences,
        bytes=moved / ceilings.bytes + loss,
        optimizer=_ADAMW * parameters / ceilings.bytes + weights * ceilings.update,
        calls=traffic.calls * ceilings.call,
        on_gpu=ceilings.on_gpu,
    )


def _seconds_of_a_sequence(cost: ModelCost, ceilings: Ceilings) -> float:
    """Of all packed attentions, beside their operations."""
    # A pair takes two multiply-adds for each unit of width, heads * head_dim.
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
