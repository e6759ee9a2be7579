"""Every decoder-only family takes embeddings, boundaries and positions of the caller's own."""

import pytest
import torch

from tokenpack import packing_stats, patch_model
from tokenpack.models.decoder import DecoderConfig, DecoderForCausalLM

from .models import CASES, LLAMA, T5

DECODERS = [case for case in CASES if case.kind == "decoder-only" and case.labels == "causal"]
LENGTHS = [7, 1, 12]
# Positions that do not count up: they never begin a sequence where boundaries are given.
POSITIONS = [torch.arange(n) * 3 % 17 for n in LENGTHS]


def decoder_of_our_own(dtype):
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=97, dim=32, n_layers=2, n_heads=4, attn="gqa", n_kv_heads=2, max_seq=64
    )
    return DecoderForCausalLM(config).to(dtype)


def logits_and_gradient(model, embeddings, **options):
    """Logits, and the gradient of a weighted sum of them by the embeddings."""
    embeddings = embeddings.detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, **options).logits
    weights = torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)
    (gradient,) = torch.autograd.grad((logits.tanh() * weights).sum(), embeddings)
    return logits, gradient


def one_by_one(model, embeddings):
    """Each sequence alone, with a mask of ones, so that positions do not split it."""
    found = []
    for part, positions in zip(embeddings.split(LENGTHS, 1), POSITIONS):
        ones = torch.ones(1, len(positions), dtype=torch.long)
        options = {"attention_mask": ones, "position_ids": positions[None], "use_cache": False}
        found.append(logits_and_gradient(model, part, **options))
    return [torch.cat(parts, 1) for parts in zip(*found)]


def check(model, expected, embeddings, tolerance):
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    options = {"cu_seqlens": cu_seqlens, "position_ids": torch.cat(POSITIONS)[None]}
    for ours, theirs in zip(logits_and_gradient(model, embeddings, **options), expected):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("case", DECODERS, ids=lambda case: case.model)
def test_embeddings_with_boundaries_and_positions(case):
    """In evaluation mode, where the model's own forward would return a cache."""
    dtype = torch.float64 if case.float64 else torch.float32
    model = case.build(dtype).eval()
    torch.manual_seed(1)
    embeddings = torch.randn(1, sum(LENGTHS), model.get_input_embeddings().embedding_dim).to(dtype)
    expected = one_by_one(model, embeddings)
    patch_model(model)
    # Gemma2 and experts cast to float32 inside.
    tolerance = 1e-12 if case.float64 and not case.float32_loss else 1e-5
    check(model, expected, embeddings, tolerance if case.family != "Gemma2" else 1e-5)
    assert packing_stats(model).fallbacks == {}
    assert packing_stats(model).packed_tokens == packing_stats(model).padded_tokens


def test_embeddings_for_our_own_decoder():
    model = decoder_of_our_own(torch.float64).eval()
    embeddings = torch.randn(1, sum(LENGTHS), 32, dtype=torch.float64)
    check(model, one_by_one(model, embeddings), embeddings, 1e-12)


def test_a_cache_that_is_asked_for_is_an_error():
    model = patch_model(LLAMA.build()).eval()
    ids, cu_seqlens = torch.randint(3, 97, (1, 10)), torch.tensor([0, 4, 10])
    with pytest.raises(ValueError, match="a cache is in use"):
        model(input_ids=ids, cu_seqlens=cu_seqlens, use_cache=True)


def test_packed_embeddings_of_an_encoder_decoder():
    model = T5.build(torch.float64).eval()
    patch_model(model)
    ids, labels = torch.randint(3, 97, (1, 10)), torch.randint(3, 97, (1, 6))
    boundaries = {
        "cu_seqlens": torch.tensor([0, 4, 10]),
        "decoder_cu_seqlens": torch.tensor([0, 2, 6]),
    }
    expected = model(input_ids=ids, labels=labels, **boundaries).loss
    embeddings = model.get_input_embeddings()(ids)
    loss = model(inputs_embeds=embeddings, labels=labels, **boundaries).loss
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
