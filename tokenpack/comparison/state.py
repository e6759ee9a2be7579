"""Everything of a model, and of the process, that a comparison changes and then restores.

Both runs begin in the same state: the same random numbers, the same buffers, no dropout. Dropout
has to be off because the padded and the packed forward have different numbers of values to draw
for, so that with the same seed they drop different ones.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

_RANDOM = (
    "drop",
    "jitter_noise",
)  # in the names of rates: attention_dropout, embd_pdrop, layerdrop


@contextmanager
def kept_state(model: nn.Module) -> Iterator[Kept]:
    """Turn randomness of a model off, and restore all that the runs inside change.

    Gradients need no care, because the runs read them with ``torch.autograd.grad``, which leaves
    ``parameter.grad`` and the hooks of DDP and of optimizers alone.
    """
    kept = Kept(model)
    undo = _without_dropout(model) + _without_reentrance(model)
    kept.num_silenced = sum(isinstance(owner, nn.Module) for owner, *_ in undo)
    try:
        yield kept
    finally:
        for owner, name, value in undo:
            _set(owner, name, value)
        kept.restore()


class Kept:
    """The random state, the buffers and the classes of a model when it was made."""

    def __init__(self, model: nn.Module) -> None:
        self.num_silenced = 0  # modules whose dropout was above 0
        self._modules: list[Any] = list(model.modules())
        self._classes = [type(module) for module in self._modules]
        self._buffers = [dict(module._buffers) for module in self._modules]
        self._values = {
            id(buffer): (buffer, buffer.detach().clone())
            for buffers in self._buffers
            for buffer in buffers.values()
            if buffer is not None
        }
        self._random = _random_state()

    def rewind(self) -> None:
        """Put random state and buffers back, so that the next run begins like the last one."""
        for module, buffers in zip(self._modules, self._buffers):
            module._buffers.clear()
            module._buffers.update(buffers)
        for buffer, value in self._values.values():
            if not torch.equal(buffer, value):
                buffer.data.copy_(value)
        _set_random_state(self._random)

    def drew(self) -> bool:
        """Whether random numbers have been drawn since `rewind`."""
        cpu, cuda, *_ = self._random
        now = torch.cuda.get_rng_state_all() if cuda is not None else []
        pairs = zip([cpu, *(cuda or [])], [torch.get_rng_state(), *now])
        return not all(torch.equal(before, after) for before, after in pairs)

    def restore(self) -> None:
        """`rewind`, and give modules their classes back: a patched call may swap a new head."""
        self.rewind()
        for module, kind in zip(self._modules, self._classes):
            if type(module) is not kind:
                module.__class__ = kind


def refuse_sharded(model: nn.Module) -> None:
    """Raise ValueError if parameters are sharded or replicated by something that must run too.

    A forward of such a model takes part in collective calls, and would wait for the other ranks.
    """
    sharded: tuple[type, ...] = ()
    if torch.distributed.is_available():  # not in every build
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
        from torch.distributed.tensor import DTensor

        sharded = (FSDPModule, FullyShardedDataParallel, DTensor)
    for name, module in model.named_modules():
        if isinstance(module, sharded):
            raise ValueError(_refusal("FSDP", name))
        if getattr(module, "_is_replica", False):
            raise ValueError(_refusal("DataParallel", name))
    for name, parameter in model.named_parameters():
        if isinstance(parameter, sharded) or getattr(parameter, "_fsdp_flattened", False):
            raise ValueError(_refusal("FSDP", name))
        if hasattr(parameter, "ds_id"):
            raise ValueError(_refusal("DeepSpeed ZeRO-3", name))


def _refusal(by: str, name: str) -> str:
    return (
        f"model must not be split by {by} to be checked, got {name or 'a model'} that is: call "
        "check_patch before that, on one process"
    )


# --------------------------------------------------------------------------------- random numbers


def _random_state() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state()


def _set_random_state(state: tuple[Any, ...]) -> None:
    cpu, cuda, python, numpy = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(python)
    np.random.set_state(numpy)


_Undo = list[tuple[Any, str, Any]]


def _without_dropout(model: nn.Module) -> _Undo:
    """Set every rate of dropout and similar noise to 0: of modules, their floats, and configs."""
    undo: _Undo = []
    configs: dict[int, Any] = {}
    for module in model.modules():
        _zero(module, _rates(module) + ["p"] * isinstance(module, _DropoutNd), undo)
        config = getattr(module, "config", None)
        if hasattr(config, "__dict__"):
            configs[id(config)] = config
    for config in configs.values():
        _zero(config, _rates(config), undo)
    return undo


def _rates(owner: Any) -> list[str]:
    return [name for name in vars(owner) if any(word in name for word in _RANDOM)]


def _zero(owner: Any, names: list[str], undo: _Undo) -> None:
    for name in names:
        value = vars(owner)[name]
        if isinstance(value, float) and value > 0:
            undo.append((owner, name, value))
            _set(owner, name, 0.0)


def _without_reentrance(model: nn.Module) -> _Undo:
    """Let gradient checkpointing run without reentrance, which ``torch.autograd.grad`` refuses."""
    undo: _Undo = []
    for module in model.modules():
        run: Any = vars(module).get("_gradient_checkpointing_func")
        if isinstance(run, functools.partial) and run.keywords.get("use_reentrant") is not False:
            undo.append((module, "_gradient_checkpointing_func", run))
            again: Callable[..., Any] = functools.partial(
                run.func, *run.args, **{**run.keywords, "use_reentrant": False}
            )
            _set(module, "_gradient_checkpointing_func", again)
    return undo


def _set(owner: Any, name: str, value: Any) -> None:
    owner.__dict__[name] = value


# --------------------------------------------------------------------------------------- rounding


def rounding_of(model: nn.Module, device: torch.device) -> torch.dtype:
    """The coarsest dtype in which the model computes: of its parameters, of autocast, or TF32."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()} or {torch.float32}
    if torch.is_autocast_enabled(device.type):
        kinds.add(torch.get_autocast_dtype(device.type))
    if device.type == "cuda" and torch.float32 in kinds and torch.backends.cuda.matmul.allow_tf32:
        kinds.add(torch.float16)  # TF32 has as many bits
    return max(kinds, key=lambda kind: torch.finfo(kind).eps)


def device_of(model: nn.Module, batch: dict[str, Any]) -> torch.device:
    """The device of a model, or of the batch if the parameters are elsewhere (offloaded)."""
    tensors = [*model.parameters(), *(v for v in batch.values() if isinstance(v, Tensor))]
    devices = [tensor.device for tensor in tensors if not tensor.is_meta]
    return devices[0] if devices else torch.device("cpu")
