"""Compile every kernel, as its launcher launches it, for four GPU targets. No GPU is needed.

The launchers run on CPU tensors with a driver that only names a target, and stop before the launch.
So the signature, the alignment and the options of each compilation are those of a launch on a GPU.
The gate fails if no case compiles a kernel. For NVIDIA targets, registers, stack and spills are
read from the machine code. Wide loads and matrix instructions are read from the PTX, where both
are explicit.
The whole gate takes minutes. It runs with ``COMPILE_TABLE=FILE``, to which it writes its table:
``make compile``. With ``COMPILE_CHECK=1``, it compiles a part of the jobs, every kernel for every
target among them, and compares the rows with the committed table: ``make compile-check``, which CI
runs. Nothing is cached between runs.
"""

import contextlib
import functools
import multiprocessing
import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from tokenpack.kernels import (
    layout_from_lengths,
    layout_kernels,
    layout_ops,
    loss,
    loss_kernels,
    padding,
    padding_kernels,
    reduction,
    tokens,
)
from tokenpack.kernels._triton import AVAILABLE, INTERPRETED
from tokenpack.kernels.attention import (
    backward_kv,
    backward_kv_wide,
    backward_q,
    column_chunks,
    dropout,
    forward,
    op,
    primitives,
    rows,
)

from . import compile_table, predicted, stream_counts, tile_counts
from .compile_cases import DTYPES, TARGETS, all_jobs, checked_jobs, losses
from .compile_table import Row
from .known_counts import KNOWN_FALLS
from .tile_counts import LoopCount

TABLE = os.environ.get("COMPILE_TABLE")
CHECK = not TABLE and "COMPILE_CHECK" in os.environ

pytestmark = [
    pytest.mark.skipif(not (TABLE or CHECK), reason="takes minutes: make compile runs it"),
    pytest.mark.skipif(not AVAILABLE or INTERPRETED, reason="needs Triton without its interpreter"),
]

MODULES = [
    layout_kernels,
    padding_kernels,
    reduction,
    tokens,
    loss_kernels,
    forward,
    backward_q,
    backward_kv,
    backward_kv_wide,
    column_chunks,
    dropout,
    primitives,
    rows,
]
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

# Kernels whose rows allow 16-byte loads in the cases below.
WIDE = {
    "_unpad_kernel",
    "_repad_kernel",
    "_cross_entropy_kernel",
    "_cross_entropy_backward_kernel",
    "_attention_forward_kernel",
    "_attention_backward_q_kernel",
    "_attention_backward_kv_kernel",
}
# Loads of 16 bytes or more in PTX, into registers and into shared memory.
WIDE_LOAD = re.compile(
    r"\bld\.global\S*\.(?:v2\.\w64|v4\.\w32|v4\.\w64|v8\.\w32)\b"
    r"|\bcp\.async\.cg\.shared\.global\b[^;]*, 0x10\b"
)
# Kernels with matrix products, and the PTX instructions of each target's matrix units.
PRODUCTS = {name for name in WIDE if name.startswith("_attention")}
MATRIX_UNITS = {
    "sm_80": r"mma\.sync",
    "sm_90": r"wgmma\.mma_async|mma\.sync",
    "sm_100": r"tcgen05\.mma|mma\.sync",
}


BEFORE: dict[compile_table.Loop, int] = {}  # the ceilings of the table that is replaced
JOBS = checked_jobs() if CHECK else all_jobs()


class NamedTarget:
    """Replaces Triton's driver: it names a GPU target, without a GPU."""

    def __init__(self, target):
        self._target = target

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return f"{self._target.backend}:{self._target.arch}"  # a cache key for each target

    def get_current_stream(self, device=None):
        return 0


@contextlib.contextmanager
def compiling_for(target, only=None):
    """Compile instead of launching. Yields the compiled kernels by their hashes.

    ``only`` names the kernels to compile. By default, all of them are.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    compiled, run = {}, JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        if only and self.__name__ not in only:
            return
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[kernel.hash] = kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        patch.setattr(torch, "_assert_async", lambda *_: None)  # no kernel wrote the outputs
        patch.setattr(op, "kernel_lacks", lambda *_: None)  # it reports that there is no GPU
        driver.set_active(NamedTarget(GPUTarget(*target)))
        try:
            yield compiled
        finally:
            driver.set_active(None)


@functools.cache
def read_cubin(cubin: bytes) -> tuple[int, int, int]:
    """Registers, bytes of stack, and spill instructions."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)

        def tool(name, *arguments):
            program = getattr(triton.knobs.nvidia, name).path
            done = subprocess.run(
                [program, *arguments, str(path)], capture_output=True, text=True, check=True
            )
            return done.stdout

        usage = tool("cuobjdump", "--dump-resource-usage")
        registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
        # A spill needs stack, and the disassembler takes 0.3 s for a kernel.
        code = tool("nvdisasm", "-c") if stack else ""
    return registers, stack, len(re.findall(r"\b(?:STL|LDL)\b", code))


def describe(kernel, case, target) -> Row:
    registers = stack = spills = wide = products = None
    if "cubin" in kernel.asm:
        registers, stack, spills = read_cubin(kernel.asm["cubin"])
        wide = len(WIDE_LOAD.findall(kernel.asm["ptx"]))
        products = len(re.findall(rf"\b(?:{MATRIX_UNITS[target]})\b", kernel.asm["ptx"]))
    shared = kernel.metadata.shared
    return Row(kernel.metadata.name, case, target, registers, stack, spills, shared, wide, products)


def run_job(number: int) -> tuple[list[Row], list[LoopCount]]:
    target, dtypes, case = JOBS[number]
    gathered, counts = [], []
    for dtype in dtypes:
        with compiling_for(TARGETS[target], getattr(case, "only", None)) as compiled:
            case(DTYPES[dtype])
        label = f"{case.__name__}, {dtype}"
        if not label.startswith("yardstick"):
            gathered += [describe(kernel, label, target) for kernel in compiled.values()]
        if target in tile_counts.GPUS and dtype != "fp16":
            for kernel in compiled.values():
                if kernel.metadata.name in tile_counts.NEEDED_PRODUCTS:
                    counts += tile_counts.count(kernel, label, target)
    return gathered, counts


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        # Forked processes share this module. A spawned process could not import it by its name.
        with multiprocessing.get_context("fork").Pool(2) as pool:
            yield pool


@pytest.fixture(scope="module")
def hundred_batches(pool):
    return pool.apply_async(compile_batches)


@pytest.fixture(scope="module")
def compiled(pool, hundred_batches):
    """All rows, and the counts of all loops of attention, in order and without duplicates."""
    parts = zip(*pool.imap(run_job, range(len(JOBS))))
    gathered, counts = (
        sorted({row for rows in part for row in rows}, key=lambda row: tuple(map(str, row)))
        for part in parts
    )
    if TABLE:
        import triton

        BEFORE.update(compile_table.read_ceilings(Path(TABLE)) if Path(TABLE).exists() else {})
        predictions = predicted.predict(counts)
        compile_table.write(Path(TABLE), gathered, counts, predictions, triton.__version__)
    return gathered, counts


@pytest.fixture(scope="module")
def gate(compiled):
    return compiled[0]


@pytest.fixture(scope="module")
def loops(compiled):
    return [row for row in compiled[1] if row.kernel in PRODUCTS]


def test_every_kernel_is_in_the_gate(gate):
    kernels = {
        name
        for module in MODULES
        for name, value in vars(module).items()
        if type(value).__name__ == "JITFunction" and name.endswith("_kernel")
    }
    for target in TARGETS:
        assert {row.kernel for row in gate if row.target == target} == kernels


def test_every_module_with_kernels_is_in_the_gate():
    folder = Path(layout_ops.__file__).parent
    with_kernels = {p for p in folder.rglob("*.py") if "@triton.jit" in p.read_text()}
    assert with_kernels == {Path(module.__file__) for module in MODULES}


@pytest.mark.skipif(not CHECK, reason="make compile writes the table")
def test_the_committed_table_has_these_rows(gate, loops):
    import triton

    version, _, lines = compile_table.read()
    if version != triton.__version__:
        pytest.skip(f"the committed table is of Triton {version}, this is {triton.__version__}")
    assert [row.line() for row in [*gate, *loops] if row.line() not in lines] == []


# Spill instructions allowed for attention in a whole kernel. Nearly all lie outside of the loops,
# once for each program or for each of the heads that share keys; of the loops, see below.
SPILLS = {"bf16": 400, "fp16": 400, "fp32": 1300}


def dtype_of(row):
    return row.case.split(", ")[-1]


def test_only_attention_spills(gate):
    for row in gate:
        if row.spills is not None:
            allowed = SPILLS[dtype_of(row)] if row.kernel in PRODUCTS else 0
            assert row.spills <= allowed, row
            assert row.stack == 0 or row.spills, row


def test_nothing_spills_on_hopper(gate):
    hopper = [row for row in gate if row.target == "sm_90"]
    assert {row.kernel for row in hopper} >= PRODUCTS
    assert [row for row in hopper if row.spills != 0] == []


def test_loops_elsewhere_hardly_spill(loops):
    """Tiles without spills take longer by the count. float32 is tuned on Hopper alone."""
    for row in loops:
        if dtype_of(row) != "fp32":
            assert row.spills <= 0.03 * row.instructions, row


# In the forward with many columns on Ampere, Triton gives each warp columns of the sums. So each
# warp rescales all rows. With 256 columns, tiles that avoid it take longer by the count. With 128
# columns and a bias, they spill in the loop.
EXPONENTIALS = {("_attention_forward_kernel", "sm_80", 256, "bf16"): 1.6}
EXPONENTIALS |= {("_attention_forward_kernel", "sm_80", 128, "bf16"): 1.3}


def allowed_exponentials(row):
    *_, kind, head_dim, dtype = row.case.split(", ")
    # A softcap takes an exponential more. In the forward, the four threads of a row rescale it.
    rescaling = 4 / int(row.tile.split(" x ")[1].split(",")[0]) if "forward" in row.kernel else 0.0
    limit = EXPONENTIALS.get((row.kernel, row.target, int(head_dim), dtype), 1.1 + rescaling)
    return limit + (kind == "everything")


def test_every_call_has_loops(gate, loops):
    """A kernel that Triton compiles to nothing, or whose loops are not found, has none."""
    calls = {row[:3] for row in gate if row.kernel in PRODUCTS and dtype_of(row) != "fp16"}
    assert {row[:3] for row in loops} == {call for call in calls if call[2] in tile_counts.GPUS}
    assert {(row.kernel, row.target) for row in loops} == {
        (kernel, target) for kernel in PRODUCTS for target in tile_counts.GPUS
    }


def test_no_product_and_no_exponential_is_computed_twice(loops):
    for row in loops:
        if dtype_of(row) == "fp32" and row.exponentials == 0.0:
            # Its innermost loops are over chunks of columns: one of these products for each.
            *_, head_dim, _ = row.case.split(", ")
            chunks = int(head_dim) // 32
            times = row.products * tile_counts.NEEDED_PRODUCTS[row.kernel] * chunks
            assert times <= 1.05, (row, times)
            continue
        # The bias's gradient is one product more, in tiles of dq that read the table.
        sums = 0.15 if "backward_q" in row.kernel and row.kind.startswith("table") else 0.0
        assert row.products <= 1.05 + sums, row
        assert row.exponentials <= allowed_exponentials(row), row


# Clocks of the busier unit over those of memory. A softcap takes two exponentials more, and a tanh
# that is exact near 0, so it is at the limit of instructions, and does not hide behind memory.
SHARES = {False: 0.9, True: 2.5}


def test_losses_without_a_softcap_hide_behind_memory():
    """The loops over classes of a row of logits. With all options they take no more than today."""
    with compiling_for(TARGETS["sm_90"]) as compiled:
        losses(torch.bfloat16)
    found = set()
    for kernel in compiled.values():
        options = tile_counts.constants_of(kernel)
        for loop in stream_counts.count(kernel, "losses, bf16", torch.bfloat16.itemsize):
            found.add((loop.kernel, options["SOFTCAP"]))
            assert loop.share < SHARES[options["SOFTCAP"]], (loop, loop.share)
    kernels = ("_cross_entropy_kernel", "_cross_entropy_backward_kernel")
    assert found == {(name, softcap) for name in kernels for softcap in (False, True)}


@pytest.mark.skipif(not TABLE, reason="make compile compares the table with the one before")
def test_no_ceiling_falls(compiled):
    """More than 3 %, unless it is known and listed."""
    now = compile_table.ceilings(compiled[1])
    fallen = {loop for loop in now.keys() & BEFORE.keys() if now[loop] < 0.97 * BEFORE[loop]}
    assert fallen <= KNOWN_FALLS, sorted(fallen - KNOWN_FALLS)


def test_products_use_the_matrix_units(gate):
    for row in gate:
        if row.kernel in PRODUCTS and row.matrix_units is not None:
            assert row.matrix_units, row


def test_shared_memory_fits(gate):
    assert [row for row in gate if row.shared > SHARED_LIMIT[row.target]] == []


def test_wide_rows_are_read_16_bytes_at_a_time(gate):
    for target in ("sm_80", "sm_90", "sm_100"):
        found = {row.kernel for row in gate if row.target == target and row.wide_loads}
        assert found >= WIDE


def compile_batches() -> tuple[set[str], set[str]]:
    """The kernels compiled for one batch, and for that and 100 more of other shapes."""
    generator = torch.Generator().manual_seed(0)

    def one_batch():
        rows, columns = torch.randint(1, 200, (2,), generator=generator).tolist()
        mask = torch.ones(rows, columns, dtype=torch.int64)
        layout_ops.mask_layout_triton(mask, None)
        layout = layout_from_lengths([columns] * rows)
        hidden = torch.zeros(rows, columns, 64, dtype=torch.bfloat16)
        streams = padding.unpad_triton([hidden, mask], layout.indices)
        padding.repad_triton(streams, layout.indices, rows * columns, [0.0, -100.0])
        labels = mask.flatten()
        target, _ = reduction.token_targets_triton(
            labels, layout.cu_seqlens, None, 32, True, False, -100, torch.float32
        )
        logits = torch.zeros(rows * columns, 32, dtype=torch.bfloat16)
        options = (0.0, 0.0, 0.0, 1.0)
        token_loss, lse, _ = loss.cross_entropy_triton(logits, target, *options, False)
        first = int(torch.randint(0, rows * columns, (), generator=generator))  # of a chunk
        loss.cross_entropy_triton(logits[first:], target[first:], *options, False)
        chunk = (one[first:] for one in (token_loss, logits, lse, target))
        loss.cross_entropy_backward_triton(*chunk, *options)
        q = torch.zeros(rows * columns, 4, 64, dtype=torch.bfloat16)
        table = torch.zeros(4, 2 * columns + 1)
        rest = (layout.cu_seqlens, layout.cu_seqlens, table, None, 0.125, -1, 0, 0.0, 0.0)
        out, lse = op.varlen_attention_triton(q, q, q, *rest)
        op.varlen_attention_backward_triton(out, q, q, q, out, lse, *rest, True)

    with compiling_for(TARGETS["sm_90"]) as compiled:
        one_batch()
        kernels = set(compiled)
        for _ in range(100):
            one_batch()
        return kernels, set(compiled)


def test_no_new_shape_compiles_anything(hundred_batches):
    first, all_batches = hundred_batches.get()
    assert len(first) == 9
    assert all_batches == first
