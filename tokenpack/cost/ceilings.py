"""How fast a device multiplies, attends, moves bytes and takes calls: measured, for predictions.

Each is the best of some rounds, of a few seconds together: what nothing on the device is faster
than, at sizes that training has. Products are of ``(2048, 1024) @ (1024, 4096)``, attention is
PyTorch's fused kernel, forward and backward, over rows of 512 tokens, bytes are those of ``a * b``
over 64 MiB (on a GPU 256 MiB), past the caches. Fresh bytes are the same with a new result each
time, which on a CPU the system has to find memory for. Calls are those of operators on four
numbers, recorded and run backwards; a sequence's are those of packed attention over short ones.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..attention import packed_attention


@dataclass(frozen=True)
class Ceilings:
    """What a device can do.

    Attributes:
        device: its name, ``cpu`` for a processor.
        dtype: of the activations that it was measured with, ``float32`` or ``bfloat16``.
        products: floating-point operations a second in matrix products.
        attention: the same in fused attention, forward and backward, of full rectangles.
        bytes: a second, read and written, in operators that do little else.
        fresh_bytes: the same where results are so large that a CPU has no memory ready for them.
        call: seconds that an operator takes to be called.
        sequence: seconds that each sequence costs each packed attention beside its operations.
        sequence_width: seconds more, for each unit of its width, heads * head_dim.
        memory: bytes that the device has.
    """

    device: str
    dtype: str
    products: float
    attention: float
    bytes: float
    fresh_bytes: float
    call: float
    sequence: float
    sequence_width: float
    memory: int

    @property
    def on_gpu(self) -> bool:
        """Whether calls are issued ahead of the device, so that their time hides behind its own."""
        return self.device != "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the activations."""
        return getattr(torch, self.dtype)


def measure_ceilings(device: torch.device | str | None = None) -> Ceilings:
    """Measure a device: a CPU in float32, a GPU in bfloat16. Takes some seconds.

    Args:
        device: by default the GPU, where there is one.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    scale = 4 if on_gpu else 1

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    rows, inner, columns = 2048 * scale, 1024 * scale, 4096
    a, b = random(rows, inner), random(inner, columns)
    products = 2 * rows * inner * columns / _best(lambda: a @ b, device)

    heads, tokens, width = 8 * scale, 512, 64
    q, k, v = (random(4 * scale, heads, tokens, width).requires_grad_() for _ in range(3))

    def attend() -> None:
        out = scaled_dot_product_attention(q, k, v)
        torch.autograd.grad(out.sum(), (q, k, v))

    pairs = 4 * scale * heads * tokens * tokens
    attention = 3 * 4 * pairs * width / _best(attend, device)

    many = (256 if on_gpu else 64) * 2**20 // dtype.itemsize
    x, y = random(many), random(many)
    out = torch.empty_like(x)
    moved = 3 * many * dtype.itemsize
    in_place = _best(lambda: torch.mul(x, y, out=out), device)
    fresh = _best(lambda: x * y, device)

    narrow, wide = (_of_a_sequence(device, dtype, attention, heads) for heads in (2, 8))
    more = max(wide - narrow, 0.0) / (6 * 64)
    small = random(4).requires_grad_()

    def calls() -> None:
        chain = small
        for _ in range(500):
            chain = chain * small
        torch.autograd.grad(chain, small, torch.empty_like(chain))

    return Ceilings(
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        dtype=str(dtype).removeprefix("torch."),
        products=products,
        attention=attention,
        bytes=moved / in_place,
        fresh_bytes=moved / fresh,
        sequence=max(narrow - 2 * 64 * more, 0.0),
        sequence_width=more,
        call=_best(calls, device) / 2000,  # of the 500, two a backward, and their sum
        memory=_memory(device),
    )


def _of_a_sequence(device: torch.device, dtype: torch.dtype, attention: float, heads: int) -> float:
    """Seconds beside the operations' at the rate ``attention``."""
    lengths = list(range(8, 72, 3))
    width = 64
    ends = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    q, k, v = (
        torch.randn(sum(lengths), heads, width, device=device, dtype=dtype).requires_grad_()
        for _ in range(3)
    )

    def attend() -> None:
        longest = lengths[-1]
        out, _ = packed_attention(
            q, k, v, ends, ends, longest, longest, causal=False, scale=width**-0.5
        )
        torch.autograd.grad(out.sum(), (q, k, v))

    operations = 3 * 4 * heads * width * sum(length**2 for length in lengths)
    return max(_best(attend, device) - operations / attention, 0.0) / len(lengths)


def _best(function: Callable[[], object], device: torch.device, seconds: float = 0.6) -> float:
    best, begin = float("inf"), time.perf_counter()
    rounds = 0
    while rounds < 4 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
        rounds += 1
    return best


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # no such thing on Windows
        return 0


def write_ceilings(ceilings: Ceilings, path: str | Path) -> None:
    """Write them as JSON, for predictions on another machine."""
    Path(path).write_text(json.dumps(asdict(ceilings), indent=1) + "\n", encoding="utf-8")


def read_ceilings(path: str | Path) -> Ceilings:
    """Read what `write_ceilings` wrote.

    Raises:
        ValueError, OSError: if the file cannot be read as such.
    """
    names = {field.name for field in fields(Ceilings)}
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"ceilings: {path} is no JSON: {error}") from None
    if not isinstance(document, dict) or set(document) != names:
        raise ValueError(f"ceilings: {path} must be an object with {', '.join(sorted(names))}")
    if document["dtype"] not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"ceilings: {path}: dtype must be a float's, got {document['dtype']!r}")
    numbers = {name: document[name] for name in names - {"device", "dtype"}}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise ValueError(
                f"ceilings: {path}: {name} must be a number of 0 or more, got {value!r}"
            )
    return Ceilings(**document)
