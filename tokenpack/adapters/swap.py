"""Replace the forward of one module by changing the class of that instance.

The new class is a subclass with the same name and module, and overrides only ``forward``. In
contrast to setting ``module.forward``, `copy.deepcopy` and `DataParallel` replicas work, and
transformers still reads the original signature. pickle finds classes by name, and cannot find a
dynamic class, so pickling stores the original class and the replacement to rebuild it from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

# replacement(original, module, *args, **kwargs), where original is the class's own forward.
Replacement = Callable[..., Any]


def swap_forward(module: Any, replacement: Replacement) -> None:
    """Make ``module(...)`` run ``replacement(original_forward, module, ...)``.

    ``replacement`` must be a module-level function, because pickle stores it by name.
    """
    original: Any = type(module)
    module.__class__ = _swapped_class(original, replacement)


def restore_forwards(modules: Iterable[Any]) -> None:
    """Undo `swap_forward` on all of the modules that were swapped, or on none.

    Raises:
        ValueError: if a class has been changed again since then, as ``fully_shard`` does.
    """
    swapped = [module for module in modules if is_swapped(module)]
    for module in swapped:
        if "_tokenpack_swap" not in vars(type(module)):
            raise ValueError(
                f"{type(module).__name__} changed its class after patch_model (fully_shard does "
                "this): call unpatch_model before that"
            )
    for module in swapped:
        module.__class__ = type(module)._tokenpack_swap[0]


def is_swapped(module: nn.Module, replacement: Replacement | None = None) -> bool:
    """Whether ``module`` runs ``replacement``, or any replacement if it is None."""
    swap = getattr(type(module), "_tokenpack_swap", None)
    return swap is not None and replacement in (None, swap[1])


@functools.cache
def _swapped_class(original: Any, replacement: Replacement) -> Any:
    original_forward = original.forward

    @functools.wraps(original_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # After `restore_forwards`, accelerate may still have this function as the module's forward.
        if type(self) is original:
            return original_forward(self, *args, **kwargs)
        return replacement(original_forward, self, *args, **kwargs)

    @functools.wraps(original.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        # A new module made by ``type(module)(config)`` has not been patched.
        self.__class__ = original
        self.__init__(*args, **kwargs)

    # torch.compile caches by code object and limits entries, so each class gets its own.
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
            "__init__": __init__,
            "forward": forward,
            "__reduce_ex__": __reduce_ex__,
            "_tokenpack_swap": (original, replacement),
        },
    )


def _rebuild(original: Any, replacement: Replacement) -> Any:
    swapped = _swapped_class(original, replacement)
    return swapped.__new__(swapped)
