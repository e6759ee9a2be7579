"""A patched model supports everything that a transformers model supports."""

import copy
import pickle
import threading

import pytest
import torch
import transformers as hf

from tokenpack import is_patched, packing_stats, patch_model, unpatch_model

from .models import BERT, BY_NAME, LLAMA, NLLB, T5, Case, gradient_distance

UMT5 = BY_NAME["UMT5ForConditionalGeneration"]
MODELS = [T5, NLLB, LLAMA, BERT] + ([UMT5] if UMT5.available else [])
parametrize_models = pytest.mark.parametrize("case", MODELS, ids=lambda case: case.model)


@pytest.fixture
def reference(case: Case):
    return case.build()


def assert_trains_alike(model, reference, batch, run=None):
    model.zero_grad()
    reference.zero_grad()
    ours, theirs = (model if run is None else run)(**batch).loss, reference(**batch).loss
    ours.backward()
    theirs.backward()
    assert abs(ours - theirs).item() <= 1e-5
    assert gradient_distance(model, reference) <= 1e-5


def assert_packed(model, calls=1):
    stats = packing_stats(model)
    assert (stats.packed_calls, dict(stats.fallbacks)) == (calls, {})


# ----------------------------------------------------------------------------- copies and files


@parametrize_models
def test_deepcopy_is_independent(case, reference):
    model = patch_model(copy.deepcopy(reference))
    twin = copy.deepcopy(model)
    assert_trains_alike(twin, reference, case.batch("right"))
    assert_packed(twin)
    assert_packed(model, calls=0)
    unpatch_model(twin)
    assert is_patched(model)
    assert not is_patched(twin)


@parametrize_models
def test_pickle_keeps_the_patch(case, reference):
    model = pickle.loads(pickle.dumps(patch_model(copy.deepcopy(reference))))
    assert_trains_alike(model, reference, case.batch("left"))
    assert_packed(model)
    assert type(unpatch_model(model)) is type(reference)


def test_unpickling_registers_the_attention_again(monkeypatch):
    reference = LLAMA.build()
    saved = pickle.dumps(patch_model(copy.deepcopy(reference)))
    for registry in (hf.AttentionInterface, hf.AttentionMaskInterface):  # as in a new process
        monkeypatch.delitem(registry._global_mapping, "tokenpack_sdpa")
    model = pickle.loads(saved)
    assert_trains_alike(model, reference, LLAMA.batch("left"))
    assert_packed(model)


@parametrize_models
def test_saved_files_do_not_contain_the_patch(case, reference, tmp_path):
    model = patch_model(copy.deepcopy(reference))
    assert list(model.state_dict()) == list(reference.state_dict())
    model.save_pretrained(tmp_path / "patched")
    reference.save_pretrained(tmp_path / "stock")
    for name in ("config.json", "generation_config.json"):
        stock = tmp_path / "stock" / name
        if stock.exists():
            assert (tmp_path / "patched" / name).read_text() == stock.read_text()
    loaded = type(reference).from_pretrained(tmp_path / "patched").train()
    assert not is_patched(loaded)
    assert_trains_alike(patch_model(loaded), reference, case.batch("right"))


@parametrize_models
def test_unpatching_restores_the_same_bits(case, reference):
    model = patch_model(copy.deepcopy(reference))
    batch = case.batch("right")
    model(**batch)
    assert unpatch_model(model) is model
    ours, theirs = model(**batch), reference(**batch)
    assert ours.loss.equal(theirs.loss)
    assert ours.logits.equal(theirs.logits)
    assert model.config.to_dict() == reference.config.to_dict()
    assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]
    assert [set(vars(m)) for m in model.modules()] == [set(vars(m)) for m in reference.modules()]


def test_patching_twice_changes_options_and_unpatches_once():
    model = patch_model(patch_model(T5.build()), logits="always")
    assert model(**T5.batch("right")).logits is not None
    assert not is_patched(unpatch_model(model))
    assert unpatch_model(model) is model  # no effect on a model that is not patched


def test_model_from_a_patched_config_is_not_patched():
    model = patch_model(LLAMA.build())
    other = type(LLAMA.build())(copy.deepcopy(model.config)).eval()
    assert not is_patched(other)
    expected = other(**LLAMA.batch("right")).loss
    assert abs(patch_model(other)(**LLAMA.batch("right")).loss - expected).item() <= 1e-5
    assert unpatch_model(other).config._attn_implementation == "sdpa"


# ------------------------------------------------------------------------ training as transformers


@parametrize_models
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(case, reference, use_reentrant):
    model = patch_model(copy.deepcopy(reference))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_trains_alike(model, reference, case.batch("right"))
    assert_packed(model)


def test_checkpointing_a_whole_stack_keeps_the_positions():
    reference = NLLB.build()
    model = patch_model(copy.deepcopy(reference))
    encoder = model.model.encoder
    run = type(encoder).forward

    class Checkpointed(type(encoder)):
        def forward(self, *args, **kwargs):
            return torch.utils.checkpoint.checkpoint(
                run, self, *args, use_reentrant=False, **kwargs
            )

    encoder.__class__ = Checkpointed
    assert_trains_alike(model, reference, NLLB.batch("left"))


@parametrize_models
@pytest.mark.parametrize("patch_first", [True, False])
def test_lora(case, reference, patch_first):
    peft = pytest.importorskip("peft")

    def with_lora(model):
        torch.manual_seed(5)
        config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
        return peft.get_peft_model(model, config)

    model = copy.deepcopy(reference)
    model = with_lora(patch_model(model)) if patch_first else patch_model(with_lora(model))
    assert_trains_alike(model, with_lora(reference), case.batch("right"))
    assert_packed(model)


def test_lora_on_the_head_itself_keeps_the_loss_right():
    peft = pytest.importorskip("peft")

    def with_lora(model):
        torch.manual_seed(5)
        config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
        return peft.get_peft_model(model, config)

    reference = LLAMA.build()
    for model in (
        with_lora(patch_model(copy.deepcopy(reference))),
        patch_model(with_lora(copy.deepcopy(reference))),
    ):
        assert_trains_alike(model, with_lora(copy.deepcopy(reference)), LLAMA.batch("right"))
        assert "not a plain nn.Linear" in packing_stats(model).loss


@parametrize_models
def test_autocast_is_as_close_to_float32_as_the_padded_model(case, reference):
    """Compares means over several models, because rounding errors of one model vary."""
    batch = case.batch("right")
    ours, theirs = [], []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        for parameter in reference.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
        exact, padded = copy.deepcopy(reference), copy.deepcopy(reference)
        model = patch_model(copy.deepcopy(reference))
        exact(**batch).loss.backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = model(**batch).loss, padded(**batch).loss
        assert losses[0].dtype == torch.float32
        for loss in losses:
            loss.backward()
        ours.append(gradient_distance(model, exact))
        theirs.append(gradient_distance(padded, exact))
        assert_packed(model)
    assert sum(ours) <= 1.3 * sum(theirs)


@parametrize_models
def test_sixteen_bit_parameters(case):
    exact = case.build()
    reference = copy.deepcopy(exact).to(torch.bfloat16)
    model = patch_model(copy.deepcopy(reference))
    batch = case.batch("left")
    truth, ours, theirs = (float(m(**batch).loss.detach()) for m in (exact, model, reference))
    assert abs(ours - truth) <= 1.5 * abs(theirs - truth) + 0.02


def test_dropout_has_the_right_probability():
    case = Case(T5.family, T5.config, T5.model, {**T5.options, "dropout_rate": 0.3}, T5.labels)
    reference = case.build()
    model = patch_model(copy.deepcopy(reference))
    batch = case.batch("right")
    with torch.no_grad():
        ours = torch.stack([model(**batch).loss for _ in range(100)])
        theirs = torch.stack([reference(**batch).loss for _ in range(100)])
    error = (ours.var() / 100 + theirs.var() / 100).sqrt()
    assert abs(ours.mean() - theirs.mean()) <= 4 * error
    assert 0.5 <= ours.std() / theirs.std() <= 2.0
    assert model.eval()(**batch).loss.equal(model(**batch).loss)


def test_layerdrop_follows_the_model():
    options = {**NLLB.options, "encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5}
    case = Case(NLLB.family, NLLB.config, NLLB.model, options, NLLB.labels)
    reference = case.build()
    model = patch_model(copy.deepcopy(reference))
    batch = case.batch("right")
    dropped = set()
    for seed in range(8):  # both models draw LayerDrop's numbers first
        torch.manual_seed(seed)
        ours = model(**batch).loss
        torch.manual_seed(seed)
        theirs = reference(**batch).loss
        assert abs(ours - theirs).item() <= 1e-5
        dropped.add(round(theirs.item(), 4))
    assert len(dropped) > 1


def test_threads_do_not_interfere():
    jobs = []
    for case in (NLLB, T5, LLAMA):
        model, batch = case.build(), case.batch("left")
        expected = float(model(**batch).loss.detach())
        jobs.append((patch_model(model), batch, expected))
    jobs.append(jobs[0])  # one model in two threads
    wrong = []

    def run(model, batch, expected):
        for _ in range(20):
            loss = float(model(**batch).loss.detach())
            if abs(loss - expected) > 1e-5:
                wrong.append((loss, expected))

    threads = [threading.Thread(target=run, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("case", [T5, NLLB, LLAMA], ids=lambda case: case.model)
@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"do_sample": True}, {"num_beams": 2, "use_cache": False}],
    ids=["greedy", "beams", "sampled", "no-cache"],
)
def test_generate_gives_the_same_tokens(case, how):
    reference = case.build().eval()
    model = patch_model(copy.deepcopy(reference))
    batch = case.batch("left")
    del batch["labels"]
    tokens = []
    for each in (model, reference):
        torch.manual_seed(3)
        tokens.append(each.generate(**batch, max_new_tokens=12, **how))
    assert tokens[0].equal(tokens[1])
    if how.get("use_cache", True):
        assert set(packing_stats(model).fallbacks) <= {"a cache is in use"}


# ------------------------------------------------------------------------------------------- loss


@parametrize_models
@pytest.mark.parametrize("padded", [False, True])
def test_loss_is_divided_by_the_number_of_items(case, reference, padded):
    model = patch_model(copy.deepcopy(reference))
    batch = case.batch("right")
    labels = batch["labels"][:, 1:] if case is LLAMA else batch["labels"]
    count = (labels != -100).sum()
    if padded:
        batch["use_cache"] = True
    mean = model(**batch).loss
    for number in (2 * count, int(2 * count)):
        halved = model(**batch, num_items_in_batch=number).loss
        assert abs(halved * 2 - mean).item() <= 1e-5
    assert packing_stats(model).packed_calls == (0 if padded else 3)


@parametrize_models
def test_logits_option(case, reference):
    batch = case.batch("right")
    unlabelled = {k: v for k, v in batch.items() if k != "labels"}
    if case.labels == "seq2seq":
        unlabelled["decoder_input_ids"] = batch["labels"].clamp(min=0)
    model = patch_model(copy.deepcopy(reference))
    assert model(**batch).logits is None
    assert model(**unlabelled).logits is not None
    assert model.eval()(**batch).logits is not None
    patch_model(model.train(), logits="always")
    with_logits = model(**batch)
    assert with_logits.logits.shape == reference(**batch).logits.shape
    patch_model(model.eval(), logits="never")
    without = model(**batch)
    assert without.logits is None
    assert abs(with_logits.loss - without.loss).item() <= 1e-5


def test_logits_changed_after_the_head_are_detected(caplog):
    class Surprising(type(LLAMA.build())):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits * 0.5
            return outputs

    reference = LLAMA.build()
    model = copy.deepcopy(reference)
    model.__class__ = Surprising
    Surprising.__name__ = "LlamaForCausalLM"
    Surprising.forward.__module__ = (
        "transformers.models.llama"  # as if it were part of transformers
    )
    patch_model(model)
    batch = LLAMA.batch("right")
    with torch.no_grad():
        reference.lm_head.weight.mul_(0.5)
    for _ in range(2):
        assert abs(model(**batch).loss - reference(**batch).loss).item() <= 1e-5
    assert "in an unsupported way" in packing_stats(model).loss


def test_outputs_as_a_tuple():
    model = patch_model(T5.build())
    loss, logits, cache, hidden = model(**T5.batch("right"), return_dict=False)
    assert loss.dim() == 0
    assert logits is None  # and not silently something else
    assert cache is None
    assert hidden.shape[:2] == T5.batch("right")["input_ids"].shape
