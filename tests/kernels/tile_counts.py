"""What a compiled attention kernel issues for one tile of scores, counted from its machine code.

The counts are for Hopper (sm_90) and 16-bit operands. Each innermost loop with a matrix product
computes one tile of queries x keys per iteration. Rates of an SM per clock: 4,096 FLOP in the
tensor cores, 4 warp instructions issued, 128 float32 lanes, 64 integer lanes, 16 lanes of special
functions (NVIDIA, "CUDA C++ Programming Guide", throughput of arithmetic instructions). An H100
SXM has 132 SMs at about 1.83 GHz.

The two ceilings are a model, not a measurement. They rank variants. `overlapped` assumes that the
tensor cores and all other units work at the same time, `serial` that the tensor cores wait for the
busiest other unit.
"""

import collections
import functools
import inspect
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

from tokenpack.kernels.attention import primitives

from .loop_trips import kind_of

PEAK = 132 * 4096 * 1.83e9 / 1e12  # dense 16-bit TFLOP/s of a whole H100
REGISTERS_PER_SM, SHARED_PER_SM, WARPS_PER_SM = 65_536, 228 * 1024, 64
# Products of queries x keys x head_dim that the algorithm needs in one tile.
NEEDED_PRODUCTS = {
    "_attention_forward_kernel": 2,
    "_attention_backward_q_kernel": 3,
    "_attention_backward_kv_kernel": 4,
    "_yardstick_forward_kernel": 2,
    "_yardstick_backward_q_kernel": 3,
    "_yardstick_backward_kv_kernel": 4,
}
FLOAT = {"FFMA", "FADD", "FMUL", "FFMA2"}
INTEGER = re.compile(
    "ISETP|LOP3|FMNMX3?|SEL|FSEL|IADD3?|VIADD|SHF|PRMT|FSETP|PLOP3|LEA|V?IMNMX|IABS|SGXT|F2FP|F2F"
    "|I2F|F2I|I2FP"
)


class LoopCount(NamedTuple):
    """One loop over tiles of one kernel."""

    kernel: str
    case: str
    tile: str  # queries x keys, warps, stages
    loop: int  # in the order of the machine code
    kind: str  # what its tiles need, see `loop_trips.kind_of`
    registers: int  # of a thread
    programs: int  # that fit on an SM at a time
    instructions: int  # of a warp, for one tile
    spills: int  # instructions among them that move registers to or from memory
    products: float  # issued over needed
    exponentials: float  # issued over scores
    overlapped: int  # TFLOP/s of an H100
    serial: int  # TFLOP/s of an H100

    def line(self) -> str:
        """The row in Markdown."""
        cells = (f"{value:.2f}" if isinstance(value, float) else str(value) for value in self)
        return f"| {' | '.join(cells)} |"


def inner_loops(code: str) -> Iterator[tuple[list[str], set[tuple[str, int]]]]:
    """The innermost loops with a matrix product: instructions, and the lines they come from."""
    labels, instructions, sources, source = {}, [], [], ("", 0)
    for line in code.split("\n"):
        if label := re.match(r"^(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(instructions)
        elif place := re.search(r'//## File ".*?([^/"]+)", line (\d+)', line):
            source = place[1], int(place[2])
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(found[1].strip())
            sources.append(source)
    spans = []
    for end, text in enumerate(instructions):
        branch = re.search(r"BRA.*`\((\.L_x_\d+)\)", text)
        start = labels.get(branch[1], end + 1) if branch else end + 1
        if any("MMA." in one for one in instructions[start : end + 1]):
            spans.append((start, end))
    for start, end in spans:
        if not any(a >= start and b <= end and (a, b) != (start, end) for a, b in spans):
            yield instructions[start : end + 1], set(sources[start : end + 1])


@functools.cache
def _lines_of_kinds() -> list[set[tuple[str, int]]]:
    """The lines that only loops of each of `KINDS` have."""

    def lines(function, pattern: str = "") -> set[tuple[str, int]]:
        text, first = inspect.getsourcelines(function.fn)
        return {("primitives.py", first + i) for i, one in enumerate(text) if pattern in one}

    edge = lines(primitives.load_columns, "rows.count")
    return [lines(primitives.tile_biases), lines(primitives.between), edge]


def warp_flops(body: list[str]) -> float:
    """FLOP that one warp issues to the tensor cores."""
    total = 0.0
    for text in body:
        if shape := re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)", text):
            rows, columns, depth = map(int, shape.groups())
            total += 2 * rows * columns * depth / 4  # a warpgroup of four warps shares one
        elif shape := re.search(r"HMMA\.(16816|1688)", text):
            total += 2 * 16 * 8 * (16 if shape[1] == "16816" else 8)
    return total


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


def tile_of(kernel) -> tuple[int, int, int]:
    """Queries and keys of a tile, and head_dim, of a compiled kernel."""
    names = kernel.src.fn.arg_names
    constants = {names[path[0]]: value for path, value in kernel.src.constants.items()}
    return constants["QUERIES"], constants["KEYS"], constants["COLUMNS"]


def count(kernel, case: str) -> list[LoopCount]:
    """The counts of each loop of a compiled attention kernel with 16-bit operands."""
    code, registers = disassemble(kernel.asm["cubin"])
    name, warps = kernel.metadata.name, kernel.metadata.num_warps
    queries, keys, columns = tile_of(kernel)
    needed = NEEDED_PRODUCTS[name] * 2 * queries * keys * columns
    programs = min(
        REGISTERS_PER_SM // (-(-registers // 8) * 8 * 32 * warps),
        SHARED_PER_SM // (kernel.metadata.shared + 1024),
        WARPS_PER_SM // warps,
    )
    counts = []
    for number, (body, sources) in enumerate(inner_loops(code)):
        opcodes = collections.Counter(
            re.sub(r"^@!?U?P?\w+\s+", "", text).split()[0].split(".")[0] for text in body
        )
        issued = warp_flops(body) * warps
        per_quarter = warps / 4  # an SM has four schedulers, with a quarter of the lanes each
        busiest_other = per_quarter * max(
            len(body),
            8 * opcodes["MUFU"],
            sum(opcodes[one] for one in FLOAT) + 2 * opcodes["IMAD"],
            2 * sum(number for one, number in opcodes.items() if INTEGER.fullmatch(one)),
        )
        tensor_cores, need = issued / 4096, needed / 4096
        exponentials = sum("MUFU.EX2" in text for text in body) * 32 * warps
        counts.append(
            LoopCount(
                name,
                case,
                f"{queries} x {keys}, {warps}, {kernel.metadata.num_stages}",
                number,
                kind_of(*(not sources.isdisjoint(lines) for lines in _lines_of_kinds())),
                registers,
                programs,
                len(body),
                opcodes["STL"] + opcodes["LDL"],
                issued / needed,
                exponentials / (queries * keys),
                round(PEAK * need / max(tensor_cores, busiest_other)),
                round(PEAK * need / (tensor_cores + busiest_other)),
            )
        )
    return counts
