"""All combinations of the decoder's options, tiny: what must hold for each.

`python -m tests.models.grid` checks the full grid in float32 and float64 and prints the largest
errors. The test suite checks a part in which every pair of options occurs.
"""

from __future__ import annotations

import itertools
import sys
import time
from typing import NamedTuple

import torch
from torch import Tensor

from tokenpack.models.decoder import DecoderConfig, DecoderForCausalLM
from tokenpack.models.decoder.configuration import (
    ATTENTION_TYPES,
    FFN_TYPES,
    NORM_TYPES,
    POSITION_TYPES,
)

VOCAB, LENGTHS = 50, (5, 1, 9)


class Options(NamedTuple):
    """One point of the grid."""

    attention: str = "gqa"
    positions: str = "rope"
    norm: str = "rmsnorm"
    ffn: str = "swiglu"
    norm_position: str = "pre"


AXES = (ATTENTION_TYPES, POSITION_TYPES, NORM_TYPES, FFN_TYPES, ("pre", "post"))


def full_grid() -> list[Options]:
    return [Options(*point) for point in itertools.product(*AXES)]


def pairs_of(point: Options) -> set[tuple]:
    return set(itertools.combinations(enumerate(point), 2))


def covering_grid() -> list[Options]:
    """Few points in which every pair of options occurs, chosen greedily."""
    missing = set().union(*map(pairs_of, full_grid()))
    points, chosen = full_grid(), []
    while missing:
        best = max(points, key=lambda point: len(pairs_of(point) & missing))
        chosen.append(best)
        missing -= pairs_of(best)
    return chosen


DEFAULT = Options()


def make_model(options: Options = DEFAULT, **changes) -> DecoderForCausalLM:
    """A tiny model whose weights are large enough for attention to matter."""
    config = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if options.attention == "gqa" else None,
        "attention_type": options.attention,
        "position_embedding_type": options.positions,
        "norm_type": options.norm,
        "norm_position": options.norm_position,
        "ffn_type": options.ffn,
        "intermediate_size": 24,
        "num_local_experts": 4,
        "max_position_embeddings": 32,
        "initializer_range": 0.3,
        "allow_noncausal_routing": options.ffn == "moe_ec",
    }
    torch.manual_seed(0)
    return DecoderForCausalLM(DecoderConfig(**{**config, **changes})).eval()


class Batch(NamedTuple):
    """The same sequences: padded right, padded left, and as a stream."""

    ids: Tensor
    mask: Tensor
    left_ids: Tensor
    left_mask: Tensor
    stream: Tensor
    cu_seqlens: Tensor

    def sequence(self, at: int) -> Tensor:
        return self.stream[:, self.cu_seqlens[at] : self.cu_seqlens[at + 1]]


def make_batch(lengths=LENGTHS) -> Batch:
    generator = torch.Generator().manual_seed(1)
    columns = max(lengths)
    ids = torch.randint(VOCAB, (len(lengths), columns), generator=generator)
    mask = torch.arange(columns)[None] < torch.tensor(lengths)[:, None]
    left = torch.stack([row.roll(columns - n) for row, n in zip(ids, lengths)])
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return Batch(ids, mask, left, mask.flip(1), ids[mask][None], offsets)


def forms(batch: Batch) -> dict[str, dict[str, Tensor]]:
    """The arguments of each form of the batch, with labels."""
    right, left = ~batch.mask, ~batch.left_mask
    return {
        "right": {
            "input_ids": batch.ids,
            "attention_mask": batch.mask.long(),
            "labels": batch.ids.masked_fill(right, -100),
        },
        "left": {
            "input_ids": batch.left_ids,
            "attention_mask": batch.left_mask.long(),
            "labels": batch.left_ids.masked_fill(left, -100),
        },
        "stream": {
            "input_ids": batch.stream,
            "cu_seqlens": batch.cu_seqlens,
            "labels": batch.stream,
        },
    }


def real_logits(form: str, logits: Tensor, batch: Batch) -> Tensor:
    """``(total_tokens, vocab)``, sequence by sequence."""
    masks = {"right": batch.mask, "left": batch.left_mask}
    return logits[masks[form]] if form in masks else logits[0]


def alone(model: DecoderForCausalLM, batch: Batch) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Logits, loss and gradients from each sequence by itself."""
    num_items = int(batch.cu_seqlens[-1]) - len(LENGTHS)
    outputs = [
        model(batch.sequence(at), labels=batch.sequence(at), num_items_in_batch=num_items)
        for at in range(len(LENGTHS))
    ]
    loss = sum(out.loss for out in outputs)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([out.logits[0] for out in outputs]), loss, gradients


def rounding_error(options: Options) -> float:
    """What float32 rounds: the error of each sequence by itself against float64."""
    batch = make_batch()
    (logits, loss, gradients), exact = (
        alone(make_model(options).to(dtype), batch) for dtype in (torch.float32, torch.float64)
    )
    scale = max(gradient.abs().max() for gradient in exact[2])
    errors = [(logits - exact[0]).abs().max(), (loss - exact[1]).abs()]
    errors += [(got - want).abs().max() / scale for got, want in zip(gradients, exact[2])]
    return max(float(error.detach()) for error in errors)


def largest_error(options: Options, dtype: torch.dtype) -> float:
    """The largest difference of each form from each sequence alone: logits, loss and gradients.

    Gradients are compared relative to the largest of the model.
    """
    model, batch = make_model(options).to(dtype), make_batch()
    parameters = list(model.parameters())
    expected, loss, gradients = alone(model, batch)
    scale = max(gradient.abs().max() for gradient in gradients)
    errors = []
    for form, arguments in forms(batch).items():
        out = model(**arguments)
        errors.append((real_logits(form, out.logits, batch) - expected).abs().max())
        losses = [out.loss]
        if form == "right":  # without logits, the head computes the loss
            losses.append(model(**arguments, return_logits=False).loss)
        for got_loss in losses:
            errors.append((got_loss - loss).abs())
            for got, want in zip(torch.autograd.grad(got_loss, parameters), gradients):
                errors.append((got - want).abs().max() / scale)
    return max(float(error.detach()) for error in errors)


def generates_the_same(options: Options) -> bool:
    """Whether greedy ``generate`` returns the same tokens with and without a cache."""
    model, batch = make_model(options, token_choice_at_inference=True).double(), make_batch()
    mask = batch.left_mask.long()
    keywords = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    cached, full = (
        model.generate(batch.left_ids, attention_mask=mask, use_cache=use_cache, **keywords)
        for use_cache in (True, False)
    )
    return torch.equal(cached, full)


def decoding_error(options: Options) -> float:
    """The largest difference of logits in cached and in full decoding, in float64, padded left."""
    model, batch = make_model(options, token_choice_at_inference=True).double(), make_batch()
    ids, mask = batch.left_ids, batch.left_mask.long()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        cache, logits = None, []
        for first, last in ((0, 6), (6, 8), (8, 9)):  # a prompt, two tokens, one token
            out = model(ids[:, first:last], attention_mask=mask[:, :last], past_key_values=cache)
            cache = out.past_key_values
            logits.append(out.logits)
    error = (torch.cat(logits, dim=1) - expected).abs() * mask[..., None]
    return float(error.max())


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def main() -> None:
    """Check the full grid."""
    started, failed, worst = time.time(), [], dict.fromkeys(TOLERANCE, 0.0)
    worst_cached = 0.0
    points = full_grid()
    for options in points:
        for dtype, tolerance in TOLERANCE.items():
            error = largest_error(options, dtype)
            worst[dtype] = max(worst[dtype], error)
            if error <= tolerance:
                continue
            # Gradients of some points are ill-conditioned, so float32 itself rounds more.
            own = rounding_error(options) if dtype == torch.float32 else 0.0
            if error <= 3 * own:
                print(f"{options}: {error:.1e}, where float32 rounds by {own:.1e}")
            else:
                failed.append((options, dtype, error))
        cached = decoding_error(options)
        worst_cached = max(worst_cached, cached)
        if not cached <= 1e-10 or not generates_the_same(options):
            failed.append((options, "generation", cached))
    for failure in failed:
        print(*failure)
    print(f"{len(points)} combinations in {time.time() - started:.0f} s, {len(failed)} failures")
    print("packed, padded left and right against each sequence alone:")
    for dtype, error in worst.items():
        print(f"    {dtype}: {error:.1e} (at most {TOLERANCE[dtype]:.0e}, but for those above)")
    print(f"cached against full decoding, torch.float64: {worst_cached:.1e}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
