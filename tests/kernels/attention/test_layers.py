"""Repeated launches: a compiled kernel gets the arguments that Triton would give to it."""

import weakref

import pytest
import torch

from tokenpack.kernels._triton import AVAILABLE, INTERPRETED
from tokenpack.kernels.attention import AttentionSpec, LayerKernels, layers

pytestmark = pytest.mark.skipif(
    not AVAILABLE or INTERPRETED, reason="needs Triton, and kernels that are compiled"
)
HEADS, HEAD_DIM = 4, 64
CASES = {  # kv_heads, causal, bias, dropout
    "causal": (4, True, False, 0.0),
    "grouped, with bias and dropout": (2, False, True, 0.1),
}


@pytest.fixture
def launches(monkeypatch):
    """What would be launched: the compiled kernel, the grid and the arguments of each launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    class NoGpu:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: "cuda:90")
        get_current_stream = staticmethod(lambda device=None: 0)

    taken, through_triton = [], []

    def init_handles(self):
        def launch(*args):
            *grid, stream, function, metadata = args[:6]  # then what profilers see
            assert (stream, function) == (0, self.function)
            assert metadata is self.packed_metadata
            taken.append((self.hash, tuple(grid), args[9:]))

        self._run = launch

    run = JITFunction.run

    def count(self, *args, **kwargs):
        through_triton.append(self.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(CompiledKernel, "_init_handles", init_handles)
    monkeypatch.setattr(JITFunction, "run", count)
    driver.set_active(NoGpu())
    yield taken, through_triton
    driver.set_active(None)


@pytest.fixture(autouse=True)
def no_kernels_of_other_tests(monkeypatch):
    monkeypatch.setattr(layers, "_KERNELS", {})


class Layers:
    """Layers of one kind, each with tensors of its own."""

    def __init__(self, case):
        self.kv_heads, self.causal, self.bias, self.dropout_p = CASES[case]
        self.spec = AttentionSpec(self.causal, 0.125, None, None, self.dropout_p)
        self.seed = torch.tensor([1]) if self.dropout_p else None

    def batch(self, lengths=(40, 24)):
        """The kernels of a batch."""
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return LayerKernels(ends, ends, self.spec), ends

    def run(self, batch, offset=0, backward=True):
        """Run a layer. Returns its tensors by name."""
        kernels, ends = batch
        total = int(ends[-1])

        def side(heads):
            flat = torch.zeros(heads * total * HEAD_DIM + offset, dtype=torch.bfloat16)
            return flat[offset:].view(1, heads, total, HEAD_DIM)

        table = torch.zeros(HEADS, 2 * total + 1) if self.bias else None
        sides = side(HEADS), side(self.kv_heads), side(self.kv_heads)
        saved = kernels.forward(*sides, table, self.seed)
        tensors = {**saved._asdict(), "ends": ends}
        if backward:
            dout = torch.zeros_like(saved.out)
            gradients = kernels.backward(dout, saved, needs_table=self.bias)
            tensors |= zip(("dq", "dk", "dv", "dtable"), gradients, strict=True)
            tensors["dout"] = dout
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def described(launch, tensors):
    """A launch, with tensors that a layer knows by their names and the others by their sizes."""
    names = {tensor.data_ptr(): name for name, tensor in tensors.items()}
    kernel, grid, arguments = launch

    def describe(value):
        if not isinstance(value, torch.Tensor):
            return type(value), value
        return names.get(value.data_ptr()), value.dtype, value.numel()

    return kernel, grid, [describe(value) for value in arguments]


@pytest.mark.parametrize("case", CASES)
def test_a_later_launch_is_that_of_triton(case, launches):
    """In later layers and batches: the same compiled kernel, with the same arguments."""
    taken, through_triton = launches
    of_kind = Layers(case)
    first = of_kind.batch()
    of_kind.run(first)
    assert len(through_triton) == 3
    batches = [first] + [of_kind.batch(lengths) for lengths in ((7,), (1, 16, 31), (64,) * 4)]
    for batch in batches:
        launched = []
        for kernels in ({}, layers._KERNELS):  # through Triton, and as prepared
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(layers, "_KERNELS", kernels)
                taken.clear()
                of_batch = (LayerKernels(batch[1], batch[1], of_kind.spec), batch[1])
                tensors = of_kind.run(of_batch)
            launched.append([described(launch, tensors) for launch in taken])
        assert launched[0] == launched[1]
        arguments = [each[0] for launch in launched[0] for each in launch[2]]
        assert {"query", "key", "value", "out", "lse", "dout", "dq", "dk", "dv", "ends"} <= {
            name for name in arguments if isinstance(name, str)
        }
    assert len(through_triton) == 3 + 3 * len(batches)


def test_another_alignment_goes_through_triton(launches):
    """Triton compiles another kernel for it, with narrower loads."""
    taken, through_triton = launches
    of_kind = Layers("causal")
    batch = of_kind.batch()
    for offset in (0, 1, 0, 1):
        of_kind.run(batch, offset=offset, backward=False)
    assert len(through_triton) == 3  # one aligned, two unaligned
    aligned, unaligned, *repeated = (kernel for kernel, *_ in taken)
    assert aligned != unaligned
    assert repeated == [aligned, unaligned]


def test_other_constants_have_kernels_of_their_own(launches):
    taken, through_triton = launches
    for head_dim, window in ((64, None), (32, None), (64, (3, 0)), (64, (5, 0))):
        ends = torch.tensor([0, 16], dtype=torch.int32)
        kernels = LayerKernels(ends, ends, AttentionSpec(True, 0.125, window, None, 0.0))
        side = torch.zeros(1, 2, 16, head_dim, dtype=torch.bfloat16)
        kernels.forward(side, side, side, None, None)
    assert len(through_triton) == len(taken) == 4
    assert len({kernel for kernel, *_ in taken}) == 3  # the windows' sizes are arguments


def test_a_layer_does_not_stay_in_memory(launches):
    of_kind = Layers("causal")
    batch = of_kind.batch()
    tensors = of_kind.run(batch)
    alive = [weakref.ref(tensor) for name, tensor in tensors.items() if name != "ends"]
    del tensors
    launches[0].clear()
    assert not [each for each in alive if each() is not None]
