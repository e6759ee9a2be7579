"""Repeated launches: a compiled kernel gets the arguments that Triton would give to it."""

import weakref

import pytest
import torch

from tokenpack.kernels._triton import AVAILABLE, INTERPRETED
from tokenpack.kernels.attention import AttentionSpec, LayerKernels

pytestmark = pytest.mark.skipif(
    not AVAILABLE or INTERPRETED, reason="needs Triton, and kernels that are compiled"
)
HEADS, HEAD_DIM = 4, 64
CU_SEQLENS = torch.tensor([0, 40, 64], dtype=torch.int32)
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


def layers_of(case):
    """A function that runs a layer with other tensors at each call, and its kernels."""
    kv_heads, causal, bias, dropout_p = CASES[case]
    spec = AttentionSpec(causal, 0.125, None, None, dropout_p)
    kernels = LayerKernels(CU_SEQLENS, CU_SEQLENS, spec)
    table = torch.zeros(HEADS, 257) if bias else None
    seed = torch.tensor([1]) if dropout_p else None

    def run(kernels=kernels, offset=0, backward=True):
        def side(heads):
            flat = torch.zeros(heads * 64 * HEAD_DIM + offset, dtype=torch.bfloat16)
            return flat[offset:].view(1, heads, 64, HEAD_DIM)

        saved = kernels.forward(side(HEADS), side(kv_heads), side(kv_heads), table, seed)
        if not backward:
            return None
        dout = torch.zeros_like(saved.out)
        gradients = kernels.backward(dout, saved, needs_table=bias)
        return saved, dout, gradients

    return run, lambda: LayerKernels(CU_SEQLENS, CU_SEQLENS, spec)


def described(arguments, tensors):
    """The arguments, with tensors that a layer knows by their names and the others by shape."""
    names = {tensor.data_ptr(): name for name, tensor in tensors.items()}

    def describe(value):
        if not isinstance(value, torch.Tensor):
            return type(value), value
        return names.get(value.data_ptr()), value.dtype, value.numel()

    return [describe(value) for value in arguments]


@pytest.mark.parametrize("case", CASES)
def test_a_repeated_launch_has_the_arguments_of_a_first_one(case, launches):
    taken, through_triton = launches
    run, new_kernels = layers_of(case)
    results = [run(), run(), run(new_kernels())]  # the first, a repeated, and the first of others
    assert len(taken) == 9
    assert len(through_triton) == 6
    described_layers = []
    for i, (saved, dout, (dq, dk, dv, _)) in enumerate(results):
        tensors = {
            name: tensor for name, tensor in saved._asdict().items() if tensor is not None
        } | {"dout": dout, "dq": dq, "dk": dk, "dv": dv, "cu_seqlens": CU_SEQLENS}
        mine = taken[3 * i : 3 * i + 3]
        described_layers.append([(*launch[:2], described(launch[2], tensors)) for launch in mine])
    first, repeated, other = described_layers
    assert repeated == first == other
    written = {name for launch in repeated for name, *_ in launch[2] if isinstance(name, str)}
    assert {"query", "key", "value", "out", "lse", "dout", "dq", "dk", "dv"} <= written


def test_another_alignment_goes_through_triton(launches):
    """Triton compiles another kernel for it, with narrower loads."""
    taken, through_triton = launches
    run, _ = layers_of("causal")
    for offset in (0, 1, 0, 1):
        run(offset=offset, backward=False)
    assert len(through_triton) == 3  # one aligned, two unaligned
    aligned, unaligned, *repeated = (kernel for kernel, *_ in taken)
    assert aligned != unaligned
    assert repeated == [aligned, unaligned]


def test_the_first_layer_does_not_stay_in_memory(launches):
    run, _ = layers_of("causal")
    saved, dout, gradients = run()
    alive = [weakref.ref(tensor) for tensor in (*saved[:5], dout, *gradients[:3])]
    del saved, dout, gradients
    launches[0].clear()
    assert not [each for each in alive if each() is not None]
    run()
