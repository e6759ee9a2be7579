"""Every part of a patched model that can be called by itself packs, with the numbers it had."""

import copy
import pickle

import pytest
import torch
import transformers as hf
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.loss.loss_utils import LOSS_MAPPING

from tokenpack import is_patched, packing_stats, patch_model
from tokenpack.adapters.interface import PatchedConfig

from .models import BY_NAME, LLAMA, NLLB, T5

BART = BY_NAME["BartForConditionalGeneration"]
GPT2 = BY_NAME["GPT2LMHeadModel"]


def padded_ids(columns=7, rows=3, seed=0):
    """Ids and a right-padded mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (rows, columns), generator=generator)
    lengths = torch.tensor([columns, 4, 2])[:rows]
    return ids, (torch.arange(columns) < lengths[:, None]).long()


def assert_equal_at_real_slots(ours, theirs, mask):
    difference = (ours - theirs).abs() * mask[..., None]
    assert difference.max() <= 1e-5
    assert (ours * (1 - mask[..., None])).eq(0).all()


# --------------------------------------------------------------------------------- parts as entries


@pytest.mark.parametrize("case", [T5, NLLB, BART], ids=lambda case: case.model)
@pytest.mark.parametrize("part", ["get_encoder", "get_decoder"])
def test_a_stack_of_a_model_patched_alone(case, part):
    reference = getattr(case.build().eval(), part)()
    stack = patch_model(getattr(case.build().eval(), part)(), strict=True)
    ids, mask = padded_ids()
    ours = stack(input_ids=ids, attention_mask=mask, use_cache=False)
    theirs = reference(input_ids=ids, attention_mask=mask, use_cache=False)
    assert_equal_at_real_slots(ours.last_hidden_state, theirs.last_hidden_state, mask)
    assert packing_stats(stack).packed_calls == 1


def test_a_base_model_takes_a_stream():
    model = patch_model(LLAMA.build().eval(), strict=True)
    first, second = torch.randint(3, 97, (1, 5)), torch.randint(3, 97, (1, 4))
    stream = torch.cat([first, second], 1)
    packed = model.model(input_ids=stream, cu_seqlens=torch.tensor([0, 5, 9]), use_cache=False)
    alone = LLAMA.build().eval().model(input_ids=second, use_cache=False)
    torch.testing.assert_close(packed.last_hidden_state[:, 5:], alone.last_hidden_state)


def test_boundaries_that_no_forward_uses_are_an_error():
    model = patch_model(LLAMA.build().eval())
    layer, hidden = model.model.layers[0], torch.randn(1, 9, 32)
    positions = model.model.rotary_emb(hidden, torch.arange(9)[None])
    with pytest.raises(ValueError, match="cu_seqlens must reach a forward that patch_model"):
        layer(hidden, position_embeddings=positions, cu_seqlens=torch.tensor([0, 5, 9]))


def test_parts_of_a_model_that_is_never_packed():
    model = patch_model(hf.BartForCausalLM(BART.build().config).eval())
    decoder, (ids, _) = model.get_decoder(), padded_ids()
    decoder(input_ids=ids, use_cache=False)
    reason = "BartForCausalLM is a decoder without its encoder"
    assert packing_stats(model).fallbacks == {reason: 1}
    with pytest.raises(ValueError, match=f"cannot pack this call: {reason}"):
        decoder(input_ids=ids[:1], cu_seqlens=torch.tensor([0, 3, 7]), use_cache=False)


def test_positions_that_restart_split_rows_as_in_transformers():
    reference, model = LLAMA.build(), patch_model(LLAMA.build(), strict=True)
    ids = torch.randint(3, 97, (2, 10))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 0, 1, 2, 3, 4, 5]])
    labels = ids.masked_fill(positions == 0, -100)
    batch = {"input_ids": ids, "position_ids": positions, "labels": labels, "use_cache": False}
    for each in (reference, model):
        each.result = each(**batch).loss
        each.result.backward()
    assert abs(model.result - reference.result).item() <= 1e-6
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    assert packing_stats(model).packed_calls == 1
    hidden = model.eval().model(input_ids=ids, position_ids=positions, use_cache=False)
    theirs = reference.eval().model(input_ids=ids, position_ids=positions, use_cache=False)
    torch.testing.assert_close(hidden.last_hidden_state, theirs.last_hidden_state)


@pytest.mark.parametrize("rows", [1, 2])
def test_flash_attention_splits_one_row_by_its_positions(rows, monkeypatch):
    """transformers drops a mask of ones, and then splits a single row, but not several."""
    model = patch_model(LLAMA.build())
    monkeypatch.setattr(PatchedConfig, "below", lambda self: "flash_attention_2")
    ids = torch.randint(3, 97, (rows, 6))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(rows, -1)
    batch = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    ours = model(**batch, attention_mask=torch.ones_like(ids)).logits
    unpatched = LLAMA.build()
    expected = unpatched(**batch) if rows == 1 else unpatched(**batch, attention_mask=ids * 0 + 1)
    torch.testing.assert_close(ours, expected.logits)
    assert packing_stats(model).packed_calls == 1


def test_layers_that_were_not_asked_for_stay_none():
    model = patch_model(LLAMA.build().eval())
    batch = {k: v for k, v in LLAMA.batch("right").items() if k != "labels"}
    states = model(**batch, use_cache=False, output_hidden_states=[0, 2]).hidden_states
    expected = LLAMA.build().eval()(**batch, use_cache=False, output_hidden_states=[0, 2])
    assert [s is None for s in states] == [s is None for s in expected.hidden_states]


def test_assisted_generation_is_as_before():
    """Its masks of 2 queries and 3 keys have the shape of the marker of a packed forward."""
    ids = torch.tensor([[5, 9, 30, 12, 7, 8]])
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = NLLB.build().eval().generate(ids, **options)
    model, assistant = patch_model(NLLB.build().eval()), NLLB.build(seed=3).eval()
    assert model.generate(ids, **options, assistant_model=assistant).equal(expected)
    assert model.generate(ids, **options, assistant_model=patch_model(assistant)).equal(expected)


def test_hooks_on_layers_find_the_rows_of_the_batch():
    seen = {}

    def hook(module, args, kwargs, output):
        call = kwargs["packing"]
        seen["stream"], seen["rows"] = output, call.rows_of(output)
        with pytest.raises(ValueError, match=r"side must be one of \['self'\], got 'enc'"):
            call.rows_of(output, "enc")
        with pytest.raises(ValueError, match="hidden must have the 13 tokens of side 'self'"):
            call.rows_of(output[:, 1:])

    ids, mask = padded_ids()
    model = patch_model(LLAMA.build().eval())
    model.model.layers[1].register_forward_hook(hook, with_kwargs=True)
    states = model(
        input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True
    ).hidden_states
    assert seen["stream"].shape == (1, 13, 32)
    assert seen["rows"].equal(states[2])


def test_continuous_batching_generates_as_before():
    generated = []
    for model in (LLAMA.build().eval(), patch_model(LLAMA.build().eval())):
        outputs = model.generate_batch(
            [[3, 4, 5], [6, 7, 8, 9]],
            generation_config=hf.GenerationConfig(
                max_new_tokens=4, do_sample=False, eos_token_id=1, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                num_blocks=4,
                max_batch_tokens=16,  # by default, a share of all memory
            ),
            warmup=False,
            progress_bar=False,
        )
        generated.append([each.generated_tokens for each in outputs.values()])
    assert generated[0] == generated[1]
    assert all(len(tokens) == 4 for tokens in generated[0])
    assert is_patched(model)
    model(**LLAMA.batch("right"))
    assert packing_stats(model).packed_calls == 1


# ---------------------------------------------------------------------------------------- row heads


@pytest.mark.parametrize("pad_token_id", [0, 5])
@pytest.mark.parametrize("embeds", [False, True], ids=["ids", "embeds"])
def test_a_classifier_reads_the_position_that_the_model_reads(pad_token_id, embeds):
    case = BY_NAME["LlamaForSequenceClassification"]
    reference = case.build().eval()
    reference.config.pad_token_id = pad_token_id
    model = patch_model(copy.deepcopy(reference))
    ids, mask = padded_ids()  # the masked ids are not the padding id
    batch = {"attention_mask": mask, "use_cache": False}
    batch |= {"inputs_embeds": reference.get_input_embeddings()(ids)} if embeds else {}
    batch |= {} if embeds else {"input_ids": ids}
    torch.testing.assert_close(model(**batch).logits, reference(**batch).logits)
    assert list(packing_stats(model).fallbacks) == [
        "the head reads a slot that the mask marks as padding"
    ]
    batch["attention_mask"] = torch.ones_like(mask)
    torch.testing.assert_close(model(**batch).logits, reference(**batch).logits)
    assert packing_stats(model).packed_calls == 1


def test_an_encoder_decoder_classifier_reads_eos():
    reference = hf.BartForSequenceClassification(BART.build().config).eval()
    model = patch_model(copy.deepcopy(reference))
    ids, mask = padded_ids()
    eos = reference.config.eos_token_id
    ids = ids.masked_fill(ids == eos, 7)
    ids[:, -1] = eos  # under a zero of the mask in two rows
    batch = {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
    for masks in ({}, {"decoder_attention_mask": mask}):
        torch.testing.assert_close(
            model(**batch, **masks).logits, reference(**batch, **masks).logits
        )
    stats = packing_stats(model)
    assert (stats.packed_calls, sum(stats.fallbacks.values())) == (1, 1)


def test_a_classifier_returns_its_cache_where_the_model_does():
    reference = BY_NAME["LlamaForSequenceClassification"].build().eval()
    model = patch_model(copy.deepcopy(reference))
    ids, _ = padded_ids()
    assert reference(input_ids=ids).past_key_values is not None
    assert model(input_ids=ids).past_key_values is not None
    assert model(input_ids=ids, labels=torch.zeros(3, dtype=torch.long)).past_key_values is None


# ------------------------------------------------------------------------ what a call looks up late


def test_output_attentions_set_after_the_patch():
    reference = LLAMA.build().eval()
    reference.set_attn_implementation("eager")
    model = patch_model(copy.deepcopy(reference))
    model.config.output_attentions = True
    ids, mask = padded_ids()
    attentions = model(input_ids=ids, attention_mask=mask, use_cache=False).attentions
    assert attentions[0].shape == (3, 4, 7, 7)
    assert packing_stats(model).fallbacks == {"output_attentions is set": 1}


@pytest.mark.parametrize("kind", ["mapping", "type"])
def test_a_loss_that_is_replaced_after_the_patch(kind, monkeypatch):
    reference, model = LLAMA.build(), patch_model(LLAMA.build())
    if kind == "mapping":
        stock = LOSS_MAPPING["ForCausalLM"]
        monkeypatch.setitem(LOSS_MAPPING, "ForCausalLM", lambda *a, **k: 2 * stock(*a, **k))
    else:
        reference.loss_type = model.loss_type = "ForMaskedLM"
    batch = LLAMA.batch("right")
    assert model(**batch).loss.equal(reference(**batch).loss)
    assert packing_stats(model).fallbacks == {"the model has a custom loss_function": 1}


def test_the_loss_is_a_function_of_the_logits():
    for packed in (False, True):
        model = patch_model(LLAMA.build(), logits="always")
        batch = LLAMA.batch("right")
        if packed:
            batch = {
                "input_ids": batch["input_ids"][:1, :6],
                "labels": batch["input_ids"][:1, :6],
                "cu_seqlens": torch.tensor([0, 2, 6]),
            }
        outputs = model(**batch)
        (gradient,) = torch.autograd.grad(outputs.loss, outputs.logits)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("case", [T5, NLLB, LLAMA], ids=lambda case: case.model)
def test_position_1_is_logits_or_an_error(case):
    model = patch_model(case.build())
    outputs = model(**case.batch("right"))
    with pytest.raises(ValueError, match="logits must be computed"):
        outputs[1]
    loss, logits = outputs[:2]
    assert loss.equal(outputs.loss)
    assert logits is None
    again = pickle.loads(pickle.dumps(type(outputs)(loss=outputs.loss.detach())))
    assert again.to_tuple()[1] is None
    assert model(**case.batch("right"), return_dict=False)[1] is None
    with torch.no_grad():
        outputs = model.eval()(**case.batch("right"))
    assert outputs[1] is outputs.logits


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "case",
    [T5, NLLB, BART, LLAMA, GPT2, BY_NAME["LlamaForSequenceClassification"]],
    ids=lambda case: case.model,
)
def test_a_cache_that_is_left_out_keeps_its_position(case, checkpointing):
    reference, model = case.build(), patch_model(case.build(), strict=True)
    if checkpointing:
        reference.gradient_checkpointing_enable()
        model.gradient_checkpointing_enable()
    batch = {**case.batch("right"), "output_hidden_states": True}
    theirs, ours = (each(**batch, return_dict=False) for each in (reference, model))
    assert len(ours) == len(theirs)
    has_cache = isinstance(theirs[2], hf.Cache)
    assert has_cache == (not checkpointing and case is not BART)
    if has_cache:
        assert ours[2] is None
        outputs = model(**batch)
        with pytest.raises(ValueError, match="past_key_values must be computed"):
            outputs[2]
        assert pickle.loads(pickle.dumps(outputs)).to_tuple()[2] is None
        assert model(**batch, use_cache=False, return_dict=False)[2] is not None
    assert [type(each) for each in ours[3:]] == [type(each) for each in theirs[3:]]
