"""Launches of Triton kernels that differ in few arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

Tensors = Tensor | tuple[Tensor, ...]


class PreparedKernel:
    """A kernel whose launches differ only in tensors, in sizes of the batch, and in the grid.

    For each launch, Triton binds all arguments by name and specializes the kernel on them, which
    takes longer than the launch itself. So the first launch goes through Triton, and the next ones
    call the compiled kernel that it returned. It fits them all: the kernel does not specialize on
    sizes, and constants are the same. It relies on the alignment of addresses and on sizes of 32
    bits. Other launches go through Triton, as all launches do that Triton interprets.

    The tensors must have the same types and be on the same device in all launches.

    Args:
        kernel: its parameters are tensors, then sizes, then constants.
        tensors: the names of the tensors.
        sizes: the names of the sizes.
        constants: all other arguments, and options of the compiler.
    """

    def __init__(
        self, kernel: Any, tensors: tuple[str, ...], sizes: tuple[str, ...], constants: dict
    ) -> None:
        order, changing = tuple(kernel.arg_names), len(tensors) + len(sizes)
        assert order[:changing] == (*tensors, *sizes), f"parameters of the kernel: {order}"
        self._kernel = kernel
        self._constants = tuple(constants[name] for name in order[changing:])
        self._options = {name: constants[name] for name in constants.keys() - set(order)}
        self._compiled: Any = None

    def __call__(
        self, grid: tuple[int, int], tensors: tuple[Tensors, ...], sizes: tuple[int, ...] = ()
    ) -> None:
        """Launch the kernel. A grid with a 0 launches nothing."""
        if 0 in grid:
            return
        addresses = 0
        for tensor in tensors:
            if isinstance(tensor, tuple):
                for each in tensor:
                    addresses |= each.data_ptr()
            else:
                addresses |= tensor.data_ptr()
        fits = addresses % 16 == 0 and max(sizes, default=0) < 2**31
        if fits and self._compiled is not None:
            self._compiled[(*grid, 1)](*tensors, *sizes, *self._constants)
            return
        kernel = self._kernel[grid](*tensors, *sizes, *self._constants, **self._options)
        if fits:
            self._compiled = kernel
