"""The LM head: from hidden states to the loss without materializing logits.

The fused loss runs in the head's own forward, because FSDP gathers sharded parameters only while
their module runs. The head stores the loss on the call. In the first call, it returns the logits of
the first token: the model still runs what it does to logits after the head, and `logits_match`
compares. In later calls, it returns zeros, which nothing reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..checks import IGNORE_INDEX
from ..kernels.linear_loss import mean_of_counted
from .call import AfterHead, PackedCall, Targets, active_call
from .swap import Replacement, swap_forward

LOGITS_OF = ("dec", "self", "enc")
"""The candidate sides of the logits. The first one in a call's layouts is their side."""


def after_head(model: Any) -> AfterHead:
    """Gemma's softcap, Granite's and Cohere's scales, and the bias of Marian and BART."""
    config = model.config
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    bias = getattr(model, "final_logits_bias", None)
    return AfterHead(
        scale,
        getattr(config, "final_logit_softcapping", None),
        None if bias is None else bias.flatten(),
    )


def swap_head(head: Any) -> None:
    """Let a head compute the fused loss, if it is exactly nn.Linear.

    Adapters and quantizers of a head subclass or wrap it.
    """
    if type(head) is nn.Linear:
        swap_forward(head, fused_forward)


def fused_forward(original: Replacement, module: Any, input: Tensor) -> Tensor:
    """``nn.Linear.forward``; with targets on the active call, the loss and one token's logits."""
    call = active_call()
    if call is None or call.targets is None:
        return original(module, input)
    run = _with_loss if call.traced else _with_loss_outside_graph
    return run(call, call.targets, original, module, input)


def _with_loss(
    call: PackedCall, targets: Targets, original: Replacement, module: Any, input: Tensor
) -> Tensor:
    if type(module.weight) not in (Tensor, nn.Parameter):  # quantized, or sharded (DTensor)
        call.unfused = f"the weight of the head is a {type(module.weight).__name__}"
        return original(module, input)
    after = call.after_head or AfterHead()
    bias: Tensor | None = module.bias
    if after.bias is not None:
        bias = after.bias if bias is None else bias + after.bias
    call.loss = mean_of_counted(
        call.without_dead(input, LOGITS_OF).squeeze(0),
        module.weight,
        None if bias is None else bias.to(input.dtype),
        targets.labels.to(input.device),
        targets.num_valid,
        num_items=on_device(call.num_items, input.device),
        softcap=after.softcap,
        scale=after.scale,
    )
    if call.state.head_is_plain and not call.traced:  # the check has been done
        return input.new_zeros((1, 1, module.weight.shape[0]))
    with torch.no_grad():
        call.head_logits = original(module, input[:, :1])
    return call.head_logits


_with_loss_outside_graph = torch.compiler.disable(_with_loss)


def loss_from_logits(logits: Tensor, targets: Tensor, num_items: Any) -> Tensor:
    """Sum of the cross entropy, divided by ``num_items`` or by the number of targets.

    Computed in float32 or better, as in transformers.

    Args:
        logits: ``(total_tokens, classes)``.
        targets: ``(total_tokens,)``, -100 where a token has no target.
        num_items: ``num_items_in_batch``, or None.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.to(logits.device)
    total = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (
        (targets != IGNORE_INDEX).sum() if num_items is None else on_device(num_items, total.device)
    )


def on_device(num_items: Any, device: torch.device) -> Any:
    """``num_items_in_batch`` on the device of the loss, if it is a tensor."""
    return num_items.to(device) if isinstance(num_items, Tensor) else num_items
