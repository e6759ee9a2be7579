"""`check_patch` and ``patch_model(check=True)`` with PEFT's wrappers and TRL's forward."""

import pytest

from tokenpack import check_patch, packing_stats, patch_model
from tokenpack.comparison import first_batch

from ..adapters.models import LLAMA

peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")

from ..adapters.test_other_libraries import adapted, batch_of, losses_of_sft  # noqa: E402


@pytest.mark.parametrize("patched", [False, True])
def test_lora(patched):
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", lora_dropout=0.2)
    model = adapted(config, patched).train()
    check = check_patch(model, batch_of())
    assert check.ok, str(check)
    gradients = [c.name for c in check.comparisons if c.name.startswith("gradients")]
    assert gradients == [f"gradients of base_model.model.model.layers.{i}" for i in range(3)]
    assert "dropout was set to 0 in 3 modules" in str(check)


def test_prompt_tuning():
    """PEFT puts columns before those of the batch, in the outputs too."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = adapted(config, True).train()
    check = check_patch(model, batch_of())
    assert check.ok, str(check)
    assert {"logits", "gradients of prompt_encoder.default.embedding"} <= {
        c.name for c in check.comparisons
    }


def test_adapters_by_row_pack_nothing():
    model = adapted(peft.LoraConfig(target_modules=["q_proj"]), True).eval()
    names = ["default", "__base__", "default"]
    check = check_patch(model, {**batch_of(), "adapter_names": names})
    assert check.verdict == "nothing packed"
    assert check.fallbacks == {"PEFT passes adapter_names by row to its layers": 1}


@pytest.mark.parametrize("way", [{}, {"padding_free": True, "max_length": None}])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sft_trainer_compares_its_first_batch(way, tmp_path, monkeypatch):
    checks, compare = [], first_batch.compare

    def recorded(part, *others, **options):
        checks.append((type(part).__name__, compare(part, *others, **options)))
        return checks[-1][1]

    monkeypatch.setattr(first_batch, "compare", recorded)
    model = patch_model(LLAMA.build(), check=True)
    losses_of_sft(model, tmp_path, {**way, "max_steps": 2})
    ((part, check),) = checks
    assert part == "LlamaModel"
    assert check.ok, str(check)
    assert packing_stats(model).packed_calls == 2


def test_a_model_with_the_forward_of_trl():
    from trl.trainer.utils import add_fused_lm_head

    model = patch_model(LLAMA.build().train())
    add_fused_lm_head(model)
    forward = vars(model)["forward"]
    check = check_patch(model, {**batch_of(), "fused_lm_head": True})
    assert check.ok, str(check)
    assert "log_probs" in {comparison.name for comparison in check.comparisons}
    assert vars(model)["forward"] is forward
