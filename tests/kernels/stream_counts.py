"""What a kernel that streams rows issues for one element, compared with the time of memory for it.

An H100 SXM reads and writes 3.35 TB/s (NVIDIA, data sheet). At 132 SMs and 1.83 GHz, that is 13.9
bytes per SM and clock. In a clock, an SM issues one instruction to 128 lanes, and has 16 lanes for
exponentials. While both take less time than the bytes, they hide behind memory.
"""

import re
from typing import NamedTuple

from .tile_counts import GPUS, disassemble, read_code

BYTES_PER_CLOCK = 3.35e12 / (GPUS["sm_90"].sms * GPUS["sm_90"].gigahertz * 1e9)


class StreamCount(NamedTuple):
    """The loop over elements of one kernel."""

    kernel: str
    case: str
    bytes: float  # read and written for one element
    instructions: float  # of a lane, for one element
    specials: float  # exponentials, logarithms and reciprocals for one element

    @property
    def share(self) -> float:
        """Clocks of the busier unit over clocks of memory."""
        gpu = GPUS["sm_90"]
        clocks = max(self.instructions / 128, self.specials / gpu.special_lanes)
        return clocks / (self.bytes / BYTES_PER_CLOCK)


def count(kernel, case: str, itemsize: int) -> list[StreamCount]:
    """The counts of each loop with exponentials, in which each thread loads elements."""
    code, _ = disassemble(kernel.asm["cubin"])
    instructions, loops = read_code(code, kernel.asm["ptx"])
    counts = []
    for first, last in loops:
        body = [one.text for one in instructions[first : last + 1]]
        loaded, stored = (sum(_width(one, kind) for one in body) for kind in ("LDG", "STG"))
        if loaded and any("MUFU.EX2" in one for one in body):
            elements = loaded / itemsize
            specials = sum("MUFU" in one for one in body) / elements
            moved = (loaded + stored) / elements
            name = kernel.metadata.name
            counts.append(StreamCount(name, case, moved, len(body) / elements, specials))
    return counts


def _width(text: str, kind: str) -> int:
    """Bytes that a load or store of global memory moves for a lane."""
    if not (found := re.search(rf"\b{kind}\.E((?:\.\w+)*)", text)):
        return 0
    bits = re.search(r"\.(?:U|S)?(8|16|64|128)\b", found[1])
    return int(bits[1]) // 8 if bits else 4
