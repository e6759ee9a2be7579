"""What the compile gate compiles: each kernel, as its launcher launches it on a GPU."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from tokenpack.kernels import layout_from_lengths, layout_ops, loss, padding, reduction, tokens
from tokenpack.kernels.attention import op

from .yardstick import yardstick

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def layouts(dtype):
    small, large = torch.ones(8, 64), torch.ones(2048, 64)
    for mask in (small, small.to(dtype), small.long(), small.bool(), large.long()):
        layout_ops.mask_layout_triton(mask, None)
    lengths = torch.full((8,), 3)
    layout_ops.boundary_layout_triton(lengths, False, None, None)
    layout_ops.boundary_layout_triton(lengths, False, 24, 3)
    cu_seqlens = torch.arange(0, 27, 3, dtype=torch.int32)
    layout_ops.boundary_layout_triton(cu_seqlens, True, None, None)
    layout_ops.boundary_layout_triton(cu_seqlens, True, 24, 3)
    layout_ops.position_layout_triton(torch.zeros(64, dtype=torch.int64))
    layout_ops.position_layout_triton(torch.zeros(2**16 + 1, dtype=torch.int64))


def rows(dtype):
    layout = layout_from_lengths([16, 16])
    hidden, ids = torch.zeros(2, 16, 1024, dtype=dtype), torch.zeros(2, 16, dtype=torch.int64)
    for tensors in ([hidden, ids], [ids], [hidden], [hidden[..., :3]]):
        streams = padding.unpad_triton(tensors, layout.indices)
        fills = [0.0] * len(streams)
        padding.repad_triton(streams, layout.indices, 32, fills)
    for shift in (False, True):
        tokens.take_tokens_triton(ids, ids, layout.indices, shift)


def targets(dtype):
    labels, bounds = torch.zeros(64, dtype=torch.int64), torch.tensor([0, 64], dtype=torch.int32)
    for cu_seqlens, weights in ((None, None), (bounds, None), (bounds, torch.ones(1, dtype=dtype))):
        for shift in {cu_seqlens is not None, False}:
            for per_sequence in {cu_seqlens is not None, False}:
                reduction.token_targets_triton(
                    labels, cu_seqlens, weights, 32, shift, per_sequence, -100, torch.float32
                )


def losses(dtype):
    for classes in (1024, 8192):
        logits = torch.zeros(4, classes, dtype=dtype)
        target = torch.zeros(4, dtype=torch.int32)
        for smoothing, softcap, scale in ((0.0, 0.0, 1.0), (0.1, 30.0, 0.5)):
            options = (smoothing, 0.0, softcap, scale)
            token_loss, lse, _ = loss.cross_entropy_triton(logits, target, *options, False)
            arguments = (token_loss, logits, lse, target, *options)
            loss.cross_entropy_backward_triton(*arguments)
            loss.cross_entropy_backward_inplace_triton(*arguments)


ATTENTION = {  # kv_heads of 4, causal, bias, dropout, window, softcap
    "bias": (4, False, True, 0.0, (-1, -1), 0.0),
    "causal": (4, True, False, 0.0, (-1, -1), 0.0),
    "bias, grouped": (2, False, True, 0.0, (-1, -1), 0.0),
    "causal, grouped": (1, True, False, 0.0, (-1, -1), 0.0),
    "causal, dropout": (4, True, False, 0.1, (-1, -1), 0.0),
    "bias, causal, dropout": (4, True, True, 0.1, (-1, -1), 0.0),
    "everything": (2, False, True, 0.1, (9, 9), 3.0),
    "plain": (4, False, False, 0.0, (-1, -1), 0.0),
    "bias, causal": (4, True, True, 0.0, (-1, -1), 0.0),
}
# The kinds that have a tile of their own: the others are for what they do to the code.
ALL_TILES = ("bias", "causal", "causal, dropout", "bias, causal, dropout", "causal, grouped")
# With "bias" and "causal", the calls that `predicted` compares. No tile is chosen for these two.
FOR_PREDICTIONS = ("plain", "bias, causal")


# Grouped heads only change the kernel for the gradients of k and v. "everything" has the others.
ONLY = {kind: {"_attention_backward_kv_kernel"} for kind in ("bias, grouped", "causal, grouped")}


def attention(kind, head_dim):
    """A case for one row of the table of tiles and one kind of call."""
    kv_heads, causal, bias, dropout_p, (left, right), softcap = ATTENTION[kind]

    def case(dtype):
        q, k = (torch.zeros(64, heads, head_dim, dtype=dtype) for heads in (4, kv_heads))
        cu_seqlens = torch.tensor([0, 64], dtype=torch.int32)
        table, seed = torch.zeros(4, 257) if bias else None, torch.tensor([1])
        options = (0.125, left, 0 if causal else right, softcap, dropout_p)
        rest = (cu_seqlens, cu_seqlens, table, seed, *options)
        out, lse = op.varlen_attention_triton(q, k, k, *rest)
        op.varlen_attention_backward_triton(q, q, k, k, out, lse, *rest, bias)

    case.__name__ = f"attention, {kind}, {head_dim}"
    case.call = kind, head_dim
    case.only = ONLY.get(kind)
    return case


def attention_cases(target, dtype):
    """Every tile of the table of a target, or a selection for gfx942, which has no table.

    The tables have the same tiles for fp16 and bf16, and the kernels differ only in the type of
    their operands. So fp16 is compiled for one kind of call and one head_dim. In fp32, most kinds
    of call share a tile.
    """
    head_dims = (64, 96, 128, 256) if (target, dtype) == ("sm_90", "bf16") else (64, 128, 256)
    if dtype == "fp16":
        kinds, head_dims = ["bias, causal, dropout" if target == "sm_90" else "causal"], (64,)
    elif dtype == "bf16":
        tuned = [kind for kind in ATTENTION if kind not in FOR_PREDICTIONS]
        kinds = tuned if target == "sm_90" else [*ALL_TILES]
    else:
        kinds = ["bias", "causal", "bias, causal, dropout", "causal, grouped"]
    if target == "gfx942":
        kinds = kinds[:2]
    elif target != "sm_90" and dtype == "fp32":
        kinds = ["bias", "causal, grouped"]
    return [attention(kind, head_dim) for kind in kinds for head_dim in head_dims]


class Job(NamedTuple):
    """A case to compile for one target, with each of the dtypes."""

    target: str
    dtypes: list[str]
    case: Callable[[torch.dtype], None]


def all_jobs() -> list[Job]:
    """The longest jobs come first, so that all processes finish at about the same time.

    Many kernels of the other ops are the same for all dtypes. One job has all dtypes, so that it
    compiles and reads such a kernel once.
    """
    by_kind = [
        Job(target, [dtype], case)
        for target in TARGETS
        for dtype in DTYPES
        for case in attention_cases(target, dtype)
    ]
    by_kind.sort(key=lambda job: -job.case.__name__.count(", "))
    others = [
        Job(target, list(DTYPES), case)
        for target in TARGETS
        for case in (layouts, rows, targets, losses)
    ]
    compared = [attention(kind, width) for kind in FOR_PREDICTIONS for width in (64, 128)]
    compared += [yardstick(width) for width in (64, 128)]
    return others + by_kind + [Job("sm_90", ["bf16"], case) for case in compared]


def checked_jobs() -> list[Job]:
    """The jobs of `make compile-check`.

    Of attention, sm_90 has three kinds of call with a head_dim of 64, one
    with each other head_dim, and one fp32 call. The other targets have one attention call, and bf16
    for the other ops. The yardstick is not among them: the table has its counts.
    """
    tuned = {(kind, 64, "bf16") for kind in ("bias", "causal", "bias, causal, dropout")}
    tuned |= {("causal, grouped", 128, "bf16"), ("bias", 64, "fp32"), ("everything", 256, "bf16")}
    elsewhere = {("bias", 64, "bf16")}
    jobs = []
    for job in all_jobs():
        call = getattr(job.case, "call", None)
        if job.case.__name__.startswith("yardstick"):
            continue
        if call is None:
            jobs.append(job if job.target == "sm_90" else job._replace(dtypes=["bf16"]))
        elif (*call, *job.dtypes) in (tuned if job.target == "sm_90" else elsewhere):
            jobs.append(job)
    return jobs
