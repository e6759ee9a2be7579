"""Measure the peak rates of a device, for predictions: products, attention, bytes, calls.

Each rate is the best of several rounds, at sizes that occur in training; all of them take a few
seconds. Nothing runs faster on the device at these sizes.

    products     (2048, 1024) @ (1024, 4096); on a GPU (8192, 4096) @ (4096, 4096)
    attention    PyTorch's fused kernel, forward and backward, over rows of 512 tokens
    bytes        a * b over 64 MiB, 256 MiB on a GPU, which exceeds the caches
    fresh_bytes  the same with a new result in each call, whose pages a CPU must map first
    call         operators of small modules on 4 x 4 numbers, forward and backward
    update       AdamW on weights of four numbers
    sequence     packed attention over short sequences, with and without a relative bias
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from ..attention import packed_attention
from .traffic import count_calls


@dataclass(frozen=True)
class Ceilings:
    """Peak rates and memory of a device.

    Attributes:
        device: name of the GPU, or ``cpu``.
        dtype: dtype of the activations in the measurement, ``float32`` or ``bfloat16``.
        products: floating-point operations per second in matrix products.
        attention: floating-point operations per second in fused attention, forward and backward,
            counted for all queries by all keys.
        bytes: bytes per second, read and written, in elementwise operators.
        fresh_bytes: the same for results so large that a CPU allocator must map new pages.
        call: seconds to call an operator, in a module and by autograd.
        update: seconds of AdamW per weight tensor, in addition to the bytes that it moves.
        sequence: seconds per sequence and packed attention, in addition to the operations.
        sequence_width: further seconds per sequence and unit of width, heads * head_dim.
        biased_sequence: ``sequence`` for attention with a relative bias.
        biased_sequence_width: ``sequence_width`` for attention with a relative bias.
        memory: bytes of memory.
    """

    device: str
    dtype: str
    products: float
    attention: float
    bytes: float
    fresh_bytes: float
    call: float
    update: float
    sequence: float
    sequence_width: float
    biased_sequence: float
    biased_sequence_width: float
    memory: int

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU, where calls on the host overlap with the device's work."""
        return self.device != "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as a `torch.dtype`."""
        return getattr(torch, self.dtype)


def measure_ceilings(device: torch.device | str | None = None) -> Ceilings:
    """Measure a device, a CPU in float32 and a GPU in bfloat16. This takes a few seconds.

    Args:
        device: to measure; by default the GPU if there is one, else the CPU.

    Returns:
        The device's ceilings.
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

    elements = (256 if on_gpu else 64) * 2**20 // dtype.itemsize
    x, y = random(elements), random(elements)
    out = torch.empty_like(x)
    moved = 3 * elements * dtype.itemsize
    in_place = _best(lambda: torch.mul(x, y, out=out), device)
    fresh = _best(lambda: x * y, device)

    sequence, sequence_width = _seconds_per_sequence(device, dtype, attention, bias=False)
    biased, biased_width = _seconds_per_sequence(device, dtype, attention, bias=True)

    return Ceilings(
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        dtype=str(dtype).removeprefix("torch."),
        products=products,
        attention=attention,
        bytes=moved / in_place,
        fresh_bytes=moved / fresh,
        call=_seconds_per_call(device),
        update=_seconds_per_weight(device),
        sequence=sequence,
        sequence_width=sequence_width,
        biased_sequence=biased,
        biased_sequence_width=biased_width,
        memory=_memory(device),
    )


def _seconds_per_call(device: torch.device) -> float:
    """Seconds per operator of small layers, forward and backward."""
    layers = [nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.ReLU()) for _ in range(20)]
    model = nn.Sequential(*layers).to(device)
    small = torch.randn(4, 4, device=device)

    def run() -> None:
        model(small).sum().backward()

    run()  # allocates the gradients; later runs add to them
    return _best(run, device) / count_calls(run)


def _seconds_per_weight(device: torch.device) -> float:
    """Seconds of AdamW per weight tensor: one fused call on a GPU, a call per weight on a CPU."""
    weights = [torch.randn(4, device=device, requires_grad=True) for _ in range(64)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.AdamW(weights, fused=device.type == "cuda")
    return _best(optimizer.step, device) / len(weights)


def _seconds_per_sequence(
    device: torch.device, dtype: torch.dtype, attention: float, *, bias: bool
) -> tuple[float, float]:
    """Seconds per sequence, and further seconds per unit of width, of packed attention.

    The time of the operations, at the rate ``attention``, is subtracted.
    """
    lengths = list(range(8, 72, 3))
    width = 64
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    seconds = {}
    for heads in (2, 8):
        q, k, v = (
            torch.randn(sum(lengths), heads, width, device=device, dtype=dtype).requires_grad_()
            for _ in range(3)
        )
        table = None
        if bias:
            table = torch.randn(heads, 2 * 128 + 1, device=device).requires_grad_()
        leaves = (q, k, v) if table is None else (q, k, v, table)

        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor | None = None
        ) -> None:
            out, _ = packed_attention(
                *(q, k, v, cu_seqlens, cu_seqlens, lengths[-1], lengths[-1]),
                causal=False,
                scale=width**-0.5,
                relative_bias=table,
            )
            torch.autograd.grad(out.sum(), (q, k, v) if table is None else (q, k, v, table))

        operations = 3 * 4 * heads * width * sum(length**2 for length in lengths)
        extra = _best(partial(attend, *leaves), device) - operations / attention
        seconds[heads] = max(extra, 0.0) / len(lengths)
    per_width = max(seconds[8] - seconds[2], 0.0) / ((8 - 2) * width)
    return max(seconds[2] - 2 * width * per_width, 0.0), per_width


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
    except (AttributeError, ValueError):  # Windows has no os.sysconf
        return 0


def write_ceilings(ceilings: Ceilings, path: str | Path) -> None:
    """Write ceilings as JSON, to predict with them on another machine.

    Args:
        ceilings: to write.
        path: of the file, which is replaced if it exists.
    """
    Path(path).write_text(json.dumps(asdict(ceilings), indent=1) + "\n", encoding="utf-8")


def read_ceilings(path: str | Path) -> Ceilings:
    """Read a file that `write_ceilings` wrote.

    Args:
        path: of the file.

    Raises:
        ValueError: if the file does not hold valid ceilings.
        OSError: if the file cannot be read.
    """
    names = {field.name for field in fields(Ceilings)}
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"ceilings must be a JSON file, got {path}: {error}") from None
    if not isinstance(document, dict) or set(document) != names:
        raise ValueError(
            f"ceilings must be a JSON object with exactly {', '.join(sorted(names))}, got {path}"
        )
    dtype = document["dtype"]
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(
            f"ceilings: dtype must be float32, bfloat16 or float16, got {dtype!r} in {path}"
        )
    numbers = {name: document[name] for name in names - {"device", "dtype"}}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise ValueError(
                f"ceilings: {name} must be a number of 0 or more, got {value!r} in {path}"
            )
    return Ceilings(**document)
