"""Launches, waits for the device and bytes moved, counted while Triton's interpreter runs kernels.

PyTorch's own ops count as one launch each, which is the least that they take on a GPU, and as the
bytes of what they read and write; gathers and scatters read or write only the rows they touch.
Kernels count as one launch, and as the bytes of each load and store that their masks let through.
"""

import contextlib
import math
from typing import NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tokenpack.kernels import layout_ops, padding

ops = torch.ops.tokenpack
aten = torch.ops.aten

# An op hides its calls from a dispatch mode, so the mode runs the op itself.
LAUNCHERS = {
    ops.mask_layout: layout_ops.mask_layout_triton,
    ops.boundary_layout: layout_ops.boundary_layout_triton,
    ops.position_layout: layout_ops.position_layout_triton,
    ops.unpad: padding.unpad_triton,
    ops.repad: padding.repad_triton,
}
ALLOCATIONS = {aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided, aten.set_}
WAITS = {aten._local_scalar_dense, aten.nonzero}
ROWS_READ = {aten.index, aten.gather, aten.index_select}
ROWS_WRITTEN = {aten.index_put_, aten.scatter_, aten.index_copy_}


class Cost(NamedTuple):
    launches: int
    waits: int
    bytes: int


class Counter(TorchDispatchMode):
    """Counts the launches, waits and bytes of the calls inside."""

    def __init__(self):
        super().__init__()
        self.launches = self.waits = self.bytes = 0
        self.in_kernel = False

    @property
    def cost(self):
        return Cost(self.launches, self.waits, self.bytes)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        op = function.overloadpacket
        if op in LAUNCHERS:
            with self:
                return LAUNCHERS[op](*args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        if not self.in_kernel and op not in ALLOCATIONS and not is_view(function):
            self.waits += op in WAITS
            self.launches += op is not aten._local_scalar_dense  # a copy to the host
            self.bytes += moved(op, tensors(args, kwargs), tensors(result))
        return result

    @contextlib.contextmanager
    def kernel(self):
        self.launches += 1
        self.in_kernel = True
        try:
            yield
        finally:
            self.in_kernel = False


def is_view(function):
    """Whether the results share memory with arguments that are not changed."""
    return any(
        result.alias_info is not None and not result.alias_info.is_write
        for result in function._schema.returns
    )


def moved(op, read, written):
    if op in ROWS_READ:
        return 2 * sum(map(size, written)) + sum(map(size, read[1:]))
    if op in ROWS_WRITTEN:
        return 2 * size(read[-1]) + sum(map(size, read[1:-1]))
    return sum(map(size, read)) + sum(map(size, written))


def tensors(*tree):
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def size(tensor):
    """Bytes in memory. An expanded dimension counts once."""
    there = [n for n, stride in zip(tensor.shape, tensor.stride()) if stride]
    return math.prod(there) * tensor.element_size()


@contextlib.contextmanager
def counted():
    """Count the calls inside, in the interpreter. Yields a `Counter`."""
    from triton.runtime import interpreter

    counter = Counter()
    builder = interpreter.InterpreterBuilder
    run, to_list = interpreter.GridExecutor.__call__, torch.Tensor.tolist
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_run(*args, **kwargs):
        with counter.kernel():
            return run(*args, **kwargs)

    def counted_to_list(tensor):
        counter.waits += 1
        counter.bytes += size(tensor)
        return to_list(tensor)

    def counted_load(self, pointers, mask, other, *rest):
        loaded = load(self, pointers, mask, other, *rest)
        counter.bytes += int(mask.data.sum()) * loaded.data.itemsize
        return loaded

    def counted_store(self, pointers, value, mask, *rest):
        counter.bytes += int(mask.data.sum()) * value.data.itemsize
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(interpreter.GridExecutor, "__call__", counted_run),
        mock.patch.object(torch.Tensor, "tolist", counted_to_list),
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
        counter,
    ):
        yield counter
