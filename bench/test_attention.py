"""Packed attention beside what a user would otherwise run, in one layer and in training a T5.

One layer, beside padded attention at its best setting, PyTorch's fused kernel, and FlexAttention
on the packed stream. Padded causal attention needs no mask where padding is on the right, so it
gets none. A bias must be dense there, with the padding mask in it. It is given as models have it,
built before the first layer; the others take the table that it would be built from. All have its
gradient. Floating-point operations are those of real tokens in sight, whoever computes more.

A training step (forward, backward, AdamW) of a T5 with its own dropout, padded and patched. Its
peak memory is what is allocated beyond parameters and the optimizer's states.
"""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import T5Config, T5ForConditionalGeneration

from tokenpack import packing_stats, patch_model
from tokenpack.attention import packed_attention
from tokenpack.kernels import layout_from_mask, unpad

from .common import DEVICE, DTYPE, ON_GPU, make_batch, measure, peak_memory

ROWS, LONGEST, HEADS = (32, 2048, 16) if ON_GPU else (16, 256, 4)
HEAD_DIMS = [64, 128] if ON_GPU else [64]
REACH = 128
BATCH = make_batch(ROWS, LONGEST)
LAYOUT = layout_from_mask(BATCH.mask)

# On a CPU "auto" is the reference, and all that there is.
CONTENDERS = ["padded", "packed, FlexAttention", "packed, reference"]
CONTENDERS += ["packed, auto", "packed, torch", "packed, triton"] * ON_GPU

pytestmark = pytest.mark.benchmark(max_time=0.5)


def _dense(table, causal):
    """``(rows, heads, columns, columns)`` from ``(heads, 2 * REACH + 1)``, padding at -inf."""
    places = torch.arange(LONGEST, device=DEVICE)
    distance = places - places[:, None]
    hidden = ~BATCH.mask[:, None, None, :] | (causal & (distance > 0))
    bias = table[:, distance.clamp(-REACH, REACH) + REACH]
    return bias.masked_fill(hidden, float("-inf"))


def _padded(head_dim, causal, table):
    q, k, v = (side.requires_grad_() for side in _sides(head_dim))
    mask = None if causal else BATCH.mask[:, None, None, :]
    if table is not None:
        mask = _dense(table, causal).requires_grad_()

    def forward():
        return scaled_dot_product_attention(
            *(side.transpose(1, 2) for side in (q, k, v)),
            attn_mask=mask,
            is_causal=mask is None,
        )

    return forward, [q, k, v] + [mask] * (table is not None)


def _packed(head_dim, causal, table, backend):
    sides = [side.requires_grad_() for side in unpad(_sides(head_dim), LAYOUT)]
    if table is not None:
        table.requires_grad_()
    offsets = (LAYOUT.cu_seqlens, LAYOUT.cu_seqlens)
    options = {"causal": causal, "relative_bias": table}

    longest = (LAYOUT.max_seqlen, LAYOUT.max_seqlen)

    def forward():
        return packed_attention(
            *sides, *offsets, *longest, scale=head_dim**-0.5, backend=backend, **options
        )[0]

    return forward, sides + [table] * (table is not None)


def _flex(head_dim, causal, table):
    """One row of all tokens, where those of other documents are out of sight."""
    sides = [side.requires_grad_() for side in unpad(_sides(head_dim), LAYOUT)]
    if table is not None:
        table.requires_grad_()
    documents = torch.repeat_interleave(BATCH.lengths)

    def in_sight(row, head, m, n):
        same = documents[m] == documents[n]
        return same & (m >= n) if causal else same

    def biased(score, row, head, m, n):
        return score + table[head, (n - m).clamp(-REACH, REACH) + REACH]

    total = LAYOUT.total_tokens
    mask = create_block_mask(in_sight, None, None, total, total, device=DEVICE)
    attend = torch.compile(flex_attention, dynamic=False)

    def forward():
        heads_first = (side[None].transpose(1, 2) for side in sides)
        score_mod = None if table is None else biased
        return attend(*heads_first, score_mod=score_mod, block_mask=mask)

    return forward, sides + [table] * (table is not None)


def _sides(head_dim):
    shape = (ROWS, LONGEST, HEADS, head_dim)
    return [torch.randn(shape, dtype=DTYPE, device=DEVICE) for _ in range(3)]


def _operations(head_dim, causal, both):
    """Of two products in the forward and five in the backward."""
    pairs = BATCH.lengths.double().square().sum().item()
    if causal:
        pairs = (pairs + LAYOUT.total_tokens) / 2
    return 2 * (7 if both else 2) * pairs * HEADS * head_dim


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("bias", ["no bias", "relative bias"])
@pytest.mark.parametrize("direction", ["both ways", "causal"])
@pytest.mark.parametrize("passes", ["forward", "forward and backward"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_attention(benchmark, head_dim, passes, direction, bias, contender):
    """One layer's attention over one batch."""
    if contender == "packed, FlexAttention" and not ON_GPU:
        pytest.skip("FlexAttention has no backward on a CPU")
    if contender == "packed, torch" and bias == "relative bias":
        pytest.skip("PyTorch's varlen attention has no bias")
    benchmark.group = f"attention, head_dim {head_dim}, {direction}, {bias}, {passes}"
    table = None
    if bias == "relative bias":
        table = torch.randn(HEADS, 2 * REACH + 1, dtype=DTYPE, device=DEVICE)
    causal = direction == "causal"
    if contender == "padded":
        forward, inputs = _padded(head_dim, causal, table)
    elif contender == "packed, FlexAttention":
        forward, inputs = _flex(head_dim, causal, table)
    else:
        backend = contender.removeprefix("packed, ")
        forward, inputs = _packed(head_dim, causal, table, backend)
    incoming = torch.ones_like(forward())

    def forward_alone():
        with torch.no_grad():
            forward()

    def forward_and_backward():
        torch.autograd.grad(forward(), inputs, incoming)

    both = passes == "forward and backward"
    measure(benchmark, forward_and_backward if both else forward_alone, batch=BATCH)
    if benchmark.stats is not None:
        rate = _operations(head_dim, causal, both) / benchmark.stats.stats.median
        benchmark.extra_info["TFLOP/s"] = round(rate / 1e12, 3)


# ------------------------------------------------------------------------------------- a whole T5

T5_ROWS, T5_LONGEST = (32, 1024) if ON_GPU else (8, 128)
T5_SIZE = (
    {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}  # T5-base
    if ON_GPU
    else {"d_model": 128, "d_ff": 256, "num_layers": 2, "num_heads": 4, "vocab_size": 1000}
)
T5_CONTENDERS = {"padded, eager": "eager", "padded, SDPA": "sdpa", "packed": "sdpa"}


@pytest.mark.parametrize("by", T5_CONTENDERS)
def test_t5_training_step(benchmark, by):
    """Sources of log-normal lengths, targets a quarter as long."""
    benchmark.group = f"{'T5-base' if ON_GPU else 'small T5'} training step"
    torch.manual_seed(0)
    config = T5Config(d_kv=64, decoder_start_token_id=0, **T5_SIZE)
    config._attn_implementation = T5_CONTENDERS[by]
    model = T5ForConditionalGeneration(config).to(DEVICE).train()
    if by == "packed":
        patch_model(model)
    optimizer = torch.optim.AdamW(model.parameters())
    source, target = (make_batch(T5_ROWS, longest) for longest in (T5_LONGEST, T5_LONGEST // 4))
    ids, labels = (
        torch.randint(2, config.vocab_size, side.mask.shape, device=DEVICE)
        for side in (source, target)
    )
    inputs = {
        "input_ids": ids.masked_fill(~source.mask, 0),
        "attention_mask": source.mask.long(),
        "labels": labels.masked_fill(~target.mask, -100),
    }

    def step():
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_GPU):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()

    step()  # compiles, and makes the optimizer's states
    optimizer.zero_grad()
    peak = peak_memory(step)
    measure(benchmark, step, batch=source)
    if by == "packed":
        assert not packing_stats(model).fallbacks
    notes = benchmark.extra_info
    notes["dtype"] = "bf16 autocast" if ON_GPU else "torch.float32"
    notes["peak memory, MiB"] = round(peak / 2**20)
    if benchmark.stats is not None:
        tokens = int(source.lengths.sum() + target.lengths.sum())
        notes["tokens/s"] = round(tokens / benchmark.stats.stats.median)
