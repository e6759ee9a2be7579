"""Tests for a GPU: copies on a side stream, page-locked batches, real out-of-memory errors."""

import pytest
import torch

from tokenpack.trainer import HierarchicalTokenTrainer

from .setting import CASES, distance, make_examples, make_trainer, padded_gradient
from .test_exactness import Seen, is_causal, packing_collator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def one_step(name, folder, examples, **options):
    seen = Seen()
    trainer = make_trainer(
        name,
        folder,
        examples,
        callbacks=[seen],
        use_cpu=False,
        learning_rate=0.0,
        max_steps=1,
        max_tokens_per_batch=10_000,
        **options,
    )
    seen.trainer = trainer
    trainer.train()
    return {key: gradient.cpu() for key, gradient in seen.steps[0].items()}, trainer


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_equals_that_of_the_whole_batch(name, ahead, tmp_path):
    examples = make_examples(60, causal=is_causal(name))
    gradient, _ = one_step(
        name, tmp_path, examples, max_tokens_per_microbatch=100, use_cpu_microbatch=ahead
    )
    _, expected = padded_gradient(name, examples)
    assert distance(gradient, expected) < 1e-3  # TF32 is off, but kernels sum in another order


def test_boundaries_of_packed_batches_stay_on_the_host(tmp_path):
    """If they were on the device, each forward would wait for them."""
    seen = []

    class Watching(HierarchicalTokenTrainer):
        def compute_loss(self, model, inputs, **options):
            seen.append((inputs["input_ids"].device.type, inputs["cu_seqlens"].device.type))
            return super().compute_loss(model, inputs, **options)

    options = {"trainer_class": Watching, "data_collator": packing_collator("T5")}
    one_step("T5", tmp_path, make_examples(60), max_tokens_per_microbatch=100, **options)
    assert set(seen) == {("cuda", "cpu")}


def test_a_step_that_really_runs_out_of_memory_is_repeated(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    def model():
        torch.manual_seed(0)
        sizes = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 4, "num_heads": 8}
        options = {"dropout_rate": 0.0, "decoder_start_token_id": 0}
        return T5ForConditionalGeneration(T5Config(vocab_size=97, **sizes, **options))

    examples = make_examples(400, longest=200)
    small, _ = one_step(
        "T5", tmp_path, examples, model=model(), max_tokens_per_microbatch=400, overlong="truncate"
    )
    used = torch.cuda.max_memory_reserved()
    share = 1.3 * used / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(share, 1.0))
    try:
        large, trainer = one_step(
            "T5", tmp_path, examples, model=model(), max_tokens_per_microbatch=10_000
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert trainer.runner.counts.out_of_memory >= 1
    assert trainer.runner.max_tokens < 10_000
    assert distance(large, small) < 1e-3
