"""What a compiled attention kernel issues for one tile of scores, counted from its machine code.

Each innermost loop with matrix products computes one tile of queries x keys per iteration. A
float32 product is three products of tf32 (tf32x3).

The two ceilings are a model, not a measurement. They rank variants. `overlapped` assumes that the
tensor cores and all other units work at the same time, `serial` that the tensor cores wait for the
busiest other unit. The tensor cores of Hopper also wait for operands: shared memory gives an SM 128
bytes per clock, and an instruction of 64 x 64 x 16 with both operands there needs just that.
Blackwell's traffic between registers and tensor memory is not in the model.
"""

import collections
import functools
import inspect
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from tokenpack.kernels.attention import primitives
from tokenpack.kernels.attention.rows import load_columns

from .loop_trips import kind_of

MODEL = 2  # ceilings of another number are not comparable
REGISTERS_PER_SM, WARPS_PER_SM, SHARED_BYTES_PER_CLOCK = 65_536, 64, 128
TENSOR_MEMORY_COLUMNS = 512


class Gpu(NamedTuple):
    """Rates of one streaming multiprocessor per clock, and the size of the whole GPU.

    Sources: NVIDIA, "CUDA C++ Programming Guide", throughput of native arithmetic instructions, and
    shared memory per multiprocessor, by compute capability; NVIDIA's white papers of A100 (108 SMs,
    312 dense 16-bit TFLOP/s at 1.41 GHz), H100 (SXM: 132 SMs, 989 TFLOP/s at 1.83 GHz) and the data
    sheet of HGX B200 (148 SMs, 2,250 TFLOP/s at about 1.86 GHz).
    """

    sms: int
    gigahertz: float
    flops: dict[str, float]  # 16-bit FLOP by instruction; tf32 has half of them
    float_lanes: int
    integer_lanes: int
    special_lanes: int  # exponentials
    shared: int  # bytes

    @property
    def peak(self) -> float:
        """Dense 16-bit TFLOP/s."""
        return self.sms * max(self.flops.values()) * self.gigahertz / 1e3


# mma.sync, the instruction of older GPUs, reaches 62 % of Hopper's peak (Luo et al., "Benchmarking
# and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking", 2024). Nothing is
# published for Blackwell: the rate of Hopper's is assumed.
GPUS = {
    "sm_80": Gpu(108, 1.41, {"HMMA": 2048}, 64, 64, 16, 164 * 1024),
    "sm_90": Gpu(132, 1.83, {"HGMMA": 4096, "HMMA": 0.62 * 4096}, 128, 64, 16, 228 * 1024),
    "sm_100": Gpu(148, 1.86, {"UTCHMMA": 8192, "HMMA": 0.62 * 4096}, 128, 64, 16, 228 * 1024),
}
# Products of queries x keys x head_dim that the algorithm needs in one tile.
NEEDED_PRODUCTS = {
    "_attention_forward_kernel": 2,
    "_attention_backward_q_kernel": 3,
    "_attention_backward_kv_kernel": 4,
    "_yardstick_forward_kernel": 2,
    "_yardstick_backward_q_kernel": 3,
    "_yardstick_backward_kv_kernel": 4,
}
FLOAT = {"FFMA", "FADD", "FMUL", "FFMA2", "FADD2", "FMUL2"}
INTEGER = re.compile(
    "ISETP|LOP3|FMNMX3?|SEL|FSEL|IADD3?|VIADD|SHF|PRMT|FSETP|PLOP3|LEA|V?IMNMX3?|IABS|SGXT|F2FP|F2F"
    "|I2F|F2I|I2FP|VIADDMNMX"
)


class LoopCount(NamedTuple):
    """One loop over tiles of one kernel."""

    kernel: str
    case: str
    target: str
    tile: str  # queries x keys, warps, stages
    loop: int  # in the order of the machine code
    kind: str  # what its tiles need, see `loop_trips.kind_of`
    registers: int  # of a thread
    programs: int  # that fit on an SM at a time
    instructions: int  # of a warp, for one tile
    spills: int  # instructions among them that move registers to or from memory
    products: float  # issued over needed
    exponentials: float  # issued over scores
    overlapped: int  # TFLOP/s of the whole GPU
    serial: int  # TFLOP/s of the whole GPU

    def line(self) -> str:
        """The row in Markdown."""
        cells = (f"{value:.2f}" if isinstance(value, float) else str(value) for value in self)
        return f"| {' | '.join(cells)} |"


class Instruction(NamedTuple):
    """One instruction of a warp. ``shape`` is that of a matrix product: rows, columns, depth."""

    text: str
    opcode: str
    shape: tuple[int, int, int] | None = None
    source: tuple[str, int] = ("", 0)  # file and line


def read_code(code: str, ptx: str) -> tuple[list[Instruction], list[tuple[int, int]]]:
    """The instructions, and the first and last one of each loop."""
    labels: dict[str, int] = {}
    instructions: list[Instruction] = []
    source = ("", 0)
    blackwell = iter(_blackwell_shapes(ptx))
    for line in code.split("\n"):
        if label := re.match(r"^(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(instructions)
        elif place := re.search(r'//## File ".*?([^/"]+)", line (\d+)', line):
            source = place[1], int(place[2])
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            text = found[1].strip()
            opcode = re.sub(r"^@!?U?P?\w+\s+", "", text).split()[0].split(".")[0]
            shape = next(blackwell) if opcode == "UTCHMMA" else _shape(text)
            instructions.append(Instruction(text, opcode, shape, source))
    if next(blackwell, None):
        raise ValueError("the machine code has fewer tcgen05 products than the PTX")
    spans = []
    for end, instruction in enumerate(instructions):
        branch = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction.text)
        start = labels.get(branch[1], end + 1) if branch else end + 1
        # On sm_100, waits for the matrix units try again behind the program's end, and jump back.
        if start <= end and not any(one.text == "EXIT" for one in instructions[start:end]):
            spans.append((start, end))
    return instructions, spans


@functools.cache
def _lines_of_kinds() -> list[set[tuple[str, int]]]:
    """The lines that only loops of each of `KINDS` have."""

    def lines(function, pattern: str = "") -> set[tuple[str, int]]:
        file = Path(inspect.getfile(function.fn)).name
        text, first = inspect.getsourcelines(function.fn)
        return {(file, first + i) for i, one in enumerate(text) if pattern in one}

    edge = lines(load_columns, "rows.count")
    return [lines(primitives.tile_biases), lines(primitives.between), edge]


def _shape(text: str) -> tuple[int, int, int] | None:
    if shape := re.search(r"\bHGMMA\.(\d+)x(\d+)x(\d+)", text):
        return int(shape[1]), int(shape[2]), int(shape[3])
    if shape := re.search(r"\bHMMA\.168(\d+)\.", text):
        return 16, 8, int(shape[1])
    return None


def _blackwell_shapes(ptx: str) -> list[tuple[int, int, int]]:
    """Of each tcgen05 product. The PTX has its columns and rows in a constant descriptor."""
    constants = dict(re.findall(r"mov\.b32\s+(%r\d+), (-?\d+);", ptx))
    shapes = []
    call = re.compile(r"tcgen05\.mma\.\S*kind::(\w+) \[[^\]]*\], .*?, %rd\d+, (%?\w+),")
    for kind, descriptor in call.findall(ptx):
        bits = int(constants.get(descriptor, descriptor))
        depth = {"f16": 16, "tf32": 8}[kind]
        shapes.append(((bits >> 24 & 31) * 16, (bits >> 17 & 63) * 8, depth))
    return shapes


def innermost(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The loops that contain no other: those over tiles."""

    def contains(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
        return outer[0] <= inner[0] and inner[1] <= outer[1] and outer != inner

    return [span for span in spans if not any(contains(span, one) for one in spans)]


def disassemble(cubin: bytes) -> tuple[str, int]:
    """The machine code, and the registers of a thread."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def tool(name: str, *arguments: str) -> str:
            program = getattr(triton.knobs.nvidia, name).path
            command = [program, *arguments, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = tool("cuobjdump", "--dump-resource-usage")
        return tool("nvdisasm", "-c", "-g"), int(re.search(r"REG:(\d+)", usage)[1])


def constants_of(kernel) -> dict[str, object]:
    """The compile-time constants of a compiled kernel by name."""
    names = kernel.src.fn.arg_names
    return {names[path[0]]: value for path, value in kernel.src.constants.items()}


def products_issued(
    body: list[Instruction], gpu: Gpu, warps: int, is_tf32: bool
) -> tuple[float, float]:
    """FLOP that the program issues to the tensor cores, and the clocks that they take."""
    total = clocks = 0.0
    for one in body:
        if one.shape is None:
            continue
        rows, columns, depth = one.shape
        # A warpgroup of four warps shares one HGMMA, and all warps one UTCHMMA.
        times = {"HMMA": warps, "HGMMA": warps / 4}.get(one.opcode, 1)
        flops = times * 2 * rows * columns * depth
        total += flops
        busy = flops / gpu.flops[one.opcode] * (2 if is_tf32 else 1)
        if one.opcode == "UTCHMMA":
            busy *= max(128 / rows, 1)  # 64 rows take as long as 128
        if one.opcode == "HGMMA":
            in_shared = columns + (rows if re.search(r"HGMMA\S* R\d+, gdesc", one.text) else 0)
            operands = times * in_shared * depth * (4 if is_tf32 else 2)
            busy = max(busy, operands / SHARED_BYTES_PER_CLOCK)
        clocks += busy
    return total, clocks


def programs_that_fit(kernel, registers: int, gpu: Gpu) -> int:
    """Programs on a multiprocessor at a time."""
    warps = kernel.metadata.num_warps
    limits = [
        REGISTERS_PER_SM // (-(-registers // 8) * 8 * 32 * warps),
        gpu.shared // (kernel.metadata.shared + 1024),
        WARPS_PER_SM // warps,
    ]
    if columns := getattr(kernel.metadata, "tmem_size", 0):
        limits.append(TENSOR_MEMORY_COLUMNS // columns)
    return min(limits)


def count(kernel, case: str, target: str) -> list[LoopCount]:
    """The counts of each loop over tiles of a compiled attention kernel."""
    code, registers = disassemble(kernel.asm["cubin"])
    instructions, spans = read_code(code, kernel.asm["ptx"])
    gpu, constants = GPUS[target], constants_of(kernel)
    name, warps = kernel.metadata.name, kernel.metadata.num_warps
    queries, keys, columns = (constants[size] for size in ("QUERIES", "KEYS", "COLUMNS"))
    chunk, is_tf32 = constants.get("CHUNK", 0), case.endswith("fp32")
    scores = queries * keys
    # Chunks cover head_dim, other products all columns. tf32x3 takes three products for one.
    needed = NEEDED_PRODUCTS[name] * 2 * scores * columns * (3 if is_tf32 else 1)
    if chunk:
        head_dim = constants["HEAD_DIM"]
        by_chunks = {2: 1, 3: 2, 4: 2}[NEEDED_PRODUCTS[name]]
        needed -= by_chunks * 2 * scores * (columns - head_dim) * 3
    programs = programs_that_fit(kernel, registers, gpu)
    counts = []
    spans = [(a, b) for a, b in spans if any(one.shape for one in instructions[a : b + 1])]
    for number, (first, last) in enumerate(innermost(spans)):
        body = instructions[first : last + 1]
        sources = {one.source for one in body}
        opcodes = collections.Counter(one.opcode for one in body)
        issued, tensor_cores = products_issued(body, gpu, warps, is_tf32)
        per_quarter = warps / 4  # an SM has four schedulers, with a quarter of the lanes each
        floats = sum(opcodes[one] for one in FLOAT) + opcodes["IMAD"] * gpu.float_lanes / 64
        integers = sum(number for one, number in opcodes.items() if INTEGER.fullmatch(one))
        busiest_other = per_quarter * max(
            len(body),
            opcodes["MUFU"] * 128 / gpu.special_lanes,
            floats * 128 / gpu.float_lanes,
            integers * 128 / gpu.integer_lanes,
        )
        # Of 16-bit products, or of tf32x3 products, that are counted as one.
        need = needed / max(gpu.flops.values())
        peak = gpu.peak / (3 if is_tf32 else 1)
        exponentials = sum("MUFU.EX2" in one.text for one in body) * 32 * warps
        counts.append(
            LoopCount(
                name,
                case,
                target,
                f"{queries} x {keys}, {warps}, {kernel.metadata.num_stages}",
                number,
                kind_of(*(not sources.isdisjoint(lines) for lines in _lines_of_kinds())),
                registers,
                programs,
                len(body),
                opcodes["STL"] + opcodes["LDL"],
                issued / needed,
                exponentials / scores,
                round(peak * need / max(tensor_cores, busiest_other)),
                round(peak * need / (tensor_cores + busiest_other)),
            )
        )
    return counts
