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


def swap_forward(module: Any, replacement: Replacement) -> None:
    """Make ``module(...)`` run ``replacement(original_forward, module, ...)``.

    ``replacement`` must be a module-level function, so that a pickle can name it.
    """
    original: Any = type(module)
    module.__class__ = _swapped_class(original, replacement)


def restore_forward(module: Any) -> None:
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


@functools.cache
def _swapped_class(original: Any, replacement: Replacement) -> Any:
    original_forward = original.forward

    @functools.wraps(original_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(original_forward, self, *args, **kwargs)

    # torch.compile keeps what it compiled by code object, up to a limit: one for each class.
    forward.__code__ = forward.__code__.replace()  # type: ignore[attr-defined]

    def __reduce_ex__(self: Any, protocol: int) -> tuple:
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


def _rebuild(original: Any, replacement: Replacement) -> Any:
    swapped = _swapped_class(original, replacement)
    return swapped.__new__(swapped)
