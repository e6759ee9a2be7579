"""Calls that cannot be packed run padded and are counted. Wrong calls raise an error."""

import copy

import pytest
import torch
import transformers as hf
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokenpack import is_patched, packing_stats, patch_model, unpatch_model

from .models import BERT, BY_NAME, LLAMA, NLLB, T5


def patched(case, **options):
    reference = case.build()
    return patch_model(copy.deepcopy(reference), **options), reference


def with_holes(batch):
    mask = batch["attention_mask"].clone()
    mask[0, 2:4] = 0
    return {**batch, "attention_mask": mask}


def encoder_outputs(case):
    model = case.build().eval()
    return model.get_encoder()(**{k: v for k, v in case.batch("right").items() if k != "labels"})


def configs_of(model):
    return {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()


def four_dimensional(batch):
    mask = batch["attention_mask"].bool()
    causal = torch.ones(mask.shape[1], mask.shape[1]).tril().bool()
    return {**batch, "attention_mask": causal & mask[:, None, None, :]}


FALLBACKS = {
    "a cache is in use": (LLAMA, lambda b: {**b, "use_cache": True}),
    "output_attentions is set": (T5, lambda b: {**b, "output_attentions": True}),
    "encoder_outputs are given": (T5, lambda b: {**b, "encoder_outputs": encoder_outputs(T5)}),
    "attention_mask is 4-dimensional": (LLAMA, four_dimensional),
    "attention_mask has holes": (T5, with_holes),
    "labels at padded positions must be -100": (
        LLAMA,
        lambda b: {**b, "labels": b["input_ids"].clone()},
    ),
    "all labels are -100": (T5, lambda b: {**b, "labels": torch.full_like(b["labels"], -100)}),
    "argument 'logits_to_keep'": (LLAMA, lambda b: {**b, "logits_to_keep": 40}),
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_runs_padded_and_counts_the_reason(reason):
    case, change = FALLBACKS[reason]
    model, reference = patched(case)
    batch = change(case.batch("right"))
    ours, theirs = model(**batch), reference(**batch)
    assert ours.loss.equal(theirs.loss) or (ours.loss.isnan() and theirs.loss.isnan())
    assert ours.logits.equal(theirs.logits) or theirs.logits.isnan().any()
    (counted,) = packing_stats(model).fallbacks.items()
    assert counted[0].startswith(reason)
    assert counted[1] == 1
    assert packing_stats(model).packed_calls == 0


@pytest.mark.parametrize("reason", FALLBACKS)
def test_strict_raises_with_the_reason(reason):
    case, change = FALLBACKS[reason]
    model, _ = patched(case, strict=True)
    batch = change(case.batch("right"))
    with pytest.raises(ValueError, match=reason.replace("'", ".")):
        model(**batch)


@pytest.mark.parametrize("case", [LLAMA, NLLB, BERT], ids=lambda case: case.model)
def test_holes_are_packed_if_attention_does_not_depend_on_distance(case):
    model, reference = patched(case)
    batch = with_holes(case.batch("right"))
    if case.labels != "seq2seq":
        batch["labels"][0, 1:5] = -100
    assert abs(model(**batch).loss - reference(**batch).loss).item() <= 1e-5
    assert packing_stats(model).packed_calls == 1


def test_label_of_the_first_token_after_left_padding_runs_padded():
    model, reference = patched(LLAMA)
    batch = LLAMA.batch("left")
    batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    assert model(**batch).loss.equal(reference(**batch).loss)
    assert packing_stats(model).packed_calls == 0


def test_rotary_embeddings_that_depend_on_the_batch_run_padded():
    model = LLAMA.build()
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    patch_model(model, strict=True)
    with pytest.raises(ValueError, match="rotary"):
        model(**LLAMA.batch("right"))


# ---------------------------------------------------------------------------------- what is patched


def test_unknown_family_runs_padded_and_is_counted():
    config = hf.OPTConfig(
        vocab_size=97, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
        word_embed_proj_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    reference = hf.OPTForCausalLM(config).eval()
    model = patch_model(copy.deepcopy(reference))
    batch = LLAMA.batch("right")
    assert model(**batch).loss.equal(reference(**batch).loss)
    assert dict(packing_stats(model).fallbacks) == {"unknown family 'opt'": 1}
    assert type(unpatch_model(model)) is type(reference)
    with pytest.raises(ValueError, match="unknown family 'opt'"):
        patch_model(copy.deepcopy(reference), strict=True)


def test_head_that_reads_padding_runs_padded():
    config = copy.deepcopy(BERT.build().config)
    reference = hf.BertForQuestionAnswering(config).eval()
    model = patch_model(copy.deepcopy(reference))
    batch = {k: v for k, v in BERT.batch("right").items() if k != "labels"}
    assert model(**batch).start_logits.equal(reference(**batch).start_logits)
    assert sum(packing_stats(model).fallbacks.values()) == 1


def test_refused_family():
    config = hf.BloomConfig(vocab_size=97, hidden_size=16, n_layer=1, n_head=2)
    model = hf.BloomForCausalLM(config)
    with pytest.raises(ValueError, match="bloom cannot be patched: its ALiBi"):
        patch_model(model)
    assert not is_patched(model)


def test_umt5_is_refused_before_its_decoder_is_causal(monkeypatch):
    if not BY_NAME["UMT5ForConditionalGeneration"].available:
        model = BY_NAME["UMT5ForConditionalGeneration"].build()
    else:
        model = BY_NAME["UMT5ForConditionalGeneration"].build()
        monkeypatch.setattr("tokenpack.adapters.families.transformers_version", "5.17.0")
    with pytest.raises(ValueError, match=r"umt5 needs transformers >= 5.18"):
        patch_model(model)


@pytest.mark.parametrize(
    "options, named",
    [({"attention": "flash"}, "attention"), ({"logits": "some"}, "logits")],
)
def test_unknown_option_is_named(options, named):
    with pytest.raises(ValueError, match=f"{named} must be"):
        patch_model(T5.build(), **options)


def test_not_a_transformers_model_is_named():
    for function in (patch_model, unpatch_model, packing_stats):
        with pytest.raises(TypeError, match=r"transformers.PreTrainedModel.*Linear"):
            function(torch.nn.Linear(2, 2))
    assert not is_patched(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="not patched"):
        packing_stats(T5.build())


def test_backend_that_cannot_run_reports_what_it_lacks():
    model = patch_model(LLAMA.build(), attention="flash_attn")
    with pytest.raises(ValueError, match=r"'flash_attn' cannot run this call: needs a CUDA"):
        model(**LLAMA.batch("right"))
    assert "reference" in model_attention(T5)["cross"]


def model_attention(case):
    model = patch_model(case.build())
    model(**case.batch("right"))
    return packing_stats(model).attention


# ------------------------------------------------------------------------------------- bad batches


BAD_BATCHES = {
    "attention_mask must have the shape of input_ids": lambda b: {
        **b, "attention_mask": b["attention_mask"][:, 1:]
    },
    "attention_mask must hold only 0 and 1, got 2": lambda b: {
        **b, "attention_mask": b["attention_mask"] * 2
    },
    "attention_mask must mark at least one real token": lambda b: {
        **b, "attention_mask": torch.zeros_like(b["attention_mask"])
    },
    "input_ids must be .rows, columns. and not empty": lambda b: {
        **b, "input_ids": b["input_ids"][:0], "attention_mask": b["attention_mask"][:0]
    },
    "labels must have the shape": lambda b: {**b, "labels": b["labels"][:, 2:]},
    "cu_seqlens must end at total_tokens = 5, got 4": lambda b: {
        "input_ids": b["input_ids"][:1, :5], "cu_seqlens": torch.tensor([0, 2, 4])
    },
    "cu_seqlens must not decrease": lambda b: {
        "input_ids": b["input_ids"][:1, :5], "cu_seqlens": torch.tensor([0, 4, 3, 5])
    },
    "input_ids must be .1, total_tokens. when cu_seqlens": lambda b: {
        "input_ids": b["input_ids"], "cu_seqlens": torch.tensor([0, 5])
    },
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_BATCHES)
def test_bad_batch_raises_before_the_model_runs(message):
    model = patch_model(LLAMA.build())
    with pytest.raises(ValueError, match=message):
        model(**BAD_BATCHES[message](LLAMA.batch("right")))
    assert packing_stats(model).packed_calls == 0
    assert not packing_stats(model).fallbacks


def test_decoder_with_another_number_of_sequences():
    model = patch_model(T5.build())
    batch = T5.batch("right")
    with pytest.raises(ValueError, match="as many sequences as input_ids, 5, got 4"):
        model(**{**batch, "labels": batch["labels"][:4]})


@pytest.mark.parametrize("way", ["method", "config"])
@pytest.mark.parametrize("case", [LLAMA, T5], ids=lambda case: case.model)
def test_attention_set_after_the_patch(case, way):
    reference, model = case.build(), patch_model(case.build())
    batch = case.batch("right")
    for implementation in ("sdpa", "eager"):  # the first is already below the patch
        for each in (reference, model):
            if way == "method":
                each.set_attn_implementation(implementation)
            else:
                for config in configs_of(each):
                    config._attn_implementation = implementation
        torch.testing.assert_close(model(**batch).loss, reference(**batch).loss)
    assert packing_stats(model).packed_calls == 2
    padded = model(**batch, output_attentions=True)
    assert padded.loss.equal(reference(**batch, output_attentions=True).loss)
    unpatch_model(model)
    found, wanted = (
        [str(config._attn_implementation) for config in configs_of(each)]
        for each in (model, reference)
    )
    assert found == wanted
    assert "eager" in found


@pytest.mark.parametrize("name", ["custom", "sdpa"])
@pytest.mark.parametrize("patch_first", [True, False])
def test_attention_of_someone_else_is_called(name, patch_first, monkeypatch):
    def attend(*args, **kwargs):
        output, weights = sdpa(*args, **kwargs)
        return 2 * output, weights

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, name, attend)
    reference, model = LLAMA.build(), LLAMA.build()
    if patch_first:
        patch_model(model)
    for each in (reference, model):
        each.set_attn_implementation(name)
    patch_model(model)
    assert model(**LLAMA.batch("right")).loss.equal(reference(**LLAMA.batch("right")).loss)
    reason = f"the attention implementation {name!r} is not of transformers"
    assert packing_stats(model).fallbacks == {reason: 1}


# -------------------------------------------------------------- calls that could be silently wrong


def test_packed_input_that_cannot_be_packed_is_an_error():
    model = patch_model(LLAMA.build())
    packed = {"input_ids": torch.randint(3, 97, (1, 10)), "cu_seqlens": torch.tensor([0, 4, 10])}
    with pytest.raises(ValueError, match="cannot pack this call: a cache is in use"):
        model(**packed, use_cache=True)
    classifier = patch_model(BY_NAME["LlamaForSequenceClassification"].build())
    with pytest.raises(ValueError, match="the head reads padded rows"):
        classifier(**packed)


def test_subclass_with_a_custom_forward_runs_padded():
    base = type(LLAMA.build())

    class TripledForCausalLM(base):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.loss = 3 * outputs.loss
            return outputs

    reference = LLAMA.build()
    model = LLAMA.build()
    model.__class__ = TripledForCausalLM
    patch_model(model)
    batch = LLAMA.batch("right")
    assert model(**batch).loss.equal(3 * reference(**batch).loss)
    assert list(packing_stats(model).fallbacks) == ["TripledForCausalLM has a custom forward"]


def test_custom_loss_function_is_called():
    model = LLAMA.build()
    model.loss_function = lambda logits, labels, **kwargs: logits.square().mean()
    expected = model(**LLAMA.batch("right")).loss
    patch_model(model)
    assert model(**LLAMA.batch("right")).loss.equal(expected)


def test_restarting_position_ids_without_a_mask_run_padded():
    reference = LLAMA.build()
    model = patch_model(copy.deepcopy(reference))
    ids = torch.randint(3, 97, (1, 10))
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    batch["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    assert model(**batch).loss.equal(reference(**batch).loss)


def test_manual_decoding_gets_its_cache():
    reference = LLAMA.build().eval()
    model = patch_model(copy.deepcopy(reference))
    token = torch.tensor([[5]])
    for each in (model, reference):
        first = each(input_ids=torch.tensor([[3, 4]]))
        each.seen = each(input_ids=token, past_key_values=first.past_key_values).logits
    assert model.seen.equal(reference.seen)


def test_position_table_replaced_after_the_patch():
    model = patch_model(NLLB.build())
    table = model.model.encoder.embed_positions
    model.model.encoder.embed_positions = type(NLLB.build().model.encoder.embed_positions)(
        table.num_positions, table.embedding_dim, table.padding_idx
    )
    with pytest.raises(RuntimeError, match="embed_positions was replaced"):
        model(**NLLB.batch("right"))


def test_part_of_a_patched_model_is_not_patched_again():
    model = patch_model(NLLB.build())
    with pytest.raises(ValueError, match="already patched"):
        patch_model(model.model)
    assert packing_stats(model).packed_calls == 0
    unpatch_model(model)


def test_forward_set_on_an_instance():
    model = LLAMA.build()
    model.forward = model.forward
    with pytest.raises(ValueError, match="forward set on the instance"):
        patch_model(model)
    del model.forward
    reference = copy.deepcopy(model)
    patch_model(model)
    model.forward = model.forward  # as accelerate does for mixed precision
    assert abs(model(**LLAMA.batch("right")).loss - reference(**LLAMA.batch("right")).loss) < 1e-5
    assert packing_stats(model).packed_calls == 1
    unpatch_model(model)
    assert model(**LLAMA.batch("right")).loss.equal(reference(**LLAMA.batch("right")).loss)


def test_row_of_padding_with_labels_runs_padded():
    model, reference = patched(T5)
    batch = T5.batch("right")
    batch["attention_mask"][2] = 0
    assert model(**batch).loss.equal(reference(**batch).loss)
    assert packing_stats(model).packed_calls == 0
    batch["labels"][2] = -100
    assert abs(model(**batch).loss - reference(**batch).loss).item() <= 1e-5
    assert packing_stats(model).packed_calls == 1


def test_hook_on_the_head_changes_logits():
    reference = LLAMA.build()
    model = patch_model(copy.deepcopy(reference))
    model(**LLAMA.batch("right"))
    for each in (model, reference):
        each.lm_head.register_forward_hook(lambda module, args, out: out * 0.5)
    batch = LLAMA.batch("right")
    assert abs(model(**batch).loss - reference(**batch).loss).item() <= 1e-5
    assert packing_stats(model).loss == "from the logits: the head has a forward hook"


@pytest.mark.parametrize("case", [T5, LLAMA, BERT], ids=lambda case: case.model)
def test_a_micro_batch_without_labels_adds_nothing_to_an_accumulation(case):
    model = patch_model(case.build())
    batch = case.batch("right")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = model(**batch, num_items_in_batch=7).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


def test_pickled_part_does_not_contain_the_model():
    import pickle

    model = patch_model(LLAMA.build())
    plain = LLAMA.build()
    assert len(pickle.dumps(model.lm_head)) < len(pickle.dumps(plain.lm_head)) + 4096
