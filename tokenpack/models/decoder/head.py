"""The LM head of the decoder, and its loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...checks import IGNORE_INDEX
from ...kernels import packed_cross_entropy, packed_linear_cross_entropy
from .inputs import Targets


class DecoderHead(nn.Linear):
    """The LM head. Given targets, it computes the loss without materializing the logits.

    The loss is computed here, because FSDP gathers a weight only while its module runs.
    """

    def forward(
        self, input: Tensor, targets: Targets | None = None, num_items: Any = None
    ) -> Tensor:
        if targets is None:
            return super().forward(input)
        if type(self.weight) not in (Tensor, nn.Parameter):  # quantized, or sharded (DTensor)
            return loss_of_logits(super().forward(input), targets, num_items)
        loss = packed_linear_cross_entropy(
            input.squeeze(0),
            self.weight,
            self.bias,
            targets.labels,
            num_items=on_device(num_items, input),
            num_valid=targets.num_valid,
        )
        assert isinstance(loss, Tensor)
        return loss


def loss_of_logits(logits: Tensor, targets: Targets, num_items: Any) -> Tensor:
    """The mean cross entropy of ``(1, total_tokens, vocab_size)`` logits."""
    loss = packed_cross_entropy(
        logits.squeeze(0), targets.labels, num_items=on_device(num_items, logits)
    )
    assert isinstance(loss, Tensor)
    return loss


def share_of_step(targets: Any, num_items: Any, like: Tensor) -> Any:
    """The share of a step's targets that are in this batch."""
    if num_items is None:
        return 1.0
    return (targets.labels != IGNORE_INDEX).sum() / on_device(num_items, like)


def on_device(num_items: Any, like: Tensor) -> Any:
    """``num_items_in_batch`` on the device of a tensor."""
    return num_items.to(like.device) if isinstance(num_items, Tensor) else num_items
