"""Models, batches and contenders for the suites that run whole training steps.

T5, mT5 and NLLB take prompts as sources and completions as targets; Llama has both in one row.
Weights are random. Dropout is off, as in most fine-tuning today.
"""

import time
from functools import partial
from typing import NamedTuple

import pytest
import torch
from transformers import MT5Config, MT5ForConditionalGeneration

from tokenpack import patch_model
from tokenpack.checks import IGNORE_INDEX
from tokenpack.commands.models import ModelSize, SpecialIds, build_llama, build_nllb, build_t5

from .common import DEVICE, ON_GPU, make_batch, make_pair_batch

IDS = SpecialIds(pad=0, eos=1, bos=1)


class StepSize(NamedTuple):
    """Size of a model, and how many rows its batches have."""

    model: ModelSize
    rows: int


def _size(d_model, d_ff, heads, layers, vocab_size, rows, max_length):
    kv_heads = max(heads // 4, 1)
    return StepSize(ModelSize(d_model, d_ff, heads, kv_heads, layers, vocab_size, max_length), rows)


SIZES = {
    "tiny": _size(128, 512, 2, 2, 4_096, 24, 128),
    "small": _size(512, 2048, 8, 6, 32_128, 64, 512),
    "base": _size(768, 3072, 12, 12, 32_128, 64, 1024),
}
if not ON_GPU:  # for two cores: shallower models, shorter rows
    SIZES["small"] = _size(512, 2048, 8, 2, 4_096, 24, 128)
    SIZES["base"] = _size(768, 3072, 12, 12, 32_128, 32, 128)

MODELS = {
    "T5": build_t5,
    "mT5": partial(build_t5, config_class=MT5Config, model_class=MT5ForConditionalGeneration),
    "NLLB": build_nllb,
    "Llama": build_llama,
}


# ------------------------------------------------------------------------------------- contenders


def _padded(attention):
    def make(name, size, batch):
        return make_model(name, size, attention), batch

    return make


def _packed(name, size, batch):
    return patch_model(make_model(name, size, "sdpa")), batch


def _flattened(name, size, batch):
    """transformers' collator without padding: joins rows and separates them by position ids."""
    if name != "Llama":
        pytest.skip("DataCollatorWithFlattening is for decoder-only models")
    from transformers import DataCollatorWithFlattening

    mask = batch["attention_mask"].bool()
    rows = [{"input_ids": ids[on].tolist()} for ids, on in zip(batch["input_ids"], mask)]
    attention = "sdpa"
    if ON_GPU:
        pytest.importorskip("flash_attn", reason="its authors use FlashAttention with it")
        attention = "flash_attention_2"
    joined = DataCollatorWithFlattening(return_tensors="pt")(rows)
    return make_model(name, size, attention), {key: joined[key].to(DEVICE) for key in joined}


def _liger(name, size, batch):
    if not ON_GPU:
        pytest.skip("Liger Kernel needs a GPU")
    if name != "Llama":
        pytest.skip("Liger Kernel patches no encoder-decoder")
    patches = pytest.importorskip("liger_kernel.transformers")
    model = make_model(name, size, "sdpa")
    patches.apply_liger_kernel_to_llama(model=model)
    return model, batch


def _nai_t5(name, size, batch):
    if name != "T5":
        pytest.skip("nai-t5 is for T5, and runs there only")
    from .t5_peers import NaiT5

    return NaiT5(make_model(name, size, "sdpa")), batch


CONTENDERS = {
    "padded, SDPA": _padded("sdpa"),
    "padded, eager": _padded("eager"),
    "packed": _packed,
    "DataCollatorWithFlattening": _flattened,
    "padded, Liger": _liger,
    "padded, nai-t5": _nai_t5,
}


def make_model(name, size, attention):
    """A model in training mode, with the same weights in every call."""
    torch.manual_seed(0)
    model = MODELS[name](size.model, IDS)
    model.set_attn_implementation(attention)
    return model.to(DEVICE).train()


def padded_batch(name, size, preset):
    """A padded batch, and its number of real tokens on both sides."""
    generator = torch.Generator().manual_seed(0)
    rows, longest = size.rows, size.model.max_length

    def tokens(batch):
        ids = torch.randint(2, size.model.vocab_size, batch.mask.shape, generator=generator)
        return ids.to(DEVICE).masked_fill(~batch.mask, IDS.pad)

    if name == "Llama":
        source = target = make_batch(rows, longest, preset)
        ids = labels = tokens(source)
        real = int(source.lengths.sum())
    else:
        source, target = make_pair_batch(rows, longest, preset)
        ids, labels = tokens(source), tokens(target)
        real = int(source.lengths.sum() + target.lengths.sum())
    labels = labels.masked_fill(~target.mask, IGNORE_INDEX)
    return {"input_ids": ids, "attention_mask": source.mask.long(), "labels": labels}, real


class TrainingStep:
    """Runs training steps and records how long each took.

    Attributes:
        seconds: of each whole step, with AdamW.
        forward_backward: seconds of each step's forward and backward.
    """

    def __init__(self, model, batch):
        self.model, self.batch = model, batch
        self.optimizer = torch.optim.AdamW(model.parameters(), fused=ON_GPU)
        self.seconds, self.forward_backward = [], []

    def __call__(self):
        begin = time.perf_counter()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_GPU):
            loss = self.model(**self.batch).loss
        loss.backward()
        self._synchronize()
        self.forward_backward.append(time.perf_counter() - begin)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._synchronize()
        self.seconds.append(time.perf_counter() - begin)

    def reset(self):
        """Discard the times of warm-up steps."""
        self.seconds, self.forward_backward = [], []

    def _synchronize(self):
        if ON_GPU:
            torch.cuda.synchronize()
