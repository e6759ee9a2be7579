"""Communication between ranks in a step: numbers, buffers, gradients.

By default, gradients are reduced once per step, after all ranks report success. Otherwise, under
DDP, a rank that ran out of memory would leave the other ranks waiting for its part of a bucket
forever. DDP itself runs the reduction, with its hooks and buckets, in a backward that adds zeros to
every parameter (`Accelerator.trigger_sync_in_backward`). The reduction runs in the last backward,
as usual, if steps are not retried or the model's forward communicates (FSDP, DeepSpeed).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn


class Ranks:
    """The communication of a rank with the others.

    Args:
        accelerator: accelerate's state of this process.
        retries: repeat steps that run out of memory, if the model allows it.
    """

    def __init__(self, accelerator: Accelerator, retries: bool) -> None:
        self._accelerator, self._retries = accelerator, retries

    def gather(self, numbers: list[int]) -> list[list[int]]:
        """The ``numbers`` of all ranks, by rank."""
        if self._accelerator.num_processes == 1:
            return [numbers]
        mine = torch.tensor([numbers], device=self._accelerator.device)
        return self._accelerator.gather(mine).tolist()

    def forward_communicates(self, model: nn.Module) -> bool:
        """Whether each forward waits for other ranks, so that all ranks need equally many."""
        if self._accelerator.distributed_type == DistributedType.DEEPSPEED:
            return True
        return self._accelerator.num_processes > 1 and _ddp(model) is None

    def may_retry(self, model: nn.Module) -> bool:
        """Whether a step can be repeated after it failed on some rank."""
        return self._retries and not self.forward_communicates(model)

    def step_communicates(self, model: nn.Module) -> bool:
        """Whether ranks wait for each other in a forward or backward of the step."""
        reduces_in_backward = _ddp(model) is not None and not self._retries
        return reduces_in_backward or self.forward_communicates(model)

    # ------------------------------------------------------------------------------------- buffers

    def send_buffers(self, model: nn.Module, *, from_first: bool) -> None:
        """Send the buffers of the first rank to the others now, or not at all in this step.

        By default, DDP sends them in the next forward. A rank that runs out of memory before that
        forward would leave the other ranks waiting.
        """
        ddp = _ddp(model)
        if ddp is not None:
            if from_first:
                ddp._sync_buffers()
            ddp.require_forward_param_sync = False

    # ----------------------------------------------------------------------------------- gradients

    @contextlib.contextmanager
    def backward_context(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """Context of a forward and backward: reduce gradients in the last, or in `reduce`."""
        reduces = last and (_ddp(model) is None or self.step_communicates(model))
        gradient_state = self._accelerator.gradient_state
        gradient_state._set_sync_gradients(reduces)  # DeepSpeed's optimizer step depends on this
        try:
            with contextlib.nullcontext() if reduces else self.no_sync(model):
                yield
        finally:
            gradient_state._set_sync_gradients(True)

    def no_sync(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Context of a backward that does not reduce gradients."""
        # With one rank, accelerate's no_sync has no effect, but DDP still reduces.
        ddp = _ddp(model)
        return self._accelerator.no_sync(model) if ddp is None else ddp.no_sync()

    def reduce(self, model: nn.Module, unused: bool) -> None:
        """Average the gradients over ranks, unless the last backward has done it.

        Args:
            model: the model as prepared by accelerate.
            unused: some rank has parameters without a gradient.
        """
        ddp = _ddp(model)
        if ddp is None or self.step_communicates(model):
            return
        parameters = [p for p in ddp.parameters() if p.requires_grad]
        used = torch.ones(len(parameters), dtype=torch.int32, device=self._accelerator.device)
        if unused:
            for at, parameter in enumerate(parameters):
                used[at] = int(parameter.grad is not None)
            dist.all_reduce(used, dist.ReduceOp.MAX, group=ddp.process_group)
        with self._accelerator.trigger_sync_in_backward(ddp):
            torch.autograd.backward(parameters, [p.new_zeros(()).expand_as(p) for p in parameters])
        # DDP reorders its buckets once, with a collective call in its next forward. A rank may have
        # no next forward, or may not reach it, so this calls it now.
        ddp.reducer._rebuild_buckets()
        if unused:
            # A parameter that no rank used gets no gradient, and therefore no weight decay.
            for parameter, is_used in zip(parameters, used.tolist()):
                parameter.grad = parameter.grad if is_used else None

    def ensure_gradient(self, model: nn.Module) -> None:
        """Add a gradient of zeros if no parameter has a gradient, because fp16's scaler needs one.

        Only the smallest parameter gets it, since an optimizer does not change a parameter without
        a gradient, not even by weight decay.
        """
        scaler = self._accelerator.scaler
        trained = [p for p in model.parameters() if p.requires_grad]
        if scaler is None or not trained or any(p.grad is not None for p in trained):
            return
        smallest = min(trained, key=lambda p: p.numel())
        scaler.scale(smallest.new_zeros((), dtype=torch.float32))  # initializes a new scaler
        smallest.grad = torch.zeros_like(smallest)


def _ddp(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """The DDP wrapper, if there is one. ``torch.compile`` may have wrapped it again."""
    model = getattr(model, "_orig_mod", model)
    return model if isinstance(model, nn.parallel.DistributedDataParallel) else None
