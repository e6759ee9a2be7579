"""Counted operations, compared with torch's own counter and with each sequence by itself."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from tokenpack import cost, patch_model
from tokenpack.commands.models import build_shape

VOCAB = 120


def make_t5():
    # Gated, an odd number of heads, heads * d_kv other than d_model, unequal depths.
    config = T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_heads=3,
        num_layers=2,
        num_decoder_layers=1,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        use_cache=False,
        attn_implementation="eager",
    )
    return T5ForConditionalGeneration(config)


def make_nllb():
    config = M2M100Config(
        vocab_size=VOCAB,
        d_model=32,
        encoder_ffn_dim=64,
        decoder_ffn_dim=48,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        dropout=0.0,
        attention_dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        use_cache=False,
        attn_implementation="eager",
    )
    return M2M100ForConditionalGeneration(config)


def make_llama():
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


FAMILIES = pytest.mark.parametrize("make_model", [make_t5, make_nllb, make_llama])


def make_batch(model):
    """Rows of 7, 1 and 12 tokens; labels of 3, 5 and 1, the second with a -100 inside."""
    lengths, label_lengths = torch.tensor([7, 1, 12]), torch.tensor([3, 5, 1])
    input_ids = torch.randint(5, VOCAB, (3, 12))
    mask = (torch.arange(12) < lengths[:, None]).long()
    if model.config.is_encoder_decoder:
        labels = torch.randint(5, VOCAB, (3, 5))
        labels[torch.arange(5) >= label_lengths[:, None]] = -100
        labels[1, 2] = -100
    else:
        labels = input_ids.masked_fill(mask == 0, -100)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def counted_by_torch(model, batch):
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    return counter


@FAMILIES
def test_padded_count_is_what_torch_counts(make_model):
    model = make_model()
    batch = make_batch(model)
    counter = counted_by_torch(model, batch)
    # Up to transformers 5.17, rotary angles are a matrix product, which torch counts.
    angles = sum(
        sum(by_operator.values())
        for module, by_operator in counter.get_flop_counts().items()
        if module.endswith("rotary_emb")
    )
    expected = counter.get_total_flops() - angles
    assert cost.count_operations(model, batch, packed=False).total == expected


@FAMILIES
def test_packed_count_is_the_sum_over_single_sequences(make_model):
    model = make_model()
    batch = make_batch(model)
    single_counts = []
    for row in range(3):
        length = int(batch["attention_mask"][row].sum())
        labels = batch["labels"][row]
        kept = int((labels != -100).nonzero().max()) + 1
        single = {
            "input_ids": batch["input_ids"][row : row + 1, :length],
            "labels": labels[:kept][None],
        }
        single_counts.append(cost.count_operations(model, single, packed=False))
    packed = cost.count_operations(model, batch, packed=True)
    assert packed.linear == sum(operations.linear for operations in single_counts)
    assert packed.attention == sum(operations.attention for operations in single_counts)


@FAMILIES
def test_a_patched_model_does_the_linear_work_counted(make_model):
    model = patch_model(make_model().train())
    batch = make_batch(model)
    flops = counted_by_torch(model, batch).get_flop_counts()
    # Without the head, where a patched model also skips tokens without a target.
    head = flops[f"{type(model).__name__}.lm_head"]
    multiplied = sum(
        flops["Global"].get(operator, 0) - head.get(operator, 0)
        for operator in (torch.ops.aten.mm, torch.ops.aten.addmm)
    )
    head_counted = 6 * model.lm_head.weight.numel() * cost.count_packed(model, batch).decoder_tokens
    assert multiplied == cost.count_operations(model, batch, packed=True).linear - head_counted


@FAMILIES
def test_the_matrices_of_lora_count_too(make_model):
    peft = pytest.importorskip("peft")
    targets = r".*\.(q|k|q_proj|k_proj)"
    model = make_model()
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=targets)).eval()
    batch = make_batch(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch)
    angles = sum(
        sum(by_operator.values())
        for module, by_operator in counter.get_flop_counts().items()
        if module.endswith("rotary_emb")
    )
    forward = counter.get_total_flops() - angles
    assert cost.count_operations(model, batch, packed=False).total == 3 * forward


def test_without_a_mask_every_position_is_real():
    model = make_llama()
    batch = {"input_ids": torch.randint(5, VOCAB, (3, 12))}
    assert cost.count_packed(model, batch) == cost.count_padded(model, batch)


def test_kept_labels_end_at_the_last_target():
    labels = torch.tensor([[1, 2, -100, -100], [-100, 2, -100, 4], [-100] * 4, [1, 2, 3, 4]])
    assert cost.kept_label_lengths(labels).tolist() == [2, 4, 0, 4]


def test_lengths_of_both_sides():
    count = cost.count_lengths([3, 5], [2, 4])
    assert count == cost.BatchCount(8, 6, 9 + 25, 4 + 16, 6 + 20, sequences=2)
    assert count.tokens == 14
    with pytest.raises(ValueError, match="got 2 and 1 sequences"):
        cost.count_lengths([3, 5], [2])


def test_a_published_shape_is_counted_without_its_weights():
    model = build_shape("llama-1b")
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    counted = cost.model_cost(model)
    assert next(model.parameters()).is_meta
    assert counted == cost.ModelCost(0, weights, 0, 2 * 2048 * 16, 0, attentions=16)


def test_attentions_with_a_relative_bias():
    counted = cost.model_cost(make_t5())
    assert counted.attentions == 3 * counted.biased_attentions // 2  # all but cross-attention
    assert counted.biased_attentions > 0
    assert cost.model_cost(make_llama()).biased_attentions == 0


def test_models_that_cannot_be_counted_are_refused():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"weight matrices in nn.Linear .*c_attn.weight.*Conv1D"):
        cost.model_cost(gpt2)
    with pytest.raises(ValueError, match=r"must have attention .* got Sequential"):
        cost.model_cost(nn.Sequential(nn.Linear(2, 2)))


def test_incomplete_batches_are_refused():
    with pytest.raises(ValueError, match="must have input_ids"):
        cost.count_operations(make_llama(), {}, packed=True)
    with pytest.raises(ValueError, match="must have labels"):
        cost.count_operations(make_t5(), {"input_ids": torch.ones(1, 2)}, packed=False)
