"""``patch_model(check=True)`` compares the first batch in training."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tokenpack import PatchCheckError, check_patch, packing_stats, patch_model
from tokenpack.adapters import head
from tokenpack.comparison import first_batch

from ..adapters.models import BY_NAME, LLAMA, T5
from .test_faults import FAULTS, replaced, scaled_gradient


@pytest.fixture
def checks(monkeypatch):
    """The parts that were compared, with the comparisons."""
    found = []

    def compare(part, *others, **options):
        check = compare_for_real(part, *others, **options)
        found.append((type(part).__name__, check))
        return check

    compare_for_real = first_batch.compare
    monkeypatch.setattr(first_batch, "compare", compare)
    return found


def half_the_gradient():
    return replaced(head, "mean_of_counted", scaled_gradient(0.5))


def grads(model):
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "T5ForConditionalGeneration",
                                  "LlamaForSequenceClassification"])  # fmt: skip
def test_the_first_batch_is_compared_and_no_other(name, checks):
    case = BY_NAME[name]
    batch = case.batch("right")
    model, plain = case.build(), patch_model(case.build())
    assert patch_model(model, check=True) is model
    with torch.no_grad():
        model(**batch)  # no training
    model.eval()(**batch)
    assert not checks
    stats = copy.deepcopy(packing_stats(model))
    for step in range(2):
        torch.manual_seed(step)
        model.train()(**batch).loss.backward()
        plain(**batch).loss.backward()
        assert [(name, check.ok) for name, check in checks] == [(case.model, True)]
    assert packing_stats(model).packed_calls == stats.packed_calls + 2  # not those of the check
    assert all(a.equal(b) for a, b in zip(grads(model), grads(plain), strict=True))


def test_a_difference_raises(checks):
    model, batch = patch_model(LLAMA.build(), check=True), LLAMA.batch("right")
    with half_the_gradient():
        for _ in range(2):  # it stays an error
            with pytest.raises(PatchCheckError, match=r"got another result on the first") as error:
                model(**batch)
        assert error.value.check.verdict == "differs"
        assert "gradients of lm_head" in str(error.value)
        assert all(g is None for g in grads(model))
        assert packing_stats(model).packed_calls == 0
        patch_model(model)  # without the check
        model(**batch)
    patch_model(model, check=True)
    model(**batch)
    assert len(checks) == 3


@pytest.mark.parametrize("fault", ["positions", "sequences see one another"])
def test_other_faults_raise(fault):
    case, module, function, make = FAULTS[fault]
    model = patch_model(case.build(), check=True)
    with replaced(module, function, make), pytest.raises(PatchCheckError):
        model(**case.batch("right"))


def test_a_batch_that_runs_padded_does_not_count(checks, caplog):
    caplog.set_level(logging.ERROR)
    model, batch = patch_model(LLAMA.build(), check=True), LLAMA.batch("right")
    for _ in range(3):
        model(**batch, use_cache=True)
    model(**batch)
    model(**batch)
    packed = ["nothing packed"] * 3 + ["equal"]
    assert [check.verdict for _, check in checks] == packed


@pytest.mark.filterwarnings("ignore:patch_model has no effect")
def test_a_warning_if_no_batch_packs(checks):
    model, batch = patch_model(LLAMA.build(), check=True), LLAMA.batch("right")
    for _ in range(7):
        model(**batch, use_cache=True)
    with pytest.warns(RuntimeWarning, match=r"compared nothing.*a cache is in use"):
        model(**batch, use_cache=True)
    model(**batch, use_cache=True)
    assert len(checks) == 8


def test_strict_raises_what_it_always_raises():
    model = patch_model(LLAMA.build(), check=True, strict=True)
    with pytest.raises(PatchCheckError, match="a cache is in use") as error:
        model(**LLAMA.batch("right"), use_cache=True)
    assert isinstance(error.value.__cause__, ValueError)


def test_the_part_that_is_called_is_compared(checks):
    """As TRL does: the base model is called, and a head of its own computes the loss."""
    model, batch = patch_model(LLAMA.build(), check=True), LLAMA.batch("right")

    def forward(self, input_ids, attention_mask, labels):
        hidden = self.base_model(input_ids, attention_mask=attention_mask)[0]
        return self.loss_function(self.lm_head(hidden), labels, self.config.vocab_size)

    model.forward = forward.__get__(model)
    model(**batch).backward()
    ((name, check),) = checks
    assert (name, check.ok) == ("LlamaModel", True)
    assert any("weighted sum of the outputs" in note for note in check.notes)
    case, module, function, make = FAULTS["sequences see one another"]
    model = patch_model(case.build(), check=True)
    model.forward = forward.__get__(model)
    with replaced(module, function, make), pytest.raises(PatchCheckError):
        model(**batch)


def test_the_graph_of_the_call_is_left_alone():
    """Embeddings that something else computed get their gradient, once."""
    model, batch = patch_model(LLAMA.build(), check=True), LLAMA.batch("right")
    results = []
    for _ in range(2):
        table = nn.Embedding.from_pretrained(model.model.embed_tokens.weight.detach(), freeze=False)
        inputs = {**batch, "inputs_embeds": table(batch["input_ids"]) * 2}
        del inputs["input_ids"]
        model(**inputs).loss.backward()
        results.append(table.weight.grad)
    assert results[0].equal(results[1])


def test_copies_and_pickles_of_a_model_that_waits(checks):
    model, batch = patch_model(LLAMA.build(), check=True), LLAMA.batch("right")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(**batch)
    model(**batch)
    assert len(checks) == 3


# ------------------------------------------------------------------------------ several processes


@pytest.fixture
def one_rank(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp(one_rank, checks):
    """Compares inside of the forward that DDP has prepared for; no collective runs."""
    batch = T5.batch("right")
    plain = patch_model(T5.build())
    model = DistributedDataParallel(patch_model(T5.build(), check=True))
    for _ in range(2):
        model(**batch).loss.backward()
        plain(**batch).loss.backward()
    assert [check.ok for _, check in checks] == [True]
    for mine, other in zip(grads(model), grads(plain), strict=True):
        torch.testing.assert_close(mine, other)
    model = DistributedDataParallel(patch_model(LLAMA.build(), check=True))
    with half_the_gradient(), pytest.raises(PatchCheckError):
        model(**LLAMA.batch("right"))


def test_fsdp_is_refused_at_once(one_rank):
    model = patch_model(LLAMA.build(), check=True)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.fsdp.fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match="model must not be split by FSDP to be checked"):
        model(**LLAMA.batch("right"))
    with pytest.raises(ValueError, match="model must not be split by FSDP to be checked"):
        check_patch(model, LLAMA.batch("right"))


@pytest.mark.parametrize("mark, by", [("_fsdp_flattened", "FSDP"), ("ds_id", "DeepSpeed ZeRO-3")])
def test_parameters_that_others_shard_are_refused(mark, by):
    """FullyShardedDataParallel and DeepSpeed mark parameters. Both need an accelerator to run."""
    model = patch_model(LLAMA.build(), check=True)
    setattr(model.lm_head.weight, mark, True)
    with pytest.raises(ValueError, match=f"split by {by} to be checked, got lm_head.weight"):
        model(**LLAMA.batch("right"))
