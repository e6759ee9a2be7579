"""A mode of Triton's interpreter that finds races between programs and accesses outside of tensors.

The interpreter runs the programs of a launch one after the other, in the order of their numbers. On
a GPU, they run at the same time, in any order. In this mode, they run in another order, and three
faults of a launch raise an error: two programs write one address, a program reads what another one
writes, or an address is not in a tensor that the launch was given.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch


class RaceError(AssertionError):
    """Two programs of a launch use one address, and at least one of them writes it."""


class BoundsError(AssertionError):
    """A program reads or writes outside of the tensors that its launch was given."""


class _Launch:
    """The accesses of one launch."""

    def __init__(self, name: str, order: str) -> None:
        self.name, self.order = name, order
        self.grid, self.numbers, self.program = (1, 1, 1), np.zeros(1, int), 0
        self.bounds: list[tuple[int, int]] = []  # of each tensor, in bytes
        self.reads: list[tuple[int, np.ndarray]] = []  # program, and addresses of bytes
        self.writes: list[tuple[int, np.ndarray]] = []

    def set_grid(self, *grid: int) -> None:
        self.grid, self.numbers = grid, np.arange(np.prod(grid))
        if self.order == "reversed":
            self.numbers = self.numbers[::-1]
        else:
            np.random.default_rng(0).shuffle(self.numbers)

    def take_turn(self, *index: int) -> list[int]:
        """The program that runs in place of the one with this index."""
        self.program = int(self.numbers[np.ravel_multi_index(index, self.grid)])
        return [int(one) for one in np.unravel_index(self.program, self.grid)]

    def add_tensor(self, tensor: torch.Tensor) -> None:
        if tensor.numel():
            last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
            begin = tensor.data_ptr()
            self.bounds.append((begin, begin + (last + 1) * tensor.itemsize))

    def access(self, log: list[tuple[int, np.ndarray]], pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        first = np.unique(np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)])
        inside = np.zeros(len(first), bool)
        for begin, end in self.bounds:
            inside |= (first >= begin) & (first + size <= end)
        if not inside.all():
            raise BoundsError(f"{self.name}: program {self.program} accesses {first[~inside][:3]}")
        log.append((self.program, (first[:, None] + np.arange(size, dtype=np.uint64)).ravel()))

    def check(self) -> None:
        """Raise RaceError if programs do not keep to their own addresses."""
        address, writer = _by_address(self.writes)
        same = address[1:] == address[:-1]
        if (same & (writer[1:] != writer[:-1])).any():
            raise RaceError(f"{self.name}: two programs write one address")
        read, reader = _by_address(self.reads)
        if len(address):
            at = np.minimum(np.searchsorted(address, read), len(address) - 1)
            if ((address[at] == read) & (writer[at] != reader)).any():
                raise RaceError(f"{self.name}: a program reads what another one writes")


def _by_address(log: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """All addresses in order, and the program of each."""
    if not log:
        return np.zeros(0, np.uint64), np.zeros(0, int)
    addresses = np.concatenate([each for _, each in log])
    programs = np.concatenate([np.full(len(each), program) for program, each in log])
    order = np.lexsort((programs, addresses))
    return addresses[order], programs[order]


@contextlib.contextmanager
def programs_in_order(order: str) -> Iterator[set[str]]:
    """Run programs ``"reversed"`` or ``"shuffled"``. Yields the names of the launched kernels."""
    from triton.runtime import interpreter

    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    launched, running = set(), []
    original = {
        name: getattr(builder, name)
        for name in ("set_grid_dim", "set_grid_idx", "create_masked_load", "create_masked_store")
    }
    call, convert = executor.__call__, executor._init_args_hst

    def launch(self, *args, **kwargs):
        running.append(_Launch(self.fn.__name__, order))
        launched.add(self.fn.__name__)
        try:
            call(self, *args, **kwargs)
        except interpreter.InterpreterError as error:
            raise error.__cause__ or error from None
        running.pop().check()

    def convert_arguments(self, args, kwargs):
        converted = convert(self, args, kwargs)
        for argument in torch.utils._pytree.tree_leaves(converted):
            if isinstance(argument, torch.Tensor):
                running[-1].add_tensor(argument)
        return converted

    def set_grid_dim(*grid):
        running[-1].set_grid(*grid)
        original["set_grid_dim"](*grid)

    def load(pointers, mask, *rest):
        running[-1].access(running[-1].reads, pointers, mask)
        return original["create_masked_load"](pointers, mask, *rest)

    def store(pointers, value, mask, *rest):
        running[-1].access(running[-1].writes, pointers, mask)
        return original["create_masked_store"](pointers, value, mask, *rest)

    def no_atomics(*_):
        raise RaceError("atomics give other bits in every run")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "__call__", launch)
        patch.setattr(executor, "_init_args_hst", convert_arguments)
        patch.setattr(builder, "set_grid_dim", set_grid_dim)
        patch.setattr(
            builder,
            "set_grid_idx",
            lambda *index: original["set_grid_idx"](*running[-1].take_turn(*index)),
        )
        patch.setattr(builder, "create_masked_load", load)
        patch.setattr(builder, "create_masked_store", store)
        patch.setattr(builder, "create_atomic_rmw", no_atomics)
        patch.setattr(builder, "create_atomic_cas", no_atomics)
        yield launched
