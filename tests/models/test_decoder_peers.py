"""The decoder with the weights of transformers' own models: the same logits."""

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tokenpack.models.decoder import DecoderConfig, DecoderForCausalLM

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16,
}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "rope_interleave": True,
    "rope_parameters": YARN,
}


def compare(theirs, ours):
    """Logits of a left-padded batch. GPT-2 counts positions only if they are given."""
    theirs.eval(), ours.eval()
    ours.load_state_dict(theirs.state_dict())
    torch.manual_seed(1)
    ids = torch.randint(60, (3, 24))
    mask = torch.ones_like(ids)
    mask[1, :10] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        want = theirs(ids, attention_mask=mask, position_ids=positions).logits
        got = ours(ids, attention_mask=mask).logits
    assert want.abs().max() > 0.5
    assert ((want - got).abs() * mask[..., None]).max() <= 1e-5


@pytest.mark.parametrize(
    "config_class, model_class, theirs, ours",
    [
        (LlamaConfig, LlamaForCausalLM, {}, {}),
        (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE}, {}),
        (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}, {}),
        (MistralConfig, MistralForCausalLM, {"sliding_window": 5}, {}),
        (
            *(MixtralConfig, MixtralForCausalLM),
            *({"num_local_experts": 4, "num_experts_per_tok": 2}, {"ffn_type": "moe"}),
        ),
        (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}, {"qk_norm": True}),
    ],
    ids=["llama", "llama-3-rope", "llama-biases", "mistral", "mixtral", "qwen3"],
)
def test_equal_with_the_same_state_dict(config_class, model_class, theirs, ours):
    torch.manual_seed(0)
    own = DecoderForCausalLM(DecoderConfig(**{**SIZES, **theirs, **ours}))
    compare(model_class(config_class(**{**SIZES, **theirs})), own)


def test_equal_to_deepseek_v3_with_dense_blocks():
    torch.manual_seed(0)
    theirs = DeepseekV3ForCausalLM(
        DeepseekV3Config(**{**SIZES, **MLA, "first_k_dense_replace": 2, "rms_norm_eps": 1e-6})
    )
    compare(
        theirs,
        DecoderForCausalLM(
            DecoderConfig(**{**SIZES, **MLA, "attention_type": "mla", "rms_norm_eps": 1e-6})
        ),
    )


def test_equal_to_gpt2():
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=60,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    ours = DecoderForCausalLM(
        DecoderConfig(
            vocab_size=60,
            dim=32,
            n_layers=2,
            n_heads=4,
            max_seq=64,
            ffn="ffn",
            hidden_act="gelu_new",
            norm="layernorm",
            eps=1e-5,
            pos_enc="learned",
            attention_bias=True,
            mlp_bias=True,
        )
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
    theirs.state_dict = lambda: renamed(GPT2LMHeadModel.state_dict(theirs))
    compare(theirs, ours)


def renamed(state):
    """GPT-2's weights under our names. Its linear layers are transposed, and q, k and v joined."""
    names = {
        "transformer.wte": "model.embed_tokens",
        "transformer.wpe": "model.embed_positions",
        "transformer.ln_f": "model.norm",
        "transformer.h": "model.layers",
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "attn.c_proj": "self_attn.o_proj",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    }
    out = {}
    for name, value in state.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if value.dim() == 2 and "layers" in name:
            value = value.t()
        if "c_attn" in name:
            for part, rows in zip("qkv", value.chunk(3)):
                out[name.replace("attn.c_attn", f"self_attn.{part}_proj")] = rows
        else:
            out[name] = value
    return out
