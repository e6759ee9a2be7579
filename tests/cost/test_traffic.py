"""Bytes counted on the meta device: linear in tokens, and proportional to the element size."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from tokenpack.cost import count_traffic, traffic

VOCAB, WIDTH, LAYERS = 96, 32, 2


def make_llama():
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def make_t5():
    config = T5Config(
        vocab_size=VOCAB,
        d_model=WIDTH,
        d_kv=16,
        d_ff=64,
        num_heads=2,
        num_layers=LAYERS,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def on_meta(make):
    with torch.device("meta"):
        return make()


@pytest.mark.parametrize("make", [make_llama, make_t5])
def test_other_sizes_are_predicted(make):
    model = on_meta(make)
    counted = count_traffic(model)
    with traffic.without_attention(model):
        counted_run = traffic._run(model, 40, 56)
    rows = traffic._ROWS
    encoder, decoder = (rows * 40, rows * 56) if make is make_t5 else (0, rows * 56)
    moved = (
        counted.moved_once
        + counted.moved_per_encoder_token * encoder
        + counted.moved_per_decoder_token * decoder
    )
    # Masks and T5's bias grow with the square of the length; they are a small part.
    assert moved == pytest.approx(counted_run.moved, rel=0.1)


def test_logits_and_dtype():
    single = count_traffic(on_meta(make_llama))
    assert single.logits_per_token == 4 * VOCAB
    # The loss reads and writes the logits several times, in float32 for every dtype.
    assert 4 < single.loss_moved_per_token / single.logits_per_token < 20
    half = count_traffic(on_meta(make_llama).to(torch.bfloat16))
    assert half.logits_per_token == 2 * VOCAB
    assert half.moved_per_decoder_token < 0.8 * single.moved_per_decoder_token
    assert single.moved_per_encoder_token == 0


def test_every_layer_moves_the_same():
    def with_layers(layers):
        config = make_llama().config
        config.num_hidden_layers = layers
        return count_traffic(on_meta(lambda: LlamaForCausalLM(config)))

    one, two, three = (with_layers(layers).moved_per_decoder_token for layers in (1, 2, 3))
    assert three - two == pytest.approx(two - one)
    # A layer reads and writes at least its residual stream and its MLP's activations.
    assert two - one > 2 * 4 * (WIDTH + 64)


def test_the_model_is_restored():
    model = on_meta(make_llama)
    model.config.use_cache = True
    count_traffic(model)
    assert model.config._attn_implementation == "sdpa"
    assert model.config.use_cache
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_with_weights_is_refused():
    with pytest.raises(ValueError, match="meta device"):
        count_traffic(make_llama())
