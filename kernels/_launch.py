"""Launches of Triton kernels that differ in few arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._triton import triton

Tensors = Tensor | tuple[Tensor, ...]

ALIGNMENT = 16
"""Triton compiles a kernel for addresses that are multiples of 16 bytes, or for any address."""


def are_aligned(tensors: tuple[Tensors, ...]) -> bool:
    """Whether the addresses of all tensors are multiples of `ALIGNMENT` bytes."""
    addresses = 0
    for tensor in tensors:
        if isinstance(tensor, tuple):
            for each in tensor:
                addresses |= each.data_ptr()
        else:
            addresses |= tensor.data_ptr()
    return addresses % ALIGNMENT == 0


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
        self.kernel = kernel
        self.constants = tuple(constants[name] for name in order[changing:])
        self.options = {name: constants[name] for name in constants.keys() - set(order)}
        self.compiled: Any = None  # after the first launch

    def __call__(
        self, grid: tuple[int, int], tensors: tuple[Tensors, ...], sizes: tuple[int, ...] = ()
    ) -> None:
        """Launch the kernel. A grid with a 0 launches nothing."""
        BatchLaunch(self, grid, sizes)(tensors, are_aligned(tensors))


class BatchLaunch:
    """The launches of a `PreparedKernel` in one batch, where grid and sizes are the same.

    Args:
        prepared: the kernel.
        grid: its grid. One with a 0 launches nothing.
        sizes: the values of its sizes.
    """

    __slots__ = ("_compiled", "_fits", "_grid", "_prepared", "_rest")

    def __init__(
        self, prepared: PreparedKernel, grid: tuple[int, int], sizes: tuple[int, ...]
    ) -> None:
        self._prepared, self._grid = prepared, grid
        self._rest = (*sizes, *prepared.constants)
        self._fits = max(sizes, default=0) < 2**31 and 0 not in grid
        self._compiled = prepared.compiled if self._fits else None

    def __call__(self, tensors: tuple[Tensors, ...], aligned: bool) -> None:
        """Launch the kernel.

        Args:
            tensors: the values of its tensors.
            aligned: `are_aligned` of the tensors. New tensors are, so it need not be asked of them;
                a view may begin anywhere.
        """
        compiled = self._compiled
        if compiled is None or not aligned:
            self._launch_through_triton(tensors, aligned)
            return
        hooks, (x, y), driver = triton.knobs.runtime, self._grid, triton.runtime.driver.active
        if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:  # a profiler watches
            compiled[x, y, 1](*tensors, *self._rest)
            return
        # What the line above does, without what hooks would be told.
        stream = driver.get_current_stream(driver.get_current_device())
        nothing = (None, None, None)
        of_kernel = (compiled.function, compiled.packed_metadata, *nothing)
        compiled.run(x, y, 1, stream, *of_kernel, *tensors, *self._rest)

    def _launch_through_triton(self, tensors: tuple[Tensors, ...], aligned: bool) -> None:
        if 0 in self._grid:
            return
        prepared = self._prepared
        compiled = prepared.kernel[self._grid](*tensors, *self._rest, **prepared.options)
        if aligned and self._fits:
            prepared.compiled = self._compiled = compiled  # None if Triton interprets
