"""`inspect_model`: its numbers, its verdicts, and that the model stays as it was."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from tokenpack import inspect_model, patch_model
from tokenpack.models.decoder import DecoderConfig, DecoderForCausalLM

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **changes))


def batch(seed=1):
    ids = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def line_of(lines, name):
    (line,) = [line for line in lines if line.name == name]
    return line


def test_the_numbers_are_those_of_the_model():
    model, arguments = llama(), batch()
    report = inspect_model(model, arguments)
    with torch.no_grad():
        out = model.eval()(**arguments, output_hidden_states=True)
    chances = out.logits[arguments["attention_mask"] == 1].softmax(-1)
    assert math.isclose(report.loss, out.loss.item(), rel_tol=1e-5)
    entropy = -(chances * chances.log()).sum(-1).mean().item()
    assert math.isclose(report.entropy, entropy, rel_tol=1e-5)
    first, second = out.hidden_states[:2]
    block = line_of(report.values, "model.layers.0")
    ratio = ((second - first).norm() / first.norm()).item()
    assert math.isclose(block.update_ratio, ratio, rel_tol=1e-5)
    assert (block.minimum, block.maximum) == (second.min().item(), second.max().item())
    assert block.shape == (2, 7, 16)
    out = model(**arguments)
    out.loss.backward()
    head = line_of(report.weights, "lm_head")
    assert math.isclose(head.gradient_norm, model.lm_head.weight.grad.norm().item(), rel_tol=1e-4)
    assert math.isclose(head.weight_norm, model.lm_head.weight.norm().item(), rel_tol=1e-5)
    total = line_of(report.parameters, "total")
    assert total.count == sum(p.numel() for p in model.parameters())
    assert sum(part.count for part in report.parameters) == 2 * total.count
    text = str(report)
    assert f"{total.count:,}" in text
    assert "█" * 20 in text
    assert "close to uniform" in text


def test_the_model_stays_as_it_was():
    model = llama(attention_dropout=0.5).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    inspect_model(model, batch())
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(TypeError, match="batch must map"):
        inspect_model(model, [1])
    with pytest.raises(ValueError, match="input_ids"):
        inspect_model(model, {})
    assert not any(module._forward_hooks for module in model.modules())
    assert [module.training for module in model.modules()] == modes


def test_verdicts():
    model = llama()
    assert inspect_model(model, batch()).problems == []
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.lm_head.weight.mul_(1000.0)
    report = inspect_model(model, batch())
    assert "not uniform" in report.entropy_verdict
    assert "model.layers.0: update below 0.01: the block does little" in report.problems
    assert "model.layers.0.mlp.up_proj: gradient is zero" in report.problems
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    problems = inspect_model(model, batch()).problems
    assert "model.layers.1: not finite" in problems
    assert "model.layers.1.mlp.up_proj: weights are not finite" in problems


def test_other_models_and_batches_without_labels():
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_heads=2, num_layers=1,
            decoder_start_token_id=0,
        )
    )  # fmt: skip
    ids = batch()["input_ids"]
    names = {line.name for line in inspect_model(t5, {"input_ids": ids, "labels": ids}).values}
    assert names >= {"encoder.block.0", "decoder.block.0", "lm_head"}
    arguments = batch()
    report = inspect_model(patch_model(llama()), arguments)
    assert math.isclose(report.loss, inspect_model(llama(), arguments).loss, rel_tol=1e-5)
    assert line_of(report.values, "model.layers.1").shape == (1, 11, 16)
    ours = DecoderForCausalLM(DecoderConfig(**SIZES, ffn_type="moe"))
    del arguments["labels"]
    report = inspect_model(ours, arguments)
    assert report.loss is None
    assert {line.gradient_norm for line in report.weights} == {None}
    assert line_of(report.parameters, "model.layers.0").share > 0.4
