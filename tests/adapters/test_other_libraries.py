"""TRL, PEFT and accelerate around a patched model: the numbers of the unpatched one."""

import pytest
import torch
import transformers as hf
from datasets import Dataset
from tokenizers import Tokenizer, models

from tokenpack import is_patched, packing_stats, patch_model, unpatch_model

from .models import LLAMA, T5

peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")


def llama(seed=0):
    torch.manual_seed(seed)
    return LLAMA.build()


def tokenizer():
    words = models.WordLevel({str(i): i for i in range(97)}, unk_token="3")
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="0", eos_token="2", unk_token="3"
    )


def batch_of(rows=3, columns=12):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 97, (rows, columns), generator=generator)
    mask = (torch.arange(columns) < torch.tensor([12, 5, 9])[:rows, None]).long()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


# ---------------------------------------------------------------------------------------------- TRL


SFT = {
    "padded rows": {},
    "packing": {"packing": True, "max_length": 24},
    "padding_free": {"padding_free": True, "max_length": None},
}


def losses_of_sft(model, folder, options):
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": torch.randint(3, 97, (n,), generator=generator).tolist()}
        for n in range(4, 44)
    ]
    args = trl.SFTConfig(
        str(folder), per_device_train_batch_size=4, logging_steps=1, report_to=[],
        bf16=False, use_cpu=True, learning_rate=1e-2, save_strategy="no", disable_tqdm=True,
        **{"max_steps": 10, **options},
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("way", SFT)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sft_trainer(way, tmp_path):
    model = patch_model(llama(), strict=True)
    ours = losses_of_sft(model, tmp_path, SFT[way])
    theirs = losses_of_sft(llama(), tmp_path, SFT[way])
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert len(set(ours)) == 10  # the model learns
    stats = packing_stats(model)
    assert (stats.packed_calls, stats.unseen_calls) == (10, 0)
    if way == "padded rows":
        assert stats.padding_share > 0.1


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_dpo_trainer(tmp_path):
    def losses(model):
        generator = torch.Generator().manual_seed(0)

        def text(count):
            return " ".join(map(str, torch.randint(3, 97, (count,), generator=generator).tolist()))

        rows = [
            {"prompt": text(3 + n % 4), "chosen": text(2 + n % 5), "rejected": text(2 + n)}
            for n in range(12)
        ]
        args = trl.DPOConfig(
            str(tmp_path), max_steps=4, per_device_train_batch_size=3, logging_steps=1,
            report_to=[], bf16=False, use_cpu=True, learning_rate=1e-2, save_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        trainer = trl.DPOTrainer(
            model, ref_model=llama(), args=args, train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
        )  # fmt: skip
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    model = patch_model(llama(), strict=True)
    assert losses(model) == pytest.approx(losses(llama()), abs=1e-5)
    assert packing_stats(model).packed_calls >= 4


# --------------------------------------------------------------------------------------------- PEFT


def adapted(config, patched, base=llama, **options):
    """A model with random, non-zero adapters, from the same seed each time."""
    torch.manual_seed(1)
    model = peft.get_peft_model(base(), config)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "poly" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return patch_model(model, **options) if patched else model


BY_ROW = {
    "adapter_names": (
        lambda: peft.LoraConfig(target_modules=["q_proj"]),
        llama,
        lambda: {"adapter_names": ["default", "__base__", "default"]},
    ),
    "alora_offsets": (
        lambda: peft.LoraConfig(
            task_type="CAUSAL_LM",
            target_modules=["q_proj"],
            alora_invocation_tokens=[int(batch_of()["input_ids"][0, 4])],
        ),
        llama,
        dict,
    ),
    "task_ids": (
        lambda: peft.PolyConfig(
            task_type="SEQ_2_SEQ_LM", r=4, n_tasks=3, n_skills=2, n_splits=2, target_modules=["q"]
        ),
        T5.build,
        lambda: {"task_ids": torch.tensor([0, 1, 2])},
    ),
}


REASONS = {
    "adapter_names": "PEFT passes adapter_names by row to its layers",
    "alora_offsets": "PEFT passes alora_offsets by row to its layers",
    "task_ids": "a PEFT method has a hook on Linear",  # with the values in a closure
}


@pytest.mark.parametrize("name", BY_ROW)
def test_values_by_row_run_padded(name):
    config, base, extra = BY_ROW[name]
    results = []
    for patched in (True, False):
        model = adapted(config(), patched, base).train(name == "task_ids")
        torch.manual_seed(3)
        results.append(model(**batch_of(), **extra()).loss)
        if patched:
            assert packing_stats(model).fallbacks == {REASONS[name]: 1}
    assert results[0].equal(results[1])


def test_one_row_with_alora():
    """Its offset counts from the end of the padded row, which is later than that of the stream."""
    config, base, _ = BY_ROW["alora_offsets"]
    batch = {name: value[:1] for name, value in batch_of().items()}
    batch = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in batch.items()}
    batch["labels"][:, -3:] = -100
    ours, theirs = (adapted(config(), patched, base)(**batch).loss for patched in (True, False))
    assert ours.equal(theirs)


def with_xlora(experts, patched):
    """PEFT turns the cache off itself only in ``generate``."""
    model = llama()
    model.config.use_cache = False
    if patched:
        patch_model(model)
    torch.manual_seed(4)
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=32, xlora_depth=1, adapters=experts
    )
    return peft.get_peft_model(model, config)


def test_xlora_runs_padded(tmp_path):
    """It scales the experts of each layer by values for each slot of the padded batch."""
    experts = {name: str(tmp_path / name) for name in ("0", "1")}
    for folder in experts.values():
        adapted(peft.LoraConfig(target_modules=["q_proj"]), False).save_pretrained(folder)
    ours, theirs = (with_xlora(experts, patched) for patched in (True, False))
    for model in (ours, theirs):
        model.result = model(**batch_of()).loss
        model.result.backward()
    assert ours.result.equal(theirs.result)
    for mine, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (mine.grad is None) == (their.grad is None)
        assert mine.grad is None or mine.grad.equal(their.grad)
    # One call computes the scalings, and one uses them.
    reason = "a PEFT method has a hook on LlamaForCausalLM"
    assert packing_stats(ours).fallbacks == {reason: 2}
    with ours.disable_adapter():
        assert abs(ours(**batch_of()).loss - llama()(**batch_of()).loss).item() <= 1e-5
    assert packing_stats(ours).packed_calls == 1
    with pytest.raises(ValueError, match="q_proj has a forward set on the instance"):
        patch_model(theirs)


def test_lora_packs():
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ours, theirs = (adapted(config, patched) for patched in (True, False))
    for model in (ours, theirs):
        model.result = model(**batch_of()).loss
        model.result.backward()
    assert abs(ours.result - theirs.result).item() <= 1e-5
    for mine, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (mine.grad is None) == (their.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, their.grad, rtol=1e-3, atol=1e-6)
    assert packing_stats(ours).packed_calls == 1


def test_prompt_tuning_packs():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ours, theirs = (adapted(config, patched) for patched in (True, False))
    assert abs(ours(**batch_of()).loss - theirs(**batch_of()).loss).item() <= 1e-5
    assert packing_stats(ours).packed_calls == 1


def test_prefix_tuning_runs_padded():
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ours, theirs = (adapted(config, patched) for patched in (True, False))
    torch.testing.assert_close(ours(**batch_of()).loss, theirs(**batch_of()).loss)
    assert packing_stats(ours).fallbacks == {"a cache is in use": 1}


@pytest.mark.parametrize("patch_first", [False, True])
def test_a_saved_and_merged_head(patch_first):
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = llama()
    if patch_first:
        patch_model(model)
    model = peft.get_peft_model(model, config)
    patch_model(model)
    expected = llama()(**batch_of()).loss
    assert abs(model(**batch_of()).loss - expected).item() <= 1e-5
    merged = model.merge_and_unload()
    assert abs(merged(**batch_of()).loss - expected).item() <= 1e-5
    unpatch_model(merged)
    assert type(merged.lm_head) is torch.nn.Linear
    torch.testing.assert_close(merged(**batch_of()).loss, expected)


def test_a_wrapper_that_keeps_the_old_forward_is_refused():
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2)
    model = peft.get_peft_model(llama(), config)
    with pytest.raises(ValueError, match=r"AdaptionPromptModel.*keeps the forward of Llama"):
        patch_model(model)
    assert not is_patched(model)


# --------------------------------------------------------------------------------------- accelerate


def test_undoing_after_hooks_of_accelerate():
    accelerate = pytest.importorskip("accelerate")
    expected = llama().eval()(**batch_of()).logits
    model = patch_model(llama().eval())
    accelerate.cpu_offload(model, execution_device="cpu")
    real = batch_of()["attention_mask"].bool()
    packed = model(**batch_of(), use_cache=False).logits
    torch.testing.assert_close(packed[real], expected[real])
    unpatch_model(model)
    torch.testing.assert_close(model(**batch_of()).logits, expected)
    accelerate.hooks.remove_hook_from_submodules(model)
    torch.testing.assert_close(model(**batch_of()).logits, expected)
