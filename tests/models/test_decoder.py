"""The decoder: what its configuration refuses, its inputs, its positions, experts and losses."""

import json
import math

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.activations import ACT2FN
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from tokenpack import patch_model
from tokenpack.cost.allocations import allocations
from tokenpack.data import PackedBatch, packed_collate_fn
from tokenpack.models.decoder import DecoderConfig, DecoderForCausalLM, DecoderModel, gate
from tokenpack.models.decoder.layers import alibi_slopes
from tokenpack.models.decoder.routing import balance_loss, choices_per_expert

from .grid import VOCAB, Options, forms, make_batch, make_model, real_logits

# ---------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"dim": 48, "n_heads": 6, "n_kv_heads": 4},
            "num_attention_heads must be divisible by num_key_value",
        ),
        ({"attn": "gqa"}, "num_key_value_heads must be given"),
        ({"attn": "mha", "n_kv_heads": 2}, "num_key_value_heads must be 8"),
        ({"attn": "linear"}, "attention_type must be one of"),
        ({"pos_enc": "xpos"}, "position_embedding_type must be one of"),
        ({"ffn": "mlp"}, "ffn_type must be one of"),
        ({"norm": "batchnorm"}, "norm_type must be one of"),
        ({"norm_position": "both"}, "norm_position must be one of"),
        ({"n_heads": 7}, "hidden_size must be divisible by num_attention_heads"),
        ({"head_dim": 5}, "head_dim must be even for RoPE"),
        ({"latent_dim": 64}, r"kv_lora_rank \(latent_dim\) belongs to .*: leave it out"),
        ({"attn": "mla", "qk_norm": True}, "qk_norm must be False"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"ffn": "moe", "top_k": 9}, "num_experts_per_tok must be at most"),
        ({"ffn": "moe", "mlp_bias": True}, "mlp_bias must be False"),
        ({"ffn": "moe_ec"}, "allow_noncausal_routing must be True"),
        ({"ffn": "moe_shared", "n_experts": 9, "moe_n_routed": 6}, "n_experts must be moe_n_rout"),
        ({"dim": 64, "hidden_size": 32}, "dim and hidden_size are one setting"),
        ({"dropout": 1.0}, "hidden_dropout must be from 0 to below 1"),
        ({"attention_backend": "sdpa"}, "attention must be one of"),
        ({"n_layers": 0}, "num_hidden_layers must be at least 1"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(values, message):
    with pytest.raises(Exception, match=message) as error:
        DecoderConfig(**values)
    assert isinstance(error.value.__cause__ or error.value, ValueError)


def test_names_of_other_toolkits():
    config = DecoderConfig(
        vocab_size=100,
        dim=48,
        n_layers=3,
        n_heads=4,
        max_seq=64,
        attn="flash",
        ffn="moe_shared",
        hidden_dim=96,
        n_experts=8,
        top_k=3,
        moe_aux_weight=0.02,
        moe_n_shared=2,
        moe_n_routed=6,
        norm="layernorm",
        eps=1e-5,
        pos_enc="alibi",
        dropout=0.1,
        tie_weights=False,
    )
    got = (config.hidden_size, config.attention_type, config.num_local_experts)
    assert got == (48, "mha", 6)
    assert (config.num_experts_per_tok, config.n_shared_experts) == (3, 2)
    assert (config.attention_dropout, config.router_aux_loss_coef) == (0.1, 0.02)
    assert (config.tie_word_embeddings, config.max_seq, config.n_experts) == (False, 64, 6)
    assert DecoderConfig(**config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize("heads, attention", [(None, "mha"), (8, "mha"), (2, "gqa"), (1, "mqa")])
def test_key_value_heads_name_the_attention(heads, attention):
    assert DecoderConfig(n_kv_heads=heads).attention_type == attention


def test_saved_and_loaded_by_the_auto_classes(tmp_path):
    options = Options(attention="mla", ffn="moe_shared", positions="learned", norm="layernorm")
    model, batch = make_model(options, router_bias_update_rate=0.1), make_batch()
    model.model.layers[0].mlp.gate.e_score_correction_bias[1] = 0.5
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is DecoderConfig
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is DecoderForCausalLM
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    base = AutoModel.from_pretrained(tmp_path).eval()
    assert type(base) is DecoderModel
    with torch.no_grad():
        want = model(batch.ids, batch.mask, output_hidden_states=True)
        assert torch.equal(loaded(batch.ids, batch.mask).logits, want.logits)
        hidden = base(batch.ids, batch.mask).last_hidden_state
    assert torch.equal(hidden, want.hidden_states[-1])
    assert hidden.shape == (3, 9, 16)


def test_what_is_saved_loads_without_this_package_being_imported(tmp_path):
    """As transformers loads a custom model: by the file that config.json names."""
    DecoderConfig.register_for_auto_class()
    DecoderForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    make_model().save_pretrained(tmp_path)
    names = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    classes = {"AutoConfig": DecoderConfig, "AutoModelForCausalLM": DecoderForCausalLM}
    for auto_class, loaded in {**classes, "AutoModel": DecoderModel}.items():
        assert get_class_from_dynamic_module(names[auto_class], tmp_path) is loaded
    (tmp_path / "other").mkdir()
    make_model().save_pretrained(tmp_path / "other", is_main_process=False)
    assert not list((tmp_path / "other").iterdir())
    DecoderConfig().save_pretrained(tmp_path / "config")  # a configuration alone
    assert (tmp_path / "config" / "tokenpack_decoder.py").is_file()


# ------------------------------------------------------------------------------------- first loss


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("positions", ["rope", "sinusoidal", "learned"])
def test_the_first_loss_is_close_to_that_of_a_uniform_guess(positions, norm_position, tied):
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=500,
        dim=512,
        n_layers=1,
        n_heads=4,
        hidden_dim=64,
        pos_enc=positions,
        norm_position=norm_position,
        tie_weights=tied,
    )
    ids = torch.randint(500, (1, 64))
    with torch.no_grad():
        loss = DecoderForCausalLM(config)(ids, labels=ids).loss
    assert abs(loss - math.log(500)) < 0.2


# -------------------------------------------------------------------------------------- positions


def test_rotations_and_balancing_bias_stay_in_float32():
    model = make_model(Options(ffn="moe"), router_bias_update_rate=1e-3)
    rope, gate = model.model.rotary_emb, model.model.layers[0].mlp.gate
    before = rope.inv_freq.clone()
    model.to(torch.bfloat16)
    assert torch.equal(rope.inv_freq, before)
    assert gate.e_score_correction_bias.dtype == gate.tokens_per_expert.dtype == torch.float32
    hidden = torch.zeros(1, 2, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu"):
        cos, sin = rope(hidden, torch.tensor([[1000, 1001]]))
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.allclose(cos[..., 0].flatten(), torch.tensor([1000.0, 1001.0]).cos(), atol=1e-4)
    assert model(torch.arange(9)[None]).logits.dtype == torch.bfloat16


def test_alibi_falls_with_distance():
    """With equal values of q . k, a nearer key has a larger weight."""
    model = make_model(Options(attention="mha", positions="alibi"), num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.q_proj.weight.zero_()
        attention.v_proj.weight.copy_(torch.eye(16))
        attention.o_proj.weight.copy_(torch.eye(16))
    weights = []
    for at in range(6):  # the share of the last token's output that comes from the token at `at`
        hidden = torch.zeros(1, 6, 16)
        hidden[0, at] = 1.0
        model.model.layers[0].input_layernorm = torch.nn.Identity()
        with torch.no_grad():
            out = attention_output(model, hidden)
        weights.append(out[0, -1].view(4, 4)[:, 0])
    weights = torch.stack(weights, dim=1)  # (heads, keys)
    distance = torch.arange(5, -1, -1)
    slopes = torch.tensor([2.0 ** (-2 * i) for i in (1, 2, 3, 4)])
    expected = (-slopes[:, None] * distance).softmax(-1)
    assert torch.allclose(weights, expected, atol=1e-6)
    assert (weights.diff(dim=1) > 0).all()


def attention_output(model, hidden):
    seen = []
    hook = model.model.layers[0].self_attn.register_forward_hook(
        lambda module, args, out: seen.append(out)
    )
    model(inputs_embeds=hidden)
    hook.remove()
    return seen[0]


def test_alibi_slopes_of_other_numbers_of_heads():
    assert alibi_slopes(2) == [2.0**-4, 2.0**-8]
    assert alibi_slopes(3) == [2.0**-4, 2.0**-8, 2.0**-2]
    assert len(alibi_slopes(12)) == 12


@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal"])
def test_given_positions_are_used(positions):
    model, ids = make_model(Options(positions=positions)), torch.arange(6)[None]
    where = torch.tensor([[3, 4, 5, 6, 7, 8]])
    with torch.no_grad():
        shifted = model(ids, position_ids=where).logits
        padded = model(ids, torch.ones_like(ids), position_ids=where).logits
        plain = model(ids).logits
    assert torch.equal(shifted, padded)
    assert torch.allclose(shifted, plain, atol=1e-4) == (positions == "rope")


def test_learned_positions_end():
    model = make_model(Options(positions="learned"))
    with pytest.raises(ValueError, match="at most max_position_embeddings = 32"):
        model(torch.zeros(1, 33, dtype=torch.long))


# ----------------------------------------------------------------------------------------- inputs


def test_packed_rows_and_positions_that_restart():
    model = make_model(Options(ffn="moe"))
    lengths = [3, 4, 6]
    sequences = [torch.randint(VOCAB, (n,)).tolist() for n in lengths]
    batch = packed_collate_fn(10)([{"input_ids": ids} for ids in sequences])
    assert PackedBatch.isolated_by(model)
    out, padded = model(**batch), model(**batch.padded(0))
    positions = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    by_position = model(**positions)
    with pytest.raises(ValueError, match="use_cache must be False if position_ids"):
        model(**positions, use_cache=True)
    starts, sizes = batch.cu_seqlens_padded.tolist(), batch.cu_seqlens.diff().tolist()
    assert sorted(sizes) == lengths
    for start, size in zip(starts, sizes):
        here = slice(start, start + size)
        want = model(batch.input_ids.flatten()[None, here]).logits[0]
        for logits in (out.logits, by_position.logits):
            assert torch.allclose(logits.flatten(0, 1)[here], want, atol=1e-5)
    assert torch.allclose(out.loss, padded.loss)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"labels": torch.zeros(3, 9, dtype=torch.long)}, "labels must be -100 at padding"),
        ({"labels": torch.zeros(3, 8, dtype=torch.long)}, "labels must have the shape"),
        ({"attention_mask": torch.ones(3, 8)}, "attention_mask must be"),
        ({"attention_mask": torch.zeros(3, 9)}, "at least one real token"),
        ({"attention_mask": torch.ones(3, 1, 9, 9)}, "attention_mask must be"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "attention_mask must be all ones"),
        ({"cu_seqlens": torch.tensor([0, 9]), "attention_mask": None}, "must be .1, total_tokens"),
        ({"cu_seqlens_padded": torch.tensor([0, 27])}, "cu_seqlens must be given"),
        ({"inputs_embeds": torch.zeros(3, 9, 16)}, "one of input_ids and inputs_embeds"),
        ({"output_attentions": True}, "does not support the argument 'output_attentions'"),
        ({"token_type_ids": torch.zeros(3, 9)}, "does not support the argument"),
        ({"seq_lengths": torch.ones(3, 1)}, "'seq_lengths'; packed rows need data_collator=collat"),
        ({"logits_to_keep": 1, "labels": torch.full((3, 9), -100)}, "logits_to_keep must be 0"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(changes, message):
    batch = make_batch()
    arguments = {"input_ids": batch.ids, "attention_mask": batch.mask, **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        make_model()(**arguments)


def test_embeddings_in_place_of_ids():
    model, batch = make_model(), make_batch()
    embeds = model.get_input_embeddings()(batch.ids)
    want = model(batch.ids, batch.mask).logits
    assert torch.equal(model(inputs_embeds=embeds, attention_mask=batch.mask).logits, want)
    assert torch.equal(model(batch.ids, batch.mask, logits_to_keep=2).logits[2], want[2, -2:])
    assert torch.equal(model(batch.ids, batch.mask, return_dict=False)[0], want)


def test_micro_batches_add_up_to_the_batch():
    """With balancing losses of experts, whose weight is each micro-batch's share of the targets."""
    model, batch = make_model(Options(ffn="moe"), router_aux_loss_coef=0.0), make_batch()
    model.train()
    arguments = forms(batch)["right"]
    whole = model(**arguments).loss
    parts = [{name: value[rows] for name, value in arguments.items()} for rows in ([0], [1, 2])]
    total = sum(model(**part, num_items_in_batch=torch.tensor(12)).loss for part in parts)
    assert torch.allclose(total, whole)
    model.config.router_aux_loss_coef = 1.0
    outs = [model(**part, num_items_in_batch=12) for part in parts]
    balance = sum(out.loss for out in outs) - total
    assert torch.allclose(balance, (4 * outs[0].aux_loss + 8 * outs[1].aux_loss) / 12, atol=1e-6)


# -------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_a_sliding_window_with_a_cache(attention):
    model, batch = make_model(Options(attention=attention), sliding_window=3), make_batch()
    model.double()
    keywords = {"attention_mask": batch.left_mask.long(), "do_sample": False, "pad_token_id": 0}
    keywords.update(output_logits=True, return_dict_in_generate=True, max_new_tokens=6)
    cached, full = (
        model.generate(batch.left_ids, use_cache=use_cache, **keywords)
        for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, full.sequences)
    assert cached.past_key_values.layers[0].keys.shape[2] == 2
    for got, want in zip(cached.logits, full.logits):
        assert torch.allclose(got, want, atol=1e-10)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    out = model(torch.zeros(1, 6, dtype=torch.long), mask, use_cache=True)
    more = torch.cat((mask, torch.ones(1, 1)), dim=1)
    with pytest.raises(ValueError, match="no padding after a real token"):
        model(torch.zeros(1, 1, dtype=torch.long), more, past_key_values=out.past_key_values)


def test_beams_and_padding_on_the_right_before_a_cached_token():
    model, batch = make_model().double(), make_batch()
    keywords = {"attention_mask": batch.left_mask.long(), "pad_token_id": 0, "num_beams": 2}
    runs = [
        model.generate(batch.left_ids, use_cache=use, max_new_tokens=4, do_sample=False, **keywords)
        for use in (True, False)
    ]
    assert torch.equal(*runs)
    out = model(batch.ids, batch.mask, use_cache=True)
    mask = torch.cat((batch.mask, torch.ones(3, 1)), dim=1)
    token = torch.tensor([[7], [8], [9]])
    got = model(token, mask, past_key_values=out.past_key_values).logits
    for row in range(3):
        ids = torch.cat((batch.sequence(row), token[row : row + 1]), dim=1)
        assert torch.allclose(got[row, 0], model(ids).logits[0, -1], atol=1e-10)


def test_generation_that_would_be_wrong_is_refused():
    batch, keywords = make_batch(), {"max_new_tokens": 1, "pad_token_id": 0}
    with pytest.raises(ValueError, match="pad on the left"):
        make_model().generate(batch.ids, attention_mask=batch.mask.long(), **keywords)
    experts = make_model(Options(ffn="moe_ec"))
    with pytest.raises(ValueError, match="token_choice_at_inference must be True"):
        experts.generate(batch.ids, **keywords)
    with pytest.raises(ValueError, match="use_cache must be False while experts choose"):
        experts(batch.ids, use_cache=True)
    model = make_model()
    with pytest.raises(ValueError, match="must be a DynamicCache"):
        model(batch.ids, past_key_values=StaticCache(config=model.config, max_cache_len=16))
    with pytest.raises(ValueError, match="use_cache must be False for packed"):
        model(batch.stream, cu_seqlens=batch.cu_seqlens, past_key_values=DynamicCache())


# ---------------------------------------------------------------------------------------- experts


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_uniform_router_has_a_balancing_loss_of_its_weight(top_k):
    model, batch = make_model(Options(ffn="moe"), top_k=top_k), make_batch()
    model.train()
    model.config.router_aux_loss_coef = 0.25
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
    losses = []
    for arguments in forms(batch).values():
        out = model(**arguments)
        assert torch.allclose(out.aux_loss, torch.tensor(1.0))
        model.eval()
        losses.append(out.loss - model(**arguments).loss)
        model.train()
    assert torch.allclose(torch.stack(losses), torch.tensor(0.25), atol=1e-6)


def test_the_balancing_loss_is_that_of_the_real_tokens_of_sequences_with_a_target():
    model, batch = make_model(Options(ffn="moe")).double(), make_batch()
    losses = [model(**arguments).aux_loss for arguments in forms(batch).values()]
    dead = torch.cat((batch.stream, torch.zeros(1, 7, dtype=torch.long)), dim=1)
    labels = torch.nn.functional.pad(batch.stream, (0, 7), value=-100)
    offsets = torch.cat((batch.cu_seqlens, torch.tensor([22, 22], dtype=torch.int32)))
    losses.append(model(dead, cu_seqlens=offsets, labels=labels).aux_loss)
    # The sequence of one token has no target either.
    only = torch.cat((batch.sequence(0), batch.sequence(2)), dim=1)
    two = torch.tensor([0, 5, 14], dtype=torch.int32)
    losses.append(model(only, cu_seqlens=two, labels=only).aux_loss)
    assert losses[0] > 1.0
    assert torch.allclose(torch.stack(losses), losses[0], atol=1e-12)


def test_the_balancing_loss_by_its_definition():
    torch.manual_seed(0)
    probabilities = torch.randn(10, 4, dtype=torch.float64).softmax(-1)
    experts = probabilities.topk(2, dim=-1).indices
    counted = torch.tensor([True] * 7 + [False] * 3)
    counts = choices_per_expert(experts, 4, counted)
    want = sum(4 * (experts[:7] == e).sum() / 14 * probabilities[:7, e].mean() for e in range(4))
    assert torch.allclose(balance_loss(probabilities, counts, counted), want)


def test_one_expert_per_token_trains_the_router():
    model = make_model(Options(ffn="moe"), top_k=1, router_aux_loss_coef=0.0)
    model(**forms(make_batch())["right"]).loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().max() > 1e-6


def test_the_bias_of_the_router_balances_the_load():
    torch.manual_seed(0)
    model = make_model(Options(ffn="moe"), router_bias_update_rate=0.01, top_k=1)
    model.train()
    ids = torch.randint(VOCAB, (1, 200))
    shares = []
    for _ in range(30):
        model(ids, labels=ids)
        counts = model.model.layers[0].mlp.gate.tokens_per_expert
        assert counts.sum() == 200
        shares.append((counts.max() / counts.sum()).item())
        model.update_router_bias()
        assert counts.sum() == 0
    assert shares[0] > 0.33
    assert sum(shares[-6:]) / 6 < 0.29
    model.eval()(ids)
    assert model.model.layers[0].mlp.gate.tokens_per_expert.sum() == 0
    with pytest.raises(ValueError, match="router_bias_update_rate must be positive"):
        make_model().update_router_bias()


def test_experts_choose_their_share_of_each_sequence():
    model, batch = make_model(Options(ffn="moe_ec"), expert_capacity_factor=0.5), make_batch()
    seen = []
    model.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda module, args: seen.append(args[1].flatten())
    )
    model(batch.stream, cu_seqlens=batch.cu_seqlens)
    # Lengths 5, 1 and 9 of 4 experts: ceil(0.5 * n / 4) = 1, 1 and 2 tokens.
    assert torch.bincount(seen[0], minlength=4).tolist() == [4] * 4


# ------------------------------------------------------------------------------ training machinery


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing_changes_nothing():
    model = make_model(Options("mla", "alibi", ffn="moe")).double().train()
    arguments = forms(make_batch())
    for form in arguments.values():
        model.gradient_checkpointing_disable()
        want = loss_and_gradients(model, model, form)
        for reentrant in (False, True):
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            # The first forward of reentrant checkpointing has no gradient. On a CPU, attention of
            # few tokens then takes another path, which rounds differently.
            allowed = 1e-12 if reentrant else 0.0
            for got, wanted in zip(loss_and_gradients(model, model, form), want):
                torch.testing.assert_close(got, wanted, rtol=allowed, atol=allowed)
    assert model(**form, use_cache=True).past_key_values is None


def loss_and_gradients(function, model, arguments):
    model.zero_grad()
    loss = function(**arguments).loss
    loss.backward()
    return [loss, *(parameter.grad.clone() for parameter in model.parameters())]


def test_one_graph_serves_batches_of_every_shape():
    torch.compiler.reset()
    counters.clear()
    model = make_model(Options("mqa", "alibi", ffn="moe"), num_hidden_layers=1).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for lengths in ((5, 1, 9), (4, 7, 3, 2)):
        arguments = forms(make_batch(lengths))["left"]
        want = loss_and_gradients(model, model, arguments)
        for got, wanted in zip(loss_and_gradients(compiled, model, arguments), want):
            assert torch.allclose(got, wanted, atol=1e-6)
    with pytest.raises(RuntimeError, match="labels must be -100 at padding"):
        compiled(**{**arguments, "labels": arguments["input_ids"].clone()})
    assert counters["stats"]["unique_graphs"] == 1


def test_lora_on_the_head_reaches_the_loss():
    from peft import LoraConfig, get_peft_model

    model, arguments = make_model(tie_word_embeddings=False), forms(make_batch())["left"]
    plain = model(**arguments).loss
    targets = ["q_proj", "down_proj", "lm_head"]
    model = get_peft_model(
        model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    ).train()
    out, fused = model(**arguments, return_logits=True), model(**arguments)
    assert fused.logits is None
    assert torch.allclose(out.loss, fused.loss)
    assert not torch.allclose(out.loss, plain)
    fused.loss.backward()
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 5
    assert all(gradient.abs().max() > 0 for gradient in trained)


def test_partial_rotation_and_qk_norm():
    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    model, batch = make_model(rope_parameters=rope, qk_norm=True), make_batch()
    assert model.model.rotary_emb.inv_freq.shape == (1,)
    stream = model(**forms(batch)["stream"])
    left = model(**forms(batch)["left"])
    assert torch.allclose(real_logits("left", left.logits, batch), stream.logits[0], atol=1e-5)


# ---------------------------------------------------------------------------------- kept for later


@pytest.mark.parametrize("name", ["silu", "gelu", "relu", "sigmoid", "gelu_new"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_has_the_bits_of_the_plain_formula_and_keeps_less(name, dtype):
    act, generator = ACT2FN[name], torch.Generator().manual_seed(0)
    assert name == "gelu_new" or type(act) in gate._DERIVATIVES
    shape = 40, gate._FEW // 40 + 1
    given = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    results, kept = [], []

    def keep(tensor):
        storages.add(tensor.untyped_storage().data_ptr())
        return tensor

    for function in (gate.gated, lambda act, left, right: act(left) * right):
        left, right = (each.clone().requires_grad_() for each in given[:2])
        storages = set()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = function(act, left, right)
        kept.append(len(storages))
        plain = torch.autograd.grad(out, (left, right), given[2], retain_graph=True)
        first = torch.autograd.grad(out, (left, right), given[2], create_graph=True)
        second = torch.autograd.grad([each.float().square().sum() for each in first], left)
        results.append([out, *plain, *first, *second])
    for ours, theirs in zip(*results):
        assert torch.equal(ours, theirs)
    if name in ("silu", "gelu"):
        assert kept == [2, 3]


def test_a_step_allocates_less_than_a_patched_llama():
    sizes = {"vocab_size": 256, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3,
             "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
             "rms_norm_eps": 1e-6}  # fmt: skip
    decoder = DecoderForCausalLM(DecoderConfig(**sizes)).train()
    llama = LlamaForCausalLM(LlamaConfig(**sizes)).train()
    llama.load_state_dict(decoder.state_dict())
    ids = torch.randint(256, (3, 50))
    mask = torch.arange(50) < torch.tensor([[50], [20], [33]])
    labels = ids.masked_fill(~mask, -100)
    batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
    peaks, losses = [], []
    for model in (decoder, patch_model(llama, strict=True)):
        loss = model(**batch).loss
        loss.backward()  # gradients exist from here on
        losses.append(loss.item())
        peaks.append(allocations(lambda m=model: m(**batch).loss.backward()).peak)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert peaks[0] < 0.95 * peaks[1]
