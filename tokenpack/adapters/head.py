"""The LM head: hidden states to loss without the logits, where nothing stands between them.

The fused loss runs inside the head's own forward, because sharded parameters are whole only while
their module is being called. It leaves the loss on the call and gives the model the logits of the
first token, so that whatever the model does to logits after the head still runs, and shows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import packed_linear_cross_entropy
from .call import PackedCall
from .swap import Replacement


class AfterHead(NamedTuple):
    """What a model is known to do to its logits after the head."""

    scale: float = 1.0
    softcap: float | None = None
    bias: Tensor | None = None  # (classes,)

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.bias is None else logits + self.bias

    @property
    def changes_nothing(self) -> bool:
        return self.scale == 1.0 and self.softcap is None and self.bias is None


def after_head(model: Any) -> AfterHead:
    """Gemma's softcap, Granite's and Cohere's scales, the bias of Marian and BART."""
    config = model.config
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    bias = getattr(model, "final_logits_bias", None)
    return AfterHead(
        scale,
        getattr(config, "final_logit_softcapping", None),
        None if bias is None else bias.flatten(),
    )


@torch.compiler.disable
def fused_forward(original: Replacement, module: Any, input: Tensor) -> Tensor:
    """``nn.Linear.forward``, or with targets on the call the loss and one token's logits."""
    call: PackedCall | None = module._tokenpack_state.current()
    if call is None or call.targets is None:
        return original(module, input)
    after = call.after_head or AfterHead()
    bias: Tensor | None = module.bias
    if after.bias is not None:
        bias = after.bias if bias is None else bias + after.bias
    loss = packed_linear_cross_entropy(
        input.squeeze(0),
        module.weight,
        None if bias is None else bias.to(input.dtype),
        call.targets.labels.to(input.device),
        num_items=on_device(call.num_items, input.device),
        softcap=after.softcap,
        scale=after.scale,
        num_valid=call.targets.num_valid,
    )
    assert isinstance(loss, Tensor)
    call.loss = loss
    with torch.no_grad():
        call.head_logits = original(module, input[:, :1])
    return call.head_logits


def nothing_else_follows(after: AfterHead, raw: Tensor, final: Tensor) -> bool:
    """Whether the model's logits are the head's own but for what ``after`` says."""
    if after.changes_nothing:
        return torch.equal(raw, final)
    tolerance = 1e-2 if final.dtype in (torch.float16, torch.bfloat16) else 1e-5
    return torch.allclose(after(raw).double(), final.double(), rtol=tolerance, atol=1e-6)


def loss_from_logits(logits: Tensor, targets: Tensor, num_items: Any) -> Tensor:
    """Summed cross entropy of ``(total_tokens, classes)`` over ``num_items``, or over the targets.

    At least in float32, as transformers computes it.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.to(logits.device)
    total = nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return total / (
        (targets != -100).sum() if num_items is None else on_device(num_items, total.device)
    )


def on_device(num_items: Any, device: torch.device) -> Any:
    """``num_items_in_batch`` where the loss is, if it is a tensor."""
    return num_items.to(device) if isinstance(num_items, Tensor) else num_items
