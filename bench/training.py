"""Models, batches and contenders of whole training steps, for the suites that take them.

Prompts are the sources and completions the targets of T5, mT5 and NLLB; Llama has both in one row.
Weights are random, and dropout is off, as in most fine-tuning of today.
"""

import time
from typing import NamedTuple

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from tokenpack import patch_model

from .common import DEVICE, ON_GPU, make_batch, make_pair_batch

PAD, EOS, IGNORED = 0, 1, -100


class Size(NamedTuple):
    """How large a model is, and its batches."""

    width: int
    inner: int
    heads: int
    layers: int
    vocab: int
    rows: int
    longest: int


SIZES = {
    "tiny": Size(128, 512, 2, 2, 4_096, 24, 128),
    "small": Size(512, 2048, 8, 6, 32_128, 64, 512),
    "base": Size(768, 3072, 12, 12, 32_128, 64, 1024),
}
if not ON_GPU:  # two cores: shallow, as a step's other costs weigh less the wider a model is
    SIZES["small"] = Size(512, 2048, 8, 2, 4_096, 24, 128)
    SIZES["base"] = Size(768, 3072, 12, 12, 32_128, 32, 128)


def _t5(size):
    return T5ForConditionalGeneration(T5Config(**_t5_options(size)))


def _mt5(size):
    return MT5ForConditionalGeneration(MT5Config(**_t5_options(size)))


def _t5_options(size):
    return {
        "vocab_size": size.vocab,
        "d_model": size.width,
        "d_kv": size.width // size.heads,
        "d_ff": size.inner,
        "num_heads": size.heads,
        "num_layers": size.layers,
        "dropout_rate": 0.0,
        "decoder_start_token_id": PAD,
        "pad_token_id": PAD,
    }


def _nllb(size):
    config = M2M100Config(
        vocab_size=size.vocab,
        d_model=size.width,
        encoder_ffn_dim=size.inner,
        decoder_ffn_dim=size.inner,
        encoder_attention_heads=size.heads,
        decoder_attention_heads=size.heads,
        encoder_layers=size.layers,
        decoder_layers=size.layers,
        max_position_embeddings=size.longest,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=EOS,
    )
    return M2M100ForConditionalGeneration(config)


def _llama(size):
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.width,
        intermediate_size=size.inner * 2 // 3 // 32 * 32,  # three matrices where T5 has two
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=max(size.heads // 4, 1),
        max_position_embeddings=size.longest,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


MODELS = {"T5": _t5, "mT5": _mt5, "NLLB": _nllb, "Llama": _llama}


# ------------------------------------------------------------------------------------- contenders


def _padded(attention):
    def make(name, size, batch):
        return make_model(name, size, attention), batch

    return make


def _packed(name, size, batch):
    return patch_model(make_model(name, size, "sdpa")), batch


def _flattened(name, size, batch):
    """transformers' collator without padding: rows joined, told apart by their positions."""
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


CONTENDERS = {
    "padded, SDPA": _padded("sdpa"),
    "padded, eager": _padded("eager"),
    "packed": _packed,
    "DataCollatorWithFlattening": _flattened,
    "padded, Liger": _liger,
}


def make_model(name, size, attention):
    """The same weights every time."""
    torch.manual_seed(0)
    model = MODELS[name](size)
    model.set_attn_implementation(attention)
    model.config.use_cache = False
    return model.to(DEVICE).train()


def padded_batch(name, size, preset):
    """The rows as collators pad them, and their real tokens, of both sides."""
    generator = torch.Generator().manual_seed(0)

    def tokens(side):
        ids = torch.randint(2, size.vocab, side.mask.shape, generator=generator).to(DEVICE)
        return ids.masked_fill(~side.mask, PAD)

    if name == "Llama":
        side = make_batch(size.rows, size.longest, preset)
        ids = tokens(side)
        sides, labels = [side], ids.masked_fill(~side.mask, IGNORED)
    else:
        sides = make_pair_batch(size.rows, size.longest, preset)
        ids = tokens(sides[0])
        labels = tokens(sides[1]).masked_fill(~sides[1].mask, IGNORED)
    batch = {"input_ids": ids, "attention_mask": sides[0].mask.long(), "labels": labels}
    return batch, sum(int(side.lengths.sum()) for side in sides)


class Step:
    """A training step that notes how long forward and backward took, apart from the optimizer."""

    def __init__(self, model, batch):
        self.model, self.batch = model, batch
        self.optimizer = torch.optim.AdamW(model.parameters(), fused=ON_GPU)
        self.seconds, self.both = [], []

    def __call__(self):
        begin = time.perf_counter()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_GPU):
            loss = self.model(**self.batch).loss
        loss.backward()
        self._wait()
        self.both.append(time.perf_counter() - begin)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()
        self.seconds.append(time.perf_counter() - begin)

    def forget(self):
        """The steps so far were to warm up."""
        self.seconds, self.both = [], []

    def _wait(self):
        if ON_GPU:
            torch.cuda.synchronize()
