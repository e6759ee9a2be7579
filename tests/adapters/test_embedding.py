"""An encoder-decoder with one table embeds both sides in one lookup, if no module would notice."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tokenpack import packing_stats, patch_model

from .models import BY_NAME, NLLB, T5, VOCABULARY, Case, gradient_distance

ONE_TABLE = [
    BY_NAME[f"{name}ForConditionalGeneration"]
    for name in ("T5", "MT5", "UMT5", "M2M100", "Bart", "MBart")
]


class TableGradients(TorchDispatchMode):
    """Counts the dense gradients of word embedding tables."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if op is torch.ops.aten.embedding_dense_backward.default:
            self.count += result.shape[0] >= VOCABULARY
        return result


def table_gradients(model, batch):
    with TableGradients() as gradients:
        model(**batch).loss.backward()
    return gradients.count


SCALES_EMBEDDINGS_OF_IDS = [BY_NAME["MarianMTModel"], BY_NAME["PegasusForConditionalGeneration"]]


@pytest.mark.parametrize("case", SCALES_EMBEDDINGS_OF_IDS, ids=str)
def test_stacks_that_scale_embeddings_get_ids(case: Case):
    reference, batch = case.build(torch.float64), case.batch("right")
    assert reference.get_encoder().embed_scale > 1
    model = patch_model(copy.deepcopy(reference))
    assert table_gradients(model, batch) == table_gradients(reference, batch) == 2
    assert gradient_distance(model, reference) <= 1e-12


@pytest.mark.parametrize("case", ONE_TABLE, ids=str)
def test_a_table_has_one_gradient(case: Case):
    if not case.available:
        pytest.skip(f"needs transformers >= {case.since}")
    model, batch = case.build(), case.batch("right")
    assert table_gradients(model, batch) == 2
    model.zero_grad()
    assert table_gradients(patch_model(model), batch) == 1


def unshare(model):
    """Give the decoder its own table."""
    decoder = model.get_decoder()
    table = copy.deepcopy(decoder.get_input_embeddings())
    table.weight = nn.Parameter(torch.randn_like(table.weight))
    decoder.set_input_embeddings(table)


def scale_one_side(model):
    model.get_decoder().embed_tokens.embed_scale = 2.0


def count_frequencies(model):
    for stack in (model.get_encoder(), model.get_decoder()):
        stack.embed_tokens.scale_grad_by_freq = True


class Louder(nn.Embedding):
    def forward(self, ids):
        return 2.0 * super().forward(ids)


def subclass_one_side(model):
    model.get_decoder().embed_tokens.__class__ = Louder


@pytest.mark.parametrize("change", [unshare, scale_one_side, count_frequencies, subclass_one_side])
def test_different_tables_use_their_own_lookups(change):
    case = T5 if change is subclass_one_side else NLLB
    reference, batch = case.build(torch.float64), case.batch("right")
    change(reference)
    model = patch_model(copy.deepcopy(reference))
    assert table_gradients(model, batch) == table_gradients(reference, batch) == 2
    if change is not count_frequencies:  # this counts padding too, so results differ
        assert gradient_distance(model, reference) <= 1e-12
    assert packing_stats(model).packed_calls == 1


def test_hooks_see_the_lookups():
    model, batch = patch_model(T5.build()), T5.batch("right")
    seen = []
    for stack in (model.get_encoder(), model.get_decoder()):
        stack.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: seen.append(inputs[0].shape[1])
        )
    assert table_gradients(model, batch) == 2
    real = int(batch["attention_mask"].sum())
    assert seen[0] == real
    assert len(seen) == 2


def test_hooks_of_a_stack_see_ids():
    model, batch = patch_model(T5.build()), T5.batch("right")
    seen = []
    model.get_encoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    assert table_gradients(model, batch) == 2
    assert seen[0].shape[1] == int(batch["attention_mask"].sum())


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_wrapped_stack():
    model, batch = patch_model(T5.build()), T5.batch("right")
    model.encoder = Wrapper(model.encoder)
    assert table_gradients(model, batch) == 2
    assert packing_stats(model).packed_calls == 1


def test_no_shared_lookup_without_gradients():
    model, batch = patch_model(T5.build()), T5.batch("right")
    calls = []
    table = nn.Embedding.forward

    def spy(self, ids):
        calls.append(self.num_embeddings)
        return table(self, ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Embedding, "forward", spy)
        with torch.no_grad():
            model(**batch)
        evaluated = len(calls)
        calls.clear()
        model(**batch)
    assert evaluated == len(calls) + 1  # the lookups of relative biases are unchanged
