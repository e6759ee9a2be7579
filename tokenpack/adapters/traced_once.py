"""Functions of objects whose results are constants in a graph of torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from packaging.version import Version

_P = ParamSpec("_P")
_R = TypeVar("_R")

TAKES_OBJECTS = Version(torch.__version__) >= Version("2.13.dev0")
"""Whether torch.compile can hand modules and other objects to such functions. Otherwise it cannot
trace a patched model as one graph, and calls are packed outside of graphs."""


def traced_once(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`torch.compiler.assume_constant_result` of a function of objects, such as modules.

    The function runs while torch.compile traces the call, and its result is part of the graph. The
    graph is only used for the same objects. Where torch.compile cannot do this, the function is not
    traced.
    """
    if TAKES_OBJECTS:
        return torch.compiler.assume_constant_result(function)
    return torch.compiler.disable(function)
