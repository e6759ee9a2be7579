"""The models of the commands: those the demo trains, and the published shapes that inspect counts.

All are built from configs, with random weights or none; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from ..samples import examples
from ..samples.examples import ExampleSet
from ..samples.text import Text
from ..samples.tokenizer import BOS, EOS, PAD

# ------------------------------------------------------------------------------------------- sizes


@dataclass(frozen=True)
class Size:
    """How large the demo's models and batches are.

    Attributes:
        layers: of the encoder, where there is one, and as many of the decoder.
        vocab_size: of the tokenizer at most.
        batch_size: rows of an encoder-decoder. A causal LM takes two thirds: its rows make one
            stream of tokens, not two, and matrix products as tall from fewer of them.
        max_length: tokens of an input at most.
        max_label_length: tokens of an encoder-decoder's labels at most.
    """

    d_model: int
    d_ff: int
    heads: int
    layers: int
    vocab_size: int
    batch_size: int
    max_length: int
    max_label_length: int


SIZES = {
    "tiny": Size(32, 64, 2, 1, 512, 6, 64, 32),
    # Two CPU cores, minutes. Wide and shallow: what a step does once per sequence and layer weighs
    # little beside its matrix products, as in a model of practical size.
    "small": Size(512, 3072, 8, 2, 4096, 24, 256, 64),
    # A data-centre GPU.
    "large": Size(1024, 4096, 16, 12, 8192, 96, 1024, 256),
}


# -------------------------------------------------------------------------------- the demo's models


@dataclass(frozen=True)
class DemoModel:
    """One row of the demo: how to build the model, and its examples from texts."""

    title: str
    task: str
    build: Callable[[Size, Tokenizer], PreTrainedModel]
    make_examples: Callable[[Sequence[Text], Tokenizer, Size, int], ExampleSet]
    batch_size: Callable[[Size], int] = lambda size: size.batch_size


def _build_t5(size: Size, tokenizer: Tokenizer) -> PreTrainedModel:
    config = T5Config(
        vocab_size=tokenizer.get_vocab_size(),
        d_model=size.d_model,
        d_kv=size.d_model // size.heads,
        d_ff=size.d_ff,
        num_heads=size.heads,
        num_layers=size.layers,
        dropout_rate=0.0,
        decoder_start_token_id=tokenizer.token_to_id(PAD),
        **_common(tokenizer),
    )
    return T5ForConditionalGeneration(config)


def _build_nllb(size: Size, tokenizer: Tokenizer) -> PreTrainedModel:
    config = M2M100Config(
        vocab_size=tokenizer.get_vocab_size(),
        d_model=size.d_model,
        encoder_ffn_dim=size.d_ff,
        decoder_ffn_dim=size.d_ff,
        encoder_attention_heads=size.heads,
        decoder_attention_heads=size.heads,
        encoder_layers=size.layers,
        decoder_layers=size.layers,
        max_position_embeddings=size.max_length,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        decoder_start_token_id=tokenizer.token_to_id(EOS),
        **_common(tokenizer),
    )
    return M2M100ForConditionalGeneration(config)


def _build_llama(size: Size, tokenizer: Tokenizer) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=size.d_model,
        # Three matrices where T5 has two: as many weights at two thirds of the width.
        intermediate_size=size.d_ff * 2 // 3 // 32 * 32,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 2,
        num_hidden_layers=size.layers,
        max_position_embeddings=size.max_length,
        attention_dropout=0.0,
        **_common(tokenizer),
    )
    return LlamaForCausalLM(config)


def _common(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "pad_token_id": tokenizer.token_to_id(PAD),
        "eos_token_id": tokenizer.token_to_id(EOS),
        "bos_token_id": tokenizer.token_to_id(BOS),
        "use_cache": False,  # training needs none, and building one costs the padded run time
        "attn_implementation": "sdpa",
    }


DEMO_MODELS = {
    "t5": DemoModel(
        "T5",
        "span corruption",
        _build_t5,
        lambda texts, tokenizer, size, seed: examples.span_corruption_examples(
            texts, tokenizer, size.max_length, size.max_label_length, seed
        ),
    ),
    "nllb": DemoModel(
        "NLLB",
        "body -> summary",
        _build_nllb,
        lambda texts, tokenizer, size, seed: examples.pair_examples(
            texts, tokenizer, size.max_length, size.max_label_length
        ),
    ),
    "llama": DemoModel(
        "Llama",
        "causal",
        _build_llama,
        lambda texts, tokenizer, size, seed: examples.causal_examples(
            texts, tokenizer, size.max_length
        ),
        batch_size=lambda size: size.batch_size * 2 // 3,
    ),
}

# ----------------------------------------------------------------------- published shapes, to count


def _t5(d_model: int, d_ff: int, heads: int, layers: int) -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(d_model=d_model, d_ff=d_ff, num_heads=heads, num_layers=layers)
    )


def _nllb_600m() -> PreTrainedModel:
    return M2M100ForConditionalGeneration(M2M100Config(vocab_size=256_206))


def _llama(hidden: int, intermediate: int, layers: int) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128_256,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=8,
        )
    )


SHAPES: dict[str, Callable[[], PreTrainedModel]] = {
    "t5-small": lambda: _t5(512, 2048, 8, 6),
    "t5-base": lambda: _t5(768, 3072, 12, 12),
    "t5-large": lambda: _t5(1024, 4096, 16, 24),
    "nllb-600m": _nllb_600m,
    "llama-1b": lambda: _llama(2048, 8192, 16),
    "llama-8b": lambda: _llama(4096, 14336, 32),
}


def build_shape(name: str) -> PreTrainedModel:
    """A model of a published shape, on the meta device: its modules, without their weights.

    Raises:
        ValueError: if there is no shape of that name.
    """
    if name not in SHAPES:
        raise ValueError(f"shape: got {name!r}, takes one of {', '.join(SHAPES)}")
    with torch.device("meta"):
        return SHAPES[name]()


def build_config(name_or_path: str) -> PreTrainedModel:
    """The language model of a config, on the meta device.

    Args:
        name_or_path: a ``config.json``, a folder that holds one, or a name on the hub.

    Raises:
        ValueError: if there is no such config, or transformers has no language model for it.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model-config: no config in {name_or_path}: {error}") from None
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return kind.from_config(config)
    except ValueError as error:
        raise ValueError(f"--model-config: {name_or_path} is no language model: {error}") from None
