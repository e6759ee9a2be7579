"""How many tiles the loops of the attention kernels compute, counted in Triton's interpreter.

``TRITON_INTERPRET=1 python -m tests.kernels.loop_trips`` prints the counts of one sequence and head
as JSON, for each length, direction and kernel, with and without a bias. The loops are told apart by
what they do for each tile (`KINDS`).
"""

import collections
import json
import sys
from typing import Any

import torch

from tokenpack.kernels.attention import backward_kv, backward_q, forward, op

LENGTHS, HEAD_DIMS, REACH = (128, 512), (64, 128), 128
# A loop may read the bias table, hide scores, and read rows at the end of the sequence.
KINDS = ("table", "masks", "edge")
LOOPS = {
    "_attention_forward_kernel": (forward, "_attend_keys"),
    "_attention_backward_q_kernel": (backward_q, "_backward_keys"),
    "_attention_backward_kv_kernel": (backward_kv, "_backward_queries"),
}


def kind_of(table: object, masks: object, edge: object) -> str:
    """The name of a loop in the table of `make compile`."""
    found = [name for name, there in zip(KINDS, (table, masks, edge)) if there]
    return " + ".join(found) or "whole"


def counting(function: Any, counts: collections.Counter) -> Any:
    """``function``, adding the tiles of each call to ``counts``."""

    def value(number: Any) -> int:
        number = getattr(number, "value", number)
        return int(number.handle.data.item() if hasattr(number, "handle") else number)

    def counted(*args: Any) -> Any:
        tiles = next(one for one in args if hasattr(one, "TABLE"))
        shape, dkv = args[-1], function.__name__ == "_backward_queries"
        masks = value(tiles.MASKED)
        edge = value(args[-3]) if dkv else masks
        size = value(shape.QUERIES if dkv else shape.KEYS)
        number = max(0, -(-(value(tiles.last) - value(tiles.first)) // size))
        counts[kind_of(value(tiles.TABLE), masks, edge)] += number
        return function(*args)

    return counted


def trips(length: int, head_dim: int, causal: bool, bias: bool) -> dict[str, dict[str, int]]:
    """The tiles of each kind of loop of each kernel."""
    q = torch.randn(length, 1, head_dim, dtype=torch.float16)
    bounds = torch.tensor([0, length], dtype=torch.int32)
    table = torch.randn(1, 2 * REACH + 1) if bias else None
    rest = (bounds, bounds, table, None, 0.125, -1, 0 if causal else -1, 0.0, 0.0)
    counts = {kernel: collections.Counter() for kernel in LOOPS}
    originals = {kernel: getattr(*place) for kernel, place in LOOPS.items()}
    for kernel, place in LOOPS.items():
        setattr(*place, counting(originals[kernel], counts[kernel]))
    try:
        out, lse = op.varlen_attention_triton(q, q, q, *rest)
        op.varlen_attention_backward_triton(q, q, q, q, out, lse, *rest, bias)
    finally:
        for kernel, place in LOOPS.items():
            setattr(*place, originals[kernel])
    return counts


def main() -> None:
    """Print all counts."""
    found = [
        {"length": length, "head_dim": head_dim, "causal": causal, "bias": bias, "tiles": tiles}
        for length in LENGTHS
        for head_dim in HEAD_DIMS
        for causal in (False, True)
        for bias in (False, True)
        for tiles in [trips(length, head_dim, causal, bias)]
    ]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
