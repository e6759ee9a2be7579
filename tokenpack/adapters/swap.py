"""Change what one module does by giving that instance another class.

The new class subclasses the old, keeps its name and module, and overrides ``forward`` alone.
Compared with setting ``module.forward``: `copy.deepcopy` and `DataParallel` replicas keep working,
and transformers still reads the original signature. Pickling names classes by where they are
defined, where a dynamic one is not to be found, so it rebuilds the class from its two parts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

# forward(original, module, *args, **kwargs), where original(module, *args, **kwargs) is the old one
Replacement = Callable[..., Any]


def swap_forward(module: nn.Module, replacement: Replacement) -> None:
    """Make ``module(...)`` run ``replacement(original_forward, module, ...)``.

    ``replacement`` must be a module-level function, so that a pickle can name it.
    """
    module.__class__ = _swapped_class(type(module), replacement)


def restore_forward(module: nn.Module) -> None:
    """Undo `swap_forward`.

    Raises:
        ValueError: if the class was changed once more since, as ``fully_shard`` does.
    """
    if "_tokenpack_swap" not in vars(type(module)):
        raise ValueError(
            f"{type(module).__name__} was given another class after patch_model "
            "(fully_shard does that): unpatch the model before"
        )
    module.__class__ = type(module)._tokenpack_swap[0]


def is_swapped(module: nn.Module, replacement: Replacement | None = None) -> bool:
    """Whether ``module`` runs a replacement (this one, if one is named)."""
    swap = getattr(type(module), "_tokenpack_swap", None)
    return swap is not None and replacement in (None, swap[1])


@functools.lru_cache(maxsize=None)
def _swapped_class(original: type[nn.Module], replacement: Replacement) -> type[nn.Module]:
    original_forward = original.forward

    @functools.wraps(original_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return replacement(original_forward, self, *args, **kwargs)

    # torch.compile keeps what it compiled by code object, up to a limit: one for each class.
    forward.__code__ = forward.__code__.replace()

    def __reduce_ex__(self: nn.Module, protocol: int) -> tuple:
        return _rebuild, (original, replacement), self.__getstate__()

    return type(
        original.__name__,
        (original,),
        {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "forward": forward,
            "__reduce_ex__": __reduce_ex__,
            "_tokenpack_swap": (original, replacement),
        },
    )


def _rebuild(original: type[nn.Module], replacement: Replacement) -> nn.Module:
    swapped = _swapped_class(original, replacement)
    return swapped.__new__(swapped)
