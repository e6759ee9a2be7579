"""What others change on a patched model: hooks, weights, parts, copies, and forwards around it."""

import copy
import pickle
import sys
import types
import warnings

import pytest
import torch
import transformers as hf
from torch.nn.utils.parametrize import register_parametrization

from tokenpack import is_patched, packing_stats, patch_model, unpatch_model

from .models import BERT, BY_NAME, LLAMA, NLLB, T5
from .test_entries import padded_ids

# -------------------------------------------------------------------------- hooks and other weights


def halve(module, gradients, *rest):
    return tuple(g if g is None else g * 0.5 for g in gradients)


class Halved(torch.nn.Module):
    def forward(self, weight):
        return weight * 0.5


CHANGES = {
    "a backward hook": lambda head: head.register_full_backward_hook(halve),
    "a backward-pre hook": lambda head: head.register_full_backward_pre_hook(halve),
    "a forward-pre hook": lambda head: head.register_forward_pre_hook(lambda m, args: args[0] * 2),
    "a forward hook": lambda head: head.register_forward_hook(lambda m, args, out: out * 2),
    "a parametrization": lambda head: register_parametrization(head, "weight", Halved()),
    "a forward set on the instance": lambda head: setattr(
        head, "forward", lambda hidden, weight=head.weight: 2 * hidden @ weight.T
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_head_that_someone_changed(change):
    models = LLAMA.build(), patch_model(LLAMA.build())
    for each in models:
        CHANGES[change](each.lm_head)
        each.result = each(**LLAMA.batch("right")).loss
        each.result.backward()
    reference, model = models
    assert abs(model.result - reference.result).item() <= 1e-5
    ours, theirs = (each.model.embed_tokens.weight.grad for each in (model, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    assert packing_stats(model).packed_calls == 1
    assert packing_stats(model).loss.startswith("from the logits")


def test_a_hook_with_keywords_that_are_not_of_peft_packs(monkeypatch):
    class Hook:
        keywords = ("adapter_names",)  # a list of words, and not the keywords of a partial

        def __call__(self, module, args):
            return None

    monkeypatch.setitem(sys.modules, "peft", types.ModuleType("peft"))
    model = patch_model(LLAMA.build())
    model.model.layers[0].register_forward_pre_hook(Hook())
    model(**LLAMA.batch("right"))
    assert packing_stats(model).packed_calls == 1
    assert not packing_stats(model).fallbacks


def test_a_weight_of_another_class_is_not_fused():
    class Quantized(torch.Tensor):
        pass

    model = patch_model(LLAMA.build())
    data = model.lm_head.weight.detach().as_subclass(Quantized)
    del model.lm_head.weight
    model.lm_head.weight = data
    loss = model(**LLAMA.batch("right")).loss
    assert abs(loss - LLAMA.build()(**LLAMA.batch("right")).loss).item() <= 1e-5
    assert packing_stats(model).loss == "from the logits: the weight of the head is a Quantized"


def test_noise_by_the_padded_width():
    from transformers.integrations.neftune import neftune_post_forward_hook

    model = patch_model(LLAMA.build())
    table = model.get_input_embeddings()
    table.neftune_noise_alpha = 5.0
    table.register_forward_hook(neftune_post_forward_hook)
    model(**LLAMA.batch("right"))
    assert packing_stats(model).fallbacks == {"NEFTune scales its noise by the padded width": 1}
    model.eval()(**LLAMA.batch("right"))
    assert packing_stats(model).packed_calls == 1


# ------------------------------------------------------------------------- replaced, copied, undone


def test_a_head_that_is_new_after_the_patch_is_fused():
    model = patch_model(LLAMA.build())
    model.resize_token_embeddings(120, mean_resizing=False)
    model(**LLAMA.batch("right"))
    assert packing_stats(model).loss == "fused with the head, without logits"
    assert type(unpatch_model(model).lm_head) is torch.nn.Linear


def test_a_new_pooler_is_an_error_and_a_copy_is_exact():
    reference = BY_NAME["BertForSequenceClassification"].build().eval()
    model = patch_model(copy.deepcopy(reference))
    model.bert.pooler = copy.deepcopy(model.bert.pooler)  # as PEFT's modules_to_save does
    ids, mask = padded_ids()
    torch.testing.assert_close(
        model(input_ids=ids, attention_mask=mask).logits,
        reference(input_ids=ids, attention_mask=mask).logits,
    )
    assert packing_stats(model).packed_calls == 1
    model.bert.pooler = copy.deepcopy(reference.bert.pooler)
    with pytest.raises(RuntimeError, match=r"BertModel.pooler was replaced after patch_model"):
        model(input_ids=ids, attention_mask=mask)


def test_a_layer_that_is_added_after_the_patch_is_an_error():
    model = patch_model(NLLB.build())
    model.model.encoder.layers.append(copy.deepcopy(NLLB.build().model.encoder.layers[0]))
    named = r"encoder\.layers\.2\S* was added after patch_model, with a config of its own"
    with pytest.raises(RuntimeError, match=named):
        model(**NLLB.batch("right"))
    for module in model.model.encoder.layers[-1].modules():
        module.config = model.config
    model.set_attn_implementation(model.config._attn_implementation)
    with pytest.raises(RuntimeError, match="was added after patch_model"):
        model(**NLLB.batch("right"))


@pytest.mark.parametrize("how", ["call", "from_pretrained"])
def test_a_class_of_a_patched_model_makes_an_unpatched_one(how, tmp_path):
    model = patch_model(LLAMA.build())
    if how == "call":
        other = type(model)(model.config)
    else:
        model.save_pretrained(tmp_path)
        other = type(model).from_pretrained(tmp_path)
    assert type(other) is hf.LlamaForCausalLM
    assert not is_patched(other)
    other.config._attn_implementation = "sdpa"
    assert packing_stats(patch_model(other)).packed_calls == 0


def classes_in(model):
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("case", [T5, NLLB, LLAMA, BERT], ids=lambda case: case.model)
@pytest.mark.parametrize("way", ["plain", "deepcopy", "pickle", "stack"])
def test_undoing_restores_every_class(case, way):
    model = case.build()
    if way == "stack" and case in (T5, NLLB):
        model = model.get_encoder()
    before = classes_in(model)
    patch_model(model)
    if way == "deepcopy":
        model = copy.deepcopy(model)
    elif way == "pickle":
        model = pickle.loads(pickle.dumps(model))
    unpatch_model(model)
    assert classes_in(model) == before
    assert not is_patched(model)
    assert not any(key.startswith("_tokenpack") for m in model.modules() for key in vars(m))
    patch_model(model)  # nothing is left that would refuse it


def test_a_class_that_changed_leaves_everything_patched():
    """fully_shard makes a subclass of each class."""
    model = patch_model(LLAMA.build(), strict=True)
    layer = type(model.lm_head)
    model.lm_head.__class__ = type("FSDPLinear", (layer,), {})
    with pytest.raises(ValueError, match=r"FSDPLinear changed its class after patch_model"):
        unpatch_model(model)
    model.lm_head.__class__ = layer
    model(**LLAMA.batch("right"))
    assert packing_stats(model).loss == "fused with the head, without logits"
    assert not is_patched(unpatch_model(model))


def test_two_models_with_one_config():
    first = LLAMA.build()
    second = hf.LlamaForCausalLM(first.config)
    before = first.config._attn_implementation
    patch_model(first)
    patch_model(second, strict=True)
    unpatch_model(first)
    second(**LLAMA.batch("right"))
    assert packing_stats(second).packed_calls == 1
    unpatch_model(second)
    assert str(first.config._attn_implementation) == before


def test_a_copy_of_the_head_outlives_the_patch():
    model = patch_model(LLAMA.build())
    head = copy.deepcopy(model.lm_head)
    unpatch_model(model)
    hidden = torch.randn(2, 32)
    assert head(hidden).equal(model.lm_head(hidden))


def test_a_part_is_not_undone_by_itself():
    model = patch_model(LLAMA.build())
    with pytest.raises(ValueError, match="a LlamaForCausalLM, got its part LlamaModel"):
        unpatch_model(model.model)
    part = copy.deepcopy(model.model)
    assert not is_patched(unpatch_model(part))
    assert is_patched(model)


# ------------------------------------------------------------------------ a patch without an effect


def layers_only(model, ids):
    """A forward around every part, as a hand-written pipeline has it."""
    hidden = model.model.embed_tokens(ids)
    positions = model.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    for layer in model.model.layers:
        hidden = layer(hidden, position_embeddings=positions)
    return model.lm_head(model.model.norm(hidden))


def test_training_around_the_patch_is_counted_and_warned_about():
    model = patch_model(LLAMA.build())
    ids, _ = padded_ids()

    def train():
        for _ in range(8):
            layers_only(model, ids).sum().backward()

    with pytest.warns(RuntimeWarning, match=r"patch_model has no effect.*forwards are not called"):
        train()
    assert packing_stats(model).unseen_calls == 8
    with pytest.raises(ValueError, match=r"strict=True, and LlamaAttention was reached"):
        layers_only(patch_model(model, strict=True), ids)


def test_training_that_only_falls_back_is_warned_about():
    model = patch_model(LLAMA.build())

    def train():
        for _ in range(8):
            model(**LLAMA.batch("right"), use_cache=True)

    with pytest.warns(RuntimeWarning, match="It runs padded, because a cache is in use"):
        train()
    assert packing_stats(model).unseen_calls == 0


def test_training_that_packs_is_not_warned_about():
    model = patch_model(LLAMA.build())
    model.gradient_checkpointing_enable()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for step in range(12):
            model(**LLAMA.batch("right", step), use_cache=step > 2 or None).loss.backward()
    assert packing_stats(model).unseen_calls == 0
