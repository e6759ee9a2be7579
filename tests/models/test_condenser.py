"""The condenser: packed equals one document at a time, and the decoder stays as it is."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tokenpack import packing_stats
from tokenpack.adapters.patching import transformers_model
from tokenpack.comparison.float64 import KeepFloat64
from tokenpack.models.condenser import Condenser, CondenserConfig
from tokenpack.models.condenser.layout import context_layout, count_vectors

from ..trainer.setting import on_ranks
from .condensers import FAMILIES, causal_model, make_batch, make_condenser, make_documents

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}
OPTIONS = {
    "slots": {"num_completion_flags": 1, "reconstruction_weight": 0.5, "distillation_weight": 0.3},
    "segments": {
        "num_condense_tokens": None, "ratios": [3, 4], "segment_length": 8, "num_last_layers": 2,
        "slot_positions": "spread", "separate_segments": True, "projection": "mlp",
    },
    "mean_pool": {"carrier": "mean_pool", "norm": "rms_norm", "projection_bias": False},
}  # fmt: skip


# ------------------------------------------------------------------------- one document at a time


def alone(model, condenser, decoder, document, ratio):
    """The sum of losses of one document, from models that are not patched, with torch's own ops."""
    config, base = model.config, condenser.get_base_model().base_model
    embed, read = condenser.get_input_embeddings(), decoder.get_input_embeddings()
    context = torch.tensor(document["context_ids"])
    vectors = []
    for part in context.split(config.segment_length or len(context)):
        n = len(part)
        count = config.num_condense_tokens or -(-n // ratio)
        pools = config.carrier == "mean_pool"
        rows = embed(part) if pools else torch.cat([embed(part), model.slots[:count]])
        places = [*range(n), *range(n, n + (0 if pools else count))]
        if config.slot_positions == "spread":
            places[n:] = [int((j + 0.5) * n / count) for j in range(count)]
        hidden = run(base, rows, places, config.num_last_layers)
        if pools:
            ends = [j * n // count for j in range(count + 1)]
            carriers = torch.stack([hidden[a:b].mean(0) for a, b in zip(ends, ends[1:])])
        else:
            carriers = hidden[n:]
        vectors.append(model.projection(carriers))
        if model.separator is not None:
            vectors.append(model.separator)
    vectors = torch.cat(vectors)
    bos = read(torch.tensor([2]))
    flags = vectors[:0] if model.completion_flags is None else model.completion_flags
    after = torch.tensor([*document["prompt_ids"], *document["completion_ids"]])
    wanted = torch.tensor(document["completion_ids"])

    def logits_before(prefix, tokens, number):
        rows = torch.cat([*prefix, read(tokens)])
        ones = torch.ones(1, len(rows), dtype=torch.long)
        logits = decoder(inputs_embeds=rows[None], attention_mask=ones, use_cache=False).logits[0]
        return logits[-number - 1 : -1].double()

    ours = logits_before([bos, vectors, flags], after, len(wanted))
    loss = F.cross_entropy(ours, wanted, reduction="sum")
    reference = torch.tensor(document["reference_ids"])
    if config.reconstruction_weight:
        prefix = [bos, vectors, model.reconstruction_flags]
        rebuilt = logits_before(prefix, reference, len(reference))
        part = F.cross_entropy(rebuilt, reference, reduction="sum")
        loss = loss + config.reconstruction_weight * part
    if config.distillation_weight:
        with torch.no_grad():
            full = logits_before([bos], torch.cat([reference, after]), len(wanted))
        log_p, log_q = full.log_softmax(-1), ours.log_softmax(-1)
        part = (log_p.exp() * (log_p - log_q)).sum()
        loss = loss + config.distillation_weight * part
    return loss


def run(base, rows, places, num_last):
    ones = torch.ones(1, len(rows), dtype=torch.long)
    positions = torch.tensor([places])
    outputs = base(
        inputs_embeds=rows[None], attention_mask=ones, position_ids=positions,
        use_cache=False, output_hidden_states=True,
    )  # fmt: skip
    return torch.cat(outputs.hidden_states[-num_last:], -1)[0]


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check_close(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    largest = max(float(g.abs().max()) for g in theirs.values())
    assert largest > 0
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() <= tolerance * largest, name


CASES = [(name, torch.float64) for name in OPTIONS] + [("slots", torch.float32)]


@pytest.mark.parametrize("options, dtype", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_one_document_at_a_time(family, options, dtype):
    """Against models that are not patched. Loss sum, and the gradient of all that is trained."""
    options = OPTIONS[options]
    ratios = [4, 3, 4] if "ratios" in options else None
    model = make_condenser(family, dtype, **options)
    theirs = copy.deepcopy(model)
    plain = causal_model(family, dtype), causal_model(family, dtype, seed=1)
    from peft import get_peft_model

    condenser = get_peft_model(plain[0], model.condenser.peft_config["default"])
    condenser.load_state_dict(model.condenser.state_dict())
    decoder = plain[1].eval().requires_grad_(False)
    theirs.condenser, theirs.decoder = condenser, decoder
    documents = make_documents()
    batch = make_batch(documents, ratios)
    # Gemma2 computes in float32 inside, also in a float64 model.
    with KeepFloat64() if dtype is torch.float64 else contextlib.nullcontext():
        loss = model(**batch, num_items_in_batch=1).loss
        loss.backward()
        expected = sum(
            alone(theirs, condenser, decoder, each, ratios[at] if ratios else None)
            for at, each in enumerate(documents)
        )
        expected.backward()
    assert abs(loss - expected) <= TOLERANCES[dtype] * abs(expected)
    check_close(gradients(model), gradients(theirs), TOLERANCES[dtype])
    for each in (model.condenser, model.decoder):
        if family != "ours":
            assert packing_stats(each).fallbacks == {}


def test_one_call_per_side_and_no_padding():
    model = make_condenser(distillation_weight=0.0, reconstruction_weight=1.0)
    model(**make_batch(make_documents()))  # the head is checked once
    stats = {name: packing_stats(getattr(model, name)) for name in ("condenser", "decoder")}
    before = {name: (each.packed_calls, each.packed_tokens) for name, each in stats.items()}
    model(**make_batch(make_documents()))
    contexts, slots = 30 + 7 + 18, 3 * 4
    after = 3 * (1 + 4) + 2 + 3 + 5 + 10 + 4 + 6
    rebuilt = 3 * (1 + 4 + 1) + contexts - 3
    for name, tokens in (("condenser", contexts + slots), ("decoder", after + rebuilt)):
        calls, packed = before[name]
        assert stats[name].packed_calls == calls + 1
        assert stats[name].packed_tokens == packed + tokens
        assert stats[name].padding_share == 0


@pytest.mark.parametrize("carrier", ["slots", "mean_pool"])
def test_vectors_do_not_depend_on_batch_mates(carrier):
    model = make_condenser(dtype=torch.float64, carrier=carrier).eval()
    documents = make_documents()

    def vectors(rows):
        lengths = np.array([len(each["context_ids"]) for each in rows])
        ids = torch.tensor([token for each in rows for token in each["context_ids"]])
        found, layout = model.vectors(ids, lengths)
        return found.split(layout.doc_vectors.tolist())

    together = vectors(documents)
    others = vectors([make_documents(seed=7)[1], *documents[::-1]])
    for at, found in enumerate(together):
        for again in (vectors([documents[at]])[0], others[3 - at]):
            torch.testing.assert_close(found, again, rtol=0, atol=1e-12)


def test_a_model_of_another_family_and_width_reads_the_vectors():
    torch.manual_seed(0)
    wide = Condenser.from_models(
        causal_model("ours"), causal_model("Gemma2"), num_condense_tokens=2, lora={"r": 2}
    )
    batch = make_batch(make_documents())
    del batch["reference_ids"], batch["reference_cu_seqlens"]
    output = wide.train()(**batch)
    output.loss.backward()
    assert output.num_targets == 20
    torch.testing.assert_close(output.completion_loss, output.loss.detach())
    assert wide.slots.grad.abs().max() > 0


# --------------------------------------------------------------------------------------- training


def test_after_a_step_all_but_the_decoder_has_changed():
    model = make_condenser()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    model(**make_batch(make_documents())).loss.backward()
    optimizer.step()
    parameters = dict(model.named_parameters())
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    for name, parameter in parameters.items():
        if name.startswith("decoder."):
            assert parameter.grad is None
            assert name not in changed
            assert not parameter.requires_grad
    learned = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert changed == learned
    kinds = {"lora_A", "lora_B", "slots", "projection.norm", "projection.linear"}
    assert {kind for kind in kinds if any(kind in name for name in learned)} == kinds
    assert not model.decoder.training
    assert model.condenser.training


def test_targets_count_once_and_weights_weigh():
    batch = make_batch(make_documents(text=(1,)))
    weights = {"completion": 2.0, "continuation": 0.5, "reconstruction": 0.25}
    model = make_condenser(**{f"{name}_weight": value for name, value in weights.items()})
    output = model(**batch)
    assert output.num_targets == 20 + 52
    counts = {"completion": 16, "continuation": 4, "reconstruction": 52}
    sums = {name: getattr(output, f"{name}_loss") * n for name, n in counts.items()}
    expected = sum(weights[name] * value for name, value in sums.items()) / 72
    torch.testing.assert_close(output.loss.detach(), expected)


# ---------------------------------------------------------------------------------------- layouts


def test_numbers_of_vectors():
    lengths, ratios = np.array([1, 4, 5, 23]), np.array([4, 4, 4, 3])
    segments, sizes, vectors = count_vectors(lengths, 8, None, ratios, False)
    assert segments.tolist() == [1, 1, 1, 3]
    assert sizes.tolist() == [1, 4, 5, 8, 8, 7]
    assert vectors.tolist() == [1, 1, 2, 3, 3, 3]
    assert count_vectors(lengths, None, 3, ratios, False)[2].tolist() == [3, 3, 3, 3]
    assert count_vectors(lengths, None, 3, ratios, True)[2].tolist() == [1, 3, 3, 3]


def test_positions_of_slots():
    def positions(kind, rows=9):
        counted = count_vectors(np.array([8, 3]), None, 4, np.zeros(2), False)
        made = context_layout(*counted, pools=False, slot_positions=kind, num_slot_embeddings=rows)
        return made.position_ids[made.slot_at].tolist(), made.source[made.slot_at].tolist()

    assert positions("end")[0] == [8, 9, 10, 11, 3, 4, 5, 6]
    assert positions("spread")[0] == [1, 3, 5, 7, 0, 1, 1, 2]
    assert positions("span_starts")[0] == [0, 2, 4, 6, 0, 0, 1, 2]
    assert positions("end")[1] == [11, 12, 13, 14] * 2
    assert positions("end", rows=1)[1] == [11] * 8


# ----------------------------------------------------------------------------------------- errors


def batch_with(context):
    documents = make_documents()
    documents[1]["context_ids"] = context
    return make_batch(documents)


def test_bad_contexts_are_named():
    model = make_condenser()
    with pytest.raises(ValueError, match="context must have at least one token, got context 1"):
        model(**batch_with([]))
    with pytest.raises(ValueError, match=r"must fit into the condenser's 64 positions, got .* 65"):
        model(**batch_with([5] * 61))
    model(**batch_with([5] * 60))  # with its slots, exactly the positions
    decoder = make_condenser(segment_length=8)
    with pytest.raises(ValueError, match=r"must fit into the decoder's 64 positions"):
        decoder(**batch_with([5] * 130))


def test_missing_references_are_named():
    batch = make_batch(make_documents())
    del batch["reference_ids"]
    with pytest.raises(ValueError, match="reference_ids must be given with a weight of"):
        make_condenser(reconstruction_weight=1.0)(**batch)


def test_models_that_do_not_fit_are_named():
    llama = causal_model("Llama")
    with pytest.raises(ValueError, match="condenser and decoder must be two objects"):
        Condenser(CondenserConfig(), llama, llama)
    with pytest.raises(ValueError, match="decoder must be a causal language model"):
        Condenser(CondenserConfig(), llama, causal_model("Qwen3").base_model)
    config = CondenserConfig(condenser_hidden_size=48, decoder_hidden_size=32)
    with pytest.raises(ValueError, match=r"condenser must have a width of 48.* got a .*width 32"):
        Condenser(config, llama, causal_model("Qwen3"))
    from peft import PromptTuningConfig, get_peft_model

    prompted = get_peft_model(
        causal_model("Llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match="adapter inside of its layers, such as LoRA, got PROMPT"):
        Condenser(CondenserConfig(), prompted, llama)
    with pytest.raises(TypeError, match=r"condenser: model must be a transformers.PreTrainedModel"):
        Condenser(CondenserConfig(), torch.nn.Linear(2, 2), llama)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"carrier": "gist"}, "carrier must be one of slots, mean_pool"),
        ({"ratios": [4], "num_condense_tokens": 4}, "one of ratios and num_condense_tokens"),
        ({"ratios": [0]}, "ratios must be integers of 1 or more"),
        ({"segment_length": 0}, "segment_length must be 1 or more"),
        ({"num_condense_tokens": 4, "num_slot_embeddings": 3}, "num_slot_embeddings must be 1 or"),
        ({"completion_weight": -1.0}, "completion_weight must be 0 or more"),
        ({"completion_weight": 0, "continuation_weight": 0}, "one of the weights"),
        ({"reconstruction_weight": 1.0, "num_reconstruction_flags": 0}, "num_reconstruction_flags"),
        ({"distillation_temperature": 0.0}, "distillation_temperature must be above 0"),
    ],
)
def test_configurations_that_do_not_fit_together(options, message):
    with pytest.raises(Exception, match=message):
        CondenserConfig(**options)


# ------------------------------------------------------------------------------ saving and loading


def saved_models(folder):
    """Both models in folders, as a user has them."""
    for name, seed in (("condenser", 0), ("decoder", 1)):
        causal_model("Llama", seed=seed).save_pretrained(folder / name)
    return [str(folder / name) for name in ("condenser", "decoder")]


def loaded_vectors(_, folder):
    model = Condenser.from_pretrained(folder)
    return model.vectors(torch.arange(3, 40), np.array([30, 7]))[0].detach()


def test_a_fresh_process_gives_identical_vectors(tmp_path):
    from transformers import AutoModelForCausalLM

    paths = saved_models(tmp_path)
    torch.manual_seed(5)
    model = Condenser.from_models(
        *(AutoModelForCausalLM.from_pretrained(path) for path in paths),
        ratios=[4],
        lora={"r": 4, "init_lora_weights": False},
    ).eval()
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "adapter_model.safetensors"} <= names
    base = (tmp_path / "condenser" / "model.safetensors").stat().st_size
    assert sum(path.stat().st_size for path in folder.iterdir()) < base  # no base weights
    (theirs,) = on_ranks(1, loaded_vectors, folder)
    ours = model.vectors(torch.arange(3, 40), np.array([30, 7]))[0]
    assert theirs.equal(ours.detach())


def test_loading_into_models_of_other_widths_is_an_error(tmp_path):
    model = make_condenser()
    model.save_pretrained(tmp_path)
    other = causal_model("Gemma2")
    other.resize_token_embeddings(97)
    import transformers

    wide = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=97, hidden_size=48, intermediate_size=16, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"decoder must have a width of 32"):
        Condenser.from_pretrained(tmp_path, condenser=causal_model("Llama"), decoder=wide)
    with pytest.raises(ValueError, match="condenser must be the model that the adapter"):
        Condenser.from_pretrained(tmp_path, condenser=wide, decoder=causal_model("Llama"))
    with pytest.raises(ValueError, match=r"condenser must be given, because config.json"):
        Condenser.from_pretrained(tmp_path, decoder=causal_model("Llama"))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model.safetensors is missing"):
        Condenser.from_pretrained(tmp_path, condenser=causal_model("Llama"), decoder=wide)


H, K = 32, 6
SLOTS = torch.randn(1, K, H)
PUBLISHED = {
    "A": {
        "modules": {
            "pre_condensed_tokens": SLOTS,
            "linear_state_dict": torch.nn.Linear(2 * H, H).state_dict(),
            "norm_state_dict": torch.nn.LayerNorm(2 * H).state_dict(),
        }
    },
    "B": {
        "modules": {
            "condense_tokens": SLOTS,
            "ae_embedding": torch.randn(1, 1, H),
            "bos_embedding": torch.randn(1, 1, H),
            "span_concat_embedding": torch.randn(1, 1, H),
        }
    },
    "C": {
        "gist_tokens": SLOTS[0],
        "lm_embedding": torch.randn(1, H),
        "auto_encoding_embedding": torch.randn(2, H),
    },
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_modules(kind, tmp_path):
    """Vectors by hand, as condense-trainer computes them: the last K places, norm and linear."""
    condenser, decoder = causal_model("Llama").eval(), causal_model("Llama", seed=1)
    plain = copy.deepcopy(condenser)
    (tmp_path / "checkpoints").mkdir()
    torch.save(PUBLISHED[kind], tmp_path / "checkpoints" / "modules.pt")
    model = Condenser.from_pretrained(tmp_path, condenser=condenser, decoder=decoder)
    ids = torch.arange(3, 27)
    ours, _ = model.vectors(ids, np.array([24]))
    rows = torch.cat([plain.get_input_embeddings()(ids), SLOTS[0]])
    places = list(range(24 + K))
    if kind == "C":
        places[24:] = range(0, 24, 24 // K)
    hidden = run(plain.base_model, rows, places, 2 if kind == "A" else 1)[-K:]
    if kind == "A":
        modules = PUBLISHED["A"]["modules"]
        norm, linear = torch.nn.LayerNorm(2 * H), torch.nn.Linear(2 * H, H)
        norm.load_state_dict(modules["norm_state_dict"])
        linear.load_state_dict(modules["linear_state_dict"])
        hidden = linear(norm(hidden))
    torch.testing.assert_close(ours, hidden, rtol=1e-4, atol=1e-5)
    documents = make_documents()
    assert model.train()(**make_batch(documents)).loss.isfinite()
    parts = {"A": [], "B": ["separator", "bos_embedding"], "C": ["completion_flags"]}[kind]
    assert all(getattr(model, name) is not None for name in parts)


class NotTensors:
    """Something that only runs as code."""


def test_other_modules_are_refused(tmp_path):
    models = {"condenser": causal_model("Llama"), "decoder": causal_model("Llama", seed=1)}
    path = tmp_path / "modules.pt"

    def load():
        return Condenser.from_pretrained(tmp_path, **models)

    torch.save({"modules": {"condense_tokens": SLOTS, "other": SLOTS}}, path)
    with pytest.raises(ValueError, match=r"must have the keys of a known format .*got \["):
        load()
    torch.save({"modules": {"tokens": NotTensors()}}, path)
    with pytest.raises(ValueError, match="weights_only=True, got something else"):
        load()
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="weights_only=True, got something else"):
        load()
    torch.save({"gist_tokens": torch.randn(4, 48), **dict(list(PUBLISHED["C"].items())[1:])}, path)
    with pytest.raises(ValueError, match="condenser must have a width of 48"):
        load()


def test_own_weights_of_another_configuration(tmp_path):
    model = make_condenser()
    weights = model.own_state_dict()
    with pytest.raises(ValueError, match=r"slots must be \(4, 32\), got \(5, 32\)"):
        model.load_own({**weights, "slots": torch.zeros(5, 32)})
    with pytest.raises(ValueError, match="got no slots"):
        model.load_own({name: value for name, value in weights.items() if name != "slots"})
    assert transformers_model(model.decoder).training is False
