"""Run an LM head over the tokens that have a target, chunk by chunk.

The parts that both ops of `linear_loss` share: which rows are in a chunk, the logits of a chunk,
and the sums over chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ._ops import run
from .loss import Options, cross_entropy

Rows = slice | Tensor | None
"""The rows of a chunk. None stands for all rows, which need no copy."""


class TokenResults:
    """The loss of each token, and whether its target has the largest logit, after all chunks."""

    token_loss: Tensor
    correct: Tensor

    def allocate(self, hidden: Tensor, compute: torch.dtype, zeros: bool) -> None:
        self.token_loss, self.correct = new_rows(hidden, compute)
        if zeros:
            self.token_loss.zero_()
            self.correct.zero_()


def logits_by_chunk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: Options,
    compute: torch.dtype,
    num_valid: int | None,
    results: TokenResults,
) -> Iterator[tuple[Rows, Tensor, Tensor, Tensor, Tensor]]:
    """Fill ``results``, chunk by chunk of the tokens that have a target.

    Yields for each chunk: its rows, the ``(rows, hidden_size)`` inputs, the weight of the head, the
    ``(rows, num_classes)`` logits, which the caller may overwrite, and their ``(rows,)`` logsumexp.
    """
    matrix = weight.to(compute)
    offset = None if bias is None else bias.to(compute)
    memory = None  # reused by all chunks, so that only one chunk of logits exists
    chunks = _split(targets, num_valid, _rows_per_chunk(hidden, weight))
    if chunks != [None]:  # some tokens may be in no chunk
        results.allocate(hidden, compute, zeros=not chunks or isinstance(chunks[0], Tensor))
    for rows in chunks:
        inputs = of_rows(hidden, rows).to(compute)
        if memory is None:  # no later chunk is larger than the first
            memory = logits = inputs.new_empty(inputs.shape[0], weight.shape[0])
        else:
            logits = memory[: inputs.shape[0]]
        if offset is None:
            torch.mm(inputs, matrix.mT, out=logits)
        else:
            torch.addmm(offset, inputs, matrix.mT, out=logits)
        losses, lse, correct = run(cross_entropy, logits, of_rows(targets, rows), *options, False)
        if rows is None:
            results.token_loss, results.correct = losses, correct
        else:
            results.token_loss[rows], results.correct[rows] = losses, correct
        yield rows, inputs, matrix, logits, lse


def of_rows(tensor: Tensor, rows: Rows) -> Tensor:
    """The rows of a chunk."""
    return tensor if rows is None else tensor[rows]


def without_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Disable autocast: inputs are already in its dtype, and float32 sums must stay float32."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _split(targets: Tensor, num_valid: int | None, at_most: int) -> list[Any]:
    """The `Rows` of chunks of equal size, which are the tokens that have a target.

    If all tokens have one, the chunks are slices, which select rows without a copy. Few tokens are
    one chunk of all rows: a product with them takes as long as reading the weight.
    """
    total = targets.numel()
    if num_valid == 0:
        return []
    if 0 < total <= _few_rows(targets.device.type):
        return [None]
    if num_valid is None:
        rows = (targets >= 0).nonzero().squeeze(1)  # waits for the device
        num_valid = rows.numel()
    elif num_valid < total:
        rows = torch.nonzero_static(targets >= 0, size=num_valid).squeeze(1)
    if num_valid == 0:
        return []
    num_chunks = -(-num_valid // at_most)
    size = -(-num_valid // num_chunks)
    if num_valid < total:
        return list(rows.split(size))
    if num_chunks == 1:
        return [None]
    return [slice(first, min(first + size, total)) for first in range(0, total, size)]


def check_count(targets: Tensor, num_valid: int | None) -> None:
    """Raise ValueError unless ``num_valid`` targets are classes; on a GPU, assert it there."""
    if num_valid is None:
        return
    found = (targets >= 0).sum()
    message = "num_valid must be the number of tokens with a target"
    if not found.is_cpu:
        torch._assert_async(found == num_valid, f"{message}, got {num_valid}")
    elif int(found) != num_valid:
        raise ValueError(f"{message}, got {num_valid} for {int(found)}")


def smallest_chunk(device_type: str) -> int:
    """Minimum number of rows per chunk of `packed_linear_cross_entropy`."""
    return 256 if device_type == "cpu" else 1024


def _few_rows(device_type: str) -> int:
    """Up to how many rows a product with the weight is memory-bound, see `_rows_per_chunk`."""
    return 32 if device_type == "cpu" else 1024


def _rows_per_chunk(hidden: Tensor, weight: Tensor) -> int:
    """Rows per chunk, so that its logits take about as much memory as the hidden states.

    The minimum keeps the products compute-bound. Adding a chunk to the gradient of the weight moves
    8 bytes per element and takes 2 operations per element and row. With fewer than
    4 * (operations per second) / (bytes per second) rows, it is memory-bound. That is about 30
    rows on a CPU core, and 1,000 on a GPU with 16-bit matrix units.
    """
    return max(smallest_chunk(hidden.device.type), hidden.numel() // weight.shape[0])


_SLICE = 4096  # classes of a 16-bit gradient that are cast to float32 at a time


def add_product(total: Tensor, dlogits: Tensor, inputs: Tensor, is_first: bool) -> None:
    """``total += dlogits.T @ inputs``, without rounding the product to 16 bits.

    If ``is_first``, the total has no values yet. With a beta of 0, PyTorch does not read it.
    """
    beta = 0 if is_first else 1
    if dlogits.dtype == total.dtype:
        total.addmm_(dlogits.mT, inputs, beta=beta)
        return
    mm_casts = dlogits.is_cuda and torch.version.cuda is not None  # torch.mm(out_dtype=) works
    if not mm_casts:
        inputs = inputs.to(total.dtype)
    for part, columns in zip(total.split(_SLICE), dlogits.split(_SLICE, dim=1), strict=True):
        if mm_casts:
            product = torch.mm(columns.mT, inputs, out_dtype=total.dtype)
            (part.copy_ if is_first else part.add_)(product)
        else:
            part.addmm_(columns.mT.to(total.dtype), inputs, beta=beta)


def new_rows(hidden: Tensor, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """New tensors for the loss of each token and ``correct``."""
    token_loss = hidden.new_empty(
        hidden.shape[0], dtype=torch.promote_types(compute, torch.float32)
    )
    return token_loss, torch.empty_like(token_loss, dtype=torch.bool)


def new_gradients(
    hidden: Tensor, weight: Tensor, compute: torch.dtype, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """New tensors for the gradients of hidden, weight and bias, empty where none is needed."""
    wide = torch.promote_types(compute, torch.float32)
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    dtypes = hidden.dtype, wide, wide
    dhidden, dweight, dbias = (
        hidden.new_empty(shape if needed else (0,), dtype=dtype)
        for shape, dtype, needed in zip(shapes, dtypes, needs, strict=True)
    )
    return dhidden, dweight, dbias
