"""How fast a device multiplies, attends, moves bytes and takes calls: measured, for predictions.

Each is the best of some rounds, of a few seconds together: what nothing on the device is faster
than, at sizes that training has. Products are of ``(2048, 1024) @ (1024, 4096)``, attention is
PyTorch's fused kernel, forward and backward, over rows of 512 tokens, bytes are those of ``a * b``
over 64 MiB (on a GPU 256 MiB), past the caches. Fresh bytes are the same with a new result each
time, which on a CPU the system has to find memory for. Calls are those of operators of small
modules on four numbers, forward and backward; a weight's are those of AdamW on four numbers; a
sequence's are those of packed attention over short ones, with a relative bias and without.
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
    """What a device can do.

    Attributes:
        device: its name, ``cpu`` for a processor.
        dtype: of the activations that it was measured with, ``float32`` or ``bfloat16``.
        products: floating-point operations a second in matrix products.
        attention: the same in fused attention, forward and backward, of full rectangles.
        bytes: a second, read and written, in operators that do little else.
        fresh_bytes: the same where results are so large that a CPU has no memory ready for them.
        call: seconds that an operator takes to be called, from its module and by autograd.
        update: seconds that AdamW takes for each weight beside the bytes that it moves.
        sequence: seconds that each sequence costs each packed attention beside its operations.
        sequence_width: seconds more, for each unit of its width, heads * head_dim.
        biased_sequence, biased_sequence_width: the same in attention with a relative bias.
        memory: bytes that the device has.
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

    sequence, sequence_width = _of_a_sequence(device, dtype, attention, bias=False)
    biased_sequence, biased_sequence_width = _of_a_sequence(device, dtype, attention, bias=True)

    return Ceilings(
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        dtype=str(dtype).removeprefix("torch."),
        products=products,
        attention=attention,
        bytes=moved / in_place,
        fresh_bytes=moved / fresh,
        call=_of_a_call(device),
        update=_of_a_weight(device),
        sequence=sequence,
        sequence_width=sequence_width,
        biased_sequence=biased_sequence,
        biased_sequence_width=biased_sequence_width,
        memory=_memory(device),
    )


def _of_a_call(device: torch.device) -> float:
    """Seconds of each operator of small layers, forward and backward."""
    layers = [nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.ReLU()) for _ in range(20)]
    model = nn.Sequential(*layers).to(device)
    small = torch.randn(4, 4, device=device)

    def run() -> None:
        model(small).sum().backward()

    run()  # makes the gradients, which are added to from then on
    return _best(run, device) / count_calls(run)


def _of_a_weight(device: torch.device) -> float:
    """Seconds of AdamW for each weight, in one call on a GPU and one by one on a CPU."""
    weights = [torch.randn(4, device=device, requires_grad=True) for _ in range(64)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.AdamW(weights, fused=device.type == "cuda")
    return _best(optimizer.step, device) / len(weights)


def _of_a_sequence(
    device: torch.device, dtype: torch.dtype, attention: float, *, bias: bool
) -> tuple[float, float]:
    """Seconds beside the operations' at the rate ``attention``: of any, and for a unit of width."""
    lengths = list(range(8, 72, 3))
    width = 64
    ends = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
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
                *(q, k, v, ends, ends, lengths[-1], lengths[-1]),
                causal=False,
                scale=width**-0.5,
                relative_bias=table,
            )
            torch.autograd.grad(out.sum(), (q, k, v) if table is None else (q, k, v, table))

        operations = 3 * 4 * heads * width * sum(length**2 for length in lengths)
        took = _best(partial(attend, *leaves), device) - operations / attention
        seconds[heads] = max(took, 0.0) / len(lengths)
    of_width = max(seconds[8] - seconds[2], 0.0) / ((8 - 2) * width)
    return max(seconds[2] - 2 * width * of_width, 0.0), of_width


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
